"""DARE: drop elements of each task vector at random and rescale the rest, then merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from stockpot.methods.arithmetic import scaled
from stockpot.methods.arrays import column, keep_where, weighted_sum
from stockpot.methods.averaging import check_weights
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Election, Form
from stockpot.methods.parameters import Choice, Flag, Named, PerModel, Real
from stockpot.methods.ties import disjoint_merge, norm_ratio, stack_rows
from stockpot.statistics import L1Norms, Mask

__all__ = ["dare_linear", "dare_ties"]

DIALECTS = ("paper", "mergekit")


def _masked_norms(delta: Any, *, mask: Any, **_: Any) -> Any:
    size = abs(delta)
    return stack_rows(size, keep_where(size, mask))


def _l1(params: Any) -> bool:
    return bool(params["rescale"]) and params["dialect"] == "mergekit"


NORMS = (L1Norms("norms", of=_masked_norms, when=_l1),)
SAY = {
    "paper": "what is kept is divided by the density",
    "mergekit": "what is kept is scaled back to the L1 norm that the delta had, tensor by tensor",
}
#: nothing is dropped, so that the result is known
WHOLE = {"density": 1.0, "weight": [0.5, 2.0]}


def drop_and_rescale(delta: Any, mask: Any, density: Sequence[float], rescale: bool, norms: Any) -> Any:
    """`[m, ...]` masked, then divided by the density (paper) or scaled back to its L1 norm (`norms`)."""
    kept = keep_where(delta, mask)
    factor = rescaling(density, rescale, norms)
    return kept if factor is None else kept * column(factor, kept)


def rescaling(density: Sequence[float], rescale: bool, norms: Any) -> tuple[float, ...] | None:
    """What each delta's rest is multiplied by; None where it is 1 for all."""
    if not rescale:
        return None
    factor = norm_ratio(norms) if norms is not None else tuple(1 / d if d > 1e-30 else 1.0 for d in density)
    return None if all(f == 1.0 for f in factor) else factor


def _linear_form(
    mask: Any, norms: Any, weight: tuple[float, ...], density: Any, scale: float, normalize: bool, rescale: bool,
    dialect: str,
) -> Form:  # fmt: skip
    return Form(scaled(weight, scale, normalize), masked=True, factor=rescaling(density, rescale, norms))


def _ties_form(
    mask: Any, norms: Any, weight: tuple[float, ...], density: Any, scale: float, normalize: bool, rescale: bool,
    dialect: str,
) -> Form:  # fmt: skip
    return Form(
        weight, masked=True, factor=rescaling(density, rescale, norms), election=_election(normalize), scale=scale
    )


def _election(normalize: bool) -> Election:
    return Election(divide_by="weight" if normalize else "none")


@method(
    family="random",
    space=Space.DELTA,
    models=(1, None),
    stats=NORMS,
    draws=(Mask("density"),),
    cite="arXiv:2311.03099",
    check=check_weights,
    form=_linear_form,
    dialects=SAY,
    neutral={"density": 1.0},
    examples=(Example([[2, 0], [1, 3]], [1.5, 6], base=[1, 0], parameters=WHOLE | {"normalize": False}),),
)
def dare_linear(
    delta: Any,
    *,
    mask: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = False,
    rescale: Annotated[bool, Flag()] = True,
    dialect: Annotated[str, Choice(DIALECTS)] = "paper",
) -> Any:
    """Drop a random part of each delta, rescale the rest, and add them up.

    delta    [m, *block]  model minus base
    mask     [m, *block]  booleans, True with probability `density`
    norms    [2m]         L1 norms before and after dropping (`mergekit` rescale)
    weight   [m]          float64
    density  [m]          kept fraction, 0 to 1
    rescale               divide by the density (dialect `paper`), or restore the tensor's L1 norm (dialect `mergekit`)
    normalize             divide the weights by their sum
    lambda   float64      scale of the sum
    returns  [*block]     merged delta; the base is added to it
    """
    kept = drop_and_rescale(delta, mask, density, rescale, norms)
    return weighted_sum(kept, scaled(weight, scale, normalize))


@method(
    family="random",
    space=Space.DELTA,
    models=(1, None),
    stats=NORMS,
    draws=(Mask("density"),),
    cite="arXiv:2311.03099",
    form=_ties_form,
    dialects=SAY,
    neutral={"density": 1.0},
    examples=(Example([[2, -1], [2, 3]], [3.5, 6], base=[1, 0], parameters=WHOLE),),
)
def dare_ties(
    delta: Any,
    *,
    mask: Any,
    norms: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = False,
    rescale: Annotated[bool, Flag()] = True,
    dialect: Annotated[str, Choice(DIALECTS)] = "paper",
) -> Any:
    """Drop a random part of each delta, rescale the rest, elect signs and combine what agrees.

    delta    [m, *block]  model minus base
    mask     [m, *block]  booleans, True with probability `density`
    norms    [2m]         L1 norms before and after dropping (`mergekit` rescale)
    weight   [m]          float64, applied before the election
    density  [m]          kept fraction, 0 to 1
    normalize             divide by the agreeing weight (a mean) or not (a sum)
    rescale               divide by the density (dialect `paper`), or restore the tensor's L1 norm (dialect `mergekit`)
    lambda   float64      scale of the result
    returns  [*block]     merged delta; the base is added to it
    """
    kept = drop_and_rescale(delta, mask, density, rescale, norms)
    merged = disjoint_merge(kept, weight, _election(normalize))
    return merged if scale == 1.0 else merged * scale
