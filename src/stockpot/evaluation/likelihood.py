"""Running a causal language model: log-likelihoods of tokens, greedy generation. The one place here that computes with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from stockpot.evaluation.scores import Progress

if TYPE_CHECKING:
    from stockpot.evaluation.loaded import LoadedModel

__all__ = ["generated", "log_likelihoods"]

#: bytes of logits at once, at most
_LOGITS = 2**28


@torch.inference_mode()
def log_likelihoods(
    checkpoint: LoadedModel, rows: Sequence[tuple[list[int], int]], batch_size: int, progress: Progress | None = None
) -> list[tuple[float, int, bool]]:
    """For each (tokens, first): the sum of log p(token | those before) over tokens[first:], how many, whether all were
    the most likely. float32, summed in float64. Rows go longest first, so that padding is little.
    """
    model, device = checkpoint.model, checkpoint.device
    out: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    widest = _LOGITS // (4 * checkpoint.vocabulary)
    at = 0
    while at < len(order):
        longest = len(rows[order[at]][0])
        size = max(min(batch_size, widest // longest), 1)
        chosen = order[at : at + size]
        at += size
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for j, i in enumerate(chosen):
            ids[j, : len(rows[i][0])] = torch.tensor(rows[i][0])
            mask[j, : len(rows[i][0])] = 1
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        target = ids[:, 1:]
        logp = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0].double().cpu()
        best = (logits.argmax(-1) == target).cpu()
        for j, i in enumerate(chosen):
            first, end = rows[i][1] - 1, len(rows[i][0]) - 1
            out[i] = (float(logp[j, first:end].sum()), end - first, bool(best[j, first:end].all()))
        if progress is not None:
            progress(min(at, len(order)), len(order))
    return out


class _Stops(StoppingCriteria):
    """A row is done once its generated text holds one of the stops. transformers' own needs to know the tokenizer's kind."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **unused: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True) if self.stop else []
        done = [any(s in text for s in self.stop) for text in texts] or [False] * len(ids)
        return torch.tensor(done, dtype=torch.bool, device=ids.device)


@torch.inference_mode()
def generated(
    checkpoint: LoadedModel, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str], batch_size: int,
    progress: Progress | None = None,
) -> list[tuple[str, int, bool]]:  # fmt: skip
    """For each prompt: greedy text up to the first stop, tokens generated, whether a stop or the end was reached."""
    model, tokenizer, device = checkpoint.model, checkpoint.tokenizer, checkpoint.device
    ends = checkpoint.end_tokens()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    # greedy whatever the model's own settings say: no sampling, no penalties
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=ends or None
    )
    out: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), pad, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for j, i in enumerate(chosen):
            n = len(prompts[i])
            if n:
                ids[j, -n:] = torch.tensor(prompts[i])
                mask[j, -n:] = 1
        made = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, stop, longest)]),
        )[:, longest:].cpu()  # fmt: skip
        for j, i in enumerate(chosen):
            tokens = made[j].tolist()
            first = next((n for n, token in enumerate(tokens) if token in ends), None)
            ended = first is not None
            tokens = tokens[:first]
            while tokens and tokens[-1] == pad:  # a row that was done before the longest
                tokens.pop()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            cuts = [c for c in (text.find(s) for s in stop) if c >= 0]
            out[i] = (text[: min(cuts)] if cuts else text, len(tokens), ended or bool(cuts))
        if progress is not None:
            progress(min(at + batch_size, len(order)), len(order))
    return out
