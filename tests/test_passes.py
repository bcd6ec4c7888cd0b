"""Prefill and decode are told apart in every way of generating, by all who ask."""

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import families
import hybrimoe
from hybrimoe.models.passes import DECODE_TOKENS, Pass, read_pass
from hybrimoe.models.releases import CACHE_NAMES, cache_argument, cache_in

NAME = "mixtral.MixtralExperts"
PROMPT, NEW = 12, 5
PROMPTS = [[*range(5, 5 + PROMPT)], [20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    model = families.build(NAME)
    model.config._attn_implementation = "sdpa"  # the quickest that all ways know
    return model


@pytest.fixture
def seen(model):
    """The passes of the model, as they are read while the test runs."""
    found: list[Pass] = []
    hook = model.register_forward_pre_hook(
        lambda *call: found.append(read_pass(*call)), with_kwargs=True
    )
    yield found
    hook.remove()


def generate(model, ids=None, **settings):
    ids = torch.arange(5, 5 + PROMPT)[None] if ids is None else ids
    common = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    settings = common | {"attention_mask": torch.ones_like(ids)} | settings
    return model.generate(ids, **settings)


def kinds(passes: list[Pass]) -> list[tuple[int, bool]]:
    return [(one.tokens, one.is_decode) for one in passes]


def decode(tokens: int = 1, count: int = NEW - 1) -> list[tuple[int, bool]]:
    return [(tokens, True)] * count


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_a_prompt_and_then_token_after_token(model, seen, settings):
    generate(model, **settings)
    assert kinds(seen) == [(PROMPT, False), *decode()]
    assert [one.is_new for one in seen] == [True, *[False] * (NEW - 1)]


def test_a_left_padded_batch(model, seen):
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :4] = 0
    generate(model, torch.arange(5, 5 + 2 * PROMPT).view(2, -1), attention_mask=mask)
    assert kinds(seen) == [(2 * PROMPT, False), *decode(2)]


def test_beams(model, seen):
    generate(model, num_beams=3)
    assert kinds(seen) == [(3 * PROMPT, False), *decode(3)]


def test_a_prompt_of_one_token(model, seen):
    generate(model, torch.tensor([[7]]))
    assert kinds(seen) == [(1, False), *decode()]


def test_a_prompt_of_embeddings(model, seen):
    ids = torch.arange(5, 5 + PROMPT)[None]
    generate(model, ids, inputs_embeds=model.get_input_embeddings()(ids))
    assert kinds(seen) == [(PROMPT, False), *decode()]


def test_without_a_cache_every_pass_is_a_prompt(model, seen):
    generate(model, use_cache=False)
    assert kinds(seen) == [(PROMPT + n, False) for n in range(NEW)]
    assert all(one.is_new for one in seen)


def test_a_prompt_in_pieces(model, seen):
    generate(model, torch.arange(5, 41)[None], prefill_chunk_size=12)
    assert kinds(seen) == [(12, False)] * 3 + decode()
    assert [one.is_new for one in seen] == [True, *[False] * (NEW + 1)]


def test_drafts_of_an_assistant_are_verified_in_decode(model, seen):
    assistant = families.build(NAME)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0  # all four, always
    generate(model, assistant_model=assistant, max_new_tokens=15, min_new_tokens=15)
    assert not seen[0].is_decode
    assert max(one.tokens for one in seen[1:]) == 5
    assert all(one.is_decode for one in seen[1:])


def test_drafts_from_the_prompt_are_verified_in_decode(model, seen):
    again = torch.tensor([[5, 6, 7, 8] * 5])
    drafts = {"prompt_lookup_num_tokens": DECODE_TOKENS - 1}
    generate(model, again, max_new_tokens=12, eos_token_id=[127], **drafts)
    assert not seen[0].is_decode
    assert all(one.is_decode for one in seen[1:])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", CACHE_NAMES[:2])
@pytest.mark.parametrize("static", [True, False])
def test_a_long_continuation_is_a_prompt(model, seen, name, static):
    cache = StaticCache(model.config, max_cache_len=64) if static else DynamicCache()
    if "cache" not in cache_argument(model, cache):
        name = "past_key_values"  # an earlier release knows no other
    for tokens in (2, DECODE_TOKENS, DECODE_TOKENS + 1):
        model(torch.arange(5, 5 + tokens)[None], **{name: cache}, use_cache=True)
    assert kinds(seen) == [(2, False), (DECODE_TOKENS, True), (DECODE_TOKENS + 1, False)]
    assert [one.is_new for one in seen] == [True, False, False]


def test_candidates_of_contrastive_search_share_a_past(model, seen):
    cache = cache_in(model(torch.arange(5, 9)[None], use_cache=True))
    cache.batch_repeat_interleave(3)
    model(torch.tensor([[5], [6], [7]]), **cache_argument(model, cache))
    assert seen[1] == Pass(3, is_decode=True, is_new=False)


def test_arguments_by_position(model):
    cache = cache_in(model(torch.arange(5, 9)[None], use_cache=True))
    given = (torch.tensor([[5]]), None, None, cache)
    assert read_pass(model, given, {}) == Pass(1, is_decode=True, is_new=False)
    assert read_pass(model, given[:1], {}) == Pass(1, is_decode=False, is_new=True)


def flat(*parts: tuple[int, int], fill: int = 0, positions: bool = True, **more):
    """Arguments of a flattened batch; parts: (past, tokens) of each sequence."""
    tokens = [n for _, n in parts]
    ends = torch.tensor([0, *tokens]).cumsum(0)
    ends = torch.cat([ends, ends[-1:].expand(fill)])
    keys = torch.tensor([0, *(past + n for past, n in parts)]).cumsum(0)
    at = torch.cat([torch.arange(past, past + n) for past, n in parts] + [torch.zeros(fill).long()])
    given = {"input_ids": torch.ones(1, sum(tokens) + fill).long(), "cu_seq_lens_q": ends}
    given |= {"position_ids": at[None]} if positions else {"cu_seq_lens_k": keys}
    return {**given, **more}


FLAT = {
    "prompts": ([(0, 9), (0, 3)], Pass(12, False, True)),
    "decode": ([(9, 1), (3, 1), (700, 1)], Pass(3, True, False)),
    "drafts of each": ([(9, 8), (3, 5)], Pass(13, True, False)),
    "a prompt beside decode": ([(9, 1), (0, 20)], Pass(21, False, False)),
    "a short prompt beside decode": ([(9, 1), (0, 2)], Pass(3, False, False)),
    "the rest of a prompt beside decode": ([(9, 1), (64, 30)], Pass(31, False, False)),
}


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("case", FLAT)
def test_each_sequence_of_a_flattened_batch_counts(model, case, positions):
    parts, wanted = FLAT[case]
    assert read_pass(model, (), flat(*parts, positions=positions)) == wanted


def test_keys_may_differ_by_the_kind_of_layer(model):
    given = flat((9, 1), (3, 1), positions=False)
    keys = given.pop("cu_seq_lens_k")
    given["cu_seq_lens_k"] = {
        "sliding_attention": keys.clone().clamp(max=2),
        "full_attention": keys,
    }
    assert read_pass(model, (), given).is_decode


def test_a_fill_of_a_flattened_batch_is_no_sequence(model):
    assert read_pass(model, (), flat((9, 1), (3, 1), fill=6)) == Pass(8, True, False)


@pytest.mark.parametrize("axes", [1, 3, 4])
def test_positions_alone_tell_sequences_apart(model, axes):
    """Packed for training, or with a past that the caller keeps elsewhere."""
    for parts, wanted in FLAT.values():
        given = flat(*parts)
        at = given["position_ids"].expand(axes, -1, -1) if axes > 1 else given["position_ids"]
        alone = {"input_ids": given["input_ids"], "position_ids": at}
        assert read_pass(model, (), alone) == wanted


@pytest.mark.parametrize("fill", [0, 1, 7])
def test_positions_of_padding_mean_nothing(model, fill):
    """Of one left-padded row without a cache; callers fill in what they like."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    given = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "position_ids": positions}
    assert read_pass(model, (), given) == Pass(6, is_decode=False, is_new=True)
    elsewhere = {**given, "position_ids": positions + 9}
    assert read_pass(model, (), elsewhere) == Pass(6, is_decode=True, is_new=False)
    nothing = {**given, "attention_mask": torch.zeros_like(mask)}
    assert read_pass(model, (), nothing) == Pass(6, is_decode=False, is_new=True)


def test_continuous_batching_of_transformers(model, seen):
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else most of the RAM
    found = model.generate_batch(
        PROMPTS, settings, continuous_batching_config=small, progress_bar=False, warmup=False
    )
    assert sorted(len(one.generated_tokens) for one in found.values()) == [NEW, NEW]
    assert kinds(seen) == [(PROMPT + 3, False), *decode(2)]


class Unknown(nn.Module):
    """A model of nobody's library."""

    def forward(self, hidden):
        return hidden


@pytest.mark.parametrize("shape", [(2, 3, 8), (6, 8)])
def test_hidden_states_are_counted_too(shape):
    assert read_pass(Unknown(), (torch.zeros(shape),), {}) == Pass(6, False, True)


class States:
    """A cache of states only, as models without attention have."""

    def __init__(self, has_past):
        self.has_past = has_past

    def get_seq_length(self):
        raise ValueError("no layer knows a length")

    def has_previous_state(self):
        return self.has_past


def test_a_cache_without_a_length_tells_by_its_states(model):
    ids = torch.tensor([[5]])
    for has_past in (True, False):
        one = read_pass(model, (ids,), {"cache_params": States(has_past)})
        assert (one.is_decode, one.is_new) == (has_past, not has_past)


def test_statistics_recordings_and_the_runtime_agree(monkeypatch):
    """Drafts, and a batch of decode that is larger than a short prompt."""
    wrapped = hybrimoe.wrap(families.build(NAME), device="emulated", vram=0.5)
    hybrid = wrapped.hybrimoe.hybrid
    asked = []
    decoded = hybrid.meter.decoded
    monkeypatch.setattr(
        hybrid.meter, "decoded", lambda *given: asked.append(hybrid.passing) or decoded(*given)
    )
    with hybrimoe.record(wrapped) as trace:
        cache = cache_in(wrapped(torch.arange(5, 37).view(16, 2), use_cache=True))
        for tokens in (1, 4, DECODE_TOKENS + 1):
            more = torch.arange(16 * tokens).view(16, -1) % 100 + 5
            cache = cache_in(wrapped(more, **cache_argument(wrapped, cache)))
    stats = wrapped.hybrimoe.stats()

    assert trace.prefill.tolist() == [True, False, False, True]
    assert trace.sequence.tolist() == [0, 0, 0, 0]
    assert stats["decode_tokens"] == 16 * 5
    assert stats["prefill_tokens"] == 16 * (2 + DECODE_TOKENS + 1)
    assert [one.tokens for one in asked] == [16, 16, 64, 64]  # two layers
