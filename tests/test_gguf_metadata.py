"""Keys of a GGUF file that change the arithmetic are honoured, or refused by their name and value."""

import json

import pytest
import transformers

import hybrimoe
from gguf_models import assert_computes, assert_refused, load, logits_of, nmse, qwen2, qwen3, write
from hybrimoe.cli.main import main

# What is honoured.


@pytest.mark.parametrize(
    ("build", "stated", "computed"),
    [
        (qwen3, None, True),
        (qwen3, True, True),
        (qwen3, False, False),
        (qwen2, None, False),
        (qwen2, True, True),
    ],
)
def test_the_weights_of_experts_are_normalised_as_the_file_or_its_kind_says(
    build, stated, computed, tmp_path
):
    """llama.cpp always normalises those of qwen3moe, and never those of qwen2moe."""
    model = build(norm_topk_prob=computed)
    loaded = assert_computes(write(tmp_path, model, expert_weights_norm=stated), model)
    assert loaded.config.norm_topk_prob == computed


@pytest.mark.parametrize(
    ("rope", "values"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 128},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
             "attention_factor": 1.5 * 1.1386294361, "beta_fast": 16.0, "beta_slow": 2.0},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.5,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        ),
        (
            {"rope_type": "linear", "factor": 2.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        ),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scaling.factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}),
        ({"rope_type": "default", "rope_theta": 10000.0}, {"rope.freq_base": None}),
        ({"rope_type": "default", "rope_theta": 5e5}, {}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("has_config", [False, True])
def test_rotary_embeddings_are_scaled_as_the_file_says(rope, values, has_config, tmp_path):
    model = qwen3(rope_parameters={"rope_theta": 10000.0, **rope})
    folder = write(tmp_path, model, **values)
    if has_config:
        model.config.save_pretrained(folder)
    assert_computes(folder, model)


def test_a_config_json_of_quantized_files_says_nothing_of_the_gguf_file(tmp_path):
    model = qwen3()
    folder = write(tmp_path, model)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    said = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    assert_computes(folder, model)


def test_what_is_not_in_the_file_is_what_llama_cpp_takes_for_it(tmp_path):
    model = qwen3(num_key_value_heads=4, head_dim=16)
    left_out = (
        "attention.head_count_kv", "attention.key_length", "expert_count", "vocab_size",
        "embedding_length", "context_length", "feed_forward_length",
    )  # fmt: skip
    assert_computes(write(tmp_path, model, **dict.fromkeys(left_out)), model)


def test_numbers_may_be_repeated_for_every_layer(tmp_path):
    model = qwen3()
    values = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2]}
    assert_computes(write(tmp_path, model, **values), model)


NEUTRAL = {
    "expert_weights_scale": 1.0, "expert_gating_func": 1, "expert_group_count": 1,
    "expert_group_used_count": 1, "expert_shared_count": 0, "expert_feed_forward_length": 32,
    "leading_dense_block_count": 0, "interleave_moe_layer_step": 1, "attention.value_length": 16,
    "attention.scale": 0.25, "attention.sliding_window": 0, "attention.causal": True,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0, "logit_scale": 1.0, "embedding_scale": 1.0,
    "residual_scale": 1.0, "rope.dimension_count": 16, "rope.scaling.type": "none",
    "rope.scaling.finetuned": False, "use_parallel_residual": False, "pooling_type": 3,
    "expert_weights_norm": True, "attention.shared_kv_layers": 0, "something_new": 0,
}  # fmt: skip


def test_values_that_are_the_models_own_pass(tmp_path):
    model = qwen3()
    assert_computes(write(tmp_path, model, **NEUTRAL), model)


def test_a_window_that_holds_the_whole_context_passes(tmp_path):
    model = qwen3()
    assert_computes(write(tmp_path, model, **{"attention.sliding_window": 512}), model)


def test_a_shared_expert_may_be_counted_in_either_way(tmp_path):
    model = qwen2(shared_expert_intermediate_size=64)
    for count in (1, 2):
        values = {"expert_shared_count": count, "expert_shared_feed_forward_length": 64}
        assert_computes(write(tmp_path, model, **values), model)


# What is refused.

OTHERS = {
    "expert_weights_scale": 2.5, "expert_gating_func": 2, "expert_group_count": 4,
    "expert_shared_count": 1, "expert_shared_feed_forward_length": 32,
    "expert_feed_forward_length": 64, "expert_chunk_feed_forward_length": 16,
    "expert_group_scale": 0.5, "experts_per_group": 2, "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 2, "moe_every_n_layers": 2, "attention.value_length": 8,
    "attention.scale": 0.5, "attention.sliding_window": 128, "attention.causal": False,
    "attention.clamp_kqv": 8.0, "attention.max_alibi_bias": 8.0, "attention.key_length_mla": 16,
    "attention.temperature_scale": 0.1, "attention.output_scale": 0.5,
    "attention.sliding_window_pattern": [True, False], "attention.head_count_kv": [2, 1],
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "router_logit_softcapping": 30.0, "logit_scale": 0.1, "embedding_scale": 12.0,
    "residual_scale": 0.22, "rope.dimension_count": 8, "rope.dimension_sections": [8, 4, 4, 0],
    "rope.scaling.type": "longrope", "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.yarn_attn_factor": 2.0, "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_ext_factor": 0.5, "rope.scaling.alpha": 1000.0, "rope.freq_base_swa": 1e4,
    "use_parallel_residual": True, "full_attention_interval": 4, "swin_norm": True,
    "swiglu_clamp_exp": [7.0, 7.0], "ssm.conv_kernel": 4, "something_new": 3, "expert_count": 16,
    "expert_used_count": 9, "vocab_size": 65, "embedding_length": 128,
    "tensor_data_layout": "Meta AI original pth", "rope.freq_base": 0.0,
    "attention.layer_norm_rms_epsilon": float("nan"), "rope.scaling.factor": -2.0,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_a_value_that_the_model_does_not_compute_with_is_refused(key, tmp_path):
    value = OTHERS[key]
    error = assert_refused(write(tmp_path, qwen3(), **{key: value}), key.replace(".", r"\."))
    first = value[0] if isinstance(value, list) else value
    assert str(first).replace("True", "1").replace("False", "0") in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "key", ["attention.head_count", "expert_used_count", "attention.layer_norm_rms_epsilon"]
)
def test_a_key_that_nothing_stands_for_is_refused(key, tmp_path):
    for value in (None, 0.0 if "epsilon" in key else 0, "four"):
        assert_refused(write(tmp_path, qwen3(), **{key: value}), f"as qwen3moe.{key}, got")


def test_groups_are_refused_unless_all_are_used(tmp_path):
    model = qwen3()
    both = {"expert_group_count": 4, "expert_group_used_count": 4}
    assert_computes(write(tmp_path, model, **both), model)
    folder = write(tmp_path, model, **{**both, "expert_group_used_count": 2})
    assert_refused(folder, "expert_group_count = 4")


DIFFERENT = {
    "num_attention_heads": (8, "attention.head_count = 4"),
    "rms_norm_eps": (1e-5, "layer_norm_rms_epsilon"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 5e5}, "rope.freq_base = 10000.0"),
    "num_experts_per_tok": (3, "expert_used_count = 2"),
    "norm_topk_prob": (False, "expert_weights_norm = 1"),
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_a_config_json_that_says_otherwise_is_refused(field, tmp_path):
    value, reason = DIFFERENT[field]
    model = qwen3()
    folder = write(tmp_path, model, expert_weights_norm=True)
    setattr(model.config, field, value)
    model.config.save_pretrained(folder)
    assert_refused(folder, reason)


@pytest.mark.parametrize("given", [{"factor": 8.0}, {"original_max_position_embeddings": 64}, None])
def test_a_config_json_that_scales_otherwise_is_refused(given, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 128}  # fmt: skip
    model = qwen3(rope_parameters=yarn)
    stated = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    folder = write(tmp_path, model, **{f"rope.scaling.{key}": v for key, v in stated.items()})
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.rope_parameters = plain if given is None else {**yarn, **given}
    model.config.save_pretrained(folder)
    assert_refused(folder, r"rope\.scaling\.type = yarn")


def test_a_configuration_may_scale_where_the_file_says_nothing(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 128}  # fmt: skip
    scaled = qwen3(rope_parameters=yarn)
    folder = write(tmp_path, qwen3())
    loaded = load(folder, config=hybrimoe.Config())
    scaled.load_state_dict(qwen3().state_dict())
    scaled.config.save_pretrained(folder)

    assert_computes(folder, scaled)
    assert nmse(logits_of(loaded), logits_of(scaled)) > 1e-6


def test_the_commands_say_it_in_one_line(capsys, tmp_path):
    path = write(tmp_path, qwen3(), expert_weights_scale=2.5) / "model.gguf"
    for code, *command in ((1, "plan"), (2, "generate", "--prompt", "x"), (1, "bench")):
        assert main([command[0], str(path), *command[1:]]) == code
        err = capsys.readouterr().err
        assert "expert_weights_scale = 2.5" in err or "no tokenizer" in err
        assert len(err.strip().splitlines()) == 1


def test_the_configuration_is_the_class_of_its_family(tmp_path):
    for build, name in ((qwen2, "Qwen2MoeConfig"), (qwen3, "Qwen3MoeConfig")):
        loaded = load(write(tmp_path, build()))
        assert type(loaded.config) is getattr(transformers, name)
