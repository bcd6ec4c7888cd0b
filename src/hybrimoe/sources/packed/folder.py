"""What config.json of a packed folder tells transformers. Imports nothing large: it is known at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.choices import METHOD
from hybrimoe.errors import CheckpointError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from hybrimoe.config import Config


KEY = "quantization_config"
INDEX = "model.safetensors.index.json"
MISSING_FILE = (
    "the weights are packed by hybrimoe, import hybrimoe before they are loaded.safetensors"
)
"""A file that does not exist. transformers passes by a method that it does not know, and would look for
weights of its own: what it says it misses says what to do."""


class PlacedDeclaration(dict[str, Any]):
    """The same as plain data, which knows the folder that its config.json was read from.

    Classes of models, unlike the automatic ones, do not tell a configuration its name before it is used.
    """

    folder = ""


class PackedFolder:
    """The `quantization_config` of a folder that `save_packed` wrote.

    stored: that of config.json. given: the `Config` that the user gave beside it, or None.
    """

    quant_method = METHOD

    def __init__(self, stored: dict[str, Any], given: Config | None = None) -> None:
        self.stored, self.given = dict(stored), given
        self.folder = str(getattr(stored, "folder", ""))

    @classmethod
    def from_dict(cls, stored: dict[str, Any], **_: Any) -> PackedFolder:
        """What transformers makes of config.json."""
        return cls(stored)

    @classmethod
    def merged(cls, stored: Any, given: Any) -> PackedFolder:
        """With what the user gave as `quantization_config`, which must be a `Config` or nothing."""
        if given is not None and getattr(given, "quant_method", None) != METHOD:
            raise ConfigError(
                "quantization_config must be a hybrimoe.Config for a folder that hybrimoe.save_packed "
                f"wrote, got {given!r}"
            )
        return cls(stored.stored if isinstance(stored, cls) else stored, given)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as transformers asks for it."""
        return dict(self.stored)

    def settings(self) -> dict[str, Any]:
        """All but the name of the method: fields of a `Config`, where a user wrote them as a dict."""
        return {key: value for key, value in self.stored.items() if key != "quant_method"}

    def find(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder and its manifest; raises CheckpointError where there is none.

        name: of the folder, where its configuration does not know where it was read from.
        """
        from hybrimoe.sources.packed.manifest import MANIFEST, read_manifest

        name = self.folder or name
        folder = Path(name)
        manifest = read_manifest(folder) if name and folder.is_dir() else None
        if manifest is None:
            raise CheckpointError(
                f"says that its weights are packed by hybrimoe, but {MANIFEST} is not there: give the "
                "folder that hybrimoe.save_packed wrote; one on the hub is loaded by "
                "hybrimoe.from_pretrained",
                name,
            )
        return folder, manifest


def is_packed(quantization: Any) -> bool:
    """Whether a `quantization_config`, read from config.json, is that of a packed folder."""
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == METHOD
    return isinstance(quantization, PackedFolder)


def place_declaration(values: dict[str, Any], folder: Path) -> None:
    """Have what a config.json declares know its folder, or raise UnsupportedModelError.

    values: of config.json. For what is no object, transformers would stop at some attribute that it
    lacks.
    """
    parts = (values, *(part for part in values.values() if isinstance(part, dict)))
    for said in (part.get(KEY) for part in parts):
        if said is not None and not isinstance(said, dict):
            raise UnsupportedModelError(
                f"{folder / 'config.json'}: {KEY} must be an object, or left out, got {str(said)[:80]!r}"
            )
    if is_packed(values.get(KEY)) and folder.is_dir():
        values[KEY] = PlacedDeclaration(values[KEY])
        values[KEY].folder = os.fspath(folder)
