"""What a wrapped model says of its size, what it loads, and what it says when it is trained."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import hybrimoe
from adapted import IDS, bare, bits, expected, filled, logits, same
from hybrimoe.errors import WrappedModelError
from parity import nmse

LOSSY = pytest.mark.filterwarnings("ignore:the .* were stored as")
WAYS = {
    "native": {},
    "int8": {"weights": "int8"},
    "disk": {"ram": 0.5},
    "emulated": {"device": "emulated"},
    "dense layers": {"linear": "int8"},
}


def numbers(model):
    """What the counting methods of a model and of its body say."""
    return [
        part.num_parameters(exclude_embeddings=without)
        for part in (model, model.model)
        for without in (False, True)
    ]


@LOSSY
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_wrapped_model_has_as_many_parameters_as_it_had(way, tied):
    model = bare()
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    wanted, size = numbers(model), model.get_memory_footprint()
    hybrimoe.wrap(model, **{"device": "cpu"} | WAYS[way])

    assert numbers(model) == wanted
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trained < wanted[0]
    hybrimoe.unwrap(model)
    assert (numbers(model), model.get_memory_footprint()) == (wanted, size)
    assert "num_parameters" not in vars(model)


@LOSSY
@pytest.mark.parametrize("way", WAYS)
def test_the_footprint_is_what_the_packed_weights_take(way):
    model = hybrimoe.wrap(bare(), **{"device": "cpu"} | WAYS[way])
    runtime = model.hybrimoe
    dense = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    tier = runtime.pool.tier
    experts = runtime.pool.nbytes if tier is None else tier.slab.nbytes
    linears = sum(layer.matrix.blob.nbytes for layer in runtime.linears)

    assert model.get_memory_footprint() == dense + experts + linears
    assert model.model.get_memory_footprint() > experts
    without = model.get_memory_footprint(return_buffers=False)
    assert without == model.get_memory_footprint() - sum(b.nbytes for b in model.buffers())


# Loading.


def test_a_state_dict_without_experts_is_loaded():
    model, other = bare(), bare()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    state = {name: value for name, value in bits(other).items() if ".experts." not in name}
    hybrimoe.wrap(model, device="cpu")
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        model.load_state_dict(state)
    found = model.load_state_dict(state, strict=False)

    assert sorted(found.missing_keys) == sorted(set(bits(other)) - set(state))
    assert not found.unexpected_keys
    assert same({n: v for n, v in bits(model).items() if n in state}, state)


def test_one_expert_among_others_is_refused_before_anything_is_loaded():
    model = hybrimoe.wrap(bare(), device="cpu")
    before = bits(model)
    state = {
        name: value + 1 for name, value in before.items() if "layers.0.mlp.experts" not in name
    }
    for strict in (True, False):
        with pytest.raises(WrappedModelError, match=r"2 of its tensors.*layers\.1\.mlp\.experts"):
            model.load_state_dict(state, strict=strict)
    assert same(bits(model), before)


@LOSSY
def test_packed_dense_layers_are_refused_too_and_norms_are_loaded():
    model = hybrimoe.wrap(bare(), device="cpu", linear="int8")
    before = bits(model)
    norms = {name: value + 1 for name, value in before.items() if "norm" in name}
    with pytest.raises(WrappedModelError, match="q_proj"):
        model.load_state_dict({n: v for n, v in before.items() if "experts" not in n}, strict=False)
    model.load_state_dict(norms, strict=False)
    assert same(bits(model), before | norms)


def attention(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_a_saved_adapter_on_attention_is_loaded_onto_a_wrapped_model(tmp_path):
    saved = filled(attention(bare()), 1, scale=0.3)
    saved.save_pretrained(tmp_path)
    wrapped = hybrimoe.wrap(bare(), device="cpu")
    model = PeftModel.from_pretrained(wrapped, tmp_path).eval()

    assert nmse(logits(saved), expected()) > 1e-6
    assert nmse(logits(model), logits(saved)) < 1e-10
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert nmse(logits(model), logits(saved)) < 1e-10


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_resumes_and_loads_the_best_adapter(tmp_path):
    model = attention(hybrimoe.wrap(bare(), device="cpu"))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 100}
    for steps in (2, 3):
        how = TrainingArguments(tmp_path, max_steps=steps, save_steps=1, **best, **quiet)
        trainer = Trainer(model, how, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=steps > 2)
        assert trainer.state.global_step == steps
        assert trainer.state.best_model_checkpoint


# Training.


def warned(model, times=2):
    """What training for some steps warns of, about experts."""
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            model(IDS, labels=IDS).loss.backward()
    return [str(w.message) for w in caught if "frozen" in str(w.message)]


@LOSSY
def test_full_training_says_once_that_experts_are_frozen():
    assert len(warned(hybrimoe.wrap(bare(), device="cpu"))) == 1
    (said,) = warned(hybrimoe.wrap(bare(), device="cpu", linear="int8"))
    assert said.startswith("the experts and packed dense layers of a wrapped model are frozen")


def test_training_of_adapters_or_a_head_alone_says_nothing():
    assert not warned(attention(hybrimoe.wrap(bare(), device="cpu")))
    assert not warned(hybrimoe.wrap(attention(bare()), device="cpu"))
    model = hybrimoe.wrap(bare(), device="cpu").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert not warned(model)


def test_evaluation_with_gradients_says_nothing():
    model = hybrimoe.wrap(bare(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(IDS, labels=IDS).loss.backward()
