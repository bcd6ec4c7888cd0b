"""Weights that are kept quantized: by which method, and what helps.

hybrimoe packs plain numbers. A quantized weight read as one is a number without its scale: such a
model would run and write nonsense, so it is refused by name, with the way out that its method has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrimoe.choices import METHOD
from hybrimoe.errors import UnsupportedModelError

PLAIN = frozenset(("F64", "F32", "F16", "BF16"))
"""Stored dtypes whose elements are the numbers themselves."""
COUNTS = frozenset(("I64", "BOOL"))
"""Stored dtypes of tables and masks, which no method packs weights into."""
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

USE_PLAIN = "use an unquantized (bfloat16) checkpoint of the model, or a GGUF file"
_DEQUANTIZE = (
    "{who} loads it dequantized: from_pretrained(..., quantization_config="
    "{config}(dequantize=True)), then hybrimoe.wrap(model); or {plain}"
)
_KEEPS = (
    "transformers runs it only as it is, with the package {package}, and does not dequantize it; "
)
_FP8 = _DEQUANTIZE.format(
    who="transformers 5.24 or newer", config="transformers.FineGrainedFP8Config", plain=USE_PLAIN
)
_COMPRESSED = _DEQUANTIZE.format(
    who="transformers 5.24 or newer, with the package compressed-tensors,",
    config="transformers.CompressedTensorsConfig",
    plain=USE_PLAIN,
)
HINTS = {
    "fp8": _FP8,
    "mxfp8": _FP8,
    "mxfp4": _DEQUANTIZE.format(
        who="transformers", config="transformers.Mxfp4Config", plain=USE_PLAIN
    ),
    "gptq": _KEEPS.format(package="gptqmodel") + USE_PLAIN,
    "awq": _KEEPS.format(package="gptqmodel") + USE_PLAIN,
    "auto-round": _KEEPS.format(package="auto-round") + USE_PLAIN,
    "bitsandbytes": "its packed weights are read by the package bitsandbytes only; " + USE_PLAIN,
    "compressed-tensors": (
        "transformers, with the package compressed-tensors, does not dequantize this format; "
        + USE_PLAIN
    ),
    "compressed-tensors float-quantized": _COMPRESSED,
    "compressed-tensors pack-quantized": _COMPRESSED,
    "quark": _KEEPS.format(package="amd-quark") + USE_PLAIN,
    "torchao": _KEEPS.format(package="torchao") + USE_PLAIN,
    "modelopt": (
        "transformers does not know this method and would take the stored numbers for weights; "
        + USE_PLAIN
    ),
    "mlx": "only MLX reads it, on Apple silicon; " + USE_PLAIN,
}
"""What works for each method, or format of one. Only what was seen to work is promised."""
NO_SCALES = (
    "its scales do not have the names that transformers dequantizes by (weight_scale_inv); "
    + USE_PLAIN
)
UNKNOWN = "hybrimoe knows no way to dequantize it; " + USE_PLAIN
UNDECLARED = (
    "config.json does not say by which method (a lost quantization_config?), and read as plain numbers "
    "the model would write nonsense; " + USE_PLAIN
)
_CLASSES = {"FP8": "fp8", "Mxfp4": "mxfp4", "4bit": "bitsandbytes", "8bit": "bitsandbytes"}
"""Parts of the names of transformers' classes for quantized layers."""
_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where a configuration says it: transformers' key, an older one of compressed-tensors, and MLX's."""
_PACKED = ("qweight", "weight_packed", "W_q", "codes")
"""Buffers of layers that keep no parameter called weight."""
_COMPANION = re.compile(
    r"(?P<owner>.+?)[._:](?:"
    r"(?:_|weight_|input_|activation_|act_|pre_quant_|global_|block_|q)*"
    r"(?:scales?(?:_inv|_2|_and_zero)?|zeros?|zero_points?|scale_weight|scale_act)"
    r"|(?:weight_)?(?:packed|g_idx)|weight_shape|weight_format|qweight|blocks|SCB"
    r"|(?:nested_)?(?:absmax|quant_map)|quant_state(?:\..+)?)"
)
"""A tensor beside a weight that says how to read it, and the weight's own name before that."""


class Declared(NamedTuple):
    """What a configuration says: the method, its format of the weights if any, and under which key."""

    method: str
    format: str
    key: str

    def hint(self, names: Iterable[str] = ()) -> str:
        """What helps. names: of the stored tensors, as far as they are known."""
        if self.key.rpartition(".")[2] != _KEYS[0]:
            return f"transformers does not read {self.key}; {USE_PLAIN}"
        return hint_of(self.method, self.format, names)


def declared(config: Any) -> Declared | None:
    """The quantization that a model's configuration declares, itself or for a part of the model."""
    parts = {"": config}
    for name in getattr(type(config), "sub_configs", None) or ("text_config",):
        parts[f"{name}."] = _get(config, name)
    for prefix, part in parts.items():
        for key in _KEYS:
            said = _get(part, key)
            if said is not None and (key != "quantization" or _get(said, "bits") is not None):
                return Declared(_method(said), str(_get(said, "format") or ""), prefix + key)
    return None


def hint_of(method: str, of_weights: str = "", names: Iterable[str] = ()) -> str:
    """What helps with a method.

    of_weights: its format of the weights, where it has several. names: of the stored tensors, as far
    as they are known.
    """
    method = method.replace("_", "-")
    known = HINTS.get(f"{method} {of_weights}") or HINTS.get(method, UNKNOWN)
    return NO_SCALES if known is _FP8 and names and not any(map(_is_fp8_scale, names)) else known


def refuse_declared(name: str, config: Any, stored: Mapping[str, str] | None = None) -> None:
    """Raise UnsupportedModelError if a configuration declares a quantization other than ours.

    name: of the checkpoint, if it is known. stored: the dtype of each of its tensors, likewise.
    """
    found = declared(config)
    if found is None or found.method == METHOD:
        return
    what, remove = repr(name) if name else "the checkpoint", f"remove {found.key} from config.json"
    if stored and is_plain(stored):
        raise UnsupportedModelError(
            f"{what} has a {found.key} for {found.method}, but its files hold plain numbers: "
            f"{remove} to load them as they are"
        )
    otherwise = "" if stored else f"; if its files hold plain numbers all the same, {remove}"
    raise UnsupportedModelError(
        f"{what} is quantized by {found.method} ({found.key} in config.json), and hybrimoe packs "
        f"plain numbers: {found.hint(stored or ())}{otherwise}"
    )


def is_plain(stored: Mapping[str, str]) -> bool:
    """Whether tensors, dtypes by name, are all plain numbers without anything that scales them."""
    return (PLAIN | COUNTS).issuperset(stored.values()) and not any(
        owner in stored for name in stored for owner in owners(name)
    )


def owners(name: str) -> tuple[str, ...]:
    """The weight that a tensor of this name would scale or stand for: one of these, or none."""
    found = _COMPANION.fullmatch(name)
    return () if found is None else (found["owner"], f"{found['owner']}.weight")


def refuse_quantized_model(model: nn.Module, linear: str | None = None) -> None:
    """Raise UnsupportedModelError for a loaded model whose experts are kept quantized.

    linear: what the dense layers are to be packed as, which must be plain then too; None leaves them.
    """
    for name, module in model.named_modules():
        is_expert = "expert" in type(module).__name__.lower() or "experts" in name.split(".")
        is_dense = linear is not None and "Linear" in type(module).__name__
        if not (is_expert or is_dense) or not any(map(_is_quantized, _tensors(module))):
            continue
        method, hint = _method_of(model, type(module).__name__)
        also = "" if is_expert else f"leave out linear={linear!r}, or "
        raise UnsupportedModelError(
            f"{name} of {type(model).__name__} is quantized{method} ({type(module).__name__}), and "
            f"hybrimoe packs plain numbers: {also}{hint}"
        )


def refuse_quantized_dense(model: nn.Module) -> None:
    """Raise UnsupportedModelError if a wrapped model's dense layers are kept quantized.

    Its packed folder could not be loaded: what they are read by belongs to another quantizer.
    """
    for name, module in model.named_modules():
        counts = (torch.int64, torch.bool)
        if any(_is_quantized(each) and each[1].dtype not in counts for each in _tensors(module)):
            method, _ = _method_of(model, type(module).__name__)
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} is quantized{method} ({type(module).__name__}), and "
                f"save_packed writes plain numbers beside the packed ones: {USE_PLAIN}"
            )


def _method_of(model: nn.Module, class_name: str) -> tuple[str, str]:
    """The method of a module that is kept quantized, in words, and what helps."""
    found = declared(getattr(model, "config", None))
    if found is not None:
        return f" by {found.method}", found.hint()
    for part, method in _CLASSES.items():
        if part in class_name:
            return f" by {method}", hint_of(method)
    return "", USE_PLAIN


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its own parameters, and the buffers that stand for them."""
    yield from module.named_parameters(recurse=False)
    yield from ((n, t) for n, t in module.named_buffers(recurse=False) if n in _PACKED)


def _is_quantized(named: tuple[str, torch.Tensor]) -> bool:
    return named[1].dtype not in _PLAIN_DTYPES


def _is_fp8_scale(name: str) -> bool:
    return name.endswith(("scale_inv", ".scale", ".qscale_weight"))


def _method(said: Any) -> str:
    """The method's name as transformers writes it, from whatever stands under the key."""
    method = _get(said, "quant_method")
    if method is not None:
        name = str(getattr(method, "value", method)).lower()
        return "modelopt" if name.startswith("modelopt") else name
    for key, found in (
        ("load_in_4bit", "bitsandbytes"),
        ("load_in_8bit", "bitsandbytes"),
        ("quant_algo", "modelopt"),
        ("config_groups", "compressed-tensors"),
        ("bits", "mlx"),
    ):
        if _get(said, key):
            return found
    return "an unnamed method"


def _get(owner: Any, name: str) -> Any:
    """A field of a configuration, which is an object or plain data."""
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
