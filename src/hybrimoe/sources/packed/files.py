"""Packed experts on disk: a folder that loads at the speed of reading.

    hybrimoe.json            the manifest: what the other files must be; replaced in one step
    config.json, tokenizer.json ...    what transformers looks for in a folder
    packed-3f09c2/           all files of one save; the manifest names the folder that counts
        config.json, dense.safetensors
        experts-00000.safetensors    one layer's blobs [E, expert_bytes] uint8, page-aligned
        linears.safetensors          packed dense layers, where there are any

A save never touches files of an earlier one: until its manifest is in place the old one holds, and a
killed process leaves a folder that nothing names, which the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from hybrimoe.choices import METHOD
from hybrimoe.errors import CheckpointError, StorageError
from hybrimoe.files import write_atomically
from hybrimoe.formats.layout import is_integer
from hybrimoe.models.weights import choice_of
from hybrimoe.modules.packed_linear import PackedLinear
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.runtime.pages import checksum
from hybrimoe.simd.threads import usable_cores
from hybrimoe.sources.companions import copy_companions
from hybrimoe.sources.packed.blobs import PAGE, file_sum, read_blob, write_blobs
from hybrimoe.sources.packed.folder import INDEX, MISSING_FILE
from hybrimoe.sources.packed.linears import StoredLinear, write_linears
from hybrimoe.sources.packed.manifest import (
    DENSE,
    KERNEL_LAYOUT,
    MANIFEST,
    PREFIX,
    SCHEMAS,
    file_name,
)
from hybrimoe.sources.safetensors import check_file, read_header

LOCK = ".hybrimoe.lock"


class Parts(NamedTuple):
    """What is written of a wrapped model.

    linear: the `Config.linear` that packed its dense layers. origin: the folder it came from, if known.
    """

    model: Any
    layers: list[PooledExperts]
    linears: list[PackedLinear]
    linear: str | None
    origin: Path | None

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed experts and dense layers."""
        experts = sum(layer.packed.blobs.nbytes for layer in self.layers)
        return experts + sum(linear.packed_bytes for linear in self.linears)


def save(parts: Parts, folder: Path, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write a wrapped model's packed layers, dense weights and manifest into a folder.

    progress: told the bytes that are written, part by part.
    Raises StorageError, with the old content whole, if the disk is full or refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} must be a folder, it is a file")
    dense = dense_state(parts.model)
    with _failures_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        need = parts.packed_bytes + PAGE * (len(parts.layers) + 1)
        need += sum(tensor.nbytes for tensor in dense.values())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise StorageError(f"{folder} needs {need} bytes, its disk has {free} free")
        with FileLock(folder / LOCK):
            _save_locked(parts, dense, folder, progress)


def _save_locked(
    parts: Parts, dense: dict[str, Tensor], folder: Path, progress: Callable[[int], object]
) -> None:
    part = folder / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    try:
        part.mkdir()
        manifest = _write_part(parts, dense, part, progress)
        for file in (*part.iterdir(), part):
            _sync(file)
        _write_face(parts, part, folder)
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in folder.glob(f"{PREFIX}*"):
        if old != part:
            shutil.rmtree(old, ignore_errors=True)


def _write_face(parts: Parts, part: Path, folder: Path) -> None:
    """What transformers looks for in the folder itself."""
    config = json.loads((part / "config.json").read_bytes())
    formats = {layer["weights"] for layer in map(describe, parts.layers)}
    settings = {"weights": choice_of(formats), "linear": parts.linear}
    config["quantization_config"] = {"quant_method": METHOD, **settings}
    index = {"metadata": {}, "weight_map": {METHOD: MISSING_FILE}}
    for name, content in (("config.json", config), (INDEX, index)):
        write_atomically(folder / name, json.dumps(content, indent=2, sort_keys=True).encode())
    generation = part / "generation_config.json"
    if generation.is_file():
        write_atomically(folder / generation.name, generation.read_bytes())
    copy_companions(parts.origin, folder)


def _write_part(
    parts: Parts, dense: dict[str, Tensor], part: Path, progress: Callable[[int], object]
) -> dict[str, Any]:
    """Write all files of one save; returns the manifest."""
    parts.model.save_pretrained(part, state_dict=dense, max_shard_size="100TB")
    os.replace(part / "model.safetensors", part / DENSE)
    entries = []
    for at, layer in enumerate(parts.layers):
        entries.append(_write_layer(layer, part, at))
        progress(layer.packed.blobs.nbytes)
    manifest = {
        "schema_version": min(SCHEMAS),
        "kernel_layout": KERNEL_LAYOUT,
        "folder": part.name,
        "dense": {"bytes": (part / DENSE).stat().st_size, "checksum": file_sum(part / DENSE)},
        "layers": entries,
    }
    if parts.linear is not None:
        linears = write_linears(parts.linears, parts.linear, part)
        manifest |= {"schema_version": max(SCHEMAS), "linears": linears}
        progress(sum(linear.packed_bytes for linear in parts.linears))
    return manifest


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
        if isinstance(module, PackedLinear):
            found |= {f"{prefix}.{name}": tensor for name, tensor in module.kept().items()}
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


def check_dense(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the dense weights are those that were saved."""
    path = folder / DENSE
    size, wanted = check_file(path, folder.parent), manifest["dense"]
    if size != wanted["bytes"] or file_sum(path) != wanted["checksum"]:
        raise CheckpointError("is not what was saved: damaged or cut off; save it again", path)


def fill(
    layers: list[PooledExperts],
    linears: Sequence[StoredLinear],
    manifest: dict[str, Any],
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Read all blobs, experts' into the pool, in parallel, and compare their checksums.

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
    rows = [(linear.path, linear.offset, linear.blob, linear.checksum) for linear in linears]
    _read([*((*job, tier is None) for job in jobs), *rows], progress)
    for layer, entry, (path, offset, blobs, _) in zip(layers, entries, jobs):
        layer.is_filled, layer.checksum = True, entry["checksum"]
        if tier is not None:
            tier.backing.adopt(layer.index, path, offset, blobs)
            layer.pool.leave_on_disk(layer.index)


def _read(jobs: list[tuple[Any, ...]], progress: Callable[[int], object]) -> None:
    """Carry out jobs for `read_blob`, some at a time."""
    with ThreadPoolExecutor(max_workers=max(2, min(8, usable_cores()))) as pool:
        futures = [pool.submit(read_blob, *job) for job in jobs]
        try:
            for future, job in zip(futures, jobs):
                future.result()
                progress(job[2].nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _open_layer(
    layer: PooledExperts, entry: dict[str, Any], folder: Path
) -> tuple[Path, int, np.ndarray, int]:
    """What `read_blob` needs, once the file's header and the manifest agree with the model."""
    path = folder / entry["file"]
    blobs = layer.packed.blobs
    wrong = sorted(key for key, value in describe(layer).items() if entry[key] != value)
    if wrong:
        raise CheckpointError(
            f"was packed from other experts than config.json describes: {', '.join(wrong)} of "
            f"{layer.name} differ",
            path,
        )
    check_file(path, folder.parent)
    stored = read_header(path).get(entry.get("tensor", layer.name))
    if stored is None or stored.dtype != "U8" or stored.shape != blobs.shape:
        raise CheckpointError(f"must hold bytes of shape {blobs.shape}", path, layer.name)
    return path, stored.offset, blobs, entry["checksum"]


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
    write_blobs(folder / file_name(at), {layer.name: blobs})
    return {**describe(layer), "file": file_name(at), "checksum": checksum(blobs)}


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
    """What the system, safetensors or configurations say about writing, as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, StrictDataclassError) as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; what it held before is unchanged"
        ) from error
