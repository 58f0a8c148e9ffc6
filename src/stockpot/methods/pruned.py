"""Task vectors thinned out by the magnitude of their elements: Model Breadcrumbs (a band of them) and DELLA (at random)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.faster import FASTER
from stockpot.methods.arithmetic import scaled
from stockpot.methods.arrays import column, keep_where, magnitude, row_ranks, weighted_sum
from stockpot.methods.averaging import check_weights
from stockpot.methods.declaration import Example, Scope, Space, method
from stockpot.methods.forms import Election, Form
from stockpot.methods.parameters import ByDialect, Choice, Flag, Named, PerModel, Real
from stockpot.methods.ties import disjoint_merge, norm_ratio, stack_rows
from stockpot.statistics import Extent, L1Norms, Rank, Uniform

__all__ = ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "magprune_probabilities"]

Params = Mapping[str, Any]


# Model Breadcrumbs


def _by_rows(params: Params) -> bool:
    return bool(params["dialect"] == "paper")


def _scope(params: Params) -> Scope:
    return Scope.ROW if _by_rows(params) else Scope.ELEMENT


def _extent(params: Params) -> Extent:
    return "row" if _by_rows(params) else "tensor"


def _band(density: float, gamma: float, count: int, paper: bool) -> tuple[int, int]:
    """(how many magnitudes are at least the smallest that is kept, how many at least the largest that is)."""
    if paper:
        out = int(gamma * count)
        kept = min(int(density * count), count - out)
    else:
        if density >= 1:
            return count + 1, count + 1
        kept = int(density * count)
        out = min(int(gamma * count), count - kept)
    return (out + kept if kept else 0), min(out + 1, count)


def _low_counts(params: Params, count: int, known: Params) -> list[int]:
    return [_band(d, g, count, _by_rows(params))[0] for d, g in zip(params["density"], params["gamma"], strict=True)]


def _high_counts(params: Params, count: int, known: Params) -> list[int]:
    return [_band(d, g, count, _by_rows(params))[1] for d, g in zip(params["density"], params["gamma"], strict=True)]


def _ceiling(high: Any, density: Sequence[float], dialect: str) -> Any:
    """`high`, but infinity where all of a delta is kept, outliers too."""
    if dialect == "paper":
        return high
    return tuple(float("inf") if d >= 1 else h for h, d in zip(high, density, strict=True))


def _of_rows(values: Any, like: Any) -> Any:
    """Cutoffs `[m]`, or `[m, rows, 1]` as they are, to be compared with a block."""
    return column(values, like) if isinstance(values, tuple) else values


def band(delta: Any, low: Any, high: Any) -> Any:
    """`[m, ...]` with zeros where |delta| lies outside of low to high, both kept."""
    size = magnitude(delta)
    return keep_where(delta, (size >= _of_rows(low, size)) & (size <= _of_rows(high, size)))


def _band_norms(delta: Any, *, low: Any, high: Any, density: Any, dialect: str, **_: Any) -> Any:
    return stack_rows(abs(delta), abs(band(delta, low, _ceiling(high, density, dialect))))


def _rescales(params: Params) -> bool:
    return bool(params["rescale"])


def _crumbs_form(
    low: Any, high: Any, norms: Any, weight: tuple[float, ...], density: Any, gamma: Any, scale: float, normalize: bool,
    rescale: bool, dialect: str,
) -> Form:  # fmt: skip
    return Form(
        scaled(weight, scale, normalize),
        cutoff=low,
        ceiling=_ceiling(high, density, dialect),
        factor=None if norms is None else norm_ratio(norms),
    )


def _crumbs_ties_form(
    low: Any, high: Any, norms: Any, weight: tuple[float, ...], density: Any, gamma: Any, scale: float, normalize: bool,
    rescale: bool, dialect: str,
) -> Form:  # fmt: skip
    return Form(
        weight,
        cutoff=low,
        ceiling=_ceiling(high, density, dialect),
        factor=None if norms is None else norm_ratio(norms),
        election=_election(normalize),
        scale=scale,
    )


def _election(normalize: bool) -> Election:
    return Election(divide_by="weight" if normalize else "none")


def _crumbs(delta: Any, low: Any, high: Any, norms: Any, density: Sequence[float], dialect: str) -> Any:
    kept = band(delta, low, _ceiling(high, density, dialect))
    return kept if norms is None else kept * column(norm_ratio(norms), kept)


CRUMBS = (
    Rank("density", name="low", over=_extent, counts=_low_counts),
    Rank("density", name="high", over=_extent, counts=_high_counts),
    L1Norms("norms", of=_band_norms, when=_rescales),
)
CRUMBS_SAY = {
    "mergekit": "per tensor: density counts what is kept below the outliers; they give way where both are more than all, and "
    "density 1 keeps them",
    "paper": "as the authors' code: per row, the largest gamma of it goes, then the largest density of it is kept",
}
_ROW = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
_XY = [[1, -2, 3, -4], [4, 3, -2, -1]]
_HALF = {"density": 0.5, "gamma": 0.25}


@method(
    family="trimmed",
    space=Space.DELTA,
    sees=_scope,
    models=(1, None),
    stats=CRUMBS,
    cite="arXiv:2312.06795",
    check=check_weights,
    form=_crumbs_form,
    neutral={"density": 1.0, "gamma": 0.0, "lambda": 1.0},
    dialects=CRUMBS_SAY,
    examples=(
        Example(_XY, [0, 1, 1, 0], base=[0] * 4, parameters=_HALF),
        Example(_XY, [1, 1, 1, -1], base=[0] * 4, parameters={**_HALF, "density": 0.75}),
        Example(_ROW, [0, 0, 0, 0, 5, 6, 7, 8, 9, 0], base=[0] * 10, parameters={"density": 0.5, "gamma": 0.1}),
        Example(
            _ROW,
            [0, 0, 0, 0, 0, 6, 7, 8, 9, 10],
            base=[0] * 10,
            parameters={"density": 0.5, "gamma": 0.01},
            source="a hundredth of ten is none: nothing is an outlier",
        ),
        Example(_ROW, [0] * 7 + [3.2, 3.6, 0], base=[0] * 10, parameters={"dialect": "paper"}),
        Example(
            [[1, -2, 3, 4]],
            [0, -2.5, 2.5 * 1.5, 0],
            base=[0] * 4,
            parameters={**_HALF, "rescale": True, "weight": 0.625},
        ),
    ),
)
def breadcrumbs(
    delta: Any,
    *,
    low: Any,
    high: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = ByDialect({"mergekit": 1.0, "paper": 0.2}),
    gamma: Annotated[PerModel, Real(0, 1)] = ByDialect({"mergekit": 0.01, "paper": 0.1}),
    scale: Annotated[Any, Real(), Named("lambda")] = ByDialect({"mergekit": 1.0, "paper": 0.4}),
    normalize: Annotated[bool, Flag()] = False,
    rescale: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("mergekit", "paper"))] = "mergekit",
) -> Any:
    """Remove the largest and the smallest elements of each delta, and add up what is left.

    delta    [m, *block]  model minus base
    low      [m]          smallest |delta| kept; all ties at it are kept
    high     [m]          largest |delta| kept
    norms    [2m]         L1 norms before and after, for `rescale`
    weight   [m]          float64
    density  [m]          kept fraction
    gamma    [m]          fraction removed at the top
    lambda   float64      scale of the sum
    normalize             divide the weights by their sum
    rescale               restore each delta's L1 norm
    dialect               `mergekit` by tensors, `paper` by rows
    returns  [*block]     merged delta; the base is added to it
    """
    return weighted_sum(_crumbs(delta, low, high, norms, density, dialect), scaled(weight, scale, normalize))


@method(
    family="trimmed",
    space=Space.DELTA,
    sees=_scope,
    models=(1, None),
    stats=CRUMBS,
    cite="arXiv:2312.06795",
    form=_crumbs_ties_form,
    neutral={"density": 1.0, "gamma": 0.0, "lambda": 1.0},
    dialects=CRUMBS_SAY,
    examples=(
        Example(_XY, [0, 3, 3, 0], base=[0] * 4, parameters=_HALF),
        Example(_XY, [0, 6, 6, 0], base=[0] * 4, parameters={**_HALF, "lambda": 2}),
        Example(_XY, [1, 3, 3, -1], base=[0] * 4, parameters={**_HALF, "density": 0.75}),
        Example(_XY, [1, -3.5, 4, 0.5], base=[0] * 4, parameters={**_HALF, "density": 0.75, "weight": [1, -0.5]}),
    ),
)
def breadcrumbs_ties(
    delta: Any,
    *,
    low: Any,
    high: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = ByDialect({"mergekit": 1.0, "paper": 0.2}),
    gamma: Annotated[PerModel, Real(0, 1)] = ByDialect({"mergekit": 0.01, "paper": 0.1}),
    scale: Annotated[Any, Real(), Named("lambda")] = ByDialect({"mergekit": 1.0, "paper": 0.4}),
    normalize: Annotated[bool, Flag()] = False,
    rescale: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("mergekit", "paper"))] = "mergekit",
) -> Any:
    """Remove the largest and the smallest elements of each delta, elect signs, and combine what agrees.

    delta    [m, *block]  model minus base
    low      [m]          smallest |delta| kept; all ties at it are kept
    high     [m]          largest |delta| kept
    norms    [2m]         L1 norms before and after, for `rescale`
    weight   [m]          float64, applied before the election
    density  [m]          kept fraction
    gamma    [m]          fraction removed at the top
    lambda   float64      scale of the result
    normalize             divide by the agreeing weight (a mean) or not (a sum)
    rescale               restore each delta's L1 norm
    dialect               `mergekit` by tensors, `paper` by rows (the election is not the paper's)
    returns  [*block]     merged delta; the base is added to it
    """
    merged = disjoint_merge(_crumbs(delta, low, high, norms, density, dialect), weight, _election(normalize))
    return merged if scale == 1.0 else merged * scale


# DELLA


def _chances(n: int, density: float, epsilon: float) -> tuple[float, float]:
    """(how likely a row's smallest element is kept, by how much more likely each next one), for rows of n."""
    if not 0 < density < 1 or n < 2:  # the one element of a row is neither its largest nor its smallest
        return density, 0.0
    return density - epsilon, 2 * epsilon / (n - 1)


def magprune_probabilities(delta: Any, density: Sequence[float], epsilon: Sequence[float]) -> Any:
    """`[m, rows, n]` -> how likely each element is kept: density - epsilon for a row's smallest to density + epsilon."""
    import numpy as np

    keep = np.empty_like(delta)
    for i, (d, e) in enumerate(zip(density, epsilon, strict=True)):
        low, step = (delta.dtype.type(x) for x in _chances(delta.shape[-1], d, e))
        if step == 0:
            keep[i] = low
        else:
            np.multiply(row_ranks(magnitude(delta[i])), step, out=keep[i], casting="same_kind")
            keep[i] += low
    return keep


def _magpruned(delta: Any, uniform: Any, density: Sequence[float], epsilon: Sequence[float], inverse: bool) -> Any:
    import numpy as np

    faster = FASTER.get("prune")
    if faster and delta.shape[-1] < 2**31 and delta.flags.c_contiguous and uniform.flags.c_contiguous:
        kept = np.empty_like(delta)
        for i, (d, e) in enumerate(zip(density, epsilon, strict=True)):
            if not 0 < d < 1:
                np.copyto(kept[i], delta[i] if d else 0)
            else:
                faster(delta[i], uniform[i], *_chances(delta.shape[-1], d, e), inverse, kept[i])
        return kept
    keep = magprune_probabilities(delta, density, epsilon)
    kept = keep_where(delta, uniform < keep)
    for i, d in enumerate(density if inverse else ()):
        if 0 < d < 1:  # else nothing is kept, or everything as it is
            kept[i] /= keep[i]
    return kept


def _pruned_norms(delta: Any, *, uniform: Any, density: Any, epsilon: Any, **_: Any) -> Any:
    size = abs(delta)
    return stack_rows(size, abs(_magpruned(delta, uniform, density, epsilon, inverse=False)))


def _restores(params: Params) -> bool:
    return bool(params["rescale"]) and params["dialect"] == "mergekit"


def _della_check(params: Params) -> str | None:
    for d, e in zip(params["density"], params["epsilon"], strict=True):
        if 0 < d < 1 and not (d - e > 0 and d + e <= 1):
            most = min(d, 1 - d)
            return (
                f"density {d:g} with epsilon {e:g}: elements are kept with probabilities from density - epsilon to density + "
                f"epsilon, which must lie between 0 and 1; set epsilon to less than {most:g}"
            )
    return None


def _della_linear_check(params: Params) -> str | None:
    return _della_check(params) or check_weights(params)


PRUNED_NORMS = (L1Norms("norms", of=_pruned_norms, when=_restores),)
DELLA_SAY = {
    "paper": "what is kept is divided by its own probability, so that the expectation is the delta",
    "mergekit": "what is kept is scaled back to the L1 norm that the delta had, tensor by tensor: large elements grow",
}
_WHOLE = {"density": 1.0, "weight": [0.5, 2.0]}


def _della(delta: Any, uniform: Any, norms: Any, density: Any, epsilon: Any, rescale: bool, dialect: str) -> Any:
    kept = _magpruned(delta, uniform, density, epsilon, inverse=rescale and dialect == "paper")
    return kept if norms is None else kept * column(norm_ratio(norms), kept)


@method(
    family="random",
    space=Space.DELTA,
    scope=Scope.ROW,
    models=(1, None),
    stats=PRUNED_NORMS,
    draws=(Uniform(),),
    cite="arXiv:2406.11617",
    check=_della_linear_check,
    neutral={"density": 1.0},
    dialects=DELLA_SAY,
    examples=(Example([[2, 0], [1, 3]], [1.5, 6], base=[1, 0], parameters=_WHOLE),),
)
def della_linear(
    delta: Any,
    *,
    uniform: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    epsilon: Annotated[PerModel, Real(0, 1)] = 0.15,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = False,
    rescale: Annotated[bool, Flag()] = True,
    dialect: Annotated[str, Choice(("paper", "mergekit"))] = "paper",
) -> Any:
    """Drop elements of each delta at random, the smaller ones of a row more often, rescale the rest, and add them up.

    delta    [m, rows, n]  model minus base
    uniform  [m, rows, n]  numbers from 0 to 1: an element is kept where its own is below its probability
    norms    [2m]          L1 norms before and after dropping (`mergekit` rescale)
    weight   [m]           float64
    density  [m]           mean probability of being kept; 1 drops nothing
    epsilon  [m]           a row's smallest is kept with density - epsilon, its largest with density + epsilon
    rescale                divide by the probability (dialect `paper`), or restore the tensor's L1 norm (dialect `mergekit`)
    normalize              divide the weights by their sum
    lambda   float64       scale of the sum
    returns  [rows, n]     merged delta; the base is added to it
    """
    kept = _della(delta, uniform, norms, density, epsilon, rescale, dialect)
    return weighted_sum(kept, scaled(weight, scale, normalize))


@method(
    family="random",
    space=Space.DELTA,
    scope=Scope.ROW,
    models=(1, None),
    stats=PRUNED_NORMS,
    draws=(Uniform(),),
    cite="arXiv:2406.11617",
    check=_della_check,
    neutral={"density": 1.0},
    dialects=DELLA_SAY,
    examples=(Example([[2, -1], [2, 3]], [2, 3], base=[1, 0], parameters=_WHOLE),),
)
def della(
    delta: Any,
    *,
    uniform: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    epsilon: Annotated[PerModel, Real(0, 1)] = 0.15,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = True,
    rescale: Annotated[bool, Flag()] = True,
    dialect: Annotated[str, Choice(("paper", "mergekit"))] = "paper",
) -> Any:
    """Drop elements of each delta at random, the smaller ones of a row more often; elect signs and combine what agrees.

    delta    [m, rows, n]  model minus base
    uniform  [m, rows, n]  numbers from 0 to 1: an element is kept where its own is below its probability
    norms    [2m]          L1 norms before and after dropping (`mergekit` rescale)
    weight   [m]           float64, applied before the election
    density  [m]           mean probability of being kept; 1 drops nothing
    epsilon  [m]           a row's smallest is kept with density - epsilon, its largest with density + epsilon
    normalize              divide by the agreeing weight (a mean) or not (a sum)
    rescale                divide by the probability (dialect `paper`), or restore the tensor's L1 norm (dialect `mergekit`)
    lambda   float64       scale of the result
    returns  [rows, n]     merged delta; the base is added to it
    """
    kept = _della(delta, uniform, norms, density, epsilon, rescale, dialect)
    merged = disjoint_merge(kept, weight, _election(normalize))
    return merged if scale == 1.0 else merged * scale
