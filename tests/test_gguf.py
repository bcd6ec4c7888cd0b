"""A GGUF file straight into the pool is the model that transformers makes of it."""

import contextlib
import importlib.util
import logging as python_logging
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gguf_files
import hybrimoe
import processes
from hybrimoe.config import Config
from hybrimoe.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    UnsupportedModelError,
)
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.models import weights as formats
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.sources.gguf.experts import ExpertsReader
from paths import TINY_MOE

pytestmark = pytest.mark.filterwarnings("ignore:the experts were stored as")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """tiny-moe as files of several types, with its config.json beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(TINY_MOE / "config.json", folder)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    for kind in ("Q4_0", "Q8_0", "Q5_0", "F16"):
        gguf_files.write(folder / f"{kind}.gguf", model, kind, "F16" if kind == "F16" else "Q8_0")
    gguf_files.write(folder / "mixed.gguf", model, mixed)
    return folder


def mixed(name: str) -> str:
    """Q4_0, but for down projections of every third layer: those are wider in many files."""
    return "Q8_0" if "down" in name and int(name.split(".")[1]) % 3 == 0 else "Q4_0"


def small_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=256, moe_intermediate_size=256, num_experts=4,
        num_experts_per_tok=2, vocab_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, norm_topk_prob=True, intermediate_size=512, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture
def write_small(tmp_path):
    """Writes a Qwen3 MoE of 2 layers, without a config.json, as given types; returns the folder."""

    def write(kinds, **options) -> Path:
        gguf_files.write(tmp_path / "model.gguf", small_model(), kinds, **options)
        return tmp_path

    return write


def load_small(folder: Path, **options):
    return hybrimoe.from_pretrained(folder, gguf_file="model.gguf", **options)


def reference_of(folder: Path, name: str = "model.gguf", dtype=torch.float32, config=None):
    """What transformers makes of a file."""
    config = config or AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=dtype)


def assert_same_weights(model, wanted) -> None:
    got, wanted = model.state_dict(), wanted.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def nmse(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum())


# What is loaded.


@pytest.mark.parametrize(("kind", "fmt"), [("Q4_0", "int4"), ("Q8_0", "int8"), ("Q5_0", "int8")])
def test_the_numbers_of_the_file_are_kept_bit_by_bit(kind, fmt, tiny, caplog):
    model = hybrimoe.from_pretrained(tiny, gguf_file=f"{kind}.gguf")

    assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {fmt}
    assert model.hybrimoe.config.weights == fmt
    assert not [record for record in caplog.records if record.name == "hybrimoe"]
    assert_same_weights(hybrimoe.unwrap(model), reference_of(tiny, f"{kind}.gguf"))


def test_experts_in_plain_numbers_take_the_dtype_of_the_model(tiny):
    for dtype, fmt in ((torch.float32, "float32"), (torch.float16, "float16")):
        model = hybrimoe.from_pretrained(tiny, gguf_file="F16.gguf", dtype=dtype)

        assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {fmt}
        assert_same_weights(hybrimoe.unwrap(model), reference_of(tiny, "F16.gguf", dtype))


def test_in_bfloat16_the_experts_are_still_exact_and_the_rest_is_rounded_once(tiny):
    model = hybrimoe.from_pretrained(tiny, gguf_file="Q8_0.gguf", dtype="bfloat16")

    assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {"int8"}
    wanted = reference_of(tiny, "Q8_0.gguf", torch.bfloat16)
    assert_same_weights(hybrimoe.unwrap(model), wanted)


def test_types_that_differ_by_layer_are_kept_by_layer(tiny):
    model = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf")
    formats = [layer.packed.fmt for layer in model.hybrimoe.layers]

    assert formats == ["int4+int8", "int4", "int4"] * 4
    assert model.hybrimoe.report().format == "int4+int8, int4"
    assert hybrimoe.verify(model).passed
    assert_same_weights(hybrimoe.unwrap(model), reference_of(tiny, "mixed.gguf"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_it_computes_what_transformers_computes(kind, tiny, tokenizer):
    model = hybrimoe.from_pretrained(tiny, gguf_file=f"{kind}.gguf")
    inputs = tokenizer("def main(arguments):\n    ", return_tensors="pt")
    wanted = reference_of(tiny, f"{kind}.gguf")

    assert hybrimoe.verify(model).passed
    with torch.no_grad():
        assert nmse(model(**inputs).logits, wanted(**inputs).logits) < 1e-4
    if kind == "Q8_0":
        texts = [m.generate(**inputs, max_new_tokens=16, do_sample=False) for m in (model, wanted)]
        assert texts[0].tolist() == texts[1].tolist()
        assert "return" in tokenizer.decode(texts[0][0])


def test_it_computes_the_same_beside_an_accelerator_and_from_the_disk(tiny):
    tokens = torch.arange(8)[None]
    plain = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf")
    with torch.no_grad():
        wanted = plain(tokens).logits
        shared = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf", device="emulated")
        assert nmse(shared(tokens).logits, wanted) < 1e-4
        tiered = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf", ram=0.5)
        assert tiered.hybrimoe.pool.tier is not None
        assert torch.equal(tiered(tokens).logits, wanted)


# K types.


def q4_k_m(name: str) -> str:
    """As files of that name have it: some of the down projections are wider."""
    return "Q6_K" if "blk.0.ffn_down" in name else "Q4_K"


K_FILES = {
    "Q4_K": ["q4_k", "q4_k"],
    "Q5_K": ["q5_k", "q5_k"],
    "Q6_K": ["q6_k", "q6_k"],
    q4_k_m: ["q4_k+q6_k", "q4_k"],
    (lambda name: "Q8_0" if "down" in name else "Q4_K"): ["q4_k+int8", "q4_k+int8"],
}
K_NAMES = ["Q4_K", "Q5_K", "Q6_K", "Q4_K_M", "Q4_K and Q8_0"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kinds", "wanted"), K_FILES.items(), ids=K_NAMES)
def test_k_types_keep_the_numbers_of_the_file_and_compute_with_them(
    kinds, wanted, write_small, caplog
):
    folder = write_small(kinds)
    model = load_small(folder)
    reference = reference_of(folder, config=model.config)
    tokens = torch.arange(12)[None]

    assert [layer.packed.fmt for layer in model.hybrimoe.layers] == wanted
    assert model.hybrimoe.config.weights == "native"
    assert not [record for record in caplog.records if record.name == "hybrimoe"]
    assert hybrimoe.verify(model).passed
    with torch.no_grad():
        # Activations are rounded to int8 in two layers, with nothing but noise in their weights.
        assert nmse(model(tokens).logits, reference(tokens).logits) < 5e-4
    assert_same_weights(hybrimoe.unwrap(model), reference)


def test_k_types_take_the_bytes_of_the_file_and_little_more(write_small):
    folder = write_small(q4_k_m)
    held = {"Q4_K": 144, "Q6_K": 210}
    file = sum(
        held[q4_k_m(f"blk.{block}.ffn_{matrix}_exps.weight")] * 4 * 256
        for block in (0, 1)
        for matrix in ("gate", "up", "down")
    )

    assert file < load_small(folder).hybrimoe.pool.nbytes < 1.03 * file


@pytest.mark.parametrize(
    "where", [{"device": "emulated", "vram": 0.5}, {"ram": 0.5}, {"ram": 0.5, "device": "emulated"}]
)
def test_k_types_give_the_same_tokens_beside_an_accelerator_and_from_the_disk(where, write_small):
    folder, tokens = write_small(q4_k_m), torch.arange(12)[None]
    plain, moved = load_small(folder), load_small(folder, **where)

    assert {layer.packed.fmt for layer in moved.hybrimoe.layers} == {"q4_k+q6_k", "q4_k"}
    texts = [m.generate(tokens, max_new_tokens=8, do_sample=False) for m in (plain, moved)]
    assert texts[0].tolist() == texts[1].tolist()
    with torch.no_grad():
        assert nmse(moved(tokens).logits, plain(tokens).logits) < 1e-9
    assert all(layer.is_intact() for layer in moved.hybrimoe.layers)


def test_k_types_are_saved_packed_and_read_again_as_they_are(write_small, tmp_path):
    model = load_small(write_small(q4_k_m))
    hybrimoe.save_packed(model, tmp_path / "packed")
    again = hybrimoe.from_pretrained(tmp_path / "packed", ram=0.5)
    tokens = torch.arange(12)[None]

    assert [layer.packed.fmt for layer in again.hybrimoe.layers] == ["q4_k+q6_k", "q4_k"]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    for name, tensor in hybrimoe.unwrap(model).state_dict().items():
        assert torch.equal(hybrimoe.unwrap(again).state_dict()[name], tensor)


def test_a_pack_of_it_may_be_kept(write_small, tmp_path, monkeypatch):
    folder, store = write_small(q4_k_m), tmp_path / "store"
    model = load_small(folder, keep_packed=store)
    monkeypatch.setattr(ExpertsReader, "fill", None)
    again = load_small(folder, keep_packed=store)
    tokens = torch.arange(12)[None]

    assert again.name_or_path == str(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_packed_k_types_cannot_be_asked_for_in_another_format(write_small, tmp_path):
    hybrimoe.save_packed(load_small(write_small("Q4_K")), tmp_path / "packed")
    with pytest.raises(ConfigError, match="weights must be 'native'"):
        hybrimoe.from_pretrained(tmp_path / "packed", weights="int4")


def test_gate_and_up_of_different_types_are_rounded_to_int8_with_a_warning(write_small, caplog):
    folder = write_small(lambda name: "Q6_K" if "gate" in name else "Q4_K")
    model = load_small(folder)

    assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {"int8+q4_k"}
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "type Q6_K are kept as int8" in text
    assert "type Q4_K are kept as int8" in text
    wanted = reference_of(folder, config=model.config).state_dict()
    got = hybrimoe.unwrap(model).state_dict()
    for name in (n for n in wanted if ".experts." in n):
        assert nmse(got[name], wanted[name]) < 1e-4
        assert torch.equal(got[name], wanted[name]) == ("down" in name)


def test_floats_cannot_be_packed_as_k_types():
    layout = expert_layout("q4_k", 256, 256, True, False)
    weights = ExpertWeights(torch.zeros(1, 2, 256, 256), torch.zeros(1, 256, 256), Gate(0))
    with pytest.raises(FormatError, match="only when loading a GGUF file that stores it"):
        formats.pack("q4_k", layout, weights, np.zeros((1, layout.expert_bytes), np.uint8))


# The configuration.


def test_without_a_config_json_the_metadata_and_the_tensors_say_what_it_is(write_small):
    model = load_small(write_small("Q8_0"))

    assert model.config.model_type == "qwen3_moe"
    assert model.config.moe_intermediate_size == 256  # transformers would take it to be 768
    assert model.config.norm_topk_prob
    assert hybrimoe.verify(model).passed
    original = small_model()
    for name, tensor in hybrimoe.unwrap(model).state_dict().items():
        assert nmse(tensor, original.state_dict()[name]) < 1e-4, name


def test_a_shared_expert_is_as_wide_as_its_tensors(tiny, tmp_path):
    shutil.copy(tiny / "Q8_0.gguf", tmp_path / "model.gguf")
    model = load_small(tmp_path)

    assert model.config.shared_expert_intermediate_size == 64
    wanted = reference_of(tmp_path, config=AutoConfig.from_pretrained(TINY_MOE))
    assert_same_weights(hybrimoe.unwrap(model), wanted)


# Types that are rounded.


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_1", "Q5_1"])
def test_other_types_are_rounded_to_int8_and_a_warning_says_by_how_much(kind, write_small, caplog):
    folder = write_small(kind)
    model = load_small(folder)

    (record,) = [record for record in caplog.records if record.name == "hybrimoe"]
    assert record.levelno == python_logging.WARNING
    message = record.getMessage()
    assert f"type {kind} are kept as int8" in message
    assert "1.6 million weights" in message
    said = float(message.split("NMSE ")[1])
    wanted = reference_of(folder, config=model.config).state_dict()
    got = hybrimoe.unwrap(model).state_dict()
    for name in (n for n in wanted if ".experts." in n):
        assert 0 < nmse(got[name], wanted[name]) < 1e-4
        assert nmse(got[name], wanted[name]) == pytest.approx(said, rel=0.5)


def test_a_down_projection_of_a_type_without_a_format_is_rounded_alone(write_small, caplog):
    folder = write_small(lambda name: "Q3_K" if "blk.0.ffn_down" in name else "Q4_0")
    model = load_small(folder)

    assert [layer.packed.fmt for layer in model.hybrimoe.layers] == ["int4+int8", "int4"]
    (record,) = [record for record in caplog.records if record.name == "hybrimoe"]
    assert "Q3_K" in record.getMessage()
    wanted = reference_of(folder, config=model.config).state_dict()
    got = hybrimoe.unwrap(model).state_dict()
    exact = [name for name in wanted if not name.endswith("0.mlp.experts.down_proj")]
    assert all(torch.equal(got[name], wanted[name]) for name in exact)


def test_plain_numbers_beside_quantized_ones_are_rounded_to_int8(write_small, caplog):
    folder = write_small(lambda name: "F16" if "down" in name else "Q8_0")
    model = load_small(folder)

    assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {"int8"}
    (record,) = [record for record in caplog.records if record.name == "hybrimoe"]
    assert "type F16" in record.getMessage()


def spoil(folder: Path, change) -> None:
    """Change the first block of blk.1.ffn_up_exps.weight."""
    from hybrimoe.sources.gguf.parts import read_gguf

    path = folder / "model.gguf"
    at = read_gguf(path, folder).tensors["blk.1.ffn_up_exps.weight"].offset
    with path.open("r+b") as file:
        file.seek(at)
        block = bytearray(file.read(210))
        change(block)
        file.seek(at)
        file.write(block)


def test_minus_128_is_rounded_because_the_kernels_cannot_take_it(write_small, caplog):
    folder = write_small("Q8_0")

    def change(block):
        block[0:2], block[2] = b"\x00\x2c", 0x80  # a scale of 1/16

    spoil(folder, change)
    model = load_small(folder)
    wanted = reference_of(folder, config=model.config).state_dict()
    got = hybrimoe.unwrap(model).state_dict()

    (record,) = [record for record in caplog.records if record.name == "hybrimoe"]
    assert "type Q8_0" in record.getMessage()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert wanted[name][0, 256, 0] == -8
    assert got[name][0, 256, 0] == pytest.approx(-8, rel=1e-3)
    assert torch.equal(got[name][1:], wanted[name][1:])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "F16"])
def test_weights_that_are_not_finite_are_refused_with_their_tensor(kind, write_small):
    folder = write_small(lambda name: "Q8_0" if "down" in name else kind)

    at = {"Q3_K": 108, "Q6_K": 208}.get(kind, 0)

    def change(block):
        block[at : at + 2] = b"\x00\x7c"

    spoil(folder, change)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        load_small(folder)
    assert caught.value.tensor == "blk.1.ffn_up_exps.weight"


# What is refused.


def test_without_the_package_an_error_says_how_to_install_it(tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'hybrimoe\[gguf\]'"):
        hybrimoe.from_pretrained(tiny, gguf_file="Q4_0.gguf")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": "int4"}, "weights must be left out"),
        ({"config": Config(weights="int8")}, "weights must be left out"),
        ({"dtype": "quick"}, "dtype must name a dtype of torch"),
        ({"device_map": "cuda"}, "device_map"),
        ({"gguf_file": "model.safetensors"}, "name of a .gguf file"),
        ({"gguf_file": 7}, "name of a .gguf file"),
    ],
)
def test_arguments_that_cannot_be(options, reason, tiny):
    with pytest.raises(ConfigError, match=reason):
        hybrimoe.from_pretrained(tiny, **{"gguf_file": "Q4_0.gguf", **options})


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        hybrimoe.from_pretrained(tmp_path / "none", gguf_file="a.gguf")


def rewrite(folder: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of the header that occur once."""
    path = folder / "model.gguf"
    content = path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "error", "reason"),
    [
        (b"blk.1.ffn_gate_exps.weight", b"blk.1.ffn_gate_expz.weight", CheckpointError, "missing"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_z.weight", CheckpointError, "has no place"),
        (b"qwen3moe.block_count", b"qwen3moe.block_counz", CheckpointError, "number of its layers"),
        (b"qwen3moe.expert_count", b"qwen3moe.expert_counz", CheckpointError, "not known"),
        (b"embedding_length", b"embedding_lengtz", CheckpointError, "not known"),
    ],
)
def test_a_file_that_is_incomplete_or_of_another_model(old, new, error, reason, write_small):
    folder = write_small("Q8_0")
    rewrite(folder, old, new)

    with pytest.raises(error, match=reason):
        load_small(folder)


NUMBERS = (
    "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "expert_count", "expert_used_count",
    "vocab_size", "block_count",
)  # fmt: skip


@pytest.mark.parametrize("value", [0, (1 << 32) - 1])
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_no_model_has_are_typed_errors_or_harmless(key, value, write_small):
    folder = write_small("Q8_0")
    path = folder / "model.gguf"
    content = path.read_bytes()
    name = f"qwen3moe.{key}".encode()
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    path.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])

    with contextlib.suppress(CheckpointError):
        model = load_small(folder)
        assert key in ("context_length", "feed_forward_length", "expert_used_count")
        assert len(model.hybrimoe.layers) == 2


def test_a_configuration_of_another_model(write_small):
    folder = write_small("Q8_0")
    shutil.copy(TINY_MOE / "config.json", folder)

    with pytest.raises(CheckpointError, match="holds a qwen3_moe by its metadata"):
        load_small(folder)


def test_a_dense_model_and_an_unknown_architecture(tmp_path):
    import gguf

    for arch, reason in (("llama", "architecture 'llama'"), ("qwen3moe", "holds no experts")):
        writer = gguf.GGUFWriter(tmp_path / f"{arch}.gguf", arch)
        writer.add_block_count(1)
        writer.add_tensor("output_norm.weight", torch.ones(32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedModelError, match=reason):
            hybrimoe.from_pretrained(tmp_path, gguf_file=f"{arch}.gguf")


def test_a_file_that_shrinks_during_the_load_is_a_typed_error(write_small, monkeypatch):
    folder = write_small("Q8_0")
    relay, calls = ExpertsReader._relay, []

    def cut(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            with (folder / "model.gguf").open("r+b") as file:
                file.truncate(1 << 16)
        relay(self, *arguments)

    monkeypatch.setattr(ExpertsReader, "_relay", cut)
    with pytest.raises(CheckpointError, match="shorter since it was checked"):
        load_small(folder)


# What comes after.


def test_it_is_saved_packed_and_read_again_as_it_is(tiny, tmp_path):
    model = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf")
    hybrimoe.save_packed(model, tmp_path / "packed")
    again = hybrimoe.from_pretrained(tmp_path / "packed")

    for a, b in zip(again.hybrimoe.layers, model.hybrimoe.layers):
        assert a.packed.fmt == b.packed.fmt
        assert (a.packed.blobs == b.packed.blobs).all()


PEAK = """
hybrimoe.from_pretrained(sys.argv[1], gguf_file="Q8_0.gguf")  # compiles, which takes memory
with Peak() as peak:
    model = hybrimoe.from_pretrained(sys.argv[2], gguf_file="model.gguf")
print(json.dumps({
    "peak": peak.last, "samples": peak.samples, "pool": model.hybrimoe.pool.nbytes,
    "layers": len(model.hybrimoe.layers), "dense": sum(p.nbytes for p in model.parameters()),
}))
"""


@processes.needs_proc
def test_a_load_takes_the_packed_experts_the_dense_weights_and_less_than_a_layer(tiny, tmp_path):
    config = Qwen3MoeConfig(
        num_hidden_layers=6, hidden_size=512, moe_intermediate_size=512, num_experts=32,
        num_experts_per_tok=2, vocab_size=8192, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(
        {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}, assign=True
    )
    gguf_files.write(tmp_path / "model.gguf", model, "random", "Q8_0")
    del model
    config.save_pretrained(tmp_path)
    assert (tmp_path / "model.gguf").stat().st_size > 150e6
    used = processes.run(PEAK, tiny, tmp_path)

    assert used["samples"] > 20
    assert used["peak"] >= used["pool"]  # or it was not measured
    assert used["peak"] <= used["pool"] + used["dense"] + used["pool"] / used["layers"]
