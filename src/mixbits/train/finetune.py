"""Finetuning: train a network at the fixed widths of a policy, steps included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.core.grid import Codebook, Grid, describe
from mixbits.core.policy import Policy
from mixbits.core.profile import Site
from mixbits.graph.capture import refuse_wrapped
from mixbits.graph.quant_graph import QuantGraph, put_, quantizer_key
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import Frozen, LearnedStep, Quantizer
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.randomness import own_random_states
from mixbits.train.steps import PLAIN_LOOP, Loop, Schedule
from mixbits.train.task import Batches, Inputs, Task, batches_of
from mixbits.train.training import Training, drive

OBSERVED_BATCHES = 8  # batches read to choose activation steps


@dataclass(frozen=True)
class Finetune:
    """Options of finetuning; the optimizer is SGD with momentum."""

    epochs: int = 6  # passes over the training data
    lr: float = 0.01  # initial learning rate of weights and steps
    momentum: float = 0.9
    weight_decay: float = 1e-4  # on weights; steps are not decayed
    schedule: Schedule = "cosine"
    distill: float = 0.0  # 0..1: share of the loss that imitates the float network
    temperature: float = 4.0  # of the distillation's softmax
    norm_batches: int = 50  # batches that re-estimate batch-norm statistics at the end; 0 keeps the old ones


# Site, grid, step and the number of values that share one step.
MakeQuantizer = Callable[[Site, Grid, Tensor, int], Quantizer]


def learned_step(site: Site, grid: Grid, step: Tensor, shared_by: int) -> Quantizer:
    """The usual quantizer of finetuning."""
    return LearnedStep(grid, step, shared_by=shared_by)


def finetune(
    graph: QuantGraph,
    policy: Policy,
    task: Task,
    options: Finetune,
    loop: Loop = PLAIN_LOOP,
    *,
    start: Mapping[str, Frozen] | None = None,
    teacher: QuantGraph | None = None,
    placed: QuantGraph | None = None,
    quantizer: MakeQuantizer = learned_step,
    extra_loss: Callable[[QuantGraph], Callable[[], Tensor] | None] = lambda student: None,
) -> QuantGraph:
    """A copy of ``graph`` trained with every site on its grid of ``policy``, in eval mode.

    Weight steps are per output channel, chosen by squared error unless ``start`` has them for the same grid;
    activation steps are ``start``'s where it has them, else chosen by squared error on training batches.
    ``teacher`` is the float network for distillation. ``placed`` is the network at this policy with good
    values already, as :func:`~mixbits.train.calibrate.calibrate` gives it: training starts there.
    ``quantizer`` makes what stands on a site while training, ``extra_loss`` a term of the loss from the
    network as placed; at the end every site has a :class:`LearnedStep`.

    Raises ``ValueError`` if the policy does not fit the network, or if distillation lacks its teacher.
    """
    policy.check(graph.profile)
    if options.distill and teacher is None:
        raise ValueError("distillation needs the float network: pass teacher=")
    if placed is not None:
        student = placed.copy()
        student.module.to(loop.device)
    else:
        student = place_policy(
            graph, policy, task.train, start=start, device=loop.device, quantizer=quantizer
        )
    training = _training(
        student,
        policy,
        task.train,
        weight_decay=options.weight_decay,
        norm_batches=options.norm_batches if options.epochs else 0,
        extra_loss=extra_loss(student),
    )
    optimizer = torch.optim.SGD(training.groups, lr=options.lr, momentum=options.momentum)
    loss = _distilling(task, teacher, options, loop) if options.distill and teacher is not None else None
    return drive(training, task, optimizer, loop, epochs=options.epochs, schedule=options.schedule, loss=loss)


def begin_finetuning(
    graph: QuantGraph,
    policy: Policy,
    inputs: Inputs,
    *,
    start: Mapping[str, Frozen] | None = None,
    placed: QuantGraph | None = None,
    weight_decay: float = Finetune.weight_decay,
    norm_batches: int = Finetune.norm_batches,
) -> Training[QuantGraph]:
    """Training at the fixed widths of a policy, for a loop of the user's; its result is the network.

    ``inputs`` are training inputs, float ``[n, ...]`` in one tensor, or a ``DataLoader`` of
    ``(inputs, targets)``: activation steps are chosen on a few of them, and ``norm_batches`` of them
    re-estimate batch-norm statistics at the end (0 keeps those of training). ``weight_decay`` is that of the
    groups' weights. ``start`` and ``placed`` as in :func:`finetune`, ``graph`` stays as it is. The network
    comes on the CPU; move ``module`` before an optimizer is made.
    """
    refuse_wrapped(graph.module)
    policy.check(graph.profile)
    batches = batches_of(inputs)
    student = placed.copy() if placed is not None else None
    if student is None:
        with own_random_states():
            student = place_policy(graph, policy, batches, start=start)
    training = _training(student, policy, batches, weight_decay=weight_decay, norm_batches=norm_batches)
    training.identity = {site: describe(grid) for site, grid in policy.grids.items()}
    training.attach_()
    return training


def _training(
    student: QuantGraph,
    policy: Policy,
    batches: Batches,
    *,
    weight_decay: float,
    norm_batches: int,
    extra_loss: Callable[[], Tensor] | None = None,
) -> Training[QuantGraph]:
    def conclude() -> QuantGraph:
        settle_(student, policy)
        if norm_batches:
            device = student.network_parameters()[0].device
            with own_random_states():
                reestimate_batch_norm_(student, batches, norm_batches, device)
        student.module.eval()
        return student

    return Training(
        student,
        parameter_groups(student, weight_decay),
        conclude,
        penalty=extra_loss and (lambda loss: extra_loss()),
    )


def settle_(graph: QuantGraph, policy: Policy) -> None:
    """Put a :class:`LearnedStep` on every site, with the step that its quantizer freezes to."""
    settled: dict[str, Quantizer] = {}
    for site, quantizer in graph.quantizers.items():
        if isinstance(quantizer, LearnedStep):
            continue
        frozen = quantizer.freeze()
        if frozen.grid != policy.grids[site]:
            raise ValueError(
                f"{site}: trained on {describe(frozen.grid)}, but the policy says "
                f"{describe(policy.grids[site])}"
            )
        weight = graph.profile.site(site).kind == "weight"
        rank = graph.weight(site).dim() if weight and frozen.step.dim() else 0
        step = frozen.step.reshape(-1, *[1] * (rank - 1)) if rank else frozen.step
        settled[site] = LearnedStep(frozen.grid, step, shared_by=1).to(step.device)
    put_(graph, settled)


def parameter_groups(graph: QuantGraph, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: the network's parameters with weight decay, the quantizers' without."""
    quantizers = [p for q in graph.quantizers.values() for p in q.parameters()]
    return [
        {"params": graph.network_parameters(), "weight_decay": weight_decay},
        {"params": quantizers, "weight_decay": 0.0},
    ]


def place_policy(
    graph: QuantGraph,
    policy: Policy,
    calibration: Batches,
    *,
    start: Mapping[str, Frozen] | None = None,
    device: torch.device | None = None,
    quantizer: MakeQuantizer = learned_step,
) -> QuantGraph:
    """A copy of ``graph`` with a quantizer on every site, at good steps (see :func:`finetune`)."""
    device = device or torch.device("cpu")
    student, start = graph.copy(), start or {}
    student.module.to(device)
    activations = [site for site in graph.profile.activations if site.name not in start]
    observed = observe(student, [site.name for site in activations], calibration, device)
    placed: dict[str, Quantizer] = {}
    for site in graph.profile.sites:
        grid = policy.grids[site.name]
        if site.kind == "weight":
            weight = student.weight(site.name).detach()
            learned = start.get(site.name)
            if learned is not None and learned.grid == grid:
                step = learned.step.expand(len(weight)).clone()
            else:
                step = mse_step(weight.flatten(1), grid)
            step = step.reshape(-1, *[1] * (weight.dim() - 1))
            shared = weight[0].numel()
        elif site.name in start:
            step, shared = rescaled_step(start[site.name], grid), site.elements
        else:
            step, shared = mse_step(observed[site.name][None], grid)[0], site.elements
        placed[site.name] = quantizer(site, grid, step, shared).to(device)
    put_(student, placed)
    return student


def restore_policy(graph: QuantGraph, policy: Policy, state: Mapping[str, Tensor]) -> QuantGraph:
    """A copy of ``graph`` in eval mode with the weights and steps that :func:`finetune` left in ``state``."""
    network = graph.copy()
    placed: dict[str, Quantizer] = {}
    for site in graph.profile.sites:
        step = state[quantizer_key(site.name, "step")]
        placed[site.name] = LearnedStep(policy.grids[site.name], step, shared_by=site.elements)
    put_(network, placed)
    network.module.cpu().load_state_dict(dict(state))
    network.module.eval()
    return network


def rescaled_step(frozen: Frozen, grid: Grid) -> Tensor:
    """A learned step carried to another grid of the kind, which keeps the range.

    Values seen without the quantizers would say nothing of the range: what was learned with them is a
    network, and batch norms, that need them. Codebooks count in one step whatever their widths, with levels
    where values were seen: the step stays.
    """
    if isinstance(frozen.grid, Codebook) and isinstance(grid, Codebook):
        return frozen.step
    return frozen.step * (frozen.grid.level_max / max(grid.level_max, 1))


def observe(graph: QuantGraph, sites: list[str], batches: Batches, device: torch.device) -> dict[str, Tensor]:
    """A sample of the values at activation sites, over the first training batches; the graph is unchanged."""
    if not sites:
        return {}
    watched = graph.copy()
    recorders = {site: Recorder(OBSERVED_BATCHES) for site in sites}
    put_(watched, recorders)
    watched.module.eval().to(device)
    with torch.no_grad():
        for inputs, _ in islice(batches.epoch(0), OBSERVED_BATCHES):
            watched(inputs.to(device))
    return {site: recorder.values() for site, recorder in recorders.items()}


def _distilling(
    task: Task, teacher: QuantGraph, options: Finetune, loop: Loop
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``(1 - a) * loss + a * T**2 * KL(teacher || student)`` (Hinton et al. 2015, arXiv 1503.02531)."""
    network: nn.Module = teacher.module.to(loop.device).eval()
    share, temperature = options.distill, options.temperature

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape[-1] == 1:
            raise ValueError(
                "distillation compares the softmax of outputs, and this network has one output, whose "
                "softmax is always 1: leave it out with distill=0 (SDQ: distill=False)"
            )
        with torch.no_grad(), torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.bf16):
            wanted = network(inputs).float()
        imitation = F.kl_div(
            F.log_softmax(outputs / temperature, -1),
            F.log_softmax(wanted / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        return (1.0 - share) * task.loss(outputs, targets) + share * temperature**2 * imitation

    return loss
