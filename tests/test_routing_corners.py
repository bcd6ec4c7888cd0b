"""Batches that routers rarely make: empty, one token, one expert for all, ties, foreign ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import families
import hybrimoe
from hybrimoe.errors import RoutingError
from parity import violation, wrapped

NAME = "mixtral.MixtralExperts"
EXPERTS, HIDDEN = 8, 64


@pytest.fixture(scope="module")
def pair():
    """The same experts unwrapped and wrapped."""
    plain, pooled = families.build(NAME), hybrimoe.wrap(families.build(NAME))
    return families.experts(plain)[0], pooled.hybrimoe.layers[0]


def route(tokens: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(EXPERTS, (tokens, k), generator=random)
    weights = torch.rand(tokens, k, generator=random)
    return torch.randn(tokens, HIDDEN, generator=random), ids, weights


def assert_equal(pair: tuple[nn.Module, nn.Module], *args: Tensor) -> None:
    plain, pooled = pair
    got, wanted = pooled(*args), plain(*args)

    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert not got.numel() or violation(got, wanted) <= 1


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_routing_gives_what_the_original_gives(pair, tokens, k, seed):
    """An expert may even come twice for one token."""
    assert_equal(pair, *route(tokens, k, seed))


def test_an_empty_batch_gives_an_empty_result(pair):
    assert_equal(pair, *route(0, 2))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33])
def test_all_tokens_may_go_to_one_expert(pair, tokens):
    hidden, ids, weights = route(tokens, 1)

    assert_equal(pair, hidden, torch.full_like(ids, 5), weights)


def test_more_tokens_than_one_launch_takes_are_split(pair):
    assert_equal(pair, *route(2500, 2))


def test_strided_arguments_and_32_bit_ids_are_accepted(pair):
    hidden, ids, weights = route(6, 2)
    strided = torch.stack([hidden, hidden], 2)[..., 0]
    assert not strided.is_contiguous()
    plain, pooled = pair

    assert (
        violation(pooled(strided, ids.int(), weights.T.contiguous().T), plain(hidden, ids, weights))
        <= 1
    )


def test_zero_weights_and_large_inputs_are_as_in_the_original(pair):
    hidden, ids, weights = route(6, 2)

    assert_equal(pair, hidden, ids, torch.zeros_like(weights))
    assert_equal(pair, hidden * 1e3, ids, weights)


def test_a_nan_stays_in_its_token(pair):
    hidden, ids, weights = route(6, 2)
    hidden[2, 3] = float("nan")
    _, pooled = pair

    assert pooled(hidden, ids, weights).isnan().any(1).tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize("bad", [-1, EXPERTS, 10**9])
def test_ids_outside_of_the_experts_are_refused_before_launch(pair, bad):
    hidden, ids, weights = route(6, 2)
    ids[4, 1] = bad
    with pytest.raises(RoutingError, match=rf"expert ids must lie in \[0, {EXPERTS}\), got {bad}"):
        pair[1](hidden, ids, weights)
    assert_equal(pair, *route(6, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, ids, weights: (hidden[:, :32], ids, weights),
        lambda hidden, ids, weights: (hidden, ids[:3], weights),
        lambda hidden, ids, weights: (hidden, ids, weights[:, :1]),
        lambda hidden, ids, weights: (hidden.double(), ids, weights),
        lambda hidden, ids, weights: (hidden[None], ids, weights),
    ],
    ids=["narrow hidden", "few ids", "few weights", "double", "three dimensions"],
)
def test_arguments_of_other_shapes_are_refused_before_launch(pair, change):
    with pytest.raises(RoutingError):
        pair[1](*change(*route(6, 2)))
    assert_equal(pair, *route(6, 2))


def test_ties_of_the_router_are_broken_as_in_the_unwrapped_model():
    model = families.build(NAME)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.zero_()
    inputs = families.inputs(NAME, model)
    wanted = families.logits(model, inputs)
    with wrapped(model):
        assert violation(families.logits(model, inputs), wanted) <= 1
