"""The index folder: a SQLite catalogue, immutable segments of vectors, and what searches them. No torch."""
