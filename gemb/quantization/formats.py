"""The names of the weight formats of EmbeddingGemma (arXiv 2509.20354); loads no torch."""

from typing import Literal, TypeAlias

WeightFormat: TypeAlias = Literal["int4", "int8", "mixed"]
"""int4 and int8 in GGUF's blocks of 32; mixed with one scale a row, attention in int8, the rest in int4."""
