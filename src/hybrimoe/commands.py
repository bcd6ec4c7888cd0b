"""What each command of the CLI does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

import hybrimoe
from hybrimoe.compiling import stopwatch
from hybrimoe.errors import ConfigError


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Time a model as it is, wrap it, stream text from it, and print the report."""
    model, tokenizer = load_model(options.model, "--model")
    inputs = tokenizer(options.prompt, return_tensors="pt")

    def write(streamer: Any = None, tokens: int = options.tokens) -> float:
        torch.manual_seed(0)
        start = stopwatch.clock()
        model.generate(
            **inputs,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            streamer=streamer,
        )
        return tokens / (stopwatch.clock() - start)

    _say(f"{options.model.name}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M")
    write(tokens=8)
    before = write()
    _say(f"plain transformers: {before:.1f} tokens/s\n")
    hybrimoe.wrap(model, weights=options.weights)
    _say(f"wrapped: {model.hybrimoe}")
    write(tokens=8)
    check = hybrimoe.verify(model, inputs.input_ids)
    _say(f"verify: {check}\n")
    write(TextStreamer(tokenizer))
    model.hybrimoe.reset_stats()
    after = write()
    report = model.hybrimoe.report()
    _say(f"\n{report}")
    _say(f"  speed     {after:.1f} tokens/s wrapped, {before:.1f} tokens/s before, in this run")
    shared = _shared_demo(options, inputs)
    return {
        "before_tokens_s": before,
        "after_tokens_s": after,
        "report": report.to_dict(),
        "shared": shared,
    }


def _shared_demo(options: argparse.Namespace, inputs: Any) -> dict[str, Any]:
    """The same model with a quarter of its experts in slots of an accelerator."""
    model, _ = load_model(options.model, "--model")
    device = "cuda" if torch.cuda.is_available() else "emulated"
    hybrimoe.wrap(model, weights=options.weights, device=device, vram=0.25)
    which = "a real GPU" if device == "cuda" else "emulated: right in its results, not in its speed"
    _say(f"\nThe hybrid path, a quarter of the experts on an accelerator ({which}):")
    torch.manual_seed(0)
    model.generate(**inputs, min_new_tokens=32, max_new_tokens=32, do_sample=True)
    report = model.hybrimoe.report()
    _say(str(report))
    return report.to_dict()


def load_model(path: Path, argument: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint; `argument` is where the user named it."""
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{argument} must be a folder with a transformers checkpoint, got {path}; the bundled one "
            "is in a checkout of the project, under tests/assets/tiny-moe"
        )
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(path)


def _say(text: str) -> None:
    print(text, flush=True)
