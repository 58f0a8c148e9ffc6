"""How many files a process may have open: a merge keeps every shard of every input and of the output open."""

from __future__ import annotations

from stockpot.errors import OutputError
from stockpot.planning.plan import Plan

__all__ = ["allow_open_files"]

#: for the journal, libraries, threads
_SPARE = 64


def allow_open_files(plan: Plan) -> None:
    """Raise the soft limit as far as the plan needs. Raises OutputError with the number where the hard limit is lower."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    checkpoints = {id(c): c for m in plan.inputs for c in (m.checkpoint, *m.checkpoint.parts)}
    needed = len(plan.shards) + sum(len(c.files) for c in checkpoints.values()) + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OutputError(
            f"{needed} files would be open at once ({len(plan.shards)} shards are written), {hard} are allowed: take larger "
            "shards (--shard-size), or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
