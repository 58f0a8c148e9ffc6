"""A callback for transformers' Trainer (and TRL's, which are Trainers)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from stockpot.errors import ArgumentError
from stockpot.runs import SoupSpec
from stockpot.runs.metrics import log_from_rows
from stockpot.training.average import Held, SnapshotAverage, checked_every, kept_random_state, swapped

__all__ = ["MergingCallback"]

#: in a checkpoint's folder: the average, loadable like the checkpoint itself, and the snapshots for a resumed run. They lie
#: two levels down: of an adapter in a folder right inside the checkpoint, the Trainer would make a second adapter on resume
MERGED = os.path.join("merging", "average")
SNAPSHOTS = os.path.join("merging", "snapshots")


class MergingCallback(TrainerCallback, ExportableState):
    """Keeps the metrics-weighted average (arXiv 2504.18580) of the last k snapshots beside the model that trains.

    spec      how many and how weighted (a SoupSpec, or its fields as a mapping); by default the last 10 by training loss
              with penalty 0.7
    every     steps between snapshots; by default `save_steps`, or `logging_steps` where saving is not by steps
    evaluate  False; True: the mean loss over the Trainer's evaluation set at each evaluation (or all that
              `Trainer.evaluate` measures, once `callback.trainer = trainer` was set); or a function from model to metrics
    save      write the average into `checkpoint-N/merging/average` with each checkpoint: an adapter that PEFT loads, or a model

    Results of evaluation stand in the log history as `eval_merged_*`. The callback resumes with the Trainer: snapshots
    are kept as files inside each checkpoint (hard links to those of the one before where the disk has them).
    """

    def __init__(
        self,
        spec: SoupSpec | Mapping[str, Any] | None = None,
        *,
        every: int | None = None,
        evaluate: bool | Callable[[Any], Mapping[str, float]] = False,
        save: bool = True,
    ) -> None:
        self.snapshots = SnapshotAverage(SoupSpec(**spec) if isinstance(spec, Mapping) else spec)
        self.every = None if every is None else checked_every(every)
        self.evaluate = evaluate
        self.save = save
        self.trainer: Any = None
        self._evaluating = False
        self._files: dict[int, str] = {}
        self.folder = ""

    def state(self) -> dict[str, Any]:
        """What goes into trainer_state.json: how to make the callback again, and where its snapshots lie.

        A function given as `evaluate` can't be written down: a callback made from the state measures the loss instead.
        """
        options = {"spec": self.snapshots.spec.given(), "every": self.every, "save": self.save}
        return {"args": {**options, "evaluate": bool(self.evaluate)}, "attributes": {"folder": self.folder}}

    # the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        launched = any(os.environ.get(f"ACCELERATE_USE_{x}", "").lower() == "true" for x in ("FSDP", "DEEPSPEED"))
        if launched or getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ArgumentError(
                "MergingCallback keeps whole parameters; FSDP and DeepSpeed shard them, which is not supported"
            )
        if self.evaluate is True and self.trainer is None and getattr(args, "world_size", 1) > 1:
            raise ArgumentError("evaluate=True on several processes needs callback.trainer = trainer")
        if state.global_step:
            self._resume(args, state)
            # the Trainer expects an entry of every such callback, also where the run began without it
            getattr(state, "stateful_callbacks", {}).setdefault(type(self).__name__, self.state())
        else:
            self.snapshots.held.clear()
            self._files.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.folder = os.path.abspath(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))
        if model is not None and state.global_step % self._interval(args, state) == 0:
            self.snapshots.add(state.global_step, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not self.evaluate or self._evaluating or model is None:
            return
        average = self._average(state)
        if average is None:
            return
        self._evaluating = True
        was_training = model.training
        try:
            # the training that follows must draw the random numbers that it would have drawn anyway
            with swapped(model, average), kept_random_state():
                found = self._measure(model, kwargs.get("eval_dataloader"), _prefix(metrics))
        finally:
            model.train(was_training)
            self._evaluating = False
        if found:
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if not state.is_world_process_zero or model is None or not os.path.isdir(folder):
            return
        average = self._average(state)
        if average is None and self.snapshots.held:
            warnings.warn(
                f"no snapshot can be weighted by {self.snapshots.spec.by!r} yet (is it logged, and above 0?): no average is "
                f"saved with step {state.global_step}",
                stacklevel=2,
            )
        if self.save and average is not None:
            self._write_average(model, average, os.path.join(folder, MERGED))
        self._write_snapshots(os.path.join(folder, SNAPSHOTS))

    # what they do

    def _interval(self, args: Any, state: Any) -> int:
        if self.every is not None:
            return self.every
        by_steps = str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps"
        steps = state.save_steps if by_steps else state.logging_steps  # args may hold fractions of the run
        return max(int(steps), 1)

    def _average(self, state: Any) -> dict[str, torch.Tensor] | None:
        self.snapshots.fill_metrics(log_from_rows(state.log_history, "log_history"))
        return self.snapshots.average()

    def _measure(self, model: Any, loader: Any, prefix: str) -> dict[str, float]:
        if callable(self.evaluate):
            return {f"{prefix}_merged_{k.removeprefix('eval_')}": float(v) for k, v in self.evaluate(model).items()}
        if self.trainer is not None:
            data = self.trainer.eval_dataset
            if isinstance(data, dict):
                data = data.get(prefix.removeprefix("eval_"))
            self.trainer.evaluate(data, metric_key_prefix=f"{prefix}_merged")  # it logs by itself
            return {}
        if loader is None:
            return {}
        model.eval()
        total = count = 0.0
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in loader:
                moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
                size = len(next(iter(moved.values())))
                try:
                    total += float(_loss(model(**moved))) * size
                except (TypeError, KeyError, AttributeError) as e:
                    raise ArgumentError(
                        f"evaluate=True can't compute this trainer's loss ({e}): set callback.trainer = trainer"
                    ) from e
                count += size
        return {f"{prefix}_merged_loss": total / count} if count else {}

    def _write_average(self, model: Any, average: Mapping[str, torch.Tensor], folder: str) -> None:
        with swapped(model, average), _without_card(model):
            if hasattr(model, "save_pretrained"):
                active = getattr(model, "active_adapter", None)
                model.save_pretrained(folder, **({"selected_adapters": [active]} if isinstance(active, str) else {}))
            else:
                os.makedirs(folder, exist_ok=True)
                save_model(model, os.path.join(folder, "model.safetensors"))
        card = os.path.join(folder, os.pardir, os.pardir, "README.md")
        if os.path.isfile(card):
            shutil.copyfile(card, os.path.join(folder, "README.md"))
        record = {
            "spec": {k: list(v) if isinstance(v, tuple) else v for k, v in self.snapshots.spec.given().items()},
            "snapshots": [
                {"step": h.step, "metric": h.metric, "weight": self.snapshots.weights().get(h.step)}
                for h in self.snapshots.held
            ],
        }
        with open(os.path.join(folder, "stockpot_merging.json"), "w", encoding="utf-8") as f:
            json.dump(record, f, indent=1)

    def _write_snapshots(self, folder: str) -> None:
        fresh = folder + ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)
        for h in self.snapshots.held:
            name = f"{h.step}.safetensors"
            known = self._files.get(h.step)
            if known is None or not _linked(known, os.path.join(fresh, name)):
                save_file({n: t.contiguous() for n, t in h.tensors.items()}, os.path.join(fresh, name))
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in the same directory
        os.rename(fresh, folder)
        self._files = {h.step: os.path.join(folder, f"{h.step}.safetensors") for h in self.snapshots.held}

    def _resume(self, args: Any, state: Any) -> None:
        """The snapshots of the checkpoint that training goes on from."""
        places = [os.path.join(args.output_dir, f"checkpoint-{state.global_step}")]
        # the state that was resumed from names the checkpoint that it lay in
        known = (getattr(state, "stateful_callbacks", None) or {}).get(type(self).__name__)
        if isinstance(known, dict):
            folder = (known.get("attributes") or {}).get("folder")
            if isinstance(folder, str) and os.path.basename(folder) == f"checkpoint-{state.global_step}":
                places.insert(0, folder)
        if isinstance(args.resume_from_checkpoint, str) and args.resume_from_checkpoint:
            places.insert(0, args.resume_from_checkpoint)
        self.snapshots.held.clear()
        self._files.clear()
        for place in places:
            folder = os.path.join(place, SNAPSHOTS)
            if not os.path.isdir(folder):
                continue
            for name in os.listdir(folder):
                step, ending = os.path.splitext(name)
                if ending == ".safetensors" and step.isdigit() and int(step) <= state.global_step:
                    path = os.path.join(folder, name)
                    self.snapshots.put(Held(int(step), load_file(path)))
                    self._files[int(step)] = path
            return
        warnings.warn(
            f"{places[-1]} holds no {SNAPSHOTS}: the average begins anew at step {state.global_step}", stacklevel=2
        )


@contextlib.contextmanager
def _without_card(model: Any) -> Iterator[None]:
    """PEFT renders a model card at each save, which takes longer than all the rest; the checkpoint's own is copied."""
    name = "create_or_update_model_card"
    if not hasattr(model, name):
        yield
        return
    setattr(model, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        delattr(model, name)


def _prefix(metrics: Any) -> str:
    """`eval`, or `eval_name` for one of several evaluation sets."""
    names = [k for k in metrics or {} if k.endswith("_runtime")]
    return str(names[0]).removesuffix("_runtime") if names else "eval"


def _loss(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output["loss"]
    return output.loss if hasattr(output, "loss") else output[0]


def _linked(source: str, target: str) -> bool:
    """A hard link, or a copy where the disk has no links; False where the source is gone."""
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError:
            return False
    return True
