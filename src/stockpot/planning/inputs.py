"""The models of a recipe, opened once each: checkpoints, computed ones, and earlier steps."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from stockpot.adapters import changes_the_base, fuse, read_adapter
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import looks_like_hub_id, open_checkpoint
from stockpot.checkpoints.optimizer import is_optimizer, moments_of
from stockpot.checkpoints.picking import picked
from stockpot.errors import CheckpointError, ProblemsError, RecipeError, StockpotError
from stockpot.files import is_url, without_file_scheme
from stockpot.planning.budget import DEFAULT_LIMIT
from stockpot.planning.plan import ModelInput, Plan
from stockpot.planning.steps import MergedCheckpoint, merged_checkpoint, why_written
from stockpot.recipes.parsing import located_mapping
from stockpot.recipes.schema import Recipe
from stockpot.specs import format_size

__all__ = ["Inputs", "located", "open_reference"]


def located(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a mapping whose paths no longer depend on the working directory and on where its file lies."""
    inputs = Inputs(recipe)

    def place(ref: str) -> str:
        return "+".join(map(inputs.locate, inputs.base_and_adapter(ref) or (ref,)))

    return located_mapping(recipe, place)


def open_reference(ref: str) -> Checkpoint:
    """What a recipe may name as a model, `base+adapter` included, opened. Raises StockpotError."""
    inputs = Inputs(Recipe("", "", ""))
    adapted = inputs.base_and_adapter(ref)
    return inputs.with_adapter(ref, *adapted) if adapted else open_checkpoint(ref)


@dataclass
class Inputs:
    """Opens what a recipe names and gathers what is wrong with it.

    by_path   path, or name of a step, -> index in `inputs`
    computed  checkpoints that stand for `adapter:`, and those that the caller has opened, by reference
    opened    what `base+adapter` is made of, by path
    made      planned steps by name, shared by all planners of a file
    settings  memory limit, threads and seed for the plans of steps
    """

    recipe: Recipe
    problems: list[StockpotError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: list[ModelInput] = field(default_factory=list)
    by_path: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    computed: dict[str, Checkpoint] = field(default_factory=dict)
    made: dict[str, MergedCheckpoint] = field(default_factory=dict)
    opened: dict[str, Checkpoint] = field(default_factory=dict)
    settings: tuple[int, int, int] = (DEFAULT_LIMIT, 1, 0)

    def plan_step(self, step: Recipe) -> Plan:
        """The plan of an earlier step. Raises StockpotError."""
        raise NotImplementedError

    def open(self, ref: str, line: int, part: str | None = None) -> int:
        """The index of a model, opened once however often it is named; -1 after a problem. part: of a checkpoint that has
        several, else the recipe's.
        """
        part = part or self.recipe.part
        step = next((s for s in self.recipe.steps if s.name == ref), None)
        if step is not None and part is None:
            return self.open_step(step, line)
        if step is not None:
            whole = self.open_step(step, line)
            return self.open_part(ref, self.inputs[whole].checkpoint, str(part), line) if whole >= 0 else -1
        if ref in self.computed and ref not in self.by_path and part is None:
            return self.add(ref, ref, self.computed[ref], line)
        if ref in self.computed and part is not None:
            return self.open_part(ref, self.computed[ref], part, line)
        path = ref if ref in self.computed else self.locate(ref)
        key = path if part is None else f"{path}\0part {part}"
        if key in self.failed:
            return -1
        if key in self.by_path:
            return self.by_path[key]
        adapted = self.base_and_adapter(ref)
        try:
            checkpoint = self.with_adapter(ref, *adapted) if adapted else open_checkpoint(path)
            checkpoint = checkpoint if part is None else picked(checkpoint, part)
        except StockpotError as e:
            self.failed.add(key)
            self.problems.append((e if adapted else e.about(path, ref)).within(self.recipe.at(line)))
            return -1
        if not len(checkpoint):
            self.failed.add(key)
            self.problems.append(CheckpointError(f"{ref}: holds no tensors").within(self.recipe.at(line)))
            return -1
        return self.add(key, ref if part is None else f"{ref} ({part})", checkpoint, line)

    def open_part(self, ref: str, whole: Checkpoint, part: str, line: int) -> int:
        """A part of what is open already."""
        key = f"{ref}\0part {part}"
        if key not in self.by_path and key not in self.failed:
            try:
                return self.add(key, f"{ref} ({part})", picked(whole, part), line)
            except StockpotError as e:
                self.failed.add(key)
                self.problems.append(e.within(self.recipe.at(line)))
        return self.by_path.get(key, -1)

    def open_companion(self, ref: str, line: int, role: str, model: int, optimizer: str | None) -> int:
        """A checkpoint that lies beside a model. It need not have a config, and is no model that anything is taken from.

        model: whose it is; optimizer: see Companion.
        """
        if any(s.name == ref for s in self.recipe.steps):
            why = f"{ref!r} is a step of the recipe; companions are checkpoints: write it with a recipe of its own, and name that"
            self.problems.append(RecipeError(why).within(self.recipe.at(line), role))
            return -1
        path = self.locate(ref)
        key = f"{role}\0{path}"
        # which of the model's tensors an optimizer's numbers are of hangs on the model
        own = f"{key}\0{model}"
        if own not in self.by_path and key not in self.by_path and key not in self.failed:
            try:
                found = self.computed.get(ref) or open_checkpoint(path)
                if optimizer is not None and model >= 0 and is_optimizer(found):
                    beside = f"{self.place(ref)}.names.json"
                    found, note = moments_of(found, self.inputs[model].checkpoint, optimizer, beside)
                    self.notes.append(note)
                    key = own
                return self.add(key, ref, found, line, role)
            except StockpotError as e:
                self.failed.add(key)
                self.problems.append(e.about(path, ref).within(self.recipe.at(line), role))
        return self.by_path.get(own, self.by_path.get(key, -1))

    def add(self, key: str, ref: str, checkpoint: Checkpoint, line: int, role: str = "model") -> int:
        """Take in a model under the path or name `key`; its index."""
        index = self.by_path[key] = len(self.inputs)
        self.inputs.append(ModelInput(index, ref, checkpoint, self.recipe.at(line), role))
        for part in checkpoint.parts or (checkpoint,):
            # what a step needs stands among the step's own notes
            if part.download_bytes and not isinstance(checkpoint, MergedCheckpoint):
                files = f"{len(part.files)} file{'s' if len(part.files) != 1 else ''}"
                size = format_size(part.download_bytes)
                note = f"{part.ref}: {files} of {size} in all will be downloaded into the Hub's cache"
                self.notes += [note] if note not in self.notes else []
        return index

    def open_step(self, step: Recipe, line: int) -> int:
        """An earlier step as an input."""
        assert step.name is not None
        if step.name in self.failed:
            return -1
        if step.name not in self.by_path:
            if step.name not in self.made:
                try:
                    planned = self.plan_step(step)
                except ProblemsError as e:
                    self.problems += e.problems
                    self.failed.add(step.name)
                    return -1
                except StockpotError as e:
                    self.problems.append(e)
                    self.failed.add(step.name)
                    return -1
                self.made[step.name] = merged_checkpoint(step.name, planned)
                why = why_written(planned)
                how = f"is written to a scratch directory first: {why}" if why else "is streamed, not written"
                self.notes += [*(f"step {step.name!r}: {n}" for n in planned.notes), f"step {step.name!r} {how}"]
            return self.add(step.name, step.name, self.made[step.name], line)
        return self.by_path[step.name]

    def base_and_adapter(self, ref: str) -> tuple[str, str] | None:
        """The two of mergekit's `base+adapter`; None where `ref` is one model. A + may also be part of a path or a URL: of
        a path where what stands before it exists, of a URL unless what follows it is plainly another place.
        """
        if "+" not in ref or os.path.exists(self.locate(ref)):
            return None
        places = [i for i, c in enumerate(ref) if c == "+" and 0 < i < len(ref) - 1]
        if is_url(ref):
            found = [i for i in places if is_url(ref[i + 1 :]) or ref[i + 1 :].startswith(("/", "./", "../", "~"))]
        else:
            found = [i for i in places if os.path.exists(self.locate(ref[:i]))]
            steps = {s.name for s in self.recipe.steps} | self.computed.keys()
            found = found or [i for i in places if ref[:i] in steps or looks_like_hub_id(ref[:i])]
        return (ref[: found[0]], ref[found[0] + 1 :]) if found else None

    def with_adapter(self, ref: str, base: str, adapter: str) -> Checkpoint:
        """A base with a LoRA adapter applied while it is read. Raises StockpotError."""
        for name in (base, adapter):
            if any(s.name == name for s in self.recipe.steps):
                raise RecipeError(
                    f"{ref}: {name!r} is a step, and steps can't be part of base+adapter; merge it into a directory first"
                )
        if "+" in adapter and os.path.exists(self.locate(adapter.partition("+")[0])):
            raise RecipeError(f"{ref}: one adapter a model; average the adapters first, or merge several base+adapter")
        try:
            applied = read_adapter(self.part(adapter))
            if changes_the_base(applied.checkpoint.config):
                start = applied.checkpoint.config["init_lora_weights"]
                raise CheckpointError(
                    f"{adapter}: init_lora_weights is {start!r}: PEFT changes the base as it loads this adapter; apply it "
                    "with PEFT (merge_and_unload) and name the result"
                )
            return fuse(self.part(base), [applied], [1.0], exact=True, ref=ref)
        except StockpotError as e:
            e.within(ref)
            raise

    def part(self, ref: str) -> Checkpoint:
        """What a model is made of, opened once for all of them."""
        if ref in self.computed:
            return self.computed[ref]
        path = self.locate(ref)
        if path not in self.opened:
            self.opened[path] = open_checkpoint(path)
        return self.opened[path]

    def locate(self, ref: str) -> str:
        """`place`, without links; a reference that is no path as it is."""
        path = self.place(ref)
        if is_url(path):
            return path
        return os.path.realpath(path) if os.path.exists(path) else ref

    def place(self, ref: str) -> str:
        """A relative path is looked for in the working directory, then beside the recipe."""
        if is_url(ref):
            return ref.rstrip("/")
        path = os.path.expanduser(without_file_scheme(ref))
        if not os.path.isabs(path) and not os.path.exists(path) and os.path.isfile(self.recipe.origin):
            beside = os.path.join(os.path.dirname(os.path.abspath(self.recipe.origin)), path)
            if os.path.exists(beside):
                return beside
        return path
