"""What every statistic must do: the same value however the data is cut, merged, ordered and sent about."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stockpot.statistics import Known, Statistic
from stockpot.statistics.base import EXTENTS
from stockpot.testing.checks import Check

__all__ = ["gathered", "statistic_checks"]

_PIECE = 2**16


def gathered(stat: Statistic, block: Any, params: Mapping[str, Any], cut: int, *, shuffle: int | None = None) -> Any:
    """The value over a block `[m, n]` that comes in blocks of `cut` elements, in a random order where one is given.

    Of an ordered statistic each block stands for a piece, so that `cut` must not vary.
    """
    m, n = block.shape
    seek = stat.start(params, m, n, {})
    for _ in range(64):
        if isinstance(seek, Known):
            return seek.value
        parts = [
            (at, pickle.loads(pickle.dumps(stat.fold(seek, block[:, at : at + cut].copy(), dict(params)))))
            for at in range(0, n, cut)
        ]
        if shuffle is not None:
            random.Random(shuffle).shuffle(parts)
        if stat.ordered:
            parts.sort(key=lambda pair: pair[0])
        total = None
        for _, part in parts:
            total = part if total is None else stat.merge(seek, total, part)
        seek = stat.finish(pickle.loads(pickle.dumps(seek)), total)
    raise AssertionError(f"statistic {stat.name!r} is not known after 64 passes")


def statistic_checks(
    stat: Statistic, params: Mapping[str, Any], *, models: int = 3, oracle: Callable[[Any], Any] | None = None
) -> list[Check]:
    """Everything that must hold of a statistic with these parameters, of blocks of so many models.

    oracle  the definition: a block `[m, n]` of float32 -> the value
    """
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((models, 3 * _PIECE + 1001)) * 0.01).astype(np.float32)

    def same(a: Any, b: Any) -> bool:
        return np.array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), equal_nan=True)

    def pickles(folder: str) -> None:
        assert pickle.loads(pickle.dumps(stat)) == stat

    def extents(folder: str) -> None:
        assert stat.extent(params) in stat.extents
        assert set(stat.extents) <= set(EXTENTS)

    def order(folder: str) -> None:
        plain = gathered(stat, block, params, _PIECE)
        for seed in range(3):
            assert same(plain, gathered(stat, block, params, _PIECE, shuffle=seed)), "depends on the order of blocks"

    def cuts(folder: str) -> None:
        if stat.ordered:
            return  # its pieces are cut by the tensor's shape alone
        plain = gathered(stat, block, params, _PIECE)
        for cut in (1000, 4097, block.shape[1]):
            assert same(plain, gathered(stat, block, params, cut)), f"depends on the size of blocks: {cut}"

    def sample(folder: str) -> None:
        if not stat.samples:
            return
        m, n = block.shape
        for guess in (block[:, ::50], block[:, :500] * 1e-3, block[:, :500] * 1e3):
            seek = stat.start(params, m, n, {})
            if isinstance(seek, Known):
                return
            seek = stat.suggest(seek, stat.seen(guess, dict(params)))
            while not isinstance(seek, Known):
                seek = stat.finish(seek, stat.fold(seek, block, dict(params)))
            assert same(seek.value, gathered(stat, block, params, _PIECE)), "depends on the sample"

    def nothing(folder: str) -> None:
        seek = stat.start(params, models, 0, {})
        if not isinstance(seek, Known):
            seek = stat.finish(seek, None)
        assert isinstance(seek, Known), "is not known of no elements"

    def small(folder: str) -> None:
        short = block[:, :777]
        value = stat.at_once(short, params, dict(params))
        assert value is None or same(value, gathered(stat, short, params, 777)), "the short way gives another value"

    def rows(folder: str) -> None:
        if "row" not in stat.extents:
            return
        shaped = block[:, : 60 * 50].reshape(models, 60, 50)
        found = np.asarray(stat.of_rows(shaped, params, dict(params)))
        assert found.shape[-2:] == (60, 1), f"of rows: {found.shape}, expected [..., rows, 1]"
        for r in (0, 17, 59):
            alone = np.asarray(gathered(stat, shaped[:, r].copy(), params, 50))
            assert np.allclose(found[..., r, 0], alone, rtol=1e-6, atol=1e-12, equal_nan=True), (
                "a row's own value differs"
            )

    def definition(folder: str) -> None:
        if oracle is not None:
            found, expected = np.asarray(gathered(stat, block, params, _PIECE)), np.asarray(oracle(block))
            assert np.allclose(found, expected, rtol=1e-9, atol=0), f"{found}, expected {expected}"

    named = {
        "pickles": pickles, "extents": extents, "order of blocks": order, "size of blocks": cuts, "sample": sample,
        "no elements": nothing, "small": small, "rows": rows, "definition": definition,
    }  # fmt: skip
    return [Check(name, run) for name, run in named.items()]
