"""A decoder language model as a bidirectional encoder: key maps, the streaming writer, proofs and report."""

from gemb.model.adapting.adaptation import REPORT, Adaptation, Adapted, Wanted, plan, write
from gemb.model.adapting.folder import Pooling

__all__ = ["REPORT", "Adaptation", "Adapted", "Pooling", "Wanted", "plan", "write"]
