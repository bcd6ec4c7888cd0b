"""Values of the command line: checked when they are parsed, or before the work starts that they need."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hybrimoe.errors import ConfigError, HybriMoEError
from hybrimoe.sizes import parse_size


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def weights(text: str) -> str:
    """A choice of `Config.weights`; which there are is only looked up if one is given."""
    from hybrimoe.formats.registry import choices

    return _one_of(text, choices())


def linear(text: str) -> str:
    """A choice of `Config.linear`."""
    from hybrimoe.formats.registry import rounded

    return _one_of(text, rounded())


def size(name: str) -> Any:
    """A size or a fraction, checked but left as it was typed: so messages show it."""

    def parse(text: str) -> str:
        try:
            parse_size(name, text)
        except HybriMoEError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def ensure_writable(path: Path | None, argument: str) -> None:
    """Raise ConfigError unless a file can be written there; None is no file."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise ConfigError(f"{argument} must be a file, {str(path)!r} is a folder")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{argument} must be a file, {str(path)!r} is a device or a pipe")
    if not folder.is_dir():
        raise ConfigError(
            f"{argument} must lie in a folder that exists, got {str(path)!r}: no folder {str(folder)!r}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{argument} must lie in a folder that you may write to, got {str(path)!r}"
        )


def ensure_picture(path: Path | None, argument: str) -> None:
    """Raise ConfigError unless a figure can be drawn and written there; None is no figure."""
    if path is None:
        return
    ensure_writable(path, argument)
    from hybrimoe.simulation import plots  # raises where matplotlib is missing

    plots.ending_of(path)


def ensure_readable(path: Path, argument: str) -> None:
    """Raise ConfigError unless there is such a file."""
    if path.is_dir():
        raise ConfigError(f"{argument} must be a file, {str(path)!r} is a folder")
    if not path.exists():
        raise ConfigError(f"{argument} must be a file that exists, no file {str(path)!r}")


def _one_of(text: str, allowed: tuple[str, ...]) -> str:
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(allowed)}, got {text!r}")
    return text
