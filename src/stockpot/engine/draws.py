"""Makes the random numbers that methods declare: for each element by its key and place alone (see masks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stockpot.engine.masks import MaskStream, mask_key
from stockpot.engine.units import Segment
from stockpot.statistics import Draw, Mask, Uniform

__all__ = ["draw"]

#: draws of another kind come from streams of their own
_KINDS = {"Uniform": "uniform 1", "Normal": "normal 1"}


def draw(
    declared: Draw, seed: int, places: Sequence[tuple[Segment, int, int]], keywords: Mapping[str, Any], block: Any,
    slot: dict[Any, Any], *, wide: bool,
) -> Any:  # fmt: skip
    """`[m, n]` for the elements start..stop of each segment, one after the other.

    block: what the method sees of them, for probabilities that depend on it.
    """
    stream = slot.get("masks")
    if stream is None:
        stream = slot["masks"] = MaskStream()
    m = len(places[0][0].tensor.operands)
    kept: Any = None
    if isinstance(declared, Mask):
        kept = declared.keep(block, **keywords).reshape(m, -1) if callable(declared.keep) else keywords[declared.keep]
    parts, at = [], 0
    for segment, start, stop in places:
        n = stop - start
        if isinstance(declared, Mask):
            of_these = kept[:, at : at + n] if callable(declared.keep) else kept
            parts.append(_mask(stream, seed, segment, start, n, of_these))
        else:
            parts.append(_numbers(declared, stream, seed, segment, start, n, wide=wide))
        at += n
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _mask(stream: MaskStream, seed: int, segment: Segment, start: int, n: int, kept: Any) -> Any:
    out = np.empty((len(segment.tensor.operands), n), np.bool_)
    for i, (operand, probability) in enumerate(zip(segment.tensor.operands, kept, strict=True)):
        key = mask_key(seed, operand.position, segment.tensor.name)
        if np.ndim(probability):
            stream.fill_each(key, probability, start, out[i])
        else:
            stream.fill(key, probability, start, out[i])
    return out


def _numbers(declared: Draw, stream: MaskStream, seed: int, segment: Segment, start: int, n: int, *, wide: bool) -> Any:
    operands = segment.tensor.operands
    out = np.empty((len(operands), n), np.float64 if wide else np.float32)
    for i, operand in enumerate(operands):
        kind = _KINDS[type(declared).__name__]
        key = mask_key(seed, operand.position, f"{kind}\0{segment.tensor.name}")
        if isinstance(declared, Uniform):
            stream.uniform(key, start, out[i])
        else:
            out[i] = normal(stream.words(key, start, n))
    return out


def normal(words: Any) -> Any:
    """64 random bits each -> standard normal float64, by the inverse of its distribution.

    Rational approximations (algorithm AS 241 of M. Wichura, 1988, exact to about 1e-16) out of single IEEE operations, logarithm
    included: the libraries' own may differ in the last bit from machine to machine.
    """
    p = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # never 0 or 1
    q = p - 0.5
    inside = np.abs(q) <= 0.425
    r = 0.180625 - q * q
    central = q * _ratio(r, _CENTRAL)
    tail = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
    near = _ratio(tail - 1.6, _NEAR)
    far = _ratio(tail - 5.0, _FAR)
    outer = np.where(tail <= 5.0, near, far)
    return np.where(inside, central, np.where(q < 0, -outer, outer))


def _ratio(x: Any, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    over, under = coefficients
    return _polynomial(x, over) / _polynomial(x, under)


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Highest power first."""
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total *= x
        total += c
    return total


def _log(x: Any) -> Any:
    """Natural logarithm of positive numbers: exponent, and 2 artanh of what is left, which lies within 0.172."""
    fraction, exponent = np.frexp(x)
    low = fraction < 0.7071067811865476
    fraction = np.where(low, fraction * 2.0, fraction)
    exponent = exponent - low
    z = (fraction - 1.0) / (fraction + 1.0)
    odd = tuple(1.0 / k for k in range(23, 0, -2))
    return exponent * 0.6931471805599453 + 2.0 * z * _polynomial(z * z, odd)


_CENTRAL = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077,
     687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_NEAR = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip
