"""Names of soups as the paper writes them, there and back: `last_10_loss_pf-0_7`, `last_5_3_loss_pf-0_75`.

    <which>_<how>[_<more>]

which  last_K | last_K_EVERY | from_START[_EVERY] | steps_100-200-300, then best_N where the best are chosen
how    unweighted | <metric>_pf-<n>_<d> | linear | 1-sqrt | ema-<n>_<d> | ema-step-<n>_<d> | lawa | swa | weights-<digest>,
       after the metric where the best by it are chosen: last_10_best_3_eval_loss_unweighted
more   min, max (an objective that the metric's name does not say), q-<n>_<d>, s-<N> (smooth), final (include_final)
"""

from __future__ import annotations

import hashlib
import re
from decimal import Decimal

from stockpot.errors import ArgumentError
from stockpot.runs.metrics import known_objective
from stockpot.runs.spec import SoupSpec
from stockpot.runs.weighting import DEFAULT_POWER

__all__ = ["parse_name", "soup_name"]

_INT = r"\d{1,12}"
_NUMBER = r"\d{1,320}_\d{1,340}"
_NAME = re.compile(
    rf"(?:last_(?P<last>{_INT})(?:_(?P<every>{_INT}))?|from_(?P<start>{_INT})(?:_(?P<start_every>{_INT}))?"
    rf"|steps_(?P<steps>{_INT}(?:-{_INT})*))"
    rf"(?:_best_(?P<best>{_INT}))?"
    r"_(?:(?:(?P<best_by>.+?)_)?(?P<plain>unweighted|linear|1-sqrt|lawa|swa)"
    rf"|(?:(?P<ema_by>.+?)_)?ema(?P<per>-step)?-(?P<decay>{_NUMBER})"
    rf"|(?P<metric>.+?)_pf-(?P<penalty>{_NUMBER}))"
    rf"(?:_(?P<objective>min|max))?(?:_q-(?P<power>{_NUMBER}))?(?:_s-(?P<smooth>{_INT}))?(?P<final>_final)?"
)
_PLAIN = {"uniform": "unweighted", "linear": "linear", "1-sqrt": "1-sqrt", "lawa": "lawa", "swa": "swa"}


def soup_name(spec: SoupSpec, count: int) -> str:
    """The name of a soup of `count` snapshots (before `best` chooses among them)."""
    metric = {"step": "steps"}.get(spec.by or "", spec.by)
    # a metric such as 5_shot_acc would be taken for the interval
    digit = metric is not None and metric[0].isdigit() and spec.best is None
    every = f"_{spec.every}" if spec.every != 1 or digit else ""
    if spec.weights is not None:
        which = "steps_" + "-".join(map(str, spec.weights))
    elif spec.steps is not None:
        which = "steps_" + "-".join(map(str, spec.steps))
    elif spec.start is not None:
        which = f"from_{spec.start}{every}"
    else:
        which = f"last_{count}{every}"
    kind = spec.kind
    if spec.best is not None:
        which += f"_best_{spec.best}" + (f"_{metric}" if kind != "metric" else "")
    if kind in _PLAIN:
        how = _PLAIN[kind]
    elif kind == "ema":
        assert spec.decay is not None
        how = f"ema{'-step' if spec.decay_per == 'step' else ''}-{_written(spec.decay)}"
    elif kind == "weights":
        text = repr(sorted((spec.weights or {}).items())) + str(spec.normalize)
        how = "weights-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    else:
        how = f"{metric}_pf-{_written(1.0 if spec.penalty is None else spec.penalty)}"
    more = ""
    if spec.objective is not None and spec.by is not None and spec.objective != known_objective(spec.by):
        more += f"_{spec.objective}"
    if spec.power != DEFAULT_POWER:
        more += f"_q-{_written(spec.power)}"
    if spec.smooth != 1:
        more += f"_s-{spec.smooth}"
    if spec.include_final:
        more += "_final"
    return f"{which}_{how}{more}"


def parse_name(name: str) -> SoupSpec:
    """The SoupSpec that a name stands for. Raises ArgumentError."""
    m = _NAME.fullmatch(name)
    if m is None:
        raise ArgumentError(
            f"{name!r} is not the name of a soup, such as last_10_loss_pf-0_7, last_5_3_unweighted or "
            "last_10_ema-0_9 (one with given weights can't be had from its name)"
        )
    metric = m["metric"] or m["best_by"] or m["ema_by"]
    plain = {written: scheme for scheme, written in _PLAIN.items()}.get(m["plain"] or "")
    every = m["every"] or m["start_every"]
    return SoupSpec(
        last=int(m["last"]) if m["last"] else None,
        every=int(every) if every else 1,
        start=int(m["start"]) if m["start"] else None,
        steps=tuple(int(s) for s in m["steps"].split("-")) if m["steps"] else None,
        best=int(m["best"]) if m["best"] else None,
        include_final=bool(m["final"]),
        scheme=plain if plain in ("linear", "1-sqrt", "lawa", "swa") else None,
        by={"steps": "step"}.get(metric or "", metric),
        objective=m["objective"],
        penalty=_read(m["penalty"]) if m["penalty"] else None,
        power=_read(m["power"]) if m["power"] else DEFAULT_POWER,
        smooth=int(m["smooth"]) if m["smooth"] else 1,
        decay=_read(m["decay"]) if m["decay"] else None,
        decay_per="step" if m["per"] else "snapshot",
    )


def _written(value: float) -> str:
    """0.7 -> 0_7, 1 -> 1_0, 1e-5 -> 0_00001."""
    text = format(Decimal(repr(float(value))), "f")
    return (text if "." in text else text + ".0").replace(".", "_")


def _read(text: str) -> float:
    return float(text.replace("_", "."))
