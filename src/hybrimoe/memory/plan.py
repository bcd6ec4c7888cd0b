"""Will it fit, and how fast will it be: answered from shapes, before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe.errors import CheckpointNotFoundError, ConfigError, WrappedModelError
from hybrimoe.formats.registry import choices
from hybrimoe.hub import is_path, named_file
from hybrimoe.limits import MARGIN, HostMemory, host_memory
from hybrimoe.memory.placement import Budget, Placement, choose, nearest, place
from hybrimoe.memory.speed import expected_speed
from hybrimoe.memory.text import FormatPlan, MemoryPlan
from hybrimoe.models.bytes import Footprint, footprint_of
from hybrimoe.models.skeleton import (
    build_skeleton,
    kept_dtypes,
    packs_on_arrival,
    read_config,
    weight_dtype,
)
from hybrimoe.models.weights import format_of
from hybrimoe.sizes import parse_size, size_text
from hybrimoe.sources.gguf.experts import prescribed, refuse_format
from hybrimoe.sources.headers import Checkpoint, count_gguf, read_checkpoint
from hybrimoe.sources.quantized import refuse_declared, refuse_quantized_model
from hybrimoe.sources.safetensors import Catalogue
from hybrimoe.sources.stored_numbers import ensure_plain

Size = int | float | str | None


def plan(
    model: str | Path | nn.Module,
    vram: Size = None,
    ram: Size = None,
    weights: str | None = None,
    context: int = 4096,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> MemoryPlan:
    """What `hybrimoe.plan` does."""
    if weights is not None and weights not in choices():
        raise ConfigError(f"weights must be one of {', '.join(choices())} or None, got {weights!r}")
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise ConfigError(f"context must be a positive number of tokens, got {context!r}")
    for argument, size in (("vram", vram), ("ram", ram)):
        if size is not None:
            parse_size(argument, size)
    if isinstance(model, nn.Module):
        if gguf_file is not None:
            raise ConfigError(f"gguf_file is of no use with a loaded model, got {gguf_file!r}")
        return _of_model(model, _budget(vram, ram), weights, context)
    name, gguf_file = named_file(model, gguf_file)
    if gguf_file is not None:
        if weights is not None:
            refuse_format(weights)
        return _of_gguf(name, gguf_file, _budget(vram, ram), context, revision)
    checkpoint, tensors = read_checkpoint(name, revision)
    budget = _budget(vram, ram, checkpoint.mapped)
    return _of_name(name, checkpoint, tensors, budget, weights, context, revision)


def _budget(vram: Size, ram: Size, mapped: int = 0) -> Budget:
    return Budget(vram, _host(ram, mapped), _gpu_free())


def _host(ram: Size, mapped: int) -> HostMemory:
    """Memory to plan with; a margin is left of what was measured.

    mapped: bytes of files that the load maps, which some limits of the process count.
    """
    have = host_memory(mapped=mapped)
    if ram is None:
        return HostMemory(max(have.free - MARGIN, 0), have.limit)
    size = parse_size("ram", ram)
    if isinstance(size, float):
        return HostMemory(int(size * have.free), f"ram={ram!r} of the {have.limit}")
    return HostMemory(size, f"ram={ram!r}")


def _gpu_free() -> int | None:
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def _gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _of_name(
    name: str,
    checkpoint: Checkpoint,
    tensors: Catalogue,
    budget: Budget,
    weights: str | None,
    context: int,
    revision: str | None,
) -> MemoryPlan:
    formats = choices() if checkpoint.packed is None else (checkpoint.packed,)
    if weights is not None and weights not in formats:
        raise ConfigError(
            f"weights must be {checkpoint.packed!r}, which the experts in {name} were packed as, got "
            f"{weights!r}; plan the original checkpoint"
        )
    local = checkpoint.place == "cache"  # what is whole there needs no network
    config = read_config(name, revision=revision, local_files_only=local)
    refuse_declared(name, config, {key: tensor.dtype for key, tensor in tensors.items()})
    dtype = weight_dtype(config, checkpoint.stored)
    format_of("native", dtype)  # refuses what no door loads
    skeleton = build_skeleton(config, dtype)
    ensure_plain(skeleton, tensors)
    stored, streams = checkpoint.tensors, packs_on_arrival(skeleton)
    footprint = footprint_of(skeleton, context, kept=kept_dtypes(skeleton, dtype))
    dense = footprint.dense_bytes - checkpoint.saved
    footprint = replace(footprint, stored=stored, streams=streams, dense_bytes=dense)
    if checkpoint.kept is not None:
        footprint = footprint.keeping(checkpoint.kept.get)
        formats, weights = (_label(footprint),), None
    call = f"from_pretrained({name!r}"
    if revision is not None:
        call += f", revision={revision!r}"
    plan = _assemble(name, skeleton, footprint, budget, weights, call, formats)
    notes = _notes(footprint, checkpoint)
    return replace(plan, checkpoint=checkpoint, notes=notes + plan.notes)


def _of_gguf(
    name: str, gguf_file: str, budget: Budget, context: int, revision: str | None
) -> MemoryPlan:
    from hybrimoe.sources.gguf.model import open_gguf  # much of transformers comes with it

    place = {"revision": revision, "local_files_only": True}
    try:
        opened = open_gguf(name, {"gguf_file": gguf_file, **place})
    except CheckpointNotFoundError as error:
        if is_path(name) or Path(name).exists():
            raise
        raise CheckpointNotFoundError(
            f"{name}/{gguf_file} is not in the cache, and plan reads the header of a GGUF file from "
            f"the disk; fetch it first: hf download {name} {gguf_file}"
        ) from error
    counted = replace(footprint_of(opened.skeleton, context), stored=len(opened.dense))
    footprint = counted.keeping(prescribed(opened.layers))
    call = f"from_pretrained({name!r}, gguf_file={gguf_file!r}"
    if revision is not None:
        call += f", revision={revision!r}"
    plan = _assemble(name, opened.skeleton, footprint, budget, None, call, (_label(footprint),))
    held = sum(tensor.nbytes for layer in opened.layers.values() for tensor in layer)
    notes = _larger_note(held, plan.parts["experts"])
    checkpoint = count_gguf(name, opened.header)
    return replace(
        plan, model=f"{name}/{gguf_file}", checkpoint=checkpoint, notes=notes + plan.notes
    )


def _label(footprint: Footprint) -> str:
    """What to call the formats that files prescribe."""
    names = {layer.kept or "" for layer in footprint.layers}
    return names.pop() if len(names) == 1 else "mixed"


def _larger_note(held: int, packed: int) -> tuple[str, ...]:
    if packed <= 1.05 * held:
        return ()
    return (
        f"the experts take {size_text(held)} in the file and {size_text(packed)} in memory: types "
        "without a format of ours are kept in a wider one, plain numbers in the model's dtype",
    )


def _of_model(model: Any, budget: Budget, weights: str | None, context: int) -> MemoryPlan:
    if hasattr(model, "hybrimoe"):
        raise WrappedModelError(
            "plan takes a model before it is wrapped; see model.hybrimoe.report()"
        )
    refuse_quantized_model(model)
    skeleton = build_skeleton(model.config, next(model.parameters()).dtype, type(model))
    footprint = footprint_of(model, context, skeleton)
    held = footprint.dense_bytes + footprint.native_bytes
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return _assemble(
        name, model, footprint, replace(budget, held=held, wraps=True), weights, "wrap(model"
    )


def _assemble(
    name: str,
    model: Any,
    footprint: Footprint,
    budget: Budget,
    weights: str | None,
    call: str,
    formats: tuple[str, ...] = (),
) -> MemoryPlan:
    placements = {fmt: place(footprint, fmt, budget) for fmt in formats or choices()}
    chosen = choose(placements, weights)
    text, setting = nearest(footprint, placements, chosen, budget)
    keywords = "".join(f", {key}={value!r}" for key, value in (setting or {}).items())
    estimated = "the KV cache and activations are estimated by a formula, not counted"
    return MemoryPlan(
        model=name,
        family=type(model).__name__,
        weights=chosen.weights,
        context=footprint.context,
        experts=footprint.experts,
        top_k=footprint.top_k,
        slots=chosen.slots,
        parts=chosen.parts,
        layers={layer.name: layer.packed_bytes(chosen.weights) for layer in footprint.layers},
        kept={layer.name: layer.kept or chosen.weights for layer in footprint.layers},
        gpu=chosen.gpu,
        ram=chosen.ram,
        load_peak_bytes=chosen.load_peak,
        steady_bytes=chosen.steady,
        plain_bytes=footprint.plain_bytes,
        have_bytes=budget.room,
        have_limit=budget.host.limit,
        gpu_have_bytes=budget.gpu_free,
        fits=chosen.fits,
        nearest=text,
        call="" if setting is None else f"hybrimoe.{call}{keywords})",
        formats=tuple(map(_format, placements.values())),
        traced=footprint.forward.traced,
        checkpoint=None,
        speed=expected_speed(footprint, chosen.weights, chosen.slots, _gpu_name()),
        notes=() if footprint.forward.traced else (estimated,),
    )


def _format(placed: Placement) -> FormatPlan:
    sizes = placed.parts["experts"], placed.peak, placed.steady
    return FormatPlan(placed.weights, *sizes, placed.fits)


def _notes(footprint: Footprint, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a reader of the numbers should know about the files behind them."""
    stored, built = checkpoint.nbytes, footprint.dense_bytes + footprint.native_bytes
    if checkpoint.packed is None and abs(stored - built) > 0.05 * built:
        return (
            f"the files hold {size_text(stored)}, the model that transformers builds "
            f"{size_text(built)}: other parts, another dtype, or missing weights",
        )
    return ()
