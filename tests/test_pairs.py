"""Ids that name no expert of the layer: refused before anything reads them, or left out."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.errors import RoutingError
from mixed_models import PRUNED, pruned
from paths import TINY_MOE

WAYS = {
    "cpu": {},
    "disk": {"ram": 0.5},
    "accelerator": {"device": "emulated", "vram": 0.4},
    "both": {"device": "emulated", "vram": 0.4, "ram": 0.5},
}
LAYER = 4  # of five experts, with others of more: its ids end before the policies' arrays do
EXPERTS = PRUNED[LAYER].experts


@pytest.fixture(scope="module")
def plain():
    return pruned().model.layers[LAYER].mlp.experts


@pytest.fixture(scope="module", params=WAYS)
def model(request):
    return hybrimoe.wrap(pruned(), **WAYS[request.param])


@pytest.fixture
def layer(model):
    return model.hybrimoe.layers[LAYER]


def route(tokens=7, k=3):
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(EXPERTS, (tokens, k), generator=random)
    return torch.randn(tokens, 64, generator=random), ids, torch.rand(tokens, k, generator=random)


def blanked(tokens=7, k=3):
    """Some pairs of no expert: none, one, two, and in one token all of them."""
    hidden, ids, weights = route(tokens, k)
    blank = torch.arange(tokens)[:, None] % (k + 1) > torch.arange(k).flip(0)
    return hidden, ids.masked_fill(blank, EXPERTS), weights.masked_fill(blank, 0)


def share(experts, hidden, ids, weights):
    """What the others contribute, by experts that know of no such pairs."""
    blank = ids == EXPERTS
    return experts(hidden, ids.masked_fill(blank, 0), weights.masked_fill(blank, 0))


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def rest(model):
    """What no refused call may change: who is where, and who is in use."""
    runtime = model.hybrimoe
    caches = [x.cache for x in (runtime.hybrid, runtime.pool.tier) if x is not None]
    return [
        (
            cache.owner.tolist(),
            cache.references.tolist(),
            cache.books.tick,
            cache.books.steps.tolist(),
        )
        for cache in caches
    ]


@pytest.mark.parametrize("bad", [-1, EXPERTS, EXPERTS + 1, 16, 10**12, -(10**12), 2**62])
@pytest.mark.parametrize("tokens", [1, 7])
def test_foreign_ids_are_refused_and_change_nothing(model, layer, plain, bad, tokens):
    hidden, ids, weights = route(tokens)
    wanted = plain(hidden, ids, weights)
    before = rest(model)
    ids[0, 1] = bad
    for _ in range(3):
        with pytest.raises(RoutingError, match=rf"ids must lie in \[0, {EXPERTS}\), got {bad}$"):
            layer(hidden, ids, weights)
    assert rest(model) == before
    assert model.hybrimoe.hybrid is None or model.hybrimoe.hybrid.memory.sound
    ids[0, 1] = route(tokens)[1][0, 1]
    assert_close(layer(hidden, ids, weights), wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("tokens", [1, 3, 7, 40])
def test_pairs_of_no_expert_contribute_nothing(layer, plain, tokens, dtype):
    hidden, ids, weights = blanked(tokens)
    wanted = share(plain, hidden, ids, weights)

    assert_close(layer(hidden, ids.to(dtype), weights), wanted)


def test_a_pair_of_no_expert_that_is_not_alone_in_being_foreign_is_refused(layer):
    hidden, ids, weights = blanked()
    ids[0, 0] = -3
    with pytest.raises(RoutingError, match=r"got -3$"):
        layer(hidden, ids, weights)


def test_a_pair_of_no_expert_with_a_weight_is_refused(layer):
    hidden, ids, weights = blanked()
    for weight in (0.5, float("nan")):
        weights[ids == EXPERTS] = weight
        with pytest.raises(RoutingError, match=f"got {EXPERTS}$"):
            layer(hidden, ids, weights)


def test_no_pair_at_all_gives_zeros(layer):
    hidden, ids, weights = route()
    out = layer(hidden, torch.full_like(ids, EXPERTS), torch.zeros_like(weights))
    assert torch.equal(out, torch.zeros_like(hidden))


def test_gradients_pass_by_pairs_of_no_expert(layer, plain):
    given = blanked()
    found = []
    for compute in (partial(share, plain), layer):
        hidden, ids, weights = (tensor.clone() for tensor in given)
        hidden.requires_grad_(), weights.requires_grad_()
        compute(hidden, ids, weights).square().sum().backward()
        found.append((hidden.grad, weights.grad))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])


def test_gradients_of_foreign_ids_are_refused(layer):
    hidden, ids, weights = route()
    ids[2, 2] = 16
    with pytest.raises(RoutingError, match=r"got 16$"):
        layer(hidden.requires_grad_(), ids, weights)


@torch.no_grad()
def test_compiled_graphs_meet_the_same_rules(layer, plain):
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    given = blanked()
    assert_close(compiled(*given), share(plain, *given))
    given[1][0, 0] = -3
    with pytest.raises(RoutingError, match=r"got -3$"):
        compiled(*given)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, ids, weights: (hidden, ids.float(), weights),
        lambda hidden, ids, weights: (hidden, ids > 2, weights),
        lambda hidden, ids, weights: (hidden, ids[0, 0], weights),
        lambda hidden, ids, weights: (hidden, ids[None], weights[None]),
        lambda hidden, ids, weights: (hidden, ids[:3], weights[:3]),
        lambda hidden, ids, weights: (hidden, ids, weights[:, :1]),
        lambda hidden, ids, weights: (hidden[:, :32], ids, weights),
    ],
    ids=["floats", "bools", "one number", "three dimensions", "few", "narrow weights", "narrow"],
)
def test_other_kinds_and_shapes_are_refused_on_every_path(model, layer, plain, change):
    before = rest(model)
    with pytest.raises(RoutingError):
        layer(*change(*route()))
    assert rest(model) == before
    assert_close(layer(*route()), plain(*route()))


def test_a_norm_behind_the_experts_sees_only_pairs_of_an_expert():
    """As in Muse: each expert's own output is normalised, with a bias here, before it is weighed."""
    given = blanked()
    for way in WAYS.values():
        model = hybrimoe.wrap(pruned(), **way)
        layer, norm = model.hybrimoe.layers[LAYER], torch.nn.LayerNorm(64)
        torch.nn.init.normal_(norm.bias)
        hidden, ids, weights = given
        wanted = torch.zeros_like(hidden)
        for t, k in (ids != EXPERTS).nonzero().tolist():
            pair = hidden[t : t + 1], ids[t : t + 1, k : k + 1], torch.ones(1, 1)
            wanted[t] += norm(layer(*pair))[0].detach() * weights[t, k]
        layer.post_norm = norm
        assert_close(layer(*given).detach(), wanted)
        with pytest.raises(RoutingError, match=r"got -1$"):
            layer(hidden, torch.full_like(ids, -1), weights)
        with pytest.raises(RoutingError, match="one shape"):
            layer(hidden, ids, weights[:, :1])


def test_a_model_whose_router_is_another_ranks_generates_what_its_share_gives():
    """Every second expert is elsewhere, marked as transformers' expert-parallel routers mark it."""

    mark = 0  # for the plain model, whatever its version of transformers makes of marked pairs

    def elsewhere(module, args, output):
        logits, weights, ids = output
        away = ids % 2 == 1
        return logits, weights.masked_fill(away, 0), ids.masked_fill(away, mark)

    model = AutoModelForCausalLM.from_pretrained(
        TINY_MOE, dtype=torch.float32, num_hidden_layers=2, experts_implementation="eager"
    ).eval()
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(elsewhere)
    prompt = torch.arange(10, 24)[None]

    def tokens():
        return model.generate(prompt, max_new_tokens=6, do_sample=False).tolist()

    wanted, mark = tokens(), 32
    for way in WAYS.values():
        hybrimoe.wrap(model, **way)
        assert tokens() == wanted
        hybrimoe.unwrap(model)
