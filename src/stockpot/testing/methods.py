"""What every merge method must do, whoever wrote it: its own examples, identities, and results that depend on nothing but the
recipe and the inputs: not on blocks, threads, memory, compiled kernels or a device.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stockpot.engine.inmemory import full_parameters
from stockpot.engine.native import load_kernels, numpy_only
from stockpot.methods.declaration import Example, Method, Scope, Space, get_method
from stockpot.methods.parameters import REQUIRED, Choice, Flag, Parameter, Real
from stockpot.testing.checks import Check
from stockpot.testing.factors import factor_examples, factor_tests
from stockpot.testing.models import CUT, DEGENERATE, WHOLE, read_model, state, write_model

__all__ = ["method_checks"]

#: fractions that make no whole number of elements
FRACTIONS = (0.37, 0.613, 0.291)
Oracle = Callable[..., Any]


def method_checks(method: Method | str, *, oracle: Oracle | None = None, within: float = 1e-6) -> list[Check]:
    """Everything that must hold of a method. Of those on factors: their products are what examples expect, ranks as announced.

    oracle  the definition in float64: `oracle(models, base, **parameters)` for one tensor, arrays `[m, *shape]` and `[*shape]`;
            compared over several shapes and settings, in float64, to `within` times the largest magnitude
    """
    found = get_method(method) if isinstance(method, str) else method
    checks: list[tuple[str, Callable[[Method, str], None]]] = [("docstring", _docstring), ("pickles", _pickles)]
    if found.space is Space.FACTORS:
        checks += factor_tests(found)
        checks += [(f"example {i + 1}", factor_examples(e)) for i, e in enumerate(found.examples)]
        return [Check(name, _bound(run, found)) for name, run in checks]
    checks += [
        ("identity", _identity),
        ("degenerate sizes", _degenerate),
        ("blocks, threads and memory", _invariance),
        ("memory as planned", _budget),
    ]
    if found.neutral is not None and found.models[0] == 1:
        checks.append(("one model", _one_model))
    if not found.ordered:
        checks.append(("order of models", _permutation))
    if found.form is not None or any(s.ordered or s.samples for s in found.stats):
        checks.append(("compiled kernels", _kernels))
    if found.scope is Scope.TENSOR:
        checks.append(("device", _device))
    out = [Check(name, _bound(run, found)) for name, run in checks]
    out += [Check(f"example {i + 1}", _bound(_example(e), found)) for i, e in enumerate(found.examples)]
    if oracle is not None:
        out.append(Check("oracle", _bound(_oracle(oracle, within), found)))
    return out


def _bound(run: Callable[[Method, str], None], method: Method) -> Callable[[str], None]:
    return lambda folder: run(method, folder)


def settings(method: Method, models: int) -> Iterator[dict[str, Any]]:
    """Parameters to try, by keyword: defaults, each dialect, and fractions that make no whole numbers of elements."""
    needed = {p.name: p for p in method.parameters.values() if p.default is REQUIRED}
    given: dict[str, Any] = {}
    for name, p in needed.items():
        example = next((e.parameters[name] for e in method.examples if name in e.parameters), None)
        if example is None:
            raise AssertionError(f"{method.name}: no example says what the required parameter {name!r} may be")
        given[p.keyword] = [example[i % len(example)] for i in range(models)] if isinstance(example, list) else example
    fractions = [
        p
        for p in method.parameters.values()
        if p.per_model and isinstance(p.kind, Real) and (p.kind.low, p.kind.high) == (0, 1)
    ]
    for dialect in method.dialects or (None,):
        chosen = dict(given) if dialect is None else {**given, "dialect": dialect}
        varied = {p.keyword: [FRACTIONS[i % 3] for i in range(models)] for p in fractions}
        if method.name and fractions and dialect == "paper":
            varied = {p.keyword: [FRACTIONS[0]] * models for p in fractions}
        if not fractions or all(p.default_for(dialect) is not REQUIRED for p in fractions):
            yield chosen
            # where they decide what the function sees, words and flags too
            for p in method.parameters.values() if method.sees else ():
                for other in _others(p):
                    if p.name != "dialect" and _goes(method, models, chosen | {p.keyword: other}):
                        yield chosen | {p.keyword: other}
        if fractions and _goes(method, models, chosen | varied):
            yield chosen | varied
        elif fractions:  # not all at once
            yield from (chosen | {key: v} for key, v in varied.items() if _goes(method, models, chosen | {key: v}))


def _others(p: Parameter) -> list[Any]:
    """The other words of a choice, the other state of a flag."""
    every = list(p.kind.options) if isinstance(p.kind, Choice) else [True, False] if isinstance(p.kind, Flag) else []
    return [v for v in every if v != p.default]


def _goes(method: Method, models: int, given: Mapping[str, Any]) -> bool:
    """Whether the method takes these parameters together."""
    return method.check is None or method.check(full_parameters(method, models, given)) is None


def counts(method: Method) -> list[int]:
    """Numbers of models to try: the fewest, and three or as many as it takes."""
    low, high = method.models
    most = max(low, 3) if high is None else high
    return sorted({low, min(most, max(low, 3))})


def inputs_of(
    method: Method, shapes: Mapping[str, tuple[int, ...]], count: int, *, same: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(models near each other, what else a call takes: base and companions), in float64."""
    base = state(shapes, 0)
    models = []
    for i in range(count):
        noise = state(shapes, i + 1, 0.0 if same else 0.004)
        models.append({n: base[n] + noise[n] for n in shapes})
    more: dict[str, Any] = {"base": base} if method.space is Space.DELTA else {}
    for k, companion in enumerate(method.companions):
        more[companion.name] = [{n: np.abs(v) for n, v in state(shapes, 50 + 10 * k + i).items()} for i in range(count)]
    return models, more


# the checks


def _docstring(method: Method, folder: str) -> None:
    doc = inspect.getdoc(method.function) or ""
    assert method.summary.endswith("."), f"{method.name}: the docstring's first line is a sentence"
    names = [p.name for p in method.parameters.values()]
    names += [x.name for x in (*method.stats, *method.draws, *method.companions)]
    for name in names:
        assert name in doc, f"{method.name}: the docstring says nothing of {name!r}"


def _pickles(method: Method, folder: str) -> None:
    assert pickle.loads(pickle.dumps(method)) is method, f"{method.name}: another method after pickling"
    for stat in method.stats:
        try:
            again = pickle.loads(pickle.dumps(stat))
        except (pickle.PicklingError, AttributeError) as e:
            raise AssertionError(f"{method.name}: statistic {stat.name!r} does not pickle: {e} (lambdas don't)") from e
        assert again == stat, f"{method.name}: statistic {stat.name!r} is another one after pickling"


def _example(example: Example) -> Callable[[Method, str], None]:
    def check(method: Method, folder: str) -> None:
        models = [{"w": np.array(m, np.float64)} for m in example.models]
        more: dict[str, Any] = {} if example.base is None else {"base": {"w": np.array(example.base, np.float64)}}
        more |= {k: [{"w": np.array(c, np.float64)} for c in v] for k, v in example.companions.items()}
        merged = method(models, **more, **example.parameters)["w"]
        expected = np.array(example.expected, np.float64)
        worst = float(np.max(np.abs(merged - expected), initial=0.0))
        assert worst <= example.within, f"{method.name}: {merged.tolist()}, expected {expected.tolist()}"

    return check


def _identity(method: Method, folder: str) -> None:
    """Models that all equal the base give the base, to the last bit of 16."""
    shapes = WHOLE if method.scope is Scope.TENSOR else {**WHOLE, **DEGENERATE}
    for count in counts(method):
        models, more = inputs_of(method, shapes, count, same=True)
        rounded = [{n: v.astype(np.float16) for n, v in m.items()} for m in models]
        if "base" in more:
            more["base"] = {n: v.astype(np.float16) for n, v in more["base"].items()}
        for given in settings(method, count):
            merged = method(rounded, **more, **given)
            for name in shapes:
                assert np.array_equal(merged[name], rounded[0][name]), f"{method.name} {given}: {name} changed"


def _one_model(method: Method, folder: str) -> None:
    assert method.neutral is not None
    models, more = inputs_of(method, WHOLE, 1)
    for given in settings(method, 1):
        merged = method(models, **more, **{**given, **method.neutral})
        for name, value in models[0].items():
            close = np.allclose(merged[name], value, rtol=0, atol=1e-12)
            assert close, f"{method.name} {given | dict(method.neutral)}: {name} is not the one model's"


def _degenerate(method: Method, folder: str) -> None:
    """Sizes of nothing and of one, and zeros, stay finite and keep their shapes."""
    for count in counts(method):
        for scale in (1.0, 0.0):
            models, more = inputs_of(method, DEGENERATE, count)
            models = [{n: v * scale for n, v in m.items()} for m in models]
            for given in settings(method, count):
                merged = method(models, **more, **given)
                for name, shape in DEGENERATE.items():
                    assert merged[name].shape == shape, f"{method.name}: {name} {merged[name].shape}"
                    assert np.isfinite(merged[name]).all(), f"{method.name} {given}: {name} is not finite"


def _permutation(method: Method, folder: str) -> None:
    count = counts(method)[-1]
    models, more = inputs_of(method, WHOLE, count)
    for given in settings(method, count):
        results = []
        for order in itertools.islice(itertools.permutations(range(count)), 4):
            turned: dict[str, Any] = {
                k: [v[i] for i in order] if isinstance(v, list) and len(v) == count else v
                for k, v in {**more, **given}.items()
            }
            results.append(method([models[i] for i in order], **turned))
        for other in results[1:]:
            for name in WHOLE:
                close = np.allclose(other[name], results[0][name], rtol=1e-9, atol=1e-12)
                assert close, f"{method.name} {given}: {name} depends on the order of the models (declare ordered=True)"


def _oracle(oracle: Oracle, within: float) -> Callable[[Method, str], None]:
    def check(method: Method, folder: str) -> None:
        shapes = {"w": (700, 300), **WHOLE, **{k: v for k, v in DEGENERATE.items() if 0 not in v}}
        for count in counts(method):
            models, more = inputs_of(method, shapes, count)
            for given in settings(method, count):
                merged = method(models, **more, **given)
                for name in shapes:
                    each = np.stack([m[name] for m in models])
                    beside = {c.name: np.stack([d[name] for d in more[c.name]]) for c in method.companions}
                    expected = oracle(each, more["base"][name] if "base" in more else None, **given, **beside)
                    limit = within * max(float(np.abs(each).max()), 1e-30)
                    worst = float(np.abs(merged[name] - expected).max())
                    assert worst <= limit, f"{method.name} {given}: {name} is off by {worst:.3g}, allowed {limit:.3g}"

    return check


def written(
    method: Method, shapes: Mapping[str, tuple[int, ...]], count: int, given: Mapping[str, Any], folder: str
) -> dict[str, Any]:
    """A recipe over models on disk."""
    models, more = inputs_of(method, shapes, count)
    paths = [write_model(os.path.join(folder, f"model{i}"), m) for i, m in enumerate(models)]
    entries: list[dict[str, Any]] = [{"model": p} for p in paths]
    for companion in method.companions:
        for i, beside in enumerate(more[companion.name]):
            place = write_model(os.path.join(folder, f"{companion.name}{i}"), beside, "F32")
            entries[i].setdefault("companions", {})[companion.name] = place
    by_keyword = {p.keyword: p for p in method.parameters.values()}
    for key, value in given.items():
        if by_keyword[key].per_model and isinstance(value, list):
            for entry, v in zip(entries, value, strict=True):
                entry.setdefault("parameters", {})[by_keyword[key].name] = v
    shared = {by_keyword[k].name: v for k, v in given.items() if not (by_keyword[k].per_model and isinstance(v, list))}
    recipe: dict[str, Any] = {"merge_method": method.name, "models": entries, "parameters": shared}
    if method.space is Space.DELTA:
        recipe["base_model"] = write_model(os.path.join(folder, "base"), more["base"])
    return recipe


def _shapes(method: Method) -> Mapping[str, tuple[int, ...]]:
    return WHOLE if method.scope is Scope.TENSOR else CUT


def _invariance(method: Method, folder: str) -> None:
    """The same bytes for any threads and memory, and in memory."""
    import stockpot
    from stockpot.engine.candidates import CheckpointCache, make_candidate

    count = counts(method)[-1]
    for n, given in enumerate(settings(method, count)):
        recipe = written(method, _shapes(method), count, given, os.path.join(folder, str(n)))
        outs = []
        ways = [(1, None), (3, None), *([(2, _tight(recipe))] if n == 0 else [])]
        for i, (threads, memory) in enumerate(ways):
            out = os.path.join(folder, f"{n}-out{i}")
            stockpot.merge(recipe, out, stockpot.Options(threads=threads, max_memory=memory))
            with open(os.path.join(out, "model.safetensors"), "rb") as f:
                outs.append(f.read())
        assert outs[0] == outs[1], f"{method.name} {given}: the bytes depend on the number of threads"
        assert outs[0] == outs[-1], f"{method.name} {given}: the bytes depend on the memory that it may take"
        planned = stockpot.plan(recipe)
        other = replace(planned, budget=replace(planned.budget, chunk=planned.budget.chunk // 4 * 3))
        candidate = make_candidate(other, CheckpointCache(2**30))
        disk = {t.name: outs[0][t.offset : t.offset + t.spec.nbytes] for t in planned.tensors}
        for name, (_, raw) in candidate.tensors.items():
            assert raw.tobytes() == disk[name], (
                f"{method.name} {given}: {name} differs in memory and on disk, or in blocks"
            )


def _tight(recipe: Mapping[str, Any]) -> int:
    """Memory for one worker and hardly more."""
    import stockpot

    planned = stockpot.plan(recipe, stockpot.Options(threads=1))
    return planned.budget.peak - planned.budget.hold + 2**20


def _budget(method: Method, folder: str) -> None:
    """The memory that a merge takes stays within what the plan says."""
    import stockpot

    count = counts(method)[-1]
    shapes = {"model.layers.0.mlp.weight": (900, 1100) if method.scope is Scope.TENSOR else (3000, 1500)}
    given = list(settings(method, count))[-1]
    recipe = written(method, shapes, count, given, folder)
    small = written(method, {"w": (20, 20)}, count, given, os.path.join(folder, "small"))
    stockpot.merge(small, os.path.join(folder, "first"))  # what is imported and set up once
    options = stockpot.Options(threads=1)
    planned = stockpot.plan(recipe, options)
    before = _resident_and_reset()
    stockpot.merge(recipe, os.path.join(folder, "out"), options)
    after = _high_water()
    if before is None or after is None:
        return  # no such counters on this system
    grown = after - before
    allowed = planned.budget.peak
    assert grown <= allowed, (
        f"{method.name}: a merge of {shapes} took {grown / 2**20:.0f} MiB, the plan says {allowed / 2**20:.0f}: "
        "declare a larger cost"
    )


def _resident_and_reset() -> int | None:
    """Resident memory now, from where the high-water mark counts anew."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _high_water() -> int | None:
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":")), None)
    except OSError:
        return None


def _kernels(method: Method, folder: str) -> None:
    """Compiled kernels and numpy give the same bytes."""
    import stockpot

    if load_kernels() is None:
        return
    count = counts(method)[-1]
    for n, given in enumerate(settings(method, count)):
        recipe = written(method, _shapes(method), count, given, os.path.join(folder, str(n)))
        outs: list[bytes] = []
        for i, plain in enumerate((False, True)):
            out = os.path.join(folder, f"{n}-out{i}")
            if plain:
                with numpy_only():
                    stockpot.merge(recipe, out)
            else:
                stockpot.merge(recipe, out)
            with open(os.path.join(out, "model.safetensors"), "rb") as f:
                outs.append(f.read())
        assert outs[0] == outs[1], f"{method.name} {given}: compiled kernels and the function differ"


def _device(method: Method, folder: str) -> None:
    """On torch the same but for rounding."""
    import stockpot

    try:
        import torch  # noqa: F401
    except ImportError:
        return
    count = counts(method)[-1]
    given = next(settings(method, count))
    recipe = written(method, WHOLE, count, given, folder)
    found = []
    for device in ("cpu", "torch"):
        out = os.path.join(folder, device)
        stockpot.merge(recipe, out, stockpot.Options(device=device))
        found.append(read_model(out))
    for name in WHOLE:
        close = np.allclose(found[0][name], found[1][name], rtol=0.02, atol=1e-4)
        assert close, f"{method.name}: {name} differs between numpy and torch"
