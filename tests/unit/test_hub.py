"""Sharing through the Hugging Face Hub: what would be shared, what comes back, and what is said when it fails.

The hub itself is not reached: a repository is put into the client's cache as the client lays it out, and a
server on this machine stands for a hub that refuses.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lowered import lowered
from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.integrations import hub
from mixbits.pack.artifact import read_program, write_program

REPO, COMMIT = "someone/small-net", "0123456789abcdef0123456789abcdef01234567"
UNREACHABLE = "http://127.0.0.1:9"  # the port of a service that nobody runs
RECIPE = {
    "network": "/home/me/nets.py:small",
    "data": "cifar10:/data/cifar",
    "weights": "/home/me/w.pt",
    "seed": 3,
}
NETWORK = {"top1": 91.25, "weight_bytes": 2048, "avg_weight_bits": 3.5, "avg_act_bits": 4.25, "bops": 5e8}
SUMMARY = {
    "format": "mixbits-summary",
    "version": 1,
    "method": "mpdnn",
    "network": "/home/me/nets.py:small",
    "budget": "weights=2KiB",
    "seed": 3,
    "float": {"top1": 92.5},
    "uniform": None,
    "mixed": NETWORK,
    "limits": [{"limit": "weights", "unit": "bytes", "text": "weights=2KiB", "asked": 2048, "used": 2040}],
    "artifact_bytes": 4096,
    "runtime": {"top1": 91.5, "images": 400, "same_prediction_as_training_graph": 399},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as sharing reads it."""
    case, folder = lowered("perceptron"), tmp_path / "run"
    folder.mkdir()
    write_program(case.program, folder / "model.mixbits")
    grids = {name: weight.grid for name, weight in case.program.weights.items()}
    policy = Policy({"input": Uniform(8, signed=True), **grids})
    for name, entry in (("policy", policy.to_json()), ("recipe", RECIPE), ("summary", SUMMARY)):
        (folder / f"{name}.json").write_text(json.dumps(entry))
    return folder


@pytest.fixture
def cache(run: Path, tmp_path: Path) -> Path:
    """The client's cache with the shared run in it."""
    repo = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name, content in hub.shared_files(run, REPO).items():
        (snapshot / name).write_bytes(content)
    return tmp_path / "cache"


def snapshot(cache: Path) -> Path:
    return next(cache.glob("models--*/snapshots/*"))


@pytest.fixture
def refusing(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that answers every request with a status and an error code."""
    status, code = request.param

    class Answers(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 (the server's names)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_four_files_are_shared_and_the_model_as_it_is(run):
    files = hub.shared_files(run, REPO)

    assert set(files) == {"README.md", "model.mixbits", "policy.json", "recipe.json"}
    assert files["model.mixbits"] == (run / "model.mixbits").read_bytes()
    assert files["policy.json"] == (run / "policy.json").read_bytes()


def test_no_folder_of_this_machine_is_shared(run):
    files = hub.shared_files(run, REPO)

    assert json.loads(files["recipe.json"]) == {
        "network": "nets.py:small",
        "data": "cifar10:cifar",
        "weights": "w.pt",
        "seed": 3,
    }
    assert not any(b"/home" in content or b"/data" in content for content in files.values())


def test_the_card_has_the_measured_figures_and_no_others(run):
    card = hub.shared_files(run, REPO)["README.md"].decode()

    assert card.startswith("---\nlibrary_name: mixbits\n")
    assert "| | float | mixed |" in card  # the uniform network was not run
    assert "| top-1 | 92.50 % | 91.25 % |" in card
    assert "| weights | – | 2.0 KiB |" in card
    assert "| largest activation | – | – |" in card
    assert "- Weights: 2.0 KiB of 2.0 KiB" in card
    assert "Run without torch on 400 test images: 91.50 % top-1; 399 of them" in card
    for name, weight in read_program(run / "model.mixbits").weights.items():
        assert re.search(rf"^\| {re.escape(name)} \| {weight.grid.bits} \|", card, re.M)


@pytest.mark.parametrize("name", ["summary.json", "model.mixbits", "policy.json", "recipe.json"])
def test_a_run_that_is_not_finished_is_not_shared(run, name):
    (run / name).unlink()

    with pytest.raises(ValueError, match=f"holds no {name}; give the folder of a finished run"):
        hub.shared_files(run, REPO)


def test_a_policy_of_another_run_is_not_shared(run):
    entry = json.loads((run / "policy.json").read_text())
    site = next(name for name in entry["sites"] if name != "input")
    del entry["sites"][site]
    (run / "policy.json").write_text(json.dumps(entry))

    with pytest.raises(ValueError, match=f"{re.escape(site)}: .* they are of different runs"):
        hub.shared_files(run, REPO)


def test_what_was_shared_comes_back(run, cache, tmp_path):
    program = hub.pull(REPO, tmp_path / "out", endpoint=UNREACHABLE, cache=cache)

    assert program.weights.keys() == lowered("perceptron").program.weights.keys()
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert fetched == hub.shared_files(run, REPO)


def test_a_damaged_model_is_refused_and_nothing_is_written(cache, tmp_path):
    path = snapshot(cache) / "model.mixbits"
    path.write_bytes(path.read_bytes()[:-7])

    with pytest.raises(ValueError, match=r"model\.mixbits"):
        hub.pull(REPO, tmp_path / "out", endpoint=UNREACHABLE, cache=cache)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_something_else_is_refused(cache, tmp_path):
    (snapshot(cache) / "model.mixbits").unlink()

    with pytest.raises(
        ValueError, match=r"holds no model\.mixbits: it is no model that `mixbits push` shared"
    ):
        hub.pull(REPO, tmp_path / "out", endpoint=UNREACHABLE, cache=cache)


def test_a_folder_that_holds_something_is_left_alone(cache, run):
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        hub.pull(REPO, run, endpoint=UNREACHABLE, cache=cache)


def test_a_hub_that_cannot_be_reached_is_said(run, cache, tmp_path):
    shutil.rmtree(cache)

    with pytest.raises(
        ValueError, match="the hub cannot be reached, and nothing of it is in the local cache"
    ):
        hub.pull(REPO, tmp_path / "out", endpoint=UNREACHABLE, cache=cache)
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        hub.push(run, REPO, endpoint=UNREACHABLE)


def test_a_name_that_is_none_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"is no name of a repository, write owner/name"):
        hub.pull("not a name", tmp_path / "out", endpoint=UNREACHABLE)


@pytest.mark.parametrize("refusing", [(404, "RepoNotFound"), (401, "RepoNotFound")], indirect=True)
def test_a_repository_that_does_not_exist_is_said(refusing, tmp_path):
    with pytest.raises(ValueError, match="the hub has no such repository, or it is private"):
        hub.pull(REPO, tmp_path / "out", endpoint=refusing, cache=tmp_path / "cache")


@pytest.mark.parametrize("refusing", [(404, "RevisionNotFound")], indirect=True)
def test_a_revision_that_does_not_exist_is_said(refusing, tmp_path):
    with pytest.raises(ValueError, match="no such revision of it; check --revision"):
        hub.pull(REPO, tmp_path / "out", revision="v9", endpoint=refusing, cache=tmp_path / "cache")


@pytest.mark.parametrize("refusing", [(401, ""), (403, "")], indirect=True)
def test_pushing_without_a_login_is_said(run, refusing):
    with pytest.raises(ValueError, match="hf auth login"):
        hub.push(run, REPO, endpoint=refusing)
