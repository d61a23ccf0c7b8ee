"""Operations that move elements, or pick among them."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from mixbits.graph.calls import arguments
from mixbits.lower.builder import RULES, Builder, positive_dims, rank, rule, short_name, unsupported
from mixbits.lower.rules.pools import max_pool, minimum

aten = torch.ops.aten
WHOLE_BATCH = "Leave the batch dimension whole."


@rule(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
)
def identity(builder: Builder, node: fx.Node) -> str:
    """Nothing happens; dropout is captured in eval mode."""
    return builder.value(node.args[0], node)


@rule(
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
)
def reshape(builder: Builder, node: fx.Node) -> str:
    """All views are a reshape to the sizes that capture found; the batch is what is left."""
    return _reshaped(builder, node, builder.value(node.args[0], node), builder.sizes(node))


def _reshaped(builder: Builder, node: fx.Node, value: str, shape: list[int], *, output: str = "") -> str:
    if shape.count(-1) > 1:
        raise unsupported(node, "the batch size in two dimensions", "Keep the batch in one dimension.")
    return builder.emit("reshape", node, value, output=output, shape=shape)


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default)
def permute(builder: Builder, node: fx.Node) -> str:
    """Dimensions in another order."""
    order = list(range(rank(node)))
    if node.target is aten.permute.default:
        order = positive_dims(node.args[1], node)
    else:
        a, b = positive_dims(node.args[1:3] or (0, 1), node)
        order[a], order[b] = order[b], order[a]
    return builder.emit("permute", node, builder.value(node.args[0], node), dims=order)


@rule(aten.slice.Tensor, aten.narrow.default)
def slice_(builder: Builder, node: fx.Node) -> str:
    """Part of a dimension, whose size is known."""
    call = arguments(node)
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    (dim,) = positive_dims(call["dim"], tensor)
    size = builder.sizes(tensor)[dim]
    start = call["start"] or 0
    end = call.get("end")
    end = start + call["length"] if "length" in call else size if end is None else end
    if size == -1 or not isinstance(start, int) or not isinstance(end, int):
        raise unsupported(node, "sizes that depend on the batch", WHOLE_BATCH)
    picked = range(size)[slice(start, end, call.get("step", 1))]
    value = builder.value(tensor, node)
    return builder.emit("slice", node, value, dim=dim, start=picked.start, stop=picked.stop, step=picked.step)


@rule(aten.select.int)
def select(builder: Builder, node: fx.Node) -> str:
    """One element of a dimension, whose size is known."""
    tensor, dim, index = node.args
    return _selected(builder, node, tensor, dim, index)


def _selected(builder: Builder, node: fx.Node, tensor: Any, dim: Any, index: Any) -> str:
    (dim,) = positive_dims(dim, tensor)
    size = builder.sizes(tensor)[dim]
    if size == -1 or not isinstance(index, int):
        raise unsupported(node, "an index into the batch", WHOLE_BATCH)
    return builder.emit("select", node, builder.value(tensor, node), dim=dim, index=index % size)


@rule(operator.getitem)
def getitem(builder: Builder, node: fx.Node) -> str:
    """One result of an operation that has several: a part of a split, the values of a pool with indices."""
    several, index = node.args
    assert isinstance(several, fx.Node) and isinstance(index, int)
    tensor, name = several.args[0], short_name(several.target)
    dim = arguments(several).get("dim", 0) if several.op == "call_function" else 0
    if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        (dim,) = positive_dims(dim, tensor)  # type: ignore[arg-type]
        sizes = [part.shape[dim] for part in several.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            raise unsupported(several, "the batch dimension", WHOLE_BATCH)
        start = sum(sizes[:index])
        value = builder.value(tensor, several)
        return builder.emit("slice", node, value, dim=dim, start=start, stop=start + sizes[index], step=1)
    if name == "unbind":
        return _selected(builder, node, tensor, dim, index)
    if index == 0 and name == "max_pool2d_with_indices":
        return max_pool(builder, several)
    if index == 0 and name in ("adaptive_max_pool1d", "adaptive_max_pool2d"):
        size = builder.sizes(node)[-1:] if name.endswith("1d") else builder.sizes(node)[-2:]
        return builder.emit("adaptive_max_pool", node, builder.value(tensor, several), size=size)
    if index == 0 and name in ("max", "min"):
        dims, keep = positive_dims(dim, tensor), bool(arguments(several)["keepdim"])  # type: ignore[arg-type]
        value = builder.value(tensor, several)
        if name == "min":
            return minimum(builder, node, value, dims=dims, keepdim=keep)
        return builder.emit("max", node, value, dims=dims, keepdim=keep)
    known = sorted({short_name(target) for target in RULES})
    raise ValueError(
        f"{several.meta['address']}: no instruction for result {index} of {name} (have: {', '.join(known)}). "
        "Write the network with one of these, or keep this operation outside the network."
    )


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(builder: Builder, node: fx.Node) -> str:
    """Dimensions of size one repeated, to the batch size perhaps."""
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    new, old = list(node.meta["val"].shape), list(tensor.meta["val"].shape)
    old = [1] * (len(new) - len(old)) + old
    shape: list[int | str] = []
    for size, was in zip(new, old, strict=True):
        if not isinstance(size, int) and str(size) != str(was) and not builder.is_batch(size):
            raise unsupported(node, f"the size {size}", "Expand to the batch size itself.")
        shape.append(size if isinstance(size, int) else "batch" if builder.is_batch(size) else -1)
    return builder.emit("expand", node, builder.value(tensor, node), shape=shape)


@rule(aten.cat.default, aten.concat.default)
def cat(builder: Builder, node: fx.Node) -> str:
    """Tensors one after the other."""
    call = arguments(node)
    (dim,) = positive_dims(call["dim"], node)
    return builder.emit("cat", node, *(builder.value(part, node) for part in call["tensors"]), dim=dim)


@rule(aten.stack.default)
def stack(builder: Builder, node: fx.Node) -> str:
    """Tensors side by side in a new dimension."""
    call = arguments(node)
    (dim,) = positive_dims(call["dim"], node)
    parts: list[str] = []
    for part in call["tensors"]:
        shape = builder.sizes(part)
        shape.insert(dim, 1)
        output = f"{node.meta['address']}:part"
        parts.append(_reshaped(builder, node, builder.value(part, node), shape, output=output))
    return builder.emit("cat", node, *parts, dim=dim)


@rule(aten.repeat.default, aten.tile.default)
def repeat(builder: Builder, node: fx.Node) -> str:
    """Copies one after the other in each dimension."""
    tensor, given = node.args
    assert isinstance(tensor, fx.Node) and isinstance(given, list | tuple)
    counts: list[Any] = [1] * (rank(tensor) - len(given)) + list(given)
    if len(counts) > rank(tensor) or not all(isinstance(count, int) for count in counts) or counts[0] != 1:
        raise unsupported(node, f"the counts {counts}", "Repeat the dimensions of one sample.")
    value = builder.value(tensor, node)
    for dim, count in enumerate(counts):
        if count > 1:
            value = builder.emit("cat", node, *[value] * count, dim=dim)
    return value


@rule(aten.unfold.default)
def unfold(builder: Builder, node: fx.Node) -> str:
    """Windows side by side, without overlap: part of a dimension in two, the second of which goes last."""
    tensor, dim, size, step = node.args
    assert isinstance(tensor, fx.Node) and isinstance(size, int)
    (dim,) = positive_dims(dim, tensor)
    if step != size:
        raise unsupported(node, f"windows of {size} every {step}", "Use windows that do not overlap.")
    shape, count = builder.sizes(tensor), builder.sizes(node)[dim]
    value = builder.value(tensor, node)
    if count * size < shape[dim]:
        value = builder.emit("slice", node, value, dim=dim, start=0, stop=count * size, step=1)
    value = _reshaped(builder, node, value, [*shape[:dim], count, size, *shape[dim + 1 :]])
    order = [place for place in range(len(shape) + 1) if place != dim + 1]
    return builder.emit("permute", node, value, dims=[*order, dim + 1])


@rule(aten.roll.default)
def roll(builder: Builder, node: fx.Node) -> str:
    """Each dimension cut in two, the parts swapped."""
    call = arguments(node)
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    value, address = builder.value(tensor, node), node.meta["address"]
    if not call["dims"]:
        raise unsupported(node, "no dimensions", "Name the dimensions to roll.")
    for shift, dim in zip(call["shifts"], positive_dims(call["dims"], tensor), strict=True):
        size = builder.sizes(tensor)[dim]
        if size == -1:
            raise unsupported(node, "the batch dimension", WHOLE_BATCH)
        cut = -shift % size
        bounds = [(start, stop) for start, stop in ((cut, size), (0, cut)) if stop > start]
        parts = [
            builder.emit(
                "slice", node, value, output=f"{address}:part", dim=dim, start=start, stop=stop, step=1
            )
            for start, stop in bounds
        ]
        value = builder.emit("cat", node, *parts, dim=dim)
    return value


MODES = {
    "reflection": "reflect",
    "reflect": "reflect",
    "replication": "edge",
    "replicate": "edge",
    "circular": "wrap",
}


@rule(
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
)
def pad(builder: Builder, node: fx.Node) -> str:
    """Constants, mirrored or repeated values around; torch names the last dimension first."""
    call = arguments(node)
    amounts = call["pad"] if "pad" in call else call["padding"]
    if not all(isinstance(amount, int) for amount in amounts):
        raise unsupported(node, "sizes that depend on the batch", "Pad by fixed amounts.")
    pads = [list(amounts[i : i + 2]) for i in range(0, len(amounts), 2)][::-1]
    pads = [[0, 0]] * (rank(node) - len(pads)) + pads
    mode = MODES.get(call.get("mode", short_name(node.target).split("_")[0]), "constant")
    value = builder.value(node.args[0], node)
    return builder.emit("pad", node, value, pads=pads, mode=mode, value=call.get("value") or 0)


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default)
def shuffle(builder: Builder, node: fx.Node) -> str:
    """Channels to pixels, pixels to channels, or channels among groups: reshape, permute, reshape."""
    tensor, factor = node.args
    assert isinstance(tensor, fx.Node) and isinstance(factor, int)
    n, c, *rest = builder.sizes(tensor)
    if node.target is aten.channel_shuffle.default:
        split, order = [n, factor, c // factor, *rest], [0, 2, 1, *range(3, 3 + len(rest))]
    elif node.target is aten.pixel_shuffle.default:
        split, order = [n, c // factor**2, factor, factor, *rest], [0, 1, 4, 2, 5, 3]
    else:
        h, w = rest
        split, order = [n, c, h // factor, factor, w // factor, factor], [0, 1, 3, 5, 2, 4]
    address = node.meta["address"]
    value = _reshaped(builder, node, builder.value(tensor, node), split, output=f"{address}:split")
    value = builder.emit("permute", node, value, output=f"{address}:moved", dims=order)
    return _reshaped(builder, node, value, builder.sizes(node))


@rule(
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
)
def upsample_nearest(builder: Builder, node: fx.Node) -> str:
    """Each output element from ``floor(i * size_in / size_out)``, where torch's float32 says so too."""
    tensor, was, size, scales = _upsampled(builder, node)
    for a, b, scale in zip(was, size, scales, strict=True):
        factor = np.float32(a) / np.float32(b) if scale is None else np.float32(1 / scale)
        places = np.arange(b)
        if (np.floor(places.astype(np.float32) * factor) != places * a // b).any():
            raise unsupported(
                node, f"sizes {was} to {size}", "Give the size instead of the scale, or another."
            )
    return builder.emit("upsample_nearest", node, builder.value(tensor, node), size=size)


@rule(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)
def upsample_bilinear(builder: Builder, node: fx.Node) -> str:
    """Bilinear, corners aligned or not."""
    tensor, was, size, scales = _upsampled(builder, node)
    if any(scale is not None and a * scale != b for a, b, scale in zip(was, size, scales, strict=True)):
        raise unsupported(node, f"sizes {was} to {size}", "Give the size instead of the scale.")
    corners = bool(arguments(node)["align_corners"])
    return builder.emit(
        "upsample_bilinear", node, builder.value(tensor, node), size=size, align_corners=corners
    )


def _upsampled(builder: Builder, node: fx.Node) -> tuple[fx.Node, list[int], list[int], list[float | None]]:
    """The input, its sizes, the output's, and the scales that were given."""
    call, tensor = arguments(node), node.args[0]
    assert isinstance(tensor, fx.Node)
    dims = 1 if "1d" in str(node.target) else 2
    scales = call.get("scale_factors") or [
        call.get(key) for key in ("scales", "scales_h", "scales_w") if key in call
    ]
    sizes = builder.sizes(tensor)[-dims:], builder.sizes(node)[-dims:]
    return tensor, *sizes, list(scales or [None] * dims)
