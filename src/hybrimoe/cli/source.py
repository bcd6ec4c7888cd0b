"""The model that a command names: where it lies, its tokenizer, and the model itself."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe.errors import ConfigError

MADE_UP = "a b"
"""Text that a tokenizer with a vocabulary makes tokens of."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ImportError)
"""What tokenizers raise for files that they cannot read."""


class Source(NamedTuple):
    """name: a folder, or a repository of the hub. gguf_file: the file in it; None for safetensors.

    offline: the hub does not answer, and the files are those in the cache.
    """

    name: str
    gguf_file: str | None
    offline: bool = False

    def __str__(self) -> str:
        return self.name if self.gguf_file is None else f"{self.name}/{self.gguf_file}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` takes besides the name."""
        given: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return given | self.place

    @property
    def place(self) -> dict[str, Any]:
        """The one of them that says where files come from."""
        return {"local_files_only": True} if self.offline else {}

    def reached(self, plain: bool = False) -> Source:
        """The same, once it is known that its files can be had; a GGUF file is fetched if need be.

        plain: transformers is to load it as well, which reads fewer layouts of GGUF files. Raises
        CheckpointNotFoundError, CheckpointError for a GGUF file whose header is not sound, or
        ConfigError for one that transformers does not read.
        """
        place: dict[str, Any] = {}
        if not Path(self.name).is_dir():
            from hybrimoe.hub import reach

            place = reach(self.name, {}, self.gguf_file or "config.json")
        if self.gguf_file is not None:
            self._check_gguf(self.gguf_file, place, plain)
        return self._replace(offline=bool(place))

    def _check_gguf(self, gguf_file: str, place: dict[str, Any], plain: bool) -> None:
        from hybrimoe.sources.gguf.layout import is_plain
        from hybrimoe.sources.gguf.model import find_file
        from hybrimoe.sources.gguf.parts import read_gguf

        header = read_gguf(*find_file(self.name, gguf_file, place))
        if plain and not is_plain(header):
            raise ConfigError(
                f"the model must be one that transformers reads too, got {self}: one file, with a "
                "tensor for each matrix of all experts, and no blocks that predict further tokens"
            )


def add_name(
    parser: argparse.ArgumentParser,
    metavar: str = "NAME",
    where: str = "a folder, a name on the hub, or a .gguf file",
    optional: bool = False,
) -> None:
    """The arguments that name a model."""
    parser.add_argument("name", metavar=metavar, nargs="?" if optional else None, help=where)
    parser.add_argument("--gguf-file", metavar="FILE", help=f"the GGUF file in {metavar} to load")


def source_of(options: argparse.Namespace) -> Source:
    """What the arguments of `add_name` name."""
    from hybrimoe.hub import named_file

    source = Source(*named_file(options.name, options.gguf_file))
    weights = getattr(options, "weights", None)
    if source.gguf_file is not None and weights is not None:
        from hybrimoe.sources.gguf.experts import refuse_format

        refuse_format(weights)
    return source


def tokenizer_of(source: Source) -> Any:
    """Its tokenizer: that of the folder, else the one in the GGUF file; ConfigError without any."""
    try:
        return _tokenizer(source.name, source.place)
    except ConfigError as error:
        if source.gguf_file is None:
            raise
        beside = error
    try:
        return _tokenizer(source.name, source.arguments)
    except ConfigError as inside:
        raise ConfigError(
            f"{source} has no tokenizer, neither beside the file ({beside}) nor in it ({inside})"
        ) from inside


def load_wrapped(options: argparse.Namespace, source: Source, context: int) -> tuple[Any, str]:
    """The model, wrapped, once the plan says that it fits; and how its experts are kept."""
    from transformers.utils import logging

    import hybrimoe
    from hybrimoe.memory.plan import plan

    vram = None if options.device == "cpu" else options.vram
    asked = options.weights
    found = plan(source.name, vram, weights=asked, context=context, gguf_file=source.gguf_file)
    found.ensure_fits()
    if options.json or not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings: dict[str, Any] = {"device": options.device, **source.arguments}
    settings["keep_packed"] = options.keep_packed
    if source.gguf_file is None:
        settings["weights"] = found.weights
    if options.vram is not None:
        settings["vram"] = options.vram
    return hybrimoe.from_pretrained(source.name, **settings).eval(), found.weights


def load_plain(source: Source, config: Any = None) -> Any:
    """The same model by transformers alone. config: of the wrapped one, for a GGUF file."""
    from transformers import AutoModelForCausalLM

    if source.gguf_file is None:
        place = source.place | ({"adapter_kwargs": source.place} if source.offline else {})
        return AutoModelForCausalLM.from_pretrained(source.name, dtype="auto", **place).eval()
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            "transformers needs accelerate to load a GGUF file: pip install accelerate"
        )
    # Of a file without a config.json transformers would guess the experts' width.
    given = {"config": config, "dtype": config.dtype, **source.arguments}
    return AutoModelForCausalLM.from_pretrained(source.name, **given).eval()


def _tokenizer(name: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    from hybrimoe.hub import first_line

    try:
        found = AutoTokenizer.from_pretrained(name, **arguments)
    except UNREADABLE as error:
        raise ConfigError(
            f"{name!r} has no tokenizer that can be read: {first_line(error)}"
        ) from error
    # Where the files are missing, transformers makes up a tokenizer that knows no text.
    if not found(MADE_UP, add_special_tokens=False)["input_ids"]:
        raise ConfigError(
            f"{name!r} has no tokenizer: it lacks the files; copy them there with "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({name!r})"
        )
    return found
