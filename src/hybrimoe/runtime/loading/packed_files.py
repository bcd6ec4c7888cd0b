"""Packed experts on disk: a folder that loads at the speed of reading.

    hybrimoe.json            the manifest: what the other files must be; replaced in one step
    packed-3f09c2/           all files of one save; the manifest names the folder that counts
        config.json, dense.safetensors
        experts-00000.safetensors    one layer's blobs [E, expert_bytes] uint8, page-aligned

A save never touches files of an earlier one: until its manifest is in place the old one holds, and a
killed process leaves a folder that nothing names, which the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from hybrimoe.errors import CheckpointError, StorageError
from hybrimoe.kernels.layout import is_integer
from hybrimoe.kernels.threads import usable_cores
from hybrimoe.policy.cost import write_atomically
from hybrimoe.runtime.experts import PooledExperts
from hybrimoe.runtime.loading.checkpoints import check_file, parse_json, read_header
from hybrimoe.runtime.loading.reading import read_at
from hybrimoe.runtime.pool import checksum

MANIFEST, DENSE, LOCK = "hybrimoe.json", "dense.safetensors", ".hybrimoe.lock"
PREFIX = "packed-"
SCHEMA = 1
KERNEL_LAYOUT = 1
"""Raised when a change of the kernels gives the bytes of a blob another meaning."""
PAGE = 4096
CHUNK = 8 << 20
"""Bytes read and summed at a time: few enough to be summed in the cache."""
LARGEST_MANIFEST = 16 << 20


def save(
    model: Any,
    layers: list[PooledExperts],
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a wrapped model's packed experts, dense weights and manifest into a folder.

    progress: told the bytes of each layer that is written.
    Raises StorageError, with the old content whole, if the disk is full or refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} must be a folder, it is a file")
    dense = dense_state(model)
    with _failures_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        need = sum(layer.packed.blobs.nbytes + PAGE for layer in layers)
        need += sum(tensor.nbytes for tensor in dense.values())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise StorageError(f"{folder} needs {need} bytes, its disk has {free} free")
        with FileLock(folder / LOCK):
            _save_locked(model, layers, dense, folder, progress)


def _save_locked(
    model: Any,
    layers: list[PooledExperts],
    dense: dict[str, Tensor],
    folder: Path,
    progress: Callable[[int], object],
) -> None:
    part = folder / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    try:
        part.mkdir()
        model.save_pretrained(part, state_dict=dense, max_shard_size="100TB")
        os.replace(part / "model.safetensors", part / DENSE)
        entries = []
        for at, layer in enumerate(layers):
            entries.append(_write_layer(layer, part, at))
            progress(layer.packed.blobs.nbytes)
        manifest = {
            "schema_version": SCHEMA,
            "kernel_layout": KERNEL_LAYOUT,
            "folder": part.name,
            "dense": {"bytes": (part / DENSE).stat().st_size, "checksum": _file_sum(part / DENSE)},
            "layers": entries,
        }
        for file in (*part.iterdir(), part):
            _sync(file)
        # For AutoConfig and AutoTokenizer, which look in the folder itself.
        write_atomically(folder / "config.json", (part / "config.json").read_bytes())
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in folder.glob(f"{PREFIX}*"):
        if old != part:
            shutil.rmtree(old, ignore_errors=True)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that is not in the pool, by the model's own names."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PooledExperts):
            for name, parameter in module.original.named_parameters():
                if name not in module.shapes:
                    found[f"{module.name}.{name}"] = parameter.detach()
            continue
        if any(isinstance(parent, PooledExperts) for parent in _parents(model, prefix)):
            continue
        persistent = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in {**module._parameters, **persistent}.items():
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that `save` wrote, checked; None if it is another kind of folder."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    if check_file(path, folder) > LARGEST_MANIFEST:
        raise CheckpointError("is too long for a manifest", path)
    manifest = parse_json(path.read_bytes(), path)
    for name, known in (("schema_version", SCHEMA), ("kernel_layout", KERNEL_LAYOUT)):
        if manifest.get(name) != known:
            raise CheckpointError(
                f"{name} must be {known} for this version of hybrimoe, got "
                f"{str(manifest.get(name))[:40]}; load the original checkpoint and save it again "
                "with hybrimoe.save_packed",
                path,
            )
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    name, dense, layers = (manifest.get(key) for key in ("folder", "dense", "layers"))
    plain = isinstance(name, str) and name.startswith(PREFIX) and name[len(PREFIX) :].isalnum()
    if not plain:
        raise CheckpointError(f"names {str(name)[:80]!r}, which is no folder of packed files", path)
    if not _has(dense, {"bytes": int, "checksum": int}):
        raise CheckpointError("must say the bytes and the checksum of the dense weights", path)
    if not isinstance(layers, list) or not layers:
        raise CheckpointError("must list layers", path)
    for at, entry in enumerate(layers):
        if not _has(entry, ENTRY) or entry["file"] != _file_name(at):
            raise CheckpointError(f"holds no valid entry for layer {at}", path)


ENTRY = {
    "name": str,
    "file": str,
    "weights": str,
    "dtype": str,
    "format": str,
    "layout": dict,
    "shapes": dict,
    "experts": int,
    "checksum": int,
}
"""What the manifest says of a layer, with types."""


def check_dense(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the dense weights are those that were saved."""
    path = folder / DENSE
    size, wanted = check_file(path, folder.parent), manifest["dense"]
    if size != wanted["bytes"] or _file_sum(path) != wanted["checksum"]:
        raise CheckpointError("is not what was saved: damaged or cut off; save it again", path)


def fill(
    layers: list[PooledExperts],
    manifest: dict[str, Any],
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Read all blobs into the pool, in parallel, and compare their checksums.

    What a disk tier holds is only compared, and read from these files from now on.

    progress: told the bytes of each layer that is done.
    """
    entries = manifest["layers"]
    names, wanted = [layer.name for layer in layers], [entry["name"] for entry in entries]
    if names != wanted:
        raise CheckpointError(
            f"holds the experts of {len(wanted)} layers from {wanted[0]!r} on, the model of config.json "
            f"has {len(names)} from {names[0]!r} on",
            folder,
        )
    jobs = [_open_layer(layer, entry, folder) for layer, entry in zip(layers, entries)]
    tier = layers[0].pool.tier
    with ThreadPoolExecutor(max_workers=max(2, min(8, usable_cores()))) as pool:
        futures = [pool.submit(_read_layer, *job, tier is None) for job in jobs]
        try:
            for future, job in zip(futures, jobs):
                future.result()
                progress(job[2].nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for layer, entry, (path, offset, blobs, _) in zip(layers, entries, jobs):
        layer.is_filled, layer.checksum = True, entry["checksum"]
        if tier is not None:
            tier.backing.adopt(layer.index, path, offset, blobs)
            layer.pool.leave_on_disk(layer.index)


def _open_layer(
    layer: PooledExperts, entry: dict[str, Any], folder: Path
) -> tuple[Path, int, np.ndarray, int]:
    """What `_read_layer` needs, once the file's header and the manifest agree with the model."""
    path = folder / entry["file"]
    blobs = layer.packed.blobs
    if entry != {**describe(layer), "file": entry["file"], "checksum": entry["checksum"]}:
        wrong = sorted(key for key, value in describe(layer).items() if entry[key] != value)
        raise CheckpointError(
            f"was packed from other experts than config.json describes: {', '.join(wrong)} of "
            f"{layer.name} differ",
            path,
        )
    check_file(path, folder.parent)
    stored = read_header(path).get(layer.name)
    if stored is None or stored.dtype != "U8" or stored.shape != blobs.shape:
        raise CheckpointError(f"must hold bytes of shape {blobs.shape}", path, layer.name)
    return path, stored.offset, blobs, entry["checksum"]


def _read_layer(path: Path, offset: int, blobs: np.ndarray, wanted: int, keep: bool) -> None:
    flat, total = blobs.reshape(-1), 0
    passing = np.empty(0 if keep else min(CHUNK, flat.size), np.uint8)
    with path.open("rb", buffering=0) as file:
        for at in range(0, flat.size, CHUNK):
            part = flat[at : at + CHUNK] if keep else passing[: flat.size - at]
            if read_at(file.fileno(), part, offset + at) < part.size:
                raise CheckpointError("ended early: it has become shorter", path)
            total += checksum(part)
    if total % 2**64 != wanted:
        raise CheckpointError(
            "does not have the checksum of the manifest: damaged; save it again", path
        )


def describe(layer: PooledExperts) -> dict[str, Any]:
    """What a layer's blobs are, as plain data, without their file and checksum."""
    packed = layer.packed
    return {
        "name": layer.name,
        "weights": packed.fmt if is_integer(packed.fmt) else "native",
        "dtype": str(layer.dtype).removeprefix("torch."),
        "format": packed.fmt,
        "layout": packed.layout._asdict(),
        "shapes": {name: list(shape) for name, shape in layer.shapes.items()},
        "experts": len(packed.blobs),
    }


def _write_layer(layer: PooledExperts, folder: Path, at: int) -> dict[str, Any]:
    blobs = layer.pool.blobs(layer.index)
    header = json.dumps(
        {layer.name: {"dtype": "U8", "shape": blobs.shape, "data_offsets": [0, blobs.nbytes]}}
    ).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    with open(folder / _file_name(at), "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        flat = memoryview(blobs.reshape(-1))  # type: ignore[arg-type]
        for start in range(0, len(flat), CHUNK):
            file.write(flat[start : start + CHUNK])
    return {**describe(layer), "file": _file_name(at), "checksum": checksum(blobs)}


def _file_name(at: int) -> str:
    return f"experts-{at:05d}.safetensors"


def _file_sum(path: Path) -> int:
    """Sum of a file's 8-byte words, the last one padded."""
    total, buffer = 0, np.zeros(CHUNK, np.uint8)
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := read_at(file.fileno(), buffer, at):
            buffer[count : -(-count // 8) * 8] = 0
            total += checksum(buffer[: -(-count // 8) * 8])
            at += count
    return total % 2**64


def _has(values: Any, types: dict[str, type]) -> bool:
    return isinstance(values, dict) and all(
        isinstance(values.get(name), kind) for name, kind in types.items()
    )


def _parents(model: nn.Module, path: str) -> Iterator[nn.Module]:
    parts = path.split(".")
    for depth in range(1, len(parts)):
        yield model.get_submodule(".".join(parts[:depth]))


def _sync(path: Path) -> None:
    """Have the disk hold a file or a folder; Windows knows no such thing for folders."""
    if path.is_dir() and os.name == "nt":
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    """What the system or safetensors say about writing, as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; what it held before is unchanged"
        ) from error
