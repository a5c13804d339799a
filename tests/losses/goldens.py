"""Three rows of raw embeddings, whose losses at temperature 0.1 were worked out in float64 beforehand."""

import torch

QUERIES = torch.tensor([[1, 2, 0, -1], [0, 1, 1, 0], [2, -1, 1, 1]], dtype=torch.float64)
POSITIVES = torch.tensor([[1, 1, 0, -1], [1, 0, 1, 0], [1, -1, 0, 2]], dtype=torch.float64)
NEGATIVES = torch.tensor([[0, 2, 1, -1], [1, 1, 0, 1], [1, 0, 2, 1]], dtype=torch.float64)
OWNER = torch.arange(3)
TEMPERATURE = 0.1
SIX_DIGITS = 5.1e-7
"""The goldens are rounded to six digits."""
