"""Profile of a captured graph: sites, MACs, and which values are in memory when."""

from __future__ import annotations

from math import prod

from torch import fx

from mixbits.core.profile import Op, Profile, Site, Value
from mixbits.graph.fold import folded_batch_norm
from mixbits.graph.sites import (
    ELEMENTWISE,
    MAC_OPS,
    SELECTIONS,
    VIEWS,
    WEIGHT,
    input_node,
    is_batch_norm,
    is_carrier,
    is_dropout,
    is_signed,
    is_tensor,
    mac_nodes,
    site_nodes,
    source,
)


def profile_of(graph: fx.Graph) -> Profile:
    """The profile of a captured network without quantizers; shapes are those of one sample."""
    sites, macs = site_nodes(graph), mac_nodes(graph)
    names = _op_names(macs)
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    return Profile(
        input_shape=_sample_shape(placeholder),
        sites=tuple(_site(name, node, names, graph) for name, node in sites.items()),
        ops=tuple(_op(node, names[node]) for node in macs),
        values=_values(graph, {node: name for name, node in sites.items()}),
        stored_floats=_stored_floats(graph, sites, macs),
    )


def _op_names(macs: list[fx.Node]) -> dict[fx.Node, str]:
    """Names of layers: the path of their weight without ``.weight``; a layer used again gets ``.1``."""
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    for node in macs:
        name = str(input_node(node, WEIGHT).meta["address"]).removesuffix(".weight")
        count = taken[name] = taken.get(name, -1) + 1
        names[node] = f"{name}.{count}" if count else name
    return names


def _sample_shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes without the batch dimension (the only symbolic one); a tensor computed without it keeps all."""
    return tuple(int(size) for size in node.meta["val"].shape if isinstance(size, int))


def _site(name: str, node: fx.Node, names: dict[fx.Node, str], graph: fx.Graph) -> Site:
    readers = [op for mac, op in names.items() if source(input_node(mac)) is node or mac.args[WEIGHT] is node]
    kind = "weight" if node.op == "get_attr" else "activation"
    signed = True if kind == "weight" else is_signed(node)
    return Site(name, kind, _sample_shape(node), signed, tuple(readers))


def _op(node: fx.Node, name: str) -> Op:
    weight = input_node(node, WEIGHT)
    weight_shape = tuple(weight.meta["val"].shape)
    reduction = prod(weight_shape[1:])
    outputs = prod(_sample_shape(node))
    convolves = MAC_OPS[node.target] != "linear"
    read = input_node(node).meta["val"].shape[1] if convolves else reduction  # channels
    return Op(
        name,
        MAC_OPS[node.target],
        macs=outputs * reduction,
        weight=weight.meta["address"],
        input=source(input_node(node)).meta["address"],
        channels=weight_shape[0],
        reduction=reduction,
        groups=int(read) // weight_shape[1],
    )


def _fuses_into_reader(node: fx.Node) -> bool:
    """Whether a value never reaches memory: its one reader works on single values as they are produced."""
    users = list(node.users)
    return len(users) == 1 and (
        users[0].target in ELEMENTWISE or is_batch_norm(users[0]) or is_dropout(users[0])
    )


def _values(graph: fx.Graph, site_of: dict[fx.Node, str]) -> tuple[Value, ...]:
    """Tensors in memory and the moments between which they live; views and fused values are not there."""
    order = {node: moment for moment, node in enumerate(graph.nodes)}

    def stored_at(node: fx.Node) -> int:
        while node not in site_of and _fuses_into_reader(node):
            (node,) = node.users
        return order[node]

    def last_read(node: fx.Node) -> int:
        reads = [
            max(stored_at(user), last_read(user) if user.target in VIEWS | SELECTIONS else 0)
            for user in node.users
        ]
        return max(reads, default=order[node])

    computed = [
        node
        for node in graph.nodes
        if is_tensor(node)
        and node.op != "get_attr"
        and node.target not in VIEWS | SELECTIONS
        and not is_dropout(node)
        and (node in site_of or not _fuses_into_reader(node))
    ]
    values = []
    for node in computed:
        origin = node
        while (is_carrier(origin) or origin.target in SELECTIONS) and is_tensor(origin.args[0]):
            origin = origin.args[0]
        values.append(
            Value(
                node.meta["address"],
                prod(_sample_shape(node)),
                site_of.get(origin),
                first=order[node],
                last=last_read(node),
            )
        )
    return tuple(values)


def _stored_floats(graph: fx.Graph, sites: dict[str, fx.Node], macs: list[fx.Node]) -> int:
    """Float32 constants of the lowered network.

    Two per output channel of every layer (scale and bias, with batch norm folded in), two per channel of a
    batch norm that does not fold, one step per activation site, and all constants that float operations read.
    """
    folded = {norm for node in macs if (norm := folded_batch_norm(node)) is not None}
    biases = {arg for node in macs for arg in node.args[2:3] if isinstance(arg, fx.Node)}
    count = sum(2 * input_node(node, WEIGHT).meta["val"].shape[0] for node in macs)
    count += sum(1 for node in sites.values() if node.op != "get_attr")
    for node in graph.nodes:
        if is_batch_norm(node) and node not in folded:
            count += 2 * node.meta["val"].shape[1]
        if node.op == "get_attr" and node not in sites.values() and node not in biases and is_tensor(node):
            count += node.meta["val"].numel()
    return count
