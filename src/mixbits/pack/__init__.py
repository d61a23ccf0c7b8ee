"""Storage: codes of any width without gaps, and the file that holds a program. No torch."""

from __future__ import annotations

from mixbits.pack.bits import native_available, pack, pack_reference, packed_bytes, unpack, unpack_reference

__all__ = ["native_available", "pack", "pack_reference", "packed_bytes", "unpack", "unpack_reference"]
