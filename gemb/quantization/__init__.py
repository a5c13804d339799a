"""Weights on integer grids: the grids, training through them, and the GGUF files that hold them.

R rows of a weight (its output channels, or tokens of an embedding table), D its width, G blocks of 32 in a row.
"""
