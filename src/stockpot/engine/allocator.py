"""Keeps glibc from returning and faulting in the same pages for every block.

By default blocks of more than a few hundred kilobytes are mapped and unmapped each time they are used, which costs a merge
half its time in page faults. What is kept instead is bounded by what the merge has in use at its peak.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

__all__ = ["keep_pages"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_pages() -> None:
    """Set it once for this process; does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 128 * 2**20)
