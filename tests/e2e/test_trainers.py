"""Lightning and the Hugging Face Trainer: what a plain loop gives, and what trainers have failed at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mixbits
from mixbits.core.budget import parse_budget
from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.graph.quant_graph import QuantGraph
from mixbits.methods import method_named
from mixbits.train.method import Target
from mixbits.train.training import Training

lightning = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")

from mixbits.integrations import lightning as ours_lightning  # noqa: E402
from mixbits.integrations import transformers as ours_transformers  # noqa: E402

# What trainers warn of (few workers, missing loggers, their own imports) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

BATCH, BATCHES, EPOCHS = 8, 6, 2
UPDATES = BATCHES * EPOCHS


@cache
def captured() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
        )
        return mixbits.capture(model, torch.zeros(2, 1, 6, 6))


@cache
def samples() -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(0)
    inputs = torch.from_numpy(draw.normal(size=(BATCH * BATCHES, 1, 6, 6)).astype(np.float32))
    return inputs, torch.from_numpy(draw.integers(0, 3, len(inputs)))


def policy(bits: int = 3) -> Policy:
    return Policy({site.name: Uniform(bits, site.signed) for site in captured().profile.sites})


def fixed() -> Training[Any]:
    return mixbits.begin_finetuning(captured(), policy(), samples()[0])


def learned(name: str) -> Training[Any]:
    target = Target(parse_budget("weights=3bit,act=4bit"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return mixbits.begin_learning(
            method_named(name)(epochs=EPOCHS), captured(), samples()[0], target, updates=UPDATES
        )


# What is particular to a method is tested in a plain loop (tests/unit/test_training.py).
each_training = pytest.mark.parametrize(
    "begin",
    [
        pytest.param(fixed, id="fixed widths"),
        pytest.param(lambda: learned("mpdnn"), id="mpdnn"),
        *(
            pytest.param(lambda name=name: learned(name), id=name, marks=pytest.mark.slow)
            for name in ("bmpq", "ddq", "ebs", "sdq")
        ),
    ],
)


def same(one: Training[Any], two: Training[Any]) -> bool:
    states = one.module.state_dict(), two.module.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def plain(training: Training[Any], *, accumulate: int = 1) -> Training[Any]:
    """What is to be had without a trainer: batches in order, SGD, nothing else."""
    torch.default_generator.manual_seed(7)
    optimizer = torch.optim.SGD(training.groups, lr=0.01, momentum=0.9)
    training.module.train()
    for _ in range(EPOCHS):
        batches = DataLoader(TensorDataset(*samples()), BATCH)
        for index, (inputs, targets) in enumerate(batches):
            loss = F.cross_entropy(training.module(inputs), targets)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                training.before_update(loss)
                optimizer.step()
                training.after_update(optimizer)
                optimizer.zero_grad()
    return training


# --- Lightning -------------------------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    def __init__(
        self, model: nn.Module, groups: Sequence[dict[str, Any]] | None = None, lr: float = 0.01
    ) -> None:
        super().__init__()
        self.model, self.groups, self.lr = model, groups, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("loss", F.cross_entropy(self.model(inputs), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.groups or self.parameters(), lr=self.lr, momentum=0.9)


class Resumable(DataLoader[Any]):
    """Batches in order that Lightning can go on with in the middle of an epoch."""

    read = 0

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        for position in range(self.read % len(batches), len(batches)):
            self.read = position + 1
            yield batches[position]

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


def fit(
    training: Training[Any], folder: Path, *, resume: Path | None = None, lr: float = 0.01, **options: Any
) -> tuple[Any, Lit]:
    torch.default_generator.manual_seed(7)
    lit = Lit(training.module, training.groups, lr)
    saving = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving, ours_lightning.QuantizationCallback(training)],
        **{"max_epochs": EPOCHS} | options,
    )
    trainer.fit(lit, Resumable(TensorDataset(*samples()), BATCH), ckpt_path=resume)
    return trainer, lit


def saved(folder: Path, step: int) -> Path:
    return next(folder.glob(f"*step={step}.ckpt"))


@each_training
def test_lightning_trains_as_a_plain_loop(begin, tmp_path):
    training = begin()
    fit(training, tmp_path)

    assert training.updates == UPDATES
    assert same(training, plain(begin()))


# Without dropout: Lightning's checkpoints do not hold random states.
@each_training
@pytest.mark.parametrize("step", [BATCHES, 2 * BATCHES - 4], ids=["between epochs", "within an epoch"])
def test_lightning_resumes_in_the_middle(begin, step, tmp_path):
    whole, second = begin(), begin()
    for training in (whole, second):
        training.module.get_submodule("4").p = 0.0
    fit(whole, tmp_path)

    fit(second, tmp_path / "second", resume=saved(tmp_path, step))

    assert second.updates == UPDATES
    assert same(second, whole)


def test_a_lightning_checkpoint_is_tested_in_another_process(tmp_path):
    training = fixed()
    trainer, lit = fit(training, tmp_path)
    data = DataLoader(TensorDataset(*samples()), BATCH)
    (measured,) = trainer.test(lit, data, verbose=False)
    checkpoint = saved(tmp_path, UPDATES)

    again = fixed()
    tester = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (reloaded,) = tester.test(Lit(again.module), data, ckpt_path=checkpoint, verbose=False)
    loaded = Lit.load_from_checkpoint(checkpoint, model=fixed().module)

    assert reloaded == measured
    (once_more,) = tester.test(loaded, data, verbose=False)
    assert once_more == measured


def test_lightning_refuses_a_checkpoint_of_other_widths(tmp_path):
    fit(fixed(), tmp_path)
    other = mixbits.begin_finetuning(captured(), policy(4), samples()[0])

    with pytest.raises(ValueError, match=r"belongs to another training: input is"):
        fit(other, tmp_path / "other", resume=saved(tmp_path, 2))


@each_training
def test_lightning_accumulates_gradients(begin, tmp_path):
    training = begin()
    fit(training, tmp_path, accumulate_grad_batches=2)

    assert training.updates == UPDATES // 2
    assert same(training, plain(begin(), accumulate=2))


@each_training
def test_lightning_trains_in_mixed_precision(begin, tmp_path):
    training = begin()
    fit(training, tmp_path, precision="bf16-mixed")

    assert training.updates == UPDATES
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.module.parameters())
    assert not same(training, plain(begin()))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_lightning_precisions_that_harm_steps_are_refused(precision, tmp_path):
    with pytest.raises(ValueError, match=f"precision='{precision}'.*use '32-true' or 'bf16-mixed'"):
        fit(fixed(), tmp_path, precision=precision)


@each_training
def test_lightning_clips_gradients(begin, tmp_path):
    training = begin()
    before = {name: value.detach().clone() for name, value in training.module.named_parameters()}
    torch.default_generator.manual_seed(7)
    for group in training.groups:
        group["weight_decay"] = 0.0
    fit(training, tmp_path, max_steps=1, lr=1.0, gradient_clip_val=0.01, gradient_clip_algorithm="norm")

    moved = [
        (value - before[name]).detach().norm()
        for name, value in training.module.named_parameters()
        if not name.startswith("quantizers.")  # those are projected afterwards
    ]
    assert 0.0 < torch.stack(moved).norm() < 0.0101  # 0.01, but for rounding


def test_lightning_without_the_network_in_place_says_what_to_do(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[ours_lightning.QuantizationCallback(fixed())],
        max_epochs=1,
    )
    with pytest.raises(ValueError, match=r"Lit does not hold the network.*self\.model = training\.module"):
        trainer.fit(Lit(captured().copy().module), DataLoader(TensorDataset(*samples()), BATCH))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Columns(Dataset[Any]):
    def __len__(self) -> int:
        return len(samples()[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = samples()
        return {"pixel_values": inputs[index], "labels": targets[index]}


class InOrder(transformers.Trainer):
    """The Trainer, batches in order so that a plain loop can be compared."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    training: Training[Any],
    folder: Path,
    *,
    kind: type = transformers.Trainer,
    lr: float = 0.01,
    **options: Any,
) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        disable_tqdm=True,
        report_to=[],
        **{"num_train_epochs": EPOCHS, "save_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        | options,
    )
    optimizer = torch.optim.SGD(training.groups, lr=lr, momentum=0.9)
    return kind(
        model=ours_transformers.QuantizedModel(training),
        args=arguments,
        train_dataset=Columns(),
        eval_dataset=Columns(),
        optimizers=(optimizer, None),
        callbacks=[ours_transformers.QuantizationCallback(training)],
    )


@each_training
def test_the_trainer_trains_as_a_plain_loop(begin, tmp_path):
    training = begin()
    trainer = trainer_of(training, tmp_path, kind=InOrder, save_strategy="no")
    torch.default_generator.manual_seed(7)
    trainer.train()

    assert training.updates == UPDATES
    sums = 1e-5  # the Trainer takes the loss's mean over an update by another formula
    states = training.module.state_dict(), plain(begin()).module.state_dict()
    for key in states[0]:
        if "_extra_state" not in key:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=sums, atol=sums, msg=key)


@each_training
@pytest.mark.parametrize("step", [BATCHES, 2 * BATCHES - 4], ids=["between epochs", "within an epoch"])
def test_the_trainer_resumes_in_the_middle(begin, step, tmp_path):
    whole = begin()
    trainer_of(whole, tmp_path).train()

    second = begin()
    trainer_of(second, tmp_path / "second", save_strategy="no").train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
    )

    assert second.updates == UPDATES
    assert same(second, whole)


def test_a_checkpoint_of_the_trainer_is_tested_by_itself(tmp_path):
    training = fixed()
    trainer = trainer_of(training, tmp_path)
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]

    again = fixed()
    tester = trainer_of(again, tmp_path / "again")
    tester._load_from_checkpoint(str(tmp_path / f"checkpoint-{UPDATES}"))

    assert tester.evaluate()["eval_loss"] == measured
    assert same(again, training)


@each_training
def test_the_trainer_accumulates_gradients(begin, tmp_path):
    training = begin()
    trainer = trainer_of(training, tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    trainer.train()

    assert training.updates == trainer.state.global_step == UPDATES // 2


def test_gradients_that_the_trainer_accumulates_are_those_of_a_plain_loop(tmp_path):
    training = fixed()
    trainer = trainer_of(training, tmp_path, kind=InOrder, save_strategy="no", gradient_accumulation_steps=2)
    torch.default_generator.manual_seed(7)
    trainer.train()

    wanted = plain(fixed(), accumulate=2).module.state_dict()
    for key, value in training.module.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5, msg=key)  # sums in another order


@each_training
def test_the_trainer_trains_in_mixed_precision(begin, tmp_path):
    training = begin()
    trainer_of(training, tmp_path, save_strategy="no", bf16=True).train()

    assert training.updates == UPDATES
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.module.parameters())


@each_training
def test_the_trainer_clips_gradients(begin, tmp_path):
    training = begin()
    weights = {
        name: w.detach().clone() for name, w in training.module.named_parameters() if "quantizers" not in name
    }
    for group in training.groups:
        group["weight_decay"] = 0.0
    trainer_of(training, tmp_path, save_strategy="no", max_steps=1, lr=1.0, max_grad_norm=0.01).train()

    moved = [(training.module.get_parameter(name) - value).detach().norm() for name, value in weights.items()]
    assert 0.0 < torch.stack(moved).norm() < 0.0101


def test_the_trainer_with_another_model_says_what_to_do(tmp_path):
    trainer = trainer_of(fixed(), tmp_path)
    trainer.model = trainer.model_wrapped = ours_transformers.QuantizedModel(fixed())
    trainer.callback_handler.model = trainer.model

    with pytest.raises(ValueError, match=r"does not hold the network.*model=QuantizedModel\(training\)"):
        trainer.train()


def test_a_vision_model_of_transformers_is_captured_trained_and_packed(tmp_path):
    torch.default_generator.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    model = transformers.ResNetForImageClassification(config)
    graph = mixbits.capture(ours_transformers.Logits(model), torch.zeros(2, 1, 16, 16))
    inputs = torch.nn.functional.interpolate(samples()[0], 16)
    widths = Policy({site.name: Uniform(4, site.signed) for site in graph.profile.sites})
    training = mixbits.begin_finetuning(graph, widths, inputs)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(inputs, samples()[1], strict=True)]
    trainer = transformers.Trainer(
        model=ours_transformers.QuantizedModel(training),
        args=transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=3, report_to=[], disable_tqdm=True
        ),
        train_dataset=data,
        callbacks=[ours_transformers.QuantizationCallback(training)],
    )
    trainer.train()
    network = training.finish()

    from mixbits.lower import lower  # noqa: PLC0415

    mixbits.write_program(lower(network), tmp_path / "model.mixbits")
    logits = mixbits.Executor.from_file(tmp_path / "model.mixbits")(inputs[:8].numpy())
    with torch.no_grad():
        assert (logits.argmax(-1) == network(inputs[:8]).argmax(-1).numpy()).all()


# --- extras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(name):
    code = f"import sys; sys.modules[{name!r}] = None; import mixbits.integrations.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert f"pip install 'mixbits[{name}]'" in run.stderr.splitlines()[-1]


def test_nothing_of_a_trainer_is_imported_before_it_is_used():
    code = (
        "import sys, mixbits, mixbits.integrations; mixbits.Training, mixbits.begin_finetuning; "
        "assert not {'lightning', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
