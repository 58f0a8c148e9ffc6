"""One model of transformers in memory, into which candidates are put one after the other: nothing is read from disk again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from stockpot.adapters import changes_the_base
from stockpot.checkpoints.beside import copied_files
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.engine.candidates import Candidate
from stockpot.errors import EvaluationError, SuiteError
from stockpot.evaluation.suite import Suite
from stockpot.files import read_bytes, read_json

__all__ = ["LoadedModel"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
)


class LoadedModel:
    """What evaluators score. `put` swaps in a candidate; the module is made once and kept while shapes stay the same.

    Nothing is loaded before `model` or `tokenizer` is asked for, so that a suite of commands alone needs neither.
    """

    def __init__(self, suite: Suite, threads: int | None = None, scratch: str | None = None) -> None:
        self.suite = suite
        self.threads = threads
        self.scratch = scratch
        self.candidate: Candidate | None = None
        self.bare = False
        self._signature = ""
        self._module: Any = None
        self._base: Any = None
        self._base_intact = True
        self._plain: Any = None
        self._clean: Any = None
        self._base_path = ""
        self._views: dict[str, Any] = {}
        self._in_module: Candidate | None = None
        self._tokenizer: tuple[str, Any, str] | None = None
        self._saved: str | None = None
        self._switched_off: list[Any] = []
        #: what evaluators keep with the module (the harness its own wrapper); emptied when the module is made anew
        self.attached: dict[str, Any] = {}

    # what evaluators use

    @property
    def model(self) -> Any:
        """The module in eval mode, with the candidate's weights; the base without any adapter where that is scored."""
        self._load()
        module = self._module
        if self.bare and not self._base_intact:
            module = self._plain = self._plain or self._pretrained(self.base_path())
        elif self.bare and not self._switched_off:
            self._switched_off.append(self._module.disable_adapter())
            self._switched_off[0].__enter__()
        return module.eval()

    @property
    def device(self) -> str:
        return self.suite.device

    @property
    def tokenizer(self) -> Any:
        """The candidate's own tokenizer, else that of its base."""
        return self._tokenizer_for()[1]

    @property
    def tokenizer_digest(self) -> str:
        """Changes when the tokenizer does."""
        return self._tokenizer_for()[2]

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        head = self.model.get_output_embeddings()
        return 1 if head is None else int(head.weight.shape[0])

    @property
    def max_length(self) -> int:
        """Tokens that the model's positions allow."""
        config = self.model.config
        known = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
        return int(next((n for n in known if n), 2**17))

    def tokenizer_files(self) -> str:
        """A digest of the files of the tokenizer that would be used, without loading it; empty where there is none."""
        try:
            return _digest_of_files(self._tokenizer_place())
        except SuiteError:
            return ""

    def encode(self, text: str) -> list[int]:
        """Tokens as the tokenizer gives them, with its own beginning of text where it has one."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def save(self) -> str:
        """The candidate as a directory, for evaluators that need one; removed when the next candidate comes."""
        if self._saved is None:
            if self.bare:
                return self.base_path()
            folder = tempfile.mkdtemp(prefix="candidate-", dir=self.scratch)
            try:
                self._write(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._saved = folder
        return self._saved

    def end_tokens(self) -> list[int]:
        """Tokens that end a text: the tokenizer's, and those of the model's generation settings."""
        found: list[int] = []
        kept = [self.tokenizer.eos_token_id, getattr(self.model.generation_config, "eos_token_id", None)]
        own = (
            None
            if self.candidate is None or self.bare
            else os.path.join(self.candidate.tokenizer, "generation_config.json")
        )
        if own is not None and os.path.isfile(own):
            kept.append(read_json(own).get("eos_token_id"))
        for item in kept:
            found += [i for i in (item if isinstance(item, list) else [item]) if isinstance(i, int)]
        return list(dict.fromkeys(found))

    # putting candidates in

    def put(self, candidate: Candidate | None) -> None:
        """Take a candidate, or with None the base that adapters are loaded onto."""
        self.discard()
        self._switch_on()
        self.bare = candidate is None
        if candidate is not None:
            self.candidate = candidate

    def check_untouched(self) -> None:
        """After a user's function: what it did to the module must not reach the next candidate. Made anew where it did."""
        self._plain = None
        if self._module is not None and self._in_module is not None:
            seen = _fingerprint(self._module)
            if self._clean is None or seen != self._clean:
                self._release()
                self._base = self._plain = None

    def forget(self) -> None:
        """Let go of the candidate before the next is made: two need not be held at once. Its module stays."""
        self.put(None)
        self.candidate = self._in_module = None

    def discard(self) -> None:
        """Remove what `save` wrote."""
        if self._saved is not None:
            shutil.rmtree(self._saved, ignore_errors=True)
            self._saved = None

    def base_path(self) -> str:
        """The model that an adapter is loaded onto. Raises SuiteError where it is not known."""
        named = None if self.candidate is None else self.candidate.config.get("base_model_name_or_path")
        found = self.suite.resolve(self.suite.base) if self.suite.base is not None else named
        if isinstance(found, str) and found:
            return os.path.abspath(found) if os.path.exists(found) else found
        raise SuiteError("an adapter is scored on its base model: name it with base in the suite, or --base")

    def _load(self) -> None:
        candidate = self.candidate
        if candidate is None:
            raise SuiteError("nothing to score: neither a checkpoint nor an adapter whose base is known")
        if candidate is self._in_module:
            return
        import torch

        if self._module is None and self.threads:
            torch.set_num_threads(self.threads)
        try:
            signature = self._signature_of(candidate)
            if signature != self._signature:
                self._make(candidate)
                self._signature = signature
            else:
                with torch.inference_mode():
                    for name, (spec, raw) in candidate.tensors.items():
                        self._views[name].copy_(_tensor(spec, raw))
        except BaseException as e:
            # half of it may be in place: nothing of it is used again
            self._release()
            self._base = self._plain = None
            if isinstance(e, (SuiteError, EvaluationError)) or not isinstance(e, Exception):
                raise
            raise EvaluationError(f"the model can't be loaded: {type(e).__name__}: {e}") from e
        self._in_module = candidate
        self._clean = _fingerprint(self._module) if any(s.kind == "python" for s in self.suite.slices) else None

    def _release(self) -> None:
        """Let go of the module and of all that refers to it; the base under an adapter stays."""
        self._switch_on()
        self._signature, self._module, self._in_module = "", None, None
        self._views = {}
        self.attached.clear()

    def _switch_on(self) -> None:
        """The adapter works again, where it was switched off for the base's sake."""
        while self._switched_off:
            with contextlib.suppress(Exception):  # a user's function may have taken the module apart
                self._switched_off.pop().__exit__(None, None, None)

    def _signature_of(self, candidate: Candidate) -> str:
        shapes = [(n, spec.dtype.label, spec.shape) for n, (spec, _) in candidate.tensors.items()]
        base = self.base_path() if candidate.kind == "adapter" else ""
        config = {k: v for k, v in candidate.config.items() if k != "_name_or_path"}
        return hashlib.sha256(
            json.dumps([candidate.kind, base, config, shapes], sort_keys=True, default=str).encode()
        ).hexdigest()

    def _make(self, candidate: Candidate) -> None:
        """A new module, and views of its parameters by the names that checkpoints use."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        state = {n: _tensor(spec, raw).clone() for n, (spec, raw) in candidate.tensors.items()}
        if candidate.kind == "adapter":
            self._module, self._views = self._with_adapter(candidate, state)
        else:
            self._module, self._views = self._full(candidate, state)
        self._module.eval()
        missing = [n for n in state if n not in self._views]
        if missing:
            raise EvaluationError(
                f"transformers keeps {len(missing)} tensors under other names ({missing[0]!r}, ...), so they can't be swapped in"
            )

    def _with_adapter(self, candidate: Candidate, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        base_path = self.base_path()
        if self._base is not None and self._base_path == base_path and self._module is not None:
            self._base = self._module.unload()
            self._release()
        else:
            self._release()
            self._base = self._plain = None
            self._base, self._base_path = self._pretrained(base_path), base_path
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as f:
                json.dump(dict(candidate.config), f)
            config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        module = get_peft_model(self._base, config)
        self._base_intact = leaves_the_base_alone(candidate.config, candidate.tensors)
        if not self._base_intact:
            self._base = None  # what it was is lost: it is read again when it is needed
        module.to(self.suite.device)
        outcome = set_peft_model_state_dict(module, dict(state))
        unexpected = list(getattr(outcome, "unexpected_keys", ()) or ())
        if unexpected:
            raise EvaluationError(
                f"the base {base_path} has no place for {len(unexpected)} tensors: {unexpected[0]!r}, ..."
            )
        views = dict(get_peft_model_state_dict(module, save_embedding_layers=False))
        if any(n not in views for n in state):  # embeddings that were saved with the adapter
            views = dict(get_peft_model_state_dict(module, save_embedding_layers=True))
        return module, views

    def _full(self, candidate: Candidate, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import transformers

        if not candidate.config.get("model_type"):
            raise EvaluationError(
                "no config.json with a model_type beside the weights, so transformers can't load them"
            )
        self._release()
        config = transformers.AutoConfig.for_model(**_copied(candidate.config))
        module, info = self._architecture(config).from_pretrained(
            None, config=config, state_dict=dict(state), dtype=self._dtype(next(iter(state.values())).dtype),
            output_loading_info=True,
        )  # fmt: skip
        _check_complete(info, "the checkpoint")
        module.to(self.suite.device)
        return module, dict(module.state_dict())

    def _pretrained(self, path: str) -> Any:
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        stored = getattr(config, "dtype", None) or "float32"
        return (
            self._architecture(config)
            .from_pretrained(path, config=config, dtype=self._dtype(stored))
            .to(self.suite.device)
        )

    @staticmethod
    def _architecture(config: Any) -> Any:
        import transformers

        named = (getattr(config, "architectures", None) or [""])[0]
        return getattr(transformers, named, None) or transformers.AutoModelForCausalLM

    def _dtype(self, stored: Any) -> Any:
        """What is asked for; auto: float32 on the CPU, as stored elsewhere."""
        import torch

        if self.suite.dtype != "auto":
            return getattr(torch, self.suite.dtype)
        if self.suite.device == "cpu":
            return torch.float32
        return getattr(torch, stored) if isinstance(stored, str) else stored

    # tokenizer and files

    def _tokenizer_for(self) -> tuple[str, Any, str]:
        place = self._tokenizer_place()
        if self._tokenizer is None or self._tokenizer[0] != place:
            from transformers import AutoTokenizer

            try:
                found = AutoTokenizer.from_pretrained(place)
            except Exception as e:
                raise EvaluationError(f"{place}: no tokenizer that transformers can load: {e}") from e
            self._tokenizer = (place, found, _digest_of_files(place))
        return self._tokenizer

    def _tokenizer_place(self) -> str:
        if self.suite.tokenizer is not None:
            return self.suite.resolve(self.suite.tokenizer)
        own = "" if self.candidate is None else self.candidate.tokenizer
        if own and any(os.path.exists(os.path.join(own, f)) for f in _TOKENIZER_FILES):
            return own
        if self.candidate is not None and self.candidate.kind == "adapter":
            return self.base_path()
        raise SuiteError("no tokenizer beside the checkpoint: name one with tokenizer in the suite")

    def _write(self, folder: str) -> None:
        """The candidate as transformers and PEFT would have saved it."""
        from safetensors.torch import save_file

        candidate = self.candidate
        assert candidate is not None
        adapter = candidate.kind == "adapter"
        state = {n: _tensor(spec, raw).contiguous() for n, (spec, raw) in candidate.tensors.items()}
        save_file(
            state,
            os.path.join(folder, "adapter_model.safetensors" if adapter else "model.safetensors"),
            {"format": "pt"},
        )
        if candidate.config:
            with open(
                os.path.join(folder, "adapter_config.json" if adapter else "config.json"), "w", encoding="utf-8"
            ) as f:
                base = {"base_model_name_or_path": self.base_path()} if adapter else {}
                json.dump({**candidate.config, **base}, f, indent=2)
        if candidate.tokenizer and os.path.isdir(candidate.tokenizer):
            for source, name in copied_files(open_checkpoint(candidate.tokenizer)):
                target = os.path.join(folder, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                if not os.path.exists(target):
                    shutil.copyfile(source, target)


def _tensor(spec: Any, raw: Any) -> Any:
    """Bytes as a torch tensor, without a copy where they can be written to."""
    import torch

    dtype = getattr(torch, spec.dtype.array)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    array = raw if raw.flags.writeable else raw.copy()
    return torch.from_numpy(array).view(dtype).reshape(spec.shape)


def _fingerprint(module: Any) -> list[Any]:
    """Where every parameter and buffer lies, what it is, and two sums over it: one pass over memory, little beside scoring."""
    import torch

    rows = []
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            sums = (t.double().sum().item(), t.double().abs().sum().item()) if t.numel() else (0.0, 0.0)
            rows.append((name, t.data_ptr(), str(t.dtype), tuple(t.shape), *sums))
    return rows


def leaves_the_base_alone(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether the base is as it was once PEFT has unloaded such an adapter, or has it switched off."""
    whole = any(config.get(key) for key in ("modules_to_save", "trainable_token_indices"))
    biases = config.get("bias", "none") != "none"
    return not (whole or biases or changes_the_base(config)) and all(".lora_" in name for name in tensors)


def _check_complete(info: Mapping[str, Any], what: str) -> None:
    """transformers makes up what a checkpoint lacks, by chance: such scores mean nothing."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise EvaluationError(f"{what} lacks {len(missing)} tensors that the model needs: {', '.join(missing[:4])}")


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))  # type: ignore[no-any-return]


def _digest_of_files(place: str) -> str:
    digest = hashlib.sha256(place.encode() if not os.path.isdir(place) else b"")
    for name in (
        *_TOKENIZER_FILES,
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    ):
        path = os.path.join(place, name)
        if os.path.isfile(path):
            digest.update(name.encode() + hashlib.sha256(read_bytes(path, 2**28)).digest())
    return digest.hexdigest()
