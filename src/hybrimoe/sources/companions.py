"""Files that belong to a model besides its weights: tokenizer, chat template, processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe.errors import CheckpointError
from hybrimoe.files import write_atomically
from hybrimoe.sources.safetensors import check_file

PATTERNS = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json", "chat_template*.json", "chat_template*.jinja", "additional_chat_templates/*.jinja",
    "*processor_config.json", "generation_config.json",
)  # fmt: skip
"""What transformers, sentencepiece, tiktoken and mistral-common call them. Code is not among them."""
LARGEST = 256 << 20
PLACE = ("cache_dir", "revision")


def origin_of(
    name: str, place: Mapping[str, Any] | None = None, file: str = "config.json"
) -> Path | None:
    """The folder that a model came from: a local one, or its snapshot in the cache; never the network.

    place: arguments of transformers' `from_pretrained` that say where files come from. file: one that
    the snapshot has.
    """
    place = place or {}
    inside = f"{place['subfolder']}/" if place.get("subfolder") else ""
    folder = Path(name) / inside
    if name and folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache  # not needed for what is on disk
    from huggingface_hub.errors import HFValidationError

    where = {key: place[key] for key in PLACE if place.get(key)}
    try:
        found = try_to_load_from_cache(name, f"{inside}{file}", **where)
    except HFValidationError:  # such as a model that was built, not loaded
        return None
    return Path(found).parent if isinstance(found, str) else None


def copy_companions(origin: Path | None, folder: Path) -> None:
    """Copy the files that belong to a model; what leads out of its folder stays where it is.

    A `generation_config.json` that is there already is the model's own, as it is now.
    """
    if origin is None or origin.resolve() == folder.resolve():
        return
    for path in sorted({path for pattern in PATTERNS for path in origin.glob(pattern)}):
        target = folder / path.relative_to(origin)
        if _may_be_copied(path, origin) and not _is_own(target):
            target.parent.mkdir(exist_ok=True)
            write_atomically(target, path.read_bytes())


def _may_be_copied(path: Path, origin: Path) -> bool:
    try:
        return check_file(path, origin) <= LARGEST
    except CheckpointError:  # a link to somewhere else, or no file at all
        return False


def _is_own(target: Path) -> bool:
    return target.name == "generation_config.json" and target.exists()
