"""Methods that learn widths: one file each, found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from mixbits.train.method import Method


def find_methods() -> dict[str, type[Method]]:
    """Every method by name: one file in ``mixbits/methods`` holds one concrete :class:`Method`."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        namespace = vars(importlib.import_module(f"{__name__}.{module.name}"))
        classes = [
            value
            for value in namespace.values()
            if isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__.endswith(f".{module.name}")
        ]
        if len(classes) != 1:
            raise ImportError(
                f"mixbits/methods/{module.name}.py must define exactly one Method, found {len(classes)}"
            )
        found[module.name] = classes[0]
    return found


def method_named(name: str) -> type[Method]:
    """The method of that name; the error lists those that exist."""
    found = find_methods()
    if name not in found:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(found)}")
    return found[name]
