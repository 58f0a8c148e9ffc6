"""Recipe + headers -> Plan. Everything that headers can show to be wrong is found here, all at once."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.tied import is_head
from stockpot.errors import CheckpointError, MismatchError, RecipeError, StockpotError, raise_problems
from stockpot.methods.declaration import Method, Space, get_method
from stockpot.methods.statistics import Cutoff
from stockpot.planning.budget import DEFAULT_LIMIT, choose_budget
from stockpot.planning.config import output_config
from stockpot.planning.layout import lay_out
from stockpot.planning.matching import Entry, Match, Matcher, Part, match_models, match_slices, primary_stack
from stockpot.planning.parameters import Levels, ParameterResolver, all_settings
from stockpot.planning.plan import Action, MergeGroup, ModelInput, Operand, Plan, TensorPlan
from stockpot.planning.vocabulary import check_vocabularies
from stockpot.recipes.schema import Recipe, Rule
from stockpot.specs import BY_LABEL, DType, TensorSpec

__all__ = ["DEFAULT_SHARD_SIZE", "build_plan"]

DEFAULT_SHARD_SIZE = 5 * 10**9
_NO_RULE = Rule((), None, {}, 0)
#: settings of a LoRA that must agree before its factors can be combined
_ADAPTER_KEYS = (
    "peft_type", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
)  # fmt: skip


def build_plan(
    recipe: Recipe,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    max_memory: int | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Plan:
    """Plan a merge. Reads headers and configs only; imports neither torch nor numpy.

    Raises the one problem, or ProblemsError with all of them.
    """
    return _Planner(recipe).plan(shard_size, max_memory or DEFAULT_LIMIT, threads or available_threads(), seed)


def available_threads() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@dataclass
class _Planner:
    recipe: Recipe
    problems: list[StockpotError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: list[ModelInput] = field(default_factory=list)
    by_path: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def stop_if_bad(self) -> None:
        raise_problems(self.problems)

    def bad(self, key: str, why: str) -> None:
        self.problems.append(RecipeError(f"{self.recipe.at(self.recipe.lines.get(key, 1))}: {why}"))

    # opening

    def open(self, ref: str, line: int) -> int:
        """The index of a model, opened once however often it is named; -1 after a problem."""
        path = self.locate(ref)
        if path in self.failed:
            return -1
        if path in self.by_path:
            return self.by_path[path]
        try:
            checkpoint = open_checkpoint(path)
        except StockpotError as e:
            self.failed.add(path)
            message = str(e).replace(path, ref, 1) if path != ref else str(e)
            self.problems.append(type(e)(f"{self.recipe.at(line)}: {message}"))
            return -1
        if not len(checkpoint):
            self.failed.add(path)
            self.problems.append(CheckpointError(f"{self.recipe.at(line)}: {ref}: holds no tensors"))
            return -1
        index = len(self.inputs)
        self.inputs.append(ModelInput(index, ref, checkpoint))
        self.by_path[path] = index
        return index

    def locate(self, ref: str) -> str:
        """A relative path is looked for in the working directory, then beside the recipe."""
        path = os.path.expanduser(ref)
        if not os.path.isabs(path) and not os.path.exists(path) and os.path.isfile(self.recipe.origin):
            beside = os.path.join(os.path.dirname(os.path.abspath(self.recipe.origin)), path)
            if os.path.exists(beside):
                path = beside
        return os.path.realpath(path) if os.path.exists(path) else ref

    # methods

    def methods_in_use(self) -> tuple[Method | None, dict[int, Method | None]]:
        main = self.method(self.recipe.merge_method, self.recipe.lines.get("merge_method", 1))
        rules = {
            i: self.method(rule.merge_method, rule.line) if rule.merge_method else main
            for i, rule in enumerate(self.recipe.rules)
        }
        return main, rules

    def method(self, name: str, line: int) -> Method | None:
        try:
            return get_method(name)
        except RecipeError as e:
            self.problems.append(RecipeError(f"{self.recipe.at(line)}: {e}"))
            return None

    # the plan

    def plan(self, shard_size: int, max_memory: int, threads: int, seed: int) -> Plan:
        recipe = self.recipe
        main, rule_methods = self.methods_in_use()
        base = self.open(recipe.base_model, recipe.lines["base_model"]) if recipe.base_model else None
        parts = self.parts(base)
        resolver = ParameterResolver(recipe, self.problems, self.notes)
        if main is not None and None not in rule_methods.values():
            self.check_parameters(resolver, main, {i: m for i, m in rule_methods.items() if m}, parts)
        self.stop_if_bad()
        assert main is not None
        self.check_kinds()
        methods = {i: m for i, m in rule_methods.items() if m is not None}
        for part in parts:
            self.check_count(main, part)
        self.stop_if_bad()

        matcher = Matcher(recipe, self.inputs, self.problems, self.notes)
        donor = base if base is not None else parts[0].entries[0].model
        if recipe.slices:
            matches, _ = match_slices(matcher, parts)
        else:
            matches = match_models(matcher, parts[0], donor)
        self.stop_if_bad()
        resolver.check_filters(all_settings(recipe), [m.name for m in matches])
        self.check_patterns([m.name for m in matches])
        tensors = self.tensors(matches, main, methods, resolver)
        check_vocabularies(self.inputs, donor, recipe, self.problems, self.notes)
        self.stop_if_bad()
        kind = self.inputs[donor].checkpoint.kind
        placed, shards = lay_out(tensors, kind, shard_size)
        groups = tuple(resolver.groups)
        self.check_model_wide(groups, placed)
        self.stop_if_bad()
        written = {t.spec.dtype for t in placed if t.spec.dtype.is_float}
        dtype = written.pop() if len(written) == 1 else None
        return Plan(
            recipe=recipe,
            inputs=tuple(self.inputs),
            donor=donor,
            tokenizer_donor=self.tokenizer_donor(donor),
            groups=groups,
            tensors=placed,
            shards=shards,
            kind=kind,
            config=self.config(donor, dtype, parts, matcher.untied) if kind == "model" else self.adapter_config(donor),
            seed=seed,
            budget=choose_budget(placed, self.inputs, groups, max_memory, threads),
            notes=tuple(self.notes),
            written_dtype=dtype,
        )

    def parts(self, base: int | None) -> list[Part]:
        recipe = self.recipe
        if recipe.models:
            entries = [Entry(self.open(e.ref, e.line), i, e.parameters) for i, e in enumerate(recipe.models)]
            if self.adds_base(entries, base):
                assert base is not None
                entries.append(Entry(base, len(entries), {}))
            return [Part(tuple(entries), base, {}, recipe.models[0].line)]
        out = []
        for piece in recipe.slices:
            own = self.open(piece.base_model, piece.line) if piece.base_model else base
            sources = [
                Entry(self.open(s.ref, s.line), i, s.parameters, s.layer_range) for i, s in enumerate(piece.sources)
            ]
            out.append(Part(tuple(sources), own, piece.parameters, piece.line))
        return out

    def adds_base(self, entries: Sequence[Entry], base: int | None) -> bool:
        """mergekit's linear averages the base too when it is not listed and a weight holds for all models."""
        return (
            self.recipe.mergekit_compat
            and self.recipe.merge_method == "linear"
            and base is not None
            and "weight" in self.recipe.parameters
            and all(e.model != base for e in entries)
        )

    # checks

    def check_parameters(
        self, resolver: ParameterResolver, main: Method, rules: Mapping[int, Method], parts: Sequence[Part]
    ) -> None:
        used = [main, *rules.values()]
        resolver.check_names(self.recipe.parameters, used, "parameters", own=False)
        for part in parts:
            resolver.check_names(part.parameters, used, "slices.parameters", own=False)
            for entry in part.entries:
                if entry.parameters and entry.model == part.base and main.space is Space.DELTA:
                    line = min(s.line for s in entry.parameters.values())
                    why = f"parameters of the base model have no effect in {main.name}"
                    if self.recipe.mergekit_compat:
                        resolver.note(f"{self.recipe.at(line)}: {why}")
                    else:
                        resolver.report(line, f"{why}: remove them (or set 'compat: mergekit' to have them ignored)")
                else:
                    resolver.check_names(entry.parameters, used, "of a model", own=True)
        for i, method in rules.items():
            resolver.check_names(self.recipe.rules[i].parameters, [method], "rules.parameters", own=False)

    def check_kinds(self) -> None:
        """Adapters merge with adapters, and only where one LoRA setting holds for all."""
        kinds = {m.checkpoint.kind for m in self.inputs}
        if len(kinds) > 1:
            adapters = [m.ref for m in self.inputs if m.checkpoint.kind == "adapter"]
            others = [m.ref for m in self.inputs if m.checkpoint.kind != "adapter"]
            self.problems.append(
                MismatchError(
                    f"adapters and full models can't be mixed: {', '.join(adapters)} with {', '.join(others)}"
                )
            )
            return
        if kinds == {"adapter"}:
            first = self.inputs[0]
            for other in self.inputs[1:]:
                for key in _ADAPTER_KEYS:
                    # a key that an older PEFT did not write means the same as one that is off
                    a, b = (m.checkpoint.config.get(key) or None for m in (first, other))
                    if a != b:
                        self.problems.append(
                            MismatchError(f"{other.ref}: adapter_config.json has {key} = {b!r}, {first.ref} has {a!r}")
                        )
            self.notes.append(
                "adapters: A and B factors are combined apart, which is not the combination of the products B A "
                "(their cross terms differ)"
            )

    def check_count(self, method: Method, part: Part) -> None:
        n = len(self.participants(method, part, rule=False))
        low, high = method.models
        where = self.recipe.at(part.line)
        if method.space is Space.DELTA and part.base is None:
            self.problems.append(
                RecipeError(f"{where}: {method.name} works on differences from a base: set base_model")
            )
        elif n < low or (high is not None and n > high):
            count = f"exactly {low}" if low == high else f"at least {low}"
            besides = " besides the base" if method.space is Space.DELTA else ""
            hint = "; several are stacked with 'slices'" if method.models == (1, 1) else ""
            self.problems.append(
                RecipeError(
                    f"{where}: {method.name} takes {count} model{'s' if low > 1 else ''}{besides}, got {n}{hint}"
                )
            )

    def check_patterns(self, names: Sequence[str]) -> None:
        for key, patterns in (("include", self.recipe.include), ("exclude", self.recipe.exclude)):
            for pattern in patterns:
                if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
                    self.bad(key, f"{key}: the pattern {pattern!r} matches no tensor, such as {names[0]!r}")
        for rule in self.recipe.rules:
            for pattern in rule.patterns:
                if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
                    self.problems.append(
                        RecipeError(f"{self.recipe.at(rule.line)}: rules: the pattern {pattern!r} matches no tensor")
                    )

    def check_model_wide(self, groups: Sequence[MergeGroup], tensors: Sequence[TensorPlan]) -> None:
        """A cutoff over the whole model needs one set of parameters for the whole model."""
        wide: dict[str, set[int]] = {}
        for t in tensors:
            if t.action is Action.MERGE:
                group = groups[t.group]
                if any(s.scope_for(group.params) == "model" for s in group.method.active_stats(group.params)):
                    wide.setdefault(group.method.name, set()).add(t.group)
        for name, found in wide.items():
            densities = {
                groups[g].params[s.param] for g in found for s in groups[g].method.stats if isinstance(s, Cutoff)
            }
            operands = {tuple(o.position for o in t.operands) for t in tensors if t.group in found}
            if len(densities) > 1:
                self.bad(
                    "merge_method", f"{name}: one cutoff over the whole model needs one density for all tensors, "
                    f"got {len(densities)} different ones",
                )  # fmt: skip
            if len(operands) > 1:
                self.bad("merge_method", f"{name}: a cutoff over the whole model can't span slices of different models")

    # tensors

    def participants(self, method: Method, part: Part, *, rule: bool) -> list[int]:
        """Which entries a method takes. -1 stands for a base that is not among them."""
        entries = range(len(part.entries))
        if method.space is Space.DELTA:
            return [i for i in entries if part.entries[i].model != part.base]
        at_base = next((i for i in entries if part.entries[i].model == part.base), None)
        if rule and method.models == (1, 1):
            return [at_base if at_base is not None else (-1 if part.base is not None else 0)]
        if method.models == (2, 2) and part.base is not None:
            return [-1 if at_base is None else at_base, *(i for i in entries if i != at_base)]
        return list(entries)

    def tensors(
        self, matches: Sequence[Match], main: Method, rules: Mapping[int, Method], resolver: ParameterResolver
    ) -> list[TensorPlan]:
        out = []
        outside: list[str] = []
        static: dict[tuple[int, int, int], MergeGroup | None] = {}
        for match in matches:
            rule = self.rule_for(match.name)
            method = main if rule < 0 else rules[rule]
            planned = self.tensor(match, rule, method, resolver, outside, static)
            if planned is not None:
                out.append(planned)
        resolver.note_unmatched()
        if outside:
            resolver.note(
                f"a gradient's last value is used for {', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}, which "
                "come after the layers; mergekit uses its first value ('compat: mergekit' does too)"
            )
        return out

    def rule_for(self, name: str) -> int:
        for i, rule in enumerate(self.recipe.rules):
            if any(fnmatch.fnmatchcase(name, p) for p in rule.patterns):
                return i
        return -1

    def tensor(
        self, match: Match, rule: int, method: Method, resolver: ParameterResolver, outside: list[str],
        static: dict[tuple[int, int, int], MergeGroup | None],
    ) -> TensorPlan | None:  # fmt: skip
        donor_spec = self.spec(match.donor)
        target = self.target(donor_spec, match)
        if not match.merged:
            return self.copied(match, donor_spec, target, resolver)
        base = match.base
        part = match.part
        chosen = self.participants(method, part, rule=rule >= 0)
        low, high = method.models
        if rule >= 0 and (len(chosen) < low or (high is not None and len(chosen) > high)):
            line = self.recipe.rules[rule].line
            resolver.report(
                line,
                f"rules: {method.name} takes {low if low == high else f'at least {low}'} models, got {len(chosen)}",
            )
            return None
        if base is None and (method.space is Space.DELTA or -1 in chosen):
            resolver.report(self.recipe.rules[rule].line if rule >= 0 else part.line, f"{method.name} needs base_model")
            return None
        operands = tuple(match.operands[i] if i >= 0 else base for i in chosen)
        picked: tuple[Operand, ...] = tuple(o for o in operands if o is not None)
        own_base = base if method.space is Space.DELTA else None
        if not self.fits(match.name, [match.donor, *picked, *([own_base] if own_base else [])]):
            return None
        if not donor_spec.dtype.is_float:
            everything = tuple(dict.fromkeys([match.donor, *picked, *([own_base] if own_base else [])]))
            return TensorPlan(0, match.name, donor_spec, Action.KEEP, -1, everything, None)
        levels = Levels(
            (part.parameters, self.recipe.parameters),
            tuple(part.entries[i].parameters if i >= 0 else {} for i in chosen),
            (self.recipe.rules[rule] if rule >= 0 else _NO_RULE).parameters,
        )
        depth = match.depth
        if not match.in_layers:
            if self.recipe.mergekit_compat:
                depth = 0.0
            elif depth == 1.0 and resolver.gradient_note(levels, match.name):
                outside.append(match.name)
        key = (id(part), rule, len(chosen))
        if key in static:
            group = static[key]
        else:
            group = resolver.group(method, levels, [o.name for o in picked], match.name, depth)
            if not levels.dynamic:
                static[key] = group
        if group is None:
            return None
        spec = TensorSpec(target, donor_spec.shape)
        plain = method.name == "passthrough" and group.params["scale"] == (1.0,)
        if plain and self.spec(picked[0]).dtype is target:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, picked, None)
        return TensorPlan(0, match.name, spec, Action.MERGE, group.index, picked, own_base)

    def copied(self, match: Match, spec: TensorSpec, target: DType, resolver: ParameterResolver) -> TensorPlan | None:
        """An excluded tensor: the donor's, in the output's dtype."""
        if spec.dtype is target:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, (match.donor,), None)
        group = resolver.group(get_method("passthrough"), Levels((), ({},)), [match.name], match.name, 0.0)
        if group is None:
            return None
        return TensorPlan(
            0, match.name, TensorSpec(target, spec.shape), Action.MERGE, group.index, (match.donor,), None
        )

    def spec(self, operand: Operand) -> TensorSpec:
        return self.inputs[operand.model].checkpoint.spec(operand.name)

    def target(self, spec: TensorSpec, match: Match) -> DType:
        """The output's dtype: the recipe's, else the donor's (mergekit: the widest of the inputs')."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if not spec.dtype.is_float:
            return spec.dtype
        if wanted:
            return BY_LABEL[wanted]
        found = [self.spec(o).dtype for o in match.operands if self.spec(o).dtype.is_float]
        if self.recipe.mergekit_compat and len(set(found)) > 1:
            wide = max(found, key=lambda d: d.itemsize)
            return DType.F32 if wide.itemsize == 2 else wide  # bfloat16 with float16
        return spec.dtype

    def fits(self, name: str, operands: Sequence[Operand]) -> bool:
        first = self.spec(operands[0])
        for other in operands[1:]:
            spec = self.spec(other)
            a, b = self.inputs[operands[0].model].ref, self.inputs[other.model].ref
            if spec.shape != first.shape:
                rows_only = len(spec.shape) == 2 and spec.shape[1:] == first.shape[1:]
                vocabulary = ""
                if rows_only and ("emb" in name or is_head(name)):
                    vocabulary = " (different vocabularies? they are never cropped silently)"
                self.problems.append(
                    MismatchError(f"{name!r} is {list(first.shape)} in {a} but {list(spec.shape)} in {b}{vocabulary}")
                )
                return False
            if spec.dtype.is_float != first.dtype.is_float:
                self.problems.append(MismatchError(f"{name!r} is {first.dtype} in {a} but {spec.dtype} in {b}"))
                return False
        return True

    # config and files

    def config(self, donor: int, dtype: DType | None, parts: Sequence[Part], untied: set[str]) -> dict[str, Any]:
        checkpoint = self.inputs[donor].checkpoint
        layers, old = None, 0
        if self.recipe.slices:
            _, old, _ = primary_stack(checkpoint)
            layers = []
            for part in parts:
                lead = next((e for e in part.entries if e.model == part.base), part.entries[0])
                start, stop = lead.layers or (0, primary_stack(self.inputs[lead.model].checkpoint)[1])
                layers += [min(i, old - 1) for i in range(start, stop)]
        return output_config(checkpoint.config, dtype=dtype, layers=layers, old_layers=old, untied=bool(untied))

    def adapter_config(self, donor: int) -> dict[str, Any]:
        return dict(self.inputs[donor].checkpoint.config)

    def tokenizer_donor(self, donor: int) -> int:
        ref = self.recipe.tokenizer_from
        if ref is None or ref == "base":
            return donor
        path = self.locate(ref)
        if path in self.by_path:
            return self.by_path[path]
        key = "tokenizer_source" if "tokenizer_source" in self.recipe.lines else "tokenizer"
        raise RecipeError(
            f"{self.recipe.at(self.recipe.lines.get(key, 1))}: {key}: {ref!r} is neither 'base' nor a model of this recipe; "
            "other tokenizers are a coming feature of stockpot"
        )
