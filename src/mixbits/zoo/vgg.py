"""VGG with batch norm for 32 x 32 images (Simonyan and Zisserman 2015, configuration D)."""

from __future__ import annotations

from torch import Tensor, nn

from mixbits.zoo.init import he_init_

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a max-pool after each


class VGG(nn.Module):
    """3x3 convolutions in stages, each ended by a 2x2 max-pool, then one linear layer.

    ``features`` is numbered as torchvision's ``vgg16_bn``, biases of convolutions included; ``classifier``
    is a single linear layer in place of ImageNet's three, as is usual on CIFAR.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], *, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for stage in stages:
            for width in stage:
                self.features.append(nn.Conv2d(channels, width, 3, padding=1))
                self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU(inplace=True))
                channels = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Linear(channels, num_classes)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] to logits [n, num_classes]."""
        return self.classifier(self.features(x).flatten(1))


def vgg16_bn(*, num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm and one linear layer, for CIFAR."""
    return VGG(STAGES, num_classes=num_classes)
