"""Every family with decorated experts computes, wrapped, what it computes unwrapped."""

import pytest

import families
import parity
from parity import CLOSE, TOKENS, Parity

NAMES = families.decorated()


def measure(name: str) -> Parity:
    if name in families.SKIPPED:
        pytest.skip(f"{name}: {families.SKIPPED[name]}")
    return parity.single_thread(lambda: parity.measure(name))


def test_every_decorated_family_has_a_recipe_or_a_reason_to_be_skipped():
    assert families.missing() == []


@pytest.mark.parametrize("name", NAMES)
def test_native_float32_logits_match(name):
    result = measure(name)

    assert result.layers >= 1
    assert result.float32 <= 1


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_of_a_left_padded_batch_are_equal(name):
    if not families.generates(name):
        pytest.skip(f"{name}: the model has no head to generate with")
    assert measure(name).greedy == TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_left_padded_batch_match(name):
    assert measure(name).padded <= 1


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_one_token_match(name):
    assert measure(name).single <= 1


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_match_where_the_same_experts_are_taken(name):
    assert measure(name).bfloat16.routed <= CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_match_unless_rounding_moves_a_tie_of_the_router(name):
    """All that precedes the first token with other experts must still agree."""
    result = measure(name).bfloat16

    assert result.before_move <= CLOSE
    assert result.free <= CLOSE or result.moved


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_bit_equal_after_unwrap(name):
    assert measure(name).restored
