"""Searching indexes with texts: the encoder of an index, several indexes in one search, what a hit shows.

`Index` is the Python door, `gemb.Index`. No torch before the first text is embedded.
"""

from gemb.retrieval.index import Index

__all__ = ["Index"]
