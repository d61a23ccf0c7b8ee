"""QuantGraph: a captured network with a quantizer on any of its sites."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from mixbits.core.profile import Profile, unknown_site
from mixbits.graph.capture import capture_module, reading_training
from mixbits.graph.profile import profile_of
from mixbits.graph.sites import float_weights, site_nodes
from mixbits.quant.quantizer import Quantizer


class QuantGraph:
    """A captured network.

    ``module`` is an ``fx.GraphModule`` with the user's parameter names; ``profile`` describes the network
    without quantizers. Quantizers are submodules ``quantizers.<site>``, one a site, placed by :func:`put_`.
    """

    def __init__(self, module: fx.GraphModule, profile: Profile, site_nodes: Mapping[str, str]) -> None:
        self.module = module
        self.profile = profile
        self._site_nodes = dict(site_nodes)  # site name -> name of its fx node

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits of a batch, float ``[n, ...]``."""
        return self.module(inputs)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The placed quantizers by site name."""
        if "quantizers" not in self.module._modules:
            return {}
        placed = self.module.get_submodule("quantizers")._modules
        quantizers = {site: placed.get(_key(site)) for site in self._site_nodes}
        return {site: module for site, module in quantizers.items() if isinstance(module, Quantizer)}

    def node(self, site: str) -> fx.Node:
        """The graph node that computes (or holds) the tensor of a site."""
        if site not in self._site_nodes:
            raise unknown_site(site, list(self._site_nodes))
        name = self._site_nodes[site]
        return next(node for node in self.module.graph.nodes if node.name == name)

    def weight(self, site: str) -> Tensor:
        """The float parameter of a weight site."""
        owner, _, leaf = str(self.node(site).target).rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf)

    def placed(self) -> list[tuple[Quantizer, Tensor | None]]:
        """The placed quantizers, each with the float parameter that it quantizes, if it is a weight's."""
        weights = {site.name for site in self.profile.weights}
        return [
            (quantizer, self.weight(site) if site in weights else None)
            for site, quantizer in self.quantizers.items()
        ]

    def network_parameters(self) -> list[nn.Parameter]:
        """Parameters of the network itself, quantizers excluded."""
        return [p for name, p in self.module.named_parameters() if not name.startswith("quantizers.")]

    def copy(self) -> QuantGraph:
        """An independent copy: parameters, quantizers and graph."""
        return QuantGraph(copy.deepcopy(self.module), self.profile, self._site_nodes)


def project_(placed: Iterable[tuple[Quantizer, Tensor | None]]) -> None:
    """Put the quantizers of :meth:`QuantGraph.placed` back into their legal sets, after an update."""
    for quantizer, weight in placed:
        quantizer.project_()
        if weight is not None:
            quantizer.follow_(weight)


def _key(site: str) -> str:
    return site.replace(".", ":")  # module names must not contain dots


def quantizer_key(site: str, parameter: str) -> str:
    """The state-dict key of a parameter of the quantizer on a site."""
    return f"quantizers.{_key(site)}.{parameter}"


def capture(model: nn.Module, example: Tensor) -> QuantGraph:
    """Capture a trained network.

    ``example`` is one batch of inputs, float ``[n, ...]``. Raises ``CaptureError`` (a ``ValueError``) naming
    the line that cannot be captured.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> graph = capture(model, torch.zeros(1, 1, 4, 4))
    >>> [site.name for site in graph.profile.sites]
    ['input', '0.weight', '1/relu', '3.weight']
    """
    module = capture_module(model, example)
    for product, weight in float_weights(module.graph).items():
        warnings.warn(
            f"{product}: {weight!r} stays in float32 and counts in no limit on weights, as no linear layer "
            "reads it; use nn.Linear or F.linear to have it quantized",
            stacklevel=2,
        )
    for place in reading_training(model):
        warnings.warn(
            f"{place}: its forward reads self.training, and what it does in training alone is lost: the "
            "network is captured as it is in evaluation, but for dropout and batch-norm modules",
            stacklevel=2,
        )
    nodes = {name: node.name for name, node in site_nodes(module.graph).items()}
    return QuantGraph(module, profile_of(module.graph), nodes)


def put_(graph: QuantGraph, quantizers: Mapping[str, Quantizer]) -> None:
    """Place a quantizer on each given site, replacing the one there; all readers see the quantized tensor."""
    module = graph.module
    if "quantizers" not in module._modules:
        module.quantizers = nn.ModuleDict()
    holder = module.get_submodule("quantizers")
    for site, quantizer in quantizers.items():
        node, key = graph.node(site), _key(site)
        placed = key in holder._modules
        quantizer.train(module.training)
        holder.add_module(key, quantizer)
        if placed:
            continue
        users = list(node.users)
        with module.graph.inserting_after(node):
            call = module.graph.call_module(f"quantizers.{key}", (node,))
        call.meta.update(address=f"{node.meta['address']}@quantized", val=node.meta.get("val"))
        for user in users:
            user.replace_input_with(node, call)
    module.recompile()
