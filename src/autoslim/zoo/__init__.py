"""The papers' networks as plain `nn.Module`s: nothing of ours is needed to run or slim them."""

from autoslim.zoo.mobilenets import mnasnet, mobilenet_v1, mobilenet_v2
from autoslim.zoo.resnets import resnet20, resnet50, resnet56
from autoslim.zoo.shufflenets import shufflenet_v1, shufflenet_v2

__all__ = [
    "mnasnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet20",
    "resnet50",
    "resnet56",
    "shufflenet_v1",
    "shufflenet_v2",
]
