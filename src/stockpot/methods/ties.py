"""TIES: trim each task vector, elect a sign for every element, average what agrees.

Three algorithms share this name; each is a dialect here:

- `mergekit`: cutoff for each tensor, deltas weighted before the election, divided by the agreeing weight;
- `paper`: one cutoff over the whole model, zero sums take the model's majority sign, divided by the agreeing count
  (that is the same as the agreeing weight while all weights are 1, as in the paper);
- `peft`: cutoff for each tensor, election on unweighted deltas, divided by the agreeing count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column, count_rows, is_numpy, keep_where, magnitude, weighted_sum
from stockpot.methods.declaration import Space, method
from stockpot.methods.forms import DivideBy, Election, Form
from stockpot.methods.parameters import ByDialect, Choice, Flag, Named, PerModel, Real
from stockpot.methods.statistics import Cutoff, Total

__all__ = ["disjoint_merge", "norm_ratio", "settle_close_votes", "ties", "trim"]


def trim(delta: Any, cutoff: Sequence[float]) -> Any:
    """`[m, ...]` with zeros where |delta| is below the model's cutoff."""
    if all(c == 0 for c in cutoff):
        return delta
    size = magnitude(delta)
    return keep_where(delta, size >= column(cutoff, size))


def disjoint_merge(kept: Any, weight: Sequence[float], election: Election) -> Any:
    """Elect a sign for each element and combine what agrees with it. kept: `[m, ...]` trimmed deltas."""
    weighted_election, divide_by = election.weighted, election.divide_by
    zero_is_positive = election.zero_is_positive
    common = weight[0] if len(set(weight)) == 1 and weight[0] > 0 else None
    if common is not None and divide_by == "weight":
        common = 1.0  # cancels
    # a weight that all share elects nothing and is better multiplied once, at the end
    plain = common is not None
    values = kept if plain else kept * column(weight, kept)
    ballot = values if weighted_election else kept
    mass = add_rows(ballot)
    positive = mass >= 0 if zero_is_positive else mass > 0
    if not plain and weighted_election:
        settle_close_votes(positive, mass, kept, weight, zero_is_positive)
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
    divisor += divisor == 0
    merged /= divisor
    return merged


def settle_close_votes(positive: Any, mass: Any, kept: Any, weight: Sequence[float], zero_is_positive: bool) -> None:
    """Decide again, in float64, elections so close that rounding in float32 may have decided them. In place.

    Deltas of bf16 weights are multiples of a power of two, so weighted sums that are zero but for rounding are common.
    """
    if mass.dtype.itemsize >= 8 or mass.shape[-1] == 0:
        return
    bound = _largest(kept) * sum(abs(w) for w in weight) * (len(weight) + 2) * 2.0**-23
    close = abs(mass) <= bound
    some = kept[0] != 0
    for row in kept[1:]:
        some |= row != 0
    close &= some
    if is_numpy(mass):
        import numpy as np

        where: Any = np.nonzero(close)
        index = (slice(None), *where)
        votes = kept[index].astype(np.float64)
    else:
        where = close.nonzero(as_tuple=True)
        index = (slice(None), *where)
        votes = kept[index].double()
    if votes.shape[-1]:
        exact = weighted_sum(votes, weight)
        positive[where] = exact >= 0 if zero_is_positive else exact > 0


def _largest(x: Any) -> float:
    """The largest magnitude that is a number."""
    if is_numpy(x):
        import numpy as np

        return float(np.fmax(np.fmax.reduce(x, axis=None), -np.fmin.reduce(x, axis=None)))
    return float(abs(x).nan_to_num(nan=0.0, posinf=float("inf")).max())


def norm_ratio(before_after: Any) -> tuple[float, ...]:
    """`[2m]` sums of |delta| before and after sparsifying -> the factor that restores each L1 norm."""
    m = len(before_after) // 2
    pairs = zip(before_after[:m], before_after[m:], strict=True)
    return tuple(float(before / after) if after > 0 else 1.0 for before, after in pairs)


def stack_rows(first: Any, second: Any) -> Any:
    """`[m, n], [m, n] -> [2m, n]`."""
    if is_numpy(first):
        import numpy as np

        return np.concatenate((first, second))
    import torch

    return torch.cat((first, second))


def _trimmed_norms(delta: Any, *, cutoff: Sequence[float], **_: Any) -> Any:
    return stack_rows(abs(delta), abs(trim(delta, cutoff)))


def _elected_signs(delta: Any, *, cutoff: Sequence[float], weight: Sequence[float], **_: Any) -> Any:
    kept = trim(delta, cutoff)
    mass = add_rows(kept if all(w == 1.0 for w in weight) else kept * column(weight, kept))
    return ((mass > 0) * 1.0 - (mass < 0) * 1.0)[None]


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
    space=Space.DELTA,
    models=(1, None),
    stats=(
        Cutoff("density", over=lambda p: "model" if p["dialect"] == "paper" else "tensor"),
        Total("majority", of=_elected_signs, over="model", when=lambda p: p["dialect"] == "paper", kernel="signs"),
        Total("norms", of=_trimmed_norms, when=lambda p: bool(p["rescale"]), kernel="norms"),
    ),
    cite="arXiv:2306.01708",
    form=_form,
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
    dialect                `mergekit`, `paper` or `peft`: see the module's description
    returns   [*block]     merged delta; the base is added to it
    """
    kept = trim(delta, cutoff)
    if norms is not None:
        kept = kept * column(norm_ratio(norms), kept)
    merged = disjoint_merge(kept, weight, _election(dialect, normalize, majority))
    return merged if scale == 1.0 else merged * scale
