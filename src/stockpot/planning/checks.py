"""What can be wrong between models, and between a recipe and its models, beyond a single key."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence

from stockpot.checkpoints.meaning.architectures import architecture_of, base_class_of
from stockpot.checkpoints.meaning.roles import is_vocabulary
from stockpot.checkpoints.meaning.ties import is_head
from stockpot.errors import MismatchError, RecipeError, StockpotError, few_of
from stockpot.planning.plan import ModelInput, Operand, StatPlan, TensorPlan
from stockpot.planning.template import Slot
from stockpot.recipes.schema import Recipe, matching

__all__ = ["check_fit", "check_kinds", "check_patterns", "check_statistics", "note_head", "note_unstamped"]

_FACTOR = re.compile(r"(\.|_)lora_?(up|down|A|B|a|b|mid)(\.|$)|\.hada_w\d_|\.lokr_w\d")
#: settings of a LoRA that must agree before its factors can be combined
_ADAPTER_KEYS = (
    "peft_type", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
)  # fmt: skip


def check_kinds(
    inputs: Sequence[ModelInput],
    problems: list[StockpotError],
    notes: list[str],
    *,
    said: bool = False,
    factors: bool = False,
) -> None:
    """Adapters merge with adapters, and where A and B are combined apart only where one LoRA setting holds for all.

    said: the user chose the factors; factors: they are combined module by module, whatever their settings.
    """
    kinds = {m.checkpoint.kind for m in inputs}
    for model in inputs if len(inputs) > 1 else ():
        factor = next((n for n in model.checkpoint.names() if _FACTOR.search(n)), None)
        if model.checkpoint.kind == "model" and factor is not None:
            why = (
                f"{model.ref}: {factor!r} is a factor of a LoRA, in a file of no adapter_config.json (kohya's, diffusers'): "
                "averaging factors and their scales apart is not averaging what they do; convert it to PEFT's format, or apply "
                "it to its base, and merge that"
            )
            problems.append(MismatchError(why).within(*model.places))
            return
    if len(kinds) > 1:
        adapters = [m.ref for m in inputs if m.checkpoint.kind == "adapter"]
        others = [m.ref for m in inputs if m.checkpoint.kind != "adapter"]
        problems.append(
            MismatchError(
                f"adapters and full models can't be mixed: {', '.join(adapters)} with "
                f"{', '.join(others)}; base+adapter names an adapter applied to its base"
            ).within(*inputs[1].places)
        )
        return
    if factors and kinds != {"adapter"}:
        for model in inputs:
            why = f"{model.ref}: a full model; expected a LoRA adapter, whose factors the method combines"
            problems.append(MismatchError(why).within(*model.places))
    elif kinds == {"adapter"} and not factors:
        first = inputs[0]
        for other in inputs[1:]:
            for key in _ADAPTER_KEYS:
                # a key that an older PEFT did not write means the same as one that is off
                a, b = (m.checkpoint.config.get(key) or None for m in (first, other))
                if a != b:
                    problems.append(
                        MismatchError(
                            f"{other.ref}: adapter_config.json has {key} = {b!r}, {first.ref} has {a!r}; named as "
                            "base+adapter they are merged as full weights, whatever their settings"
                        ).within(*other.places)
                    )
        if said or len(inputs) == 1:
            return
        notes.append(
            "adapters: A and B factors are combined apart, which is not the combination of the products B A "
            "(their cross terms differ); 'adapter: product' averages the products"
        )


def check_patterns(
    recipe: Recipe, names: Sequence[str], inputs: Sequence[ModelInput], problems: list[StockpotError]
) -> None:
    """Patterns that match nothing are mistakes. names: the output's; what is left out of one model need not be among them."""
    anywhere = {n for m in inputs for n in m.checkpoint.names()}.union(names)
    for key, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if pattern not in anywhere and not any(map(matching((pattern,)), anywhere)):
                why = f"{key}: the pattern {pattern!r} matches no tensor, such as {names[0]!r}"
                problems.append(_at(recipe, key, why))
    left = set(names)
    for rule in recipe.rules:
        own: set[str] = set()
        for pattern in rule.patterns:
            matched = set(filter(matching((pattern,)), names))
            own |= matched
            if not matched:
                problems.append(
                    RecipeError(f"rules: the pattern {pattern!r} matches no tensor").within(recipe.at(rule.line))
                )
        if own and not own & left:
            first = min(own)
            earlier = next(r for r in recipe.rules if matching(r.patterns)(first))
            why = f"every tensor it matches goes to an earlier one ({first!r} to that of line {earlier.line})"
            problems.append(
                RecipeError(f"rules: this rule is never used: {why}; put it first").within(recipe.at(rule.line))
            )
        left -= own


def check_fit(
    slot: Slot, operands: Sequence[Operand], inputs: Sequence[ModelInput], problems: list[StockpotError]
) -> bool:
    """Whether what an output tensor is made of has its shape and kind."""
    owner = inputs[slot.origin.model].ref
    for other in operands:
        spec = inputs[other.model].checkpoint.spec(other.name)
        why = None
        if spec.shape != slot.spec.shape:
            why = f"{slot.name!r} is {list(slot.spec.shape)} in {owner} but {list(spec.shape)} in {inputs[other.model].ref}"
            if (
                is_vocabulary(slot.name)
                and len(spec.shape) == len(slot.spec.shape)
                and spec.shape[1:] == slot.spec.shape[1:]
            ):
                why += " (different vocabularies? 'vocab: crop' keeps the rows that all have)"
        elif spec.dtype.is_float != slot.spec.dtype.is_float:
            why = f"{slot.name!r} is {slot.spec.dtype} in {owner} but {spec.dtype} in {inputs[other.model].ref}"
        if why is not None:
            problems.append(MismatchError(why).within(*inputs[other.model].places))
            return False
    return True


def check_statistics(
    recipe: Recipe, stats: Sequence[StatPlan], tensors: Sequence[TensorPlan], problems: list[StockpotError]
) -> None:
    """A statistic over the whole model needs one set of the parameters that matter to it, and the same models throughout."""
    wide: dict[tuple[str, str], list[StatPlan]] = {}
    for s in stats:
        if s.extent == "model":
            wide.setdefault((s.method.name, s.stat.name), []).append(s)
    for (method, _), found in wide.items():
        operands = {tuple(o.model for o in tensors[i].operands) for s in found for span in s.spans for i in span}
        why = None
        if len(operands) > 1:
            what = (
                "tensors that only some models have (absent: skip): exclude them"
                if recipe.absent == "skip"
                else "slices of different models"
            )
            why = f"one {found[0].stat.name} over the whole model can't span {what}"
        elif len(found) > 1:
            names = " and ".join(found[0].stat.refers_to()) or "setting"
            why = (
                f"one {found[0].stat.name} over the whole model needs one {names} for all tensors, got {len(found)} "
                "different ones"
            )
        problem = _at(recipe, "merge_method", f"{method}: {why}")
        if why and str(problem) not in map(str, problems):
            problems.append(problem)


def _at(recipe: Recipe, key: str, why: str) -> RecipeError:
    return RecipeError(f"{why}").within(recipe.at(recipe.lines.get(key, 1)))


def note_unstamped(inputs: Sequence[ModelInput]) -> Iterator[str]:
    """Where nothing but its size and header would show that a file is replaced during the merge."""
    for model in inputs:
        for leaf in model.checkpoint.parts or (model.checkpoint,):
            found = [h.path for h in leaf.files if h.inode is None]
            if found:
                yield (
                    f"{leaf.ref}: the server tells neither an ETag nor a time of change of {few_of(found, 1)}: only a new size "
                    "or a new header would show that it is replaced during the merge"
                )


def note_head(donor: ModelInput, names: Container[str]) -> Iterator[str]:
    """Where the class of the output's config has an output head that is not tied, and no input has one: who loads it gets a new
    one, at random, as of the inputs. names: of the output's tensors.
    """
    checkpoint = donor.checkpoint
    for tie in checkpoint.ties.pairs:
        if tie.tied is not False or tie.second in names or tie.known == "its class does not tie them":
            continue
        what = f"{donor.ref}: by {tie.known} {tie.second!r} is not tied to {tie.first!r}, and there is none: who loads the output"
        architecture = architecture_of(checkpoint.config, checkpoint.names())
        if architecture is None or not is_head(tie.second):
            yield f"{what} gets a new one"
            continue
        where = f"{tie.key}." if tie.key not in ("", "?") else ""
        base = base_class_of(architecture.model_type)
        bare = f", or the class without a head: 'architectures': [\"{base}\"]" if base else ""
        yield (
            f"{what} as a {architecture.name} gets a new one, at random; say in its config.json what it is: "
            f"'{where}tie_word_embeddings': true where the embedding is the head{bare}"
        )
