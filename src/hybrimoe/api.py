"""wrap, unwrap, verify: the three verbs, and the `Runtime` that a wrapped model carries."""

from __future__ import annotations

import logging
import warnings
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, FormatError, UnsupportedModelError, WrappedModelError
from hybrimoe.kernels.threads import usable_cores
from hybrimoe.report import Report
from hybrimoe.runtime import formats
from hybrimoe.runtime.adapters import FoundExperts, find_experts, top_k_of
from hybrimoe.runtime.cuda import TorchAccelerator
from hybrimoe.runtime.device import Accelerator, EmulatedAccelerator
from hybrimoe.runtime.experts import PooledExperts
from hybrimoe.runtime.guards import Guards, refuse_copy, refuse_pickle
from hybrimoe.runtime.hybrid import Hybrid
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.runtime.stats import Stats
from hybrimoe.verification import Verification, verify_layers

logger = logging.getLogger("hybrimoe")
Model = TypeVar("Model", bound=nn.Module)


class Runtime:
    """What `model.hybrimoe` is: the configuration, the pool and the counters of a wrapped model."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.config = config
        self.pool = ExpertPool()
        self.layers: list[PooledExperts] = []
        self.hybrid: Hybrid | None = None
        self._counters = Stats()
        self.threads = config.threads or min(torch.get_num_threads(), usable_cores())
        self._guards = Guards()
        self._hooks = [
            model.register_forward_pre_hook(self._counters.enter, with_kwargs=True),
            model.register_forward_hook(self._counters.leave, with_kwargs=True),
        ]

    def report(self) -> Report:
        """What happened since the last reset, and where the time went."""
        return Report.of(
            self.config, self.layers, self._counters, self.pool.nbytes, self.threads, self.hybrid
        )

    def stats(self) -> dict[str, Any]:
        """The report's numbers as a plain dict."""
        return self.report().to_dict()

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._counters.reset()
        if self.hybrid is not None:
            self.hybrid.reset()

    def share(self, model: nn.Module, accelerator: Accelerator) -> None:
        """From now on, the policies divide the experts between the CPU and an accelerator."""
        policies, top_k = self.config.policies(), top_k_of(model)
        self.hybrid = Hybrid(
            self.pool, policies, accelerator, self.config.vram, top_k, self.threads
        )
        for layer in self.layers:
            layer.hybrid = self.hybrid

    def guard(self, model: nn.Module) -> None:
        """Refuse from now on what would break the experts."""
        dtypes = {layer.dtype for layer in self.layers}
        self._guards.install(model, [layer.name for layer in self.layers], dtypes)

    def detach(self) -> None:
        """Remove the hooks and the guards from the model."""
        self._guards.remove()
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        size = self.pool.nbytes / 2**20
        return f"<hybrimoe.Runtime: {len(self.layers)} layers, {size:.1f} MiB of experts>"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


def wrap(model: Model, config: Config | None = None, **overrides: Any) -> Model:
    """Replace the routed experts of a transformers model by pooled ones, in place.

    Returns the same model; `model.hybrimoe` is its `Runtime`. `overrides` are fields of `Config`.
    Needs the memory of one layer on top of the model, and gives back each layer as it goes. Wrapping
    twice changes nothing and warns if the configuration differs. Raises UnsupportedModelError,
    ConfigError or FormatError before the model is touched.
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
    found = find_experts(model)
    _check(found, config)
    runtime = Runtime(config, model)
    try:
        for experts in found:
            # fmt: off
            layer = PooledExperts(experts, config.weights, runtime.pool, runtime.threads,
                                  runtime._counters)
            # fmt: on
            runtime.layers.append(layer)
            layer.install()
        accelerator = open_accelerator(config)
        if accelerator is not None:
            runtime.share(model, accelerator)
            move_dense(model, accelerator.compute_device)
        runtime.guard(model)
    except BaseException:
        _roll_back(runtime)
        raise
    model.hybrimoe = runtime  # type: ignore[assignment]
    logger.info("wrapped %s: %s", type(model).__name__, runtime)
    return model


def unwrap(model: Model) -> Model:
    """Put the original experts back, in place, and return the model.

    The modules are the same objects as before `wrap`. Weights are bit-equal where the format is
    lossless ("native"); for "int8" and "int4" they are the dequantized ones, and a warning says so.
    A model that is not wrapped is returned as it is.
    """
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        return model
    runtime.detach()
    if runtime.hybrid is not None:
        runtime.hybrid.close()
        move_dense(model, "cpu")
    for layer in runtime.layers:
        layer.restore()
    del model.hybrimoe
    if runtime.config.weights != "native":
        warnings.warn(
            f"the experts were stored as {runtime.config.weights}: the restored weights are the "
            "dequantized ones, not the checkpoint's",
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


def open_accelerator(config: Config) -> Accelerator | None:
    """The accelerator a configuration asks for, or None for the CPU alone."""
    if config.device == "emulated":
        return EmulatedAccelerator(capacity=1 << 40)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' needs a CUDA device, torch finds none; try 'emulated'")
    if config.device == "cuda":
        return TorchAccelerator()
    return None


def move_dense(model: nn.Module, device: str) -> None:
    """Put everything that is not a pooled expert on a device: attention, norms, routers, heads."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)


def _already_wrapped(model: Model, config: Config) -> Model:
    current = model.hybrimoe.config  # type: ignore[union-attr]
    if current != config:
        warnings.warn(
            f"the model is already wrapped with {current}; unwrap it first to use {config}",
            stacklevel=3,
        )
    return model


def _check(found: list[FoundExperts], config: Config) -> None:
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
        described = experts.describe(experts.module)
        fmt = formats.format_of(config.weights, described.up.dtype)
        biases = [b for b in (described.up_bias, described.down_bias) if b is not None]
        formats.check_range(experts.name, fmt, [described.up, described.down, *biases])


def _roll_back(runtime: Runtime) -> None:
    runtime.detach()
    for layer in runtime.layers:
        layer.restore()
    if runtime.layers and runtime.config.weights != "native":
        warnings.warn(
            f"wrap failed after {len(runtime.layers)} layers had been stored as "
            f"{runtime.config.weights}; these hold dequantized weights now: reload the model",
            stacklevel=3,
        )
