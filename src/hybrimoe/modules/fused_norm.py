"""Norms that one kernel computes for a few tokens, where torch's half a dozen calls cost more.

Which modules are such norms is not known from their class: what they return is compared with the
formulas the kernel has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrimoe.kernels.cpu.rms_norm import run_norm
from hybrimoe.models import weights as formats
from hybrimoe.models.places import exchange
from hybrimoe.modules.replacement import PackedModule

MOST = 1 << 14
"""Numbers of one call, beyond which torch's threads are worth their calls."""
EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Where norms keep what they add to the mean square."""
CLOSE = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Relative difference of two roundings in the last place, or of float32's sums in another order."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Formula(NamedTuple):
    """x / sqrt(mean(x * x) + eps) * (weight + offset); early: rounded before the product, too."""

    eps: float
    offset: float
    early: bool


class FoundNorm(NamedTuple):
    """A norm of a model, where it hangs, and what it computes."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    formula: Formula


class FusedNorm(PackedModule):
    """A norm in one call; it shares its weight with the original, which serves all other inputs."""

    native_bytes = packed_bytes = packed_numbers = 0  # of its own
    packed_names = ()

    def __init__(self, found: FoundNorm) -> None:
        super().__init__()
        self.name, self.formula = found.name, found.formula
        self.weight: Tensor = found.module.weight  # type: ignore[assignment]
        # Kept out of nn.Module's registry: only the weight is the model's now.
        self.__dict__["found"] = found
        self.dtype = self.weight.dtype
        self.format = formats.NATIVE[self.dtype]
        self.bits, self.place = formats.bits(self.weight.detach()), self.weight.data_ptr()
        self.train(found.module.training)

    def attach(self) -> None:
        """Take the original's place in its parent."""
        exchange(self.found, self.found.module, self)

    def restore(self) -> None:
        """Undo `attach`."""
        self.found.module.train(self.training)
        exchange(self.found, self, self.found.module)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the original returns for the same arguments."""
        if args or kwargs or not self._serves(x):
            return self.found.module(x, *args, **kwargs)
        if x.requires_grad:
            x = x.detach()
        out, columns = torch.empty_like(x), x.shape[-1]
        rows, into = formats.bits(x).reshape(-1, columns), formats.bits(out).reshape(-1, columns)
        run_norm(rows, self.bits, into, *self.formula, self.format)
        return out

    def _serves(self, x: Tensor) -> bool:
        """Whether the kernel can compute this."""
        weight = self._parameters["weight"]  # `self.weight` takes nn.Module a microsecond
        assert weight is not None
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
            return False
        if x.dtype != self.dtype or x.shape[-1] != self.bits.size or not 0 < x.numel() <= MOST:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        if weight.data_ptr() != self.place:  # somebody gave the parameter other memory
            return False
        return x.is_contiguous()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if (
            name == "weight" and "found" in self.__dict__
        ):  # another parameter is the original's, too
            setattr(self.found.module, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "found" not in self.__dict__:  # while it is built
                raise
            return getattr(self.found.module, name)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.formula.eps:g}"


def find_norms(model: nn.Module) -> Iterator[FoundNorm]:
    """Every norm of a model that the kernel computes exactly as the module does."""
    for path, parent in list(model.named_modules()):
        for attribute, module in list(parent.named_children()):
            formula = formula_of(module)
            if formula is not None:
                name = f"{path}.{attribute}" if path else attribute
                yield FoundNorm(name, parent, attribute, module, formula)


@torch.no_grad()
def formula_of(module: nn.Module) -> Formula | None:
    """The formula of a norm, by trial on random weights and rows; None if it is none of ours."""
    eps = _epsilon(module)
    if eps is None or any(getattr(module, hooks) for hooks in HOOKS):
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    # The rows' sizes reach down to where eps decides.
    sizes = torch.tensor([[30.0], [1.0], [eps**0.5], [0.1 * eps**0.5]])
    x = (torch.randn(4, len(weight), generator=generator) * sizes).to(weight.dtype)
    trial = (torch.rand(len(weight), generator=generator) + 0.25).to(weight.dtype)
    try:
        wanted = torch.func.functional_call(module, {"weight": trial}, (x,))
    except (TypeError, ValueError, IndexError, RuntimeError):  # it wants other arguments
        return None
    if not isinstance(wanted, Tensor) or wanted.dtype != x.dtype or wanted.shape != x.shape:
        return None
    for offset in (0.0, 1.0):
        for early in (True, False):
            formula = Formula(eps, offset, early)
            if _agree(compute(formula, x, trial), wanted):
                return formula
    return None


def compute(formula: Formula, x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D] normed by the kernel."""
    out, dtype = torch.empty_like(x), formats.NATIVE[x.dtype]
    run_norm(formats.bits(x), formats.bits(weight), formats.bits(out), *formula, dtype)
    return out


def _agree(got: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by no more than the order of float32 sums explains.

    Half precision: in the last place of few numbers. Another order of rounding shows in every fifth.
    """
    bound = CLOSE[wanted.dtype]
    if not torch.allclose(got.float(), wanted.float(), rtol=bound, atol=1e-30):
        return False
    differing = int((got != wanted).sum())
    return wanted.dtype == torch.float32 or differing <= max(2, wanted.numel() // 50)


def _epsilon(module: nn.Module) -> float | None:
    """The eps of what looks like a norm: one vector called weight, nothing else; None elsewhere."""
    state = [*module.parameters(), *module.buffers()]
    weight = getattr(module, "weight", None)
    if len(state) != 1 or state[0] is not weight or next(module.children(), None) is not None:
        return None
    if weight.dim() != 1 or weight.dtype not in formats.NATIVE or not weight.is_cpu:
        return None
    values = (getattr(module, name, None) for name in EPSILONS)
    return next((float(v) for v in values if isinstance(v, float) and v > 0), None)
