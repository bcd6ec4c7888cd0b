"""Write a GGUF with random weights and the layer shape of Qwen3-30B-A3B.

Run: PEERS/venv/bin/python benchmarks/peers/write_gguf.py LAYERS OUT.gguf q4_0|q4_k|q8_0|bf16
     [--expert-hidden F]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from shape import BYTES_PER_WEIGHT, HEAD_SIZE, HEADS, KEY_HEADS, TWIN_F, VOCABULARY, D, E, F, K

BLOCK_ROWS = 4096

# Tokens must route independently and evenly, as in a trained model. The embedding therefore stays
# the largest part of the residual stream, and what the layers add to it is kept small.
EMBEDDING_STD, PROJECTION_STD, RESIDUAL_STD, ROUTER_STD = 1.0, 0.02, 0.001, 0.05

TYPES = {kind.name.lower(): kind for kind in GGMLQuantizationType}
FLOAT32 = GGMLQuantizationType.F32


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    std: of its random values; None fills it with ones.
    packed: in the file's weight type; otherwise float32.
    """

    name: str
    shape: tuple[int, ...]
    std: float | None
    packed: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", type=int)
    parser.add_argument("out")
    parser.add_argument("weights", choices=list(BYTES_PER_WEIGHT))
    parser.add_argument("--expert-hidden", type=int, default=F, help="F (%(default)s)")
    arguments = parser.parse_args()
    if arguments.layers < 1:
        parser.error(f"LAYERS must be at least 1, got {arguments.layers}")
    step = TWIN_F[arguments.weights]
    if arguments.expert_hidden < step or arguments.expert_hidden % step:
        parser.error(f"F must be a positive multiple of {step}, got {arguments.expert_hidden}")
    write(arguments.out, arguments.layers, arguments.expert_hidden, TYPES[arguments.weights])


def write(out: str, layers: int, expert_hidden: int, weights: GGMLQuantizationType) -> None:
    """Names and sizes go first, so that only one tensor is ever in memory."""
    writer = GGUFWriter(out, "qwen3moe")
    describe(writer, layers, expert_hidden)
    for tensor in tensors(layers, expert_hidden):
        values = content(tensor, weights)
        kind = weights if tensor.packed else FLOAT32
        writer.add_tensor_info(tensor.name, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors(layers, expert_hidden):
        writer.write_tensor_data(content(tensor, weights))
    writer.close()


def describe(writer: GGUFWriter, layers: int, expert_hidden: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(E)
    writer.add_expert_used_count(K)
    writer.add_expert_feed_forward_length(expert_hidden)
    # llama-bench draws token ids and never reads text, so any tokenizer of that size will do.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{token}>" for token in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def tensors(layers: int, expert_hidden: int) -> Iterator[Tensor]:
    yield Tensor("token_embd.weight", (VOCABULARY, D), EMBEDDING_STD)
    yield Tensor("output.weight", (VOCABULARY, D), PROJECTION_STD)
    yield Tensor("output_norm.weight", (D,), None, packed=False)
    for layer in range(layers):
        yield from attention(f"blk.{layer}.")
        yield from experts(f"blk.{layer}.", expert_hidden)


def attention(prefix: str) -> Iterator[Tensor]:
    yield Tensor(prefix + "attn_norm.weight", (D,), None, packed=False)
    yield Tensor(prefix + "attn_q_norm.weight", (HEAD_SIZE,), None, packed=False)
    yield Tensor(prefix + "attn_k_norm.weight", (HEAD_SIZE,), None, packed=False)
    yield Tensor(prefix + "attn_q.weight", (HEADS * HEAD_SIZE, D), PROJECTION_STD)
    yield Tensor(prefix + "attn_k.weight", (KEY_HEADS * HEAD_SIZE, D), PROJECTION_STD)
    yield Tensor(prefix + "attn_v.weight", (KEY_HEADS * HEAD_SIZE, D), PROJECTION_STD)
    yield Tensor(prefix + "attn_output.weight", (D, HEADS * HEAD_SIZE), RESIDUAL_STD)


def experts(prefix: str, expert_hidden: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "ffn_norm.weight", (D,), None, packed=False)
    yield Tensor(prefix + "ffn_gate_inp.weight", (E, D), ROUTER_STD, packed=False)
    yield Tensor(prefix + "ffn_gate_exps.weight", (E, expert_hidden, D), PROJECTION_STD)
    yield Tensor(prefix + "ffn_up_exps.weight", (E, expert_hidden, D), PROJECTION_STD)
    yield Tensor(prefix + "ffn_down_exps.weight", (E, D, expert_hidden), RESIDUAL_STD)


def content(tensor: Tensor, weights: GGMLQuantizationType) -> np.ndarray:
    """The tensor's values: float32, or uint8 with the packed bytes of a row last."""
    if tensor.std is None:
        return np.ones(tensor.shape, np.float32)
    if not tensor.packed:
        seed = list(tensor.name.encode())  # each layer its own router, the same in both passes
        return normal(seed, tensor.shape, tensor.std)
    # Packing is slow and its values do not matter to the time, so one block of rows is repeated:
    # every expert still has its own memory.
    block = packed_block(tensor.shape[-1], tensor.std, weights)
    return np.resize(block, (*tensor.shape[:-1], block.shape[-1]))


@cache
def packed_block(width: int, std: float, weights: GGMLQuantizationType) -> np.ndarray:
    if weights == GGMLQuantizationType.Q4_K:
        return random_q4_k(width, std)
    return quants.quantize(normal([width], (BLOCK_ROWS, width), std), weights)


def random_q4_k(width: int, std: float) -> np.ndarray:
    """gguf cannot pack q4_k, but every bit pattern under finite scales is a valid block."""
    blocks = BLOCK_ROWS * width // 256
    packed = np.random.default_rng(width).integers(0, 256, (blocks, 144), np.uint8)
    # A weight is scale * a * q - minimum * b, with q of 4 random bits, a and b of 6: at this ratio
    # its mean is zero, and 257 is its standard deviation in scales.
    scales = np.array([1, 7.5]) * std / 257
    packed[:, :4] = scales.astype(np.float16).view(np.uint8)
    return packed.reshape(BLOCK_ROWS, -1)


def normal(seed: list[int], shape: tuple[int, ...], std: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal(shape, np.float32) * np.float32(std)


if __name__ == "__main__":
    main()
