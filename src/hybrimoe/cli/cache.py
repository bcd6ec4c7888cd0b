"""`hybrimoe cache`: which packed models are kept, how large they are, and away with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hybrimoe.errors import ConfigError

KEPT = "keep the packed model beside the cache of the hub, for a faster next start (default: yes)"


def add_keep_packed(parser: argparse.ArgumentParser) -> None:
    """The argument of commands that load a model."""
    parser.add_argument(
        "--keep-packed", action=argparse.BooleanOptionalAction, default=True, help=KEPT
    )


def add_cache(commands: Any) -> None:
    """The arguments of `hybrimoe cache`."""
    parser = commands.add_parser(
        "cache", help="list the packed models that are kept, or clear them"
    )
    parser.add_argument(
        "--clear",
        nargs="?",
        const=True,
        metavar="NAME",
        help="remove those of one model, or without NAME all of them",
    )
    parser.add_argument("--folder", type=Path, help="where they are (beside the cache of the hub)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_cache)


def run_cache(options: argparse.Namespace) -> dict[str, Any]:
    """List what is kept, or remove it and list what is gone."""
    from hybrimoe.sources import kept_packs

    folder = options.folder or kept_packs.home()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder must be a folder, {str(folder)!r} is a file")
    if options.clear is not None:
        name = None if options.clear is True else _known_by(options.clear)
        found = kept_packs.clear(folder, name)
    else:
        found = [pack.to_dict() for pack in kept_packs.packs(folder)]
    if not options.json:
        print(_table(found, folder, is_cleared=options.clear is not None))
    return {
        "folder": str(folder),
        "cleared" if options.clear is not None else "packs": found,
        "bytes": sum(pack["bytes"] for pack in found),
    }


def _known_by(name: str) -> str:
    """A model's name as packs note it: a folder by its whole path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _table(found: list[dict[str, Any]], folder: Path, is_cleared: bool) -> str:
    from hybrimoe.sizes import size_text
    from hybrimoe.sources.kept_packs import age_text

    total = size_text(sum(pack["bytes"] for pack in found))
    if not found:
        return f"no packed models in {folder}"
    lines = []
    for pack in found:
        parts = [pack["weights"] or "as in the file", pack["linear"] and f"linear {pack['linear']}"]
        fmt = ", ".join(part for part in (*parts, pack["dtype"]) if part)
        revision = f" at {pack['revision'][:12]}" if pack["revision"] else ""
        used = age_text(pack["last_used"])
        lines.append(f"{pack['name']}{revision}: {fmt}, {size_text(pack['bytes'])}, used {used}")
        lines.append(f"  {pack['path']}")
    what = "removed" if is_cleared else "kept"
    return "\n".join([*lines, f"{len(found)} packed models {what}, {total}"])
