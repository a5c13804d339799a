"""The model of an index, for the jobs; `gemb.retrieval.index_model` holds it, as searching needs it too."""

from gemb.retrieval.index_model import SHOWN_DIGITS, find_encoder, lasting_name, record_of, shown_model

__all__ = ["SHOWN_DIGITS", "find_encoder", "lasting_name", "record_of", "shown_model"]
