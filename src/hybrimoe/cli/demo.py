"""`hybrimoe demo`: what a wrapped model does beside a plain one, in words that need no key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hybrimoe.cli.values import positive, weights
from hybrimoe.errors import ConfigError

BUNDLED = Path(__file__).resolve().parents[3] / "tests" / "assets" / "tiny-moe"
ROUNDS, TIMED_TOKENS = 3, 32
"""How often, and on how many tokens, both models are timed."""


def add_demo(commands: Any) -> None:
    """The arguments of `hybrimoe demo`."""
    demo = commands.add_parser("demo", help="wrap the bundled model, write some text, explain it")
    demo.add_argument("--model", type=Path, default=BUNDLED, help="a transformers MoE checkpoint")
    demo.add_argument("--weights", type=weights, metavar="FORMAT", help="(the smallest)")
    demo.add_argument("--prompt", default="def main(arguments):\n", help="text to continue")
    demo.add_argument("--tokens", type=positive, default=96, help="how many tokens to write")
    demo.add_argument("--json", action="store_true", help="end with one JSON object")
    demo.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> dict[str, Any]:
    """Wrap a copy of a model, stream text from it, and say what that saved, gained and changed."""
    import hybrimoe
    from hybrimoe.cli.side_by_side import Crowd, alternate, timed
    from hybrimoe.formats.registry import rounded

    options.weights = options.weights or rounded()[-1]

    plain, tokenizer = load_model(options.model, "--model")
    inputs = tokenizer(options.prompt, return_tensors="pt")
    if not inputs.input_ids.numel():
        raise ConfigError(f"--prompt must have at least one token, got {options.prompt!r}")
    _say(_head(options.model.name, plain))
    wrapped = hybrimoe.wrap(load_model(options.model, "--model")[0], weights=options.weights)
    models = {"plain": plain, "wrapped": wrapped}
    for model in models.values():
        timed(model, inputs.input_ids, 1)  # compiles, and touches every page once
    _write(wrapped, tokenizer, inputs, options.tokens)
    check = hybrimoe.verify(wrapped, inputs.input_ids)
    wrapped.hybrimoe.reset_stats()
    with Crowd(wrapped.hybrimoe.threads) as crowd:
        times = alternate(models, inputs.input_ids, TIMED_TOKENS, ROUNDS)
    before, after = (1 / times[name].decode_s for name in models)
    report = wrapped.hybrimoe.report()
    shared, shared_check = _share(options, inputs)
    _say(f"  memory   {_memory(report)}")
    _say(f"  speed    {_speed(before, after)}")
    _say(f"  right    {_right(check)}")
    _say(f"  shared   {_shared(shared, shared_check)}")
    if crowd.warning:
        _say(f"  note     {crowd.warning}")
    _say("\nYour own model: `hybrimoe plan` says whether it fits, `hybrimoe bench` how fast it is.")
    options.failed = not (check.passed and shared_check.passed)
    return {
        "before_tokens_s": before,
        "after_tokens_s": after,
        "right": bool(check.passed and shared_check.passed),
        "cores_taken_by_others": crowd.missing,
        "report": report.to_dict(),
        "shared": shared.to_dict(),
    }


def load_model(path: Path, argument: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint; `argument` is where the user named it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (path / "config.json").is_file():
        where = (
            "it is part of a checkout of the project" if path == BUNDLED else f"got {str(path)!r}"
        )
        what = "the bundled model is missing" if path == BUNDLED else "no transformers checkpoint"
        raise ConfigError(f"{argument} must be a folder with a model: {what}, {where}")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(path)


def _share(options: argparse.Namespace, inputs: Any) -> tuple[Any, Any]:
    """Report and check of the same model with a quarter of its experts on an accelerator."""
    import torch

    import hybrimoe

    device = "cuda" if torch.cuda.is_available() else "emulated"
    model, _ = load_model(options.model, "--model")
    hybrimoe.wrap(model, weights=options.weights, device=device, vram=0.25)
    inputs = inputs.to(model.device)
    check = hybrimoe.verify(model, inputs.input_ids)
    model.hybrimoe.reset_stats()
    with torch.no_grad():
        model.generate(**inputs, min_new_tokens=32, max_new_tokens=32, do_sample=False)
    return model.hybrimoe.report(), check


def _write(model: Any, tokenizer: Any, inputs: Any, tokens: int) -> None:
    """Show the text that a model writes, the same one each time."""
    import torch
    from transformers import TextStreamer

    torch.manual_seed(0)
    with torch.no_grad():
        streamer = TextStreamer(tokenizer)
        count = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(**inputs, **count, do_sample=True, streamer=streamer)
    _say("")


def _head(name: str, model: Any) -> str:
    millions = model.num_parameters() / 1e6
    return f"{name}: {type(model).__name__}, {millions:.0f} million weights. It writes:\n"


def _memory(report: Any) -> str:
    before, after = report.expert_bytes_before, report.expert_bytes_after
    return (
        f"the experts take {after / 2**20:.1f} MiB as {report.weights}, {before / 2**20:.1f} MiB before "
        f"({after / before:.0%})"
    )


def _speed(before: float, after: float) -> str:
    return (
        f"{after:.1f} tokens/s, plain transformers {before:.1f}: {after / before:.1f}x "
        f"(median of {ROUNDS} turns each)"
    )


def _right(check: Any) -> str:
    """Whether all layers compute what they should, as a share of their output's size."""
    if not check.passed:
        return f"NO: {check.worst.name} computes something else than it should"
    off = check.worst.nmse**0.5
    return (
        f"yes: all {len(check.layers)} layers of experts, recomputed by torch from the same weights, "
        f"agree within {off:.1%}"
    )


def _shared(report: Any, check: Any) -> str:
    """What the accelerator did, and whether that was right."""
    counts = report.hybrid
    ran = max(counts["gpu_experts"] + counts["cpu_experts"], 1)
    is_real = counts["device"] != "emulated"
    where = "the GPU" if is_real else "an accelerator (emulated here: it shows results, not speed)"
    verdict = "right as well" if check.passed else f"NOT right: {check.worst.name}"
    return (
        f"with room for {counts['slots']} experts on {where},\n"
        f"           it ran {counts['gpu_experts'] / ran:.0%} of them and the CPU the rest: {verdict}"
    )


def _say(text: str) -> None:
    print(text, flush=True)
