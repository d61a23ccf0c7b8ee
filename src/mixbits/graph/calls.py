"""Calls: the arguments of aten calls, in one form however they were written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an aten call by the names of its schema, defaults filled in."""
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = (
            node.args[index]
            if index < len(node.args)
            else node.kwargs.get(argument.name, argument.default_value)
        )
        found[argument.name] = given
    return found


def per_dim(value: Any, dims: int) -> list[int]:
    """One entry a dimension, where torch may have given one for all.

    >>> per_dim([3], 2), per_dim((1, 2), 2)
    ([3, 3], [1, 2])
    """
    entries = [value] if isinstance(value, int) else list(value)
    return entries * dims if len(entries) == 1 else entries


def padding_pairs(padding: Any, kernel: Sequence[int], dilation: list[int]) -> list[list[int]]:
    """Padding as (before, after); 'same' puts the odd element after."""
    if padding == "valid":
        return [[0, 0] for _ in kernel]
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [[total // 2, total - total // 2] for total in totals]
    return [[size, size] for size in per_dim(padding, len(kernel))]
