"""Damaged and malicious files: no crash, no hang, no allocation beyond the file, no path outside the directory."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import TARGETS, attack

EXAMPLES = int(os.environ.get("STOCKPOT_FUZZ_EXAMPLES", "150"))

#: pieces that are worth putting in: numbers at the edges, ways out of a directory, opcodes, YAML's special characters
PIECES = [
    b"\x00", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b"[[[[", b"{", b"../",
    b"/etc/passwd", b"..\\", b'"a.weight"', b"data_offsets", b"[0,18446744073709551615]", b"cos\nsystem\n",
    b"\x80\x04\x95", b"R.", b"PK\x01\x02",
    b"&a", b"*a", b"<<: ", b"!!python/name:os.system ", b"? ", b"\t", b"\r\n", b"\xc3\x28", b"\xf0\x9f\x8d\xb2", b"\\ud800",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """A real file with a few places overwritten, cut out, doubled or filled in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        span = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["byte", "cut", "drop", "double", "piece", "replace"]))
        if kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "double":
            data[at:at] = data[at : at + span * 8]
        elif kind == "piece":
            data[at:at] = draw(st.sampled_from(PIECES))
        else:
            piece = draw(st.sampled_from(PIECES))
            data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_untouched_files_are_read(name):
    attack(name, TARGETS[name][0])
    if name != "recipe":  # which is wrong in places, so that all of the parser is reached
        TARGETS[name][1](TARGETS[name][0])


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name):
    @settings(max_examples=EXAMPLES, deadline=2000, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(TARGETS[name][0]))
    def run(data: bytes) -> None:
        attack(name, data)

    run()
