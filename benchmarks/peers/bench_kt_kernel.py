"""Time the expert layers of a random Qwen3-30B-A3B under kt-kernel's LLAMAFILE backend, CPU only.

Run: PEERS/venv/bin/python benchmarks/peers/bench_kt_kernel.py [--layers 6] [--threads 2]

The last line is JSON: {"name": ..., "tokens": {"1": seconds per layer, "32": ..., "512": ...}}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from typing import TextIO

import torch
from layout import KT_KERNEL, Layout, add_root_option
from shape import BYTES_PER_WEIGHT, TOKENS, D, E, F, K

PASSES = {1: 40, 32: 5, 512: 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_root_option(parser)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=list(BYTES_PER_WEIGHT), default="q4_0")
    arguments = parser.parse_args()

    report = divert_chatter()
    model = Layout(arguments.peers).model(arguments.layers, arguments.weights)
    stand_in_for_gpu_parts()
    layers = load(str(model), arguments.layers, arguments.threads)
    seconds = {str(tokens): median_s_per_layer(layers, tokens) for tokens in TOKENS}
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads > 1)
    name = f"kt-kernel {KT_KERNEL} LLAMAFILE {arguments.weights}, {threads}"
    print(json.dumps({"name": name, "tokens": seconds}), file=report, flush=True)


def divert_chatter() -> TextIO:
    """kt-kernel prints while it loads and after it ends: only our line may reach stdout."""
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return report


def stand_in_for_gpu_parts() -> None:
    """Importing kt-kernel wants Triton and pinned memory; neither is on the path timed here."""
    triton = types.ModuleType("triton")
    triton.jit, triton.cdiv = (lambda kernel: kernel), (lambda a, b: -(-a // b))
    triton.language = types.ModuleType("triton.language")
    triton.language.constexpr = int
    sys.modules["triton"], sys.modules["triton.language"] = triton, triton.language
    torch.cuda.is_available = lambda: False
    torch.empty, torch.zeros = without_pinning(torch.empty), without_pinning(torch.zeros)


def without_pinning(allocate):
    def plain(*size, pin_memory=False, **options):
        return allocate(*size, **options)

    return plain


def load(model: str, layers: int, threads: int) -> list:
    """One kt-kernel wrapper per layer, all experts on the CPU, one NUMA pool."""
    from kt_kernel import KTMoEWrapper

    wrappers = []
    for layer in range(layers):
        wrapper = KTMoEWrapper(
            layer_idx=layer,
            num_experts=E,
            num_experts_per_tok=K,
            hidden_size=D,
            moe_intermediate_size=F,
            gpu_experts_mask=None,
            cpuinfer_threads=threads,
            threadpool_count=1,
            weight_path=model,
            chunked_prefill_size=max(TOKENS),
            method="LLAMAFILE",
        )
        wrapper.load_weights(torch.arange(E, dtype=torch.int32))
        wrappers.append(wrapper)
    return wrappers


def median_s_per_layer(layers: list, tokens: int) -> float:
    """Each pass visits every layer with fresh routes, so no expert is still in the cache."""
    x = torch.randn(tokens, D).bfloat16()  # [T, D]
    weight = torch.full((tokens, K), 1 / K)  # [T, K]
    out = torch.zeros(tokens, D, dtype=torch.bfloat16)  # [T, D]
    times = []
    for _ in range(1 + PASSES[tokens]):
        slots = [uniform_routes(tokens) for _ in layers]
        start = time.perf_counter()
        for layer, chosen in zip(layers, slots):
            forward(layer, x, chosen, weight, out)
        times.append((time.perf_counter() - start) / len(layers))
    if not (out.isfinite().all() and out.any()):
        raise RuntimeError("kt-kernel returned zeros or non-finite values")
    return statistics.median(times[1:])  # the first pass warms up


def uniform_routes(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, E).topk(K).indices.contiguous()  # [T, K]


def forward(layer, x, slots, weight, out) -> None:
    """One layer, without the copies to and from a GPU that the public call makes."""
    batch = torch.tensor([x.shape[0]], dtype=torch.int32)
    pointers = [tensor.data_ptr() for tensor in (batch, slots, weight, x, out)]
    layer.cpu_infer.submit(layer.moe.forward_task(pointers[0], K, *pointers[1:], False))
    layer.cpu_infer.sync()


if __name__ == "__main__":
    main()
