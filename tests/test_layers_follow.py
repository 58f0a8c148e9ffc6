"""A config that follows layers: every way in which configs speak of them, said again for other layers, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import stockpot
from stockpot.checkpoints.meaning.architectures import default_of, list_rule_of, part_types
from stockpot.checkpoints.meaning.depth import Pick, _kinds_there, config_parts, describing_part, follow, hidden_layers
from stockpot.errors import MismatchError

TAKEN = [0, 2, 3, 3]


def followed(
    config: dict[str, Any], taken: list[int], layers: int = 4, stack: str = "model.layers", kinds: str = ""
) -> dict[str, Any]:
    found = describing_part(config, stack, layers)
    _, part, kind = found if found is not None else ("", config, None)
    own = hidden_layers(config, stack, layers)
    picks = [Pick(part, own, i, kind, tuple(kinds or "a" * layers), "./m") for i in taken]
    return follow(config, stack, layers, picks)


def base(**more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 4, **more}


SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "entries": ({"layer_types": list("abcd")}, {"layer_types": list("acdd")}),
    "entries that nobody described": ({"my_layer_scales": [1, 2, 3, 4]}, {"my_layer_scales": [1, 3, 4, 4]}),
    "ropes": ({"no_rope_layers": [1, 1, 0, 1]}, {"no_rope_layers": [1, 0, 1, 1]}),
    "positions": ({"full_attn_idxs": [0, 3]}, {"full_attn_idxs": [0, 2, 3]}),
    "positions from the end": ({"global_attn_indexes": [-1]}, {"global_attn_indexes": [2, 3]}),
    "positions that are gone": ({"cross_attention_layers": [1]}, {"cross_attention_layers": []}),
    "letters": ({"hybrid_override_pattern": "M*-E"}, {"hybrid_override_pattern": "M-EE"}),
    "runs": ({"attention_types": [[["g", "l"], 2]]}, {"attention_types": [[["g", "g", "l", "l"], 1]]}),
    "by number": ({"per_layer_config": {"2": {"x": 1}}}, {"per_layer_config": {"1": {"x": 1}}}),
    "dense by position": (
        {"mlp_only_layers": [2], "decoder_sparse_step": 1}, {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "sparse by steps": (
        {"mlp_only_layers": [], "decoder_sparse_step": 2}, {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1}),
    "dense first": ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, {"first_k_dense_replace": 1, "moe_layer_freq": 1}),
    "dense first, fewer": ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
    "sparse by a list": ({"first_k_dense_replace": 0, "moe_layer_freq": [0, 1, 1, 0]}, {"moe_layer_freq": [0, 1, 0, 0]}),
    "dense layers": ({"num_dense_layers": 2}, {"num_dense_layers": 1}),
    "shared from the end": ({"num_kv_shared_layers": 1}, {"num_kv_shared_layers": 2}),
    "windows": (
        {"model_type": "qwen2", "max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]}),
    "an interval": ({"interleave_moe_layer_step": 4}, {"moe_layers": [2, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_said_again(case: str) -> None:
    given, wanted = SAID[case]
    found = followed(base(**given), TAKEN)
    assert found["num_hidden_layers"] == 4
    assert {k: found[k] for k in wanted} == wanted


@pytest.mark.parametrize("case", SAID)
def test_nothing_changes_where_nothing_changed(case: str) -> None:
    config = base(**SAID[case][0])
    assert followed(config, [0, 1, 2, 3]) == config


PERIODS: list[tuple[dict[str, int], list[int], dict[str, int] | None]] = [
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 1], {"attn_layer_period": 2, "attn_layer_offset": 1}),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 2, 3], {"attn_layer_period": 2, "attn_layer_offset": 0}),
    ({"attn_layer_period": 4, "attn_layer_offset": 2}, [2], {"attn_layer_period": 1, "attn_layer_offset": 0}),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 1, 1, 2], None),
    (
        {"expert_layer_period": 2, "expert_layer_offset": 0},
        [1, 2],
        {"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
]


@pytest.mark.parametrize(("given", "taken", "wanted"), PERIODS)
def test_periods(given: dict[str, int], taken: list[int], wanted: dict[str, int] | None) -> None:
    if wanted is None:
        with pytest.raises(MismatchError, match=r"of another kind than attn_layer_period can say"):
            followed(base(**given), taken)
        return
    found = followed(base(**given), taken)
    assert found["num_hidden_layers"] == len(taken)
    period, offset = (found[k] for k in wanted)
    old_period, old_offset = given.values()
    assert [i % period == offset for i in range(len(taken))] == [i % old_period == old_offset for i in taken]


def test_intervals_that_begin_with_the_first_layer() -> None:
    config = base(global_attn_every_n_layers=2)
    assert followed(config, [0, 1])["global_attn_every_n_layers"] == 2
    assert followed(config, [0, 2])["global_attn_every_n_layers"] == 1
    for taken in ([1, 2], [0, 2, 3, 3]):
        with pytest.raises(MismatchError, match="global_attn_every_n_layers"):
            followed(config, taken)


def test_what_cannot_be_said_is_refused_with_the_layer() -> None:
    with pytest.raises(
        MismatchError, match=r"layer 3 of the output is layer 0 of ./m, of another kind than first_k_dense"
    ):
        followed(base(first_k_dense_replace=1), [0, 1, 2, 0])
    with pytest.raises(MismatchError, match="num_dense_layers"):
        followed(base(num_dense_layers=1), [1, 0])
    with pytest.raises(MismatchError, match="num_kv_shared_layers"):
        followed(base(num_kv_shared_layers=1), [3, 0])


def test_a_list_says_what_a_prefix_cannot() -> None:
    """Of a type that takes `mlp_layer_types`."""
    assert list_rule_of("exaone_moe", "mlp_layer_types")
    found = followed(base(model_type="exaone_moe", first_k_dense_replace=1), [0, 1, 2, 0])
    assert found["mlp_layer_types"] == ["dense", "sparse", "sparse", "dense"]


def test_defaults_that_the_file_leaves_out_are_written() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"num_hidden_layers": 2}}
    assert default_of("llama", "num_hidden_layers") == 32
    found = followed(config, list(range(20)), 32, "language_model.model.layers")
    assert found["text_config"]["num_hidden_layers"] == 20
    assert found["vision_config"] == {"num_hidden_layers": 2}
    # Gemma 2's windows, which old files leave out
    found = followed({"model_type": "gemma2", "num_hidden_layers": 4}, [1, 2, 3])
    assert found["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert "layer_types" not in followed({"model_type": "gemma2", "num_hidden_layers": 4}, [0, 1])
    # an interval of its own
    found = followed({"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window_pattern": 2}, [1, 2, 3])
    assert found["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    found = followed({"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 3}, [2, 3])
    assert found["no_rope_layers"] == [0, 1]


def test_the_type_of_a_part_that_does_not_say_it() -> None:
    assert part_types("llava")["text_config"] == "llama"
    parts = {path: kind for path, _, kind in config_parts({"model_type": "llava", "text_config": {}})}
    assert parts == {"": "llava", "text_config": "llama"}


def test_the_stack_that_is_meant() -> None:
    config = {
        "num_hidden_layers": 4,
        "text_config": {"num_hidden_layers": 4},
        "vision_config": {"num_hidden_layers": 4},
        "quantization_config": {"num_hidden_layers": 4},
    }
    found = followed(config, [0, 1], stack="model.language_model.layers")
    assert (found["num_hidden_layers"], found["text_config"]["num_hidden_layers"]) == (2, 2)
    assert found["vision_config"]["num_hidden_layers"] == 4
    found = followed(config, [0, 1], stack="vision_tower.encoder.layers")
    assert found["text_config"]["num_hidden_layers"] == 4
    assert found["vision_config"]["num_hidden_layers"] == 2
    # one side of an encoder and a decoder
    both = {"encoder_layers": 4, "decoder_layers": 4}
    assert followed(both, [0], stack="model.decoder.layers") == {"encoder_layers": 4, "decoder_layers": 1}
    assert followed(both, [0], stack="model.encoder.layers") == {"encoder_layers": 1, "decoder_layers": 4}


def test_a_stack_that_sees_is_not_what_the_text_config_speaks_of() -> None:
    config = {"num_hidden_layers": 4, "vision_config": {"width": 3}}
    with pytest.raises(MismatchError, match=r"does not say how many layers 'vision.layers' has \(it has 4\)"):
        followed(config, [0, 1], stack="vision.layers")
    assert followed(config, [0, 1, 2, 3], stack="vision.layers") == config


def test_layers_for_further_tokens_are_not_the_models() -> None:
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    assert hidden_layers(config, "model.layers", 4) == 3
    assert hidden_layers(config, "model.layers", 3) == 3
    assert followed(config, [0, 2]) == {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}


def test_layers_that_only_their_tensors_tell_apart() -> None:
    first, last, middle = "xaaa", "aaax", "axaxa"
    followed(base(), [0, 1, 2], kinds=first)
    followed(base(), [0, 1, 1], kinds=first)
    for taken in ([1, 2, 3], [0, 1, 0]):
        with pytest.raises(MismatchError, match="nothing that is known of the config says"):
            followed(base(), taken, kinds=first)
    followed(base(), [1, 2, 3], kinds=last)
    followed(base(), [0, 1, 2, 2, 3], kinds=last)
    with pytest.raises(MismatchError, match=r"layer 2 of the output is layer 2 of ./m, whose tensors"):
        followed(base(), [0, 1, 2], kinds=last)
    with pytest.raises(MismatchError, match="nothing that is known"):
        followed({"num_hidden_layers": 5}, [0, 1, 2, 3], 5, kinds=middle)
    # what the config tells apart may go anywhere
    found = followed(base(layer_types=["m", "a", "m", "a"]), [1, 0], kinds="xyxy")
    assert found["layer_types"] == ["a", "m"]


def test_what_depends_on_a_number_in_an_unknown_way() -> None:
    """Windows of a type whose rule nobody knows, lists that are worked out otherwise: layers stay, or it is refused."""
    for config in (
        {"model_type": "qwen2_moe", "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"model_type": "olmo_hybrid", "num_hidden_layers": 4},
    ):
        assert followed(config, [0, 1])["num_hidden_layers"] == 2
        with pytest.raises(MismatchError, match="layer_types"):
            followed(config, [1, 2])
    # windows of a size that is not given are none
    silent = {"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
    assert "layer_types" not in followed(silent | {"sliding_window": None}, [1, 2, 3])


def test_a_config_that_is_silent_beside_one_that_speaks() -> None:
    one, two = base(layer_types=list("aabb")), base()
    picks = [Pick(one, 4, 0, None, ("k",) * 4), Pick(two, 4, 0, None, ("k",) * 4, "./two")]
    with pytest.raises(
        MismatchError, match=r"layer 1 .* is layer 0 of ./two, whose config does not say .* layer_types"
    ):
        follow(one, "model.layers", 4, picks)


def test_layers_of_another_model_with_another_config() -> None:
    """Kinds come from the config of the model that a layer is taken from."""
    one, two = base(layer_types=list("aabb")), base(layer_types=list("cccc"))
    picks = [Pick(one, 4, 3, None, ("k",) * 4), Pick(two, 4, 0, None, ("k",) * 4)]
    assert follow(one, "model.layers", 4, picks)["layer_types"] == ["b", "c"]


def test_a_list_that_a_type_insists_on() -> None:
    """Gemma 4's last layer sees all, whatever the list says."""
    config = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    }
    with pytest.raises(MismatchError, match="layer_types"):
        followed(config, [0, 1, 2])
    assert followed(config, [1, 2, 3])["layer_types"][-1] == "full_attention"


def test_rules_of_lists_are_those_of_transformers() -> None:
    """What a type works out from the number of layers, for every type whose config can be made."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from stockpot.checkpoints.meaning.layer_rules import _entries_of

    seen = 0
    for model_type in CONFIG_MAPPING_NAMES:
        if list_rule_of(model_type, "layer_types") is None:
            continue
        for n in (3, 7, 11):
            try:
                made = CONFIG_MAPPING[model_type](num_hidden_layers=n).to_dict()["layer_types"]
            except Exception:
                continue
            assert _entries_of({}, model_type, "layer_types", n) == list(made), model_type
            seen += 1
    assert seen > 100


def test_layers_that_compute_with_their_number_are_said_to_move(tmp_path: Path) -> None:
    tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16, scale_attn_by_inverse_layer_idx=True
        )
    ).save_pretrained(tmp_path / "m")

    def notes(first: int) -> tuple[str, ...]:
        pieces = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": [first, 3]}]}]
        return stockpot.plan({"merge_method": "passthrough", "slices": pieces}).notes

    assert any("compute with their own number" in n for n in notes(1))
    assert not any("compute with their own number" in n for n in notes(0))


def test_which_of_two_layers_is_the_odd_one_can_t_be_told() -> None:
    """Whatever order a set of the two happens to have."""
    for i in range(40):
        assert _kinds_there([f"a{i}", f"b{i}"], 1, 3) == set()
        assert _kinds_there([f"a{i}", f"b{i}"], 0, 2) == {f"a{i}"}
        pairs = [f"a{i}", f"a{i}", f"b{i}", f"b{i}"]
        assert [_kinds_there(pairs, at, 5) for at in range(1, 4)] == [{f"a{i}"}, set(), {f"b{i}"}]
        assert _kinds_there([f"a{i}", f"b{i}", f"c{i}"], 1, 3) == {f"b{i}"}
    assert _kinds_there(["odd", "usual", "usual"], 2, 5) == {"usual"}
    assert _kinds_there(["usual", "usual", "odd"], 4, 5) == {"odd"}
