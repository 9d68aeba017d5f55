"""Lets this process keep the memory that it frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TRIM_BYTES, _PAD_BYTES, _MMAP_BYTES = 32 << 20, 8 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Tells glibc's allocator not to give freed blocks of up to 32 MiB back to the system.

    Workers make and free arrays of some MiB again and again; each time the system would clear their pages
    anew, which took a tenth of a merge that can be undone. Other allocators are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in (
        (_M_MMAP_THRESHOLD, _MMAP_BYTES),
        (_M_TRIM_THRESHOLD, _TRIM_BYTES),
        (_M_TOP_PAD, _PAD_BYTES),
    ):
        mallopt(option, value)
