"""Time whole forward passes of a random Qwen3-30B-A3B with few layers: hybrimoe beside llama.cpp.

Run: python benchmarks/peers/whole.py [--layers 6] [--threads 2] [--rounds 3] [--peers DIR]

Everything is packed: experts and dense layers as int4 here (the head as int8), as q4_0 there. Rounds
alternate. Decode is 48 tokens after a short prompt, the mean of all as llama-bench counts them;
prefill is 512 tokens. The vocabulary is small on both sides, so that the head does not drown a few
layers.

What lies between packed layers is float32 in the first row, as in llama.cpp, and bfloat16 in the
second, as most checkpoints are: `from_pretrained(..., dtype=torch.float32)` chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import shape
import torch
from layout import Layout, add_root_option
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.models.releases import cache_argument, cache_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import describe, finish

PROMPT, DECODE = 512, 48
PEER = "llama.cpp q4_0"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, packed; everything between packed layers in `dtype`."""
    config = Qwen3MoeConfig(
        **{"vocab_size": shape.VOCABULARY, "hidden_size": shape.D, "num_hidden_layers": layers},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_experts": shape.E, "num_experts_per_tok": shape.K},
        **{"moe_intermediate_size": shape.F, "intermediate_size": shape.F},
        norm_topk_prob=True,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.uniform_(-0.02, 0.02)
    for module in model.modules():  # buffers of rotary embeddings are not stored anywhere
        if hasattr(module, "inv_freq"):
            module.__init__(config)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:  # those are the same when packed
            parameter.data = parameter.data.to(dtype)
    return hybrimoe.wrap(model, device="cpu", weights="int4", linear="int4")


@torch.no_grad()
def ours(model: torch.nn.Module) -> dict[str, float]:
    """Tokens per second of prefill and decode."""
    ids = torch.randint(shape.VOCABULARY, (1, PROMPT))
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    filled = model(ids[:, :8], use_cache=True, logits_to_keep=1)
    past = cache_argument(model, cache_in(filled))
    token, start = ids[:, 8:9], time.perf_counter()
    for _ in range(DECODE):
        out = model(token, **past, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return {"prefill": PROMPT / prefill, "decode": DECODE / (time.perf_counter() - start)}


def theirs(bench: Path, model: Path, threads: int) -> dict[str, float]:
    """The same by llama-bench."""
    words = [bench, "-m", model, "-t", threads, "-p", PROMPT, "-n", DECODE, "-r", 1, "-o", "json"]
    done = subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE)
    tests = json.loads(done.stdout)
    return {"prefill" if t["n_prompt"] else "decode": t["avg_ts"] for t in tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    add_root_option(parser)
    options = parser.parse_args()
    layout = Layout(options.peers)
    gguf = layout.model(options.layers, "q4_0")
    torch.set_num_threads(options.threads)
    models = {f"hybrimoe {name}": build(options.layers, dtype) for name, dtype in DTYPES.items()}
    for model in models.values():
        ours(model)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*models, PEER)}
    for _ in range(options.rounds):
        for name, model in models.items():
            rows[name].append(ours(model))
        rows[PEER].append(theirs(layout.llama_bench, gguf, options.threads))
    print(f"{describe()}\n\n{'':18} {'prefill tokens/s':>17} {'decode tokens/s':>16}")
    medians = {
        name: {k: statistics.median(run[k] for run in runs) for k in ("prefill", "decode")}
        for name, runs in rows.items()
    }
    for name, row in medians.items():
        ratios = [
            statistics.median(
                mine[k] / its[k] for mine, its in zip(rows[name], rows[PEER], strict=True)
            )
            for k in ("prefill", "decode")
        ]
        print(f"{name:18} {row['prefill']:17.1f} {row['decode']:16.1f}", end="")
        print(f"   {ratios[0]:.2f}x {ratios[1]:.2f}x")
    finish("whole", [{"name": name, **row} for name, row in medians.items()], describe())


if __name__ == "__main__":
    main()
