from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mixbits import zoo
from mixbits.core.locate import locate
from mixbits.data import load_digits

INPUT_SHAPES = dict.fromkeys(zoo.__all__, (3, 32, 32)) | {
    "digits_cnn": (1, 8, 8),
    "mobilenet_v2": (3, 224, 224),
    "resnet18_imagenet": (3, 224, 224),
}
every_network = pytest.mark.parametrize("name", zoo.__all__)

# Weights of convolutions and linear layers, without biases and batch norm. ResNet-20, ResNet-18 and
# MobileNetV2 as published; on CIFAR ResNet-18 has a 3x3 stem, not 7x7, and both have 10 classes, not 1000.
WEIGHTS = {
    "resnet20": 268_336,
    "resnet32": 461_872,
    "resnet56": 848_944,
    "resnet18_imagenet": 11_678_912,
    "resnet18": 11_678_912 - (49 - 9) * 3 * 64 - 990 * 512,
    "vgg16_bn": 14_710_464 + 512 * 10,
    "mobilenet_v2": 3_469_760,
    "mobilenet_v2_cifar": 3_469_760 - 990 * 1280,
    "shared_cnn": 9 * (3 * 32 + 32 * 32) + 32 * 10,
    "digits_cnn": 9 * (16 + 2 * 16 * 16 + 16 * 32 + 32 * 32) + 32 * 10,
}

# All parameters: torchvision's MobileNetV2 and ResNet-18; He et al.'s ResNet-20 (0.27M); the usual ResNet-18
# for CIFAR.
PARAMETERS = {
    "mobilenet_v2": 3_504_872,
    "resnet18_imagenet": 11_689_512,
    "resnet20": 269_722,
    "resnet18": 11_173_962,
}

DIGITS_EPOCHS = 15
DIGITS_TOP1 = 0.97  # four seeds gave 98.9 %; 1.5 % of 360 images are 5


def batch_norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{vector}": (channels,) for vector in vectors} | {f"{name}.num_batches_tracked": ()}


def resnet_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of public checkpoints of the option-A CIFAR ResNet, with ``blocks`` blocks a stage."""
    shapes = {"conv1.weight": (16, 3, 3, 3)} | batch_norm_shapes("bn1", 16)
    channels = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (width, channels, 3, 3)
            shapes |= batch_norm_shapes(f"{prefix}.bn1", width)
            shapes[f"{prefix}.conv2.weight"] = (width, width, 3, 3)
            shapes |= batch_norm_shapes(f"{prefix}.bn2", width)
            channels = width
    return shapes | {"linear.weight": (10, 64), "linear.bias": (10,)}


@pytest.mark.parametrize(("name", "count"), WEIGHTS.items(), ids=WEIGHTS)
def test_network_has_its_number_of_weights(name, count):
    network = getattr(zoo, name)()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    assert sum(layer.weight.numel() for layer in layers) == count


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items(), ids=PARAMETERS)
def test_network_has_its_number_of_parameters(name, count):
    assert sum(p.numel() for p in getattr(zoo, name)().parameters()) == count


@every_network
def test_network_gives_a_logit_a_class(name):
    network = getattr(zoo, name)(num_classes=7).eval()

    with torch.no_grad():
        assert network(torch.zeros(2, *INPUT_SHAPES[name])).shape == (2, 7)


@every_network
def test_network_exports_with_a_dynamic_batch(name):
    network = getattr(zoo, name)().eval()
    example = torch.randn(2, *INPUT_SHAPES[name])

    exported = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))

    x = torch.randn(3, *INPUT_SHAPES[name])
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), network(x), rtol=0, atol=0)


@every_network
def test_gradient_reaches_every_parameter(name):
    network = getattr(zoo, name)()

    network(torch.randn(2, *INPUT_SHAPES[name])).square().sum().backward()

    assert [key for key, p in network.named_parameters() if p.grad is None] == []


@every_network
def test_network_is_found_by_its_address(name):
    assert locate(f"mixbits.zoo:{name}") is getattr(zoo, name)


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet56", 9)], ids=["20", "32", "56"]
)
def test_public_checkpoints_of_resnets_load(name, blocks):
    shapes = resnet_shapes(blocks)
    checkpoint = {key: torch.zeros(shape) for key, shape in shapes.items()}

    network = getattr(zoo, name)()

    network.load_state_dict(checkpoint, strict=True)
    assert list(network.state_dict()) == list(shapes)


def test_shortcut_keeps_every_second_pixel_between_zero_channels():
    network = zoo.resnet20().eval()
    x = torch.randn(1, 16, 8, 8)

    out = network.get_submodule("layer2.0.shortcut")(x)

    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].count_nonzero() == out[:, 24:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("features.0.0.weight", (32, 3, 3, 3)),
        ("features.0.1.running_var", (32,)),
        ("features.1.conv.0.0.weight", (32, 1, 3, 3)),
        ("features.1.conv.1.weight", (16, 32, 1, 1)),
        ("features.1.conv.2.bias", (16,)),
        ("features.2.conv.0.0.weight", (96, 16, 1, 1)),
        ("features.2.conv.1.0.weight", (96, 1, 3, 3)),
        ("features.2.conv.2.weight", (24, 96, 1, 1)),
        ("features.17.conv.3.weight", (320,)),
        ("features.18.0.weight", (1280, 320, 1, 1)),
        ("classifier.1.weight", (1000, 1280)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mobilenet_has_the_keys_of_torchvision(key, shape):
    state = zoo.mobilenet_v2().state_dict()

    assert tuple(state[key].shape) == shape
    # 52 convolutions, 52 batch norms of five tensors, weight and bias of the classifier.
    assert len(state) == 314


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv1.weight", (64, 3, 7, 7)),
        ("bn1.running_var", (64,)),
        ("layer1.0.conv1.weight", (64, 64, 3, 3)),
        ("layer2.0.downsample.0.weight", (128, 64, 1, 1)),
        ("layer2.0.downsample.1.bias", (128,)),
        ("layer4.1.bn2.running_mean", (512,)),
        ("fc.weight", (1000, 512)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resnet18_for_imagenet_has_the_keys_of_torchvision(key, shape):
    state = zoo.resnet18_imagenet().state_dict()

    assert tuple(state[key].shape) == shape
    # 20 convolutions, 20 batch norms of five tensors, weight and bias of the classifier.
    assert len(state) == 122


@pytest.mark.parametrize(
    ("name", "module", "size"),
    [
        ("resnet18", "layer4", 4),
        ("resnet18_imagenet", "layer4", 7),
        ("mobilenet_v2", "features", 7),
        ("mobilenet_v2_cifar", "features", 4),
        ("mobilenet_se", "features", 4),
        ("vgg16_bn", "features", 1),
    ],
    ids=["resnet18", "resnet18_imagenet", "mobilenet_v2", "mobilenet_v2_cifar", "mobilenet_se", "vgg16_bn"],
)
def test_last_feature_map_has_its_size(name, module, size):
    network = getattr(zoo, name)().eval()
    seen = []
    network.get_submodule(module).register_forward_hook(
        lambda _module, _args, out: seen.append(out.shape[2:])
    )

    with torch.no_grad():
        network(torch.zeros(1, *INPUT_SHAPES[name]))

    assert seen == [(size, size)]


def test_shared_convolution_is_called_twice_and_kept_once():
    network = zoo.shared_cnn().eval()
    calls = []
    network.get_submodule("shared").register_forward_hook(
        lambda _module, _args, out: calls.append(out.shape[2])
    )

    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))

    assert calls == [16, 8]
    assert [key for key, _ in network.named_parameters() if key.startswith("shared")] == ["shared.weight"]


def test_convolutions_start_with_he_deviation():
    weight = zoo.resnet18().get_parameter("layer4.0.conv1.weight")

    # The deviation of 1.2M draws has a relative error of 1 / sqrt(2 * 1.2M) = 0.065 %: eight times that.
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=5e-3)


def test_digits_cnn_learns_the_digits_in_15_epochs():
    digits = load_digits()
    generator = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = zoo.digits_cnn()
    steps = DIGITS_EPOCHS * (len(digits.train) // 64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(DIGITS_EPOCHS):
        order = generator.permutation(len(digits.train))
        for indices in order[: len(order) // 64 * 64].reshape(-1, 64):
            x, y = digits.train.take(indices, generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimizer.step()
            schedule.step()

    x, y = digits.test.take(np.arange(len(digits.test)))
    with torch.no_grad():
        predicted = network.eval()(torch.from_numpy(x)).argmax(1).numpy()
    assert (predicted == y).mean() >= DIGITS_TOP1
