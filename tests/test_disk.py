"""The disk tier by itself: results, who may be evicted, failures, threads, forks."""

import contextlib
import os
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybrimoe.errors import ConfigError, DiskReadError, PolicyError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.routing import Forecast
from hybrimoe.policy.timeline import Lane
from hybrimoe.runtime.disk.reader import Reader
from hybrimoe.runtime.disk.sizes import tier_sizes
from test_reader import readers
from tiers import EXPERTS, LAYERS, TOP_K, Disk, in_ram, make_job, make_tier

PROMPT = [[a, b] for a in range(EXPERTS) for b in range(EXPERTS) if a != b]


@pytest.fixture
def tier():
    made = []

    def make(slots, disk=None, **settings):
        made.append(make_tier(slots, disk, **settings))
        return made[-1]

    yield make
    for found, _ in made:
        found.close()
    assert readers() == []


def routings(steps, seed=0):
    """(layer, ids) of so many passes over all layers."""
    rng = random.Random(seed)
    for _ in range(steps):
        for layer in range(LAYERS):
            yield layer, [rng.sample(range(EXPERTS), TOP_K)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [TOP_K, 3, 7, 12, 23])
def test_decode_has_the_bits_of_all_in_ram(tier, slots, dtype):
    found, disk = tier(slots)
    for seed, (layer, ids) in enumerate(routings(20)):
        job = make_job(disk, layer, ids, seed, dtype)
        found.run(job)
        assert np.array_equal(job.out, in_ram(disk, job))
    assert disk.read_by == {"hybrimoe-reader"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [TOP_K, 3, 8, 12])
def test_a_prompt_that_asks_for_more_than_ram_holds_has_the_same_bits(tier, slots, dtype):
    found, disk = tier(slots)
    for layer in [0, 1, 2, 0, 1, 2]:
        job = make_job(disk, layer, PROMPT, layer, dtype)
        found.run(job)
        assert np.array_equal(job.out, in_ram(disk, job))


def test_only_the_shards_that_are_asked_for_count(tier):
    found, disk = tier(3)
    shards = np.zeros((EXPERTS, 2), np.int32)
    shards[[1, 3, 4, 6]] = [[0, 1], [0, 1], [0, 1], [0, 0]]
    job = make_job(disk, 0, PROMPT)._replace(shards=shards)
    found.run(job)

    assert np.array_equal(job.out, in_ram(disk, job))
    assert {expert for _, expert in disk.reads} == {1, 3, 4}


def test_a_call_without_tokens_reads_nothing(tier):
    found, disk = tier(3)
    job = make_job(disk, 0, np.zeros((0, TOP_K)))
    found.run(job)

    assert disk.reads == []


def test_what_is_in_ram_is_not_read_again(tier):
    found, disk = tier(4)
    for _ in range(5):
        found.run(make_job(disk, 0, [[1, 2]]))

    assert sorted(disk.reads) == [(0, 1), (0, 2)]
    counts = found.to_dict()
    assert (counts["hits"], counts["misses"], counts["late"]) == (8, 2, 0)
    assert counts["hit_rate"] == 0.8
    assert counts["reads"] == 2
    assert counts["read_bytes"] == 2 * disk.blobs[0].shape[1]
    assert counts["waited_s"] > 0


def test_often_used_experts_stay(tier):
    found, disk = tier(4)
    for step in range(40):
        found.run(make_job(disk, 0, [[0, 1 + step % 7]]))

    assert disk.reads.count((0, 0)) == 1


def test_every_layer_finds_slots_where_there_are_fewer_than_layers(tier):
    found, disk = tier(TOP_K)
    for layer in (0, 1, 2, 1, 0):
        job = make_job(disk, layer, PROMPT)
        found.run(job)
        assert np.array_equal(job.out, in_ram(disk, job))


# Forecasts.


def forecast(layer, experts, chance=0.9):
    ones = np.ones(len(experts), np.int32)
    return Forecast(layer, np.array(experts, np.int32), ones, np.full(len(experts), chance))


def test_a_forecast_that_comes_true_is_there_in_time(tier):
    found, disk = tier(8)
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [4, 5])])
    found.run(make_job(disk, 1, [[4, 5]]))

    assert disk.reads == [(0, 0), (0, 1), (1, 4), (1, 5)]
    counts = found.to_dict()
    assert (counts["forecast"], counts["forecast_used"]) == (2, 2)
    assert counts["misses"] == 2
    assert counts["hits"] + counts["late"] == 2


def test_an_improbable_forecast_is_not_read(tier):
    found, disk = tier(8)
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [4, 5], chance=0.1)])

    assert found.to_dict()["forecast"] == 0


def test_a_wrong_forecast_that_nobody_has_started_is_dropped(tier):
    go = threading.Event()
    found, disk = tier(12, Disk(fault=lambda k: k != 2 or go.wait(10)))
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [4, 5, 6, 7])])
    threading.Timer(0.05, go.set).start()
    found.run(make_job(disk, 1, [[0, 1]]))

    assert disk.reads == [(0, 0), (0, 1), (1, 4), (1, 0), (1, 1)]
    assert found.cache.slot[1, [5, 6, 7]].tolist() == [-1, -1, -1]


def test_a_forecast_takes_no_slot_of_what_is_used_more_often(tier):
    found, disk = tier(TOP_K)
    for _ in range(60):
        found.run(make_job(disk, 0, [[0, 1]]))
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [4, 5], chance=0.5)])

    assert found.to_dict()["forecast"] == 0


def test_forecasts_are_asked_for_only_where_something_is_missing_now_and_then(tier):
    found, disk = tier(20)
    asked = []

    def foresee():
        asked.append(True)
        return []

    for _ in range(200):
        found.run(make_job(disk, 0, [[0, 1]]), foresee)
        found.run(make_job(disk, 1, [[0, 1]]))
    assert 0 < len(asked) < 100

    asked.clear()
    for layer, ids in routings(60):
        found.run(make_job(disk, layer, ids), foresee)
    assert asked


def test_nobody_is_asked_about_a_layer_that_is_all_there_or_not_there_at_all(tier):
    found, disk = tier(20)
    found.run(make_job(disk, 1, PROMPT))

    for layer in (0, LAYERS - 1):
        found.run(make_job(disk, layer, [[0, 1]]), lambda: pytest.fail("asked"))


# Held slots.


def test_a_held_slot_is_never_evicted(tier):
    found, disk = tier(3)
    blob, slot = found.borrow(0, 5)
    for layer, ids in routings(20):
        job = make_job(disk, layer, ids)
        found.run(job)
        assert np.array_equal(job.out, in_ram(disk, job))
        assert np.array_equal(blob[: disk.blobs[0].shape[1]], disk.blobs[0][5])
    found.release(slot)


def race(found, disk, seconds=2.0):
    """Callers that compute and borrow at once; how often one saw another expert than its own."""
    wrong = []

    def call(seed):
        rng = random.Random(seed)
        for _ in range(40):
            layer, ids = rng.randrange(LAYERS), rng.sample(range(EXPERTS), TOP_K)
            if rng.random() < 0.5:
                job = make_job(disk, layer, [ids], seed)
                found.run(job)
                wrong.append(not np.array_equal(job.out, in_ram(disk, job)))
            else:
                blob, slot = found.borrow(layer, ids[0])
                os.sched_yield()
                wrong.append(
                    not np.array_equal(blob[: disk.blobs[0].shape[1]], disk.blobs[layer][ids[0]])
                )
                found.release(slot)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(call, range(3)))
    finally:
        sys.setswitchinterval(before)
    return sum(wrong)


def test_callers_at_once_see_their_own_experts(tier):
    found, disk = tier(6)

    assert race(found, disk) == 0


def test_without_the_hold_slots_would_be_taken_away(tier, monkeypatch):
    found, disk = tier(3)
    monkeypatch.setattr(Cache, "hold", lambda self, layer, experts: self.slot[layer, experts])
    monkeypatch.setattr(Cache, "release", lambda self, slots: None)
    blob, _ = found.borrow(0, 5)
    for layer, ids in routings(20):
        found.run(make_job(disk, layer, ids))

    assert not np.array_equal(blob[: disk.blobs[0].shape[1]], disk.blobs[0][5])


def test_without_waiting_for_reads_the_output_would_be_another(tier, monkeypatch):
    found, disk = tier(6, Disk(delay=0.01))
    monkeypatch.setattr(type(found), "_await", lambda *_: None)
    job = make_job(disk, 0, [[1, 2]])
    found.run(job)

    assert not np.array_equal(job.out, in_ram(disk, job))


def test_where_all_slots_are_lent_room_is_asked_for(tier):
    found, disk = tier(2)
    lent = [found.borrow(0, 0)[1], found.borrow(0, 1)[1]]
    with pytest.raises(PolicyError, match="all 2 slots"):
        found.run(make_job(disk, 1, [[2, 3]]))

    def make_room():
        if lent:
            found.release(lent.pop())
            return True
        return False

    found.make_room = make_room
    job = make_job(disk, 1, [[2, 3]])
    found.run(job)
    assert np.array_equal(job.out, in_ram(disk, job))


# Failures.


class Broken(Disk):
    """The k-th read fails."""

    def __init__(self, k, error=None):
        super().__init__(fault=self.fail)
        self.k, self.error = k, error or DiskReadError("Input/output error", "experts", 4096)

    def fail(self, k):
        if k == self.k:
            raise self.error


@pytest.mark.parametrize("slots", [TOP_K, 12])
@pytest.mark.parametrize("k", range(8))
def test_a_failing_read_is_raised_and_the_tier_works_afterwards(tier, k, slots):
    found, disk = tier(slots, Broken(k))
    raised = 0
    for seed, (layer, ids) in enumerate([*routings(4), (0, PROMPT), (1, PROMPT)]):
        job = make_job(disk, layer, ids, seed)
        try:
            found.run(job)
        except DiskReadError:
            raised += 1
            found.run(job)
        assert np.array_equal(job.out, in_ram(disk, job))
    assert raised == 1
    assert not found.cache.references.any()


def test_a_failing_forecast_is_raised_only_if_it_is_needed(tier):
    found, disk = tier(8, Broken(2))
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [4])])
    job = make_job(disk, 1, [[4, 5]])
    try:
        found.run(job)
    except DiskReadError:
        found.run(job)

    assert np.array_equal(job.out, in_ram(disk, job))


def test_a_lost_thread_is_raised_and_the_tier_works_afterwards(tier, monkeypatch):
    monkeypatch.setattr("hybrimoe.runtime.disk.reader.LOOK_S", 0.01)
    found, disk = tier(4)
    job = make_job(disk, 0, [[0, 1]])
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_work", lambda self: None)
        with pytest.raises(DiskReadError, match="ended"):
            found.run(job)
    found.run(job)

    assert np.array_equal(job.out, in_ram(disk, job))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_an_interrupt_at_any_moment_leaves_a_tier_that_works(tier):
    found, disk = tier(4, Disk(delay=0.0005))
    rng, interrupted = random.Random(0), 0
    for layer, ids in [*routings(2), (0, PROMPT)]:
        found.run(make_job(disk, layer, ids))  # compiling is not ours to interrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 6e-3))
                for layer, ids in routings(6, turn):
                    found.run(make_job(disk, layer, ids))
                found.run(make_job(disk, 0, PROMPT))
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            job = make_job(disk, turn % LAYERS, PROMPT, turn)
            found.run(job)
            assert np.array_equal(job.out, in_ram(disk, job))
            assert not found.cache.references.any()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_and_its_parent_both_go_on(tier):
    found, disk = tier(6, Disk(delay=0.002))
    found.run(make_job(disk, 0, [[0, 1]]), lambda: [forecast(1, [2, 3, 4])])  # under way
    job = make_job(disk, 1, PROMPT)
    wanted = in_ram(disk, job)
    child = os.fork()
    if child == 0:
        try:
            found.run(job)
            os._exit(0 if np.array_equal(job.out, wanted) else 1)
        except BaseException:
            os._exit(2)
    found.run(job)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(job.out, wanted)


def test_reads_are_spans_of_the_link(tier):
    found, disk = tier(4, trace=True)
    found.run(make_job(disk, 0, [[0, 1]]))
    spans = found.spans()

    assert [(span.lane, span.layer, span.what) for span in spans] == [
        (Lane.LINK, 0, "expert 0"),
        (Lane.LINK, 0, "expert 1"),
    ]
    assert all(span.seconds > 0 and span.bytes == disk.blobs[0].shape[1] for span in spans)
    found.reset()
    assert found.spans() == []
    with pytest.raises(ConfigError, match="trace=True"):
        tier(4)[0].spans()


# Budgets.


def test_budgets_are_bytes_text_or_a_fraction_of_the_experts():
    layers = [(8, 5000), (8, 4096)]  # a slot is two pages

    assert tier_sizes(0.5, layers, 2).slots == 8
    assert tier_sizes("0.25", layers, 2).slots == 4
    assert tier_sizes(8192 * 5 + 1, layers, 2).slots == 5
    assert tier_sizes("64KiB", layers, 2).slots == 8
    assert tier_sizes(1.0, layers, 2) is None
    assert tier_sizes(8 * 5000 + 8 * 4096, layers, 2) is None
    assert tier_sizes("1GiB", layers, 2) is None
    assert tier_sizes(0.5, layers, 2).slot_bytes == 8192
    assert tier_sizes(0.5, layers, 2).file_bytes == 8 * 8192 + 8 * 4096


@pytest.mark.parametrize("ram", [1, 0.01, "8KiB", 8192 * 2 - 1])
def test_a_budget_below_one_tokens_experts_is_refused(ram):
    with pytest.raises(
        ConfigError, match=r"ram must hold at least the 2 experts .*16384 bytes.*got"
    ):
        tier_sizes(ram, [(8, 5000), (8, 4096)], 2)


class TierMachine(RuleBasedStateMachine):
    """Whatever is run, borrowed, forecast or broken: each slot in use holds its own expert."""

    def __init__(self):
        super().__init__()
        self.disk = Disk(fault=self.fail)
        self.tier, _ = make_tier(5, self.disk)
        self.lent, self.failing = [], 0

    def fail(self, k):
        if self.failing:
            self.failing -= 1
            raise DiskReadError("injected")

    ids = st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:TOP_K]), min_size=1, max_size=6)
    layers = st.integers(0, LAYERS - 1)

    @rule(layer=layers, ids=ids, ahead=st.lists(st.integers(0, EXPERTS - 1), unique=True))
    def run(self, layer, ids, ahead):
        job = make_job(self.disk, layer, ids)
        forecasts = [forecast(layer + 1, ahead)] if ahead and layer + 1 < LAYERS else []
        try:
            self.tier.run(job, lambda: forecasts)
        except DiskReadError:
            return
        assert np.array_equal(job.out, in_ram(self.disk, job))

    @precondition(lambda self: len(self.lent) < 3)
    @rule(layer=layers, expert=st.integers(0, EXPERTS - 1))
    def borrow(self, layer, expert):
        found = None
        while found is None:  # which read meets an injected fault depends on the reader's thread
            with contextlib.suppress(DiskReadError):
                found = self.tier.borrow(layer, expert)
        self.lent.append((layer, expert, *found))

    @precondition(lambda self: self.lent)
    @rule(at=st.integers(0, 2))
    def give_back(self, at):
        self.tier.release(self.lent.pop(at % len(self.lent))[3])

    @rule(layer=layers, experts=st.lists(st.integers(0, EXPERTS - 1), unique=True))
    def want(self, layer, experts):
        self.tier.want(layer, experts)

    @rule(layer=layers, expert=st.integers(0, EXPERTS - 1))
    def expect(self, layer, expert):
        self.tier.expect(layer, expert)

    @rule()
    def breaks(self):
        self.failing += 1

    @invariant()
    def lent_slots_hold_their_experts(self):
        for layer, expert, blob, _ in self.lent:
            assert np.array_equal(
                blob[: self.disk.blobs[0].shape[1]], self.disk.blobs[layer][expert]
            )

    @invariant()
    def the_table_and_the_owners_agree(self):
        cache = self.tier.cache
        for slot, (layer, expert) in enumerate(cache.owner.tolist()):
            assert layer < 0 or cache.slot[layer, expert] == slot
        assert (cache.slot >= 0).sum() == (cache.owner[:, 0] >= 0).sum()
        assert cache.references.sum() == len(self.lent)

    def teardown(self):
        self.tier.close()


TierMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestTierMachine = TierMachine.TestCase
