"""Layouts that are whole and foreign: shards that trainers leave, other frameworks' files. Each is refused by name, with the
way out; what is empty because its weights lie elsewhere is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.header import Header
from stockpot.errors import LayoutError

__all__ = ["check_foreign", "check_sharded", "check_whole", "foreign_file", "looks_sharded"]

_ZERO = (
    "DeepSpeed ZeRO shards, which have to be gathered first: `python zero_to_fp32.py . gathered` in that directory (the script "
    "lies in it), then name `gathered`; training with stage3_gather_16bit_weights_on_model_save saves whole weights"
)
_FSDP = (
    "FSDP shards (a distributed checkpoint of torch), which have to be gathered first: `accelerate merge-weights {there} "
    "gathered`, or `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {there} gathered.pt`"
)
_VERL = (
    "one rank's shards of verl each, which have to be gathered first: `python -m verl.model_merger merge --backend fsdp "
    "--local_dir {there} --target_dir gathered`"
)
_MEGATRON = "a Megatron checkpoint, which has to be converted first: Megatron-Bridge's `export_ckpt` writes transformers' format"
_META = (
    "a model in Meta's own layout, cut over several ranks, which has to be converted first: transformers' "
    "convert_llama_weights_to_hf.py"
)
_ORBAX = "an Orbax checkpoint of JAX, which has to be converted first: restore it with orbax and save it with safetensors.flax"
_FLAX = (
    "weights of Flax, which have to be converted first: load them with a transformers of 4.x, `from_pretrained(..., "
    "from_flax=True)`, and save_pretrained()"
)
_TENSORFLOW = (
    "weights of TensorFlow, which have to be converted first: load them with a transformers of 4.x, `from_pretrained(..., "
    "from_tf=True)`, and save_pretrained()"
)
_NEMO = (
    "a NeMo archive (a tar of model_weights.ckpt and model_config.yaml): unpack it, `tar -xf FILE`, and name the "
    "model_weights.ckpt in it"
)
_NPZ = (
    "numpy's archive of arrays, as old MLX models have it; save it as safetensors first: "
    "`safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')`"
)
_ONNX = "an ONNX graph, which is compiled for inference; merge the model that it was exported from"
_MLX_ADAPTER = (
    "an adapter of MLX, whose factors lie the other way round; fuse it with `mlx_lm.fuse` and merge the fused models"
)
_FAIRSEQ = (
    "shards of fairseq, which have to be joined first: fairseq.checkpoint_utils.load_model_ensemble([FILE without -shard0], "
    "num_shards=N) loads them, and torch.save(models[0].state_dict(), 'model.pt') saves the whole"
)
_NEMO_FOLDER = (
    "a NeMo 2 checkpoint (weights/ and context/), which has to be exported first: `nemo llm export` with target hf"
)

#: a file by its name
_FILES: tuple[tuple[str, str], ...] = (
    (r".*\.nemo", _NEMO),
    (r".*\.npz", _NPZ),
    (r".*\.msgpack", _FLAX),
    (r".*\.(h5|tflite|pb|index)", _TENSORFLOW),
    (r".*\.onnx", _ONNX),
    (r".*\.distcp", _FSDP),
    (r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+.*_(model|optim)_states\.pt", _ZERO),
    (r"mp_rank_\d+_model_states\.pt", _ZERO),
    (r"model_world_size_\d+_rank_\d+\.pt", _VERL),
    (r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin", _FSDP),
    (r".*(-shard\d+|-model_part-\d+)\.pt", _FAIRSEQ),
)
#: a directory by the names in it, and what in it is meant
_FOLDERS: tuple[tuple[str, str], ...] = (
    (r"zero_to_fp32\.py", _ZERO),
    (r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+.*_states\.pt", _ZERO),
    (r"mp_rank_\d+_model_states\.pt", _ZERO),
    (r"pytorch_model_fsdp(_\d+)?", _FSDP),
    (r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin", _FSDP),
    (r"model_world_size_\d+_rank_\d+\.pt", _VERL),
    (r"latest_checkpointed_iteration\.txt|mp_rank_\d+(_\d+)*|common\.pt", _MEGATRON),
    (r"_CHECKPOINT_METADATA|manifest\.ocdbt", _ORBAX),
    (r"\.metadata", _FSDP),
    (r"consolidated\.0[1-9]\.pth", _META),
    (r"__\d+_\d+\.distcp", _FSDP),
    (r"flax_model\.msgpack(\.index\.json)?", _FLAX),
    (r"tf_model\.h5(\.index\.json)?|saved_model\.pb|.*\.ckpt\.index", _TENSORFLOW),
    (r".*(-shard\d+|-model_part-\d+)\.pt", _FAIRSEQ),
    (r".*\.nemo", _NEMO),
    (r"weights\.npz", _NPZ),
    (r"adapters\.(npz|safetensors)", _MLX_ADAPTER),
)


class Listed(Protocol):
    """What a directory has to offer to be recognised."""

    text: str
    names: list[str]

    def listing(self, name: str) -> list[str]: ...


def foreign_file(name: str) -> str | None:
    """What a file is, in words with the way out, where its name says that it is foreign."""
    return next((why for pattern, why in _FILES if re.fullmatch(pattern, name)), None)


def check_foreign(folder: Listed) -> None:
    """Raise LayoutError where a directory without weights of its own is a layout that is known."""
    why = _foreign(folder.names)
    if why is not None:
        name, how = why
        there = f"{folder.text}/{name}" if re.fullmatch(r"pytorch_model_fsdp(_\d+)?", name) else folder.text
        raise LayoutError(f"{folder.text}: {how.replace('{there}', there)}")
    if {"context", "weights"} <= set(folder.names) and ".metadata" in folder.listing("weights"):
        raise LayoutError(f"{folder.text}: {_NEMO_FOLDER}")
    for name in folder.names:  # global_step100/, actor/, iter_0000100/: the shards one level down
        if re.fullmatch(r"(global_step|iter_)\d+|actor|release|model|dist_ckpt|checkpoint", name):
            inner = _foreign(folder.listing(name))
            if inner is not None:
                raise LayoutError(f"{folder.text}: {inner[1].replace('{there}', f'{folder.text}/{name}')}")


def _foreign(names: Sequence[str]) -> tuple[str, str] | None:
    for pattern, why in _FOLDERS:
        for name in names:
            if re.fullmatch(pattern, name):
                return name, why
    return None


def looks_sharded(names: Sequence[str]) -> bool:
    """Whether a directory has the shards of a trainer beside whatever else is in it."""
    return any(re.fullmatch(r"(global_step|iter_)\d+|zero_to_fp32\.py|pytorch_model_fsdp_\d+", n) for n in names)


def check_whole(checkpoint: Checkpoint, listing: Callable[[], Sequence[str]]) -> None:
    """Raise LayoutError for shells whose weights lie elsewhere, and for one rank's part of each tensor."""
    check_sharded(checkpoint.ref, [checkpoint.relative(h) for h in checkpoint.files], checkpoint.files)
    # gathering leaves [0], a last rank's shards have no rows; a model's own tensor may have a width of nothing (MobileBERT)
    specs = ((n, checkpoint.spec(n)) for n in checkpoint.names())
    shapes = {n: spec.shape for n, spec in specs if spec.shape[:1] == (0,) and spec.dtype.is_float}
    empty = list(shapes) if (0,) in shapes.values() or 10 * len(shapes) >= len(checkpoint) else []
    if empty:
        way = _ZERO if looks_sharded(listing()) else (
            "its weights were gathered elsewhere, as ZeRO-3 and FSDP do: gather them before saving (accelerator.get_state_dict, "
            "stage3_gather_16bit_weights_on_model_save), or convert the trainer's shards: `python zero_to_fp32.py . gathered`"
        )  # fmt: skip
        raise LayoutError(
            f"{checkpoint.ref}: an empty shell: {len(empty)} of {len(checkpoint)} tensors have no elements, such as "
            f"{empty[0]!r}: {way}"
        )


def check_sharded(ref: str, names: Sequence[str], headers: Sequence[Header]) -> None:
    """Raise LayoutError where files hold one rank's part of each tensor."""
    for name, header in zip(names, headers, strict=True):
        if "DCP_SHARDING_INFO" in header.metadata:
            raise LayoutError(
                f"{ref}: {name} holds one rank's part of each tensor (DCP_SHARDING_INFO in its header); save with "
                "enable_consolidation=True, or join them: "
                "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files(DIR, OUT)"
            )
