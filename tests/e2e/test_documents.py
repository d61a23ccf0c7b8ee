"""Documents: the Python examples run, commands and files that are named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mixbits.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.filterwarnings("default")  # what an example warns of is its reader's to see
def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [
        (document.name, example)
        for document in DOCUMENTS
        for example in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert examples

    for name, example in examples:
        with torch.random.fork_rng(devices=[]):
            exec(compile(example, name, "exec"), {"__name__": "__main__"})

    assert (tmp_path / "model.mixbits").stat().st_size > 0


@each_document
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))

    missing = [link for link in links if not (document.parent / link).exists()]

    assert missing == []


@each_document
def test_commands_exist(document):
    written = re.findall(
        r"(?:^|`)(?:\.venv/bin/)?mixbits ([a-z]+)", document.read_text(encoding="utf-8"), re.M
    )

    assert set(written) <= set(COMMANDS) | {"help"}


def test_recipes_named_in_the_readme_exist():
    recipes = re.findall(r"recipes/\w+\.toml", (ROOT / "README.md").read_text(encoding="utf-8"))

    assert recipes
    assert all((ROOT / recipe).is_file() for recipe in recipes)
