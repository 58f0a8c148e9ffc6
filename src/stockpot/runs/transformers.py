"""Runs of transformers' Trainer, and of TRL, axolotl, LLaMA-Factory, Unsloth, which build on it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.runs.metrics import MetricLog, log_from_rows
from stockpot.runs.run import Run, Snapshot

__all__ = ["read_run"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what the Trainer logs about the machine rather than the model
_DROP = re.compile(r"(_runtime|_per_second|^total_flos|_flos$)")
_STATE = "trainer_state.json"
_WEIGHTS = re.compile(r"(adapter_model\.(safetensors|bin)|model.*\.safetensors|pytorch_model.*\.bin)")


def read_run(text: str, root: str, listing: Sequence[str]) -> Run | None:
    """The run in a directory with checkpoint-N/ folders; None where there are none."""
    steps = {int(m[1]): n for n in listing if (m := _CHECKPOINT.fullmatch(n)) and os.path.isdir(os.path.join(root, n))}
    if not steps:
        return None
    warnings: list[str] = []
    state, damage = _newest_state(root, steps, warnings)
    end = _end_of_training(state, damage)
    at_top = any(_WEIGHTS.fullmatch(n) for n in listing)
    ordered = sorted(steps)
    if end is None and not at_top and state is None:
        end = off_interval(ordered)
    shots = [Snapshot(step, os.path.join(root, steps[step]), "", final=step == end) for step in ordered]
    if at_top and end not in steps:
        if end is not None and end > ordered[-1]:
            shots.append(Snapshot(end, root, "", final=True))
        elif end is None and state is not None:
            warnings.append(f"{text} holds a model too; training has not ended by its {_STATE}, so it is left out")
        elif state is None:
            warnings.append(
                f"{text} holds a final model too; without {_STATE} its step is not known, so it is left out"
            )
    rows = state.get("log_history") if state else None
    source = "log_history of trainer_state.json" if state else "; ".join(w for w in warnings if _STATE in w)
    log = log_from_rows((r for r in rows or () if isinstance(r, dict)), source, drop=_DROP)
    return Run(text, "transformers", tuple(shots), MetricLog(log.series, log.source, damage), warnings=tuple(warnings))


def _newest_state(
    root: str, steps: Mapping[int, str], warnings: list[str]
) -> tuple[dict[str, Any] | None, tuple[int, str] | None]:
    """(the state that got furthest, what is lost where newer ones can't be read)."""
    places = [_STATE, *(os.path.join(steps[s], _STATE) for s in sorted(steps, reverse=True))]
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
        if relative != _STATE:
            break  # older checkpoints have shorter logs
    damage = None
    for relative, why in lost:
        warnings.append(f"{relative} can't be used: {why}")
    if lost and best is not None and _global_step(best) < max(steps):
        damage = (_global_step(best), f"{lost[0][0]} can't be used ({lost[0][1]})")
    return best, damage


def _read_state(path: str) -> tuple[dict[str, Any] | None, str]:
    try:
        with open(path, encoding="utf-8") as f:
            state = json.load(f)
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
