"""Every tensor of a GGUF file is used, or harmless, or the file is refused by that tensor's name."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import gguf_files
import hybrimoe
from gguf_models import assert_computes, assert_refused, load, logits_of, nmse, qwen2, qwen3, write
from hybrimoe.cli.main import main
from hybrimoe.errors import UnsupportedModelError


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def adding(**tensors: np.ndarray):
    """What puts further tensors into a file; names have no dots in Python: `__` stands for one."""
    return lambda found: found | {name.replace("__", "."): t for name, t in tensors.items()}


def block_as(found: dict, number: int, source: int = 0) -> dict:
    """The tensors of one block under the number of another."""
    old, new = f"blk.{source}.", f"blk.{number}."
    return {
        new + name.removeprefix(old): t[..., ::-1].copy()
        for name, t in found.items()
        if name.startswith(old)
    }


def with_further_block(found: dict) -> dict:
    """As converters leave a block that predicts further tokens at the end."""
    projection = {"blk.2.nextn.eh_proj.weight": ones(64, 128), "blk.2.nextn.enorm.weight": ones(64)}
    return found | block_as(found, 2) | projection


# Layouts of the experts.


@pytest.mark.parametrize("layout", ["merged", "single"])
@pytest.mark.parametrize("build", [qwen2, qwen3])
def test_merged_and_single_experts_are_those_of_the_model(build, layout, tmp_path):
    model = build()
    assert_computes(write(tmp_path, model, layout=layout), model)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q3_K", "F16"])
def test_every_type_gives_the_same_bytes_in_every_layout(kind, tmp_path):
    """A row is a whole number of blocks, so that a merged matrix falls apart between bytes."""
    model = qwen3(hidden_size=256, moe_intermediate_size=256, num_experts=4)
    loaded = []
    for layout in ("stacked", "merged", "single"):
        (tmp_path / layout).mkdir()
        loaded.append(load(write(tmp_path / layout, model, kind, change=stored(kind, layout))))

    for other in loaded[1:]:
        for a, b in zip(loaded[0].hybrimoe.layers, other.hybrimoe.layers):
            assert a.packed.fmt == b.packed.fmt
            assert np.array_equal(a.packed.blobs, b.packed.blobs)


def stored(kind: str, layout: str):
    """What writes the same blocks of a type in any layout."""

    def change(found):
        experts = {name: t for name, t in found.items() if "_exps" in name}
        raw = {
            name: gguf_files.blocks(t, kind, seed) for seed, (name, t) in enumerate(experts.items())
        }
        kept = {name: t for name, t in found.items() if name not in raw}
        if layout == "merged":
            for block in (0, 1):
                both = [raw.pop(f"blk.{block}.ffn_{part}_exps.weight") for part in ("gate", "up")]
                raw[f"blk.{block}.ffn_gate_up_exps.weight"] = np.concatenate(both, 1)
        if layout == "single":
            return kept | {
                name.replace("_exps", f".{expert}"): np.ascontiguousarray(t[expert])
                for name, t in raw.items()
                for expert in range(len(t))
            }
        return kept | raw

    return change


def test_merged_experts_beside_an_accelerator_and_from_the_disk(tmp_path):
    model = qwen3()
    folder = write(tmp_path, model, layout="merged")
    for where in ({"device": "emulated", "vram": 0.5}, {"ram": 0.5}):
        assert nmse(logits_of(load(folder, **where)), logits_of(model)) < 1e-10


def test_merged_and_separate_experts_in_one_file_are_refused(tmp_path):
    folder = write(
        tmp_path,
        qwen3(),
        layout="merged",
        change=adding(blk__1__ffn_up_exps__weight=ones(8, 32, 64)),
    )
    assert "ffn_gate_up_exps" in str(assert_refused(folder, "holds what .* holds as well"))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("blk.1.ffn_up.3.weight", lambda tensor: None, "is missing"),
        ("blk.1.ffn_up.3.weight", lambda tensor: tensor[:16], "type and shape"),
        ("blk.0.ffn_down.0.weight", lambda tensor: tensor.reshape(-1), "type and shape|matrix"),
    ],
)
def test_experts_of_which_one_is_missing_or_other(name, change, reason, tmp_path):
    def spoil(found):
        changed = change(found.pop(name))
        return found if changed is None else found | {name: changed}

    folder = write(tmp_path, qwen3(), layout="single", change=spoil)
    assert name.rsplit(".", 2)[0] in str(assert_refused(folder, reason).tensor)


def test_a_merged_matrix_of_odd_rows_is_refused(tmp_path):
    name = "blk.0.ffn_gate_up_exps.weight"
    folder = write(
        tmp_path, qwen3(), layout="merged", change=lambda found: found | {name: found[name][:, 1:]}
    )
    assert assert_refused(folder, "even number of rows").tensor == name


def test_a_type_that_nobody_can_read_is_refused_before_the_load(tmp_path):
    path = write(tmp_path, qwen3(), "Q8_0") / "model.gguf"
    content, name = path.read_bytes(), b"blk.1.ffn_up_exps.weight"
    at = content.index(name) + len(name) + 4 + 3 * 8
    assert content[at] == 8
    path.write_bytes(content[:at] + b"\x18" + content[at + 1 :])  # I8, which is no type of weights
    for read in (load, lambda folder: hybrimoe.plan(folder, gguf_file="model.gguf")):
        with pytest.raises(UnsupportedModelError, match=r"cannot dequantize .* I8") as caught:
            read(tmp_path)
        assert "blk.1.ffn_up_exps.weight" in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("Q4_K", "Q8_0"), ("Q8_0", "Q4_K")])
def test_layers_may_keep_down_in_different_types(first, second, tmp_path):
    """Their blobs fall into other numbers of pieces."""

    def kinds(name):
        if "down" not in name:
            return "Q4_K"
        return first if name.startswith("blk.0") else second

    model = qwen3(hidden_size=256, moe_intermediate_size=768, num_experts=4)
    loaded = load(write(tmp_path, model, kinds))
    names = {"Q4_K": "q4_k", "Q8_0": "q4_k+int8"}

    assert [layer.packed.fmt for layer in loaded.hybrimoe.layers] == [names[first], names[second]]
    wanted = logits_of(loaded)
    assert nmse(logits_of(load(tmp_path, ram=0.6)), wanted) == 0
    plain = hybrimoe.unwrap(loaded)
    assert nmse(wanted, logits_of(plain)) < 1e-3


# Blocks that predict further tokens.


@pytest.mark.parametrize(
    "values",
    [
        {"block_count": 3, "nextn_predict_layers": 1},
        {"block_count": 3},
        {"block_count": 2},
        {"block_count": 3, "nextn_predict_layers": 0},
    ],
    ids=str,
)
def test_a_block_that_predicts_further_tokens_is_no_layer(values, tmp_path):
    model = qwen3()
    loaded = assert_computes(write(tmp_path, model, change=with_further_block, **values), model)

    assert loaded.config.num_hidden_layers == 2
    assert main(["plan", str(tmp_path / "model.gguf"), "--json"]) == 0


def test_it_is_none_beside_a_config_json_either(tmp_path):
    model = qwen3()
    folder = write(
        tmp_path, model, change=with_further_block, block_count=3, nextn_predict_layers=1
    )
    model.config.save_pretrained(folder)
    assert_computes(folder, model)


def test_further_blocks_may_be_left_out_of_the_file_or_lack_their_own_tensors(tmp_path):
    model = qwen3()
    values = {"block_count": 3, "nextn_predict_layers": 1}
    assert_computes(write(tmp_path, model, **values), model)
    folder = tmp_path / "whole"
    folder.mkdir()
    change = lambda found: found | block_as(found, 2)  # noqa: E731
    assert_computes(write(folder, model, change=change, **values), model)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"block_count": 3, "nextn_predict_layers": 2}, "number of its layers, 3"),
        ({"block_count": 2, "nextn_predict_layers": 1}, "belongs to none of the 2 blocks"),
        ({"block_count": 4}, "number of its layers, 3"),
        ({"block_count": 3, "nextn_predict_layers": 3}, "number of its layers, 3"),
        ({"block_count": 3, "nextn_predict_layers": -1.0}, "number of its layers"),
    ],
    ids=str,
)
def test_counts_that_contradict_the_tensors_are_refused(values, reason, tmp_path):
    folder = write(tmp_path, qwen3(), change=with_further_block, **values)
    assert_refused(folder, reason)


def test_a_layer_that_predicts_in_the_middle_is_refused(tmp_path):
    change = adding(blk__0__nextn__eh_proj__weight=ones(64, 128))
    assert_refused(write(tmp_path, qwen3(), change=change), "nextn tensors")


def test_a_block_beyond_the_last_is_refused_by_its_tensor(tmp_path):
    folder = write(tmp_path, qwen3(), change=lambda found: found | block_as(found, 2))
    assert assert_refused(folder, "none of the 2 blocks").tensor.startswith("blk.2.")


# Tensors that a model has no place for.


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias", "blk.1.attn_output.bias", "blk.0.attn_q.scale", "blk.1.attn_sinks.weight",
        "blk.0.exp_probs_b.bias", "blk.0.ffn_gate_exps.bias", "blk.1.ffn_down_exps.bias",
        "blk.0.ffn_up_exps.scale", "blk.0.ffn_gate_shexp.weight", "blk.0.ffn_gate_inp.bias",
        "blk.0.attn_qkv.weight", "blk.0.post_attention_norm.weight", "blk.01.attn_q.weight",
        "rope_factors_long.weight", "output.bias", "output_norm.bias", "cls.weight", "new.thing",
    ],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused_by_its_name(name, tmp_path):
    folder = write(tmp_path, qwen3(), change=lambda found: found | {name: ones(64)})
    assert assert_refused(folder, "has no place in the model").tensor == name


def test_it_is_refused_beside_a_config_json_too(tmp_path):
    model = qwen3()
    model.config.save_pretrained(tmp_path)
    folder = write(tmp_path, model, change=adding(blk__0__exp_probs_b__bias=ones(8)))
    assert_refused(folder, "has no place in the model")


def test_frequencies_of_rotary_embeddings_may_be_one(tmp_path):
    model = qwen3()
    assert_computes(write(tmp_path, model, change=adding(rope_freqs__weight=ones(8))), model)
    write(tmp_path, model, change=adding(rope_freqs__weight=2 * ones(8)))
    assert assert_refused(tmp_path, "has no place").tensor == "rope_freqs.weight"


# Tensors that a model needs, or may lack.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blk.1.ffn_gate_inp.weight", "no tensor for .*mlp.gate"),
        ("blk.1.attn_q_norm.weight", "no tensor for"),
        ("token_embd.weight", "is missing"),
        ("output_norm.weight", "no tensor for"),
        ("blk.1.ffn_down_exps.weight", "is missing"),
    ],
)
def test_a_tensor_that_is_missing(name, reason, tmp_path):
    def without(found):
        return {key: tensor for key, tensor in found.items() if key != name}

    assert_refused(write(tmp_path, qwen3(), change=without), reason)


@pytest.mark.parametrize("bias", [True, False])
def test_qwen2_has_the_attention_biases_that_are_in_its_file(bias, tmp_path):
    model = qwen2(qkv_bias=bias)
    assert assert_computes(write(tmp_path, model), model).config.qkv_bias == bias


def test_biases_of_one_layer_alone_are_refused(tmp_path):
    def without(found):
        return {key: t for key, t in found.items() if not key.startswith("blk.1.attn_q.bias")}

    assert_refused(write(tmp_path, qwen2(), change=without), "no tensor for .*q_proj.bias")


@pytest.mark.parametrize("has_config", [True, False])
def test_an_output_matrix_is_used_and_may_be_missing(has_config, tmp_path):
    tied, own = qwen3(tie_word_embeddings=True), qwen3()
    for model in (tied, own):
        folder = tmp_path / str(model is tied)
        folder.mkdir()
        write(folder, model)
        if has_config:
            tied.config.save_pretrained(folder)
        loaded = assert_computes(folder, model)
        assert loaded.config.tie_word_embeddings == (model is tied)


# Shapes.


def test_the_experts_of_a_layer_may_not_be_of_another_number(tmp_path):
    names = [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]

    def fewer(found):
        return found | {name: found[name][:4] for name in names}

    assert "blk.1.ffn_gate_exps" in str(
        assert_refused(write(tmp_path, qwen3(), change=fewer), "must have the shape")
    )


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("blk.1.ffn_down_exps.weight", np.s_[:, :, :16]),
        ("blk.0.ffn_up_exps.weight", np.s_[:, :16]),
        ("blk.0.ffn_gate_inp.weight", np.s_[:4]),
        ("blk.0.attn_k.weight", np.s_[:16]),
        ("output.weight", np.s_[:32]),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_its_name(name, index, tmp_path):
    def cut(found):
        return found | {name: np.ascontiguousarray(found[name][index])}

    folder = write(tmp_path, qwen3(), change=cut)
    assert assert_refused(folder, "must have the shape").tensor == name


def test_one_expert_may_come_without_its_leading_size(tmp_path):
    model = qwen3(num_experts=1, num_experts_per_tok=1)

    def flat(found):
        return {name: t[0] if "_exps" in name else t for name, t in found.items()}

    assert_computes(write(tmp_path, model, change=flat), model)


def test_odd_widths_are_read(tmp_path):
    model = qwen3(hidden_size=96, moe_intermediate_size=40, num_experts=5)
    assert_computes(write(tmp_path, model), model)


@pytest.mark.parametrize("has_config", [True, False])
def test_a_layer_without_experts_is_refused(has_config, tmp_path):
    """llama.cpp has none in these architectures, and so no names for them."""
    model = qwen3(mlp_only_layers=[0], intermediate_size=80)
    if has_config:
        model.config.save_pretrained(tmp_path)
    assert_refused(write(tmp_path, model), "has experts in the layers 1|blk.0.ffn_gate.weight")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_dense_tensors_of_other_types(kind, tmp_path):
    model = qwen2(shared_expert_intermediate_size=64)
    loaded = load(write(tmp_path, model, dense=kind))
    assert nmse(logits_of(loaded), logits_of(model)) < 1e-3


def test_transformers_refuses_its_own_door(tmp_path):
    """So nothing is read there in another way."""
    write(tmp_path, qwen3())
    with pytest.raises(ValueError, match="combine Quantization and loading a model from a GGUF"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", quantization_config=hybrimoe.Config()
        )
