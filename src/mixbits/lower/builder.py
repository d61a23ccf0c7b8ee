"""Builder: the program while it grows, and the table of rules that make it grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mixbits.core.program import Instruction, PackedWeight
from mixbits.quant.quantizer import Frozen


@dataclass
class Builder:
    """Instructions, weights and constants so far; ``values`` says which value each node's result became."""

    batch: str  # the symbol of the batch size
    frozen: Mapping[str, Frozen]  # by site
    quantizers: Mapping[fx.Node, str]  # quantizer node -> site
    layers: Mapping[fx.Node, str]  # convolution or linear node -> name of the layer
    values: dict[fx.Node, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: {"input"})

    def emit(
        self, op: str, node: fx.Node, *inputs: str, name: str = "", output: str = "", **attrs: Any
    ) -> str:
        """Add an instruction that came from ``node``; returns the name of its output.

        ``name`` and ``output`` are the node's address unless given; a name that is taken gets a number.
        """
        address = str(node.meta["address"])
        wanted = output or address
        output, tries = wanted, 0
        while output in self.taken:
            tries += 1
            output = f"{wanted}:{tries}"
        self.taken.add(output)
        self.instructions.append(Instruction(op, name or address, inputs, output, attrs))
        return output

    def constant(self, name: str, value: Tensor) -> str:
        """Store a tensor as float32, rounded once; returns its name. The same name is the same constant."""
        if not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: a constant of {value.dtype} cannot be stored (have: float32). "
                "Make it a float buffer, or move the operation that reads it out of the network."
            )
        array = value.detach().cpu().double().numpy().astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name}: the constant holds infinities or NaN in float32; check the trained network"
            )
        self.constants[name] = array
        return name

    def parameter(self, operand: Any, node: fx.Node) -> str | None:
        """The constant of an operand that must be a parameter or a buffer; None for None."""
        if operand is None:
            return None
        if not (isinstance(operand, fx.Node) and operand.op == "get_attr"):
            raise unsupported(node, f"a computed parameter {operand}", "Use a parameter or a buffer.")
        return self.constant(str(operand.meta["address"]), tensor_of(operand))

    def value(self, operand: Any, node: fx.Node) -> str:
        """The value of an operand of ``node``: a tensor, or a number."""
        if isinstance(operand, int | float) and not isinstance(operand, bool):
            return self.emit("scalar", node, output=f"{node.meta['address']}:{operand}", value=operand)
        if not isinstance(operand, fx.Node):
            raise unsupported(node, f"the operand {operand!r}", "Use tensors and numbers.")
        if self.quantizers.get(operand) in self.weights:
            raise ValueError(
                f"{node.meta['address']}: it reads the quantized weight {self.quantizers[operand]!r}, which "
                "only convolutions and linear layers can. Give this operation a parameter of its own."
            )
        if operand not in self.values and operand.op == "get_attr":
            name = self.parameter(operand, node)
            self.values[operand] = self.emit("constant", operand, constant=name)
        if operand not in self.values:
            raise unsupported(
                node, f"the operand {operand.meta.get('address', operand)}", "Use float tensors."
            )
        return self.values[operand]

    def sizes(self, node: fx.Node) -> list[int]:
        """Shape of a node's result, -1 where it depends on the batch."""
        return [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]

    def is_batch(self, size: Any) -> bool:
        """Whether a size is the batch size itself (and not a multiple, say)."""
        return isinstance(size, torch.SymInt) and str(size) == self.batch


Rule: TypeAlias = Callable[[Builder, fx.Node], str]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function that emits instructions for these aten operations and returns the result's name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def unsupported(node: fx.Node, what: str, remedy: str) -> ValueError:
    """The error of a form of an operation that no instruction covers."""
    return ValueError(
        f"{node.meta['address']}: no instruction for {short_name(node.target)} with {what}. {remedy}"
    )


def short_name(target: Any) -> str:
    """The name of an operation.

    >>> short_name(torch.ops.aten.conv2d.padding), short_name(len)
    ('conv2d', 'len')
    """
    return str(getattr(target, "__name__", target)).split(".")[0]


def tensor_of(node: fx.Node) -> Tensor:
    """The parameter or buffer that a ``get_attr`` node reads."""
    return attrgetter(str(node.target))(node.graph.owning_module)


def rank(node: fx.Node) -> int:
    """Number of dimensions of a node's result."""
    return node.meta["val"].dim()


def positive_dims(dims: Any, node: fx.Node) -> list[int]:
    """Dimensions of a node's result counted from the front; None and [] are all of them."""
    if isinstance(dims, int):
        dims = [dims]
    return [dim % rank(node) for dim in dims] if dims else list(range(rank(node)))
