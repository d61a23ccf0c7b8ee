"""Calibration: what a layer reads, compensated rounding, sensitivities, and values chosen without training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.graph.sites import MAC_OPS
from mixbits.quant import rounding
from mixbits.quant.functional import nearest_level
from mixbits.quant.rounding import compensated_levels
from mixbits.search.greedy import choices
from mixbits.train.calibrate import calibrate, channel_statistics, input_rows, observe_float, sensitivity
from mixbits.train.method import usual_grid

FLOAT32_SUM = 1e-4  # relative, of a few hundred float32 products summed in another order


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(*layers: nn.Module, example: Tensor) -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(*layers)
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.3)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
        return capture(model.eval(), example)


def policy_of(graph: QuantGraph, weights: int, activations: int) -> Policy:
    return Policy(
        {s.name: usual_grid(s, weights if s.kind == "weight" else activations) for s in graph.profile.sites}
    )


LAYERS = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    "stride and no bias": (nn.Conv2d(4, 6, 3, stride=2, bias=False), (5, 4, 9, 7)),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), (5, 4, 7, 7)),
    "valid, dilated": (nn.Conv2d(4, 6, 3, padding="valid", dilation=2), (5, 4, 9, 9)),
    "two groups": (nn.Conv2d(4, 6, 3, padding=(1, 0), groups=2), (5, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (5, 4, 7, 7)),
    "1-d": (nn.Conv1d(4, 6, 5, stride=2, padding=2), (5, 4, 11)),
    "1-d, same": (nn.Conv1d(4, 6, 4, padding="same"), (5, 4, 11)),
    "linear": (nn.Linear(8, 6), (5, 8)),
    "linear over a sequence": (nn.Linear(8, 6), (5, 3, 8)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_rows_times_weights_is_the_layers_output(layer, shape):
    inputs = draw(*shape)
    graph = network(layer, example=inputs)
    node = next(node for node in graph.module.graph.nodes if node.target in MAC_OPS)
    weight = layer.weight.detach()

    rows = input_rows(node, inputs, weight)

    groups = len(rows)
    products = weight.reshape(groups, len(weight) // groups, -1) @ rows
    wanted = layer(inputs) - (0 if layer.bias is None else layer(torch.zeros_like(inputs)))
    channel = -1 if isinstance(layer, nn.Linear) else 1
    found = products.flatten(0, 1)
    assert found.shape[1] * len(found) == wanted.numel()
    # The order of the positions does not matter: second moments are sums over them.
    assert torch.allclose(
        found.sort(1).values, wanted.detach().movedim(channel, 0).flatten(1).sort(1).values, atol=FLOAT32_SUM
    )


def correlated_moments(d: int, groups: int = 1) -> Tensor:
    inputs = draw(groups, d, 3) @ draw(groups, 3, 400, seed=1) + 0.1 * draw(groups, d, 400, seed=2)
    return inputs @ inputs.mT / 400


def plain(values: Tensor) -> Tensor:
    return nearest_level(values, Uniform(3, signed=True))


def test_without_correlation_compensated_rounding_is_rounding():
    weight, step = draw(1, 5, 70), torch.full((1, 5), 0.3)

    levels = compensated_levels(weight, torch.diag_embed(1 + draw(1, 70).abs()), step, plain)

    assert torch.equal(levels, plain(weight / step[..., None]))


@pytest.mark.parametrize("d", [1, 9, 64, 65, 150])
def test_compensated_rounding_changes_the_output_less(d):
    weight, step, moments = draw(1, 8, d), torch.full((1, 8), 0.5), correlated_moments(d)

    def output_error(levels: Tensor) -> float:
        error = levels * step[..., None] - weight
        return float(((error @ moments) * error).sum())

    compensated = output_error(compensated_levels(weight, moments, step, plain))
    rounded = output_error(plain(weight / step[..., None]))
    assert compensated <= rounded
    assert d == 1 or compensated < 0.7 * rounded


def test_errors_are_passed_on_from_block_to_block(monkeypatch):
    weight, step, moments = draw(1, 8, 150), torch.full((1, 8), 0.5), correlated_moments(150)
    in_blocks = compensated_levels(weight, moments, step, plain)

    monkeypatch.setattr(rounding, "BLOCK", 1000)
    at_once = compensated_levels(weight, moments, step, plain)

    # Another order of sums may turn a tie, and what follows it, the other way.
    assert (in_blocks == at_once).float().mean() > 0.99


def test_groups_are_rounded_apart():
    weight, step, moments = draw(3, 4, 9), draw(3, 4).abs() + 0.2, correlated_moments(9, groups=3)

    together = compensated_levels(weight, moments, step, plain)

    for group in range(3):
        one = slice(group, group + 1)
        assert torch.equal(together[one], compensated_levels(weight[one], moments[one], step[one], plain))


def test_an_input_that_is_always_zero_does_no_harm():
    moments = correlated_moments(6)
    moments[:, 2], moments[:, :, 2] = 0, 0

    levels = compensated_levels(draw(1, 4, 6), moments, torch.full((1, 4), 0.5), plain)

    assert torch.isfinite(levels).all()


def test_the_harm_of_a_single_layer_is_the_squared_change_of_its_output():
    images = draw(200, 12)
    graph = network(nn.Linear(12, 5), example=images[:2])
    allowed = choices(graph.profile, (2, 4, 8), (8,))
    observed = observe_float(graph, images)

    harm = sensitivity(graph, observed, allowed)["0.weight"]

    for bits in (2, 4, 8):
        quantized = calibrate(graph, policy_of(graph, bits, 8), images, observed).weight("0.weight")
        change = F.linear(images, (quantized - graph.weight("0.weight")).detach())
        assert harm[bits] == pytest.approx(float(change.square().sum(1).mean()), rel=FLOAT32_SUM)
    assert harm[2] > harm[4] > harm[8]


def cnn(images: Tensor) -> QuantGraph:
    return network(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
        example=images[:2],
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(60, 1, 6, 6, seed=3)


def test_every_site_has_a_harm_that_falls_with_every_bit(images):
    graph = cnn(images)
    allowed = choices(graph.profile, (1, 2, 4, 6), (2, 4, 8))

    harm = sensitivity(graph, observe_float(graph, images), allowed)

    assert {site: tuple(table) for site, table in harm.items()} == dict(allowed.widths)
    for table in harm.values():
        values = list(table.values())
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]


def test_the_harm_foretells_how_much_the_outputs_change(images):
    graph = network(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 4),
        example=images[:2],
    )
    observed = observe_float(graph, images)
    foretold = sensitivity(graph, observed, choices(graph.profile, (3,), (8,)))

    for name in ("0.weight", "2.weight", "5.weight"):
        bits = {site.name: 3 if site.name == name else 8 for site in graph.profile.sites}
        policy = Policy({site.name: usual_grid(site, bits[site.name]) for site in graph.profile.sites})
        with torch.no_grad():
            change = calibrate(graph, policy, images, observed)(images) - graph(images)
        # Measured: 0.97, 1.11 and 1.08; the other sites at 8 bits and higher orders are the rest.
        assert float(change.square().sum(1).mean()) == pytest.approx(foretold[name][3], rel=0.25)


@pytest.mark.parametrize("weights", [1, 2, 4, 8])
def test_calibrated_weights_are_on_their_grids_and_the_given_network_is_unchanged(weights, images):
    graph = cnn(images)
    before = {key: value.clone() for key, value in graph.module.state_dict().items()}

    network_ = calibrate(graph, policy_of(graph, weights, 8), images, observe_float(graph, images))

    for site in graph.profile.weights:
        quantizer, weight = network_.quantizers[site.name], network_.weight(site.name)
        assert torch.allclose(quantizer(weight), weight, rtol=1e-6)
    assert not network_.module.training
    assert all(torch.equal(value, before[key]) for key, value in graph.module.state_dict().items())
    assert graph.quantizers == {}


def test_statistics_move_to_what_batch_norms_read_once_quantized(images):
    graph = cnn(images)
    names = [node for node in graph.module.graph.nodes if node.name in observe_float(graph, images).norms]
    for node in names:  # the network's own statistics are those of these images, layer by layer
        mean, variance = observe_float(graph, images).norms[node.name]
        norm = graph.module.get_submodule(str(node.target))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    observed = observe_float(graph, images)

    quantized = calibrate(graph, policy_of(graph, 2, 4), images, observed)

    read: dict[str, Tensor] = {}
    norms = [quantized.module.get_submodule(str(node.target)) for node in names]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, _: read.update({id(module): inputs[0]}))
    with torch.no_grad():
        quantized(images)
    assert len(norms) == 2
    for norm, old in zip(norms, observed.norms.values(), strict=True):
        mean, variance = channel_statistics(read[id(norm)])
        assert torch.allclose(norm.running_mean, mean, atol=FLOAT32_SUM)
        assert torch.allclose(norm.running_var, variance, rtol=1e-2)  # moved by a ratio of variance + eps
        assert not torch.allclose(norm.running_mean, old[0], atol=10 * FLOAT32_SUM)
