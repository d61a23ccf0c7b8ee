"""Calibration: good values for a policy, and the harm of every width, from a few unlabelled images.

No training: one pass forward and back through the float network, one pass forward through the quantized one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mixbits.core.grid import Grid, Uniform
from mixbits.core.policy import Policy
from mixbits.graph.calls import arguments, padding_pairs, per_dim
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.graph.sites import MAC_OPS, WEIGHT, input_node, is_batch_norm, module_of
from mixbits.quant.functional import nearest_level
from mixbits.quant.observe import mse_step
from mixbits.quant.quantizer import LearnedStep, Quantizer
from mixbits.quant.rounding import compensated_levels
from mixbits.search.greedy import Choices
from mixbits.train.method import usual_grid
from mixbits.train.task import Batches

ROWS = 16384  # input rows of a layer from which second moments are taken
KEPT = 65536  # values of an activation from which its step is chosen


@dataclass(frozen=True)
class Observed:
    """What a float network does on calibration images.

    ``moments``: second moments of the inputs of each weight site, ``[groups, d, d]``; ``gain``: squared
    gradient with respect to each output channel of the layer, summed over positions, ``[groups, rows]``;
    ``values`` and ``importance``: a sample of each activation site, and the squared gradients of its values;
    ``norms``: mean and variance, a channel, of what each batch norm read.
    """

    moments: Mapping[str, Tensor]
    gain: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    importance: Mapping[str, Tensor]
    norms: Mapping[str, tuple[Tensor, Tensor]]


def calibration_images(batches: Batches, count: int, device: torch.device) -> Tensor:
    """The first ``count`` training inputs, float ``[count, ...]``."""
    first = next(iter(batches.epoch(0)))[0]
    needed = -(-count // len(first))
    return torch.cat([inputs for inputs, _ in islice(batches.epoch(0), needed)])[:count].to(device)


def observe_float(graph: QuantGraph, images: Tensor) -> Observed:
    """One pass forward and back through the float network; the scalar that is differentiated is unlabelled.

    It is the sum of the outputs under random signs: its squared gradient is, on average over the signs, that
    of the squared change of the outputs.
    """
    network = graph.copy()
    network.module.eval().to(images.device).requires_grad_(requires_grad=False)
    watched = _FloatPass(network)
    draw = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        outputs = watched.run(images.detach().clone().requires_grad_())
        sign = torch.randint(0, 2, outputs.shape, generator=draw).to(outputs) * 2 - 1
        (outputs * sign).sum().backward()
    gain: dict[str, Any] = {}
    for site, output in watched.outputs:
        assert output.grad is not None, f"{site}: no gradient reaches its layer"
        groups = len(watched.moments[site])
        squared = output.grad.square().sum(-1).reshape(groups, -1) / len(images)
        gain[site] = gain.get(site, 0) + squared
    values, importance = {}, {}
    for site, tensor in watched.activations.items():
        assert tensor.grad is not None, f"{site}: no gradient reaches it"
        every = max(tensor.numel() // KEPT, 1)
        values[site] = tensor.detach().flatten()[::every]
        importance[site] = tensor.grad.flatten()[::every].square() * (every / len(images))
    return Observed(watched.moments, gain, values, importance, watched.norms)


class _FloatPass(fx.Interpreter):
    """Runs a float network and keeps what :class:`Observed` is made of."""

    def __init__(self, graph: QuantGraph) -> None:
        super().__init__(graph.module)
        self.weight_of = {graph.node(site.name): site.name for site in graph.profile.weights}
        self.site_of = {graph.node(site.name): site.name for site in graph.profile.activations}
        self.moments: dict[str, Any] = {}
        self.outputs: list[tuple[str, Tensor]] = []  # channels first: [channels, positions]
        self.activations: dict[str, Tensor] = {}
        self.norms: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        read, _ = self.fetch_args_kwargs_from_env(n)
        if is_batch_norm(n):
            self.norms[n.name] = channel_statistics(read[0])
        result = super().run_node(n)
        if n.target in MAC_OPS:
            site = self.weight_of[input_node(n, WEIGHT)]
            rows = input_rows(n, read[0].detach(), read[1])
            self.moments[site] = self.moments.get(site, 0) + rows @ rows.mT / rows.shape[-1]
            # The layer's output, through a view whose gradient is laid out by channel.
            last = MAC_OPS[n.target] == "linear"
            by_channel = result.movedim(-1 if last else 1, 0).flatten(1)
            by_channel.retain_grad()
            self.outputs.append((site, by_channel))
            back = by_channel.reshape(result.movedim(-1 if last else 1, 0).shape)
            result = back.movedim(0, -1 if last else 1)
        if n in self.site_of:
            result.retain_grad()
            self.activations[self.site_of[n]] = result
        return result


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of ``[n, channels, ...]``."""
    by_channel = x.detach().movedim(1, 0).flatten(1)
    return by_channel.mean(1), by_channel.var(1)


def input_rows(node: fx.Node, inputs: Tensor, weight: Tensor) -> Tensor:
    """What a layer multiplies its weights with: ``[groups, d, rows]``, at most about ``ROWS`` rows."""
    kind = MAC_OPS[node.target]
    if kind == "linear":
        rows = inputs.flatten(0, -2)
        return rows[:: max(len(rows) // ROWS, 1)].mT[None]
    call = arguments(node)
    kernel = [1, *weight.shape[2:]][-2:]  # a 1-d convolution is a 2-d one of height 1
    if kind == "conv1d":
        inputs = inputs[:, :, None]
    dims = weight.dim() - 2
    stride, dilation = ([1, *per_dim(call[name], dims)][-2:] for name in ("stride", "dilation"))
    pads = [[0, 0], *padding_pairs(call["padding"], weight.shape[2:], per_dim(call["dilation"], dims))][-2:]
    padded = F.pad(inputs, (*pads[1], *pads[0]))
    rows = F.unfold(padded, (kernel[0], kernel[1]), (dilation[0], dilation[1]), 0, (stride[0], stride[1]))
    positions = max(min(rows.shape[-1], -(-ROWS // len(rows))), 1)
    place = torch.arange(positions, device=rows.device) * rows.shape[-1] // positions
    rows = rows[..., place].movedim(1, 0).flatten(1)
    return rows.reshape(call["groups"], -1, rows.shape[-1])


def sensitivity(graph: QuantGraph, observed: Observed, allowed: Choices) -> dict[str, dict[int, float]]:
    """Harm of every site at each of its widths: mean squared change of the outputs, to second order.

    For weights, the squared gradient of each output channel times the error of the layer's output after
    compensated rounding (a Kronecker-factored Gauss-Newton form); for activations, squared gradient times
    squared rounding error, value by value. Cross terms between sites are left out.
    """
    harm: dict[str, dict[int, float]] = {}
    for site in graph.profile.sites:
        name, widths = site.name, allowed.widths[site.name]
        grids = [usual_grid(site, bits) for bits in widths]
        if site.kind == "weight":
            moments, gain = observed.moments[name], observed.gain[name]
            errors = _rounding_errors(graph.weight(name).detach().to(moments), moments, grids)
            damage = (((errors @ moments) * errors).sum(-1) * gain.repeat(1, len(widths))).sum(0)
            harm[name] = dict(zip(widths, damage.reshape(len(widths), -1).sum(1).tolist(), strict=True))
        else:
            values, importance = observed.values[name], observed.importance[name]
            harm[name] = {
                bits: float(((on_grid(values, grid) - values).square() * importance).sum())
                for bits, grid in zip(widths, grids, strict=True)
            }
    return harm


def on_grid(values: Tensor, grid: Grid) -> Tensor:
    """Values ``[n]`` rounded to a grid at its step of least squared error."""
    step = mse_step(values[None], grid)[0]
    return nearest_level(values / step, grid) * step


def _rounding_errors(weight: Tensor, moments: Tensor, grids: Sequence[Uniform]) -> Tensor:
    """Error of a weight's compensated rounding to each grid: ``[groups, grids * rows, d]``, in one solve."""
    groups, repeated = len(moments), len(grids)
    rows = weight.flatten(1)
    steps = torch.stack([mse_step(rows, grid) for grid in grids])
    stacked = rows.reshape(groups, -1, rows.shape[1]).repeat(1, repeated, 1)
    steps = steps.reshape(repeated, groups, -1).movedim(1, 0).reshape(groups, -1)

    def per_row(values: Sequence[int]) -> Tensor:
        return steps.new_tensor(values).repeat_interleave(len(rows) // groups)

    low, high = per_row([g.level_min for g in grids]), per_row([g.level_max for g in grids])
    spacing = per_row([g.spacing for g in grids])
    levels = compensated_levels(
        stacked,
        moments,
        steps,
        lambda ratio: torch.clamp(torch.round((ratio - low) / spacing) * spacing + low, low, high),
    )
    return levels * steps[..., None] - stacked


def rounded_weight(weight: Tensor, moments: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """A weight ``[channels, ...]`` on its grid, errors compensated; ``step`` is one a channel."""
    groups = len(moments)
    steps = step.reshape(groups, -1)
    levels = compensated_levels(
        weight.reshape(*steps.shape, -1), moments, steps, lambda ratio: nearest_level(ratio, grid)
    )
    return (levels * steps[..., None]).reshape(weight.shape)


@torch.no_grad()
def calibrate(graph: QuantGraph, policy: Policy, images: Tensor, observed: Observed) -> QuantGraph:
    """A copy of ``graph`` with every site on its grid of ``policy``, at values chosen without training.

    Weights: steps of least squared error, then compensated rounding. Activations: steps of least squared
    error. Batch norms: statistics moved by as much as quantization moved what they read. ``images`` are those
    of ``observed``. In eval mode.
    """
    policy.check(graph.profile)
    network = graph.copy()
    placed: dict[str, Quantizer] = {}
    for site in graph.profile.sites:
        grid = policy.grids[site.name]
        if site.kind == "activation":
            step, shared = mse_step(observed.values[site.name][None], grid)[0], site.elements
        else:
            weight = network.weight(site.name)
            step, shared = mse_step(weight.flatten(1), grid), weight[0].numel()
            weight.copy_(rounded_weight(weight, observed.moments[site.name], step, grid))
            step = step.reshape(-1, *[1] * (weight.dim() - 1))
        placed[site.name] = LearnedStep(grid, step, shared_by=shared)
    put_(network, placed)
    network.module.eval().to(images.device)
    _NormPass(network, observed.norms).run(images)
    return network


class _NormPass(fx.Interpreter):
    """Runs a quantized network and moves each batch norm's statistics before it is applied."""

    def __init__(self, graph: QuantGraph, norms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(graph.module)
        self.norms = norms

    def run_node(self, n: fx.Node) -> Any:
        norm = module_of(n)
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            mean, variance = channel_statistics(self.fetch_args_kwargs_from_env(n)[0][0])
            float_mean, float_variance = self.norms[n.name]
            norm.running_mean.add_(mean - float_mean)
            norm.running_var.mul_((variance + norm.eps) / (float_variance + norm.eps))
        return super().run_node(n)
