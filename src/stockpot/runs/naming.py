"""Names of soups as the paper writes them, there and back: `last_10_loss_pf-0_7`, `last_5_3_loss_pf-0_75`.

    <which>_<how>[_<more>]

which  last_K | last_K_EVERY | from_START[_EVERY] | steps_100-200-300, then best_N where the best are chosen
how    as the scheme writes it (runs.schemes): unweighted | <metric>_pf-<n>_<d> | linear | ema-<n>_<d> | weights-<digest> ...,
       after the metric where the best by it are chosen: last_10_best_3_eval_loss_unweighted
more   min, max (an objective that the metric's name does not say), q-<n>_<d>, s-<N> (smooth), final (include_final)
"""

from __future__ import annotations

import re

from stockpot.errors import ArgumentError
from stockpot.runs.metrics import known_objective
from stockpot.runs.schemes import NUMBER, SCHEMES, read_number, written_number
from stockpot.runs.spec import SoupSpec
from stockpot.runs.weighting import DEFAULT_POWER

__all__ = ["parse_name", "soup_name"]

_INT = r"\d{1,12}"


def _grammar() -> re.Pattern[str]:
    """Of a whole name; group `how<i>` is what scheme i of the table wrote."""
    ways = []
    for i, scheme in enumerate(SCHEMES.values()):
        if scheme.pattern is not None:
            plain = re.sub(r"\(\?P<\w+>", "(?:", scheme.pattern)
            metric = rf"(?P<by{i}>.+?)_" if scheme.needs_metric else rf"(?:(?P<by{i}>.+?)_)?"
            ways.append(rf"{metric}(?P<how{i}>{plain})")
    return re.compile(
        rf"(?:last_(?P<last>{_INT})(?:_(?P<every>{_INT}))?|from_(?P<start>{_INT})(?:_(?P<start_every>{_INT}))?"
        rf"|steps_(?P<steps>{_INT}(?:-{_INT})*))(?:_best_(?P<best>{_INT}))?_(?:{'|'.join(ways)})"
        rf"(?:_(?P<objective>min|max))?(?:_q-(?P<power>{NUMBER}))?(?:_s-(?P<smooth>{_INT}))?(?P<final>_final)?"
    )


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
    scheme = SCHEMES[spec.kind]
    if spec.best is not None:
        which += f"_best_{spec.best}" + (f"_{metric}" if not scheme.needs_metric else "")
    how = (f"{metric}_" if scheme.needs_metric else "") + scheme.written(spec)
    more = ""
    if spec.objective is not None and spec.by is not None and spec.objective != known_objective(spec.by):
        more += f"_{spec.objective}"
    if spec.power != DEFAULT_POWER:
        more += f"_q-{written_number(spec.power)}"
    if spec.smooth != 1:
        more += f"_s-{spec.smooth}"
    if spec.include_final:
        more += "_final"
    return f"{which}_{how}{more}"


def parse_name(name: str) -> SoupSpec:
    """The SoupSpec that a name stands for. Raises ArgumentError."""
    m = _grammar().fullmatch(name)
    if m is None:
        raise ArgumentError(
            f"{name!r} is not the name of a soup, such as last_10_loss_pf-0_7, last_5_3_unweighted or "
            "last_10_ema-0_9 (one with given weights can't be had from its name)"
        )
    place, scheme = next((i, s) for i, s in enumerate(SCHEMES.values()) if s.pattern and m[f"how{i}"] is not None)
    own = re.fullmatch(scheme.pattern or "", m[f"how{place}"])
    assert own is not None
    metric = m[f"by{place}"]
    every = m["every"] or m["start_every"]
    return SoupSpec(
        last=int(m["last"]) if m["last"] else None,
        every=int(every) if every else 1,
        start=int(m["start"]) if m["start"] else None,
        steps=tuple(int(s) for s in m["steps"].split("-")) if m["steps"] else None,
        best=int(m["best"]) if m["best"] else None,
        include_final=bool(m["final"]),
        by={"steps": "step"}.get(metric or "", metric),
        objective=m["objective"],
        power=read_number(m["power"]) if m["power"] else DEFAULT_POWER,
        smooth=int(m["smooth"]) if m["smooth"] else 1,
        **scheme.read(own),
    )
