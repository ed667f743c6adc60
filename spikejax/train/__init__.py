"""Training that resumes: the loop, its recipe, checkpoints, and many devices."""

from spikejax.train.loop import Fitted, evaluate, fit
from spikejax.train.recipe import TrainConfig

__all__ = ["Fitted", "TrainConfig", "evaluate", "fit"]
