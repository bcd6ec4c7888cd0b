"""`hybrimoe warmup`: compile ahead what a model needs, so that its first token does not wait for it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.choices import DEVICES
from hybrimoe.cli.source import Source, add_name, source_of
from hybrimoe.cli.values import linear, weights
from hybrimoe.errors import ConfigError

if TYPE_CHECKING:
    from hybrimoe.modules.warming import Need


"""Formats that are compiled where no model is named, for activations in bfloat16."""


def add_warmup(commands: Any) -> None:
    """The arguments of `hybrimoe warmup`."""
    parser = commands.add_parser("warmup", help="compile ahead what a model needs, or what most do")
    where = "a folder, a name on the hub, or a .gguf file, whose weights are not read (any model)"
    add_name(parser, where=where, optional=True)
    parser.add_argument(
        "--weights", type=weights, metavar="FORMAT", help="(native; without NAME, all)"
    )
    parser.add_argument("--linear", type=linear, metavar="FORMAT", help="of dense layers")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_warmup)


def run_warmup(options: argparse.Namespace) -> dict[str, Any]:
    """Compile in as many processes as there are cores, and say how long each kernel took."""
    from hybrimoe.modules.warming import compile_apart, needs_for

    shared, started = _is_shared(options.device), time.perf_counter()
    made = _to_make(options)
    kinds = sorted({(fmt, dtype) for fmt, dtype, _ in made})
    needs = [_packing(fmt, dtype) for fmt, dtype, packs in made if packs]
    needs += needs_for(kinds, options.linear, shared=False)
    if shared:
        needs += needs_for(kinds, None, shared=True)
    rows = []
    for need, seconds in compile_apart(needs):
        rows.append({**need._asdict(), "seconds": seconds})
        if not options.json:
            print(_line(rows[-1]), flush=True)
    return {"kernels": rows, "seconds": time.perf_counter() - started}


def _is_shared(device: str) -> bool:
    import torch

    return device in ("cuda", "emulated") or (device == "auto" and torch.cuda.is_available())


def _to_make(options: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """Each format and dtype of the model's layers, and whether weights are packed into it."""
    import torch

    from hybrimoe.formats.registry import choices
    from hybrimoe.models.weights import NATIVE, format_of

    if options.name is None:
        if options.gguf_file is not None:
            raise ConfigError(
                f"--gguf-file needs the folder of {options.gguf_file!r} too, got none"
            )
        given = [options.weights] if options.weights else choices()
        return [(format_of(each, torch.bfloat16), NATIVE[torch.bfloat16], True) for each in given]
    source = source_of(options)
    if source.gguf_file is not None:
        return _of_gguf(source)
    return _of_folder(source.name, options.weights)


def _of_folder(name: str, weights: str | None) -> list[tuple[str, str, bool]]:
    from hybrimoe.hub import refuse_path
    from hybrimoe.models.bytes import footprint_to_load
    from hybrimoe.models.skeleton import build_skeleton, read_config, weight_dtype
    from hybrimoe.models.weights import NATIVE
    from hybrimoe.sources.packed.manifest import read_manifest

    manifest = read_manifest(Path(name))
    if manifest is not None:
        layers = manifest["layers"]
        return _distinct((layer["format"], layer["dtype"], False) for layer in layers)
    if not Path(name).is_dir():
        refuse_path(name)
    config = read_config(name)
    shapes = footprint_to_load(build_skeleton(config, weight_dtype(config, {}))).layers
    return _distinct((s.fmt(weights or "native"), NATIVE[s.dtype], True) for s in shapes)


def _of_gguf(source: Source) -> list[tuple[str, str, bool]]:
    from hybrimoe.models.bytes import footprint_to_load
    from hybrimoe.models.weights import NATIVE
    from hybrimoe.sources.gguf.experts import prescribed
    from hybrimoe.sources.gguf.model import open_gguf

    place = {"gguf_file": source.gguf_file, "local_files_only": True}
    opened = open_gguf(source.name, place)
    shapes = footprint_to_load(opened.skeleton).keeping(prescribed(opened.layers)).layers
    return _distinct((s.fmt("native"), NATIVE[s.dtype], False) for s in shapes)


def _distinct(rows: Any) -> list[tuple[str, str, bool]]:
    return list(dict.fromkeys(rows))


def _packing(fmt: str, dtype: str) -> Need:
    from hybrimoe.modules.warming import Need

    return Need("packing", fmt, dtype)


def _line(row: dict[str, Any]) -> str:
    what = " ".join(part for part in (row["kind"], row["fmt"]) if part)
    dtype = f" in {row['dtype']}" if row["dtype"] else ""
    took = f"{row['seconds']:.1f} s" if row["seconds"] else "kept already"
    return f"{what + dtype:32}{took:>14}"
