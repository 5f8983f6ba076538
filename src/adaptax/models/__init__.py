"""The networks of the papers, channels last, for a batch of inputs."""

from .conv4 import CONV4, Conv4
from .layers import BatchNorm, Conv2d, Linear, max_pool
from .mlp import MLP

__all__ = ["CONV4", "MLP", "BatchNorm", "Conv2d", "Conv4", "Linear", "max_pool"]
