"""Searching indexes with texts: the encoder of an index, several indexes in one search, what a hit shows."""
