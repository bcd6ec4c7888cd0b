"""A format that the package does not have: nibbles with a float32 scale, which no weight exceeds."""

import numpy as np

from hybrimoe.formats.activations import with_sum
from hybrimoe.formats.base import NIBBLES, BlobFormat
from hybrimoe.simd.isa import dot_nibbles, start_nibbles
from hybrimoe.simd.vectors import add_scaled, high_nibbles, load_bytes, load_f32, low_nibbles


def rows_wide4(fmt, isa, total, blob, at, groups, x, x_at):
    for g in range(groups):
        gx, here = x_at + g * 40, at + g * 320
        ints = start_nibbles(isa, x, gx + 36)
        for j in range(4):
            packed = load_bytes(blob, here + j * 64)
            ints = dot_nibbles(isa, ints, low_nibbles(packed), x, gx + j * 8)
            ints = dot_nibbles(isa, ints, high_nibbles(packed), x, gx + j * 8 + 4)
        total = add_scaled(total, ints, load_f32(blob, here + 256), x, gx + 32)
    return total


def pack_wide4(fmt, row, blob, at, lane, g, work):
    largest = np.float32(0)
    for i in range(32):
        largest = max(largest, abs(row[i]))
    if not largest <= np.float32(3e38):
        work[1] += 1
    scale, start = largest / np.float32(7), at + g * 320 + lane * 4
    inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
    blob.view(np.float32)[(at + g * 320 + 256) // 4 + lane] = scale
    for j in range(4):
        for b in range(4):
            low = np.int32(np.rint(row[j * 8 + b] * inverse)) + 8
            high = np.int32(np.rint(row[j * 8 + 4 + b] * inverse)) + 8
            blob[start + j * 64 + b] = low | (high << 4)


def unpack_wide4(fmt, row, blob, at, lane, g):
    scale = blob.view(np.float32)[(at + g * 320 + 256) // 4 + lane]
    start = at + g * 320 + lane * 4
    for j in range(4):
        for b in range(4):
            pair = np.int32(blob[start + j * 64 + b])
            row[j * 8 + b] = np.float32((pair & 15) - 8) * scale
            row[j * 8 + 4 + b] = np.float32((pair >> 4) - 8) * scale


# fmt: off
WIDE4 = BlobFormat(
    "wide4", NIBBLES, rows_wide4, with_sum, unpack_wide4, pack_wide4, zero=8, scale="float32",
)
# fmt: on
