"""What to average: a SoupSpec says which snapshots and how they are weighted. Checked here, resolved in `soup.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from stockpot.errors import ArgumentError, nearest
from stockpot.runs.schemes import SCHEMES, implied_scheme
from stockpot.runs.weighting import DEFAULT_POWER, check_penalty

__all__ = ["DEFAULT_LAST", "SoupSpec", "scheme_weights"]

#: the default for `last`, or all regular snapshots where a run has fewer
DEFAULT_LAST = 10


@dataclass(frozen=True)
class SoupSpec:
    """Which snapshots of a run, and how they are weighted.

    Which: the `last` K regular snapshots (10 by default, fewer where the run has fewer), every `every`-th of them counting
    back from the newest; or all from step `start` on; or those of `steps`; of these the `best` N by the metric `by`.
    `include_final` adds the checkpoint saved at the end of training to what can be chosen.

    How: `scheme`, which need not be given where another option implies it:
    uniform   1/k each
    metric    metrics-weighted (arXiv 2504.18580): `by`, `objective` "min" or "max", `penalty` p, `power` q, `smooth` N
    linear, 1-sqrt   the decay of a learning rate (arXiv 2507.17634)
    ema       exponential moving average: `decay` per "snapshot" or "step" (`decay_per`)
    lawa      a uniform average of each window of `last` snapshots along the run (arXiv 2209.14981)
    swa       uniform over everything from `start` on (arXiv 1803.05407)
    weights   `weights`, from step to weight; `normalize` divides them by their sum
    Schemes that were added (runs.schemes) take numbers of their own from `options`.
    """

    last: int | None = None
    every: int = 1
    start: int | None = None
    steps: tuple[int, ...] | None = None
    best: int | None = None
    include_final: bool = False
    scheme: str | None = None
    by: str | None = None
    objective: str | None = None
    penalty: float | None = None
    power: float = DEFAULT_POWER
    smooth: int = 1
    decay: float | None = None
    decay_per: str = "snapshot"
    weights: Mapping[int, float] | None = None
    normalize: bool = False
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            _whole(name, getattr(self, name), 1)
        _whole("smooth", self.smooth, 0)
        if self.smooth == 0:  # as logged
            object.__setattr__(self, "smooth", 1)
        _whole("start", self.start, 0)
        if self.steps is not None:
            object.__setattr__(self, "steps", _steps(self.steps))
        for name in ("penalty", "power", "decay"):
            _real(name, getattr(self, name))
        for name in ("include_final", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        check_penalty(1.0 if self.penalty is None else self.penalty, self.power)
        self._check_words()
        self._check_combinations()

    @property
    def kind(self) -> str:
        """The scheme that is meant."""
        return implied_scheme(self) if self.scheme is None else self.scheme

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = {f.name: {} if f.default is MISSING else f.default for f in fields(self)}
        return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}

    def option(self, name: str) -> float:
        """An option of the scheme's own."""
        default = SCHEMES[self.kind].options[name].default
        return float(self.options[name]) if name in self.options or default is None else default

    def _check_words(self) -> None:
        for name, known in (
            ("scheme", tuple(SCHEMES)),
            ("objective", ("min", "max")),
            ("decay_per", ("snapshot", "step")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                hint = nearest(value, known) if isinstance(value, str) else ""
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}")
        if self.by is not None and (not isinstance(self.by, str) or not self.by.strip()):
            raise ArgumentError(f"by: expected the name of a metric, got {self.by!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.weights))

    def _check_combinations(self) -> None:
        kind = self.kind
        ways = [n for n in ("last", "start", "steps") if getattr(self, n) is not None]
        if self.weights is not None:
            ways.append("weights")
        if len(ways) > 1 and not (kind == "weights" and ways == ["steps", "weights"]):
            raise ArgumentError(f"give only one of {' and '.join(ways)}: each chooses snapshots by itself")
        if self.every != 1 and (self.steps is not None or self.weights is not None):
            raise ArgumentError("every counts back from the newest snapshot; it can't go with steps or weights")
        if self.include_final and (self.steps is not None or self.weights is not None):
            raise ArgumentError("include_final has no effect where steps or weights name the snapshots: remove it")
        scheme = SCHEMES[kind]
        if scheme.needs is not None and getattr(self, scheme.needs[0]) is None:
            raise ArgumentError(f"scheme {kind} needs {scheme.needs[0]}, {scheme.needs[1]}")
        if kind != "weights" and self.weights is not None:
            raise ArgumentError(f"weights are given, so scheme can't be {kind}")
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ArgumentError(f"decay: expected a number from 0 to 1, got {self.decay!r}")
        if scheme.windows and (self.steps is not None or self.start is not None or self.best is not None):
            raise ArgumentError(f"{kind} takes windows of last snapshots; steps, start and best don't go with it")
        if self.best is not None and self.by is None:
            raise ArgumentError("best needs by, the metric that says which are best")
        own = {name for other in SCHEMES.values() for name in other.fields}
        given = self.given()
        for name in given:
            used = name in scheme.fields or (name in ("by", "objective", "smooth") and self.best is not None)
            if name in own and not used:
                hint = _meant(name, kind) if self.by is None else "; with best, penalty makes weights by the metric"
                raise ArgumentError(f"{name} has no effect on {kind} weights: remove it{hint}")
        self._check_options(kind)

    def _check_options(self, kind: str) -> None:
        """Options of the scheme's own: known, within their range, and there where they must be."""
        known = SCHEMES[kind].options
        if not isinstance(self.options, Mapping):
            raise ArgumentError(f"options: expected a mapping from names to numbers, got {self.options!r}")
        for name, value in self.options.items():
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ArgumentError(f"options: {kind} weights have no {name!r}; {has}{nearest(str(name), known)}")
            if not _is_number(value) or not known[name].low <= value <= known[name].high:
                span = f"a number from {known[name].low:g} to {known[name].high:g}"
                raise ArgumentError(f"options: {name}: expected {span}, got {value!r}")
        for name, option in known.items():
            if option.default is None and name not in self.options:
                raise ArgumentError(f"scheme {kind} needs options: {name}, {option.about}")


def _meant(name: str, kind: str) -> str:
    if name in ("objective", "penalty", "power", "smooth") and kind == "uniform":
        return ", or name the metric with by"
    return ""


def _whole(name: str, value: Any, low: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise ArgumentError(f"{name}: expected a whole number of at least {low}, got {value!r}")


def _real(name: str, value: Any) -> None:
    if value is not None and not _is_number(value):
        raise ArgumentError(f"{name}: expected a number, got {value!r}")


def _is_number(value: Any) -> bool:
    """Not NaN, not infinite, no integer of hundreds of digits."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 1e300


def _steps(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (int, Iterable)):
        raise ArgumentError(f"steps: expected whole numbers, got {value!r}")
    steps = (value,) if isinstance(value, int) else tuple(value)
    if not steps:
        raise ArgumentError("steps: expected at least one step")
    for step in steps:
        _whole("steps", step, 0)
    if len(set(steps)) != len(steps):
        raise ArgumentError(f"steps: {next(s for s in steps if steps.count(s) > 1)} is given twice")
    return tuple(sorted(steps))


def _weights(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping) or not value:
        raise ArgumentError("weights: expected a mapping from steps to weights")
    out: dict[int, float] = {}
    for step, weight in value.items():
        is_text = isinstance(step, str) and step.isascii() and step.isdigit() and len(step) < 16
        if not is_text and (isinstance(step, bool) or not isinstance(step, int)):
            raise ArgumentError(f"weights: expected a step, got {step!r}")
        key = int(step)
        if not _is_number(weight):
            raise ArgumentError(f"weights: the weight of step {key} must be a number, got {weight!r}")
        if key in out:
            raise ArgumentError(f"weights: step {key} is given twice")
        out[key] = float(weight)
    return dict(sorted(out.items()))


def scheme_weights(spec: SoupSpec, steps: Sequence[int], values: Sequence[float], objective: str) -> list[float]:
    """The weights of snapshots in step order by the spec's scheme, which sum to one.

    values     of the metric, one for each step, where the scheme is by a metric; not looked at otherwise
    objective  "min" or "max"
    """
    weights = SCHEMES[spec.kind].weights
    if weights is None:
        raise ArgumentError(f"{spec.kind}: the weights are given, not computed")
    return weights(spec, steps, values, objective)
