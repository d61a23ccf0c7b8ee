"""Documents: their examples run, what they name exists, and the messages they explain are the program's."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import mixbits
from mixbits.cli.main import COMMANDS, main
from mixbits.methods import find_methods

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# ```python runs; ```python NAME.py is saved under that name; every command of ```sh is run. Other fences are shown only.
EXAMPLE = re.compile(r"^```(python|sh)(?: (\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)
TROUBLE = ROOT / "docs" / "troubleshooting.md"


def title(document: Path) -> str:
    return str(document.relative_to(ROOT))


def examples_of(document: Path) -> list[tuple[str, str, str]]:
    """Language, file name (or empty) and text of every example of a document, in its order."""
    return EXAMPLE.findall(document.read_text(encoding="utf-8"))


def documents(chosen: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", chosen, ids=title)


each_document = documents(DOCUMENTS)


@documents([document for document in DOCUMENTS if examples_of(document)])
@pytest.mark.filterwarnings("default")  # what an example warns of is its reader's to see
def test_the_examples_of_a_document_run_one_after_the_other(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python` would
    names = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for language, file, example in examples_of(document):
            if file:
                Path(file).write_text(example, encoding="utf-8")
            elif language == "sh":
                for command in example.replace("\\\n", " ").splitlines():
                    program, *arguments = shlex.split(command, comments=True)
                    assert program == "mixbits"
                    assert main(arguments) == 0, command
            else:
                exec(compile(example, title(document), "exec"), names)


def test_the_example_of_the_readme_is_run():
    assert any("import mixbits" in example for _, _, example in examples_of(ROOT / "README.md"))


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


@each_document
def test_a_document_is_in_the_table_of_contents_of_its_folder(document):
    if document.parent == ROOT or document.name == "index.md":
        return
    index = document.parent / "index.md"
    if not index.exists():  # all of the folder, by a pattern
        index = ROOT / "docs" / "index.md"
        assert f"{document.parent.name}/*" in index.read_text(encoding="utf-8")
        return
    assert re.search(rf"^{document.stem}$", index.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_method_has_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    baselines = (ROOT / "docs" / "methods" / "baselines.md").read_text(encoding="utf-8")

    without = [name for name in find_methods() if name not in pages and f"`{name}`" not in baselines]

    assert without == []


def test_every_public_name_is_in_the_python_interface():
    described = re.findall(
        r"auto\w+:: mixbits\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M
    )

    assert set(mixbits.__all__) - set(described) == {"__version__"}


def messages() -> list[str]:
    """What stands in `code` at the start of the headings of the page on errors."""
    return re.findall(r"^### `(.+?)`$", TROUBLE.read_text(encoding="utf-8"), re.MULTILINE)


def texts_of_the_source() -> list[str]:
    """Every string of the source, what it computes replaced by an ellipsis, and the lines of the Makefile."""
    texts = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    for path in (ROOT / "src" / "mixbits").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_messages_that_are_explained_are_in_the_source():
    source = texts_of_the_source()

    gone = [message for message in messages() if not any(message in text for text in source)]

    assert messages()
    assert gone == []
