"""Every decoder of the installed transformers that can be made tiny: saved, merged, loaded again, and right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny

TYPES = tiny.causal_types()


@pytest.mark.parametrize("name", sorted(TYPES))
def test_two_are_averaged(tmp_path: Path, name: str) -> None:
    cls, config = TYPES[name]
    try:
        model, first, second = tiny.saved_pair(cls, config, tmp_path)
    except Exception as e:
        pytest.skip(f"can't be made tiny: {type(e).__name__}: {str(e)[:100]}")
    assert not tiny.wrong_with(cls, tmp_path, first, second)
    before = tiny.outputs(model)
    if before is None:
        return
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_((first[key].double() + second[key].double()) / 2)
    made = tiny.outputs(cls.from_pretrained(tmp_path / "out", dtype=torch.float32).eval())  # type: ignore[attr-defined]
    wanted = tiny.outputs(model)
    assert made is not None
    assert wanted is not None
    assert torch.allclose(made, wanted, atol=1e-3)


def test_there_are_enough_of_them() -> None:
    assert len(TYPES) > 100
