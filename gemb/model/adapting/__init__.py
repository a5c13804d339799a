"""A decoder language model as a bidirectional encoder: key maps, the streaming writer, proofs and report."""
