"""A network whose every scale is a power of two, so that hardware shifts where others multiply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixbits.core.infer import accumulator_bound
from mixbits.core.program import Program
from mixbits.export.quantizing import program_of, steps_of
from mixbits.graph.calls import arguments
from mixbits.graph.fold import batch_norm_affine, folded_batch_norm
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.graph.sites import MAC_OPS, WEIGHT, input_node, module_of, source
from mixbits.lower.builder import tensor_of
from mixbits.quant.quantizer import LearnedStep, Quantizer

SMALLEST = 2.0**-8  # step of a channel, relative to the largest of its weight: eight bits hold the difference
FRACTION = 2.0**-8  # unit of a bias, relative to that of the layer's integer sums
EXACT_BITS = 22  # of a sum and its bias; float32 has 24, and two are left for an addition behind


def power_of_two_steps(graph: QuantGraph) -> QuantGraph:
    """A copy whose every step is the nearest power of two (by ratio): another network, to be measured again.

    Weights round to their new levels. A batch norm that folds into a layer becomes part of the weight and the
    steps of its channels before these are rounded, so that no factor is left; a weight that several layers
    read keeps their norms. Steps of channels below 1/256 of the largest become that, which keeps the error
    below that of the largest. Biases are rounded to powers of two that keep sums of up to 22 bits exact in
    float32: 1/256 of what one unit of the layer's integer sum is worth, or that unit in the widest sums.
    """
    rounded, placed = graph.copy(), dict[str, Quantizer]()
    rounded.module.eval()
    layers = [node for node in rounded.module.graph.nodes if node.target in MAC_OPS]
    sites = {node: _sites(rounded, node) for node in layers}
    with torch.no_grad():
        frozen = {name: quantizer.freeze() for name, quantizer in rounded.quantizers.items()}
        steps = {name: entry.step.double() for name, entry in frozen.items()}
        for layer in _with_own_norm(layers):
            _, weight = sites[layer]
            steps[weight] = steps[weight] * _fold_(layer, rounded.weight(weight))
        for name, step in steps.items():
            site = rounded.profile.site(name)
            wanted = step.clamp_min(float(step.max()) * SMALLEST)
            steps[name] = torch.exp2(torch.log2(wanted).round())
            shape = (-1, *(1,) * (len(site.shape) - 1)) if step.dim() else ()
            placed[name] = LearnedStep(frozen[name].grid, steps[name].reshape(shape), shared_by=site.elements)
        put_(rounded, placed)
        for layer in layers:
            x, weight = sites[layer]
            terms = int(np.prod(rounded.profile.site(weight).shape[1:]))
            bound = accumulator_bound(terms, frozen[weight].grid, frozen[x].grid)
            _round_bias_(layer, steps[weight] * steps[x], bound)
    rounded.module.eval()
    return rounded


def power_of_two_program(network: QuantGraph | Program) -> Program:
    """The program of :func:`power_of_two_steps`, or a program whose steps are powers of two already.

    Raises ``ValueError`` naming the site of another step.
    """
    program = program_of(power_of_two_steps(network) if isinstance(network, QuantGraph) else network)
    for name, step in steps_of(program).items():
        if np.frexp(step)[0] != 0.5:
            raise ValueError(
                f"{name}: its step {step} is no power of two, and a packed program's cannot be changed. "
                "Export from the network (a run's folder) instead of the program."
            )
    return program


def _sites(graph: QuantGraph, layer: fx.Node) -> tuple[str, str]:
    """The sites of a layer's input and weight."""
    names = {graph.node(site): site for site in graph.quantizers}
    quantizers = source(input_node(layer)), input_node(layer, WEIGHT)
    x, weight = (names[input_node(node)] for node in quantizers)
    return x, weight


def _with_own_norm(layers: Sequence[fx.Node]) -> list[fx.Node]:
    """The layers that a batch norm folds into, where no other layer reads the weight or calls the norm."""
    readers = Counter(input_node(layer, WEIGHT) for layer in layers)
    norms = {layer: folded_batch_norm(layer) for layer in layers}
    calls = Counter(norm.target for norm in norms.values() if norm is not None)
    return [
        layer
        for layer, norm in norms.items()
        if norm is not None and calls[norm.target] == 1 and readers[input_node(layer, WEIGHT)] == 1
    ]


def _fold_(layer: fx.Node, weight: Tensor) -> Tensor:
    """Multiply the weight by the norm's factor and leave only a bias of the norm; the factors' magnitudes."""
    node = folded_batch_norm(layer)
    assert node is not None
    norm = module_of(node)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor, shift = batch_norm_affine(node)
    bias = _bias(layer)
    if bias is not None:
        shift = shift + factor * bias.double()
        bias.zero_()
    weight.copy_(weight.double() * factor.reshape(-1, *(1,) * (weight.dim() - 1)))
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 0.0
    norm.weight = nn.Parameter(torch.ones_like(norm.running_var))
    norm.bias = nn.Parameter(shift.to(norm.running_mean))
    return factor.abs()


def _bias(layer: fx.Node) -> Tensor | None:
    node = arguments(layer)["bias"]
    return None if node is None else tensor_of(node)


def _round_bias_(layer: fx.Node, unit: Tensor, bound: int) -> None:
    """Round what is added to a layer's sums; ``unit`` is what 1 of them is worth, ``bound`` the largest."""
    norm = folded_batch_norm(layer)
    module = None if norm is None else module_of(norm)
    bias = _bias(layer) if module is None else module.bias
    if isinstance(bias, Tensor):
        reach = bound * unit + bias.abs()
        exact = torch.exp2(torch.log2(reach).ceil() - EXACT_BITS)
        fine = torch.minimum(torch.maximum(exact, unit * FRACTION), unit)
        bias.copy_((bias / fine).round() * fine)
