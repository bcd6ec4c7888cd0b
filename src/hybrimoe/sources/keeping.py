"""`from_pretrained(..., keep_packed=)`: the first start packs, and every later one reads the pack."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, ConfigError, StorageError
from hybrimoe.sizes import size_text
from hybrimoe.sources.companions import origin_of
from hybrimoe.sources.kept_packs import Pack, files_of, home, pack_of
from hybrimoe.sources.packed.manifest import MANIFEST

logger = logging.getLogger("hybrimoe")
Load = Callable[[Any, Config, Collection[str], dict[str, Any]], Any]
Keep = bool | str | os.PathLike[str]
PLACE = {"cache_dir", "force_download", "local_files_only", "token", "revision", "proxies"}
"""Arguments that say where files come from; the revision that they lead to is in the pack's name."""
PASSED = {"attn_implementation", "experts_implementation", "output_loading_info", "device_map"}
"""Arguments that change nothing that is saved."""
PLAIN = (str, int, float, bool, type(None))


def load_kept(
    name: str | os.PathLike[str],
    config: Config,
    given: Collection[str],
    hf_kwargs: dict[str, Any],
    keep: Keep,
    load: Load,
    save: Callable[[Any, Path], None],
) -> Any:
    """Load a model from the pack that is kept of it; without one, load it and keep a pack.

    keep: True, or the folder for packs. Where none can be kept, a warning says why, and the model is
    loaded all the same.
    """
    name, folder = os.fspath(name), _folder_of(keep)
    settings = _settings_of(name, config, hf_kwargs)
    if settings is None:
        return load(name, config, given, hf_kwargs)
    pack = _find(name, hf_kwargs, settings, folder)
    if pack is not None and pack.is_current:
        try:
            return _named(_from_pack(pack, config, given, hf_kwargs, load), name)
        except (
            CheckpointError,
            OSError,
        ) as error:  # what is not the pack's fault comes again below
            _withdraw(pack, error)
    model = load(name, config, given, hf_kwargs)
    # A repository has a revision here only once it is in the cache.
    pack = pack or _find(name, hf_kwargs, settings, folder)
    if pack is not None:
        _keep(pack, model[0] if isinstance(model, tuple) else model, save)
    return model


def _settings_of(name: str, config: Config, hf_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All that the bytes of a pack depend on besides its source; None if none can or need be kept."""
    if (Path(name) / (hf_kwargs.get("subfolder") or "") / MANIFEST).exists():
        return None  # it is one
    asked = {k: v for k, v in hf_kwargs.items() if k not in PLACE | PASSED and v is not None}
    dtype = str(asked.pop("dtype", asked.pop("torch_dtype", "auto"))).removeprefix("torch.")
    foreign = sorted(key for key, value in asked.items() if not _is_plain(value))
    if foreign or asked.get("trust_remote_code"):
        reason = f"{foreign[0]} is no plain value" if foreign else "code of a model is not copied"
        warnings.warn(f"the packed model is not kept: {reason}", stacklevel=4)
        return None
    weights = None if "gguf_file" in asked else config.weights
    return {"weights": weights, "linear": config.linear, "dtype": dtype, "arguments": asked}


def _find(
    name: str, hf_kwargs: dict[str, Any], settings: dict[str, Any], folder: Path
) -> Pack | None:
    """The place of a model's pack; None where its source is not known, or is packed itself."""
    gguf_file = hf_kwargs.get("gguf_file")
    origin = origin_of(name, hf_kwargs, gguf_file or "config.json")
    if origin is None or (origin / MANIFEST).exists():
        return None
    try:
        if Path(name).is_dir():
            source = {"files": files_of(origin, gguf_file)}
            return pack_of(str(Path(name).resolve()), source, settings, folder)
        from hybrimoe.sources.open import revision_of

        place = {key: hf_kwargs[key] for key in (PLACE | {"subfolder"}) & hf_kwargs.keys()}
        revision = revision_of(name, gguf_file or "config.json", place)
    except (OSError, ValueError):  # which the load itself says
        return None
    return None if revision is None else pack_of(name, {"revision": revision}, settings, folder)


def _from_pack(
    pack: Pack, config: Config, given: Collection[str], hf_kwargs: dict[str, Any], load: Load
) -> Any:
    passed = {key: value for key, value in hf_kwargs.items() if key in PASSED}
    model = load(pack.folder, config, given, passed)
    try:
        pack.use()
    except OSError:  # a cache that can only be read
        logger.info("%s cannot note that it was used", pack.folder)
    return model


def _withdraw(pack: Pack, error: Exception) -> None:
    """Have a pack that cannot be read made anew, where the system lets us."""
    try:
        pack.begin()
        then = "the model is packed anew"
    except OSError as refused:
        then = f"the model is loaded without its pack, which cannot be replaced: {refused}"
    warnings.warn(f"{error}; {then}", stacklevel=4)


def _named(loaded: Any, name: str) -> Any:
    """The model with the name that was asked for, not that of the pack."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.hybrimoe.origin = Path(model.name_or_path)
    model.config.name_or_path = model.name_or_path = name
    return loaded


def _keep(pack: Pack, model: Any, save: Callable[[Any, Path], None]) -> None:
    """Write the pack, and say where and how large it is; a failure is a warning with the reason."""
    if pack.is_current:  # another process was faster
        return
    try:
        pack.folder.mkdir(parents=True, exist_ok=True)
        pack.begin()
        save(model, pack.folder)
        pack.settle()
    except (StorageError, OSError) as error:
        if not os.path.exists(pack.folder / MANIFEST):  # False too where nothing may be read
            _remove_empty(pack.folder)
        warnings.warn(f"the packed model is not kept: {error}", stacklevel=4)
        return
    # Aloud: it is gigabytes that nobody would look for.
    logger.warning(
        "the packed model is kept in %s (%s): the next start reads it; `hybrimoe cache --clear` "
        "removes it",
        pack.folder,
        size_text(pack.size()),
    )


def _remove_empty(folder: Path) -> None:
    for path in (*folder.glob(".*"), folder):
        try:
            path.unlink() if path.is_file() else path.rmdir()
        except OSError:
            return


def _folder_of(keep: Keep) -> Path:
    if keep is True:
        return home()
    if not isinstance(keep, str | os.PathLike) or not os.fspath(keep):
        raise ConfigError(f"keep_packed must be True, False or the path of a folder, got {keep!r}")
    return Path(keep).expanduser()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and _is_plain([*value.values()])
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)
