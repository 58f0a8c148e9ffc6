"""What a statistic is: a value that is folded block by block, in any number of processes, before elements are combined.

    seek = stat.start(params, models, count, known)       # Known(value) where nothing need be read
    part = stat.fold(seek, block, keywords, so_far)       # of one block; picklable
    total = stat.merge(seek, total, part)
    seek = stat.finish(seek, total)                       # Known(value), or what the next pass looks for

A seek, a part and a statistic are plain values that pickle. Where the order of additions shows in the last bit (`ordered`),
parts are of one piece of a tensor each (see stockpot.grid) and are merged in the order of tensors and pieces; other statistics
are the same in any order. Both ways the value depends on neither blocks, threads nor machine.

A statistic is a keyword argument of the method's function. Those of a method are gathered in the order in which it declares
them, and a later one may use an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

__all__ = ["EXTENTS", "Extent", "Known", "Over", "Params", "Statistic"]

#: over what one value holds, from narrow to wide: a row (the last axis), a tensor, all tensors of a numbered layer, all that
#: share their parameters, all that a method is used for
Extent = Literal["row", "tensor", "layer", "group", "model"]
EXTENTS: tuple[Extent, ...] = ("row", "tensor", "layer", "group", "model")
Params = Mapping[str, Any]
Over = Extent | Callable[[Params], Extent]


@dataclass(frozen=True)
class Known:
    """What `start` and `finish` give when nothing more need be read."""

    value: Any


class Statistic:
    """The contract of all statistics; see the module. Subclasses are frozen dataclasses.

    name   the keyword under which the function gets the value
    over   the extent, or a function of the parameters that gives it
    when   whether these parameters need it; the function gets `absent` where they do not
    compiled  which kernel does what its function does, to the same bytes; None: none
    """

    name: str
    over: Over
    when: Callable[[Params], bool] | None
    compiled: str | None = None
    #: whether parts must be merged in the order of tensors and pieces
    ordered: ClassVar[bool] = False
    #: the extents that it can be gathered over
    extents: ClassVar[tuple[Extent, ...]] = ("tensor", "layer", "group", "model")

    def extent(self, params: Params) -> Extent:
        """Over what one value holds, with these parameters."""
        return self.over(params) if callable(self.over) else self.over

    def needed(self, params: Params) -> bool:
        """Whether it must be gathered at all."""
        return self.when is None or self.when(params)

    @property
    def samples(self) -> bool:
        """Whether `suggest` narrows the first pass by a sample."""
        return False

    @property
    def of_block(self) -> bool:
        """Whether it looks at the elements as they are, not at what a function of its own makes of them."""
        return getattr(self, "of", None) is None

    def matters(self, params: Params) -> Any:
        """What of the parameters decides `start`: tensors may share one value only where this is equal."""
        return None

    def refers_to(self) -> tuple[str, ...]:
        """Names of the method's parameters that it looks up by itself."""
        return ()

    def absent(self, models: int, params: Params) -> Any:
        """The value where it is not needed."""
        return None

    def scratch(self, models: int) -> int:
        """Numbers of 8 bytes that `fold` needs for each element of a block."""
        return 2 * models

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        """What the first pass over `count` elements looks for. known: earlier statistics by name."""
        raise NotImplementedError

    def seen(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        """What of a block `[m, ...]` it looks at, `[k, n]`, for `suggest` to see of a few elements: the block as it is."""
        return block.reshape(len(block), -1)

    def suggest(self, seek: Any, sample: Any) -> Any:
        """A seek narrowed by a sample `[k, n]` of what it looks at; the value does not depend on it."""
        return seek

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        """What a block `[m, n]` contributes. Of an ordered statistic, added to `so_far`, the same piece's blocks before it."""
        raise NotImplementedError

    def terms(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        """Of an ordered statistic what is added up, `[k, ...]` for a block `[m, ...]`: `fold` is `piece_sum` of it."""
        raise NotImplementedError

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        """Two parts as one. May use up `a`."""
        raise NotImplementedError

    def finish(self, seek: Any, total: Any) -> Any:
        """After a whole pass: Known, or the next seek. total: None where there was nothing to fold."""
        raise NotImplementedError

    def at_once(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        """The value of a small block `[m, n]` that is all there is, where that is cheaper than start, fold, finish; else None."""
        return None

    def of_rows(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        """Each row's own value, for a block `[m, rows, n]`: what broadcasts over it, `[m, rows, 1]` as a rule."""
        raise NotImplementedError
