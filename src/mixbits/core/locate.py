"""Python objects named on the command line: ``module:name`` and ``path/to/file.py:name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

NAMES_SHOWN = 20  # of a module's names in an error, most similar first


class NotLocatedError(ValueError):
    """Nothing can be found under that address; an error of the code that was found is never one of these."""


def locate(spec: str) -> object:
    """Object that ``module:name`` or ``path/to/file.py:name`` names.

    As with ``python -m`` and ``python file.py``, modules in the current directory, and beside the file, can
    be imported; their folders stay on ``sys.path`` for imports that the object does later. A file is run once
    a process, however many names are taken from it.

    Raises:
        NotLocatedError: The spec is malformed, or there is no such file, module or name. An exception that
            the module itself raises is passed on unchanged.

    >>> locate("math:tau")
    6.283185307179586
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise NotLocatedError(f"{spec!r} names no Python object. Write module:name or path/to/file.py:name.")
    _make_importable(Path.cwd())
    module = _module_of_file(Path(place), spec) if place.endswith(".py") else _module_called(place, spec)
    public = vars(module)
    if name not in public:
        have = [other for other in public if not other.startswith("_")]
        have = difflib.get_close_matches(name, have, n=NAMES_SHOWN, cutoff=0.0)
        raise NotLocatedError(
            f"{spec}: {place} has no {name!r} (have: {', '.join(have) or 'no public name'})."
        )
    return public[name]


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _module_called(name: str, spec: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise NotLocatedError(
            f"{spec}: {name!r} is neither a module's dotted name nor a file that ends in .py."
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module asked for, or a package above it, is "not found" here: an import that fails inside
        # the user's module is the user's error, to be read with its own traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise NotLocatedError(
            f"{spec}: no module {error.name!r}, neither installed nor under {Path.cwd()}. "
            "Run from the folder that holds it, or write path/to/file.py:name."
        ) from None


def _module_of_file(path: Path, spec: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise NotLocatedError(f"{spec}: no file {path}.")
    # The path's checksum keeps a file called torch.py apart from torch, and two files called model.py apart.
    name = f"_located_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    _make_importable(path.parent)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
