"""The training loop: it goes on where it was stopped, bit for bit, and says when it cannot."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mixbits.core.grid import Uniform
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.quant.quantizer import LearnedStep
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.randomness import random_states, set_random_states
from mixbits.train.steps import DivergedError, Loop, learning_rate_factor, steps
from mixbits.train.task import Task, make_task

EPOCHS, BATCHES = 2, 4


@pytest.fixture(scope="module")
def captured() -> QuantGraph:
    """A network with batch norm, dropout and two quantizers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
        )
        graph = capture(model, torch.zeros(2, 1, 6, 6))
    put_(
        graph,
        {
            "0.weight": LearnedStep(Uniform(3, signed=True), torch.tensor(0.1), shared_by=36),
            "2/relu": LearnedStep(Uniform(4, signed=False), torch.tensor(0.2), shared_by=64),
        },
    )
    return graph


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(count)
    return draw.normal(size=(count, 1, 6, 6)).astype(np.float32), draw.integers(0, 3, count)


def array_task(**options) -> Task:
    return make_task(images(BATCHES * 6), images(9), held_out=images(7), batch_size=6, **options)


def loader_task(generator: torch.Generator | None = None) -> Task:
    """A shuffling ``DataLoader`` whose data set augments with the random numbers of three libraries."""

    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            inputs, targets = super().__getitem__(index)
            amount = random.random() * np.random.rand()  # noqa: NPY002  what users' data sets do
            return inputs + amount * torch.randn(inputs.shape), targets

    def loader(count: int, *, shuffle: bool) -> DataLoader[Any]:
        inputs, targets = images(count)
        kind = Noisy if shuffle else TensorDataset
        return DataLoader(
            kind(torch.from_numpy(inputs), torch.from_numpy(targets)),
            batch_size=6,
            shuffle=shuffle,
            generator=generator if shuffle else None,
        )

    return make_task(loader(BATCHES * 6, shuffle=True), loader(9, shuffle=False), loader(7, shuffle=False))


def sgd(graph: QuantGraph) -> torch.optim.Optimizer:
    return torch.optim.SGD(graph.module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class Run:
    """One training: its network, optimizer, the rows that it told, and whether it was stopped."""

    def __init__(
        self, captured: QuantGraph, task: Task, checkpoint: Checkpoint | None, stop_after: int = 0
    ) -> None:
        self.graph, self.rows, self.notes, self.stopped = captured.copy(), [], [], False
        self.optimizer = sgd(self.graph)

        def watch(row: Mapping[str, Any]) -> None:
            if "loss" not in row:
                self.notes.append(dict(row))
                return
            self.rows.append(dict(row))
            if checkpoint is not None and row["step"] == stop_after:
                checkpoint.stop.set()

        loop = Loop("learn", checkpoint=checkpoint, watch=watch)
        try:
            for _ in steps(self.graph, task, self.optimizer, loop, epochs=EPOCHS, measure=self.measure):
                pass
        except KeyboardInterrupt:
            self.stopped = True

    def measure(self) -> dict[str, float]:
        return {"sum_of_steps": sum(q.step.item() for q in self.graph.quantizers.values())}

    def state(self) -> dict[str, Any]:
        return {"module": self.graph.module.state_dict(), "optimizer": self.optimizer.state_dict()}


def same(a: Any, b: Any) -> bool:
    """Whether two nests of tensors are equal bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def run(
    captured: QuantGraph,
    task: Task,
    checkpoint: Checkpoint | None = None,
    *,
    seed: int = 0,
    stop_after: int = 0,
) -> Run:
    before = random_states()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.set_state(np.random.RandomState(seed).get_state())  # noqa: NPY002
    try:
        return Run(captured, task, checkpoint, stop_after)
    finally:
        set_random_states(before)


def elsewhere() -> torch.Generator:
    """A generator that stands somewhere else each time."""
    generator = torch.Generator()
    generator.seed()
    return generator


TASKS = {
    "arrays": array_task,
    "DataLoader": loader_task,
    "DataLoader with a generator": lambda: loader_task(elsewhere()),
}


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("stop_after", range(1, EPOCHS * BATCHES), ids=lambda step: f"after step {step}")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(captured, tmp_path, make, stop_after):
    whole = run(captured, make())

    first = run(captured, make(), Checkpoint(tmp_path / "learn.pt"), stop_after=stop_after)
    # Another seed: whatever random numbers come must be those of the checkpoint.
    second = run(captured, make(), Checkpoint(tmp_path / "learn.pt"), seed=1)

    # The stop is noticed after the next update.
    assert (first.stopped, len(first.rows), second.stopped) == (True, stop_after + 1, False)
    assert second.notes == [{"stage": "learn", "resumed_step": stop_after + 1}]
    assert first.rows + second.rows == whole.rows
    assert same(second.state(), whole.state())


def test_runs_with_other_random_numbers_differ(captured):
    assert not same(run(captured, array_task()).state(), run(captured, array_task(), seed=1).state())


def test_rows_tell_the_progress_and_the_ends_of_epochs(captured):
    rows = run(captured, array_task()).rows

    assert [row["step"] for row in rows] == list(range(1, EPOCHS * BATCHES + 1))
    assert {(row["stage"], row["steps"]) for row in rows} == {("learn", EPOCHS * BATCHES)}
    assert [row["epoch"] for row in rows] == [(i + 1) / BATCHES for i in range(EPOCHS * BATCHES)]
    assert [row["ends_epoch"] for row in rows] == ([False] * (BATCHES - 1) + [True]) * EPOCHS
    assert [i for i, row in enumerate(rows) if "held_out_top1" in row] == [BATCHES - 1, 2 * BATCHES - 1]
    assert [i for i, row in enumerate(rows) if "sum_of_steps" in row] == [
        0,
        BATCHES - 1,
        BATCHES,
        2 * BATCHES - 1,
    ]
    assert rows[0]["lr"] == 0.1
    assert all(math.isfinite(row["loss"]) and 0 <= row["train_top1"] <= 100 for row in rows)


def test_a_finished_run_is_not_trained_again(captured, tmp_path):
    done = run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"))

    again = run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"))

    assert again.rows == []
    assert same(again.state(), done.state())


def test_a_run_is_saved_at_the_end_of_every_epoch_and_whenever_it_is_due(captured, tmp_path):
    saved = []

    class Counted(Checkpoint):
        def save(self, state: dict[str, Any]) -> None:
            saved.append((state["epoch"], state["first"]))
            super().save(state)

    run(captured, array_task(), Counted(tmp_path / "rare.pt"))
    assert saved == [(1, 0), (2, 0)]

    saved.clear()
    run(captured, array_task(), Counted(tmp_path / "often.pt", every_seconds=0))
    assert saved == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a checkpoint"], ids=["empty", "cut off"])
def test_an_unreadable_checkpoint_is_replaced_by_the_one_before_it_and_that_is_said(
    captured, tmp_path, damage
):
    whole = run(captured, array_task())
    run(captured, array_task(), Checkpoint(tmp_path / "learn.pt", every_seconds=0), stop_after=5)
    (tmp_path / "learn.pt").write_bytes(damage)

    resumed = run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"), seed=1)

    note, start = resumed.notes
    assert start["resumed_step"] == 5
    assert note["note"].startswith(f"{tmp_path / 'learn.pt'} is unreadable (")
    assert note["note"].endswith("); using the checkpoint before it")
    assert resumed.rows == whole.rows[5:]
    assert same(resumed.state(), whole.state())


def test_without_any_readable_checkpoint_the_stage_starts_again_and_says_so(captured, tmp_path):
    (tmp_path / "learn.pt").write_bytes(b"not a checkpoint")

    started = run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"))

    assert started.notes[0]["note"].endswith("starting this stage again")
    assert started.notes[1]["resumed_step"] == 0
    assert len(started.rows) == EPOCHS * BATCHES


def test_a_checkpoint_of_another_recipe_is_refused(captured, tmp_path):
    run(captured, array_task(), Checkpoint(tmp_path / "learn.pt", signature={"lr": 0.1, "seed": 0}))

    with pytest.raises(
        ValueError, match=r"learn\.pt belongs to another run: lr is 0\.1 there and 0\.2 here; resume"
    ):
        run(captured, array_task(), Checkpoint(tmp_path / "learn.pt", signature={"lr": 0.2, "seed": 0}))


def test_a_checkpoint_of_another_loop_is_refused_and_what_differs_is_said(captured, tmp_path):
    run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"))
    network = captured.copy()
    put_(network, {"5.weight": LearnedStep(Uniform(3, signed=True), torch.tensor(0.1), shared_by=192)})

    def refusal(graph: QuantGraph, task: Task, optimizer: torch.optim.Optimizer, **options: Any) -> str:
        loop = Loop("learn", checkpoint=Checkpoint(tmp_path / "learn.pt"))
        with pytest.raises(ValueError, match="belongs to another run") as refused:
            next(steps(graph, task, optimizer, loop, **{"epochs": EPOCHS} | options))
        return str(refused.value)

    plain = captured.copy()
    assert "the network is " in refusal(network, array_task(), sgd(network))
    fewer = make_task(images(BATCHES * 3), images(9), held_out=images(7), batch_size=6)
    assert "batches of an epoch is 4 there and 2 here" in refusal(plain, fewer, sgd(plain))
    assert "epochs is 2 there and 3 here" in refusal(plain, array_task(), sgd(plain), epochs=3)
    faster = torch.optim.SGD(plain.module.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    assert "'initial_lr': 0.2" in refusal(plain, array_task(), faster)


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_it(captured, tmp_path):
    with pytest.raises(OSError, match=r"nowhere/learn\.pt could not be written"):
        run(captured, array_task(), Checkpoint(tmp_path / "nowhere" / "learn.pt"))


def test_a_disk_that_fills_up_loses_nothing_that_was_saved(captured, tmp_path):
    whole = run(captured, array_task())
    unfinished = tmp_path / ".learn.pt.tmp"

    class Filling(Checkpoint):
        """From the sixth save on, the file is written to a device that is full."""

        saves = 0

        def save(self, state: Mapping[str, Any]) -> None:
            self.saves += 1
            if self.saves == 6:
                unfinished.symlink_to("/dev/full")
            super().save(state)

    with pytest.raises(
        OSError, match=r"No space left on device.*free some disk space and go on with --resume"
    ):
        run(captured, array_task(), Filling(tmp_path / "learn.pt", every_seconds=0))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["learn.previous.pt", "learn.pt"]
    resumed = run(captured, array_task(), Checkpoint(tmp_path / "learn.pt"), seed=1)
    assert resumed.notes == [{"stage": "learn", "resumed_step": 5}]
    assert same(resumed.state(), whole.state())


def test_saving_keeps_one_file_before_the_newest_and_no_temporary_one(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "learn.pt", {"seed": 0})
    for count in range(3):
        checkpoint.save({"count": count})

    assert sorted(path.name for path in tmp_path.iterdir()) == ["learn.previous.pt", "learn.pt"]
    assert checkpoint.load() == ({"count": 2}, "")
    checkpoint.path.unlink()  # a crash between the two renames
    assert checkpoint.load() == ({"count": 1}, "")


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(captured, tmp_path):
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        value = nn.functional.cross_entropy(outputs, targets)
        return value * float("nan") if len(seen) > BATCHES + 2 + 1 else value  # one call judges held-out data

    with pytest.raises(
        DivergedError, match=r"^learn: the loss became .* in epoch 2, batch 3\. Lower the learning rate"
    ):
        run(captured, array_task(loss=loss), Checkpoint(tmp_path / "learn.pt", every_seconds=0))

    state = torch.load(tmp_path / "learn.pt", weights_only=True)["state"]
    assert (state["epoch"], state["first"]) == (1, 2)
    assert all(torch.isfinite(value).all() for value in state["module"].values())


def test_a_penalty_that_is_infinite_stops_the_run_before_the_update(captured):
    graph = captured.copy()
    before = copy.deepcopy(graph.module.state_dict())
    running = [
        key for key in before if "running" in key or "tracked" in key
    ]  # of the forward pass, not the update

    with pytest.raises(DivergedError, match="epoch 1, batch 1"):
        list(
            steps(
                graph,
                array_task(),
                sgd(graph),
                Loop(),
                epochs=1,
                penalty=lambda loss: torch.tensor(float("inf")),
            )
        )

    after = graph.module.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key not in running)


def test_gradients_can_be_changed_before_the_update_and_read_after_it(captured):
    graph = captured.copy()
    weight = graph.weight("0.weight")
    optimizer = torch.optim.SGD(graph.module.parameters(), lr=1.0)
    before = []

    def halve() -> None:
        before.append(weight.detach().clone())
        weight.grad.mul_(0.5)

    for step in steps(
        graph, array_task(), optimizer, Loop(), epochs=1, schedule="constant", before_update=halve
    ):
        assert torch.equal(weight, before[-1] - weight.grad)
        assert step.index == len(before) - 1
    assert len(before) == BATCHES


def test_a_penalty_is_added_to_the_loss(captured):
    graph = captured.copy()
    step = graph.quantizers["2/relu"].step
    plain = captured.copy()
    losses = {}
    for name, network, penalty in (("plain", plain, None), ("penalty", graph, lambda loss: 3.0 * step)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            first = next(steps(network, array_task(), sgd(network), Loop(), epochs=1, penalty=penalty))
        losses[name] = first.loss

    assert losses["penalty"] == losses["plain"]  # the loss that is told is the task's
    difference = step.grad - plain.quantizers["2/relu"].step.grad
    assert difference.item() == pytest.approx(3.0, rel=1e-5)  # float32


def test_quantizers_are_projected_after_every_update(captured):
    graph = captured.copy()
    optimizer = torch.optim.SGD([q.step for q in graph.quantizers.values()], lr=1e6)

    for _ in steps(graph, array_task(), optimizer, Loop(), epochs=1):
        assert all((q.step > 0).all() for q in graph.quantizers.values())


def test_two_loops_that_are_zipped_alternate(captured):
    """Bilevel methods train two sets of parameters of one network in turns, each with its own optimizer."""

    def groups(graph: QuantGraph) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        quantizers = [q.step for q in graph.quantizers.values()]
        return torch.optim.SGD(graph.network_parameters(), lr=0.1), torch.optim.SGD(quantizers, lr=0.01)

    def seeded(body) -> dict[str, Tensor]:
        graph = captured.copy()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            body(graph)
        return graph.module.state_dict()

    order = []

    def zipped(graph: QuantGraph) -> None:
        weights, widths = groups(graph)
        one = steps(graph, array_task(), weights, Loop("one", watch=told), epochs=1, schedule="constant")
        two = steps(graph, array_task(), widths, Loop("two", watch=told), epochs=1, schedule="constant")
        for a, b in zip(one, two, strict=True):
            assert a.index == b.index

    def told(row: Mapping[str, Any]) -> None:
        order.extend([(row["stage"], row["step"])] if "step" in row else [])

    def by_hand(graph: QuantGraph) -> None:
        optimizers, task = groups(graph), array_task()
        for inputs, targets in task.train.epoch(0):
            for optimizer in optimizers:
                graph.module.train()
                optimizer.zero_grad()
                task.loss(graph(inputs), targets).backward()
                optimizer.step()
                for quantizer in graph.quantizers.values():
                    quantizer.project_()

    assert same(seeded(zipped), seeded(by_hand))
    assert order == [(stage, step) for step in range(1, BATCHES + 1) for stage in ("one", "two")]


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.99, 1.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.5, 0.5),
        ("cosine", 0.75, 0.146446609407),
        ("cosine", 1.0, 0.0),
        ("thirds", 0.0, 1.0),
        ("thirds", 0.499, 1.0),
        ("thirds", 0.5, 0.1),
        ("thirds", 0.749, 0.1),
        ("thirds", 0.75, 0.01),
        ("thirds", 1.0, 0.01),
        ("two_drops", 0.399, 1.0),
        ("two_drops", 0.4, 0.1),
        ("two_drops", 0.699, 0.1),
        ("two_drops", 0.7, 0.01),
        ("two_drops", 1.0, 0.01),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, progress, factor):
    assert learning_rate_factor(schedule, progress) == factor


def test_every_group_has_its_own_initial_learning_rate(captured):
    graph = captured.copy()
    optimizer = torch.optim.SGD(
        [
            {"params": graph.network_parameters(), "lr": 1.0},
            {"params": [q.step for q in graph.quantizers.values()], "lr": 0.01},
        ]
    )

    rates = [
        [group["lr"] for group in optimizer.param_groups]
        for _ in steps(graph, array_task(), optimizer, Loop(), epochs=EPOCHS, schedule="thirds")
    ]

    factors = [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    assert rates == [[1.0 * factor, 0.01 * factor] for factor in factors]


def test_the_network_is_in_eval_mode_after_training_and_in_training_mode_during_it(captured):
    graph = captured.copy()

    modes = [graph.module.training for _ in steps(graph, array_task(), sgd(graph), Loop(), epochs=1)]

    assert modes == [True] * BATCHES
    assert not graph.module.training
