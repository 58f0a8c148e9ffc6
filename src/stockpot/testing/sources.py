"""What everything that tensors are read from must do: files, computed checkpoints, views."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.testing.checks import Check

__all__ = ["source_checks"]


def source_checks(
    make: Callable[[], TensorSource], *, arrive: Callable[[Any], None] = lambda source: None
) -> list[Check]:
    """Everything that must hold of a source; make opens it anew; arrive makes one readable that was pickled."""

    def whole(source: TensorSource, name: str) -> bytes:
        spec = source.spec(name)
        raw = bytearray(spec.nbytes)
        source.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
        return bytes(raw)

    def names(folder: str) -> None:
        source = make()
        listed = list(source.names())
        assert listed, "no tensors"
        assert len(set(listed)) == len(listed), "a name twice"
        assert listed == list(make().names()), "another order the second time"
        for name in listed:
            spec = source.spec(name)
            assert spec.nbytes == spec.numel * spec.dtype.itemsize
            assert make().spec(name) == spec, f"{name}: another spec the second time"
        try:
            source.spec("a name that no tensor has")
        except KeyError:
            return
        raise AssertionError("spec of an unknown name: expected KeyError")

    def ranges(folder: str) -> None:
        """Any range has the bytes that it has in the whole, alone or with others."""
        source = make()
        rng = random.Random(0)
        for name in source.names():
            data, spec = whole(source, name), source.spec(name)
            size = spec.dtype.itemsize
            for _ in range(12):
                start = rng.randint(0, spec.numel)
                stop = rng.randint(start, spec.numel)
                raw = bytearray((stop - start) * size)
                source.will_read(ReadRequest(name, start, stop))
                source.read([ReadRequest(name, start, stop)], memoryview(raw))
                assert raw == data[start * size : stop * size], (
                    f"{name}: elements {start} to {stop} differ from the whole"
                )
        wanted = [ReadRequest(n, 0, source.spec(n).numel) for n in source.names()]
        raw = bytearray(sum(source.spec(r.name).nbytes for r in wanted))
        source.read(wanted, memoryview(raw))
        assert raw == b"".join(whole(source, r.name) for r in wanted), "several requests in one call: other bytes"

    def again(folder: str) -> None:
        one, two = make(), make()
        for name in one.names():
            assert whole(one, name) == whole(two, name), f"{name}: other bytes the second time"

    def threads(folder: str) -> None:
        source = make()
        listed = list(source.names())
        alone = {name: whole(source, name) for name in listed}
        with ThreadPoolExecutor(8) as pool:
            for name, raw in zip(listed * 4, pool.map(lambda n: whole(source, n), listed * 4)):
                assert raw == alone[name], f"{name}: other bytes when several threads read"

    def extents(folder: str) -> None:
        """Where it says where its bytes lie, they lie there; what it says a tensor is, it is."""
        import os

        source = make()
        for name in source.names():
            spec, data = source.spec(name), whole(source, name)
            places = source.extents([ReadRequest(name, 0, spec.numel)])
            if places is not None:
                found = b"".join(os.pread(fd, size, offset) for fd, offset, size in places)
                assert found == data, f"{name}: its extents hold other bytes"
            at = source.place(name, unseen=True)
            if at is not None:
                assert os.pread(at[0], spec.nbytes, at[1]) == data, f"{name}: other bytes lie at its place"
            origin = source.origin(name)
            if origin is not None:
                assert whole(origin.source, origin.name) == data, f"{name}: its origin has other bytes"

    def costs(folder: str) -> None:
        """What it says of itself can be planned with."""
        source = make()
        for name in source.names():
            assert source.written(name).is_float == source.spec(name).dtype.is_float, f"{name}: written as another kind"
        assert min(source.resident, source.scratch_itemsize, source.download_bytes) >= 0
        assert source.pieces_at_once >= 1
        assert source.changed() is None, "changed although nothing happened"
        for part in source.parts:
            assert not part.parts, "parts lie on disk: none is computed itself"

    def travelling(folder: str) -> None:
        """A plan that it is part of may be run by another process."""
        import pickle

        source = make()
        sent = pickle.loads(pickle.dumps(source))
        arrive(sent)
        for name in source.names():
            assert whole(sent, name) == whole(source, name), f"{name}: other bytes after travelling"

    def closing(folder: str) -> None:
        source = make()
        name = next(iter(source.names()))
        before = whole(source, name)
        source.close()
        source.close()
        assert whole(source, name) == before, "reading after closing must open again"
        source.close()

    named = {
        "names and specs": names, "ranges": ranges, "same bytes again": again, "threads": threads, "extents": extents,
        "costs": costs, "travelling": travelling, "closing": closing,
    }  # fmt: skip
    return [Check(name, run) for name, run in named.items()]
