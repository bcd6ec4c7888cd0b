"""Slot table, pool, executor and racing streams under any sequence of events, against the CPU alone."""

import warnings

import numpy as np
import reference
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrimoe.calibration.pool_cost import cost_of
from hybrimoe.config import Config
from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.formats.gate import NAMES, Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.policy.presets import PRESETS
from hybrimoe.runtime.coordinator import Hybrid
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.pool import ExpertPool

LAYERS, EXPERTS, TOP_K, D, F = 3, 6, 2, 64, 64


def make_pool() -> ExpertPool:
    """Random experts in float32, so that a wrong byte shows in the output."""
    pool, rng = ExpertPool(), np.random.default_rng(0)
    layout = expert_layout("float32", D, F, True, False)
    for _ in range(LAYERS):
        blobs = np.empty((EXPERTS, layout.expert_bytes), np.uint8)
        for e in range(EXPERTS):
            up = rng.standard_normal((2, F, D)).astype(np.float32) / 8
            down = rng.standard_normal((D, F)).astype(np.float32) / 8
            blobs[e] = reference.pack("float32", layout, up, down, None, None)
        pool.add(PackedLayer("float32", layout, Gate(NAMES.index("silu")), D, blobs))
    return pool


POOL = make_pool()


class Machine(RuleBasedStateMachine):
    """Passes of a model run while copies arrive early or late and memory comes and goes."""

    @initialize(
        preset=st.sampled_from(sorted(PRESETS)),
        slots=st.integers(LAYERS, LAYERS * EXPERTS),
        seed=st.integers(0, 1000),
    )
    def wrap(self, preset: str, slots: int, seed: int) -> None:
        self.fails = 0
        self.size = POOL.layer(0).layout.expert_bytes
        self.accelerator = EmulatedAccelerator(seed=seed, fault=self.fault)
        config = Config(device="emulated", preset=preset, vram=slots * self.size)
        cost = cost_of(POOL, self.accelerator, threads=1)
        self.hybrid = Hybrid(POOL, config, self.accelerator, cost, TOP_K, threads=1)
        self.layer = 0

    def fault(self, operation: str) -> None:
        if operation in ("copy", "experts") and self.fails > 0:
            self.fails -= 1
            if self.fails == 0:
                raise InsufficientMemoryError("the device is full", 1, 0)

    @rule(
        tokens=st.sampled_from([1, 1, 1, 2, 5, 30]),
        seed=st.integers(0, 1000),
        hot=st.integers(1, EXPERTS),
    )
    def run_layer(self, tokens: int, seed: int, hot: int) -> None:
        """The next layer of a pass; `hot` experts get all tokens, as skewed routing does."""
        rng = np.random.default_rng(seed)
        count = max(hot, TOP_K)
        ids = rng.random((tokens, count)).argsort(1)[:, :TOP_K].astype(np.int64)
        x = rng.standard_normal((tokens, D)).astype(np.float32)
        weights = rng.random((tokens, TOP_K)).astype(np.float32)
        expected = np.empty_like(x)
        packed = POOL.layer(self.layer)
        run_layer(packed, x, ids, weights, expected, Workspace(), "float32", 1)

        inputs = (torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of slots given up
            out, _ = self.hybrid.forward(self.layer, inputs)

        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-5)
        self.layer = (self.layer + 1) % LAYERS

    @rule(after=st.integers(1, 6))
    def run_out_of_memory_soon(self, after: int) -> None:
        self.fails = after

    @rule(seed=st.integers(0, 1000))
    def let_the_streams_catch_up(self, seed: int) -> None:
        self.accelerator.synchronize()

    @precondition(lambda self: self.hybrid.memory.slots > LAYERS)
    @rule(data=st.data())
    def lose_an_expert(self, data: st.DataObject) -> None:
        """As after a copy that failed: the slot is empty, its stamp is newer."""
        cache = self.hybrid.cache
        layers, experts = np.nonzero(cache.slot >= 0)
        if layers.size:
            i = data.draw(st.integers(0, layers.size - 1))
            self.accelerator.synchronize()
            cache.drop(int(layers[i]), int(experts[i]))

    @invariant()
    def no_slot_is_in_use_between_layers(self) -> None:
        assert (self.hybrid.cache.references == 0).all()

    @invariant()
    def the_slot_table_and_its_reverse_agree(self) -> None:
        cache = self.hybrid.cache
        taken = cache.slot[cache.slot >= 0]
        assert taken.size == np.unique(taken).size
        for layer, expert in np.argwhere(cache.slot >= 0):
            assert cache.owner[cache.slot[layer, expert]].tolist() == [layer, expert]
        owned = (cache.owner[:, 0] >= 0).sum()
        assert owned == taken.size == cache.occupied.sum()

    @invariant()
    def what_has_arrived_is_what_the_host_holds(self) -> None:
        """Residents whose copies are all through hold the pool's very bytes."""
        hybrid, cache = self.hybrid, self.hybrid.cache
        now = hybrid.engine.timeline.now
        for layer, expert in np.argwhere(cache.slot >= 0):
            slot = cache.slot[layer, expert]
            arrived = all(event.done for event in hybrid.executor.arrivals[slot])
            if arrived and cache.arrival[slot] <= now:
                held = self.accelerator.slab[slot, : self.size]
                assert np.array_equal(held, POOL.layer(layer).blobs[expert])

    @invariant()
    def memory_is_one_slab_of_the_cache_s_size(self) -> None:
        cache = self.hybrid.cache
        rows = cache.slots + cache.staging + 1 if cache.slots else 0
        assert len(self.accelerator.slab) == rows

    def teardown(self) -> None:
        if hasattr(self, "hybrid"):
            self.fails = 0
            self.hybrid.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
