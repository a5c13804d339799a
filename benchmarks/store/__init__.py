"""Benchmarks of the index folder and its search: the store against its peers, on vectors of real text."""
