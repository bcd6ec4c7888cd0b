"""What cannot be wrapped is refused before anything is touched; what fails halfway is undone."""

import contextlib
import math

import pytest
import torch
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

import families
import hybrimoe
from hybrimoe import limits as host
from hybrimoe.errors import (
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    UnsupportedModelError,
    WrappedModelError,
)
from hybrimoe.modules import pooled_experts as experts_module
from test_wrap import fingerprint

MIXTRAL = "mixtral.MixtralExperts"
LAYERS = 12


@contextlib.contextmanager
def untouched(model: nn.Module):
    """The model must be the same before and after, bit by bit."""
    bits, modules, attributes = fingerprint(model), list(model.modules()), set(vars(model))
    parameters = dict(model.named_parameters())
    yield
    assert fingerprint(model) == bits
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert set(vars(model)) == attributes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert not module._state_dict_pre_hooks
        assert "_apply" not in vars(module)


def dense() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))


def dbrx() -> nn.Module:
    sizes = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    attention = DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8)
    attention.rope_theta = 1e4  # missing in some releases, read in all
    # fmt: off
    config = DbrxConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=64,
                        ffn_config=sizes, attn_config=attention)
    # fmt: on
    return DbrxForCausalLM(config)


def jetmoe() -> nn.Module:
    # fmt: off
    config = JetMoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2,
                          kv_channels=8, intermediate_size=32, num_local_experts=4)
    # fmt: on
    return JetMoeForCausalLM(config)


def llama4() -> nn.Module:
    # fmt: off
    config = Llama4TextConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
                              intermediate_size_mlp=32, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=2, head_dim=16, num_local_experts=4,
                              pad_token_id=0)
    # fmt: on
    return Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (dense, ["GPT2LMHeadModel", "no routed experts", "dense"]),
        (dbrx, ["DbrxForCausalLM", "DbrxExpert", "register_adapter"]),
        (jetmoe, ["JetMoeForCausalLM", "JetMoe", "register_adapter"]),
        (llama4, ["Llama4ForCausalLM", "Llama4TextExperts", "register_adapter"]),
    ],
)
def test_a_model_without_experts_to_take_over_is_refused_by_name(build, words):
    model = build()
    with untouched(model), pytest.raises(UnsupportedModelError) as caught:
        hybrimoe.wrap(model)

    for word in words:
        assert word in str(caught.value)


def test_a_double_precision_model_is_refused():
    model = families.build(MIXTRAL).double()
    rule = "expert weights must be float32, bfloat16 or float16, got torch.float64"
    with untouched(model), pytest.raises(FormatError, match=rule):
        hybrimoe.wrap(model)


def test_experts_of_mixed_dtypes_are_refused():
    model = families.build("gpt_oss.GptOssExperts", torch.bfloat16)
    experts = families.experts(model)[1]
    experts.down_proj.data = experts.down_proj.data.float()
    with untouched(model), pytest.raises(FormatError, match=r"must share one dtype.*down_proj"):
        hybrimoe.wrap(model)


def test_a_model_that_is_not_on_the_cpu_is_refused():
    model = families.build(MIXTRAL).to("meta")
    rule = r"mlp\.experts must be on the CPU to be wrapped, it is on meta"
    with pytest.raises(UnsupportedModelError, match=rule):
        hybrimoe.wrap(model)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (float("inf"), "inf"), (1e9, "1e")])
def test_weights_that_a_quantized_format_cannot_hold_are_refused(weights, value, word):
    model = families.build(MIXTRAL)
    families.experts(model)[1].down_proj[3, 2, 1] = value
    with untouched(model), pytest.raises(FormatError) as caught:
        hybrimoe.wrap(model, weights=weights)

    for part in (f"weights='{weights}'", "finite", word, "layers.1.mlp.experts"):
        assert part in str(caught.value)


def test_native_experts_keep_their_nans():
    model = families.build(MIXTRAL)
    families.experts(model)[0].down_proj[:, 2, 1] = math.nan
    inputs = families.inputs(MIXTRAL, model)
    with untouched(model):
        hybrimoe.wrap(model)
        assert families.logits(model, inputs).isnan().any()
        hybrimoe.unwrap(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, "weights must be one of native, int8, int4, got 'int3'"),
        ({"wieghts": "int4"}, "unknown setting 'wieghts'"),
        ({"threads": 0}, "threads must be a positive integer or None, got 0"),
        ({"config": {"weights": "int4"}}, "config must be a hybrimoe.Config, got {'weights'"),
        ({"vram": "1GiB", "device": "cpu"}, "vram needs an accelerator"),
    ],
)
def test_a_bad_argument_of_wrap_is_refused(model, arguments, message):
    with untouched(model), pytest.raises(ConfigError) as caught:
        hybrimoe.wrap(model, **arguments)

    assert str(caught.value).startswith(message)


def test_something_that_is_no_model_is_refused():
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got str"):
        hybrimoe.wrap("Qwen/Qwen3-30B-A3B")


def test_a_model_of_which_a_part_is_wrapped_is_refused(model):
    hybrimoe.wrap(model.model)
    with pytest.raises(WrappedModelError, match=r"already wrapped as part of another"):
        hybrimoe.wrap(model)
    hybrimoe.unwrap(model.model)
    hybrimoe.wrap(model)
    with pytest.raises(WrappedModelError, match=r"already wrapped as part of another"):
        hybrimoe.wrap(model.model)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_failure_in_any_layer_undoes_all_layers(model, monkeypatch, layer, moment, error):
    pack, calls = experts_module.formats.pack, iter(range(LAYERS))

    def failing(*args):
        call = next(calls)
        if call != layer or moment == "after":
            pack(*args)
        if call == layer:
            raise error(f"injected in layer {layer}")

    monkeypatch.setattr(experts_module.formats, "pack", failing)
    with untouched(model), pytest.raises(error, match=f"injected in layer {layer}"):
        hybrimoe.wrap(model)


def test_a_failure_while_attaching_undoes_all_layers(model, monkeypatch):
    attach = experts_module.PooledExperts.attach

    def failing(self):
        attach(self)
        if self.index == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(experts_module.PooledExperts, "attach", failing)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        hybrimoe.wrap(model)


def test_a_failure_halfway_through_a_lossy_format_says_what_is_lost(model, monkeypatch):
    pack, calls = experts_module.formats.pack, iter(range(LAYERS))

    def failing(*args):
        if next(calls) == 3:
            raise MemoryError("injected")
        pack(*args)

    monkeypatch.setattr(experts_module.formats, "pack", failing)
    with (
        pytest.warns(UserWarning, match=r"after 3 layers .* as int4.*reload the model"),
        pytest.raises(MemoryError),
    ):
        hybrimoe.wrap(model, weights="int4")
    assert not hasattr(model, "hybrimoe")
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen2MoeExperts"


def test_a_model_whose_wrapping_failed_can_be_wrapped(model, monkeypatch):
    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(experts_module, "pack_layer", failing)
    with pytest.raises(MemoryError):
        hybrimoe.wrap(model)
    monkeypatch.undo()

    assert hybrimoe.verify(hybrimoe.wrap(model))


def test_the_report_of_an_unwrapped_model_is_a_typed_error(model):
    runtime = hybrimoe.wrap(model).hybrimoe
    hybrimoe.unwrap(model)
    with pytest.raises(WrappedModelError, match=r"released by hybrimoe\.unwrap"):
        runtime.report()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_anything_is_rounded(model):
    with untouched(model), pytest.raises(ConfigError, match="needs a CUDA device"):
        hybrimoe.wrap(model, device="cuda", weights="int4")


@pytest.fixture
def little_memory(monkeypatch):
    """Room for four MiB: one layer unpacked takes 2.25."""
    have = host.HostMemory(host.MARGIN + (4 << 20), "a test")
    monkeypatch.setattr(host, "host_memory", lambda: have)


@pytest.mark.parametrize(
    "settings", [{"weights": "int4"}, {"weights": "int4", "linear": "int8"}, {"ram": 0.5}], ids=str
)
def test_without_room_for_the_unpacked_weights_a_model_stays_wrapped(model, settings, request):
    hybrimoe.wrap(model, device="cpu", **settings)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        request.getfixturevalue("little_memory")
        with pytest.raises(
            InsufficientMemoryError, match=r"unwrapping .* 4\.0 MiB available"
        ) as raised:
            hybrimoe.unwrap(model)
        assert "save_packed" in raised.value.nearest
        assert torch.equal(model(ids).logits, expected)
    assert model.hybrimoe.layers[0].is_intact()


def test_native_experts_are_unwrapped_layer_by_layer(model, little_memory):
    """Each gives back what it took: one layer more is all that is needed."""
    hybrimoe.wrap(model, device="cpu")
    assert hybrimoe.unwrap(model) is model


@pytest.mark.parametrize("part", ["model", "model.model.layers"])
def test_a_state_dict_that_does_not_fit_is_refused(model, tmp_path, little_memory, part):
    hybrimoe.wrap(model, device="cpu", weights="int4")
    with pytest.raises(
        InsufficientMemoryError, match=r"the state dict of .* 4\.0 MiB available"
    ) as raised:
        eval(part).state_dict()
    assert "save_packed" in raised.value.nearest
    with pytest.raises(InsufficientMemoryError):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))
