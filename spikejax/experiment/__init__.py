"""Experiments, from command line to result.json: the parts that the scripts share."""

from spikejax.experiment.build import BaselineOptions as BaselineOptions
from spikejax.experiment.build import EfficientNetOptions as EfficientNetOptions
from spikejax.experiment.build import GeneralOptions as GeneralOptions
from spikejax.experiment.build import MultiThresholdOptions as MultiThresholdOptions
from spikejax.experiment.build import ReLUOptions as ReLUOptions
from spikejax.experiment.build import ResNetOptions as ResNetOptions
from spikejax.experiment.build import SequenceOptions as SequenceOptions
from spikejax.experiment.build import SingleOptions as SingleOptions
from spikejax.experiment.build import TransformerOptions as TransformerOptions
from spikejax.experiment.build import VGGOptions as VGGOptions
from spikejax.experiment.config import Experiment as Experiment
from spikejax.experiment.config import Images as Images
from spikejax.experiment.config import ImageSize as ImageSize
from spikejax.experiment.config import Inputs as Inputs
from spikejax.experiment.config import Task as Task
from spikejax.experiment.config import main as main
from spikejax.experiment.config import open_images as open_images
from spikejax.experiment.config import read as read
from spikejax.experiment.config import read_relu as read_relu
from spikejax.experiment.config import report as report
from spikejax.experiment.config import run as run
from spikejax.experiment.config import train as train
