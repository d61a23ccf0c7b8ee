"""Networks to try methods on, as functions: ``mixbits.zoo:resnet20``."""

from __future__ import annotations

from mixbits.zoo.digits import digits_cnn
from mixbits.zoo.mobilenet import mobilenet_se, mobilenet_v2, mobilenet_v2_cifar
from mixbits.zoo.resnet_cifar import resnet18, resnet20, resnet32, resnet56
from mixbits.zoo.resnet_imagenet import resnet18_imagenet
from mixbits.zoo.shared import shared_cnn
from mixbits.zoo.vgg import vgg16_bn
from mixbits.zoo.vit import vit_tiny

__all__ = [
    "digits_cnn",
    "mobilenet_se",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "resnet18",
    "resnet18_imagenet",
    "resnet20",
    "resnet32",
    "resnet56",
    "shared_cnn",
    "vgg16_bn",
    "vit_tiny",
]
