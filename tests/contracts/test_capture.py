"""Capture: the graph is the user's network, in evaluation and in training, or an error says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits import zoo
from mixbits.core.grid import Uniform
from mixbits.graph.capture import CaptureError
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.quant.quantizer import LearnedStep
from networks import ODD_NETWORKS, Functional

# Sums of float32 in another order: torch computes its own transformer layer by another kernel in evaluation.
FLOAT32_ORDER = 1e-6


class Residual(nn.Module):
    """In-place ReLU module, functional ReLU, ``+=``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        out = self.bn(self.conv2(x))
        out += x
        return self.head(F.relu(out).mean((2, 3)))


class Shared(nn.Module):
    """One linear layer and one dropout, used twice each; one batch norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.head = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 3)
        self.norm = nn.BatchNorm1d(64)
        self.again = nn.Sequential(self.norm, self.drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.norm(self.linear(x.flatten(1)))))
        return self.head(self.again(F.relu(self.linear(x))))


class Shaped(nn.Module):
    """Python control flow on shapes, and ``len`` of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        while x.shape[-1] > 2:
            x = F.avg_pool2d(x, 2)
        return self.head(x.reshape(len(x), -1))


class Shuffle(nn.Module):
    """Channels mixed through ``contiguous`` and ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(self.conv2(x).mean((2, 3)))


class Buffers(nn.Module):
    """A buffer, a free parameter, a frozen parameter, layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((1, 1, 8, 8), 0.3))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)])
        self.layers[0].weight.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offset
        for layer in self.layers:
            x = F.gelu(layer(x) * self.scale)
        return self.head(x.mean((2, 3)))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
        nn.Hardtanh(),
        nn.AlphaDropout(0.2),
        nn.Linear(8, 3),
    )


SMALL = {
    "in-place, functional and +=": (Residual, (1, 8, 8)),
    "shared modules, dropout": (Shared, (1, 8, 8)),
    "len and control flow on shapes": (Shaped, (1, 8, 8)),
    "contiguous and view": (Shuffle, (1, 8, 8)),
    "buffers, lists, frozen parameters": (Buffers, (1, 8, 8)),
    "sequential": (sequential, (1, 8, 8)),
}
ZOO_SHAPES = {
    "digits_cnn": (1, 8, 8),
    "mobilenet_v2": (3, 224, 224),
    "resnet18_imagenet": (3, 224, 224),
}
ZOO = {name: (getattr(zoo, name), ZOO_SHAPES.get(name, (3, 32, 32))) for name in zoo.__all__}
ODD = {function.__name__: (function, (3, 12, 12)) for function in ODD_NETWORKS}
QUICK = {
    *SMALL,
    "digits_cnn",
    "resnet20",
    "shared_cnn",
    "vit_tiny",
    "dense",
    "class_token",
}  # a second or two each
NETWORKS = SMALL | ZOO | ODD

each_network = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in NETWORKS],
)


@cache
def pair(name: str) -> tuple[nn.Module, QuantGraph]:
    """A network and its capture."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # it is inside torch's own function, where capture does not see it
    return model, capture(model, torch.zeros(1, *shape))


def images(name: str, count: int) -> Tensor:
    return torch.randn(count, *NETWORKS[name][1], generator=torch.Generator().manual_seed(count))


def three_steps(network: nn.Module, inputs: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state after three updates in training mode, with the same dropout for everyone."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs), torch.arange(len(inputs)) % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, network.state_dict()


@each_network
def test_state_dict_keys_are_the_users(name):
    model, graph = pair(name)

    assert set(graph.module.state_dict()) == set(model.state_dict())
    assert {n for n, p in graph.module.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@each_network
@pytest.mark.parametrize("count", [1, 2, 5])
def test_outputs_are_the_users_for_any_batch_size(name, count):
    model, graph = pair(name)
    x = images(name, count)

    with torch.no_grad():
        ours, theirs = copy.deepcopy(graph.module).eval()(x), copy.deepcopy(model).eval()(x)

    assert torch.allclose(ours, theirs, rtol=0, atol=FLOAT32_ORDER if name == "class_token" else 0)


@each_network
def test_three_training_steps_are_bit_identical_to_the_users(name):
    model, graph = pair(name)
    x = images(name, 4)

    losses, state = three_steps(graph.module, x)
    wanted_losses, wanted = three_steps(model, x)

    assert losses == wanted_losses
    assert [key for key, value in wanted.items() if not torch.equal(state[key], value)] == []


@each_network
def test_a_captured_network_shares_nothing_with_the_users(name):
    model, graph = pair(name)
    theirs = {value.data_ptr() for value in model.state_dict().values()}

    assert not [key for key, value in graph.module.state_dict().items() if value.data_ptr() in theirs]


@pytest.mark.parametrize("name", ["shared modules, dropout", "sequential"])
def test_dropout_follows_train_and_eval(name):
    _, graph = pair(name)
    module, x = copy.deepcopy(graph.module), images(name, 5)

    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_batch_norm_follows_train_and_eval():
    _, graph = pair("in-place, functional and +=")
    module, x = copy.deepcopy(graph.module), images("in-place, functional and +=", 5)

    module.eval()(x)
    assert module.bn.num_batches_tracked == 0
    module.train()(x)
    assert module.bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_of_dropout_is_kept(dropout):
    module = capture(nn.Sequential(nn.Conv2d(1, 9, 3), dropout(0.4)), torch.zeros(2, 1, 8, 8)).module

    kept = [child for child in module.modules() if isinstance(child, dropout)]

    assert [child.p for child in kept] == [0.4]
    assert not torch.equal(module.train()(torch.ones(2, 1, 8, 8)), module(torch.ones(2, 1, 8, 8)))


@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_is_left_as_it_was_and_the_captured_one_is_in_eval_mode(training):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.BatchNorm2d(2)).train(training)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    graph = capture(model, torch.ones(2, 1, 8, 8))

    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in graph.module.modules()} == {False}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_sites_of_resnet20_have_their_addresses():
    _, graph = pair("resnet20")
    names = [site.name for site in graph.profile.sites]

    assert names[:12] == [
        "input",
        "conv1.weight",
        "relu",
        "layer1.0.conv1.weight",
        "layer1.0/relu",
        "layer1.0.conv2.weight",
        "layer1.0/relu.1",
        "layer1.1.conv1.weight",
        "layer1.1/relu",
        "layer1.1.conv2.weight",
        "layer1.1/relu.1",
        "layer1.2.conv1.weight",
    ]
    assert names[-3:] == ["layer3.2/relu.1", "adaptive_avg_pool2d", "linear.weight"]
    assert [site.name for site in graph.profile.sites if site.kind == "activation" and site.signed] == [
        "input"
    ]


class ReadTwice(nn.Module):
    """One tensor read by two convolutions, once through a max-pool, and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((F.max_pool2d(self.one(x) + x, 2) + self.two(F.max_pool2d(x, 2))).mean((2, 3)))


def test_a_tensor_that_is_read_twice_is_one_site_and_all_readers_see_it_quantized():
    model = ReadTwice()
    graph = capture(model, torch.zeros(2, 1, 8, 8))

    assert graph.profile.site("relu").readers == ("one", "two")

    put_(graph, {"relu": LearnedStep(Uniform(1, signed=False), torch.tensor(1e9), shared_by=1)})

    # With a step far above all values the tensor is zero for everyone who reads it: only biases are left.
    with torch.no_grad():
        wanted = model.head(model.one.bias + model.two.bias).expand(3, -1)
        assert torch.allclose(graph(torch.ones(3, 1, 8, 8)), wanted, atol=FLOAT32_ORDER)
    assert list(graph.quantizers) == ["relu"]
    assert [str(node.target) for node in graph.module.graph.nodes].count("quantizers.relu") == 1


def test_a_weight_that_is_used_twice_is_one_site():
    _, graph = pair("shared modules, dropout")

    names = [site.name for site in graph.profile.sites]

    assert names == ["input", "linear.weight", "relu", "again.0", "head.weight"]
    assert graph.profile.site("linear.weight").readers == ("linear", "linear.1")


class Signs(nn.Module):
    """A layer after each of many functions of a convolution ``y`` and its ReLU ``r``."""

    FUNCTIONS: tuple[tuple[str, bool, Callable[[Tensor, Tensor], Tensor]], ...] = (
        ("y", True, lambda y, r: y * 1),
        ("relu6", False, lambda y, r: F.relu6(y)),
        ("sigmoid", False, lambda y, r: torch.sigmoid(y)),
        ("gelu", True, lambda y, r: F.gelu(y)),
        ("clamp from 0", False, lambda y, r: y.clamp(0, 1)),
        ("clamp from below 0", True, lambda y, r: y.clamp(-0.5, 1)),
        ("sum of ReLUs", False, lambda y, r: r + F.relu(-y)),
        ("sum with a signed tensor", True, lambda y, r: r + y),
        ("difference of ReLUs", True, lambda y, r: r - F.relu(-y)),
        ("a ReLU times 2", False, lambda y, r: r * 2.0),
        ("a ReLU times -2", True, lambda y, r: r * -2.0),
        ("a ReLU plus -1", True, lambda y, r: r + -1.0),
        ("a ReLU plus -1 times a ReLU", True, lambda y, r: torch.add(r, F.relu(-y), alpha=-1)),
        ("channels of ReLUs", False, lambda y, r: torch.cat([r[:, :2], F.relu(-y)[:, 2:]], 1)),
        ("channels of both", True, lambda y, r: torch.cat([r[:, :2], y[:, 2:]], 1)),
        ("average of a ReLU", False, lambda y, r: F.avg_pool2d(r, 3, 1, 1)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.layers = nn.ModuleList(nn.Conv2d(4, 2, 1, bias=False) for _ in self.FUNCTIONS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        r = F.relu(y)
        parts = [layer(make(y, r)) for layer, (_, _, make) in zip(self.layers, self.FUNCTIONS, strict=True)]
        return torch.stack(parts).sum((0, 3, 4))


def test_a_site_is_unsigned_where_no_value_can_be_negative():
    profile = capture(Signs(), torch.zeros(2, 1, 6, 6)).profile
    read_by = {op.weight: op.input for op in profile.ops}

    signed = {
        name: profile.site(read_by[f"layers.{i}.weight"]).signed
        for i, (name, _, _) in enumerate(Signs.FUNCTIONS)
    }

    assert signed == {name: wanted for name, wanted, _ in Signs.FUNCTIONS}


class Refused(nn.Module):
    """A layer around a function that cannot be captured."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.function = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.conv(x)).mean((2, 3)))


def depends_on_values(network: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def drops_out_in_training_only(network: nn.Module, x: Tensor) -> Tensor:
    if network.training:
        x = F.dropout2d(x, 0.1)
    return x


def normalizes(network: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=network.training)


REFUSED = {
    "control flow on values": (
        depends_on_values,
        r"test_capture\.py, line \d+: if x\.sum\(\) > 0:\n  Control flow .* use torch\.where or torch\.cond",
    ),
    "a fixed batch": (lambda network, x: x.view(2, 4, 6, 6), "fixes the batch, .* write -1"),
    "F.dropout": (
        lambda network, x: F.dropout(x, 0.5, network.training),
        r"functional dropout is lost .*use an nn\.Dropout module\n.*test_capture\.py, line \d+:.*F\.dropout",
    ),
    "nn.functional.dropout": (lambda network, x: nn.functional.dropout(x), "use an nn.Dropout module"),
    "torch.dropout": (lambda network, x: torch.dropout(x, 0.5, network.training), "use an nn.Dropout module"),
    "dropout in training only": (
        drops_out_in_training_only,
        r"nn\.Dropout module\n.*F\.dropout2d\(x, 0\.1\)",
    ),
    "F.batch_norm": (normalizes, "functional batch_norm cannot follow .*use an nn.BatchNorm2d module"),
    "running statistics of an instance norm": (
        lambda network, x: F.instance_norm(x, torch.zeros(4), torch.ones(4), use_input_stats=False),
        "use track_running_stats=False",
    ),
    "noise": (lambda network, x: x + torch.randn_like(x), "randn_like: it draws .* only if self.training"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_captured_is_refused_with_the_remedy(function, message):
    with pytest.raises(CaptureError, match=f"(?s){message}"):
        capture(Refused(function), torch.zeros(2, 1, 8, 8))


class Returns(nn.Module):
    """A network whose output is made by a function of the logits."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(64, 3), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: (y, y + 1), "returns 2 tensors; mixbits needs one, the logits"),
        (lambda y: {"logits": y}, "returns dict; mixbits needs one tensor, the logits"),
    ],
    ids=["two tensors", "a dict"],
)
def test_a_network_must_return_one_tensor(function, message):
    with pytest.raises(CaptureError, match=message):
        capture(Returns(function), torch.zeros(2, 1, 8, 8))


def test_layers_that_forward_does_not_use_are_named():
    model = Returns(lambda y: y)
    model.auxiliary = nn.Linear(3, 3)

    with pytest.raises(CaptureError, match=r"does not use 2 tensors.* 'auxiliary\.weight'; remove"):
        capture(model, torch.zeros(2, 1, 8, 8))


def test_a_weight_of_two_layers_is_one_site():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight

    sites = capture(model, torch.zeros(2, 1, 8, 8)).profile.weights

    assert [len(site.readers) for site in sites] == [2]


def test_a_parameter_in_a_plain_matrix_product_is_said_to_stay_in_float():
    model = Functional(lambda self, x: self.linear(x.flatten(1)) @ self.mixing, linear=nn.Linear(64, 3))
    model.mixing = nn.Parameter(torch.eye(3))

    with pytest.warns(UserWarning, match=r"^matmul: 'mixing' stays in float32 .* use nn\.Linear"):
        capture(model, torch.zeros(2, 1, 8, 8))


def test_weights_of_half_precision_are_refused():
    with pytest.raises(CaptureError, match=r"^linear\.weight: it is torch\.float16.* call model\.float\(\)"):
        capture(Returns(lambda y: y).half(), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 3)),
            r"^0/conv_transpose2d: no integer rule for conv_transpose2d \(have: conv1d, conv2d, linear\)",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.ReLU()),
            "no convolution or linear layer, so there is nothing to quantize",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))),
            r"its weight is computed, not a parameter.*remove_parametrizations",
        ),
    ],
    ids=["transposed convolution", "no layer", "computed weight"],
)
def test_layers_without_an_integer_rule_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        capture(model, torch.zeros(2, 1, 8, 8))


def test_nothing_is_printed_while_a_capture_fails(capfd):
    capfd.readouterr()  # what pytest itself said before
    with pytest.raises(CaptureError):
        capture(Refused(depends_on_values), torch.zeros(2, 1, 8, 8))

    assert capfd.readouterr() == ("", "")


class DropsPaths(nn.Module):
    """A residual branch that is left out at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.branch(x))
        return x + y * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else x + y


def test_what_happens_in_training_alone_is_said_to_be_lost():
    with pytest.warns(UserWarning, match=r"^1: its forward reads self\.training") as said:
        capture(nn.Sequential(nn.Linear(4, 4), DropsPaths()), torch.zeros(2, 4))

    assert len(said) == 1
