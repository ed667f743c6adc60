"""Training that resumes: the loop, its recipe, checkpoints, and many devices."""

from spikejax.train.loop import Fitted, evaluate, fit
from spikejax.train.recipe import TrainConfig, make_optimizer

__all__ = ["Fitted", "TrainConfig", "evaluate", "fit", "make_optimizer"]
