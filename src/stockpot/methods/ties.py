"""TIES: trim each task vector, elect a sign for every element, average what agrees.

Three algorithms share this name; each is a dialect here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.faster import FASTER
from stockpot.methods.arrays import add_rows, column, count_rows, keep_where, magnitude, weighted_sum_64
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import DivideBy, Election, Form
from stockpot.methods.parameters import ByDialect, Choice, Flag, Named, PerModel, Real
from stockpot.statistics import Extent, L1Norms, Rank, SignSum

__all__ = ["disjoint_merge", "norm_ratio", "ties", "trim"]

TAUS = [[0.9, -0.2, 0.05, 0.4, -0.6], [-0.8, -0.3, 0.5, 0.1, 0.2], [0.3, 0.7, -0.4, 0.05, -0.1]]


def trim(delta: Any, cutoff: Sequence[float]) -> Any:
    """`[m, ...]` with zeros where |delta| is below the model's cutoff."""
    if all(c == 0 for c in cutoff):
        return delta
    size = magnitude(delta)
    return keep_where(delta, size >= column(cutoff, size))


def disjoint_merge(kept: Any, weight: Sequence[float], election: Election) -> Any:
    """Elect a sign for each element and combine what agrees with it. kept: `[m, ...]` trimmed deltas.

    Where weights differ, the weighted sums that elect are taken in float64: deltas of bf16 weights are multiples of a power of
    two, so that sums which are zero but for rounding, or beyond float32, are common enough to matter.
    """
    import numpy as np

    faster = FASTER.get("elect")
    if faster and kept.flags.c_contiguous and kept.size and kept.dtype in (np.float32, np.float64):
        merged = np.empty(kept.shape[1:], kept.dtype)
        faster(kept.reshape(len(kept), -1), weight, election, merged.reshape(-1))
        return merged
    divide_by = election.divide_by
    common = weight[0] if len(set(weight)) == 1 and weight[0] > 0 else None
    if common is not None and divide_by == "weight":
        common = 1.0  # cancels
    # a weight that all share elects nothing and is better multiplied once, at the end
    plain = common is not None
    values = kept if plain else kept * column(weight, kept)
    ballot = values if election.weighted else kept
    mass = add_rows(ballot) if plain or not election.weighted else weighted_sum_64(kept, weight)
    positive = mass >= 0 if election.zero_is_positive else mass > 0
    agree = (ballot > 0) == positive
    agree &= ballot != 0
    merged = add_rows(keep_where(values, agree))
    if common is not None and common != 1.0:
        merged *= common
    if divide_by == "none":
        return merged
    if divide_by == "count" or plain:
        divisor = count_rows(agree, merged)
    else:
        divisor = add_rows(agree * column(weight, kept))
    if election.least:
        np.maximum(divisor, divisor.dtype.type(election.least), out=divisor)
    else:
        divisor += divisor == 0
    merged /= divisor
    return merged


def norm_ratio(before_after: Any) -> tuple[float, ...]:
    """`[2m]` sums of |delta| before and after sparsifying -> the factor that restores each L1 norm."""
    m = len(before_after) // 2
    pairs = zip(before_after[:m], before_after[m:], strict=True)
    return tuple(float(before / after) if after > 0 else 1.0 for before, after in pairs)


def stack_rows(first: Any, second: Any) -> Any:
    """`[m, n], [m, n] -> [2m, n]`."""
    import numpy as np

    return np.concatenate((first, second))


def _trimmed_norms(delta: Any, *, cutoff: Sequence[float], **_: Any) -> Any:
    return stack_rows(abs(delta), abs(trim(delta, cutoff)))


def _elected_signs(delta: Any, *, cutoff: Sequence[float], weight: Sequence[float], **_: Any) -> Any:
    kept = trim(delta, cutoff)
    mass = add_rows(kept if all(w == 1.0 for w in weight) else kept * column(weight, kept))
    return ((mass > 0) * 1.0 - (mass < 0) * 1.0)[None]


def _extent(params: Mapping[str, Any]) -> Extent:
    return "model" if params["dialect"] == "paper" else "tensor"


def _is_paper(params: Mapping[str, Any]) -> bool:
    return bool(params["dialect"] == "paper")


def _rescales(params: Mapping[str, Any]) -> bool:
    return bool(params["rescale"])


_DIVIDE: dict[str, DivideBy] = {"mergekit": "weight", "paper": "weight", "peft": "count"}


def _election(dialect: str, normalize: bool, majority: Any) -> Election:
    return Election(
        weighted=dialect != "peft",
        divide_by=_DIVIDE[dialect] if normalize else "none",
        zero_is_positive=majority is None or float(majority[0]) >= 0,
    )


def _form(
    cutoff: Any, majority: Any, norms: Any, weight: tuple[float, ...], density: Any, scale: float, normalize: bool,
    rescale: bool, dialect: str,
) -> Form:  # fmt: skip
    return Form(
        weight,
        cutoff=None if all(c == 0 for c in cutoff) else cutoff,
        factor=None if norms is None else norm_ratio(norms),
        election=_election(dialect, normalize, majority),
        scale=scale,
    )


@method(
    family="trimmed",
    space=Space.DELTA,
    models=(1, None),
    stats=(
        Rank("density", over=_extent),
        SignSum("majority", of=_elected_signs, over="model", when=_is_paper),
        L1Norms("norms", of=_trimmed_norms, when=_rescales),
    ),
    cite="arXiv:2306.01708",
    form=_form,
    neutral={"density": 1.0},
    dialects={
        "mergekit": "cutoff for each tensor, deltas weighted before the election, divided by the agreeing weight",
        "paper": "one cutoff over the whole model, zero sums take the model's majority sign, divided by the agreeing count "
        "(that is the same as the agreeing weight while all weights are 1, as in the paper)",
        "peft": "cutoff for each tensor, election on unweighted deltas, divided by the agreeing count",
    },
    examples=(
        Example(TAUS, [0.9, 0.7, 0.5, 0, -0.6], base=[0] * 5, parameters={"density": 0.4}),
        Example(TAUS, [0.6, 0.7, 0.5, 0.4, -0.6], base=[0] * 5, parameters={"density": 0.6}),
        Example(TAUS, [-0.8, 0.7, 0.5, 0.4, -0.6], base=[0] * 5, parameters={"density": 0.6, "weight": [1, 2, 1]}),
        Example(
            TAUS,
            [0.6, 0.7, 1.0, 0.4, -0.6],
            base=[0] * 5,
            parameters={"density": 0.6, "weight": [1, 2, 1], "dialect": "peft"},
        ),
        Example(TAUS, [0.9, 0.7, 0.5, 0, -0.6], base=[0] * 5, parameters={"density": 0.4, "dialect": "paper"}),
    ),
)
def ties(
    delta: Any,
    *,
    cutoff: Any,
    majority: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = ByDialect({"mergekit": 1.0, "paper": 0.2}),
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = True,
    rescale: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("mergekit", "paper", "peft"))] = "mergekit",
) -> Any:
    """Trim each delta, elect a sign for every element, average what agrees.

    delta     [m, *block]  model minus base
    cutoff    [m]          smallest |delta| kept, from `density`; all ties at the cutoff are kept
    majority  [1]          sign sum over the model, for exactly zero sums (`paper`)
    norms     [2m]         L1 norms before and after trimming, for `rescale`
    weight    [m]          float64
    density   [m]          kept fraction, 0 to 1
    lambda    float64      scale of the result
    normalize              divide by what agrees (a mean) or not (a sum)
    rescale                restore each delta's L1 norm after trimming
    dialect                `mergekit`, `paper` or `peft`: three algorithms share this name
    returns   [*block]     merged delta; the base is added to it
    """
    kept = trim(delta, cutoff)
    if norms is not None:
        kept = kept * column(norm_ratio(norms), kept)
    merged = disjoint_merge(kept, weight, _election(dialect, normalize, majority))
    return merged if scale == 1.0 else merged * scale
