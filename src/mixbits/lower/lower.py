"""Lowering: a captured network with quantizers becomes a program of instructions on packed integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mixbits.core.check import check
from mixbits.core.program import Instruction, Program
from mixbits.graph.quant_graph import QuantGraph
from mixbits.graph.sites import MAC_OPS, is_batch_norm, is_dropout, is_tensor, module_of
from mixbits.lower.builder import RULES, Builder, short_name
from mixbits.lower.rules import layers
from mixbits.quant.quantizer import Frozen, Quantizer


def lower(graph: QuantGraph, *, about: Mapping[str, Any] | None = None) -> Program:
    """The program of a network whose every site has a quantizer.

    ``about`` is JSON that travels with the program: data set, normalization, class names. Raises
    ``ValueError`` naming the site or the operation that cannot be lowered. The graph is only read.
    """
    if any(module.training for module in graph.module.modules() if not isinstance(module, Quantizer)):
        raise ValueError(
            "the network is in training mode, where batch norm has no fixed numbers; call eval() first"
        )
    builder, output = _builder(graph), ""
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            builder.values[node] = "input"
        elif node.op == "output":
            output = builder.value(node.args[0], node)
        elif node not in builder.values and node.op != "get_attr" and is_tensor(node):
            _lower_node(builder, node)
    instructions = _used(builder.instructions, output)
    read = {name for step in instructions for name in step.attrs.values() if isinstance(name, str)}
    program = Program(
        graph.profile.input_shape,
        output,
        instructions,
        {name: weight for name, weight in builder.weights.items() if name in read},
        {name: constant for name, constant in builder.constants.items() if name in read},
        dict(about or {}),
    )
    check(program)
    return program


def _lower_node(builder: Builder, node: fx.Node) -> None:
    """Emit the instructions of a node and note which value its result became."""
    if node in builder.quantizers:
        site = builder.quantizers[node]
        if node.args[0].op == "get_attr":  # type: ignore[union-attr]
            layers.pack_weight(builder, node, site)
        else:
            builder.values[node] = layers.quantize(builder, node, site)
    elif is_dropout(node):
        builder.values[node] = builder.value(node.args[0], node)
    elif is_batch_norm(node):
        builder.values[node] = layers.batch_norm(builder, node)
    elif node.target in RULES:
        builder.values[node] = RULES[node.target](builder, node)
    else:
        known = ", ".join(sorted({short_name(target) for target in RULES}))
        raise ValueError(
            f"{node.meta['address']}: no instruction for {short_name(node.target)} (have: {known}). "
            "Write the network with one of these, or keep this operation outside the network."
        )


def _builder(graph: QuantGraph) -> Builder:
    """An empty program, and what is known of the graph."""
    frozen = _frozen(graph)
    site_of = {graph.node(site): site for site in frozen}
    nodes = graph.module.graph.nodes
    batch = next(node for node in nodes if node.op == "placeholder").meta["val"].shape[0]
    macs = [node for node in nodes if node.target in MAC_OPS]
    return Builder(
        batch=str(batch),
        frozen=frozen,
        quantizers={node: site_of[node.args[0]] for node in nodes if isinstance(module_of(node), Quantizer)},
        layers={node: op.name for node, op in zip(macs, graph.profile.ops, strict=True)},
    )


def _frozen(graph: QuantGraph) -> dict[str, Frozen]:
    """Grid and step of every site."""
    quantizers, sites = graph.quantizers, graph.profile.sites
    missing = [site.name for site in sites if site.name not in quantizers]
    if missing:
        raise ValueError(
            f"{missing[0]}: no quantizer on this site ({len(missing)} of {len(sites)} sites have none). "
            "Place a quantizer on each, or learn a policy."
        )
    with torch.no_grad():
        frozen = {site.name: quantizers[site.name].freeze() for site in sites}
    for name, entry in frozen.items():
        if not bool((torch.isfinite(entry.step) & (entry.step > 0)).all()):
            raise ValueError(
                f"{name}: its step is not positive and finite; train or calibrate its quantizer again"
            )
    return frozen


def _used(instructions: list[Instruction], output: str) -> tuple[Instruction, ...]:
    """The instructions whose results reach the output."""
    read, kept = {output}, list[Instruction]()
    for step in reversed(instructions):
        if step.output in read:
            read |= set(step.inputs)
            kept.append(step)
    return tuple(reversed(kept))
