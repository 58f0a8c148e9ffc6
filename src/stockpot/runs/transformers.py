"""Runs of transformers' Trainer, and of TRL, axolotl, LLaMA-Factory, Unsloth, which build on it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.errors import CheckpointError
from stockpot.files import open_regular, read_bytes
from stockpot.runs.metrics import MetricLog, log_from_rows
from stockpot.runs.run import Run, Snapshot

__all__ = ["STATE", "read_log", "read_run"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what the Trainer logs about the machine rather than the model
_DROP = re.compile(r"(_runtime|_per_second|^total_flos|_flos$)")
STATE = "trainer_state.json"
#: places at which two files are compared
#: bytes of a state that are read, at most
_MOST = 2**28
_SAMPLES = 256
_WEIGHTS = re.compile(r"(adapter_model\.(safetensors|bin)|model.*\.safetensors|pytorch_model.*\.bin)")


def read_run(text: str, root: str, listing: Sequence[str]) -> Run | None:
    """The run in a directory with checkpoint-N/ folders; None where there are none."""
    steps = {int(m[1]): n for n in listing if (m := _CHECKPOINT.fullmatch(n)) and os.path.isdir(os.path.join(root, n))}
    if not steps:
        return None
    warnings: list[str] = []
    state, damage = _newest_state(root, steps, warnings)
    end = _end_of_training(state, damage)
    at_top = any(_WEIGHTS.fullmatch(n) or n in ("modules.json", "model_index.json") for n in listing)
    ordered = sorted(steps)
    if end is None and not at_top and state is None:
        end = off_interval(ordered)
    inside = _named_adapter(text, root, steps, warnings)
    shots = [Snapshot(step, os.path.join(root, steps[step], inside), "", final=step == end) for step in ordered]
    again = _best_again(root, state, steps) if at_top else None
    if again is not None:
        warnings.append(
            f"{text} holds the model of checkpoint-{again} once more, as load_best_model_at_end leaves it: it is not the end of "
            "training, and left out"
        )
    elif at_top and end not in steps:
        if end is not None and end > ordered[-1]:
            shots.append(Snapshot(end, root, "", final=True))
        elif end is None and state is not None:
            warnings.append(f"{text} holds a model too; training has not ended by its {STATE}, so it is left out")
        elif state is None:
            warnings.append(f"{text} holds a final model too; without {STATE} its step is not known, so it is left out")
    log = _log(state, damage, warnings)
    return Run(text, "transformers", tuple(shots), log, warnings=tuple(warnings))


def read_log(root: str, steps: Mapping[int, str], warnings: list[str]) -> tuple[MetricLog, int | None]:
    """(what the Trainer logged, the step at which training ended), from the states in the folders of some steps."""
    state, damage = _newest_state(root, steps, warnings)
    return _log(state, damage, warnings), _end_of_training(state, damage)


def _log(state: Mapping[str, Any] | None, damage: tuple[int, str] | None, warnings: Sequence[str]) -> MetricLog:
    rows = state.get("log_history") if state else None
    source = "log_history of trainer_state.json" if state else "; ".join(w for w in warnings if STATE in w)
    log = log_from_rows((r for r in rows or () if isinstance(r, dict)), source, drop=_DROP)
    return MetricLog(log.series, log.source, damage)


def _named_adapter(text: str, root: str, steps: Mapping[int, str], warnings: list[str]) -> str:
    """The folder within each checkpoint that holds an adapter with a name of its own; "" where adapters or models lie plain.

    Raises CheckpointError where there are several.
    """
    names: set[str] = set()
    for folder in steps.values():
        listing = os.listdir(os.path.join(root, folder))
        if any(_WEIGHTS.fullmatch(n) for n in listing):
            return ""
        names |= {n for n in listing if os.path.isfile(os.path.join(root, folder, n, "adapter_config.json"))}
    if len(names) > 1:
        first = sorted(names)[0]
        raise CheckpointError(
            f"{text}: its checkpoints hold several adapters ({', '.join(sorted(names))}); choose one with --snapshots "
            f"'checkpoint-{{step}}/{first}'"
        )
    if names:
        warnings.append(f"{text}: its checkpoints hold an adapter named {min(names)!r}, which is read")
    return min(names) if names else ""


def _best_again(root: str, state: Mapping[str, Any] | None, steps: Mapping[int, str]) -> int | None:
    """The step whose checkpoint the model beside the checkpoints is a copy of; None where it is one of its own."""
    best = state.get("best_model_checkpoint") if state else None
    found = _CHECKPOINT.fullmatch(os.path.basename(best.rstrip("/"))) if isinstance(best, str) else None
    step = int(found[1]) if found else None
    if step is None or step not in steps:
        return None
    for name in sorted(n for n in os.listdir(root) if _WEIGHTS.fullmatch(n)):
        if _same_file(os.path.join(root, name), os.path.join(root, steps[step], name)):
            return step
    return None


def _same_file(one: str, two: str) -> bool:
    """Whether two files have one size and the same bytes in samples all over."""
    try:
        size = os.path.getsize(one)
        if size != os.path.getsize(two):
            return False
        with open(open_regular(one), "rb") as a, open(open_regular(two), "rb") as b:
            for k in range(_SAMPLES):
                at = max(size - 4096, 0) * k // (_SAMPLES - 1)
                a.seek(at)
                b.seek(at)
                if a.read(4096) != b.read(4096):
                    return False
    except OSError:
        return False
    return True


def _newest_state(
    root: str, steps: Mapping[int, str], warnings: list[str]
) -> tuple[dict[str, Any] | None, tuple[int, str] | None]:
    """(the state that got furthest, what is lost where newer ones can't be read)."""
    places = [STATE, *(os.path.join(steps[s], STATE) for s in sorted(steps, reverse=True))]
    best: dict[str, Any] | None = None
    lost: list[tuple[str, str]] = []
    for relative in places:
        path = os.path.join(root, relative)
        if not os.path.exists(path):
            continue
        state, why = _read_state(path)
        if state is None:
            lost.append((relative, why))
            continue
        if best is None or _global_step(state) > _global_step(best):
            best = state
        if relative != STATE:
            break  # older checkpoints have shorter logs
    damage = None
    for relative, why in lost:
        warnings.append(f"{relative} can't be used: {why}")
    if lost and best is not None and _global_step(best) < max(steps):
        damage = (_global_step(best), f"{lost[0][0]} can't be used ({lost[0][1]})")
    return best, damage


def _read_state(path: str) -> tuple[dict[str, Any] | None, str]:
    try:
        state = json.loads(read_bytes(path, _MOST).decode("utf-8"))
    except OSError as e:
        return None, e.strerror or str(e)
    except (ValueError, RecursionError) as e:
        return None, f"not valid JSON, cut short? ({e})"
    if not isinstance(state, dict) or not isinstance(state.get("log_history", []), list):
        return None, "not a state that the Trainer writes"
    return state, ""


def _global_step(state: Mapping[str, Any]) -> int:
    step = state.get("global_step")
    return step if isinstance(step, int) and not isinstance(step, bool) else -1


def _end_of_training(state: Mapping[str, Any] | None, damage: tuple[int, str] | None) -> int | None:
    """The step at which training ended, or None for a run that has not ended or says nothing."""
    if state is None or damage is not None:
        return None
    step = _global_step(state)
    rows = [r for r in state.get("log_history", ()) if isinstance(r, dict)]
    finished = any("train_runtime" in r and r.get("step") == step for r in rows)
    most = state.get("max_steps")
    if finished or (isinstance(most, int) and not isinstance(most, bool) and step >= most > 0):
        return step
    return None


def off_interval(steps: Sequence[int]) -> int | None:
    """The last of steps that are evenly spaced but for the last gap, which is shorter: saved at the end of training."""
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    if len(gaps) >= 3 and len(set(gaps[:-1])) == 1 and gaps[-1] < gaps[0]:
        return steps[-1]
    return None
