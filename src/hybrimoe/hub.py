"""Whether a name is a repository that the hub gives us, asked once and with a deadline.

transformers asks the hub for each file of a model, and tries each six times: without a network the
answer is a minute away, and a name server that is silent makes it hours. So the hub is asked for one
file first. Where it stays silent, a model in the cache is loaded from there without asking again,
and any other is one CheckpointNotFoundError that says which of many things is wrong.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub

from hybrimoe.errors import CheckpointNotFoundError

logger = logging.getLogger("hybrimoe")
PATIENCE_S = 3.0
"""How long the hub may take for its first answer, with name lookup and handshake."""
CACHED_PATIENCE_S = 1.0
"""The same where the cache would do."""
TIMEOUT = "HF_HUB_ETAG_TIMEOUT"
"""huggingface_hub's own variable for such a wait, in seconds; where it is set, it holds."""
HTTP_ERRORS: tuple[type[Exception], ...] = hub.HfHubHTTPError.__bases__
"""What its client raises: errors of httpx, or of the package that has its place, and of the system."""
CLIENT_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, ValueError, RuntimeError)
"""The same with those of names and addresses."""
UNKNOWN = (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError)
"""Errors that no copy in the cache makes good."""
PLACE = (
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"),
    "proxies",
)
"""Arguments of transformers that say where files come from."""
FILES = (".gguf", ".safetensors")
REFUSALS = {
    401: "the hub does not let you see a model of that name (HTTP 401): check the name; if it is "
    "private, log in with `hf auth login`, or give token=",
    403: "the hub forbids you to read it (HTTP 403): your token lacks that permission",
    404: "the hub has no model of that name (HTTP 404): check the name",
}
"""What answers of the hub mean, by HTTP status."""


def named_file(name: str | os.PathLike[str], gguf_file: str | None) -> tuple[str, str | None]:
    """Folder or repository, and GGUF file in it, if any; a path that ends in .gguf means both.

    Raises CheckpointNotFoundError for a path to nowhere.
    """
    text = os.fspath(name)
    if gguf_file is None and text.endswith(".gguf") and not os.path.isdir(text):
        folder, gguf_file = os.path.split(text)
        if os.path.isdir(folder or ".") and not os.path.lexists(text):
            raise CheckpointNotFoundError(f"no file {text!r}")
        if not os.path.isdir(folder or ".") and not re.fullmatch(r"[^./~][^/]*/[^/]+/[^/]+", text):
            raise CheckpointNotFoundError(f"no file {text!r}")
        return folder or ".", gguf_file
    return text, gguf_file


def look_for(name: str, place: Mapping[str, Any], file: str = "config.json") -> None:
    """Raise CheckpointNotFoundError for a name of nothing, before anything heavy is imported.

    What is in the cache is taken as found.
    """
    if not os.path.isdir(name):
        refuse_path(name)
        if cached_folder(name, place, file) is None:
            reach(name, place, file)


def refuse_path(name: str) -> None:
    """Raise CheckpointNotFoundError for a name, of no folder, that cannot be one on the hub either."""
    path = Path(name)
    if not name:
        raise CheckpointNotFoundError("'' is no folder with a checkpoint, and no name on the hub")
    if path.suffix == ".gguf" and os.path.isfile(path):
        raise CheckpointNotFoundError(
            f"{name!r} is a file: give its folder, and gguf_file={path.name!r}"
        )
    if os.path.exists(path):  # unlike pathlib's, it takes names that are too long for the system
        raise CheckpointNotFoundError(f"{name!r} is a file, no folder with a checkpoint")
    if is_path(name):
        raise CheckpointNotFoundError(f"no {'file' if is_file(name) else 'folder'} {name!r}")


def is_path(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are `model` or `owner/model`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or is_file(name)


def is_file(name: str) -> bool:
    """Whether a name ends as files with weights do."""
    return name.lower().endswith(FILES)


def reach(name: str, place: Mapping[str, Any], file: str = "config.json") -> dict[str, Any]:
    """The arguments `place`, which say where files of a repository come from, once it is known that
    they do: with `local_files_only` where the hub does not answer and the cache has to do.

    file: one that is asked for. Raises CheckpointNotFoundError.
    """
    refuse_path(name)
    is_cached = cached_folder(name, place, file) is not None
    if place.get("local_files_only") or is_offline_mode():
        if not is_cached:
            raise CheckpointNotFoundError(_not_in_cache(name, place, file))
        return {**place, "local_files_only": True}
    error = _ask(name, place, file, CACHED_PATIENCE_S if is_cached else PATIENCE_S)
    if error is None or isinstance(error, hub.EntryNotFoundError):
        return dict(place)
    if is_cached and (isinstance(error, hub.GatedRepoError) or not isinstance(error, UNKNOWN)):
        logger.info("%s: loading %r from the cache", explain(name, error), name)
        return {**place, "local_files_only": True}
    raise CheckpointNotFoundError(explain(name, error, place.get("revision"))) from error


def cached_folder(name: str, place: Mapping[str, Any], file: str = "config.json") -> Path | None:
    """The folder in the cache that has a file of a repository, if it is on this machine."""
    subfolder = place.get("subfolder")
    path = f"{subfolder}/{file}" if subfolder else file
    where = {key: place[key] for key in ("cache_dir", "revision") if place.get(key) is not None}
    try:
        found = try_to_load_from_cache(name, path, **where)
    except hub.HFValidationError as error:
        raise CheckpointNotFoundError(explain(name, error)) from error
    return Path(found).parent if isinstance(found, str) else None


def explain(name: str, error: BaseException, revision: str | None = None) -> str:
    """Why the hub does not give a repository, and what to do."""
    if isinstance(error, hub.GatedRepoError):
        return (
            f"{name!r} is gated: ask for access at {constants.ENDPOINT}/{name}, then log in with "
            "`hf auth login`, or give token="
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{name!r} on the hub has no revision {revision!r}"
    if isinstance(error, hub.HFValidationError):
        return f"{name!r} is no folder here, and no name on the hub either: {first_line(error)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REFUSALS:
        return f"{name!r} is no folder here, and {REFUSALS[status]}"
    if status is not None:
        return f"{name!r} is no folder here, and the hub answers HTTP {status}: try again later"
    return (
        f"{name!r} is no folder here and not in the cache, and the hub ({constants.ENDPOINT}) cannot be "
        f"reached: {first_line(error)}{_longer(error)}"
    )


def _not_in_cache(name: str, place: Mapping[str, Any], file: str) -> str:
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "local_files_only=True"
    folder = place.get("cache_dir") or constants.HF_HUB_CACHE
    return (
        f"{name!r} is no folder here, and its {file} is not in the cache ({folder}); {why}, so the hub "
        "is not asked"
    )


def _ask(name: str, place: Mapping[str, Any], file: str, patience_s: float) -> BaseException | None:
    """What went wrong with one request, or None.

    A thread waits for it, as nothing else ends a name lookup that hangs.
    """
    if TIMEOUT in os.environ:
        patience_s = constants.HF_HUB_ETAG_TIMEOUT
    answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            revision, subfolder = place.get("revision"), place.get("subfolder")
            url = hf_hub_url(name, file, revision=revision, subfolder=subfolder)
            # The deadline below comes first: it says how long that was.
            get_hf_file_metadata(url, token=place.get("token"), timeout=2 * patience_s)
        except CLIENT_ERRORS as error:
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, daemon=True, name="hybrimoe-hub").start()
    try:
        return answers.get(timeout=patience_s)
    except queue.Empty:
        return TimeoutError(f"no answer within {patience_s:g} s")


def _longer(error: BaseException) -> str:
    is_late = isinstance(error, TimeoutError) and TIMEOUT not in os.environ
    return f"; {TIMEOUT}=30 in the environment waits longer" if is_late else ""


def first_line(error: BaseException) -> str:
    """The message of somebody else's error, short enough for one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
