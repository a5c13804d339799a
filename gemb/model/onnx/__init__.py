"""A model folder as one ONNX graph: from token ids and their mask to the vector that gemb computes.

The graph is written, not traced: `encoder` walks the layers of a trainable backbone (`gemb.model.trainable`),
so the mathematics of each family stands in one place only, `layers` says what each is in ONNX operators, and
`graph` holds nodes and weights. Weights are fp32, or the whole numbers of a GGUF grid.

B texts, L tokens of the longest one, D width of the states, K of the vectors; H query heads, G key and value
heads, C channels of a head.
"""

SAME_VECTORS = "gemb.fingerprint"
"""The metadata of a graph that gives the vectors of the model with this fingerprint; others lack it."""
CHECKSUM = "gemb.weights_sha256"
"""The metadata that has the checksum of the file of weights."""
