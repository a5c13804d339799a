"""The packed forward with gradients: a model folder that can be trained and saved as a folder again."""

from gemb.model.trainable.blocks import Computation, Recompute
from gemb.model.trainable.encoder import TrainableEncoder

__all__ = ["Computation", "Recompute", "TrainableEncoder"]
