"""Weights on integer grids: the grids, training through them, and the GGUF files that hold them.

D is the width of a weight's rows (its output channels, or the tokens of a table), G the blocks of 32 in one.
"""
