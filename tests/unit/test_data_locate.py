from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixbits.core.locate import locate


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """An empty current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(("spec", "found"), [("math:sqrt", math.sqrt), ("os.path:sep", "/")])
def test_name_in_an_installed_module_is_found(spec, found):
    assert locate(spec) == found


def test_module_in_the_current_directory_is_found(here):
    (here / "located_here.py").write_text("answer = 42\n")

    assert locate("located_here:answer") == 42


def test_file_is_found_by_a_relative_and_an_absolute_path(here):
    (here / "deep").mkdir()
    (here / "deep" / "my-model.py").write_text("class Net: pass\n")

    assert locate("deep/my-model.py:Net") is locate(f"{here}/deep/my-model.py:Net")


def test_file_may_import_its_neighbour(here):
    (here / "deep").mkdir()
    (here / "deep" / "located_neighbour.py").write_text("answer = 42\n")
    (here / "deep" / "model.py").write_text("from located_neighbour import answer\n")

    assert locate("deep/model.py:answer") == 42


def test_file_may_have_the_name_of_a_module(here):
    (here / "math.py").write_text("tau = 'mine'\n")

    assert locate(f"{here}/math.py:tau") == "mine"
    assert locate("math:tau") == math.tau


def test_file_may_define_dataclasses(here):
    (here / "options.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, KW_ONLY\n"
        "@dataclass\nclass Options:\n    _: KW_ONLY\n    bits: int = 4\n"
    )

    options = locate("options.py:Options")

    assert isinstance(options, type)
    assert options(bits=3) == options(bits=3)


@pytest.mark.parametrize("spec", ["", "math", "math:", ":sqrt", "math:a b", "math:1"])
def test_spec_that_names_nothing_says_how_to_write_one(spec):
    with pytest.raises(ValueError, match=r"Write module:name or path/to/file\.py:name"):
        locate(spec)


def test_missing_file_is_named(here):
    with pytest.raises(ValueError, match=r"models\.py:Net: no file .*models\.py"):
        locate("models.py:Net")


@pytest.mark.parametrize(
    ("spec", "missing"),
    [("located_none:x", "located_none"), ("json.none:x", "json.none"), ("located_no.ne:x", "located_no")],
    ids=["module", "submodule", "package"],
)
def test_missing_module_is_named(here, spec, missing):
    with pytest.raises(ValueError, match=rf"{spec}: no module '{missing}', neither installed nor under"):
        locate(spec)


def test_path_without_py_is_not_a_module_name():
    with pytest.raises(ValueError, match=r"'models/net' is neither a module's dotted name nor a file"):
        locate("models/net:Net")


@pytest.mark.parametrize("spec", ["located_broken:x", "located_broken.py:x"], ids=["module", "file"])
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import located_not_installed", ModuleNotFoundError),
        ("from math import not_there", ImportError),
        ("1 / 0", ZeroDivisionError),
    ],
    ids=["missing import", "missing name", "exception"],
)
def test_error_inside_the_users_module_is_passed_on(here, spec, source, error):
    (here / "located_broken.py").write_text(source + "\n")

    with pytest.raises(error) as caught:
        locate(spec)
    assert "located_broken.py" in {str(entry.path).rpartition("/")[2] for entry in caught.traceback}


def test_missing_name_lists_what_the_module_has(here):
    (here / "model.py").write_text("_hidden = 1\ndef resnet20(): ...\ndef vgg(): ...\n")

    with pytest.raises(ValueError, match=r"model\.py has no 'resnet21' \(have: resnet20, vgg\)"):
        locate("model.py:resnet21")


def test_long_list_of_names_starts_with_the_most_similar():
    with pytest.raises(ValueError, match=r"math has no 'sqrtt' \(have: sqrt, ") as caught:
        locate("math:sqrtt")

    assert str(caught.value).count(",") < 20
