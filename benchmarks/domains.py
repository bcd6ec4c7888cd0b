"""tiny-moe by domain: every preset at every residency, and what a change of domain costs.

    python benchmarks/domains.py [--save DIR] [--quick]

Records the routing of the bundled model on its held-out text of three domains: a prompt of 32
tokens, then decode steps that read the text itself token by token, with the forecasts that the next
layers' routers make. One third of each domain's sequences says who is resident at the start, the
others are replayed. Hit rates, copies and precision do not depend on the machine much; times would
not mean anything for experts of 20 kB.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from hybrimoe.policy.cache import Cache
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.rankings import LFU, LRU, LRU2, MRS, NextToken, Ranking, Static
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.recorder import merge
from hybrimoe.simulation.simulator import simulate
from hybrimoe.simulation.synthesis import hit_rate
from hybrimoe.simulation.trace import RoutingTrace
from markdown import table

MODEL = Path(__file__).parents[1] / "tests" / "assets" / "tiny-moe"
RESIDENCY = (0.25, 0.5, 0.75)
PROMPT, SEQUENCES = 32, 3
WINDOW = 48  # tokens before and after a change of domain


def record_domains(tokens: int) -> dict[str, RoutingTrace]:
    """The routing of each held-out text, `tokens` decode steps per sequence."""
    import torch

    import hybrimoe
    from hybrimoe.cli.demo import load_model
    from hybrimoe.models.releases import cache_argument, cache_in

    model, tokenizer = load_model(MODEL, "MODEL")
    texts = json.loads((MODEL / "held_out.json").read_text(encoding="utf-8"))
    found = {}
    for domain, text in texts.items():
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        pieces = [ids[i * len(ids) // SEQUENCES :][: PROMPT + tokens] for i in range(SEQUENCES)]
        with hybrimoe.record(model) as trace, torch.no_grad():
            for piece in pieces:
                filled = model(piece[None, :PROMPT], use_cache=True)
                past = cache_argument(model, cache_in(filled))
                for token in piece[PROMPT:]:
                    model(token.view(1, 1), **past, use_cache=True)
        found[domain] = trace
    return found


def decode(trace: RoutingTrace) -> RoutingTrace:
    return trace.select(np.flatnonzero(~trace.prefill))


def recalls(trace: RoutingTrace) -> list[float]:
    """Share of the activated experts among the top-k of the routers' forecasts, by depth."""
    k, hits = trace.top_k, []
    single = np.flatnonzero(~trace.prefill)
    ids = trace.ids[trace.offsets[single], :, :k]
    for d in range(trace.depth):
        said = trace.forecast_ids[single][:, : trace.layers - 1 - d, d, :k]
        real = ids[:, d + 1 :]
        hits.append(float((real[..., None] == said[..., None, :]).any(axis=3).mean()))
    return hits


def facts(traces: dict[str, RoutingTrace]) -> list[tuple[str, ...]]:
    rows = []
    for domain, trace in traces.items():
        steps = decode(trace)
        slots = [round(r * trace.layers * trace.experts) for r in RESIDENCY]
        lru = [f"{hit_rate(steps, LRU(), n)[0]:.1%}" for n in slots]
        rows.append((domain, str(steps.steps), *lru, *(f"{r:.2f}" for r in recalls(trace))))
    return rows


def presets(traces: dict[str, RoutingTrace]) -> list[dict]:
    """Hit rate, copies and prefetch precision of every preset in every domain."""
    rows = []
    for name in PRESETS:
        for residency in RESIDENCY:
            for domain, trace in traces.items():
                first, rest = trace.split(1 / SEQUENCES)
                prior = first.frequencies()
                found = simulate(rest, "desktop", name, vram=residency, prior=prior)
                numbers = {
                    "hits": found.hit_rate,
                    "uploads": found.uploads_per_token,
                    "prefetches": found.prefetches_per_token,
                    "precision": found.prefetch_precision,
                }
                what = {"preset": name, "residency": residency, "domain": domain}
                rows.append(what | numbers)
    return rows


def show_presets(rows: list[dict]) -> str:
    """One line per preset and residency; hits / copies per token / precision per domain."""
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    head = ["preset", *(f"{d}: hits, copies, precision" for d in domains)]
    lines: dict[tuple[str, float], list[str]] = {}
    for r in rows:
        right = "-" if r["precision"] is None else f"{r['precision']:.0%}"
        cell = f"{r['hits']:.1%}, {r['uploads']:.1f}, {right}"
        lines.setdefault((r["preset"], r["residency"]), []).append(cell)
    return table(head, [(f"{n} {r:.0%}", *cells) for (n, r), cells in lines.items()])


def shifts(traces: dict[str, RoutingTrace], length: int, rounds: int) -> dict[str, list[float]]:
    """Hits of caches at 25 % just before a change of domain, just after, and later.

    Every miss is offered to the cache, as in published hit rates; the residents at the start are
    those of the first domain. A mean over all changes of domain but the first visits.
    """
    pieces = [decode(trace) for trace in traces.values()]
    order = [(d, r) for r in range(rounds) for d in range(len(pieces))]
    parts = [pieces[d].select(range(r * length, (r + 1) * length)) for d, r in order]
    whole = merge(parts)
    prior = pieces[0].frequencies()
    tried: dict[str, Ranking] = {
        **{"Static, by the first domain": Static(), "LRU": LRU(), "LFU": LFU(), "LRU-2": LRU2()},
        "MRS .5 (paper)": MRS(alpha=0.5),
        "MRS .1": MRS(alpha=0.1),
        "MRS .1, admitting": MRS(alpha=0.1, admission=True),
        "NextToken, admitting": NextToken(admission=True),
        "NextToken, admitting, model-wide": NextToken(admission=True, scope="model"),
        "Belady": Belady.of(whole),
    }
    found = {}
    for name, ranking in tried.items():
        hits = step_hits(whole, ranking, prior)
        starts = range(length, len(hits), length)
        spans = [(-WINDOW, 0), (0, WINDOW // 3), (WINDOW // 3, WINDOW)]
        found[name] = [float(np.mean([hits[s + a : s + b] for s in starts])) for a, b in spans]
    return found


def step_hits(trace: RoutingTrace, ranking: Ranking, prior: np.ndarray) -> np.ndarray:
    """[S] share of each step's experts that were resident, with a quarter of all experts."""
    slots = round(0.25 * trace.layers * trace.experts)
    cache = Cache(ranking, slots, trace.layers, trace.experts, trace.top_k, frequency=prior)
    cache.fill(prior)
    found = np.zeros(trace.steps)
    for step in range(trace.steps):
        for load in trace.loads(step):
            absent = load.experts[cache.ready(load.layer, load.experts) > 0]
            cache.observe(load)
            found[step] += 1 - absent.size / load.experts.size
            for expert in absent.tolist():
                cache.admit(load.layer, expert, load.experts)
    return found / trace.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the traces there too")
    parser.add_argument("--quick", action="store_true", help="shorter texts")
    options = parser.parse_args()
    traces = record_domains(64 if options.quick else 160)
    if options.save:
        for domain, trace in traces.items():
            trace.save(options.save / f"tiny-{domain}.npz")
    head = ("domain", "tokens", *(f"LRU {r:.0%}" for r in RESIDENCY))
    print("### Routing by domain\n")
    print(table((*head, "recall, depth 1", "2", "3"), facts(traces)))
    rows = presets(traces)
    print("\n### Presets by domain\n")
    print(show_presets(rows))
    length = 64 if options.quick else 96
    rounds = min(decode(t).steps for t in traces.values()) // length
    moved = shifts(traces, length, rounds)
    print(f"\n### A change of domain every {length} tokens, hits at 25 %\n")
    names = (f"{WINDOW} before", f"{WINDOW // 3} after", f"next {WINDOW - WINDOW // 3}")
    print(table(("cache", *names), [(n, *(f"{h:.1%}" for h in v)) for n, v in moved.items()]))
    results = {"facts": facts(traces), "presets": rows, "shifts": moved}
    print(json.dumps({"benchmark": "domains", "results": results}))


if __name__ == "__main__":
    main()
