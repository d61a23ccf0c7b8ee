"""Who may import whom (the contracts are in pyproject.toml) and what runs without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
TORCH_FREE = ("core", "search", "pack", "runtime", "data", "report")

IMPORT_EVERY_MODULE = """
import importlib, pkgutil, sys

package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
    if "torch" in sys.modules:
        sys.exit(f"{module.name} loads torch")
if "torch" in sys.modules:
    sys.exit(f"{package.__name__} loads torch")
"""


def test_packages_depend_downward_only(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


# A process of its own: here, another test may have loaded torch already.
@pytest.mark.parametrize("name", [name for name in TORCH_FREE if find_spec(f"mixbits.{name}")])
def test_package_runs_without_torch(name):
    command = [sys.executable, "-c", IMPORT_EVERY_MODULE, f"mixbits.{name}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
