"""Libraries around transformers, on wrapped models. The evaluation harness is skipped if missing."""

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hybrimoe
from hybrimoe.errors import UnsupportedModelError
from paths import TINY_MOE

TEXTS = ("def main(", "import os", "In the beginning")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MOE)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


@pytest.fixture
def small():
    return AutoModelForCausalLM.from_pretrained(
        TINY_MOE, dtype=torch.float32, num_hidden_layers=2
    ).eval()


def greedy(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


def test_continuous_batching_generates_what_single_requests_do(small, tokenizer):
    if not hasattr(small, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    hybrimoe.wrap(small, device="cpu")
    expected = [greedy(small, tokenizer, text) for text in TEXTS]
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, use_cuda_graph=False)
    outputs = small.generate_batch(prompts, generation_config=settings, progress_bar=False)
    got = {tuple(out.prompt_ids): list(out.generated_tokens) for out in outputs.values()}
    assert [prompt + got[tuple(prompt)] for prompt in prompts] == expected


def test_a_peft_adapter_on_attention_trains_beside_wrapped_experts(small, tokenizer):
    hybrimoe.wrap(small, device="cpu")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(small, config)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=inputs.input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert hybrimoe.verify(small)


def test_a_model_that_accelerate_dispatched_to_the_cpu_is_wrapped_as_any_other(model, tokenizer):
    expected = greedy(model, tokenizer, TEXTS[0])
    dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hybrimoe.wrap(dispatched, device="cpu")
    assert greedy(dispatched, tokenizer, TEXTS[0]) == expected


def test_a_model_that_accelerate_offloads_is_refused_untouched(model):
    offloaded = cpu_offload(model, execution_device="cpu")
    keys = list(offloaded.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"accelerate|meta"):
        hybrimoe.wrap(offloaded, device="cpu")
    assert list(offloaded.state_dict()) == keys
    assert not hasattr(offloaded, "hybrimoe")


@pytest.mark.parametrize("linear", [None, "int8"])
def test_a_wrapped_model_compiles_as_one_graph_with_equal_output(small, tokenizer, linear):
    hybrimoe.wrap(small, device="cpu", linear=linear)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    torch.compiler.reset()
    try:
        with torch.no_grad():
            expected = small(**inputs).logits
            found = torch._dynamo.explain(small)(**inputs)
            compiled = torch.compile(small, backend="eager", fullgraph=True)(**inputs).logits
    finally:
        torch.compiler.reset()
    assert found.graph_break_count == 0
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_the_evaluation_harness_scores_a_wrapped_model_as_the_plain_one(small, tokenizer):
    models = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance

    def scores():
        harness = models.HFLM(pretrained=small, tokenizer=tokenizer, batch_size=2)
        asked = [
            instance("loglikelihood", {}, (text, " the end"), index)
            for index, text in enumerate(TEXTS)
        ]
        return [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]

    plain = scores()
    hybrimoe.wrap(small, device="cpu")
    assert scores() == pytest.approx(plain, abs=1e-3)
