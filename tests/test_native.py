"""The compiled kernels against the numpy code: the same bytes, whatever the numbers."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from blake3 import blake3

from stockpot.checkpoints.codecs import decode_into, encode_into
from stockpot.engine.masks import MaskStream, mask_key
from stockpot.engine.native import LIBRARY, Block, Stream, load_kernels, numpy_only
from stockpot.methods import get_method, methods
from stockpot.methods.forms import Form
from stockpot.specs import DType
from stockpot.statistics.order import Window, tally
from stockpot.statistics.sums import gram_terms, piece_sum

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    65504.0,
    65520.0,
    70000.0,
    -70000.0,
    6e-8,
    3e-8,
    2.9e-8,
    1e-40,
    3.4e38,
    np.inf,
    -np.inf,
    np.nan,
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def without_kernels():
    def call(function, *args, **kwargs):
        with numpy_only():
            return function(*args, **kwargs)

    return call


@pytest.fixture(params=[0, 1, 2])
def instructions(request):
    """With at most these instructions: 0 common ones, 1 AVX2, 2 AVX-512 (or what of them the processor has)."""
    kernels = load_kernels()
    assert kernels is not None
    kernels.allow(request.param)
    yield
    kernels.allow(2)


def test_kernels_are_built_where_there_is_a_compiler():
    if shutil.which("cc") is None or sys.platform == "win32":
        pytest.skip("no C compiler")
    assert load_kernels() is not None, f"{LIBRARY} is missing: install stockpot again"


def test_switched_off():
    code = "from stockpot.engine.native import load_kernels; assert load_kernels() is None"
    subprocess.run([sys.executable, "-c", code], check=True, env={"STOCKPOT_NATIVE": "0", "PATH": ""})


def models(count: int, dtype: torch.dtype, *, special: bool, seed: int) -> list[dict[str, torch.Tensor]]:
    """A base and `count` models near it, of several sizes; deltas of bf16 tie often."""
    rng = np.random.default_rng(seed)
    out = []
    shapes = {"w": (301, 67), "long": (3, 70001), "one": (1,), "none": (0, 4), "tiny": (5, 3)}
    base = {name: rng.normal(size=shape) * 0.02 for name, shape in shapes.items()}
    for i in range(count + 1):
        made = {}
        for name, shape in shapes.items():
            value = base[name] + (rng.normal(size=shape) * 0.002 if i else 0)
            if special and name == "w":
                for row in range(20):
                    value[row, : len(SPECIAL)] = rng.permutation(SPECIAL)
            made[name] = torch.from_numpy(np.array(value)).to(dtype)
        out.append(made)
    return out


def variants():
    for method in methods().values():
        if method.form is None:
            continue
        for dialect in method.dialects or (None,):
            for case, given in CASES.get(method.name, {"plain": {}}).items():
                yield pytest.param(
                    method.name,
                    {**given, **({"dialect": dialect} if dialect else {})},
                    id=f"{method.name}-{dialect}-{case}",
                )


WEIGHTED = {"plain": {}, "weights": {"weight": [0.3, 1.0, -0.7]}, "shared": {"weight": 0.4}}
CASES = {
    "linear": WEIGHTED,
    "task_arithmetic": {**WEIGHTED, "lambda": {"weight": [0.2, 0.9, 0.1], "scale": 0.3, "normalize": True}},
    "slerp": {"half": {"t": 0.5}, "end": {"t": 1.0}},
    "ties": {
        "half": {"density": 0.5},
        "weights": {"density": [0.2, 0.5, 1.0], "weight": [0.3, 0.3001, -0.1]},
        "negative": {"density": 0.3, "weight": -1.0},
        "shared": {"density": 0.3, "weight": 0.4, "scale": 0.7},
        "sum": {"density": 0.5, "weight": [1.0, 0.5, 0.25], "normalize": False},
        "rescale": {"density": 0.5, "rescale": True},
        "nothing": {"density": [0.0, 0.5, 0.5]},
    },
    "dare_linear": {"half": {"density": 0.5}, "odd": {"density": [0.3, 0.71, 1.0], "weight": [0.3, 1.0, 0.5]}},
    "dare_ties": {
        "half": {"density": 0.5},
        "odd": {"density": [0.3, 0.71, 0.0], "weight": [0.3, 1.0, 0.5], "normalize": True, "scale": 1.5},
        "unscaled": {"density": 0.4, "rescale": False},
    },
    "lm_cocktail": {"losses": {"loss": [0.5, 2.0, 9.0]}, "resilient": {"loss": [0.5, 2.0, 9.0], "alpha": 0.4}},
    "sce": {"half": {"select_topk": 0.5}, "few": {"select_topk": 0.05}, "none": {"select_topk": 1e-9}},
    "passthrough": {"plain": {}, "scaled": {"scale": 0.5}},
}


@pytest.mark.parametrize(("name", "given"), list(variants()))
@pytest.mark.parametrize(
    ("dtype", "instructions"),
    [(d, most) for d in DTYPES for most in ((0, 1, 2) if d.itemsize == 2 else (2,))],  # fused.inc is for float32
    indirect=["instructions"],
    ids=str,
)
@pytest.mark.parametrize("special", [False, True], ids=["numbers", "special"])
def test_same_bytes_as_numpy(name, given, dtype, instructions, special, without_kernels):
    method = get_method(name)
    count = 3 if method.models[1] is None else method.models[1]
    base, *experts = models(count, dtype, special=special, seed=len(name))
    keywords = {"base": base} if method.space.value == "delta" else {}
    compiled = method(experts, **keywords, **given)
    plain = without_kernels(method, experts, **keywords, **given)
    for key in base:
        a, b = compiled[key], plain[key]
        same = a.view(torch.uint8) == b.view(torch.uint8) if a.numel() else torch.tensor(True)
        odd = torch.isnan(a) & torch.isnan(b)  # which NaN comes of two NaNs is the processor's choice
        assert bool((same.reshape(*a.shape, -1).all(-1) | odd).all()) if a.numel() else True, key


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("count", [13, 32, 33])
def test_many_models_settle_close_elections_alike(count, without_kernels):
    rng = np.random.default_rng(3)
    base = {"w": torch.zeros(40, 500, dtype=torch.bfloat16)}
    experts = [
        {"w": torch.from_numpy(rng.integers(-3, 4, (40, 500)) * 2.0**-9).to(torch.bfloat16)} for _ in range(count)
    ]
    weight = [float(w) for w in rng.choice([0.1, 0.3, 0.7], count)]
    ties = get_method("ties")
    a = ties(experts, base=base, weight=weight, density=0.8)
    b = without_kernels(ties, experts, base=base, weight=weight, density=0.8)
    assert torch.equal(a["w"], b["w"])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_beyond_float32_elect_alike(dtype, without_kernels):
    """A weighted sum that overflows float32 but not float64: the sign is that of the exact sum, by kernels and by numpy."""
    top = 3e38 if dtype is torch.bfloat16 else 6e4
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (6, 40, 50))
    base = {"w": torch.zeros(40, 50, dtype=dtype)}
    experts = [{"w": torch.from_numpy(s * top).to(dtype)} for s in signs]
    ties = get_method("ties")
    for given in (
        {"weight": [1.0, 1.1, 0.9, 1.3, 0.7, 1.2]},
        {"weight": [1e30, 1e30, 1.0, 1.0, 1.0, 2.0] if dtype is torch.float16 else [2.0, 2.0, 1.0, 1.0, 3.0, 1.5]},
        {"weight": [1.0, 1.1, 0.9, 1.3, 0.7, 1.2], "normalize": False},
        {"weight": [1.0, 1.1, 0.9, 1.3, 0.7, 1.2], "dialect": "peft", "density": 1.0},
    ):
        a = ties(experts, base=base, **given)["w"]
        b = without_kernels(ties, experts, base=base, **given)["w"]
        odd = torch.isnan(a) & torch.isnan(b)
        assert bool(((a.view(torch.int16) == b.view(torch.int16)) | odd).all()), given
        if "dialect" not in given:
            mass = sum(w * s for w, s in zip(given["weight"], signs))
            clear = abs(mass) > 1e-9
            assert np.array_equal(np.signbit(a.float().numpy()[clear]), mass[clear] < 0)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_16_bit_pattern_is_read_and_written_as_numpy_does(dtype):
    kernels = load_kernels()
    assert kernels is not None
    raw = np.arange(2**16, dtype=np.uint16)
    block = Block(2**16, [raw.view(np.uint8).data], [dtype], None, False)
    expected = np.empty(2**16, np.float32)
    decode_into(raw.data, dtype, expected)
    found = kernels.deltas(block, [0], 2**16)[0]
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(found[~numbers]).all()


@pytest.mark.usefixtures("instructions")
def test_rounding_to_16_bits_is_numpys():
    kernels = load_kernels()
    assert kernels is not None
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32), np.arange(0, 2**32, 65521, np.uint32)]
    )
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)].astype(np.float64)
    ties = (finite[:-1] + finite[1:]) / 2
    values = np.concatenate([bits.view(np.float32), ties.astype(np.float32)])
    for dtype in (DType.F16, DType.BF16):
        expected, found = bytearray(2 * len(values)), bytearray(2 * len(values))
        encode_into(values.copy(), dtype, memoryview(expected))
        block = Block(len(values), [values.view(np.uint8).data], [DType.F32], None, False)
        kernels.combine(block, Form((1.0,), scale=1.0), None, memoryview(found), dtype)
        a, b = np.frombuffer(expected, np.uint16), np.frombuffer(found, np.uint16)
        zero = (a & 0x7FFF) == 0  # x + 0 makes a zero positive
        assert np.array_equal(a[~zero & ~np.isnan(values)], b[~zero & ~np.isnan(values)])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("models", [1, 2, 3, 7])
@pytest.mark.parametrize("delta", [False, True])
def test_sums_are_numpys_to_the_last_bit(n, models, delta):
    kernels = load_kernels()
    assert kernels is not None
    rng = np.random.default_rng(n)
    rows = np.stack([rng.normal(size=n).astype(np.float32) for _ in range(models)])
    base = rng.normal(size=n).astype(np.float32)
    given = (base.view(np.uint8).data, DType.F32) if delta else None
    block = Block(n, [r.view(np.uint8).data for r in rows], [DType.F32] * models, given, False)
    start = np.arange(1.0, models * (models + 1) // 2 + 1)
    expected = piece_sum(gram_terms(rows - base if delta else rows), start)
    assert np.array_equal(kernels.totals("gram", block, None, None, start), expected)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("window", [(0, 2**31), (1, 2**31), (0, 5), (7, 7), (0x3C000000, 0x3F000000)])
def test_splits_are_numpys(window):
    kernels = load_kernels()
    assert kernels is not None
    row = np.concatenate([np.random.default_rng(1).normal(size=5000).astype(np.float32), np.float32(SPECIAL)])
    block = Block(len(row), [row.view(np.uint8).data], [DType.F32], None, False)
    (below, inside), passed_over = kernels.split(
        Block(len(row), [block.raws[0]] * 2, [DType.F32] * 2, None, False), [window, None]
    )
    with numpy_only():
        expected = tally(Window(len(row), 0, *window), abs(row))
    assert below == expected.below
    assert np.array_equal(inside, expected.held[0])
    assert passed_over[0] == 0
    assert len(passed_over[1]) == 0


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 100_000])
def test_ranks_are_numpys(n):
    kernels = load_kernels()
    assert kernels is not None
    rng = np.random.default_rng(n)
    for values in (
        rng.integers(0, 2**32, n, dtype=np.uint32),
        rng.normal(size=n).astype(np.float32).view(np.uint32) >> 16 << 16,
        rng.integers(2**31 - 2, 2**31 + 3, n, dtype=np.uint32),
        np.full(n, 7, np.uint32),
    ):
        ordered = np.sort(values)
        before = values.copy()
        for rank in {0, n // 3, n // 2, n - 1}:
            assert kernels.select(values, rank) == ordered[rank]
        assert np.array_equal(values, before)


CHUNKS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1024]


@pytest.mark.usefixtures("instructions")
def test_transfers_see_what_their_parts_see(tmp_path):
    """Digests are those of the blake3 package whatever the length of a piece, measures those of `measure`."""
    kernels = load_kernels()
    assert kernels is not None
    if not kernels.transfers:
        pytest.skip("only for AVX2 and up")
    sizes = [0, 1, 63, 64, 65, 511, 512, 513, *(512 * c + more for c in CHUNKS for more in (-1, 0, 1))]
    pieces = [0, *itertools.accumulate(sizes)]
    edges = pieces[::7] + pieces[-1:]
    n = pieces[-1]
    wholes = [np.random.default_rng(i).normal(size=n).astype(np.float16).tobytes() for i in range(3)]
    (tmp_path / "files").write_bytes(b"".join(wholes))
    with open(tmp_path / "files", "rb") as f:
        cuts = [
            [(0, 2 * n)],
            [(2 * n, 3000), (2 * n + 3000, 2 * n - 3000)],
            [(4 * n + a, 2) for a in range(0, 2 * n, 2)],
        ]
        raws = [bytearray(2 * n) for _ in wholes]
        streams = [
            Stream(raw, dtype, [(f.fileno(), at, size) for at, size in cut])
            for raw, dtype, cut in zip(raws, [DType.F16, DType.BF16, DType.I16], cuts, strict=True)
        ]
        found = kernels.transfer(streams, pieces, edges, look=True, write=False)
        assert found is not None
        assert list(map(bytes, raws)) == wholes
        for whole, stream, (digests, measures) in zip(wholes, streams, found, strict=True):
            assert digests == [blake3(whole[2 * a : 2 * b]).digest() for a, b in itertools.pairwise(pieces)]
            known = [] if stream.dtype is DType.I16 else list(kernels.measure(stream.raw, stream.dtype, edges))
            assert measures == known
        assert kernels.transfer(streams, pieces, edges, look=False, write=False) == []
        past = [Stream(bytearray(2 * n), DType.F16, [(f.fileno(), 4 * n + 1, 2 * n)])]
        assert kernels.transfer(past, pieces, edges, look=True, write=False) is None
    with open(tmp_path / "copy", "wb") as f:
        backwards = [
            Stream(raw, s.dtype, [(f.fileno(), at, size) for _, at, size in s.extents])
            for raw, s in zip(raws, streams, strict=True)
        ]
        assert kernels.transfer(backwards, pieces, edges, look=True, write=True) == found
        f.flush()
        assert (tmp_path / "copy").read_bytes() == b"".join(wholes)
    with open(tmp_path / "copy", "rb") as f:
        refused = [Stream(raws[0], DType.F16, [(f.fileno(), 0, 2 * n)])]
        assert kernels.transfer(refused, pieces, edges, look=True, write=True) is None


@pytest.mark.parametrize("density", [0.5, 0.25, 0.3, 0.0001, 0.9999, 1 / 256, 1e-30])
@pytest.mark.parametrize("start", [0, 1, 31, 32, 12345, 2**40 + 7])
def test_masks_are_numpys(density, start):
    drawn = []
    for switched_off in (False, True):
        stream = MaskStream()
        if switched_off:
            stream._kernels = None
        out = np.empty(10_007, np.bool_)
        stream.fill(mask_key(3, 1, "layer.weight"), density, start, out)
        drawn.append(out)
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (7, 41), (2, 70_000), (0, 5), (5, 0), (4, 3, 300)])
def test_ranks_in_rows(shape: tuple[int, ...]) -> None:
    from stockpot.methods.arrays import row_ranks

    sizes = np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    for x in (sizes, np.minimum(sizes, 1), np.zeros_like(sizes)):
        assert row_ranks(x).tolist() == np.argsort(np.argsort(x, axis=-1, kind="stable"), axis=-1).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (7, 41), (2, 70_000), (0, 5), (5, 0), (4, 300)])
def test_pruned_rows_are_numpy_s(shape: tuple[int, ...], inverse: bool, dtype: type) -> None:
    from stockpot.methods.pruned import _magpruned

    rng = np.random.default_rng(0)
    delta = rng.standard_normal((4, *shape)).astype(dtype)
    delta[1] = np.round(delta[1])  # ties, zeros of both signs
    uniform = rng.random(delta.shape).astype(dtype)
    given = (delta, uniform, (0.5, 0.3, 0.0, 1.0), (0.2, 0.1, 0.1, 0.1), inverse)
    assert load_kernels() is not None
    with numpy_only():
        plain = _magpruned(*given)
    found = _magpruned(*given)
    assert found.tobytes() == plain.tobytes()


def test_chances_of_ranks_that_float32_can_not_hold() -> None:
    """In a row of more than 2^24 elements."""
    from stockpot.methods.pruned import magprune_probabilities

    n = 2**24 + 4096
    delta = np.arange(1, n + 1, dtype=np.uint32).view(np.float32)[None]  # in order
    kernels = load_kernels()
    assert kernels is not None
    kept, chance = np.empty_like(delta), magprune_probabilities(delta[None], (0.5,), (0.15,))[0]
    for uniform, expected in ((chance, 0), (np.nextafter(chance, np.float32(0)), n)):
        kernels.prune(delta, uniform, 0.35, 0.3 / (n - 1), False, kept)
        assert np.count_nonzero(kept.view(np.uint32)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (1, 2), (3, 10), (4, 4), (7, 1001), (5, 0), (10**12 + 1, 2077)])
def test_uniform_numbers_are_numpy_s(start: int, n: int, dtype: type) -> None:
    key = mask_key(3, 1, "w")
    found, plain, one = np.empty(n, dtype), np.empty(n, dtype), np.empty(1, dtype)
    MaskStream().uniform(key, start, found)
    with numpy_only():
        MaskStream().uniform(key, start, plain)
    assert found.tolist() == plain.tolist()
    for i in range(0, n, 7):  # each by its place alone
        MaskStream().uniform(key, start + i, one)
        assert one[0] == found[i]
    if n > 2000:
        assert found.min() >= 0
        assert found.max() < 1
        assert abs(found.mean() - 0.5) < 0.03
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.08


@pytest.mark.parametrize(("start", "n"), [(0, 1), (1, 2), (3, 10), (4, 4), (7, 1001), (5, 0), (10**12 + 1, 77)])
def test_words_of_a_stream_are_numpy_s(start: int, n: int) -> None:
    key = mask_key(3, 1, "w")
    compiled = MaskStream().words(key, start, n)
    with numpy_only():
        plain = MaskStream().words(key, start, n)
    assert compiled.tolist() == plain.tolist()
    assert len(compiled) == n


def test_elements_that_sce_passes_over_count_in_its_mean() -> None:
    """Squares of what is selected over all elements: below 1e-6 here, and above it over the selected ones alone."""
    rng = np.random.default_rng(0)
    models = [{"w": (scale * rng.standard_normal(60_000)).astype(np.float32)} for scale in (1e-3, 3e-4)]
    given = {"base": {"w": np.zeros(60_000, np.float32)}, "select_topk": 0.05, "dialect": "mergekit"}
    method = get_method("sce")
    found = method(models, **given)["w"]
    with numpy_only():
        plain = method(models, **given)["w"]
    assert found.tobytes() == plain.tobytes()
    a, b = (m["w"] for m in models)
    opposed = (found != 0) & (a * b > 0)  # signs agree: the uniform mean
    assert opposed.sum() > 100
    assert np.allclose(found[opposed], (a + b)[opposed] / 2, rtol=1e-5)
