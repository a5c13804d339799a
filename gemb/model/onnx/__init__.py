"""A model folder as one ONNX graph: from token ids and their mask to the vector that gemb computes.

The graph is written, not traced: `encoder` walks the layers of a trainable backbone (`gemb.model.trainable`),
so the mathematics of each family stands in one place only, `layers` says what each is in ONNX operators, and
`graph` holds nodes and weights. Weights are fp32, or the whole numbers of a GGUF grid.

B texts, L tokens of the longest one, D width of the states, K of the vectors; H query heads, G key and value
heads, C channels of a head.
"""

import hashlib

SAME_VECTORS = "gemb.fingerprint"
"""The metadata of a graph that gives the vectors of the model with this fingerprint; others lack it."""
CHECKSUM = "gemb.weights_sha256"
"""The metadata that has the checksum of the file of weights."""
OWN_CHECKSUM = "gemb.graph_sha256"
"""The metadata that has the checksum of the graph's own bytes, this value taken as NO_CHECKSUM."""
NO_CHECKSUM = "0" * 64


def entry(key: str, value: str) -> bytes:
    """An entry of the metadata as protobuf has it in the file: the key, a tag, the length and the value."""
    return f"{key}\x12{chr(len(value))}{value}".encode()


def sealed(content: bytes) -> bytes:
    """A graph whose metadata has NO_CHECKSUM, with its checksum there."""
    checksum = hashlib.sha256(content).hexdigest()
    return content.replace(entry(OWN_CHECKSUM, NO_CHECKSUM), entry(OWN_CHECKSUM, checksum))


def is_whole(content: bytes) -> bool:
    """Whether a graph has the checksum that `sealed` gave it; True for one that has none."""
    before, checksum, after = _cut_out(content, OWN_CHECKSUM)
    return not checksum or hashlib.sha256(before + NO_CHECKSUM.encode() + after).hexdigest() == checksum


def checksum_of_weights(content: bytes) -> str | None:
    """The checksum that the metadata of a graph has for its weights; None if gemb did not write it."""
    return _cut_out(content, CHECKSUM)[1] or None


def _cut_out(content: bytes, key: str) -> tuple[bytes, str, bytes]:
    """What stands before the checksum under `key`, the checksum, "" if there is none, and what follows."""
    start = entry(key, NO_CHECKSUM)[: -len(NO_CHECKSUM)]
    before, found, rest = content.partition(start)
    checksum = rest[: len(NO_CHECKSUM)].decode("latin-1")  # damaged ones are no ASCII
    return before + found, checksum, rest[len(NO_CHECKSUM) :]
