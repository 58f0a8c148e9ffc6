"""`run:` and `adapter:` of a recipe: snapshots in place of models, and checkpoints computed from adapters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stockpot.adapters import fuse, read_adapter
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import ArgumentError, RecipeError, StockpotError
from stockpot.methods.declaration import Space, get_method
from stockpot.recipes.schema import AdapterChoice, ModelEntry, Recipe, RunChoice
from stockpot.recipes.values import Setting
from stockpot.runs import Run, Soup, SoupSpec, open_run, parse_name, resolve_soup
from stockpot.specs import BY_LABEL

__all__ = ["Expansion", "compute_adapters", "expand_run"]


@dataclass(frozen=True)
class Expansion:
    """A recipe whose `run:` was replaced by models, and the soup that they are."""

    recipe: Recipe
    soup: Soup
    warnings: tuple[str, ...]


def expand_run(recipe: Recipe, locate: Callable[[str], str], opened: Run | None = None) -> Expansion:
    """Snapshots as `models`, with their weights where any weighting was asked for. opened: the run, if it is already.

    Raises StockpotError.
    """
    choice = recipe.run
    assert choice is not None
    with _said_of(recipe.at(choice.line), "run"):
        return _expanded(recipe, choice, locate, opened)


@contextlib.contextmanager
def _said_of(*places: str) -> Iterator[None]:
    """Errors begin with the place in the recipe; what would be an argument's mistake is the recipe's."""
    try:
        yield
    except ArgumentError as e:
        raise RecipeError(str(e)).within(*places) from e
    except StockpotError as e:
        e.within(*places)
        raise


def _expanded(recipe: Recipe, choice: RunChoice, locate: Callable[[str], str], opened: Run | None) -> Expansion:
    path, metrics = locate(choice.path), locate(choice.metrics) if choice.metrics else None
    run = opened
    if run is None or (os.path.realpath(run.path), run.pattern, run.metrics_file) != (
        path,
        choice.snapshots,
        choice.metrics,
    ):
        run = open_run(path, snapshots=choice.snapshots, metrics=metrics)
    spec = _spec(choice)
    soup = resolve_soup(run, spec)
    method = get_method(recipe.merge_method)
    if recipe.base_model is None:
        method = method.without_base()
    weighted = method.average or spec.kind != "uniform"
    base = recipe.base_model
    if choice.base is not None:
        if base is not None:
            raise ArgumentError("base and base_model are both given: choose one")
        if method.average:
            raise ArgumentError(f"base: {method.name} averages every snapshot alike; it takes no base")
        ends = {"first": soup.ingredients[0].snapshot, "last": soup.ingredients[-1].snapshot}
        base = (ends[choice.base] if isinstance(choice.base, str) else run.at(choice.base)).path
    models = []
    for i in soup.ingredients:
        is_base = method.space is Space.DELTA and i.snapshot.path == base
        settings = {"weight": Setting(i.weight, choice.line)} if weighted and not is_base else {}
        models.append(ModelEntry(i.snapshot.path, settings, choice.line, part=choice.part))
    lines = {**recipe.lines, "models": choice.line}
    if base is not None:
        lines.setdefault("base_model", choice.line)
    expanded = replace(recipe, models=tuple(models), base_model=base, lines=lines)
    shares = recipe.absent == "skip"  # then those that have a tensor share what the others leave
    if method.average and "normalize" in method.parameters and "normalize" not in recipe.parameters and not shares:
        # the weights are what they are: given ones need not sum to one to the last bit
        expanded = replace(expanded, parameters={**recipe.parameters, "normalize": Setting(False, choice.line)})
    return Expansion(expanded, soup, run.warnings)


def _spec(choice: RunChoice) -> SoupSpec:
    options: dict[str, Any] = dict(choice.options)
    if choice.name is None:
        return SoupSpec(**options)
    if options:
        raise ArgumentError(f"name says it all: {', '.join(options)} can't be given beside it")
    return parse_name(choice.name)


def compute_adapters(
    recipe: Recipe, locate: Callable[[str], str], given: Mapping[str, Checkpoint]
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """`adapter: product` and `fused`: (the recipe over computed checkpoints, these by reference). given: opened already."""
    choice = recipe.adapter
    if choice is None or choice.mode == "factors":
        return recipe, {}
    where = recipe.at(choice.line)
    if recipe.slices:
        raise RecipeError(f"{where}: adapter: {choice.mode} goes with models or run, not with slices")
    with _said_of(where):
        return _computed(recipe, choice, locate, given)


def _computed(
    recipe: Recipe, choice: AdapterChoice, locate: Callable[[str], str], given: Mapping[str, Checkpoint]
) -> tuple[Recipe, dict[str, Checkpoint]]:
    average = get_method(recipe.merge_method).average
    if choice.mode == "product":
        if not average:
            raise RecipeError("adapter: product is an average, so it goes with linear; fused goes with every method")
        parameters = dict(recipe.parameters)
        if choice.rank is not None:
            parameters["rank"] = Setting(choice.rank, choice.line)
        method = "product" if choice.rank is None else "product_svd"
        return replace(recipe, merge_method=method, parameters=parameters), {}
    adapters = [read_adapter(given.get(e.ref) or open_checkpoint(locate(e.ref))) for e in recipe.models]
    wanted = recipe.out_dtype or recipe.dtype
    dtype = BY_LABEL[wanted] if wanted else None
    one: dict[str, Any] = {"merge_method": "passthrough", "parameters": {}, "base_model": None}
    if average:
        if recipe.base_model is not None:
            raise RecipeError(f"adapter: {recipe.merge_method} over adapters takes no base_model (fused: adapter.base)")
        weights = _scalar_weights(recipe)
        base = _base(choice, adapters[-1].checkpoint, locate, given)
        fused = fuse(base, adapters, weights, dtype=dtype, ref=f"{base.ref} with {len(adapters)} adapters")
        return _single(recipe, fused, one), {fused.ref: fused}
    base = _base(choice, adapters[-1].checkpoint, locate, given)
    made: dict[str, Checkpoint] = {}
    models = []
    for entry, adapter in zip(recipe.models, adapters, strict=True):
        fused = fuse(base, [adapter], [1.0], exact=True, ref=f"{base.ref}+{entry.ref}")
        made[fused.ref] = fused
        models.append(replace(entry, ref=fused.ref))
    own = recipe.base_model
    if own is not None:
        place = os.path.realpath(locate(own))
        same = [m.ref for m, e in zip(models, recipe.models) if os.path.realpath(locate(e.ref)) == place]
        if same:
            own = same[0]
        elif os.path.exists(os.path.join(place, "adapter_config.json")):
            alone = fuse(base, [read_adapter(open_checkpoint(place))], [1.0], exact=True, ref=f"{base.ref}+{own}")
            made[alone.ref] = alone
            own = alone.ref
    return replace(
        recipe,
        models=tuple(models),
        base_model=own or base.path,
        lines={**recipe.lines, "base_model": recipe.lines.get("base_model", choice.line)},
    ), made


def _single(recipe: Recipe, made: Checkpoint, changes: dict[str, Any]) -> Recipe:
    entry = ModelEntry(made.ref, {}, recipe.models[0].line)
    return replace(recipe, models=(entry,), **changes)


def _scalar_weights(recipe: Recipe) -> list[float]:
    """The weights of `linear`, one number a model; normalised unless the recipe says otherwise."""
    declared = get_method("linear").parameters
    for own, settings in [(False, recipe.parameters), *((True, e.parameters) for e in recipe.models)]:
        for name, setting in settings.items():
            if name not in declared or (own and not declared[name].per_model):
                raise RecipeError(
                    f"{name!r} is not a parameter of linear{' for one model' if own else ''} under adapter"
                )
            if isinstance(setting.value, tuple):
                raise RecipeError(
                    f"{name}: gradients and filters don't go with adapter: {recipe.adapter and recipe.adapter.mode}"
                )
            expected = declared[name].kind.check(setting.value)
            if expected:
                raise RecipeError(f"{name}: expected {expected}, got {setting.value!r}")
    common = recipe.parameters.get("weight")
    found = [e.parameters.get("weight", common) for e in recipe.models]
    weights = [1.0 if s is None else float(s.value) for s in found]  # type: ignore[arg-type]
    normalize = recipe.parameters.get("normalize")
    if normalize is not None and normalize.value is False:
        return weights
    total = sum(weights)
    if total == 0:
        raise RecipeError("weight: they sum to 0, so they can't be normalised")
    return [w / total for w in weights]


def _base(
    choice: AdapterChoice, adapter: Checkpoint, locate: Callable[[str], str], given: Mapping[str, Checkpoint]
) -> Checkpoint:
    """The model that adapters are fused into: the recipe's, else the one that adapter_config.json names."""
    if choice.base is not None:
        return given.get(choice.base) or open_checkpoint(locate(choice.base))
    named = adapter.config.get("base_model_name_or_path")
    if isinstance(named, str) and os.path.isdir(locate(named)):
        return open_checkpoint(locate(named))
    raise RecipeError(
        f"adapter: fused needs the base model; adapter_config.json of {adapter.ref} names {named!r}, which is not a local "
        "directory: give adapter.base (--base)"
    )
