"""Hardware described by measurable numbers, and the expert shapes of models, for the simulator.

A profile times a shape gives a `CostModel`. Each number below says where it comes from: a vendor's
specification with the share of it that kernels reach, or a measurement. They are meant for choosing
between policies and machines; `hybrimoe calibrate` measures a machine instead.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import ProfileError
from hybrimoe.policy.cost import CostModel

LEAST_S = 1e-9
INT4_BYTES = 0.5 + 2 / 32  # per weight: four bits and one float16 scale per group of 32


@dataclass(frozen=True)
class Shape:
    """One layer of a model: expert matrices, and the rest of the layer as dense weights.

    dense: weights of attention, router and shared experts that one token reads.
    """

    hidden: int
    intermediate: int
    dense: int
    bytes_per_weight: float = INT4_BYTES

    @property
    def weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        return round(self.weights * self.bytes_per_weight)


@dataclass(frozen=True)
class Profile:
    """A machine as the rates its experts see; seconds, bytes and weights.

    cpu_bandwidth: bytes of expert weights read per second, alone, by all threads together.
    cpu_rate: multiply-adds per second on many tokens. cpu_first_s: hand-over to the CPU and back.
    gpu_bandwidth, gpu_rate, gpu_launch_s: the same for the GPU; launch is per expert.
    link_bandwidth, link_latency_s: host to device copies from pinned memory.
    memory_bandwidth: what CPU and link can read from host memory together.
    layer_s: host and launch seconds of everything else in a layer.
    plan_s, forecast_s: policy work per layer on this host's processor.
    """

    name: str
    cpu_bandwidth: float
    cpu_rate: float
    cpu_first_s: float
    gpu_bandwidth: float
    gpu_rate: float
    gpu_launch_s: float
    link_bandwidth: float
    link_latency_s: float
    memory_bandwidth: float
    layer_s: float
    plan_s: float
    forecast_s: float

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "name":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ProfileError(
                    f"profile {self.name}: {item.name} must be a positive number, got {value!r}"
                )

    def cost(self, shape: Shape) -> CostModel:
        """What one expert of a shape costs here.

        While the link copies, the CPU is left with the memory bandwidth the link does not take.
        """
        size = shape.expert_bytes
        left = max(self.memory_bandwidth - self.link_bandwidth, 0.1 * self.memory_bandwidth)
        return CostModel(
            cpu_first=self.cpu_first_s,
            cpu_expert=size / self.cpu_bandwidth,
            cpu_token=shape.weights / self.cpu_rate,
            gpu_read=size / self.gpu_bandwidth,
            gpu_token=shape.weights / self.gpu_rate,
            gpu_launch=self.gpu_launch_s,
            link_latency=self.link_latency_s,
            link_bandwidth=self.link_bandwidth,
            expert_bytes=size,
            cpu_expert_contended=size / min(self.cpu_bandwidth, left),
            link_bandwidth_contended=self.link_bandwidth,
            dense_read=2 * shape.dense / self.gpu_bandwidth,  # dense weights stay in 16 bits
            dense_token=shape.dense / self.gpu_rate,
            dense_launch=self.layer_s,
            plan_s=self.plan_s,
            forecast_s=self.forecast_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> "Profile":
        """The reverse of `to_dict`; an unknown, missing or impossible number is refused."""
        known = {item.name for item in dataclasses.fields(cls)}
        for name in sorted(set(numbers) - known):
            raise ProfileError(f"{name} is no field of a profile, got {numbers[name]!r}")
        for name in sorted(known - set(numbers)):
            raise ProfileError(f"{name} is missing from the profile")
        return cls(**numbers)


# Common to all: a pinned copy starts within 10 us and a kernel launch from Python takes 5 us (2 to
# 10 us by CUDA's own figures); a layer's attention, norms and router are about 12 such launches.
# The policy's own work was measured on one core of a small virtual machine: about 12 us to plan one
# layer, 15 us to forecast and choose prefetches. The CPU's hand-over is one synchronisation, two
# copies of one token's activations, and waking the threads.
A6000 = Profile(
    name="a6000",
    # Xeon Gold 5220R, 10 of 24 cores: six DDR4-2666 channels are 128 GB/s (Intel ARK); ten cores
    # draw about 10 GB/s each of it, and kernels reach 0.7 of that.
    cpu_bandwidth=70e9,
    memory_bandwidth=105e9,  # 0.82 of 128 GB/s, the usual share for all channels together
    cpu_rate=10 * 2.2e9 * 32 * 0.6,  # VNNI: 64 8-bit multiply-adds per cycle, half of it for int4
    cpu_first_s=40e-6,
    gpu_bandwidth=768e9 * 0.7,  # NVIDIA data sheet, 768 GB/s GDDR6
    gpu_rate=155e12 / 2 * 0.4,  # data sheet: 155 dense fp16 tensor TFLOP/s, two per multiply-add
    gpu_launch_s=5e-6,
    link_bandwidth=25e9,  # PCIe 4.0 x16: 31.5 GB/s raw, 25 measured with pinned memory
    link_latency_s=10e-6,
    layer_s=60e-6,
    plan_s=12e-6,
    forecast_s=15e-6,
)
DESKTOP = Profile(
    name="desktop",
    # Eight-core desktop, dual-channel DDR5-5600: 89.6 GB/s by specification, 0.7 of it for kernels.
    cpu_bandwidth=62e9,
    memory_bandwidth=70e9,  # 0.78 of the specification; CPU and copies together
    cpu_rate=8 * 4.5e9 * 32 * 0.6,
    cpu_first_s=25e-6,
    gpu_bandwidth=1008e9 * 0.7,  # RTX 4090 data sheet, 24 GB
    gpu_rate=165e12 / 2 * 0.5,  # data sheet: 165 dense fp16 TFLOP/s with float32 accumulation
    gpu_launch_s=4e-6,
    link_bandwidth=25e9,  # PCIe 4.0 x16
    link_latency_s=8e-6,
    layer_s=45e-6,
    plan_s=8e-6,
    forecast_s=10e-6,
)
LAPTOP = Profile(
    name="laptop",
    # Eight-core laptop, dual-channel DDR5-4800: 76.8 GB/s by specification, 0.65 of it for kernels.
    cpu_bandwidth=50e9,
    memory_bandwidth=57e9,
    cpu_rate=8 * 3.5e9 * 16 * 0.6,  # AVX2 without VNNI at half the width of the desktop
    cpu_first_s=30e-6,
    gpu_bandwidth=256e9 * 0.7,  # RTX 4060 laptop data sheet, 8 GB
    gpu_rate=60e12 / 2 * 0.4,  # dense fp16 tensor rate at the laptop's clocks
    gpu_launch_s=5e-6,
    link_bandwidth=12.5e9,  # PCIe 4.0 x8
    link_latency_s=10e-6,
    layer_s=55e-6,
    plan_s=10e-6,
    forecast_s=13e-6,
)
H200 = Profile(
    name="h200",
    # 16 cores of a two-socket server: about 10 GB/s per core, limited by the cores and not by DDR5.
    cpu_bandwidth=120e9,
    memory_bandwidth=220e9,
    cpu_rate=16 * 2.7e9 * 32 * 0.6,
    cpu_first_s=30e-6,
    gpu_bandwidth=4.8e12 * 0.6,  # NVIDIA data sheet, HBM3e
    gpu_rate=989e12 / 2 * 0.4,  # data sheet: dense fp16 tensor rate
    gpu_launch_s=5e-6,
    link_bandwidth=52e9,  # PCIe 5.0 x16: 63 GB/s raw
    link_latency_s=8e-6,
    layer_s=60e-6,
    plan_s=10e-6,
    forecast_s=13e-6,
)


def profile(name: str) -> Profile:
    """A shipped profile by its name."""
    if name not in PROFILES:
        raise ProfileError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
    return PROFILES[name]


PROFILES = {profile.name: profile for profile in (A6000, DESKTOP, LAPTOP, H200)}

# Published configurations; dense weights are attention, router and shared experts of one layer.
SHAPES = {
    "gpt-oss-20b": Shape(2880, 2880, 2880 * (64 * 64 * 2 + 2 * 8 * 64) + 2880 * 32),
    "mixtral-8x7b": Shape(4096, 14336, 4096 * (4096 * 2 + 2 * 1024) + 4096 * 8),
    "qwen2-57b-a14b": Shape(3584, 2560, 3584 * (3584 * 2 + 2 * 512) + 3 * 3584 * 20480),
    "deepseek-v2-lite": Shape(2048, 1408, 2048 * 9000 + 3 * 2048 * 2816),
    "qwen3-30b-a3b": Shape(2048, 768, 2048 * (4096 * 2 + 2 * 512) + 2048 * 128),
}


def rates_of(cost: CostModel, shape: Shape, name: str) -> Profile:
    """The machine on which experts of a shape cost this much: the reverse of `Profile.cost`.

    So a machine that was measured with one model's experts can be simulated with another's. Only
    rates, not sizes, are taken over, and a number that is 0 becomes the least one.
    """
    size, weights = cost.expert_bytes, shape.weights
    return Profile(
        name=name,
        cpu_bandwidth=size / cost.cpu_expert,
        cpu_rate=weights / max(cost.cpu_token, LEAST_S),
        cpu_first_s=max(cost.cpu_first, LEAST_S),
        gpu_bandwidth=size / cost.gpu_read,
        gpu_rate=weights / max(cost.gpu_token, LEAST_S),
        gpu_launch_s=max(cost.gpu_launch, LEAST_S),
        link_bandwidth=cost.link_bandwidth,
        link_latency_s=max(cost.link_latency, LEAST_S),
        memory_bandwidth=size / cost.cpu_expert_contended + cost.link_bandwidth,
        layer_s=max(cost.dense_launch + cost.gpu_first, LEAST_S),
        plan_s=max(cost.plan_s, LEAST_S),
        forecast_s=max(cost.forecast_s, LEAST_S),
    )


def shape(model: str) -> Shape:
    """The expert shape of a model by its name."""
    if model not in SHAPES:
        raise ProfileError(f"model must be one of {', '.join(SHAPES)}, got {model!r}")
    return SHAPES[model]
