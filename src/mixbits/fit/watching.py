"""Watching: where the metrics of a run go besides its ``metrics.jsonl``, each an extra of its own.

A watcher is a function that gets every row of a run, like the progress display. It is opened for a run's
folder and recipe, and what it opens it closes when the run ends. A resumed run goes on in the same place.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from mixbits.core.files import whole_file

Row = Mapping[str, Any]
Watch = Callable[[Row], None]
Open = Callable[[Path, str, Mapping[str, Any], ExitStack], Watch]  # folder, run, options, to close at the end
Name = Literal["tensorboard", "wandb", "mlflow"]  # of packages and of extras


def kept(row: Row) -> bool:
    """Whether a row is one of those that ``metrics.jsonl`` keeps: every tenth with widths, ends of epochs."""
    return "avg_weight_bits" in row or bool(row.get("ends_epoch"))


def figures(row: Row) -> dict[str, float]:
    """The figures of a row by name.

    >>> figures({"stage": "learn", "step": 3, "loss": 0.5, "used": {"weights": 1.5}, "ends_epoch": True})
    {'loss': 0.5, 'used/weights': 1.5}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": figure for inner, figure in figures(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "steps"):
            found[name] = float(value)
    return found


def tensorboard(folder: Path, name: str, options: Mapping[str, Any], closing: ExitStack) -> Watch:
    """Event files under ``tensorboard/``, a run a stage; steps taken again replace those of before."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    writers: dict[str, SummaryWriter] = {}

    def watch(row: Row) -> None:
        stage = row["stage"]
        if "resumed_step" in row:
            path = folder / "tensorboard" / stage
            writers[stage] = SummaryWriter(str(path), purge_step=row["resumed_step"] + 1)
            closing.callback(writers[stage].close)
        elif kept(row):
            for figure, value in figures(row).items():
                writers[stage].add_scalar(figure, value, row["step"])
            writers[stage].flush()

    return watch


def wandb(folder: Path, name: str, options: Mapping[str, Any], closing: ExitStack) -> Watch:
    """A run of Weights & Biases with the recipe; metrics have their stage's step."""
    import wandb  # noqa: PLC0415

    run = wandb.init(
        project="mixbits",
        name=name,
        id=_remembered(folder, "wandb", lambda: secrets.token_hex(4)),
        dir=folder,
        config=dict(options),
        resume="allow",
    )
    closing.callback(run.finish)

    def watch(row: Row) -> None:
        stage = row["stage"]
        if "resumed_step" in row:
            run.define_metric(f"{stage}/step")
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        elif kept(row):
            named = {f"{stage}/{name}": value for name, value in figures(row).items()}
            run.log({**named, f"{stage}/step": row["step"]})

    return watch


def mlflow(folder: Path, name: str, options: Mapping[str, Any], closing: ExitStack) -> Watch:
    """A run of MLflow's experiment ``mixbits`` with the recipe's options."""
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.entities import Metric, Param  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    def experiment() -> str:
        found = client.get_experiment_by_name("mixbits")
        if found is None:
            try:
                return client.create_experiment("mixbits")
            except MlflowException:  # a run beside this one was faster, or it cannot be made
                found = client.get_experiment_by_name("mixbits")
                if found is None:
                    raise
        return found.experiment_id

    def begin() -> str:
        run = client.create_run(experiment(), run_name=name).info.run_id
        client.log_batch(run, params=[Param(name, str(value)) for name, value in options.items()])
        return run

    try:
        client = MlflowClient()
        run = _remembered(folder, "mlflow", begin)
        client.update_run(run, status="RUNNING")
    except MlflowException as error:
        raise ValueError(
            f"--watch mlflow: no run could be begun there ({str(error).strip().splitlines()[0]}); set "
            "MLFLOW_TRACKING_URI to your server, or install all of mlflow to keep runs in a local data base"
        ) from error
    closing.callback(client.set_terminated, run)

    def watch(row: Row) -> None:
        if kept(row):
            now = time.time_ns() // 1_000_000
            client.log_batch(
                run,
                [
                    Metric(f"{row['stage']}/{name}", value, now, row["step"])
                    for name, value in figures(row).items()
                ],
            )

    return watch


WATCHERS: dict[str, Open] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
assert tuple(WATCHERS) == get_args(Name)


def require(names: tuple[Name, ...]) -> None:
    """Raise ``ImportError``, with the command that installs it, for a watcher that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--watch {name} needs a package: pip install 'mixbits[{name}]'")


@contextmanager
def watching(
    names: tuple[Name, ...], folder: Path, options: Mapping[str, Any], *, run: str = ""
) -> Iterator[Watch]:
    """A function that hands rows to the watchers of these names, for as long as the run lasts.

    ``folder`` is the run's, ``options`` its recipe by option; ``run`` is what it is called where names are
    shown, if not as its folder. Raises ``ImportError`` as :func:`require`.
    """
    require(names)
    with ExitStack() as closing:
        watchers = [WATCHERS[name](folder, run or folder.name, options, closing) for name in names]

        def watch(row: Row) -> None:
            for each in watchers:
                each(row)

        yield watch


def _remembered(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The number that a watcher gave this run: that of the first time when a run is resumed."""
    path = folder / f".{name}-run"
    if not path.exists():
        with whole_file(path, alone=True) as file:
            file.write(make().encode())
    return path.read_text(encoding="utf-8")
