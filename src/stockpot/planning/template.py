"""What a merge puts out, whatever fills it: names, shapes, dtypes, config, and whose files lie beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stockpot.specs import DType, TensorSpec

if TYPE_CHECKING:
    from stockpot.planning.plan import Operand

__all__ = ["Slot", "Template"]


@dataclass(frozen=True)
class Slot:
    """A tensor of the output before it is known what is done to fill it. Every operand has its shape: what has another one
    is read through a view.

    spec    its shape, and the dtype in which `origin` has it
    origin  the tensor that it is taken from where nothing is merged into it
    depth   0 for the first layer to 1 for the last: what gradients go by
    layer   (stack, number), where it lies in numbered layers
    """

    name: str
    spec: TensorSpec
    origin: Operand
    depth: float
    layer: tuple[str, int] | None


@dataclass(frozen=True)
class Template:
    """The output without its bytes.

    kind       "model" or "adapter"
    specs      dtype and shape of every tensor by name, in the order of the files
    config     what config.json or adapter_config.json will say
    donor      the input whose config it is, and whose files lie beside
    tokenizer  the input whose tokenizer files are copied
    dtype      of all float tensors; None where they differ
    """

    kind: str
    specs: Mapping[str, TensorSpec] = field(repr=False)
    config: Mapping[str, Any]
    donor: int
    tokenizer: int
    dtype: DType | None = None
