"""`stockpot.diagnose`: what speaks for and against merging some models, before it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stockpot.api.merging import Options, RecipeLike, plan
from stockpot.errors import ArgumentError
from stockpot.machine import available_threads
from stockpot.recipes import Recipe, load_recipe

if TYPE_CHECKING:
    from stockpot.diagnosis import Diagnosis

__all__ = ["diagnose"]


def diagnose(
    recipe: RecipeLike, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Diagnosis:
    """Measure the models of a recipe against its base (against the first model, where there is none): norms and cosines of
    deltas, sign conflicts, what is unchanged, by tensor, layer and kind of module. Reads every tensor once; writes nothing.

    `stockpot.diagnosis.judge` says what the measures speak for. Raises StockpotError, as `plan` does.
    """
    from stockpot.diagnosis import measure

    asked = load_recipe(recipe)
    plain, reference = _with_base(asked)
    planned = plan(plain, Options(threads=threads))
    if planned.template.kind == "adapter":
        raise ArgumentError(
            "diagnose measures full models: A and B of an adapter say little apart; name each as base+adapter in the recipe"
        )
    return measure(planned, reference=reference, threads=threads or available_threads(), progress=progress)


def _with_base(recipe: Recipe) -> tuple[Recipe, bool]:
    """The same models under a method that subtracts a base, and whether that base is only the first of them."""
    if recipe.run is not None:
        raise ArgumentError("diagnose takes recipes of models; a run's snapshots are seen by `stockpot run show`")
    if recipe.steps:
        raise ArgumentError(
            "diagnose takes one recipe; of a file of several write the one that it is about into its own"
        )
    stripped: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "parameters": {},
        "rules": (),
        "dtype": None,
        "out_dtype": None,
    }
    models = tuple(replace(m, parameters={}, companions={}) for m in recipe.models)
    slices = tuple(
        replace(p, parameters={}, sources=tuple(replace(s, parameters={}, companions={}) for s in p.sources))
        for p in recipe.slices
    )
    reference = recipe.base_model is None and not any(p.base_model for p in slices)
    lines = dict(recipe.lines)
    base = recipe.base_model
    if reference:
        if slices:
            raise ArgumentError("diagnose needs something to compare with: set base_model in a recipe of slices")
        if len(models) < 2:
            raise ArgumentError(
                "diagnose compares models with their base, or with one another: name two, or a base_model"
            )
        base, models = models[0].ref, models[1:]
        lines["base_model"] = recipe.models[0].line
    elif models and all(m.ref == base for m in models):
        raise ArgumentError("diagnose: the recipe names no model but the base")
    return replace(recipe, **stripped, models=models, slices=slices, base_model=base, lines=lines), reference
