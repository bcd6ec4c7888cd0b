"""A packed folder as a source of weights: what may be asked of it, and how it fills a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrimoe.config import Config
from hybrimoe.errors import ConfigError
from hybrimoe.models.weights import choice_of
from hybrimoe.sources.packed.files import check_dense, fill
from hybrimoe.sources.packed.linears import StoredLinear, name_in, open_linears
from hybrimoe.sources.packed.manifest import DENSE, linear_of
from hybrimoe.sources.sink import ExpertSink

Bar = Callable[[str, int], AbstractContextManager[Any]]
"""A progress bar, of a description and a number of bytes."""


@dataclass
class PackedConfig:
    """A `Config` for layers that lie packed in `folder`, which `manifest` describes.

    linears: the dense layers among them, once `prepare` has found their places in a model.
    """

    config: Config
    manifest: dict[str, Any]
    folder: Path
    bar: Bar
    linears: list[StoredLinear] = field(default_factory=list)

    @property
    def quant_method(self) -> str:
        """The name by which transformers finds our loader."""
        return self.config.quant_method

    @property
    def keeps_files(self) -> bool:
        """The disk tier reads the packed files themselves."""
        return True

    @property
    def dtype(self) -> str:
        """The dtype of the model that was saved."""
        return str(self.manifest["layers"][0]["dtype"])

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, which transformers prints."""
        return self.config.to_dict()

    def weights_of(self, name: str) -> str | None:
        """The format that the manifest gives a layer."""
        entries = self.manifest["layers"]
        return next((entry["weights"] for entry in entries if entry["name"] == name), None)

    def prepare(self, model: Any) -> Sequence[StoredLinear]:
        """The packed dense layers of a model on the meta device, put out of the loader's way."""
        self.linears.extend(open_linears(model, self.manifest, self.folder))
        self.manifest = named_as_in(model, self.manifest)
        for linear in self.linears:
            linear.skip_in_loader()
        return self.linears

    def fill(self, arrivals: ExpertSink) -> None:
        """Read all blobs, and compare their checksums."""
        layers = arrivals.layers
        total = sum(layer.packed.blobs.nbytes for layer in layers)
        total += sum(linear.blob.nbytes for linear in self.linears)
        with self.bar("Reading experts", total) as bar:
            fill(layers, self.linears, self.manifest, self.folder, bar.update)

    def lend(self, model_config: Any, prefix: str = "") -> None:
        """Have the loader of transformers read the dense weights, and nothing else.

        prefix: the folder of the packed files, where it is asked to load the folder around it.
        """
        model_config.transformers_weights = prefix + DENSE

    def settle(self, model: Any) -> None:
        """Name the folder that was asked for, not the one inside it."""
        del model.config.transformers_weights
        model.config.name_or_path = model.name_or_path = str(self.folder.parent)


def open_packed(
    folder: Path,
    manifest: dict[str, Any],
    config: Config,
    bar: Bar,
    given: Collection[str] = (),
) -> PackedConfig:
    """What a folder that `save` wrote is loaded by, once it is known to hold what is asked for.

    given: fields of `config` that were asked for by name; all others give way to what was saved.
    Raises ConfigError or CheckpointError.
    """
    stored = choice_of(layer["weights"] for layer in manifest["layers"])
    if ("weights" in given or config.weights != "native") and config.weights != stored:
        raise ConfigError(
            f"weights must be {stored!r}, which the experts in {folder} were packed as, got "
            f"{config.weights!r}; load the original checkpoint to pack them again"
        )
    config = _with_linear(config, linear_of(manifest), "linear" in given, folder)
    part = folder / manifest["folder"]
    check_dense(part, manifest)
    return PackedConfig(config.replace(weights=stored), manifest, part, bar)


def named_as_in(model: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the names that the experts have in a model; `tensor` is what files call them."""
    modules = {name for name, _ in model.named_modules()}
    names = {entry["name"]: name_in(modules, model, entry["name"]) for entry in manifest["layers"]}
    layers = [
        {**entry, "name": names[entry["name"]], "tensor": entry["name"]}
        for entry in manifest["layers"]
    ]
    return {**manifest, "layers": layers}


def check_dtype(asked: Any, stored: str, folder: Path) -> None:
    """Raise ConfigError for another dtype than the saved one; None and "auto" take it as it is."""
    if asked not in (None, "auto") and str(asked).removeprefix("torch.") != stored:
        raise ConfigError(f"dtype must be {stored}, which {folder} was saved in, got {asked}")


def _with_linear(config: Config, stored: str | None, is_given: bool, folder: Path) -> Config:
    """The configuration with the saved `linear`; where none was saved, one asked for is packed now."""
    if stored is None:
        return config
    if (is_given or config.linear is not None) and config.linear != stored:
        raise ConfigError(
            f"linear must be {stored!r}, which the dense layers in {folder} were packed as, got "
            f"{config.linear!r}; load the original checkpoint to pack them again"
        )
    if config.device in ("cuda", "emulated"):
        raise ConfigError(
            f"device must be 'cpu', for which the dense layers in {folder} were packed, got "
            f"{config.device!r}; load the original checkpoint to leave them as they are"
        )
    return config.replace(linear=stored)
