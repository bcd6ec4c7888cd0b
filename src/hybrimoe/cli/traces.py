"""`hybrimoe trace` and `hybrimoe simulate`: record routing, and replay it on other machines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.choices import PRESETS, PROFILES
from hybrimoe.cli.source import Source, add_name, load_plain, source_of, tokenizer_of
from hybrimoe.cli.values import ensure_picture, ensure_readable, ensure_writable, positive
from hybrimoe.errors import ConfigError, ProfileError
from hybrimoe.sizes import expert_budget

if TYPE_CHECKING:
    from hybrimoe.policy.cost import CostModel
    from hybrimoe.policy.profiles import Profile
    from hybrimoe.simulation.simulator import Result
    from hybrimoe.simulation.statistics import Statistics
    from hybrimoe.simulation.trace import RoutingTrace


STEPS = 2000
"""Steps replayed unless told otherwise: seconds per preset, and hit rates within a point."""
FEWER_STEPS = 4000  # decode steps that statistics look at


def add_trace(commands: Any) -> None:
    """The arguments of `hybrimoe trace`."""
    parser = commands.add_parser("trace", help="record what a model's routers ask for")
    add_name(parser, "MODEL", "a folder, a name on the hub, or a .gguf file")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="one prompt per line, or .json: a list of texts or an object of them",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="T.npz")
    parser.add_argument("--tokens", type=positive, default=64, help="to generate per prompt")
    parser.add_argument(
        "--prompt-tokens", type=positive, default=512, help="cut longer prompts to this length"
    )
    parser.add_argument("--append", action="store_true", help="add to the traces already in T.npz")
    parser.add_argument("--heatmap", type=Path, metavar="PNG", help="draw how often experts ran")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_trace)


def add_simulate(commands: Any) -> None:
    """The arguments of `hybrimoe simulate`."""
    parser = commands.add_parser("simulate", help="replay a routing trace on a machine")
    parser.add_argument("trace", type=Path, metavar="T.npz", help="what `hybrimoe trace` wrote")
    parser.add_argument(
        "--profile",
        type=_profile,
        default="desktop",
        help=f"{', '.join(PROFILES)}, or a JSON file of a profile or a measured cost model",
    )
    parser.add_argument(
        "--vram", type=_budget, default="0.25", help='bytes, "6GiB" or a fraction of all experts'
    )
    parser.add_argument(
        "--presets",
        type=_presets,
        default="all",
        help=f"all, or some of {', '.join(PRESETS)}, with commas",
    )
    parser.add_argument(
        "--steps",
        type=_steps,
        default=STEPS,
        help=f"replay about so many steps, in whole sequences; all for all of them ({STEPS})",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the time per token by lane")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_simulate)


def run_trace(options: argparse.Namespace) -> dict[str, Any]:
    """Generate from every prompt, write the trace, and say what it is like."""
    ensure_writable(options.output, "--output")
    ensure_picture(options.heatmap, "--heatmap")
    prompts = read_prompts(options.prompts)
    from hybrimoe.simulation.foreign import read_trace
    from hybrimoe.simulation.recorder import merge
    from hybrimoe.simulation.statistics import statistics

    before = read_trace(options.output) if options.append and options.output.exists() else None
    trace = _record(options, prompts)
    if before is not None:
        trace = merge([before, trace])
    trace.save(options.output)
    found = statistics(shorten(trace, FEWER_STEPS), depth=3)
    if not options.json:
        print(_describe(trace, found, options.output))
    if options.heatmap:
        from hybrimoe.simulation import plots

        plots.save(plots.draw_heatmap(trace.frequencies(), trace.model), options.heatmap)
    return _facts(trace, found) | {"path": str(options.output)}


def run_simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Replay the trace under each preset and compare."""
    ensure_readable(options.trace, "T.npz")
    ensure_picture(options.plot, "--plot")
    from tqdm import tqdm

    from hybrimoe.simulation.foreign import read_trace
    from hybrimoe.simulation.simulator import simulate

    whole = read_trace(options.trace)
    trace = whole if options.steps is None else shorten(whole, options.steps)
    profile = options.profile
    if isinstance(profile, Path):
        profile = read_profile(profile)
    rows = tqdm(options.presets, "presets", disable=None, leave=False)
    results = [
        simulate(trace, profile, name, vram=options.vram, prior=whole.frequencies())
        for name in rows
    ]
    if not options.json:
        print(_head(options, whole, trace, results[0]))
        print(table(results))
    if options.plot:
        from hybrimoe.simulation import plots

        title = f"{trace.model or 'unnamed model'}, {options.trace.name}: {trace.steps} steps"
        plots.save(plots.draw_lanes(results, title), options.plot)
    return {
        "trace": str(options.trace),
        "model": trace.model,
        "profile": results[0].profile,
        "vram": options.vram,
        "slots": results[0].slots,
        "experts": trace.layers * trace.experts,
        "steps": trace.steps,
        "of_steps": whole.steps,
        "results": [result.to_dict() for result in results],
    }


def read_prompts(path: Path) -> list[str]:
    """Texts from a .json list or object, or one per line; empty ones are left out."""
    ensure_readable(path, "--prompts")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from error
    if isinstance(found, dict):
        found = list(found.values())
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ConfigError(f"--prompts {path} must hold a list or an object of texts")
    prompts = [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt")
    return prompts


def read_profile(path: Path) -> Profile | CostModel:
    """A profile, or the cost model that `hybrimoe calibrate` wrote, from JSON."""
    from hybrimoe.policy.cost import CostModel
    from hybrimoe.policy.profiles import Profile

    try:
        numbers = json.loads(path.read_text())
    except ValueError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error
    if isinstance(numbers, dict) and "version" in numbers:
        return CostModel.from_dict(numbers)
    if not isinstance(numbers, dict):
        raise ProfileError(f"{path} must hold one JSON object, got {type(numbers).__name__}")
    return Profile.from_dict(numbers)


def shorten(trace: RoutingTrace, steps: int) -> RoutingTrace:
    """About `steps` steps in whole sequences from all over the trace; a long last one is cut."""
    import numpy as np

    from hybrimoe.simulation.trace import sequences

    if trace.steps <= steps:
        return trace
    every = list(sequences(trace))
    wanted = max(round(len(every) * steps / trace.steps), 1)
    picked = [every[i * len(every) // wanted] for i in range(wanted)]
    return trace.select(np.concatenate(picked)[:steps])


def table(results: Sequence[Result]) -> str:
    """One line per preset, the fastest first."""
    head = (
        "preset",
        "ms/token",
        "prefill ms",
        "hits",
        "copies/token",
        "MiB/token",
        "idle CPU",
        "GPU",
        "link",
    )
    rows = [_row(result) for result in sorted(results, key=_speed)]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))]
        )
        for row in (head, *rows)
    ]
    return "\n".join(lines)


def _speed(result: Result) -> float:
    seconds = result.decode_s_per_token
    return (result.prefill_s or 0.0) if seconds is None else seconds


def _row(result: Result) -> tuple[str, ...]:
    idle = (f"{result.idle[lane]:.0%}" for lane in ("CPU", "GPU", "LINK"))
    return (
        result.preset,
        _ms(result.decode_s_per_token),
        _ms(result.prefill_s),
        f"{result.hit_rate:.1%}",
        f"{result.uploads_per_token:.1f}",
        f"{result.link_bytes_per_token / 2**20:.1f}",
        *idle,
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _head(
    options: argparse.Namespace, whole: RoutingTrace, trace: RoutingTrace, first: Result
) -> str:
    every = trace.layers * trace.experts
    return (
        f"{trace.model or options.trace.name} on {first.profile}: {first.slots} of {every} experts "
        f"({first.slots / every:.0%}) on the GPU; {trace.steps} of {whole.steps} steps"
    )


def _load(source: Source) -> tuple[Any, Any]:
    """Model and tokenizer; experts of a GGUF file come packed, which changes no routing."""
    import hybrimoe

    tokenizer = tokenizer_of(source)
    if source.gguf_file is None:
        return load_plain(source), tokenizer
    model = hybrimoe.from_pretrained(source.name, device="cpu", **source.arguments)
    return model.eval(), tokenizer


def _record(options: argparse.Namespace, prompts: list[str]) -> RoutingTrace:
    import torch
    from tqdm import tqdm

    import hybrimoe

    model, tokenizer = _load(source_of(options).reached())
    torch.manual_seed(0)
    with hybrimoe.record(model) as trace, torch.no_grad():
        for prompt in tqdm(prompts, "prompts", disable=None, leave=False):
            length = options.prompt_tokens
            inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=length)
            if inputs.input_ids.shape[1] == 0:
                raise ConfigError(f"the tokenizer makes no token of prompt {prompt[:40]!r}")
            model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    return trace


def _facts(trace: RoutingTrace, found: Statistics) -> dict[str, Any]:
    import numpy as np

    prefill = [trace.tokens(int(s)) for s in np.flatnonzero(trace.prefill)]
    return {
        "model": trace.model,
        "layers": trace.layers,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "sequences": int(np.unique(trace.sequence).size),
        "prefill_tokens": int(sum(prefill)),
        "decode_steps": trace.steps - len(prefill),
        "forecast_depth": trace.depth,
        "skew": found.skew,
        "overlap": found.overlap,
        "overlap_by_chance": found.overlap_by_chance,
        "reuse": found.reuse.tolist(),
        "recall": found.recall.tolist(),
    }


def _describe(trace: RoutingTrace, found: Statistics, path: Path) -> str:
    facts = _facts(trace, found)
    size = path.stat().st_size / 2**10
    reuse = " ".join(f"{share:.2f}" for share in found.reuse)
    recall = " ".join(f"{share:.2f}" for share in found.recall)
    return "\n".join(
        [
            f"{path}: {size:.0f} KiB, {trace.layers} layers of {trace.experts} experts, "
            f"top-{trace.top_k}",
            f"  recorded   {facts['sequences']} prompts, {facts['prefill_tokens']} tokens of "
            f"prefill, {facts['decode_steps']} decode steps, forecasts {trace.depth} layers ahead",
            f"  skew       the busiest quarter of the experts takes {found.skew:.0%} of the tokens",
            f"  overlap    {found.overlap:.2f} of {trace.top_k} experts are also the previous "
            f"token's (by chance {found.overlap_by_chance:.2f})",
            f"  reuse      by the next token, best-ranked expert first: {reuse}",
            f"  recall     of a table of ids alone, 1, 2, ... layers ahead: {recall}",
        ]
    )


def _steps(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _budget(text: str) -> str:
    try:
        expert_budget(text, 1)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _presets(text: str) -> list[str]:
    names = list(PRESETS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRESETS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of all, {', '.join(PRESETS)}")
    return names


def _profile(text: str) -> str | Path:
    if text in PROFILES:
        return text
    if Path(text).is_file():
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PROFILES)}, and no file")
