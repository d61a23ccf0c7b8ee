"""Hugging Face Hub: share a finished run, and fetch one. Needs the extra ``mixbits[hub]``.

What is shared is the policy, the packed model, the recipe without the folders of this machine, and a card
whose figures are those that the run measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixbits.core.files import whole_file
from mixbits.core.grid import describe
from mixbits.core.policy import Policy, read_policy
from mixbits.core.program import Program
from mixbits.pack.artifact import read_program
from mixbits.report.read import Network, Summary, read_summary
from mixbits.report.words import UNKNOWN, amount, bits, fixed, limit_name, percent

try:
    from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's in 1.x, httpx2's in 2.x
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
except ImportError as error:
    raise ImportError("sharing needs the package huggingface_hub: pip install 'mixbits[hub]'") from error

MODEL, POLICY, RECIPE, CARD = "model.mixbits", "policy.json", "recipe.json", "README.md"
FILES = (CARD, MODEL, POLICY, RECIPE)
LOGIN = "`hf auth login`, or set HF_TOKEN"
MEASURED: Mapping[str, Callable[[Network], str]] = {  # rows of the card
    "top-1": lambda network: percent(network.top1),
    "weights": lambda network: amount(network.weight_bytes, "bytes"),
    "mean bits of weights": lambda network: fixed(network.avg_weight_bits),
    "mean bits of activations": lambda network: fixed(network.avg_act_bits),
    "bit operations a sample": lambda network: amount(network.bops, "bop"),
    "largest activation": lambda network: amount(network.act_max_bytes, "bytes"),
}


def shared_files(run: Path, repo: str) -> dict[str, bytes]:
    """The files that a finished run shares, by name; ``ValueError`` if it is not finished."""
    missing = [name for name in ("summary.json", MODEL, POLICY, RECIPE) if not (run / name).exists()]
    if missing:
        raise ValueError(f"{run} holds no {missing[0]}; give the folder of a finished run of `mixbits fit`")
    program, policy = checked(run)
    recipe = without_folders(json.loads((run / RECIPE).read_text(encoding="utf-8")))
    return {
        CARD: card(read_summary(run / "summary.json"), program, policy, repo).encode(),
        MODEL: (run / MODEL).read_bytes(),
        POLICY: (run / POLICY).read_bytes(),
        RECIPE: (json.dumps(recipe, indent=1) + "\n").encode(),
    }


def push(run: Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Commit a finished run to ``repo``, which is made if it is new; returns the commit's address."""
    files = shared_files(run, repo)
    with _explained(repo):
        api = HfApi(endpoint=endpoint)
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo, operations, commit_message="A run of mixbits").commit_url)


def pull(
    repo: str,
    out: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Program:
    """Fetch a shared run into the folder ``out``; the packed model is checked before any file is there.

    Raises ``ValueError`` if the repository cannot be had, or is not what :func:`push` writes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another --out")
    with _explained(repo):
        fetched = Path(
            snapshot_download(
                repo, revision=revision, endpoint=endpoint, cache_dir=cache, allow_patterns=list(FILES)
            )
        )
    for name in (MODEL, POLICY):
        if not (fetched / name).exists():
            raise ValueError(f"{repo} holds no {name}: it is no model that `mixbits push` shared")
    program, _ = checked(fetched)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (fetched / name).exists():
            with whole_file(out / name) as file:
                file.write((fetched / name).read_bytes())
    return program


def checked(folder: Path) -> tuple[Program, Policy]:
    """The packed model and the policy of a folder; ``ValueError`` if damaged or not of each other."""
    program, policy = read_program(folder / MODEL), read_policy(folder / POLICY)
    for name, weight in program.weights.items():
        if policy.bits.get(name) != weight.grid.bits:
            raise ValueError(
                f"{name}: {weight.grid.bits} bits in {MODEL}, {policy.bits.get(name, 'no')} in {POLICY} of "
                f"{folder}; they are of different runs"
            )
    return program, policy


def without_folders(value: Any) -> Any:
    """A recipe whose paths are names of files: where they were on this machine is nobody else's.

    >>> without_folders({"data": "cifar10:/home/me/cifar", "network": "nets/mine.py:small", "seed": 0})
    {'data': 'cifar10:cifar', 'network': 'mine.py:small', 'seed': 0}
    """
    if isinstance(value, dict):
        return {name: without_folders(entry) for name, entry in value.items()}
    return re.sub(r"[^:]*[/\\](?=[^:])", "", value) if isinstance(value, str) else value


def card(summary: Summary, program: Program, policy: Policy, repo: str) -> str:
    """The card (Markdown) of a run: figures that it measured, a dash where it did not."""
    columns = {"float": summary.float_, "uniform": summary.uniform, "mixed": summary.mixed}
    networks = {name: network for name, network in columns.items() if network is not None}
    used = [
        f"- {limit_name(x.limit)}: {amount(x.used, x.unit)} of {amount(x.asked, x.unit)}"
        for x in summary.limits
    ]
    sites = [f"| {name} | {grid.bits} | {describe(grid)} |" for name, grid in policy.grids.items()]
    network, data = without_folders(summary.network or UNKNOWN), without_folders(summary.dataset or UNKNOWN)
    return "\n".join(
        [
            "---",
            "library_name: mixbits",
            "tags: [quantization, mixed-precision]",
            "---",
            "",
            f"# {network} in mixed precision",
            "",
            f"Widths by mixbits {summary.mixbits or UNKNOWN}, method `{summary.method or UNKNOWN}`.",
            f"Budget `{summary.budget or UNKNOWN}`, seed {bits(summary.seed)}, data {data}.",
            "",
            "```",
            "pip install 'mixbits[hub]'",
            f"mixbits pull {repo} --out model",
            f"mixbits run model/{MODEL} --data DATA",
            "```",
            "",
            "## Measured",
            "",
            f"| | {' | '.join(networks)} |",
            f"|---|{'---|' * len(networks)}",
            *(f"| {what} | {' | '.join(map(show, networks.values()))} |" for what, show in MEASURED.items()),
            "",
            *_packed(summary, program),
            *(["", "Used of the budget:", "", *used] if used else []),
            "",
            "Accuracy is on the test set after the last epoch.",
            f"Machine: {summary.machine or UNKNOWN}; started {summary.started or UNKNOWN}.",
            "",
            "## Widths",
            "",
            "| tensor | bits | grid |",
            "|---|---|---|",
            *sites,
            "",
        ]
    )


def _packed(summary: Summary, program: Program) -> list[str]:
    """What is known of the packed file."""
    file, weights = amount(summary.artifact_bytes, "bytes"), amount(program.weight_bytes, "bytes")
    lines = [f"`{MODEL}`: {file}, of which weights {weights}."]
    ran = summary.runtime
    if ran is not None and ran.images:
        same = bits(ran.same_prediction_as_training_graph)
        lines.append(
            f"Run without torch on {bits(ran.images)} test images: {percent(ran.top1)} top-1; {same} of them "
            "predicted as in the training graph."
        )
    return lines


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub's client raises as one ``ValueError`` that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository, write owner/name: {error}") from None
    except LocalTokenNotFoundError:
        raise ValueError(f"{repo}: you are not logged in to the hub; run {LOGIN}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo}: the hub has no such repository, or it is private and you may not see it; check the "
            f"name, or log in: {LOGIN}"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo}: the hub has no such revision of it; check --revision") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"{repo}: the hub refuses this ({status}); log in with a token that may write there: {LOGIN}"
            ) from None
        raise ValueError(f"{repo}: the hub answered {status}: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:  # no answer at all
        raise ValueError(
            f"{repo}: the hub cannot be reached, and nothing of it is in the local cache; check the network, "
            f"HF_ENDPOINT and HF_HUB_OFFLINE ({type(error).__name__})"
        ) from None
