"""The ways to weight snapshots, as a table: names, options, the command, recipes, callbacks and docs derive from it.

A new one is an entry here (or `add_scheme` from elsewhere): what its weights are, which options are its own, and how its name is
written and read back. Options that SoupSpec has no field for are given as `options: {name: number}`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from stockpot.errors import ArgumentError
from stockpot.runs.weighting import decay_weights, ema_weights, metric_weights, uniform

if TYPE_CHECKING:
    from stockpot.runs.spec import SoupSpec

__all__ = ["NUMBER", "SCHEMES", "Option", "Scheme", "add_scheme", "read_number", "written_number"]

#: a number as names write it: 0_75
NUMBER = r"\d{1,320}_\d{1,340}"


@dataclass(frozen=True)
class Option:
    """An option that SoupSpec has no field for: a number within [low, high]. default None: it must be given."""

    about: str
    low: float
    high: float
    default: float | None = None


@dataclass(frozen=True)
class Scheme:
    """One way to weight snapshots, in step order.

    weights         (spec, steps, values of the metric, "min" or "max") -> weights that sum to one; None: they are given
    about           half a sentence for help and docs
    written         spec -> how the end of a soup's name says it
    pattern         a regular expression of that, or None where a name does not hold everything; its groups are for `read`
    read            the match of the pattern -> SoupSpec's options
    fields          those of SoupSpec's options that only make sense with it
    options         options of its own by name
    needs           a field that must be given, and what it is, for the error
    needs_metric    whether it weights by the metric `by`
    while_training  whether a callback can average by it: the last snapshots are all there is
    windows         whether it makes a soup for each window of a run
    from_start      whether it takes all snapshots where neither last nor start are given
    implied         whether a spec that names no scheme means it
    """

    weights: Callable[[SoupSpec, Sequence[int], Sequence[float], str], list[float]] | None
    about: str
    written: Callable[[SoupSpec], str]
    pattern: str | None
    read: Callable[[re.Match[str]], dict[str, Any]] = lambda match: {}
    fields: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: tuple[str, str] | None = None
    needs_metric: bool = False
    while_training: bool = True
    windows: bool = False
    from_start: bool = False
    implied: Callable[[SoupSpec], bool] = lambda spec: False


def written_number(value: float) -> str:
    """0.7 -> 0_7, 1 -> 1_0, 1e-5 -> 0_00001."""
    text = format(Decimal(repr(float(value))), "f")
    return (text if "." in text else text + ".0").replace(".", "_")


def read_number(text: str) -> float:
    """The inverse."""
    return float(text.replace("_", "."))


def _named(name: str) -> dict[str, Any]:
    """How a scheme without options is written and read."""
    return {"written": lambda spec: name, "pattern": re.escape(name), "read": lambda match: {"scheme": name}}


def _ema(match: re.Match[str]) -> dict[str, Any]:
    return {"decay": read_number(match["decay"]), "decay_per": "step" if match["per"] else "snapshot"}


def _digest(spec: SoupSpec) -> str:
    text = repr(sorted((spec.weights or {}).items())) + str(spec.normalize)
    return "weights-" + hashlib.sha256(text.encode()).hexdigest()[:8]


SCHEMES: dict[str, Scheme] = {
    "uniform": Scheme(
        weights=lambda spec, steps, values, objective: uniform(len(steps)),
        about="1/k each",
        written=lambda spec: "unweighted",
        pattern="unweighted",
    ),
    "metric": Scheme(
        weights=lambda spec, steps, values, objective: metric_weights(
            values, objective, 1.0 if spec.penalty is None else spec.penalty, spec.power
        ),
        about="metrics-weighted (arXiv 2504.18580)",
        written=lambda spec: f"pf-{written_number(1.0 if spec.penalty is None else spec.penalty)}",
        pattern=rf"pf-(?P<penalty>{NUMBER})",
        read=lambda match: {"penalty": read_number(match["penalty"])},
        fields=("by", "objective", "smooth", "penalty", "power"),
        needs=("by", "the name of a metric"),
        needs_metric=True,
        implied=lambda spec: spec.by is not None and (spec.best is None or spec.penalty is not None),
    ),
    "linear": Scheme(
        weights=lambda spec, steps, values, objective: decay_weights(len(steps), "linear"),
        about="a linear decay of the learning rate (arXiv 2507.17634)",
        **_named("linear"),
    ),
    "1-sqrt": Scheme(
        weights=lambda spec, steps, values, objective: decay_weights(len(steps), "1-sqrt"),
        about="a decay by 1 - sqrt (arXiv 2507.17634)",
        **_named("1-sqrt"),
    ),
    "ema": Scheme(
        weights=lambda spec, steps, values, objective: ema_weights(steps, spec.decay or 0.0, spec.decay_per),
        about="exponential moving average",
        written=lambda spec: f"ema{'-step' if spec.decay_per == 'step' else ''}-{written_number(spec.decay or 0.0)}",
        pattern=rf"ema(?P<per>-step)?-(?P<decay>{NUMBER})",
        read=_ema,
        fields=("decay", "decay_per"),
        needs=("decay", "a number from 0 to 1"),
        implied=lambda spec: spec.decay is not None,
    ),
    "lawa": Scheme(
        weights=lambda spec, steps, values, objective: uniform(len(steps)),
        about="uniform over each window of the run (arXiv 2209.14981)",
        while_training=False,
        windows=True,
        **_named("lawa"),
    ),
    "swa": Scheme(
        weights=lambda spec, steps, values, objective: uniform(len(steps)),
        about="uniform from a step on (arXiv 1803.05407)",
        while_training=False,
        from_start=True,
        **_named("swa"),
    ),
    "weights": Scheme(
        weights=None,
        about="given weights",
        written=_digest,
        pattern=None,
        fields=("weights", "normalize"),
        needs=("weights", "from step to weight"),
        while_training=False,
        implied=lambda spec: spec.weights is not None,
    ),
}
#: which of those that a spec may mean without saying so goes first
_IMPLIED = ("weights", "ema", "metric")


def implied_scheme(spec: SoupSpec) -> str:
    """The scheme of a spec that names none."""
    return next((name for name in _IMPLIED if SCHEMES[name].implied(spec)), "uniform")


def add_scheme(name: str, scheme: Scheme) -> None:
    """Add a way to weight snapshots. Raises ArgumentError where its name is taken or can't be told from another's."""
    if name in SCHEMES:
        raise ArgumentError(f"there is a scheme called {name!r} already")
    example = re.compile(scheme.pattern) if scheme.pattern else None
    for other, known in SCHEMES.items():
        if known.pattern and example and (example.fullmatch(other) or re.fullmatch(known.pattern, name)):
            raise ArgumentError(f"names of {name!r} can't be told from those of {other!r}")
    SCHEMES[name] = scheme
