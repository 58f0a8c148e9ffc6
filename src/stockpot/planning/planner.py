"""Recipe + headers -> Plan. Everything that headers can show to be wrong is found here, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stockpot.adapters import config_for
from stockpot.checkpoints.beside import side_stamps
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.layers import map_layers
from stockpot.checkpoints.views import with_zeros
from stockpot.errors import ArgumentError, MismatchError, RecipeError, nearest, raise_problems
from stockpot.machine import available_threads
from stockpot.methods.averaging import linear
from stockpot.methods.declaration import Method, Space, get_method, methods
from stockpot.planning.account import account_of, note_left_files, note_other_settings
from stockpot.planning.budget import DEFAULT_LIMIT, choose_budget
from stockpot.planning.checks import check_kinds, check_patterns, check_statistics, note_head, note_unstamped
from stockpot.planning.companions import check_companions
from stockpot.planning.config import output_config
from stockpot.planning.factoring import Factoring, check_space, open_adapters
from stockpot.planning.filling import Filler, replacement
from stockpot.planning.inputs import Inputs
from stockpot.planning.layout import lay_out
from stockpot.planning.matching import Matcher, Member, Section, match_models
from stockpot.planning.parameters import ParameterResolver, all_settings
from stockpot.planning.plan import ModelInput, Plan, TensorPlan
from stockpot.planning.slicing import match_slices, output_layers
from stockpot.planning.snapshots import compute_adapters, expand_run
from stockpot.planning.statistics import plan_statistics
from stockpot.planning.template import Template
from stockpot.planning.unifying import check_other_names, unify_names
from stockpot.planning.vocabulary import check_cut_off, check_vocabularies, crop_vocabularies
from stockpot.recipes.schema import ModelEntry, Recipe, Source
from stockpot.runs import Run, Soup

__all__ = ["DEFAULT_SHARD_SIZE", "build_plan"]

DEFAULT_SHARD_SIZE = 5 * 10**9


def build_plan(
    recipe: Recipe,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    max_memory: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    sources: Mapping[str, Checkpoint] | None = None,
    run: Run | None = None,
) -> Plan:
    """Plan a merge. Reads headers and configs only; imports neither torch nor numpy.

    sources: opened checkpoints by the names that the recipe has for them; run: that of its `run:`, if it is open already.

    Raises the one problem, or ProblemsError with all of them.
    """
    given = dict(sources or {})
    for name, source in given.items():
        if not isinstance(source, Checkpoint):
            raise ArgumentError(
                f"sources: {name!r}: expected what open_checkpoint or stockpot.views gave, got {source!r}"
            )
    known = {ref for step in (*recipe.steps, recipe) for ref in step.references()}
    for name in sorted(set(given) - known):
        raise ArgumentError(f"sources: the recipe names no model {name!r}{nearest(name, known)}")
    return _Planner(recipe, computed=given, run=run).plan(
        shard_size, max_memory or DEFAULT_LIMIT, threads or available_threads(), seed
    )


@dataclass
class _Planner(Inputs):
    """soup: what the recipe's run comes to; main: the recipe's method; given, run: what the caller has opened; in_optimizer: by
    the names of companions, see Companion.optimizer.
    """

    soup: Soup | None = None
    main: Method | None = None
    given: dict[str, Checkpoint] = field(default_factory=dict)
    run: Run | None = None
    in_optimizer: dict[str, str | None] = field(default_factory=dict)

    def plan_step(self, step: Recipe) -> Plan:
        return _Planner(step, made=self.made, computed=self.given).plan(DEFAULT_SHARD_SIZE, *self.settings)

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
        if self.recipe.base_model is None and not any(piece.base_model for piece in self.recipe.slices):
            found = found.without_base()
        if found.experimental:
            self.notes.append(f"{name} is experimental: rebuilt from descriptions, or not settled yet")
        if found.reproducible == "machine":
            self.notes.append(
                f"{name} rests on a library's linear algebra or exponentials: another version of it, or another processor, may "
                "give other last bits"
            )
        return found

    # the plan

    def expand(self) -> None:
        """Replace `run:` and `adapter:` by the models that they stand for."""
        if self.recipe.run is not None:
            expansion = expand_run(self.recipe, self.locate, self.run)
            self.recipe, self.soup = expansion.recipe, expansion.soup
            self.notes += [*expansion.warnings, *expansion.soup.notes]
        self.given = dict(self.computed)
        self.recipe, computed = compute_adapters(self.recipe, self.locate, self.given)
        self.computed.update(computed)

    def base_alone(self) -> Recipe:
        """mergekit's recipes may name no model but the base (to apply an adapter to it): what changes nothing is a copy."""
        recipe = self.recipe
        refs = {e.ref for e in recipe.models} | {s.ref for piece in recipe.slices for s in piece.sources}
        if not recipe.mergekit_compat or recipe.rules or refs != {recipe.base_model}:
            return recipe
        method = get_method(recipe.merge_method) if recipe.merge_method in methods() else None
        if method is None or method.space is not Space.DELTA or any(piece.base_model for piece in recipe.slices):
            return recipe
        self.notes.append(f"{method.name} of no model but the base: its tensors are copied")
        return replace(
            recipe,
            merge_method="passthrough",
            base_model=None,
            parameters={},
            models=tuple(replace(e, parameters={}) for e in recipe.models),
            slices=tuple(
                replace(p, parameters={}, sources=tuple(replace(s, parameters={}) for s in p.sources))
                for p in recipe.slices
            ),
        )

    def plan(self, shard_size: int, max_memory: int, threads: int, seed: int) -> Plan:
        asked = self.recipe
        self.settings = (max_memory, threads, seed)
        self.expand()
        recipe = self.recipe = self.base_alone()
        main, rule_methods = self.methods_in_use()
        base = self.open(recipe.base_model, recipe.lines["base_model"]) if recipe.base_model else None
        used = [m for m in (main, *rule_methods.values()) if m is not None]
        self.in_optimizer = {c.name: c.optimizer for m in used for c in m.companions}
        parts = self.parts(base)
        resolver = ParameterResolver(recipe, self.problems, self.notes)
        if main is not None and None not in rule_methods.values():
            self.check_parameters(resolver, main, {i: m for i, m in rule_methods.items() if m}, parts)
        self.stop_if_bad()
        assert main is not None
        models = [m for m in self.inputs if m.role == "model"]
        methods = {i: m for i, m in rule_methods.items() if m is not None}
        check_space(main, [(recipe.rules[i].line, m) for i, m in methods.items()], recipe, self.problems)
        self.stop_if_bad()
        factors = main.space is Space.FACTORS
        check_kinds(models, self.problems, self.notes, said=self.says_how_adapters(recipe), factors=factors)
        for part in parts:
            self.check_count(main, part)
        check_companions(
            recipe, [main, *methods.values()], parts, self.inputs, lambda m, p: p.participants(m), self.problems
        )
        self.stop_if_bad()
        donor = base if base is not None else parts[0].entries[-1 if factors else 0].model
        unify_names(self.inputs, donor, parts, self.problems, self.notes)
        check_other_names(self.inputs, donor, recipe, self.problems, self.notes)
        self.stop_if_bad()

        vocabulary = (
            crop_vocabularies(self.inputs, donor, self.problems, self.notes) if recipe.vocab == "crop" else None
        )
        matcher = Matcher(recipe, self.inputs, self.problems, self.notes)
        filler = Filler(recipe, self.inputs, resolver, self.problems, main, methods, matcher.zeros)
        factoring = self.factoring(parts[0], filler, matcher) if factors else None
        self.note_batch_norm(donor)
        matches = match_slices(matcher, parts) if recipe.slices else match_models(matcher, parts[0], donor)
        self.stop_if_bad()
        names = [*sorted(matcher.apart), *(m.name for m in matches)]
        resolver.check_filters(all_settings(recipe), names)
        check_patterns(recipe, names, self.inputs, self.problems)
        for model, zeros in matcher.zeros.items():
            held = self.inputs[model]
            self.inputs[model] = replace(held, checkpoint=with_zeros(held.checkpoint, zeros))
        made = factoring.plan(len(self.inputs)) if factoring is not None else None
        tensors = [*(made[1] if made else ()), *filler.fill(matches)]
        if made is not None:
            self.inputs.append(ModelInput(len(self.inputs), made[0].ref, made[0], role="factors"))
        check_vocabularies(models, donor, recipe, tensors, vocabulary and vocabulary[1], self.problems, self.notes)
        if vocabulary is not None:
            check_cut_off(self.inputs, self.tokenizer_donor(donor), vocabulary[1], recipe, self.problems)
        self.stop_if_bad()
        taken = self.inputs[donor].checkpoint
        holders = [taken, *(m.checkpoint for m in models if m.index != donor)]
        placed, shards = lay_out(
            tensors,
            taken.kind,
            shard_size,
            part_of=lambda name: next(filter(None, (c.part_of(name) for c in holders)), None),
            metadata={"format": taken.dialect or "pt"},
            stem=taken.stem,
        )
        groups, stats = plan_statistics(placed, resolver.groups)
        check_statistics(recipe, stats, placed, self.problems)
        self.stop_if_bad()
        template = self.template(donor, placed, parts, matcher, vocabulary, made[0] if made else None)
        self.notes += [n for n in note_left_files(self.inputs) if n not in self.notes]
        self.notes += note_other_settings(self.inputs, donor)
        self.notes += [*dict.fromkeys(note_unstamped(self.inputs)), *note_head(self.inputs[donor], names)]
        return Plan(
            recipe=asked,
            inputs=tuple(self.inputs),
            template=template,
            groups=groups,
            stats=stats,
            tensors=placed,
            shards=shards,
            seed=seed,
            budget=choose_budget(placed, self.inputs, groups, stats, max_memory, threads),
            notes=tuple(self.notes),
            soup=self.soup,
            sides=side_stamps(self.inputs[donor].checkpoint, self.inputs[template.tokenizer].checkpoint),
            account=account_of(self.inputs, placed, matcher, donor, template.tokenizer),
        )

    def factoring(self, part: Section, filler: Filler, matcher: Matcher) -> Factoring:
        """How adapters are combined module by module; what they hold beside the factors is matched like any other tensor."""
        adapters = open_adapters(part, self.inputs, self.recipe, self.problems)
        self.stop_if_bad()
        found = Factoring(self.recipe, part, adapters, filler, matcher, self.problems)
        matcher.apart = found.names
        return found

    def parts(self, base: int | None) -> list[Section]:
        recipe = self.recipe
        if recipe.models:
            entries = [
                Member(model := self.open(e.ref, e.line, part=e.part), i, e.parameters, None, self.companions(e, model))
                for i, e in enumerate(recipe.models)
            ]
            if self.adds_base(entries, base):
                assert base is not None
                entries.append(Member(base, len(entries), {}))
            return [Section(tuple(entries), base, {}, recipe.models[0].line)]
        out = []
        for piece in recipe.slices:
            own = self.open(piece.base_model, piece.line) if piece.base_model else base
            sources = [
                Member(
                    model := self.open(s.ref, s.line, part=s.part),
                    i,
                    s.parameters,
                    s.layer_range,
                    self.companions(s, model),
                )
                for i, s in enumerate(piece.sources)
            ]
            out.append(Section(tuple(sources), own, piece.parameters, piece.line))
        return out

    def companions(self, entry: ModelEntry | Source, model: int) -> dict[str, int]:
        """What lies beside a model, opened."""
        return {
            name: self.open_companion(str(c.value), c.line, name, model, self.in_optimizer.get(name))
            for name, c in entry.companions.items()
        }

    def adds_base(self, entries: Sequence[Member], base: int | None) -> bool:
        """mergekit takes a base that is not listed for one more model, where it subtracts none: in averages a weight for all is
        then its own, other methods need none.
        """
        if (
            not self.recipe.mergekit_compat
            or self.main is None
            or base is None
            or any(e.model == base for e in entries)
        ):
            return False
        if self.main.average:
            return "weight" in self.recipe.parameters
        return self.main.space is Space.WEIGHT and self.main.base_role == "listed"

    # checks

    def check_parameters(
        self, resolver: ParameterResolver, main: Method, rules: Mapping[int, Method], parts: Sequence[Section]
    ) -> None:
        used = [main, *rules.values()]
        for rest in [replacement(m) for m in used if m.applies is not None]:
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
                        resolver.note(self.recipe.told(line, f"{why}"))
                    else:
                        resolver.report(line, f"{why}: remove them (or set 'compat: mergekit' to have them ignored)")
                else:
                    resolver.check_names(entry.parameters, used, "of a model", own=True)
        for i, method in rules.items():
            resolver.check_names(self.recipe.rules[i].parameters, [method], "rules.parameters", own=False)

    def check_count(self, method: Method, part: Section) -> None:
        n = len(part.participants(method))
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

    # config and files

    def template(
        self,
        donor: int,
        tensors: Sequence[TensorPlan],
        parts: Sequence[Section],
        matcher: Matcher,
        vocabulary: tuple[int, int] | None,
        factors: Checkpoint | None,
    ) -> Template:
        """The output without its bytes: the donor's, as the recipe changes it. factors: the adapter that is computed."""
        checkpoint = self.inputs[donor].checkpoint
        written = {t.spec.dtype for t in tensors if t.spec.dtype.is_float}
        dtype = written.pop() if len(written) == 1 else None
        config = dict(checkpoint.config if factors is None else factors.config)
        if checkpoint.kind == "model":
            try:
                config = output_config(
                    config,
                    dtype=dtype,
                    layers=output_layers(checkpoint, parts, self.inputs, self.notes) if self.recipe.slices else None,
                    untied=matcher.untied,
                    vocabulary=vocabulary,
                )
            except MismatchError as e:
                raise e.within(*self.inputs[donor].places, self.inputs[donor].ref) from None
        specs = {t.name: t.spec for t in tensors}
        if self.recipe.absent != "error":
            self.check_layers(checkpoint, specs)
            if checkpoint.kind == "adapter" and config.get("peft_type") == "LORA":
                others = [m.checkpoint.config for m in self.inputs if m.role == "model"]
                config = config_for(config, list(specs), others)
        return Template(checkpoint.kind, specs, config, donor, self.tokenizer_donor(donor), dtype)

    def check_layers(self, donor: Checkpoint, names: Iterable[str]) -> None:
        """A config speaks of the donor's layers: others may not have more of them. Raises MismatchError."""
        own, made = donor.layers().stacks, map_layers(names).stacks
        for stack, count in made.items():
            if stack in own and count > own[stack] and donor.kind == "model":
                raise MismatchError(
                    f"absent: {self.recipe.absent}: another model has {count} layers in {stack!r}, {donor.ref} has {own[stack]}, "
                    "and the config is taken from it: name the deepest model first, or as base_model"
                )

    def tokenizer_donor(self, donor: int) -> int:
        ref = self.recipe.tokenizer_from
        if ref in (None, "base", "union"):
            return donor
        assert ref is not None
        path = ref if ref in self.by_path else self.locate(ref)
        found = [i for key, i in self.by_path.items() if key.partition("\0part ")[0] == path]
        if found:
            return found[0]
        key = "tokenizer_source" if "tokenizer_source" in self.recipe.lines else "tokenizer"
        raise RecipeError(
            f"{key}: {ref!r} is neither 'base' nor a model of this recipe; "
            "other tokenizers are a coming feature of stockpot"
        ).within(self.recipe.at(self.recipe.lines.get(key, 1)))
