"""Where a tensor of a file stands in memory: what transformers renames and puts together as it loads a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stockpot.checkpoints.meaning.architectures import Rename

__all__ = ["Piece", "pieces_of", "without_wrappers"]

#: what wrappers of modules put into names, wherever a wrapped module stands
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: how tensors are put together in memory, by the operations that transformers names
_STACKED = {("MergeModulelist",), ("MergeModulelist", "Concatenate 1")}


#: characters of a name that patterns are tried on: some of them take the square of it in steps
_LONGEST = 256


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """({name: the name without what torch.compile, FSDP, DDP put in}, what that was)."""
    names = list(names)
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    found = sorted({w for name in names for w in _WRAPPERS.findall(name)})
    while names and all(n.startswith("module.") for n in plain.values() if n != "n_averaged"):
        plain = {name: n.removeprefix("module.") for name, n in plain.items()}
        found.append("module.")
        if not any(n.startswith("module.") for n in plain.values()):
            break
    return plain, " and ".join(repr(f) for f in dict.fromkeys(found))


@dataclass(frozen=True)
class Piece:
    """A tensor of memory, or one part of one that is put together: numbers of an expert, of a projection. None: of an
    operation that is known by name only; index: which of its sources it is then.
    """

    key: str
    part: tuple[int, ...] | None = ()
    how: str = ""
    index: tuple[int | None, int] = (None, 0)


def pieces_of(name: str, renames: Sequence[Rename], prefix: str) -> list[Piece]:
    """Where a file's tensor stands in memory: whole, as a part of one, or several of them one after the other."""
    if len(name) > _LONGEST:
        return [Piece(name)]
    for rename in renames:
        if not rename.operations:
            found = rename.applied(name, prefix)
            name = name if found is None else found[0]
    for rename in renames:
        found = rename.applied(name, prefix) if rename.operations else None
        if found is None:
            continue
        new, which, number = found
        how = tuple(rename.operations)
        if how in _STACKED and number is not None:
            return [Piece(new, (number, which))]
        if how == ("Concatenate",) and len(rename.targets) == 1:
            return [Piece(new, (which,))]
        if how == ("Chunk",) and len(rename.sources) == 1:
            first = rename.targets[0]
            return [Piece(new.replace(first, target, 1)) for target in rename.targets]
        return [
            Piece(new, None, f"{' and '.join(o.split()[0] for o in how)} of {rename.sources[which]}", (number, which))
        ]
    return [Piece(name)]
