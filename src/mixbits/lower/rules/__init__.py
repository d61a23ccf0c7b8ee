"""Rules: which instructions each aten operation becomes, one file a family."""

from __future__ import annotations

from mixbits.lower.rules import attention, elementwise, layers, pools, shapes

__all__ = ["attention", "elementwise", "layers", "pools", "shapes"]
