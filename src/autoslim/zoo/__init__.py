"""The papers' networks as plain `nn.Module`s, one file each: nothing of ours is needed to run or slim them."""

from autoslim.zoo.mnasnet import mnasnet
from autoslim.zoo.mobilenet_v1 import mobilenet_v1
from autoslim.zoo.mobilenet_v2 import mobilenet_v2
from autoslim.zoo.resnet50 import resnet50
from autoslim.zoo.resnet_cifar import resnet20, resnet56
from autoslim.zoo.shufflenet_v1 import shufflenet_v1
from autoslim.zoo.shufflenet_v2 import shufflenet_v2

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
