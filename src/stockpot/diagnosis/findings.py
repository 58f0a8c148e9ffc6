"""What measures speak for, each with the threshold that it was judged by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stockpot.diagnosis.measuring import LARGE, Diagnosis, Measured

__all__ = ["THRESHOLDS", "Advice", "Finding", "judge"]

#: name -> (value, what it decides and where it is from)
THRESHOLDS: Mapping[str, tuple[float, str]] = {
    "unrelated_cosine": (0.5, "cosine between a model's weights and the base's below which they are no kin"),
    "unrelated_norm": (0.7, "delta norm over base norm beyond which a model is as far from the base as another one would be"),
    "large_share": (0.01, f"share of changes beyond {LARGE} where dropping at random (DARE, DELLA) was reported to fail"),
    "large_norm": (0.1, "delta norm over base norm of continued pretraining rather than fine-tuning"),
    "independent": (0.05, "cosine between deltas below which tasks are independent: a mean then shrinks each of them"),
    "alike": (0.4, "cosine between deltas above which they are runs of one task: averages fit"),
    "twins": (0.9999, "cosine between deltas above which two models are nearly the same"),
    "opposed": (-0.1, "cosine between deltas below which they undo one another"),
    "conflict": (0.7, "sign conflicts over those of unrelated tasks, above which electing signs matters"),
    "calm": (0.3, "sign conflicts over those of unrelated tasks, below which it does not"),
    "sparse": (0.8, "share of unchanged elements above which deltas are sparse"),
    "uneven": (3.0, "ratio of the largest delta norm to the smallest above which one model drowns the others in a sum"),
}  # fmt: skip


def limit(name: str) -> float:
    return THRESHOLDS[name][0]


@dataclass(frozen=True)
class Finding:
    """level: "stop" (such a merge is wrong), "warn" or "note"; by: the threshold it was judged by."""

    level: Literal["stop", "warn", "note"]
    text: str
    by: str = ""


@dataclass(frozen=True)
class Advice:
    """Whether a family of methods fits these models, and why."""

    methods: tuple[str, ...]
    fits: bool
    why: str
    by: str = ""


def judge(d: Diagnosis) -> tuple[list[Finding], list[Advice]]:
    """Findings, worst first, and which methods fit."""
    total = d.summed()
    findings = [*_bases(d, total), *_twins(d, total), *_sizes(d, total), *_directions(d, total)]
    order = {"stop": 0, "warn": 1, "note": 2}
    return sorted(findings, key=lambda f: order[f.level]), _advice(d, total)


def _bases(d: Diagnosis, total: Measured) -> list[Finding]:
    out = []
    what = "the first model" if d.reference else "the base"
    for i, name in enumerate(d.models):
        relative, cosine = total.relative(i) or 0.0, total.to_base(i)
        if total.changed[i] == 0:
            out.append(Finding("stop", f"{name} is {what}: it adds nothing; leave it out"))
        elif relative > limit("unrelated_norm"):
            strange = cosine is not None and cosine < limit("unrelated_cosine")
            why = (
                f"{name} is no fine-tune of {d.base}: its difference is {relative:.2g} times as large as the weights, their "
                f"cosine is {cosine or 0:.2g}; look for its own base, or align the nets first"
            )
            out.append(Finding("stop" if strange else "warn", why, "unrelated_norm"))
        elif relative > limit("large_norm"):
            why = f"{name} has moved by {relative:.2g} of the weights' norm: continued pretraining, or another base"
            out.append(Finding("warn", why, "large_norm"))
    return out


def _twins(d: Diagnosis, total: Measured) -> list[Finding]:
    out = []
    for i, j in itertools.combinations(range(len(d.models)), 2):
        cosine, both = total.cosine(i, j), f"{d.models[i]} and {d.models[j]}"
        if (i, j) in d.equal:
            out.append(Finding("stop", f"{both} are the same to the last bit: leave one out"))
        elif cosine is not None and cosine > limit("twins"):
            out.append(Finding("warn", f"{both} are nearly the same: their deltas have cosine {cosine:.6f}", "twins"))
    return out


def _sizes(d: Diagnosis, total: Measured) -> list[Finding]:
    out = []
    norms = [total.norm(i) for i in range(len(d.models)) if total.norm(i) > 0]
    if len(norms) > 1 and max(norms) > limit("uneven") * min(norms):
        times = max(norms) / min(norms)
        why = f"the largest delta is {times:.1f} times the smallest: it decides every sum and election; give it less weight"
        out.append(Finding("warn", why, "uneven"))
    for i, name in enumerate(d.models):
        share, unchanged = total.share(total.large[i]), 1 - total.share(total.changed[i])
        if share > limit("large_share"):
            out.append(
                Finding("warn", f"{name}: {share:.1%} of its elements have moved by more than {LARGE}", "large_share")
            )
        if limit("sparse") < unchanged < 1:
            out.append(Finding("note", f"{name} leaves {unchanged:.1%} of the elements as they were", "sparse"))
    return out


def _directions(d: Diagnosis, total: Measured) -> list[Finding]:
    out = []
    for i, j in itertools.combinations(range(len(d.models)), 2):
        cosine = total.cosine(i, j)
        if cosine is not None and cosine < limit("opposed"):
            why = f"{d.models[i]} and {d.models[j]} undo one another: their deltas have cosine {_said(cosine)}"
            out.append(Finding("warn", why, "opposed"))
    rate = total.conflict_rate
    if rate is not None and rate > limit("conflict") * total.conflict_of_chance:
        why = f"signs conflict in {rate:.0%} of the elements that several models change"
        out.append(Finding("note", why, "conflict"))
    return out


def _said(cosine: float) -> str:
    return f"{round(cosine, 2) + 0.0:.2f}"  # never -0.00


def _mean_cosine(total: Measured) -> float | None:
    found = [total.cosine(i, j) for i, j in itertools.combinations(range(total.models), 2)]
    known = [c for c in found if c is not None]
    return sum(known) / len(known) if known else None


def _advice(d: Diagnosis, total: Measured) -> list[Advice]:
    out: list[Advice] = []

    def say(methods: str, fits: bool, why: str, by: str = "") -> None:
        out.append(Advice(tuple(methods.split()), fits, why, by))

    m = total.models
    if any((total.relative(i) or 0) > limit("unrelated_norm") for i in range(m)):
        why = "these models share no base: what is merged element by element must mean the same in each"
        say("linear slerp task_arithmetic ties", False, why, "unrelated_norm")
        return out
    if m == 1:
        say("wise_ft nearswap arcee_fusion slerp", True, "one model beside its base")
    cosine, rate = _mean_cosine(total), total.conflict_rate
    if cosine is not None:
        why = f"deltas have a mean cosine of {_said(cosine)}"
        if cosine > limit("alike"):
            say("linear model_stock karcher multislerp", True, f"{why}: runs of one task average well", "alike")
            say(
                "task_arithmetic",
                False,
                f"{why}: a sum counts {m} times what they share; let weights sum to 1",
                "alike",
            )
        elif cosine < limit("independent"):
            say("task_arithmetic ties", True, f"{why}: independent tasks can be added", "independent")
            say("linear", False, f"{why}: a mean leaves 1/{m} of each", "independent")
            say(
                "nuslerp multislerp warp",
                True,
                f"{why}: spherical means keep the norm that a mean loses",
                "independent",
            )
        else:
            say("task_arithmetic ties model_stock", True, f"{why}: neither one task nor independent ones", "alike")
    if rate is not None and rate > limit("conflict") * total.conflict_of_chance:
        why = f"{rate:.0%} sign conflicts: electing signs keeps one side"
        say("ties breadcrumbs_ties sce consensus_ta", True, why, "conflict")
    elif rate is not None and rate < limit("calm") * total.conflict_of_chance:
        say("ties", False, f"{rate:.0%} sign conflicts: there is little to elect", "calm")
    large = max((total.share(x) for x in total.large), default=0.0)
    if large > limit("large_share"):
        why = f"up to {large:.1%} of the elements have moved by more than {LARGE}: dropping at random was reported to fail"
        say("dare_linear dare_ties della della_linear", False, why, "large_share")
    elif large <= limit("large_share") / 100:
        why = f"hardly an element has moved by more than {LARGE}: most changes can be dropped at random"
        say("dare_linear dare_ties della", True, why, "large_share")
    unchanged = 1 - max((total.share(c) for c in total.changed), default=1.0)
    if unchanged > limit("sparse"):
        why = f"at least {unchanged:.0%} of each model is unchanged: sole changes can be taken whole"
        say("ram ramplus_tl", True, why, "sparse")
    return out
