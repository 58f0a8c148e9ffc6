"""What `stockpot diagnose` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stockpot.cli.terminal import print_json, say
from stockpot.diagnosis import THRESHOLDS, judge

if TYPE_CHECKING:
    from stockpot.diagnosis import Diagnosis

__all__ = ["show_diagnosis"]

_WORDS = {"stop": "wrong", "warn": "beware", "note": "note"}


def show_diagnosis(d: Diagnosis, *, as_json: bool, page: str | None) -> None:
    findings, advice = judge(d)
    if as_json:
        print_json(
            {
                "models": list(d.models),
                "base": d.base,
                "base_is_first_model": d.reference,
                "total": d.summed().as_json(),
                "layers": [{"layer": k, **v.as_json()} for k, v in d.by_layer().items()],
                "kinds": [{"kind": k, **v.as_json()} for k, v in d.by_kind().items()],
                "equal": [list(p) for p in d.equal],
                "not_compared": d.copied,
                "findings": [{"level": f.level, "text": f.text, "by": f.by} for f in findings],
                "advice": [{"methods": list(a.methods), "fits": a.fits, "why": a.why, "by": a.by} for a in advice],
                "thresholds": {k: {"value": v, "about": about} for k, (v, about) in THRESHOLDS.items()},
                "notes": list(d.notes),
            }
        )
        return
    total = d.summed()
    say(f"base: {d.base}" + (" (the first model: the recipe has no base)" if d.reference else ""))
    for i, name in enumerate(d.models):
        relative = total.relative(i)
        share = total.share(total.changed[i])
        size = "" if relative is None else f", {relative:.3g} of the base's"
        say(f"  {i + 1}. {name}: delta norm {total.norm(i):.4g}{size}; {share:.1%} of the elements changed")
    if len(d.models) > 1:
        say("cosines between deltas:")
        for i in range(len(d.models)):
            cells = (total.cosine(i, j) for j in range(len(d.models)))
            say(f"  {i + 1}. " + " ".join("   -  " if c is None else f"{c:6.3f}" for c in cells))
        if total.conflict_rate is not None:
            say(f"signs conflict in {total.conflict_rate:.1%} of the elements that two or more change")
    kinds = sorted(
        d.by_kind().items(), key=lambda kv: -max((kv[1].relative(i) or 0.0 for i in range(len(d.models))), default=0)
    )
    say("most changed, relative to the base:")
    for kind, measured in kinds[:6]:
        say(
            f"  {kind}: "
            + ", ".join("-" if (r := measured.relative(i)) is None else f"{r:.3g}" for i in range(len(d.models)))
        )
    for f in findings:
        say(f"{_WORDS[f.level]}: {f.text}{_by(f.by)}")
    for a in advice:
        say(f"{'fits' if a.fits else 'does not fit'}: {', '.join(a.methods)}: {a.why}{_by(a.by)}")
    if d.copied:
        say(f"note: tensors not compared: {d.copied} (integers, what the recipe leaves out, layers of fewer models)")
    for note in d.notes:
        say(f"note: {note}")
    if page is not None:
        say(f"page: {page}")


def _by(name: str) -> str:
    return f" [{name} {THRESHOLDS[name][0]:g}]" if name else ""
