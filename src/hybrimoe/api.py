"""wrap, unwrap, verify: the three verbs."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, FormatError, UnsupportedModelError, WrappedModelError
from hybrimoe.models import weights as formats
from hybrimoe.models.adapters import FoundExperts, find_experts
from hybrimoe.models.tuners import home_of
from hybrimoe.modules.lora import check_adapters
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.modules.protection import ensure_unwrap_fits
from hybrimoe.modules.verification import Verification, verify_layers
from hybrimoe.runtime.devices.open import bring_back_dense, check_room
from hybrimoe.session import Runtime, complete
from hybrimoe.sources.load_memory import ensure_wrap_fits
from hybrimoe.sources.quantized import refuse_quantized_model

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, config: Config | None = None, **overrides: Any) -> Model:
    """Replace the routed experts of a transformers model by pooled ones, in place.

    Returns the same model; `model.hybrimoe` is its `Runtime`. `overrides` are fields of `Config`.
    Needs the memory of one layer on top of the model, and gives back each layer as it goes. Wrapping
    twice changes nothing and warns if the configuration differs. Raises UnsupportedModelError,
    ConfigError, FormatError or InsufficientMemoryError before the model is touched.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config must be a hybrimoe.Config, got {config!r}")
    config = (config or Config()).replace(**overrides)
    if hasattr(model, "hybrimoe"):
        return _already_wrapped(model, config)
    if any(isinstance(module, PooledExperts) for module in model.modules()):
        raise WrappedModelError(
            f"{type(model).__name__} is already wrapped as part of another model, or a part of it "
            "is; call hybrimoe.unwrap on the model that was given to wrap"
        )
    refuse_quantized_model(model, config.linear)
    _wrap(home_of(model), config)
    return model


def _wrap(model: nn.Module, config: Config) -> None:
    """`wrap` for a model that no PEFT model is around: that one passes on the name `hybrimoe`."""
    found = find_experts(model)
    _check(model, found, config)
    ensure_wrap_fits(model, found, config.weights, config.ram)
    runtime = Runtime(config, model, found)
    try:
        runtime.make_room()
        for experts in found:
            runtime.attach(runtime.pack(experts))
        complete(runtime, model)
    except BaseException as error:
        _roll_back(runtime, model, error)
        raise


def unwrap(model: Model) -> Model:
    """Put the original experts back, in place, and return the model.

    The modules are the same objects as before `wrap`. Weights are bit-equal where the format is
    lossless ("native"); for "int8" and "int4" they are the dequantized ones, and a warning says so.
    Experts of a GGUF file come back as the numbers that its own integers stand for. A model that is
    not wrapped is returned as it is. Raises InsufficientMemoryError, and leaves the model wrapped,
    if there is no room for the unpacked weights. Whatever an accelerator does, the weights come back;
    experts on a disk that cannot be read stay wrapped, and `unwrap` may be called again.
    """
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        return model
    sizes = [(layer.native_bytes, layer.packed_bytes) for layer in reversed(runtime.in_place)]
    ensure_unwrap_fits(model, sizes)
    attempts = runtime.undo()
    if runtime.hybrid is not None:
        attempts.take(bring_back_dense, model)
    if not runtime.in_place:
        runtime.leave()
    attempts.finish("the model is unwrapped")
    rounded = {
        "experts": runtime.config.weights != "native" and runtime.config.weights,
        "dense layers": runtime.config.linear,
    }
    for part, fmt in rounded.items():
        if fmt:
            warnings.warn(
                f"the {part} were stored as {fmt}: the restored weights are the dequantized ones, "
                "not the checkpoint's",
                stacklevel=2,
            )
    return model


def verify(model: nn.Module, input_ids: Tensor | None = None) -> Verification:
    """Compare every wrapped layer with the reference arithmetic on real hidden states.

    input_ids: [B, T] tokens to run; None takes 32 pseudo-random ones. The reference is the original
    module's own forward in float32 on the weights as they are stored. Prints nothing; the result's
    text shows the worst layer.
    """
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        raise WrappedModelError("verify needs a wrapped model; call hybrimoe.wrap(model) first")
    if input_ids is None:
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(vocabulary, (1, 32), generator=generator)
    return verify_layers(model, runtime.layers, input_ids)


def _already_wrapped(model: Model, config: Config) -> Model:
    current = model.hybrimoe.config  # type: ignore[union-attr]
    if current != config:
        warnings.warn(
            f"the model is already wrapped with {current}; unwrap it first to use {config}",
            stacklevel=3,
        )
    return model


def _check(model: nn.Module, found: list[FoundExperts], config: Config) -> None:
    """Everything that can be known to fail, before anything is touched."""
    for experts in found:
        dtypes = {name: p.dtype for name, p in experts.module.named_parameters(recurse=False)}
        if len(set(dtypes.values())) > 1:
            raise FormatError(f"parameters of {experts.name} must share one dtype, got {dtypes}")
        for tensor in experts.module.parameters():
            if tensor.device.type != "cpu":
                raise UnsupportedModelError(
                    f"{experts.name} must be on the CPU to be wrapped, it is on {tensor.device}"
                )
        described, fmt = experts.views(), experts.spec.fmt(config.weights)
        biases = [b for b in (described.up_bias, described.down_bias) if b is not None]
        folded = check_adapters(model, experts, fmt)
        formats.check_range(experts.name, fmt, [described.up, described.down, *biases, *folded])
    _check_owners(found)
    check_room(found, config)


def _check_owners(found: list[FoundExperts]) -> None:
    """Raise UnsupportedModelError for layers that share their experts."""
    owners: dict[int, str] = {}
    for experts in found:
        for parameter in experts.module.parameters():
            owner = owners.setdefault(id(parameter), experts.name)
            if owner != experts.name:
                raise UnsupportedModelError(
                    f"{owner} and {experts.name} share their weights; wrap needs one copy per layer"
                )


def _roll_back(runtime: Runtime, model: nn.Module, error: BaseException) -> None:
    """Make the model what it was before a `wrap` that failed, or say in its error what is missing."""
    attempts = runtime.undo()
    for failure in (*attempts.errors, *attempts.complaints):
        error.add_note(f"while undoing it: {type(failure).__name__}: {failure}")
    if runtime.in_place:
        model.hybrimoe = runtime  # type: ignore[assignment]
        error.add_note("some experts are still packed: hybrimoe.unwrap(model) tries again")
    elif runtime.layers and runtime.config.weights != "native":
        warnings.warn(
            f"wrap failed after {len(runtime.layers)} layers had been stored as "
            f"{runtime.config.weights}; these hold dequantized weights now: reload the model",
            stacklevel=4,
        )
