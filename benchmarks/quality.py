"""Perplexity of the bundled model on held-out text, per domain and format.

    python benchmarks/quality.py [--tokens 4096] [--model DIR]

The plain model computes in float32. A row's change is against it, on the same tokens.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hybrimoe
from machine import describe, finish

BUNDLED = Path(__file__).resolve().parents[1] / "tests" / "assets" / "tiny-moe"
WINDOW = 512


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    """exp of the mean loss over windows of 512 tokens."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1][None]
        logits = model(window[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum")
        total, count = total + float(loss), count + window.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="per domain")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = json.loads((options.model / "held_out.json").read_text())
    tokens = {
        domain: tokenizer(text, return_tensors="pt").input_ids[0, : options.tokens]
        for domain, text in texts.items()
    }
    results, plain = [], {}
    print(f"{'domain':14} {'weights':8} {'tokens':>6} {'perplexity':>11} {'change':>8}")
    for weights in (None, "native", "int8", "int4"):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        if weights:
            hybrimoe.wrap(model, weights=weights)
        for domain, ids in tokens.items():
            value = perplexity(model, ids)
            plain.setdefault(domain, value)
            change = value / plain[domain] - 1
            name = weights or "plain"
            print(f"{domain:14} {name:8} {len(ids):6} {value:11.4f} {change:8.3%}")
            row = {"domain": domain, "weights": name, "perplexity": value, "change": change}
            results.append(row)
    finish("quality", results, describe())


if __name__ == "__main__":
    main()
