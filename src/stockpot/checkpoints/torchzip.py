"""PyTorch's zip files (`.ckpt`, `.pt`, `.bin`): tensors' descriptions read from the pickle without running any of it.

The pickle's opcodes are followed by a reader that knows how tensors and plain containers are written and puts an inert
stand-in where the file names any other class or function: nothing is imported, nothing is called. Storages lie
uncompressed in the zip and are read positionally like those of safetensors.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.files import ByteFile, FileStream, LocalFile, stored_range
from stockpot.checkpoints.header import Entry, Header, check_name
from stockpot.checkpoints.opcodes import check_pickle
from stockpot.checkpoints.torchpickle import Inert, PickledTensor, TensorReader, Unreadable
from stockpot.errors import CheckpointError, LayoutError
from stockpot.specs import MOST_NAME, DType, TensorSpec

__all__ = ["TorchFile", "read_torch_file", "torch_file_of"]

_MAX_PICKLE = 64 * 2**20
#: entries of mappings and lists that are looked at
_MOST_VISITS = 2_000_000
#: keys that may lead to one and the same state dict
_MOST_WAYS = 1000
#: how deep in a document state dicts are looked for
_DEPTH = 8
#: keys under which trainers keep the model's tensors: the first that is there gives names of its own, other parts' names
#: begin with their keys
_STATES = ("state_dict", "model_state_dict", "model", "module", "params", "weights", "net")
#: what trainers keep beside them: tensors of theirs that are no weights
_TRAINING = re.compile(
    r"optim(izer)?s?(_states?|_state_dict)?|opt|(.*_)?lr_?schedulers?(_state_dict)?|schedulers?(_state_dict)?|"
    r"(.*_)?rng(_states?)?|random_states?|loops|callbacks|grad_scaler|scaler_state_dict|amp|hyper_parameters|averaging_state|"
    r"args|cfg|hparams|task_state|.*_optimizer(_state_dict|_states?)?|optimizer_.*|last_optimizer_state"
)


@dataclass(frozen=True)
class TorchFile:
    """`header` describes the model's tensors; `scalars` are the file's plain values (`global_step`, `epoch`...), `scores` what
    Lightning's ModelCheckpoint had monitored when it saved the file.
    """

    header: Header
    scalars: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)


def read_torch_file(path: str) -> TorchFile:
    """Read the descriptions of a zip file's tensors. Raises CheckpointError; executes nothing."""
    with contextlib.closing(LocalFile.open(path)) as file:
        return torch_file_of(file, path)


def torch_file_of(file: ByteFile, where: str) -> TorchFile:
    """The same of a file that is open; `where` is the path that the header will name."""
    path = file.label
    try:
        if file.read(0, 2) != b"PK":
            raise CheckpointError(
                f"{path}: not a zip file: either damaged, or saved by a torch older than 1.6; load it there and save it again"
            )
        places, pickled = _members(path, file)
    except OSError as e:
        raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OverflowError,
        struct.error,
    ) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a readable zip file: {e}; an interrupted save?") from e
    try:
        check_pickle(pickled)
        document = TensorReader(io.BytesIO(pickled)).load()
    except Exception as e:  # whatever a damaged pickle leads to
        raise CheckpointError(f"{path}: its pickle can't be read: {type(e).__name__}: {e}") from e
    if not isinstance(document, dict):
        what = "an object (a module, pickled whole?)" if isinstance(document, Inert) else type(document).__name__
        raise LayoutError(
            f"{path}: expected a mapping from names to tensors, got {what}; save a state_dict: "
            "torch.save(model.state_dict(), FILE)"
        )
    found = _States(path, document)
    tensors = found.tensors
    if not tensors:
        raise LayoutError(f"{path}: {_why_empty(document)}")
    entries, strides = {}, {}
    for name, tensor in tensors.items():
        entries[name] = _entry(path, name, tensor, places)
        order = _axes(tensor)
        if order != tuple(range(len(order))):
            strides[name] = order
    scalars = {
        k: v
        for k, v in document.items()
        if isinstance(k, str) and isinstance(v, (int, float, str)) and not isinstance(v, bool)
    }
    header = Header(
        where,
        file.size,
        file.stamp,
        0,
        entries,
        {},
        pickled,
        file.inode,
        strides=strides,
        parts=found.parts,
        members=found.members,
        left=tuple(found.left),
    )
    return TorchFile(header, scalars, _scores(path, document, file, places))


def _members(path: str, file: ByteFile) -> tuple[dict[str, tuple[int, int]], bytes]:
    """({storage: byte range}, the pickle)."""
    with zipfile.ZipFile(io.BufferedReader(FileStream(file))) as archive:
        found = [i for i in archive.infolist() if i.filename.endswith("/data.pkl") or i.filename == "data.pkl"]
        if len(found) != 1:
            raise CheckpointError(f"{path}: a zip file, but not one that torch.save writes (no data.pkl)")
        root = found[0].filename[: -len("data.pkl")]
        counts = Counter(i.filename for i in archive.infolist())
        twice = next((n for n, count in counts.items() if count > 1), None)
        if twice is not None:
            raise CheckpointError(f"{path}: has {twice[:80]!r} twice: which of them counts, readers don't agree on")
        if min(i.header_offset for i in archive.infolist()) > 0:
            raise CheckpointError(f"{path}: something stands before the zip file in it, which torch does not take")
        places = {}
        for info in archive.infolist():
            if not info.filename.startswith(root):
                continue
            places[info.filename[len(root) :]] = stored_range(file, info)
        sizes = {name: stop - start for name, (start, stop) in places.items()}
        if sizes["data.pkl"] > _MAX_PICKLE:
            raise CheckpointError(f"{path}: its pickle of {sizes['data.pkl']} bytes is too large")
        if "byteorder" in places and (sizes["byteorder"] > 64 or archive.read(root + "byteorder").strip() != b"little"):
            raise CheckpointError(f"{path}: not written on a little-endian machine, which is not supported")
        data = {name[len("data/") :]: place for name, place in places.items() if name.startswith("data/")}
        return data, archive.read(found[0])


def _scores(
    path: str, document: Mapping[Any, Any], file: ByteFile, places: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """`current_score` of every callback that monitors something."""
    found = {}
    callbacks = document.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict):
            continue
        name, score = state.get("monitor"), state.get("current_score")
        kind = {DType.F32: "<f", DType.F64: "<d"}
        if (
            not isinstance(name, str)
            or not isinstance(score, PickledTensor)
            or score.shape
            or score.storage.dtype not in kind
        ):
            continue
        with contextlib.suppress(CheckpointError):  # a damaged score is none
            entry = _entry(path, name[:80], score, places)
            found[name] = float(struct.unpack(kind[score.storage.dtype], file.read(entry.start, entry.stop))[0])
    return found


class _States:
    """The state dicts of a document: one, or several as the parts of a model.

    tensors  by name; parts  what the names of a part begin with; members  its names; left  what holds tensors and is no weight
    """

    def __init__(self, path: str, document: dict[Any, Any]) -> None:
        self.path = path
        self.tensors: dict[str, PickledTensor] = {}
        self.parts: dict[str, str] = {}
        self.members: dict[str, frozenset[str]] = {}
        self.left: list[str] = []
        self.visits = 0
        self.ways: Counter[int] = Counter()  # by state dict, the keys that lead to it
        self.said = 0  # state dicts found, and what is left out
        self.barren: dict[int, int] = {}  # containers in which nothing was found, and how deep they lay then
        states: dict[str, Mapping[Any, Any]] = {"": document} if self.direct(document) else {}
        states |= self.states(document, "", {})
        main = next((k for k in _STATES if k in states), "" if "" in states else None)
        if len(states) == 1:
            main = next(iter(states))
        for key, state in states.items():
            prefix = "" if key == main or not key else f"{key}."
            self.parts[key] = prefix
            self.members[key] = frozenset(self.take(key, prefix, state, beside=not key and main != ""))

    def take(self, key: str, prefix: str, state: Mapping[Any, Any], *, beside: bool) -> Iterator[str]:
        """The tensors of a state dict under their names; these. beside: they lie beside the state dicts of a trainer's file,
        where single numbers are the trainer's.
        """
        for own, tensor in state.items():
            name = f"{prefix}{own}"
            if isinstance(tensor, (Unreadable, PickledTensor)):
                check_name(name, self.path)
            if isinstance(tensor, Unreadable):
                raise CheckpointError(f"{self.path}: tensor {name!r}: of a kind that can't be read ({tensor.how})")
            if not isinstance(tensor, PickledTensor):
                if isinstance(tensor, Inert) and key:
                    self.left.append(f"{name} (no tensor, but an object of python)")
                continue
            if beside and not tensor.shape:
                self.left.append(f"{name} (a number of the trainer's)")
                continue
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: two of its parts have a tensor {name!r}")
            self.tensors[name] = tensor
            yield name

    def visit(self, count: int) -> None:
        """Raise CheckpointError where entries are looked at for ever: containers may hold one another many times."""
        self.visits += count
        if self.visits > _MOST_VISITS:
            raise CheckpointError(
                f"{self.path}: its mappings and lists hold more than {_MOST_VISITS} entries, one in another"
            )

    def holds_tensors(self, value: Any, depth: int = 12) -> bool:
        """Whether there is a tensor somewhere in a value."""
        if isinstance(value, PickledTensor):
            return True
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        self.visit(len(inner))
        return depth > 0 and any(self.holds_tensors(v, depth - 1) for v in inner)

    @staticmethod
    def direct(found: Mapping[Any, Any]) -> bool:
        """Whether a mapping is a state dict itself."""
        return any(isinstance(v, (PickledTensor, Unreadable)) for v in found.values())

    def states(
        self, found: Mapping[Any, Any], at: str, out: dict[str, Mapping[Any, Any]]
    ) -> dict[str, Mapping[Any, Any]]:
        """The state dicts below a mapping, put into `out` by the keys that lead to them; entries of lists by their numbers."""
        self.visit(len(found))
        for key, value in found.items():
            if isinstance(key, str) and len(key) > MOST_NAME:
                raise CheckpointError(f"{self.path}: a key of {len(key)} characters ({key[:40]!r}...)")
            where = f"{at}{key}"
            depth, own = where.count("."), id(value)  # which stays its own: the document holds it
            if self.barren.get(own, depth + 1) <= depth:
                continue
            if isinstance(value, (list, tuple)):
                self.visit(len(value))
                value = dict(enumerate(value))
            elif (
                isinstance(value, Inert)
                and not isinstance(value, Unreadable)
                and where in (*_STATES, "ema", "model_ema")
            ):
                self.said += 1
                self.left.append(f"{where} (a pickled module)")
            if not isinstance(value, dict):
                continue
            if "param_groups" in value or (isinstance(key, str) and _TRAINING.fullmatch(key)):
                if self.holds_tensors(value):
                    self.said += 1
                    self.left.append(f"{where} (training state)")
                continue
            before = self.said
            if self.direct(value):
                self.said += 1
                out[where] = value
                self.ways[id(value)] += 1  # all are held by the document; those made of lists here by `out`
                if self.ways[id(value)] > _MOST_WAYS:
                    raise CheckpointError(
                        f"{self.path}: holds one state dict under more than {_MOST_WAYS} keys, the last {where[:200]!r}"
                    )
            if depth < _DEPTH:
                self.states(value, f"{where}.", out)
            elif self.holds_tensors(value):
                self.said += 1
                self.left.append(f"{where} (too deep)")
            if self.said == before:
                self.barren[own] = depth
        return out


def _why_empty(document: Mapping[Any, Any]) -> str:
    modules = [k for k, v in document.items() if isinstance(v, Inert) and k in (*_STATES, "ema", "model")]
    if modules:
        return (
            f"{modules[0]!r} is a pickled module, as ultralytics saves it, not a state_dict; load it with the code that made it "
            f"and save its tensors: torch.save({{'state_dict': checkpoint[{modules[0]!r}].state_dict()}}, FILE)"
        )
    return f"holds no tensors by name; it has {', '.join(map(str, list(document)[:8]))}"


def _axes(tensor: PickledTensor) -> tuple[int, ...]:
    """The axes in the order in which elements lie: the outermost first."""
    wide = [i for i, size in enumerate(tensor.shape) if size > 1]
    order = iter(sorted(wide, key=lambda i: (-tensor.stride[i], i)))
    return tuple(next(order) if size > 1 else i for i, size in enumerate(tensor.shape))


def _entry(path: str, name: str, tensor: PickledTensor, places: Mapping[str, tuple[int, int]]) -> Entry:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {why}")

    dtype = tensor.storage.dtype
    if dtype is None:
        raise bad("its dtype is not supported")
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(tensor.shape) != len(tensor.stride):
        raise bad("its shape, stride or offset makes no sense")
    if tensor.storage.key not in places:
        raise bad(f"its storage {tensor.storage.key!r} is not in the file")
    spec = TensorSpec(dtype, tensor.shape)
    expected = 1
    for axis in reversed(_axes(tensor)):  # dense, if perhaps in another order: channels_last, a transposed matrix
        size, stride = tensor.shape[axis], tensor.stride[axis]
        if size > 1 and stride != expected and spec.numel:
            raise LayoutError(f"{path}: tensor {name!r}: is not contiguous; save it with .contiguous()")
        expected *= size
    start, stop = places[tensor.storage.key]
    first = start + tensor.offset * dtype.itemsize
    if first + spec.nbytes > stop:
        raise bad("runs past the end of its storage")
    return Entry(spec, first, first + spec.nbytes)
