"""A wrapped tiny-moe does all that the unwrapped one does."""

import hashlib
import json
import math
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import hybrimoe
import parity
from hybrimoe.config import Config
from hybrimoe.errors import WrappedModelError
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.report import Report
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.session import Runtime
from paths import TINY_MOE

FORMATS = ("native", "int8", "int4")
LOSSY = "ignore:the experts were stored as"
PROMPTS = ["def main(arguments):\n    ", "In the beginning"]
EXPERTS = "model.layers.0.mlp.experts"


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter's and buffer's bytes."""
    return {
        name: hashlib.sha256(
            tensor.detach().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def batch(tokenizer) -> dict[str, Tensor]:
    """Two prompts of different length, padded on the left."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **how) -> list[list[int]]:
    torch.manual_seed(0)
    how = {"max_new_tokens": 24, "do_sample": False} | how
    return model.generate(**inputs, **how).tolist()


# What wrap returns.


def test_wrap_returns_the_same_object_with_its_runtime(model):
    assert hybrimoe.wrap(model) is model
    runtime = model.hybrimoe
    assert isinstance(runtime, Runtime)
    assert isinstance(runtime.pool, ExpertPool)
    assert runtime.config == Config()
    assert isinstance(runtime.report(), Report)
    assert len(runtime.layers) == 12
    assert "12 layers" in repr(runtime)


def test_overrides_and_a_config_say_the_same(model):
    hybrimoe.wrap(model, Config(weights="native"), threads=1, deterministic=True)

    assert model.hybrimoe.config == Config(threads=1, deterministic=True)
    assert model.hybrimoe.threads == 1


def test_the_pool_counts_every_byte_of_the_experts(model):
    before = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    hybrimoe.wrap(model)

    assert model.hybrimoe.pool.nbytes == before
    assert model.hybrimoe.report().expert_bytes_before == before
    assert model.hybrimoe.report().expert_bytes_after == before


@pytest.mark.filterwarnings(LOSSY)
@pytest.mark.parametrize(("weights", "share"), [("int8", 17 / 32), ("int4", 9 / 32)])
def test_quantized_experts_are_smaller_by_their_bits(model, weights, share):
    report = hybrimoe.wrap(model, weights=weights).hybrimoe.report()

    assert report.expert_bytes_after / report.expert_bytes_before == pytest.approx(share, rel=0.05)


def test_wrapped_experts_keep_the_original_s_sizes_readable(model):
    experts = model.get_submodule(EXPERTS)
    hybrimoe.wrap(model)
    pooled = model.get_submodule(EXPERTS)

    assert isinstance(pooled, PooledExperts)
    assert pooled.num_experts == experts.num_experts == 32
    assert pooled.hidden_dim == experts.hidden_dim
    with pytest.raises(AttributeError, match=r"down_proj is packed in model\.hybrimoe\.pool"):
        pooled.down_proj  # noqa: B018
    with pytest.raises(AttributeError, match="nonsense"):
        pooled.nonsense  # noqa: B018
    assert "32 experts as bfloat16" in repr(model)


def test_statistics_count_prefill_and_decode_and_start_anew(model, tokenizer):
    hybrimoe.wrap(model)
    inputs = batch(tokenizer)
    generate(model, inputs, max_new_tokens=5, min_new_tokens=5)
    stats = model.hybrimoe.stats()

    assert stats["prefill_tokens"] == inputs["input_ids"].numel()
    assert stats["decode_tokens"] == 4 * 2
    assert [layer["launches"] for layer in stats["layers"]] == [5] * 12
    assert 4 <= stats["layers"][0]["experts"] <= 32
    assert 0 < stats["experts_s"] <= stats["prefill_s"] + stats["decode_s"]
    json.dumps(stats)
    assert "decode    8 tokens" in str(model.hybrimoe.report())
    assert "8 tokens" in model.hybrimoe.report()._repr_html_()
    model.hybrimoe.reset_stats()
    assert model.hybrimoe.stats()["decode_tokens"] == 0
    assert "no tokens yet" in str(model.hybrimoe.report())


# Everything that generates.

WAYS = {
    "greedily": {},
    "by sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40},
    "with beams": {"num_beams": 3},
    "with sampled beams": {"num_beams": 2, "do_sample": True},
    "with a static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False, "max_new_tokens": 8},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_left_padded_batch_generates_the_same(model32, tokenizer, way):
    inputs = batch(tokenizer)
    wanted = generate(model32, inputs, **WAYS[way])

    assert generate(hybrimoe.wrap(model32), inputs, **WAYS[way]) == wanted


def test_streamers_give_the_text_piece_by_piece(model32, tokenizer, capsys):
    inputs = dict(tokenizer(PROMPTS[0], return_tensors="pt"))
    wanted = tokenizer.decode(generate(model32, inputs)[0], skip_special_tokens=True)
    hybrimoe.wrap(model32)

    generate(model32, inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out.rstrip("\n") == wanted.rstrip("\n")

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    how = {"max_new_tokens": 24, "do_sample": False, "streamer": streamer}
    worker = threading.Thread(target=model32.generate, kwargs=inputs | how)
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert len(pieces) > 2
    assert "".join(pieces) == wanted


def test_stopping_criteria_end_a_generation(model, tokenizer):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= start + 3)

    inputs = dict(tokenizer(PROMPTS[0], return_tensors="pt"))
    start = inputs["input_ids"].shape[1]
    tokens = generate(hybrimoe.wrap(model), inputs, stopping_criteria=[After()])

    assert len(tokens[0]) == start + 3


def test_a_pipeline_generates_the_same_text(model32, tokenizer):
    def text() -> str:
        generator = pipeline("text-generation", model=model32, tokenizer=tokenizer)
        return generator(PROMPTS[0], max_new_tokens=12, do_sample=False)[0]["generated_text"]

    wanted = text()
    hybrimoe.wrap(model32)

    assert text() == wanted


def test_repeated_runs_are_bit_identical(model, tokenizer):
    inputs = batch(tokenizer)
    hybrimoe.wrap(model, threads=2)
    with torch.no_grad():
        first = model(**inputs).logits
        for _ in range(5):
            assert torch.equal(model(**inputs).logits, first)


def test_the_number_of_threads_does_not_change_a_bit(model, tokenizer):
    inputs, outputs = batch(tokenizer), []
    for threads in (1, 2, 3):
        with parity.wrapped(model, threads=threads), torch.no_grad():
            outputs.append(model(**inputs).logits)

    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


# Quality.


def perplexity(model: PreTrainedModel, tokenizer, window: int = 256, windows: int = 4) -> float:
    """exp of the mean loss over the first windows of each domain's held-out text."""
    texts = json.loads((TINY_MOE / "held_out.json").read_text()).values()
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : window * windows]
        ids = ids.view(windows, window)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.double())
    return math.exp(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def plain_perplexity(tokenizer) -> float:
    return perplexity(
        AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32), tokenizer
    )


@pytest.mark.parametrize(("weights", "bound"), [("native", 1e-6), ("int8", 1e-3), ("int4", 1e-2)])
def test_perplexity_of_held_out_text_stays_within_the_format_s_bound(
    model32, tokenizer, plain_perplexity, weights, bound
):
    change = perplexity(hybrimoe.wrap(model32, weights=weights), tokenizer) / plain_perplexity - 1

    assert abs(change) <= bound


# Back to the original.


def test_unwrap_restores_modules_parameters_and_bits(model, tokenizer):
    inputs = batch(tokenizer)
    bits, modules = fingerprint(model), dict(model.named_modules())
    parameters, attributes = dict(model.named_parameters()), set(vars(model))
    with torch.no_grad():
        logits = model(**inputs).logits

    hybrimoe.wrap(model)
    generate(model, inputs)
    assert hybrimoe.unwrap(model) is model

    assert fingerprint(model) == bits
    assert list(dict(model.named_modules())) == list(modules)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert set(vars(model)) == attributes
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_unwrap_removes_every_hook(model):
    hybrimoe.wrap(model)
    hybrimoe.unwrap(model)

    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not hasattr(model, "hybrimoe")


def test_unwrap_keeps_what_was_set_in_between(model):
    experts = model.get_submodule(EXPERTS)
    hybrimoe.wrap(model)
    model.train()
    hybrimoe.unwrap(model)

    assert experts.training


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_unwrap_of_a_lossy_format_warns_and_gives_dequantized_weights(model, weights):
    before = model.get_submodule(EXPERTS).down_proj.detach().clone()
    hybrimoe.wrap(model, weights=weights)
    with pytest.warns(UserWarning, match=f"stored as {weights}: the restored weights are the deq"):
        hybrimoe.unwrap(model)
    after = model.get_submodule(EXPERTS).down_proj.detach()

    assert after.dtype == before.dtype
    assert 0 < parity.nmse(after, before) < {"int8": 1e-4, "int4": 1e-2}[weights]


def test_unwrap_of_a_lossless_format_does_not_warn(model):
    hybrimoe.wrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hybrimoe.unwrap(model)


def test_wrapping_twice_returns_the_same_model_and_warns_if_the_config_differs(model):
    hybrimoe.wrap(model)
    runtime = model.hybrimoe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hybrimoe.wrap(model) is model
    with pytest.warns(UserWarning, match="already wrapped with .*weights='native'.*unwrap it"):
        assert hybrimoe.wrap(model, weights="int4") is model
    assert model.hybrimoe is runtime
    assert runtime.config.weights == "native"


def test_unwrapping_twice_or_without_wrapping_changes_nothing(model):
    bits = fingerprint(model)
    assert hybrimoe.unwrap(model) is model
    hybrimoe.unwrap(hybrimoe.unwrap(hybrimoe.wrap(model)))

    assert fingerprint(model) == bits


def test_a_model_can_be_wrapped_again(model, tokenizer):
    inputs = batch(tokenizer)
    wanted = generate(hybrimoe.wrap(model), inputs)
    hybrimoe.unwrap(model)

    assert generate(hybrimoe.wrap(model), inputs) == wanted


# verify.


@pytest.mark.filterwarnings(LOSSY)
@pytest.mark.parametrize("weights", FORMATS)
def test_verify_passes_for_every_format(model, tokenizer, weights):
    hybrimoe.wrap(model, weights=weights)
    result = hybrimoe.verify(model, batch(tokenizer)["input_ids"])

    assert result
    assert len(result.layers) == 12
    assert result.worst.cosine > 0.9999
    assert str(result).startswith("pass: 12 layers checked; worst is model.layers.")


def test_verify_takes_its_own_tokens_if_none_are_given(model):
    assert hybrimoe.verify(hybrimoe.wrap(model))


@pytest.mark.parametrize("weights", FORMATS)
def test_verify_fails_when_one_byte_of_a_blob_changes(model, weights):
    hybrimoe.wrap(model, weights=weights)
    layer = model.hybrimoe.layers[11]
    layer.packed.blobs[31, 5] ^= 1
    result = hybrimoe.verify(model)

    assert not result
    assert [check.name for check in result.layers if not check.passed] == [layer.name]
    assert result.worst.name == layer.name == "model.layers.11.mlp.experts"
    assert str(result).startswith("FAIL")
    assert "changed in memory" in str(result)


@pytest.mark.parametrize("weights", FORMATS)
def test_verify_fails_when_the_kernels_compute_something_else(model, weights):
    layer = hybrimoe.wrap(model, weights=weights).hybrimoe.layers[11]
    packed = layer.packed
    layer.pool.layers[layer.index] = packed._replace(gate=packed.gate._replace(alpha=1.1))
    result = hybrimoe.verify(model)

    assert [check.name for check in result.layers if not check.passed] == [layer.name]
    assert result.worst.name == layer.name


def test_verify_leaves_no_hooks_and_no_change(model, tokenizer):
    inputs = batch(tokenizer)
    hybrimoe.wrap(model)
    before = generate(model, inputs)
    hybrimoe.verify(model)

    assert generate(model, inputs) == before
    assert not any(layer._forward_hooks for layer in model.hybrimoe.layers)


def test_verify_of_a_model_that_is_not_wrapped_is_an_error(model):
    with pytest.raises(WrappedModelError, match=r"needs a wrapped model; call hybrimoe\.wrap"):
        hybrimoe.verify(model)
