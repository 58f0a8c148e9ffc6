"""What this machine has: processors and memory."""

from __future__ import annotations

import os

__all__ = ["available_threads", "memory"]


def available_threads() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory() -> dict[str, int | None]:
    """Bytes in all, and those that a merge could take now; also what a container allows."""
    found: dict[str, int | None] = {"total": None, "available": None, "container_limit": None}
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            rows = dict(line.split(":", 1) for line in f)
        found["total"] = int(rows["MemTotal"].split()[0]) * 1024
        found["available"] = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found["total"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            text = f.read().strip()
        found["container_limit"] = int(text) if text.isdigit() else None
    except OSError:
        pass
    return found
