"""transformers knows packed folders as soon as both are imported, in whatever order.

`import hybrimoe` must stay cheap, so it imports neither transformers nor torch: it waits on the import
path for the one module that holds transformers' table of quantizers, and adds a line to it then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hybrimoe.choices import METHOD
from hybrimoe.sources.packed.folder import PackedFolder, is_packed, place_declaration

TABLE = "transformers.quantizers.auto"


def announce(register_quantizer: Callable[[], None]) -> None:
    """Register now if transformers' quantizers are imported, else when they are.

    register_quantizer: gives transformers the loader itself, before the first model is loaded by it.
    """
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "AutoHfQuantizer"):
        register(table, register_quantizer)
    if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(register_quantizer))


def register(table: Any, register_quantizer: Callable[[], None]) -> None:
    """Make transformers' quantizers know packed folders and ask us first; again changes nothing."""
    if METHOD in table.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    def make_quantizer(config: Any, **how: Any) -> Any:
        # Ours needs much of transformers, which is not imported yet when the table is.
        register_quantizer()
        return table.AUTO_QUANTIZER_MAPPING[METHOD](config, **how)

    table.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, make_quantizer)
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedFolder
    merge = table.AutoHfQuantizer.merge_quantization_configs

    def merge_quantization_configs(cls: type, stored: Any, given: Any) -> Any:
        """transformers would drop what the user gave, with a warning, but for classes of its own."""
        return PackedFolder.merged(stored, given) if is_packed(stored) else merge(stored, given)

    table.AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)
    _ask_first(table)
    _place_declarations()


def _ask_first(table: Any) -> None:
    """Refuse a checkpoint that is quantized otherwise before transformers reads its declaration."""
    choose = table.get_hf_quantizer

    @functools.wraps(choose)
    def get_hf_quantizer(config: Any, given: Any, *args: Any, **how: Any) -> Any:
        if getattr(given, "quant_method", None) == METHOD:
            from hybrimoe.sources.loader import refuse_checkpoint

            refuse_checkpoint(config)
        return choose(config, given, *args, **how)

    table.get_hf_quantizer = get_hf_quantizer
    loader = sys.modules.get("transformers.modeling_utils")  # it keeps the name that it imported
    if getattr(loader, "get_hf_quantizer", None) is choose:
        vars(loader)["get_hf_quantizer"] = get_hf_quantizer


def _place_declarations() -> None:
    """Have configurations of packed folders know where they were read from."""
    from transformers import configuration_utils  # imported already, with the table of quantizers

    base = configuration_utils.PreTrainedConfig
    read = base.get_config_dict.__func__

    @functools.wraps(read)
    def get_config_dict(cls: Any, name: Any, **how: Any) -> Any:
        values, unused = read(cls, name, **how)
        if isinstance(values, dict):
            place_declaration(values, Path(str(name), how.get("subfolder") or ""))
        return values, unused

    base.get_config_dict = classmethod(cast(Any, get_config_dict))


class _Waiting:
    """A finder that finds nothing itself: it has `register` called after one module is executed."""

    def __init__(self, register_quantizer: Callable[[], None]) -> None:
        self.register_quantizer = register_quantizer

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != TABLE:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Waiting))
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module, self.register_quantizer)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
