"""Recipe + headers -> Plan. Everything that headers can show to be wrong is found here, all at once."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stockpot.checkpoints.roles import is_vocabulary, role_of
from stockpot.errors import MismatchError, RecipeError, nearest, raise_problems
from stockpot.machine import available_threads
from stockpot.methods.averaging import linear, passthrough
from stockpot.methods.declaration import Method, Space, cannot_replace, get_method, wrong_count
from stockpot.planning.budget import DEFAULT_LIMIT, choose_budget
from stockpot.planning.checks import check_fit, check_kinds, check_patterns, check_statistics
from stockpot.planning.config import output_config
from stockpot.planning.inputs import Inputs
from stockpot.planning.layout import lay_out
from stockpot.planning.matching import Entry, Match, Matcher, Part, match_models, match_slices, primary_stack
from stockpot.planning.parameters import Levels, ParameterResolver, Place, all_settings
from stockpot.planning.plan import Action, MergeGroup, Operand, Plan, TensorPlan
from stockpot.planning.snapshots import compute_adapters, expand_run
from stockpot.planning.statistics import plan_statistics
from stockpot.planning.vocabulary import check_vocabularies
from stockpot.recipes.schema import ModelEntry, Recipe, Rule, Source
from stockpot.runs import Soup
from stockpot.specs import BY_LABEL, DType, TensorSpec

__all__ = ["DEFAULT_SHARD_SIZE", "build_plan"]

DEFAULT_SHARD_SIZE = 5 * 10**9
_NO_RULE = Rule((), None, {}, 0)


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


@dataclass
class _Planner(Inputs):
    """soup: what the recipe's run comes to; vocabulary: rows that embeddings are cut to; main: the recipe's method."""

    soup: Soup | None = None
    vocabulary: int | None = None
    main: Method | None = None
    layer_counts: dict[str, int] = field(default_factory=dict)

    def plan_step(self, step: Recipe) -> Plan:
        return _Planner(step, made=self.made).plan(DEFAULT_SHARD_SIZE, *self.settings)

    def stop_if_bad(self) -> None:
        raise_problems(self.problems)

    # methods

    def methods_in_use(self) -> tuple[Method | None, dict[int, Method | None]]:
        main = self.main = self.method(self.recipe.merge_method, self.recipe.lines.get("merge_method", 1))
        rules = {
            i: self.method(rule.merge_method, rule.line) if rule.merge_method else main
            for i, rule in enumerate(self.recipe.rules)
        }
        return main, rules

    def method(self, name: str, line: int) -> Method | None:
        try:
            found = get_method(name)
        except RecipeError as e:
            self.problems.append(e.within(self.recipe.at(line)))
            return None
        if found.experimental:
            self.notes.append(f"{name} is experimental: rebuilt from descriptions, or not settled yet")
        if found.reproducible == "machine":
            self.notes.append(
                f"{name} rests on a linear algebra library: another version of it, or another processor, may give other last bits"
            )
        return found

    @staticmethod
    def otherwise(method: Method) -> Method | None:
        """What merges the tensors that a method is not for; None where it is for all, or they are the base's."""
        if method.otherwise in (None, "base"):
            return None
        return linear if method.otherwise == "mean" else get_method(str(method.otherwise))

    # the plan

    def expand(self) -> None:
        """Replace `run:` and `adapter:` by the models that they stand for."""
        if self.recipe.run is not None:
            expansion = expand_run(self.recipe, self.locate)
            self.recipe, self.soup = expansion.recipe, expansion.soup
            self.notes += [*expansion.warnings, *expansion.soup.notes]
        self.recipe, self.computed = compute_adapters(self.recipe, self.locate)

    def plan(self, shard_size: int, max_memory: int, threads: int, seed: int) -> Plan:
        asked = self.recipe
        self.settings = (max_memory, threads, seed)
        self.expand()
        recipe = self.recipe
        main, rule_methods = self.methods_in_use()
        base = self.open(recipe.base_model, recipe.lines["base_model"]) if recipe.base_model else None
        parts = self.parts(base)
        resolver = ParameterResolver(recipe, self.problems, self.notes)
        if main is not None and None not in rule_methods.values():
            self.check_parameters(resolver, main, {i: m for i, m in rule_methods.items() if m}, parts)
        self.stop_if_bad()
        assert main is not None
        models = [m for m in self.inputs if m.role == "model"]
        check_kinds(models, self.problems, self.notes, said=self.says_how_adapters(recipe))
        methods = {i: m for i, m in rule_methods.items() if m is not None}
        for part in parts:
            self.check_count(main, part)
        self.check_companions([main, *methods.values()], parts)
        self.stop_if_bad()

        matcher = Matcher(recipe, self.inputs, self.problems, self.notes)
        donor = base if base is not None else parts[0].entries[0].model
        self.note_batch_norm(donor)
        if recipe.slices:
            matches, _ = match_slices(matcher, parts)
        else:
            matches = match_models(matcher, parts[0], donor)
        self.stop_if_bad()
        resolver.check_filters(all_settings(recipe), [m.name for m in matches])
        check_patterns(recipe, [m.name for m in matches], self.problems)
        self.vocabulary = self.common_vocabulary(matches)
        tensors = self.tensors(matches, main, methods, resolver)
        check_vocabularies(models, donor, recipe, self.problems, self.notes)
        self.stop_if_bad()
        kind = self.inputs[donor].checkpoint.kind
        placed, shards = lay_out(tensors, kind, shard_size)
        groups, stats = plan_statistics(placed, resolver.groups)
        check_statistics(recipe, stats, placed, self.problems)
        self.stop_if_bad()
        written = {t.spec.dtype for t in placed if t.spec.dtype.is_float}
        dtype = written.pop() if len(written) == 1 else None
        return Plan(
            recipe=asked,
            inputs=tuple(self.inputs),
            donor=donor,
            tokenizer_donor=self.tokenizer_donor(donor),
            groups=groups,
            stats=stats,
            tensors=placed,
            shards=shards,
            kind=kind,
            config=self.config(donor, dtype, parts, matcher.untied) if kind == "model" else self.adapter_config(donor),
            seed=seed,
            budget=choose_budget(placed, self.inputs, groups, stats, max_memory, threads),
            notes=tuple(self.notes),
            written_dtype=dtype,
            soup=self.soup,
        )

    def parts(self, base: int | None) -> list[Part]:
        recipe = self.recipe
        if recipe.models:
            entries = [
                Entry(self.open(e.ref, e.line), i, e.parameters, None, self.companions(e))
                for i, e in enumerate(recipe.models)
            ]
            if self.adds_base(entries, base):
                assert base is not None
                entries.append(Entry(base, len(entries), {}))
            return [Part(tuple(entries), base, {}, recipe.models[0].line)]
        out = []
        for piece in recipe.slices:
            own = self.open(piece.base_model, piece.line) if piece.base_model else base
            sources = [
                Entry(self.open(s.ref, s.line), i, s.parameters, s.layer_range, self.companions(s))
                for i, s in enumerate(piece.sources)
            ]
            out.append(Part(tuple(sources), own, piece.parameters, piece.line))
        return out

    def companions(self, entry: ModelEntry | Source) -> dict[str, int]:
        """What lies beside a model, opened."""
        return {name: self.open(str(c.value), c.line, role=name) for name, c in entry.companions.items()}

    def adds_base(self, entries: Sequence[Entry], base: int | None) -> bool:
        """mergekit averages the base too when it is not listed and a weight holds for all models."""
        return (
            self.recipe.mergekit_compat
            and self.main is not None
            and self.main.average
            and base is not None
            and "weight" in self.recipe.parameters
            and all(e.model != base for e in entries)
        )

    # checks

    def check_parameters(
        self, resolver: ParameterResolver, main: Method, rules: Mapping[int, Method], parts: Sequence[Part]
    ) -> None:
        used = [main, *rules.values()]
        for rest in [self.otherwise(m) for m in used if m.applies is not None]:
            if rest is linear:  # a mean: it takes weights, and always their shares
                rest = replace(linear, parameters={"weight": linear.parameters["weight"]})
            used += [rest] if rest is not None else []
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

    def check_count(self, method: Method, part: Part) -> None:
        n = len(self.participants(method, part, rule=False))
        low, high = method.models
        where = self.recipe.at(part.line)
        if method.space is Space.DELTA and part.base is None:
            self.problems.append(
                RecipeError(f"{method.name} works on differences from a base: set base_model").within(where)
            )
        elif n < low or (high is not None and n > high):
            count = f"exactly {low}" if low == high else f"at least {low}"
            besides = " besides the base" if method.space is Space.DELTA else ""
            hint = "; several are stacked with 'slices'" if method.base_role == "copied" else ""
            self.problems.append(
                RecipeError(
                    f"{method.name} takes {count} model{'s' if low > 1 else ''}{besides}, got {n}{hint}"
                ).within(where)
            )

    def check_companions(self, used: Sequence[Method], parts: Sequence[Part]) -> None:
        """Every model needs those of its methods, and none that no method asks for."""
        wanted = {c.name: c for m in used for c in m.companions}
        entries: list[ModelEntry | Source] = [*self.recipe.models]
        entries += [s for piece in self.recipe.slices for s in piece.sources]
        for entry in entries:
            for name, given in entry.companions.items():
                if name not in wanted:
                    label = " and ".join(sorted({m.name for m in used}))
                    known = f"it takes {', '.join(wanted)}" if wanted else "it takes none"
                    self.problems.append(
                        RecipeError(
                            f"companions: {label} has no use for {name!r}; {known}{nearest(name, wanted)}"
                        ).within(self.recipe.at(given.line))
                    )
        for method in used:
            for companion in method.companions:
                for part in parts:
                    lacking = [
                        part.entries[i].model
                        for i in self.participants(method, part, rule=False)
                        if i >= 0 and companion.name not in part.entries[i].companions
                    ]
                    for model in lacking:
                        self.problems.append(
                            RecipeError(
                                f"{self.inputs[model].ref}: {method.name} needs {companion.name} of every model "
                                f"({companion.about}): give 'companions: {{{companion.name}: CHECKPOINT}}' beside it"
                            ).within(*self.inputs[model].places)
                        )

    def says_how_adapters(self, recipe: Recipe) -> bool:
        """Whether the user chose how adapters are averaged, or will be told what averaging factors costs."""
        averages = self.main is not None and self.main.average
        return recipe.adapter is not None or (recipe.run is not None and averages)

    def note_batch_norm(self, donor: int) -> None:
        """Averages of running statistics are not the statistics of the average."""
        names = self.inputs[donor].checkpoint.names()
        if self.soup is not None and any(n.endswith((".running_mean", ".running_var")) for n in names):
            self.notes.append(
                "batch normalisation: the running statistics are averaged like weights; compute them again with one pass over "
                "training data (torch.optim.swa_utils.update_bn)"
            )

    # tensors

    def participants(self, method: Method, part: Part, *, rule: bool) -> list[int]:
        """Which entries a method takes. -1 stands for a base that is not among them."""
        entries = range(len(part.entries))
        if method.space is Space.DELTA:
            return [i for i in entries if part.entries[i].model != part.base]
        at_base = next((i for i in entries if part.entries[i].model == part.base), None)
        if rule and method.base_role == "copied":
            return [at_base if at_base is not None else (-1 if part.base is not None else 0)]
        if method.base_role == "first" and part.base is not None:
            return [-1 if at_base is None else at_base, *(i for i in entries if i != at_base)]
        return list(entries)

    def tensors(
        self, matches: Sequence[Match], main: Method, rules: Mapping[int, Method], resolver: ParameterResolver
    ) -> list[TensorPlan]:
        out = []
        outside: list[str] = []
        self.layer_counts = _layer_counts(matches)
        static: dict[tuple[int, int, int, str], MergeGroup | None] = {}
        for match in matches:
            rule = self.rule_for(match.name)
            asked = main if rule < 0 else rules[rule]
            planned = self.tensor(match, rule, asked, resolver, outside, static)
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
        static: dict[tuple[int, int, int, str], MergeGroup | None],
    ) -> TensorPlan | None:  # fmt: skip
        donor_spec = self.common_rows(match, self.spec(match.donor))
        target = self.target(donor_spec, match)
        base = match.base
        part = match.part
        leaves = method.applies is not None and role_of(match.name, donor_spec.shape) not in method.applies
        if leaves and donor_spec.dtype.is_float:
            if method.otherwise == "base":
                own, match = match.donor, replace(match, donor=base or match.donor, merged=False)
                if not check_fit(
                    match.name, [own, match.donor], self.inputs, self.problems, crops=self.recipe.crops_vocabulary
                ):
                    return None
                donor_spec = self.common_rows(match, self.spec(match.donor))
            else:
                found = self.otherwise(method)
                assert found is not None
                why = cannot_replace(method, found) or wrong_count(
                    found, len(self.participants(found, part, rule=rule >= 0))
                )
                if why:
                    resolver.report(part.line, f"{match.name}: {why}")
                    return None
                method = found
        if not match.merged:
            return self.copied(match, donor_spec, target, resolver)
        chosen = self.participants(method, part, rule=rule >= 0)
        if rule >= 0 and (why := wrong_count(method, len(chosen))):
            resolver.report(self.recipe.rules[rule].line, f"rules: {why}")
            return None
        if base is None and (method.space is Space.DELTA or -1 in chosen):
            resolver.report(self.recipe.rules[rule].line if rule >= 0 else part.line, f"{method.name} needs base_model")
            return None
        operands = tuple(match.operands[i] if i >= 0 else base for i in chosen)
        picked: tuple[Operand, ...] = tuple(o for o in operands if o is not None)
        own_base = base if method.space is Space.DELTA else None
        everything = [match.donor, *picked, *([own_base] if own_base else [])]
        if not check_fit(match.name, everything, self.inputs, self.problems, crops=self.recipe.crops_vocabulary):
            return None
        if not donor_spec.dtype.is_float:
            kept = tuple(dict.fromkeys(everything))
            return TensorPlan(0, match.name, donor_spec, Action.KEEP, -1, kept, None)
        levels = Levels(
            (part.parameters, self.recipe.parameters),
            tuple(part.entries[i].parameters if i >= 0 else {} for i in chosen),
            (self.recipe.rules[rule] if rule >= 0 else _NO_RULE).parameters,
        )
        if leaves and method is linear:
            levels = levels.without("normalize")
        depth = match.depth
        if match.layer is None:
            if self.recipe.mergekit_compat:
                depth = 0.0
            elif depth == 1.0 and resolver.gradient_note(method, levels, match.name):
                outside.append(match.name)
        key = (id(part), rule, len(chosen), method.name)
        if key in static:
            group = static[key]
        else:
            number = None if match.layer is None else match.layer[1]
            place = Place(depth, number, None if match.layer is None else self.layer_counts[match.layer[0]])
            group = resolver.group(method, levels, [o.name for o in picked], match.name, place)
            if not levels.dynamic:
                static[key] = group
        if group is None:
            return None
        spec = TensorSpec(target, donor_spec.shape)
        plain = method.copies is not None and method.copies(group.params)
        if plain and self.spec(picked[0]).dtype is target:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, picked, None)
        beside = self.beside(method, part, chosen, picked)
        if beside is None:
            return None
        return TensorPlan(
            0, match.name, spec, Action.MERGE, group.index, picked, own_base, companions=beside, layer=match.layer
        )

    def beside(
        self, method: Method, part: Part, chosen: Sequence[int], operands: Sequence[Operand]
    ) -> tuple[Operand, ...] | None:
        """The companions of an output tensor's operands, as TensorPlan orders them; None after a problem."""
        out = []
        for companion in method.companions:
            for i, operand in zip(chosen, operands, strict=True):
                model = self.inputs[part.entries[i].companions[companion.name]]
                found = model.checkpoint.resolve(operand.name)
                if found is None:
                    why = f"has no tensor {operand.name!r}, which {self.inputs[operand.model].ref} has"
                    self.problems.append(
                        MismatchError(f"{model.ref}: {why}{nearest(operand.name, model.checkpoint.names())}").within(
                            *model.places
                        )
                    )
                    return None
                spec, wanted = model.checkpoint.spec(found), self.spec(operand)
                if spec.shape != wanted.shape or not spec.dtype.is_float:
                    why = f"{found!r} is {spec.dtype} {list(spec.shape)}, expected floats {list(wanted.shape)} as in the model"
                    self.problems.append(MismatchError(f"{model.ref}: {why}").within(*model.places))
                    return None
                out.append(Operand(model.index, found, operand.position))
        return tuple(out)

    def copied(self, match: Match, spec: TensorSpec, target: DType, resolver: ParameterResolver) -> TensorPlan | None:
        """An excluded tensor: the donor's, in the output's dtype."""
        if spec.dtype is target:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, (match.donor,), None)
        group = resolver.group(passthrough, Levels((), ({},)), [match.name], match.name, Place())
        if group is None:
            return None
        return TensorPlan(
            0, match.name, TensorSpec(target, spec.shape), Action.MERGE, group.index, (match.donor,), None
        )

    def common_vocabulary(self, matches: Sequence[Match]) -> int | None:
        """Under `vocab: crop` the number of tokens that every model has rows for, in all tensors that have such rows."""
        if not self.recipe.crops_vocabulary:
            return None
        rows = {
            self.spec(o).shape[0]
            for match in matches
            if is_vocabulary(match.name)
            for o in (match.donor, *match.operands, *([match.base] if match.base else []))
            if self.spec(o).shape
        }
        if not rows or min(rows) == 0:
            self.problems.append(MismatchError("vocab: crop: there are no rows that all models have"))
        elif len(rows) > 1:
            self.notes.append(
                f"vocab: crop: embeddings of up to {max(rows)} tokens are cut to the {min(rows)} that all models have; "
                "the tokenizer must give no others"
            )
        return min(rows, default=None)

    def common_rows(self, match: Match, spec: TensorSpec) -> TensorSpec:
        """A prefix of the rows, so that the same elements are read of each model."""
        if self.vocabulary is None or not spec.shape or not is_vocabulary(match.name):
            return spec
        return TensorSpec(spec.dtype, (self.vocabulary, *spec.shape[1:]))

    def spec(self, operand: Operand) -> TensorSpec:
        return self.inputs[operand.model].checkpoint.spec(operand.name)

    def written(self, operand: Operand) -> DType:
        return self.inputs[operand.model].checkpoint.written(operand.name)

    def target(self, spec: TensorSpec, match: Match) -> DType:
        """The output's dtype: the recipe's, else the donor's (mergekit: the widest of the inputs')."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if not spec.dtype.is_float:
            return spec.dtype
        if wanted:
            return BY_LABEL[wanted]
        found = [self.written(o) for o in match.operands if self.spec(o).dtype.is_float]
        if self.recipe.mergekit_compat and len(set(found)) > 1:
            wide = max(found, key=lambda d: d.itemsize)
            return DType.F32 if wide.itemsize == 2 else wide  # bfloat16 with float16
        return self.written(match.donor)

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
        return output_config(
            checkpoint.config,
            dtype=dtype,
            layers=layers,
            old_layers=old,
            untied=bool(untied),
            vocabulary=self.vocabulary,
        )

    def adapter_config(self, donor: int) -> dict[str, Any]:
        return dict(self.inputs[donor].checkpoint.config)

    def tokenizer_donor(self, donor: int) -> int:
        ref = self.recipe.tokenizer_from
        if ref is None or ref == "base":
            return donor
        path = ref if ref in self.by_path else self.locate(ref)
        if path in self.by_path:
            return self.by_path[path]
        key = "tokenizer_source" if "tokenizer_source" in self.recipe.lines else "tokenizer"
        raise RecipeError(
            f"{key}: {ref!r} is neither 'base' nor a model of this recipe; "
            "other tokenizers are a coming feature of stockpot"
        ).within(self.recipe.at(self.recipe.lines.get(key, 1)))


def _layer_counts(matches: Sequence[Match]) -> dict[str, int]:
    """How many layers each stack of the output has."""
    counts: dict[str, int] = {}
    for match in matches:
        if match.layer is not None:
            stack, number = match.layer
            counts[stack] = max(counts.get(stack, 0), number + 1)
    return counts
