"""Spans of single experts for a plan that was carried out, for timelines and trace viewers."""

from hybrimoe.policy.cache import Move
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.routing import Load
from hybrimoe.policy.timeline import Array, Lane, Span


def draw(
    load: Load,
    plan: Plan,
    ready: Array,
    now: float,
    lanes: tuple[float, float],
    cost: CostModel,
    contended: bool,
) -> list[Span]:
    """Each expert on the GPU, and each copy that it waited for, as `planning.ends` times them.

    lanes: when GPU and link are free.
    """
    gpu, link = lanes
    order = {expert: i for i, expert in enumerate(load.experts.tolist())}
    copied, spans = set(plan.copies.tolist()), []
    for expert in plan.gpu.tolist():
        i = order[expert]
        tokens, part = int(load.tokens[i]), int(plan.shards[i]) / cost.shards
        arrival = now + float(ready[i])
        if expert in copied:
            size = round(cost.expert_bytes * part)
            seconds = cost.link(size, contended)
            what = label(expert, int(plan.shards[i]), cost.shards)
            spans.append(Span(Lane.LINK, link, seconds, what, load.layer, 1, tokens, size))
            link += seconds
            arrival = link
        seconds = max(cost.gpu_read, cost.gpu_token * tokens) * part + cost.gpu_launch
        start = max(gpu, arrival)
        what = label(expert, int(plan.shards[i]), cost.shards)
        spans.append(Span(Lane.GPU, start, seconds, what, load.layer, 1, tokens))
        gpu = start + seconds
    return spans


def draw_cpu(load: Load, plan: Plan, start: float, end: float, cost: CostModel) -> list[Span]:
    """Each expert on the CPU: its share of the time that all of them took together."""
    order = {expert: i for i, expert in enumerate(load.experts.tolist())}
    left = [
        (cost.shards - int(plan.shards[order[e]]), int(load.tokens[order[e]]), e)
        for e in plan.cpu.tolist()
    ]
    work = [n * (cost.cpu_expert + cost.cpu_token * tokens) for n, tokens, _ in left]
    scale, spans = (end - start) / sum(work), []
    for (shards, tokens, expert), seconds in zip(left, work):
        what = label(expert, shards, cost.shards)
        spans.append(Span(Lane.CPU, start, seconds * scale, what, load.layer, 1, tokens))
        start += seconds * scale
    return spans


def draw_copy(move: Move, span: Span, size: int) -> Span:
    """A copy in the background, named by the expert it brings."""
    return span._replace(what=f"e{move.expert} of layer {move.layer}", layer=move.layer, bytes=size)


def label(expert: int, shards: int, of: int) -> str:
    """The expert, and which part of it."""
    return f"e{expert}" if shards == of else f"e{expert} {shards}/{of}"
