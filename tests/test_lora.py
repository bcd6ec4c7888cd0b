"""LoRA on experts: a wrapped model computes what the unwrapped PEFT model does, and follows it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import hybrimoe
from adapted import (
    BOTH,
    DOWN,
    GATE_UP,
    IDS,
    adapted,
    bare,
    bits,
    expected,
    filled,
    logits,
    same,
    two_adapters,
)
from hybrimoe.errors import FormatError, StorageError, UnsupportedModelError, WrappedModelError
from parity import nmse

pytestmark = pytest.mark.filterwarnings(
    "ignore:the experts (are|were) stored as", "ignore:Already unmerged"
)
PLACES = {
    "cpu": {"device": "cpu"},
    "emulated": {"device": "emulated"},
    "disk": {"device": "cpu", "ram": 0.5},
    "emulated and disk": {"device": "emulated", "vram": 0.3, "ram": 0.6},
}
BOUNDS = {"native": 1e-10, "int8": 1e-6}
TARGETS = {"gate and up": (GATE_UP,), "down": (DOWN,), "both": BOTH}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two adapters, and one with the model itself."""
    folder = tmp_path_factory.mktemp("saved")
    two_adapters(bare()).save_pretrained(folder / "adapters")
    bare().save_pretrained(folder / "model")
    return folder


# The numbers.


@pytest.mark.parametrize(
    ("weights", "targets"), [*(("native", name) for name in TARGETS), ("int8", "both")]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["adapter first", "wrapped first"])
def test_logits_are_those_of_the_unwrapped_peft_model(order, place, weights, targets):
    model, parameters = bare(), TARGETS[targets]
    if order == "wrapped first":
        logits(hybrimoe.wrap(model, weights=weights, **PLACES[place]))
        model = adapted(model, parameters)
    else:
        model = hybrimoe.wrap(adapted(model, parameters), weights=weights, **PLACES[place])
    wanted = expected("default", targets=parameters)

    assert nmse(expected(), wanted) > 10 * BOUNDS[weights]
    assert nmse(logits(model), wanted) < BOUNDS[weights]
    assert hybrimoe.verify(model.get_base_model())
    with model.disable_adapter():
        assert nmse(logits(model), expected()) < BOUNDS[weights]
    assert nmse(logits(model), wanted) < BOUNDS[weights]


def test_bfloat16_is_rounded_once():
    model = hybrimoe.wrap(adapted(bare(torch.bfloat16)), device="cpu")

    assert nmse(logits(model), expected("default", dtype=torch.bfloat16)) < 1e-4


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    counts = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, **counts)).eval()


@pytest.mark.parametrize("order", ["adapter first", "wrapped first"])
def test_transposed_and_interleaved_weights_and_biases_can_be_targeted(order):
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    targets = tuple(f"experts.{name}" for name in names)
    reference = adapted(gpt_oss(), targets)
    before = bits(reference)
    if order == "wrapped first":
        model = adapted(hybrimoe.wrap(gpt_oss(), device="cpu"), targets)
    else:
        model = hybrimoe.wrap(adapted(gpt_oss(), targets), device="cpu")

    assert nmse(logits(model), logits(reference)) < 1e-10
    assert same(bits(hybrimoe.unwrap(model)), before)


def test_a_router_with_lora_routes_and_foresees_as_it_does_unwrapped():
    targets = (*BOTH, "mlp.gate.weight")
    wanted = logits(adapted(bare(), targets, target_modules=["q_proj"]))
    for place in PLACES.values():
        model = adapted(bare(), targets, target_modules=["q_proj"])
        assert nmse(logits(hybrimoe.wrap(model, **place)), wanted) < 1e-10


def test_rank_stabilized_adapters_scale_as_they_say():
    settings = {"use_rslora": True, "r": 3, "lora_alpha": 5}
    wanted = logits(adapted(bare(), **settings))
    model = adapted(hybrimoe.wrap(bare(), device="cpu"), **settings)

    assert nmse(logits(model), wanted) < 1e-10


def test_a_compiled_model_follows_its_adapters():
    model = hybrimoe.wrap(adapted(bare()), device="cpu")
    torch.compiler.reset()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert nmse(logits(compiled), expected("default")) < 1e-10
        with model.disable_adapter():
            assert nmse(logits(compiled), expected()) < 1e-10
    finally:
        torch.compiler.reset()


# Giving back.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_unwrap_gives_back_the_weights_without_the_delta_bit_for_bit(place, dtype):
    model = adapted(bare(dtype))
    before = bits(model)
    hybrimoe.wrap(model, **PLACES[place])
    assert same(bits(model), before)  # as `save_pretrained` sees it
    with model.disable_adapter():
        logits(model)
    logits(model)
    hybrimoe.unwrap(model)

    assert same(bits(model), before)
    assert torch.equal(logits(model), expected("default", dtype=dtype))
    assert not any({"forward", "get_param", "merge"} & set(vars(m)) for m in model.modules())


def test_a_failed_wrap_gives_them_back_too(monkeypatch):
    model = adapted(bare())
    before = bits(model)

    def fail(*_):
        raise WrappedModelError("no")

    monkeypatch.setattr(hybrimoe.Runtime, "guard", fail)
    with pytest.raises(WrappedModelError):
        hybrimoe.wrap(model, device="cpu")
    assert same(bits(model), before)
    assert torch.equal(logits(model), expected("default"))


def test_whichever_model_was_wrapped_may_be_unwrapped_by_the_other():
    inner, outer = bare(), adapted(bare())
    hybrimoe.wrap(inner, device="cpu")
    around = adapted(inner)
    hybrimoe.unwrap(around)
    hybrimoe.wrap(outer.get_base_model(), device="cpu")
    assert nmse(logits(outer), expected("default")) < 1e-10
    hybrimoe.unwrap(outer)

    for model in (around, outer):
        assert torch.equal(logits(model), expected("default"))
        assert not hasattr(model, "hybrimoe")
        assert not hasattr(model.get_base_model(), "hybrimoe")


# Following.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["adapter first", "wrapped first"])
def test_the_pool_follows_the_active_adapters(order, place):
    if order == "adapter first":
        model = hybrimoe.wrap(two_adapters(bare()), **PLACES[place])
    else:
        model = two_adapters(hybrimoe.wrap(bare(), **PLACES[place]))
    assert nmse(logits(model), expected("default")) < 1e-10
    model.set_adapter("second")
    assert nmse(logits(model), expected("second")) < 1e-10
    model.base_model.set_adapter(["default", "second"])
    assert nmse(logits(model), expected("default", "second")) < 1e-10
    model.set_adapter("second")
    model.delete_adapter("default")
    assert nmse(logits(model), expected("second")) < 1e-10
    plain = model.unload()

    assert nmse(logits(plain), expected()) < 1e-10
    assert hybrimoe.verify(plain)
    assert same(bits(hybrimoe.unwrap(plain)), bits(bare()))


def test_numbers_that_change_in_place_are_noticed():
    model = adapted(hybrimoe.wrap(bare(), device="cpu"), seed=None)
    assert nmse(logits(model), expected()) < 1e-10
    filled(model, 1)
    assert nmse(logits(model), expected("default")) < 1e-10
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # which counts as no change to autograd
    assert nmse(logits(model), expected()) < 1e-10
    filled(model, 1)
    with rescale_adapter_scale(model, 0.0):
        assert nmse(logits(model), expected()) < 1e-10
    assert nmse(logits(model), expected("default")) < 1e-10


def test_a_layer_called_alone_is_up_to_date():
    model = hybrimoe.wrap(adapted(bare()), device="cpu")
    layer, twin = (m.get_base_model().model.layers[1].mlp for m in (model, adapted(bare())))
    x = torch.randn(1, 3, 64)
    with torch.no_grad(), model.disable_adapter():
        first = [y[0] if isinstance(y, tuple) else y for y in (layer(x), twin(x))]
    assert nmse(first[0], first[1]) > 1e-6  # the twin's adapter is on
    with torch.no_grad():
        second = [y[0] if isinstance(y, tuple) else y for y in (layer(x), twin(x))]
    assert nmse(second[0], second[1]) < 1e-10


def test_rounded_experts_say_that_a_change_rounds_them_again():
    model = hybrimoe.wrap(two_adapters(bare()), weights="int8", device="cpu")
    model.set_adapter("second")
    with pytest.warns(UserWarning, match=r"stored as int8, .*rounds them once more"):
        got = logits(model)
    assert nmse(got, expected("second")) < 1e-5


# Merging.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["adapter first", "wrapped first"])
def test_merging_keeps_the_model_wrapped_and_its_output(order, place):
    if order == "adapter first":
        model = hybrimoe.wrap(adapted(bare()), **PLACES[place])
    else:
        model = adapted(hybrimoe.wrap(bare(), **PLACES[place]))
    model.merge_adapter()
    assert nmse(logits(model), expected("default")) < 1e-10
    model.unmerge_adapter()
    assert nmse(logits(model), expected("default")) < 1e-10
    merged = model.merge_and_unload(safe_merge=True)

    assert nmse(logits(merged), expected("default")) < 1e-10
    assert hybrimoe.verify(merged)
    hybrimoe.unwrap(merged)
    assert nmse(logits(merged), expected("default")) < 1e-10
    assert not any(type(module).__name__ == "ParamWrapper" for module in merged.modules())


def test_adapters_merged_before_wrap_stay_merged_until_they_are_disabled():
    model = adapted(bare())
    model.merge_adapter()
    before = bits(model)
    hybrimoe.wrap(model, device="cpu")
    assert nmse(logits(model), expected("default")) < 1e-10
    assert same(bits(hybrimoe.unwrap(model)), before)
    hybrimoe.wrap(model, device="cpu")
    with model.disable_adapter():
        assert nmse(logits(model), expected()) < 1e-10
    assert nmse(logits(model), expected("default")) < 1e-10


# Saving and loading.


@pytest.mark.parametrize("place", PLACES)
def test_saved_adapters_are_loaded_onto_a_wrapped_model(place, saved, tmp_path):
    model = hybrimoe.from_pretrained(saved / "model", dtype=torch.float32, **PLACES[place])
    model = PeftModel.from_pretrained(model, saved / "adapters")
    assert nmse(logits(model), expected("default")) < 1e-10
    model.load_adapter(saved / "adapters" / "second", "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert nmse(logits(model), expected("second")) < 1e-10
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(bare(), tmp_path)
    assert torch.equal(logits(again), expected("default"))


def test_transformers_loads_them_too(saved):
    model = AutoModelForCausalLM.from_pretrained(
        saved / "model", quantization_config=hybrimoe.Config(device="cpu"), dtype=torch.float32
    )
    model.load_adapter(saved / "adapters")
    assert nmse(logits(model), expected("default")) < 1e-10
    assert torch.equal(logits(hybrimoe.unwrap(model)), expected("default"))


def test_packed_files_hold_no_adapters(tmp_path):
    model = hybrimoe.wrap(adapted(bare()), device="cpu")
    with pytest.raises(WrappedModelError, match="merge_and_unload"):
        hybrimoe.save_packed(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    merged = model.merge_and_unload()
    hybrimoe.save_packed(merged, tmp_path / "packed")

    loaded = hybrimoe.from_pretrained(tmp_path / "packed", device="cpu")
    assert nmse(logits(loaded), expected("default")) < 1e-10


# What is refused.


@pytest.mark.parametrize("part", ["experts", "mlp"])
def test_trainable_copies_of_experts_are_refused_untouched(part):
    model = get_peft_model(
        bare(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[part])
    ).eval()
    before, wanted = bits(model), logits(model)
    with pytest.raises(UnsupportedModelError, match="modules_to_save"):
        hybrimoe.wrap(model, device="cpu")
    assert same(bits(model), before)
    assert torch.equal(logits(model), wanted)


def test_other_trainable_copies_are_not(saved):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "gate"])
    model = get_peft_model(bare(), config).eval()
    assert nmse(logits(hybrimoe.wrap(model, device="cpu")), expected()) < 1e-10


def test_what_is_no_low_rank_delta_is_refused_untouched():
    dora = adapted(bare())
    wrapper = dora.get_base_model().model.layers[1].mlp.experts
    wrapper.use_dora["default"] = True
    parametrized = bare()
    experts = parametrized.model.layers[1].mlp.experts
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    other = bare()
    other.model.layers[1].mlp.experts = Around(other.model.layers[1].mlp.experts)
    cases = {"DoRA": dora, "parametrized": parametrized, "stands around": other}
    for words, model in cases.items():
        before = bits(model)
        with pytest.raises(UnsupportedModelError, match=words):
            hybrimoe.wrap(model, device="cpu")
        assert same(bits(model), before)


class Around(nn.Module):
    """Looks like another tuner's layer."""

    adapter_layer_names = ("scales",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args):
        return 2 * self.base_layer(*args)


def test_an_adapter_that_is_not_finite_is_refused_before_int8_experts_change():
    model = adapted(bare())
    wrapper = model.get_base_model().model.layers[1].mlp.experts
    wrapper.lora_A["default"].weight.data[0, 0] = torch.nan
    before = bits(model)
    with pytest.raises(FormatError, match="finite"):
        hybrimoe.wrap(model, weights="int8", device="cpu")
    assert same({n: t.nan_to_num() for n, t in bits(model).items()},
                {n: t.nan_to_num() for n, t in before.items()})  # fmt: skip


def test_k_types_of_a_file_take_no_delta(monkeypatch):
    model = hybrimoe.wrap(bare(), device="cpu")
    wanted = logits(model)
    layer = model.hybrimoe.layers[0]
    with monkeypatch.context() as patch:
        packed = layer.packed._replace(fmt="q4_k+q6_k")
        patch.setattr(type(layer), "packed", property(lambda _: packed))
        with pytest.raises(FormatError, match="as a GGUF file holds them"):
            adapted(model)
    assert torch.equal(logits(model), wanted)


def test_a_full_disk_leaves_the_model_as_it_was(monkeypatch):
    model = hybrimoe.wrap(bare(), device="cpu", ram=0.5)
    logits(model)
    model = adapted(model)
    backing = model.hybrimoe.pool.tier.backing
    with monkeypatch.context() as patch:
        patch.setattr("hybrimoe.runtime.disk.file.shutil.disk_usage", lambda _: Usage)
        with pytest.raises(StorageError, match="adapter's delta"):
            logits(model)
    assert not backing._below
    assert nmse(logits(model), expected("default")) < 1e-10


class Usage:
    free = 0


# Training.


def loss(model: nn.Module) -> torch.Tensor:
    return model(IDS, labels=IDS).loss


def test_training_the_experts_adapter_is_refused():
    model = adapted(hybrimoe.wrap(bare(), device="cpu"))
    with pytest.raises(WrappedModelError, match="cannot be trained while they are wrapped"):
        loss(model.train())
    model.eval()
    with pytest.raises(WrappedModelError, match="cannot be trained while they are wrapped"):
        loss(model).backward()


def test_other_adapters_train_beside_frozen_ones_on_experts():
    def gradients(model):
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.requires_grad_(False)
        loss(model.train()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    settings = {"target_modules": ["q_proj"]}
    wanted = gradients(adapted(bare(), **settings))
    found = gradients(hybrimoe.wrap(adapted(bare(), **settings), device="cpu"))

    assert set(found) == set(wanted)
    assert len(found) == 4
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_gradients_are_those_of_the_forward_whatever_became_active_since():
    def gradient(model, disable):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        found = model(inputs_embeds=embedded, labels=IDS).loss
        if disable:  # as for the reference of a preference loss
            with model.disable_adapter():
                logits(model)
        found.backward()
        return embedded.grad

    def frozen(model):
        model.requires_grad_(False)
        return model

    wanted = gradient(frozen(adapted(bare())), disable=False)
    for place in ("cpu", "disk"):
        model = hybrimoe.wrap(frozen(adapted(bare())), **PLACES[place])
        torch.testing.assert_close(gradient(model, True), wanted, rtol=1e-3, atol=1e-8)
    with model.disable_adapter():
        assert not torch.allclose(gradient(model, False), wanted, rtol=1e-2)
