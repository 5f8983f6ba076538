"""The networks of the papers, channels last, for a batch of inputs."""

from ..pooling import max_pool
from .conv4 import CONV4, Conv4
from .layers import BatchNorm, Conv2d, Linear
from .mlp import MLP
from .policies import CategoricalMLP, GaussianMLP
from .resnet12 import ResNet12
from .wide_resnet import WideResNet

__all__ = [
    "CONV4",
    "MLP",
    "BatchNorm",
    "CategoricalMLP",
    "Conv2d",
    "Conv4",
    "GaussianMLP",
    "Linear",
    "ResNet12",
    "WideResNet",
    "max_pool",
]
# FIX
