"""Proof that an encoder sees what its config.json says, and that texts do not see each other.

A decoder that runs causally where it should not gives vectors that look right and rank badly, so nobody takes
a flag's word for it: one token is changed, and the states tell who saw it.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.device import processor
from gemb.errors import MismatchError
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import fingerprint
from gemb.model.hub import cache_folder

_LAYOUT = "3"  # part of every cache key; raise it when the proof changes
_LENGTHS = (4, 9, 14)
"""Tokens of the texts at most; the middle one is changed."""
_CROWD = 300
"""Tokens of the neighbour beside which a vector must stay as it is."""
_ROUNDING = 4
"""Roundings of the dtype by which equal states may lie apart, as a share of their length. A MiniLM that a
learning rate of 0.5 had ruined showed 0.5 in fp32; sound, it shows 116 in bf16 and 7,600,000 in fp32."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen when one token was changed."""

    is_bidirectional: bool | None
    """Whether the last token of a text moves the state of its first, alone and beside others.

    None if that depends on what else is in the batch, which no sound model does.
    """
    is_declared: bool | None
    """Whether config.json makes the model bidirectional; None for a family whose rules are not known."""
    neighbour_difference: float
    """The largest difference between a text's vector alone and in a batch; 0 is equal to the bit."""
    is_collapsed: bool = False
    """Whether all tokens of all texts have the same state but for rounding, as a training that went wrong
    leaves them. Then `is_bidirectional` is noise: who sees whom cannot be told."""

    def __str__(self) -> str:
        if self.is_collapsed:
            return (
                "the model gives nearly the same states for all texts, so it cannot tell them apart, and "
                "which way it attends is not proved; go back to the model that it was made from"
            )
        way = _WAYS[self.is_bidirectional]
        source = (
            "proved; config.json does not tell" if self.is_declared is None else "as config.json says, proved"
        )
        if self.neighbour_difference == 0:
            return f"{way} ({source}); a vector does not depend on its neighbours in a batch"
        difference = f"{self.neighbour_difference:.1e}"
        return f"{way} ({source}); neighbours in a batch move a vector by {difference} at most"


_WAYS: Mapping[bool | None, str] = {
    True: "bidirectional",
    False: "causal",
    None: "bidirectional in some batches and causal in others",
}


def prove_bidirectional(encoder: PackedEncoder) -> Proof:
    """The proof for `encoder`, from the user's cache if the same model was proved here before.

    A model that is collapsed is no reason to refuse: it is computed as it is, and its proof says so.

    Raises MismatchError if the model is causal where config.json says bidirectional, or the reverse.
    """
    place = _place(encoder)
    proof = _remembered(place)
    if proof is None:
        proof = _prove(encoder)
        _remember(place, proof)
    if proof.is_collapsed:
        return proof
    wanted = proof.is_bidirectional if proof.is_declared is None else proof.is_declared
    if wanted is None or wanted != proof.is_bidirectional:
        said = "nothing of" if proof.is_declared is None else _WAYS[proof.is_declared]
        raise MismatchError(
            f"{encoder.folder.transformer.folder / 'config.json'} says {said} attention, but the model "
            f"computes {_WAYS[proof.is_bidirectional]} attention (seen in the state of a "
            "text's first token when its last one is changed); its vectors would be wrong; "
            "try the newest gemb and transformers, or report the model"
        )
    return proof


Text = tuple[int, ...]


def _prove(encoder: PackedEncoder) -> Proof:
    """Change the last token of a text that stands alone, before and after a longer one, and look."""
    short, middle, long = _texts(encoder)
    changed = (*middle[:-1], middle[0])
    orders = [[middle], [middle, long], [long, middle], [long, middle, short]]
    seen = {_moves(encoder, order, order.index(middle), changed) for order in orders}
    crowd = [_filler(encoder), *orders[-1]]
    together = _vectors(encoder, crowd)
    alone = torch.cat([_vectors(encoder, [text]) for text in crowd])
    difference = float((together - alone).abs().max())
    is_collapsed = _is_collapsed(encoder, [short, middle, long])
    return Proof(seen.pop() if len(seen) == 1 else None, _declared(encoder), difference, is_collapsed)


def _is_collapsed(encoder: PackedEncoder, texts: list[Text]) -> bool:
    """Whether the states of all tokens differ by the rounding of the encoder's dtype alone."""
    states = encoder.states(*_packed(texts)).double()
    spread = (states - states.mean(0)).norm() / states.norm()
    return float(spread) <= _ROUNDING * torch.finfo(encoder.kernels.dtype).eps


def _filler(encoder: PackedEncoder) -> Text:
    """A text so long that a batch with it takes other row counts through the products."""
    folder = encoder.folder
    entries = int(folder.text_config.get("vocab_size") or 100)
    length = min(_CROWD, folder.max_tokens)
    return tuple(int(number) for number in np.random.default_rng(6).integers(entries // 2, entries, length))


def _texts(encoder: PackedEncoder) -> list[Text]:
    """Three texts of different length; no token is twice in one."""
    folder = encoder.folder
    # No text is longer than the way of a token's influence through all layers to the left.
    rights = [reach.right for reach in reach_of_layers(_config(encoder)) or ()]
    longest = (
        _LENGTHS[1]
        if not rights or None in rights or 0 in rights
        else 1 + sum(map(int, filter(None, rights)))
    )
    middle = max(2, min(_LENGTHS[1], longest, folder.max_tokens))
    lengths = (max(1, middle // 2), middle, max(middle, min(_LENGTHS[2], folder.max_tokens)))
    # From the upper half of the vocabulary, away from special tokens.
    entries = int(folder.text_config.get("vocab_size") or 100)
    ids = entries // 2 + np.random.default_rng(5).permutation(entries - entries // 2)
    numbers = [int(number) for number in np.resize(ids, sum(lengths))]
    ends = np.cumsum(lengths)
    return [tuple(numbers[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


def _moves(encoder: PackedEncoder, order: list[Text], place: int, changed: Text) -> bool:
    """Whether the first state of the text at `place` moves when `changed` stands there instead."""
    first = sum(len(text) for text in order[:place])
    other = [*order[:place], changed, *order[place + 1 :]]
    before, after = (encoder.states(*_packed(texts))[first] for texts in (order, other))
    # To the bit: a causal layer computes the first token from the same numbers in the same order.
    return not torch.equal(before, after)


def _vectors(encoder: PackedEncoder, order: list[Text]) -> Tensor:
    return encoder.forward(*_packed(order))


def _packed(texts: list[Text]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return np.array([number for text in texts for number in text], dtype=np.int32), lengths


def _declared(encoder: PackedEncoder) -> bool | None:
    """Whether config.json makes the model bidirectional; None if its family's rules are not known."""
    reaches = reach_of_layers(_config(encoder))
    return None if reaches is None else is_bidirectional(reaches)


def _config(encoder: PackedEncoder) -> Mapping[str, Any]:
    return {"model_type": encoder.folder.family, **encoder.folder.text_config}


def _place(encoder: PackedEncoder) -> Path:
    """Where the proof of this model, computed this way on this machine, is kept."""
    kernels = encoder.kernels
    key = [_LAYOUT, fingerprint(encoder.folder), kernels.device, str(kernels.dtype), torch.__version__]
    key += [str(processor()), *encoder.notes]
    return cache_folder() / "proofs" / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()}.json"


def _remembered(place: Path) -> Proof | None:
    try:
        known = orjson.loads(place.read_bytes())
        seen, declared, difference, collapsed = (known[name] for name in Proof.__slots__)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    is_sound = {seen, declared} <= {True, False, None} and isinstance(difference, float)
    is_sound = is_sound and isinstance(collapsed, bool)
    return Proof(seen, declared, difference, collapsed) if is_sound else None


def _remember(place: Path, proof: Proof) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(orjson.dumps(asdict(proof)))
        unfinished.replace(place)
    except OSError:
        return  # the next run proves it once more
