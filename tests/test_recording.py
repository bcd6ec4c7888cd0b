"""Recording routing from running models, wrapped and plain."""

import json

import numpy as np
import pytest
import torch

import hybrimoe
from hybrimoe.errors import ConfigError, TraceError, UnsupportedModelError
from hybrimoe.models.releases import cache_argument, cache_in
from hybrimoe.simulation.trace import sequences


def generate(model, tokens: int = 6, prompt: int = 9) -> None:
    ids = torch.arange(5, 5 + prompt)[None]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )


def test_prefill_and_decode_steps_of_each_sequence_are_marked(model):
    with hybrimoe.record(model) as trace:
        generate(model)
        generate(model)

    assert trace.prefill.tolist() == 2 * [True, False, False, False, False, False]
    assert [trace.tokens(step) for step in range(6)] == [9, 1, 1, 1, 1, 1]
    assert [steps.tolist() for steps in sequences(trace)] == [[*range(6)], [*range(6, 12)]]
    assert (trace.layers, trace.experts, trace.top_k, trace.model) == (12, 32, 4, "tiny-moe")
    assert trace.ids.dtype == np.uint8
    assert trace.shape[:2] == (192, 64)


def test_ids_weights_and_counts_are_what_the_experts_were_called_with(model):
    called = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: called.append(args[1:]))
        for layer in model.model.layers
    ]
    with hybrimoe.record(model) as trace:
        model(torch.arange(7)[None])
    for hook in hooks:
        hook.remove()

    for layer, (ids, weights) in enumerate(called):
        order = weights.float().argsort(dim=1, descending=True, stable=True)
        assert trace.ids[:, layer, :4].tolist() == ids.gather(1, order).tolist()
        got = trace.scores[:, layer, :4].astype(np.float32)
        np.testing.assert_allclose(got, weights.float().gather(1, order).detach(), rtol=1e-3)
        load = trace.loads(0)[layer]
        counts = torch.bincount(ids.flatten(), minlength=32)
        assert load.tokens.tolist() == counts[counts > 0].tolist()


def test_scores_reach_beyond_the_activated_experts_on_the_same_scale(model):
    with hybrimoe.record(model) as trace:
        generate(model, tokens=2)

    assert trace.ids.shape[2] == 8
    assert (np.sort(trace.ids, axis=2)[..., 1:] != np.sort(trace.ids, axis=2)[..., :-1]).all()
    assert (np.diff(trace.scores.astype(np.float32), axis=2) <= 1e-3).all()


def test_forecasts_are_what_later_routers_say_to_this_layers_input(model):
    inputs = []
    hook = model.model.layers[3].mlp.gate.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with hybrimoe.record(model) as trace:
        generate(model, tokens=3)
    hook.remove()
    router = model.model.layers[5].mlp.gate
    with torch.no_grad():
        wanted = router(inputs[-1])[2]

    forecasts = trace.forecasts(trace.steps - 1, 3)
    assert [f.layer for f in forecasts] == [4, 5, 6]
    assert sorted(forecasts[1].experts.tolist()) == sorted(wanted[0].tolist())
    assert ((forecasts[1].probability >= 0.49) & (forecasts[1].probability <= 1)).all()
    assert trace.forecasts(trace.steps - 1, 11) == []


def test_forecasts_come_true_more_often_than_tables_of_ids(model):
    with hybrimoe.record(model) as trace:
        generate(model, tokens=30, prompt=20)
    hits = [
        np.isin(
            trace.loads(step)[layer + 1].experts, trace.forecasts(step, layer)[0].experts
        ).mean()
        for step in np.flatnonzero(~trace.prefill)
        for layer in range(11)
    ]

    assert np.mean(hits) > 0.7


def test_a_wrapped_model_records_the_same_routing(model):
    with hybrimoe.record(model) as plain:
        generate(model, tokens=2)
    hybrimoe.wrap(model, weights="native")
    with hybrimoe.record(model) as wrapped:
        generate(model, tokens=2)

    assert (plain.ids[0, 0] == wrapped.ids[0, 0]).all()
    same = (plain.ids[:, :, :4, None] == wrapped.ids[:, :, None, :4]).any(3).mean()
    assert same > 0.95  # rounding may turn a close choice
    assert wrapped.shape == plain.shape
    assert wrapped.depth == 3


def test_recording_changes_nothing_and_leaves_no_hook(model):
    ids = torch.arange(8)[None]
    before = model(ids).logits
    with hybrimoe.record(model):
        during = model(ids).logits

    assert torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_routers_that_cannot_be_run_early_give_no_forecasts(model):
    for layer in model.model.layers:
        layer.mlp._modules["chooser"] = layer.mlp._modules.pop("gate")
        layer.mlp.__dict__["gate"] = layer.mlp._modules["chooser"]
    with hybrimoe.record(model) as trace:
        generate(model, tokens=2)

    assert trace.depth == 0
    assert trace.ids.shape[2] == 4


def test_a_pass_that_fails_is_no_step(model):
    with hybrimoe.record(model) as trace:
        hook = model.model.layers[6].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.arange(4)[None])
        hook.remove()
        model(torch.arange(4)[None])

    assert trace.steps == 1


def test_a_batch_is_one_step_of_several_tokens(model):
    with hybrimoe.record(model) as trace:
        out = model(torch.arange(10).view(2, 5), use_cache=True)
        model(torch.tensor([[3], [4]]), **cache_argument(model, cache_in(out)))

    assert trace.prefill.tolist() == [True, False]
    assert [trace.tokens(0), trace.tokens(1)] == [10, 2]


def test_a_trace_survives_the_disk_and_a_replay(model, tmp_path):
    with hybrimoe.record(model) as trace:
        generate(model)
    trace.save(tmp_path / "t.npz")
    loaded = hybrimoe.RoutingTrace.load(tmp_path / "t.npz")

    assert loaded.shape == trace.shape
    assert hybrimoe.simulate(loaded, "laptop") == hybrimoe.simulate(trace, "laptop")
    json.dumps(hybrimoe.simulate(loaded, "laptop").to_dict())


def test_nothing_run_is_an_empty_trace(model):
    with hybrimoe.record(model) as trace:
        pass

    assert trace.steps == 0


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(UnsupportedModelError), hybrimoe.record(torch.nn.Linear(2, 2)):
        pass


def test_a_depth_out_of_range_is_refused(model):
    with pytest.raises(ConfigError, match=r"depth must lie in \[0, 4\]"):
        hybrimoe.record(model, depth=9).__enter__()


def test_layers_that_do_not_all_run_are_refused(model):
    def skip(module, args):
        model.model.layers[-1].mlp.forward = lambda hidden: hidden

    model.model.layers[0].register_forward_pre_hook(skip)
    with pytest.raises(TraceError, match="11 of 12 layers"), hybrimoe.record(model):
        model(torch.arange(4)[None])


def test_a_layer_that_runs_twice_in_a_pass_is_refused(model):
    layers = model.model.layers
    layers[3].register_forward_hook(lambda layer, args, out: layers[3].mlp(out) + out)
    twice = "ran model.layers.3.mlp.experts more than once"
    with pytest.raises(TraceError, match=twice), hybrimoe.record(model):
        model(torch.arange(4)[None])
