"""`hybrimoe plan`, `generate`, `bench` and `doctor`: what a new user types first."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.choices import DEVICES
from hybrimoe.cli.cache import add_keep_packed
from hybrimoe.cli.source import Source, add_name, load_plain, load_wrapped, source_of, tokenizer_of
from hybrimoe.cli.values import positive, size, weights
from hybrimoe.errors import ConfigError

if TYPE_CHECKING:
    from hybrimoe.cli.side_by_side import Timing


CONTEXT = 4096


def add_plan(commands: Any) -> None:
    """The arguments of `hybrimoe plan`."""
    parser = commands.add_parser("plan", help="will a model fit, and how fast will it be")
    add_name(parser)
    parser.add_argument("--vram", type=size("vram"), help="for expert slots on the GPU")
    parser.add_argument(
        "--ram", type=size("ram"), help="host memory for the whole model (what is available)"
    )
    parser.add_argument(
        "--weights", type=weights, metavar="FORMAT", help="the most precise that fits"
    )
    parser.add_argument("--context", type=positive, default=CONTEXT, help="tokens (%(default)s)")
    _add_json(parser, run_plan)


def add_generate(commands: Any) -> None:
    """The arguments of `hybrimoe generate`."""
    parser = commands.add_parser("generate", help="load a model and write text")
    add_name(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="as a message to a chat model")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--greedy", action="store_true", help="no sampling")
    parser.add_argument(
        "--weights", type=weights, metavar="FORMAT", help="the most precise that fits"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--vram", type=size("vram"), help="for expert slots on the GPU")
    add_keep_packed(parser)
    parser.add_argument("--stats", action="store_true", help="end with the report, on stderr")
    _add_json(parser, run_generate)


def add_bench(commands: Any) -> None:
    """The arguments of `hybrimoe bench`."""
    parser = commands.add_parser("bench", help="wrapped against plain transformers, side by side")
    add_name(parser)
    parser.add_argument("--weights", type=weights, metavar="FORMAT", help="(native)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--vram", type=size("vram"), help="for expert slots on the GPU")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--tokens", type=positive, default=32, metavar="N", help="to decode")
    add_keep_packed(parser)
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    _add_json(parser, run_bench)


def add_doctor(commands: Any) -> None:
    """The arguments of `hybrimoe doctor`."""
    parser = commands.add_parser(
        "doctor", help="what this machine offers, and what stands in the way"
    )
    _add_json(parser, run_doctor)


def run_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Print the plan; fails if the model does not fit."""
    from hybrimoe.hub import look_for

    source = source_of(options)
    if source.gguf_file is None:
        look_for(source.name, {})
    from hybrimoe.memory.plan import plan  # seconds, and in vain for a name of nothing

    sizes = options.vram, options.ram, options.weights, options.context
    found = plan(source.name, *sizes, gguf_file=source.gguf_file)
    options.failed = not found.fits
    if not options.json:
        print(found)
    return found.to_dict()


def run_doctor(options: argparse.Namespace) -> dict[str, Any]:
    """Print every finding; fails if one of them is a failure."""
    from hybrimoe.cli import doctor

    findings = doctor.examine()
    result = doctor.to_dict(findings)
    options.failed = not result["healthy"]
    if not options.json:
        print(doctor.as_text(findings))
    return result


def run_generate(options: argparse.Namespace) -> dict[str, Any]:
    """Stream the answer to stdout, and all else to stderr."""
    import torch
    from transformers import TextStreamer

    from hybrimoe.simd.stopwatch import stopwatch

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    source = source_of(options).reached()
    tokenizer = tokenizer_of(source)
    inputs = _encode(tokenizer, prompt, options.chat)
    length = inputs["input_ids"].shape[1]
    model, weights = load_wrapped(options, source, context=length + options.max_new_tokens)
    if options.stats or options.json:
        _warm(model, inputs["input_ids"])
    streamer = None
    if not options.json:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": False} if options.greedy else {}
    start = stopwatch.clock()
    with torch.no_grad():
        written = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, **sampling
        )
    seconds = stopwatch.clock() - start
    answer = written[0, length:]
    report = model.hybrimoe.report()
    if options.stats and not options.json:
        print(report, file=sys.stderr)
    return {
        "text": tokenizer.decode(answer, skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": len(answer),
        "seconds": seconds,
        "weights": weights,
        "report": report.to_dict(),
    }


def run_bench(options: argparse.Namespace) -> dict[str, Any]:
    """Time a wrapped and a plain copy in turns, and print one table."""
    import torch
    from transformers.utils import logging

    from hybrimoe.cli.side_by_side import Crowd, alternate, timed

    tokens = options.prompt_tokens + options.tokens
    source = source_of(options).reached(plain=True)
    if source.gguf_file is None and options.weights is None:
        options.weights = "native"
    _check_room_for_both(options, source, tokens)
    logging.disable_progress_bar()
    wrapped, weights = load_wrapped(options, source, tokens)
    plain = load_plain(source, copy.deepcopy(wrapped.config))
    generator = torch.Generator().manual_seed(0)
    size = (1, options.prompt_tokens)
    prompt = torch.randint(plain.config.get_text_config().vocab_size, size, generator=generator)
    models = {"plain": plain, "wrapped": wrapped}
    for model in models.values():
        timed(model, prompt, 1)  # compiles, and touches every page once
    with Crowd(wrapped.hybrimoe.threads) as crowd:
        times = alternate(models, prompt, options.tokens, options.rounds)
    result = _compare(options.prompt_tokens, times) | {
        "weights": weights,
        "cores_taken_by_others": crowd.missing,
    }
    if not options.json:
        print(_table(options, str(source), result))
        if crowd.warning:
            print(f"note: {crowd.warning}")
    return result


def _warm(model: Any, ids: Any) -> None:
    """Write two tokens, so that the statistics are of this machine's speed and not of its compiler."""
    import torch

    with torch.no_grad():
        start = ids[:, :8]
        model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2)
    model.hybrimoe.reset_stats()


def _compare(prompt_tokens: int, times: dict[str, Timing]) -> dict[str, Any]:
    """Tokens per second of each model, and how far their answers agree."""
    speeds = {
        name: {
            "prefill_tokens_s": prompt_tokens / timing.prefill_s,
            "decode_tokens_s": 1 / timing.decode_s,
        }
        for name, timing in times.items()
    }
    ours, theirs = times["wrapped"].answer, times["plain"].answer
    pairs = enumerate(zip(ours, theirs))
    equal = next((i for i, (mine, other) in pairs if mine != other), len(theirs))
    return speeds | {"equal_tokens": equal, "of_tokens": len(theirs)}


def _table(options: argparse.Namespace, name: str, result: dict[str, Any]) -> str:
    lines = [
        f"{name}: medians of {options.rounds} rounds in turns, prompt of "
        f"{options.prompt_tokens} tokens, {options.tokens} decoded, weights={result['weights']}",
        f"{'':10}{'prefill tokens/s':>18}{'decode tokens/s':>18}",
    ]
    for name in ("plain", "wrapped"):
        row = result[name]
        lines.append(f"{name:10}{row['prefill_tokens_s']:18.1f}{row['decode_tokens_s']:18.1f}")
    ratios = [result["wrapped"][key] / result["plain"][key] for key in result["plain"]]
    lines.append(f"{'ratio':10}{ratios[0]:17.2f}x{ratios[1]:17.2f}x")
    lines.append(f"greedy tokens equal: {result['equal_tokens']} of {result['of_tokens']}")
    return "\n".join(lines)


def _check_room_for_both(options: argparse.Namespace, source: Source, context: int) -> None:
    """Raise InsufficientMemoryError unless a plain and a wrapped copy fit together."""
    from hybrimoe.limits import ensure_host_fits
    from hybrimoe.memory.plan import plan
    from hybrimoe.sources.packed.manifest import read_manifest

    if source.gguf_file is None and read_manifest(Path(source.name)) is not None:
        raise ConfigError(
            f"bench compares with the plain model, but {source.name} holds packed experts only; "
            "give it the original checkpoint"
        )
    found = plan(source.name, weights=options.weights, context=context, gguf_file=source.gguf_file)
    advice = "bench keeps a plain and a wrapped copy; use a smaller model, or `generate --stats`"
    ensure_host_fits(found.peak_bytes + found.plain_bytes, f"bench of {source}", advice)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, Any]:
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif not tokenizer.chat_template:
        raise ConfigError(
            "--chat needs a model with a chat template, this one has none; leave it out"
        )
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError(f"--prompt must have at least one token, got {prompt[:40]!r}")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _add_json(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)
