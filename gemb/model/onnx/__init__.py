"""A model folder as one ONNX graph: from token ids and their mask to the vector that gemb computes.

The graph is written, not traced: `encoder` walks the layers of a trainable backbone (`gemb.model.trainable`),
so the mathematics of each family stands in one place only, `layers` says what each is in ONNX operators, and
`graph` holds nodes and weights. Weights are fp32, or the whole numbers of a GGUF grid.

B texts, L tokens of the longest one, D width of the states, K of the vectors; H query heads, G key and value
heads, C channels of a head.
"""
