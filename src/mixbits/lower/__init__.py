"""Lowering: from a captured network with quantizers to a program that runs without torch."""

from __future__ import annotations

from mixbits.lower.lower import lower

__all__ = ["lower"]
