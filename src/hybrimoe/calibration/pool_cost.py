"""The cost table that a wrapped model starts with."""

from __future__ import annotations

from dataclasses import replace

from hybrimoe.calibration.measure import calibrated, pooled_subject, stand_in
from hybrimoe.formats.layout import Layout
from hybrimoe.policy.cost import CostModel
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.pool import ExpertPool


def cost_of(
    pool: ExpertPool, accelerator: Accelerator, threads: int | None, deterministic: bool = False
) -> CostModel:
    """A cost table for the pool's experts: this machine's, if its times mean anything.

    The first wrap on a machine measures it for some seconds. A shipped profile's table stands in on
    an emulated accelerator, and where placement must not depend on measurements.
    """
    subject = pooled_subject(pool)
    if deterministic or not accelerator.measured:
        cost = stand_in(subject.layout)
    else:
        cost = calibrated(subject, accelerator, threads)
    return layered(cost, subject.layout, [layer.layout for layer in pool.layers if layer])


def layered(cost: CostModel, largest: Layout, layouts: list[Layout]) -> CostModel:
    """The cost of the largest expert, with that of each layer's own where they differ."""
    if set(layouts) == {largest}:
        return cost
    own = {
        each: cost.scaled(each.expert_bytes, each.shards, weights_in(each) / weights_in(largest))
        for each in set(layouts)
    }
    return replace(cost, layers=tuple(own[layout] for layout in layouts))


def weights_in(layout: Layout) -> int:
    """Weights of one expert, padding included."""
    return (layout.matrices + 1) * layout.hidden * layout.inner
