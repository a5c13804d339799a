"""How good a model is: retrieval, similarity, classification, clustering, bitext mining, reranking.

A task gives texts by role, is handed their vectors, and scores them. Texts are embedded once, at full
width; smaller sizes and stored types are views of the same vectors.
"""

from gemb.evaluation.comparing import Comparison, compare
from gemb.evaluation.running import Result, TextEncoder, evaluate
from gemb.evaluation.tasks import Score, Task, Texts
from gemb.evaluation.views import View

__all__ = ["Comparison", "Result", "Score", "Task", "TextEncoder", "Texts", "View", "compare", "evaluate"]
