"""Batch norms: statistics estimated anew at fixed weights and widths, or taken over several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mixbits.graph.quant_graph import QuantGraph
from mixbits.train.processes import ALONE, Processes
from mixbits.train.task import Batches


def reestimate_batch_norm_(
    graph: QuantGraph, batches: Batches, count: int, device: torch.device, processes: Processes = ALONE
) -> None:
    """Replace batch norms' running statistics by means over ``count`` training batches at fixed weights."""
    graph.module.eval()
    with synchronized_norms(graph.module, processes):
        norms = [m for m in graph.module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        with torch.no_grad():
            for batch in islice(batches.epoch(0), count):
                graph(processes.part(batch)[0].to(device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


@contextmanager
def synchronized_norms(module: nn.Module, processes: Processes) -> Iterator[None]:
    """Inside, batch norms in training mode take statistics over the parts of all processes.

    Parameters and running statistics stay the same tensors. torch's ``SyncBatchNorm`` is not for the CPU.
    """
    if processes.count == 1:
        yield
        return
    places = [
        (parent, name, norm)
        for parent in module.modules()
        for name, norm in parent._modules.items()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, SynchronizedNorm)
    ]
    made = {norm: SynchronizedNorm(norm, processes) for _, _, norm in places}
    for parent, name, norm in places:
        parent._modules[name] = made[norm]
    try:
        yield
    finally:
        for parent, name, norm in places:
            norm.train(made[norm].training)
            parent._modules[name] = norm


class SynchronizedNorm(_BatchNorm):
    """A batch norm over the parts of all processes, on any device."""

    def __init__(self, norm: _BatchNorm, processes: Processes) -> None:
        """Takes the place of ``norm``, whose parameters and buffers it shares."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self._processes = processes
        self.train(norm.training)

    @torch.compiler.disable  # messages in the middle of a graph
    def forward(self, input: Tensor) -> Tensor:
        """The normalized input, ``[n, channels, ...]``."""
        mean, variance = self.running_mean, self.running_var
        if not self.training and mean is not None:
            return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)
        output, batch_mean, batch_variance, size = _Normalize.apply(  # type: ignore[misc]
            input, self.weight, self.bias, self.eps, self._processes
        )
        if self.training and mean is not None and variance is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            mean.mul_(1.0 - share).add_(batch_mean, alpha=share)
            unbiased = batch_variance * (size / (size - 1.0))
            variance.mul_(1.0 - share).add_(unbiased, alpha=share)
        return output


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the ``x`` of all processes.

    ``x`` float ``[n, channels, ...]``. Gives mean and variance ``[channels]`` and the number of values of a
    channel, too. One message forward and one back; the parts' variances are joined as by Chan et al. 1979.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd calls by position
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.float()
        over, channels = [0, *range(2, x.dim())], x.shape[1]
        shape = [1, channels, *[1] * (x.dim() - 2)]
        mean = values.mean(over)
        away = (values - mean.view(shape)).square().sum(over)
        size = torch.full((1,), float(x.numel() // channels), device=x.device)
        gathered = processes.gather(torch.cat([size, mean, away]))
        sizes, means, aways = gathered.split([1, channels, channels], 1)
        total = sizes.sum()
        mean = (sizes * means).sum(0) / total
        variance = (aways + sizes * (means - mean).square()).sum(0) / total
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.over, ctx.shape, ctx.processes = over, shape, processes
        ctx.mark_non_differentiable(mean, variance, total)
        output = (values - mean.view(shape)) * scale.view(shape)
        if weight is not None:
            output = output * weight.view(shape)
        if bias is not None:
            output = output + bias.view(shape)
        return output.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        grad, shape = grads[0].float(), ctx.shape
        normal = (x.float() - mean.view(shape)) * scale.view(shape)
        along, ones = (grad * normal).sum(ctx.over), grad.sum(ctx.over)  # gradients of weight and bias
        all_along, all_ones = (ctx.processes.sum(torch.cat([along, ones])) / total).chunk(2)
        inner = grad - all_ones.view(shape) - normal * all_along.view(shape)
        factor = scale if weight is None else scale * weight
        to_x = (inner * factor.view(shape)).to(x.dtype)
        return to_x, *((along, ones) if weight is not None else (None, None)), None, None
