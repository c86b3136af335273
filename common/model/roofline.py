"""What a computation asks of a GPU, counted without one: bytes, products and memory of every kernel that
eager PyTorch launches, from a run on fake tensors (no memory, no arithmetic).

A time from it is a bound, not a measurement: each kernel takes as long as its bytes at the GPU's bandwidth or
its products at the GPU's peak, whichever is longer, and its launch.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from salt_distill.common.config import GpuName
from salt_distill.common.model.pixels import normalise


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What its maker's data sheet says."""

    device_name: str
    """As PyTorch calls it."""
    memory_bytes: float
    bytes_per_s: float
    """Bandwidth of its memory."""
    bfloat16_flops: float
    """FLOP/s of matrix products, dense, with sums in float32."""
    float32_flops: float


GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(
        device_name="NVIDIA A100-SXM4-80GB",
        memory_bytes=85e9,
        bytes_per_s=2.04e12,
        bfloat16_flops=312e12,
        float32_flops=19.5e12,
    ),
    "h100": Gpu(
        device_name="NVIDIA H100 80GB HBM3",
        memory_bytes=85e9,
        bytes_per_s=3.35e12,
        bfloat16_flops=989.4e12,
        float32_flops=67e12,
    ),
    "h200": Gpu(
        device_name="NVIDIA H200",
        memory_bytes=150e9,
        bytes_per_s=4.8e12,
        bfloat16_flops=989.4e12,
        float32_flops=67e12,
    ),
    "b200": Gpu(
        device_name="NVIDIA B200",
        memory_bytes=190e9,
        bytes_per_s=8e12,
        bfloat16_flops=2250e12,
        float32_flops=75e12,
    ),
    "4090": Gpu(
        device_name="NVIDIA GeForce RTX 4090",
        memory_bytes=25.7e9,
        bytes_per_s=1.008e12,
        bfloat16_flops=165.2e12,
        float32_flops=82.6e12,
    ),
    "l4": Gpu(
        device_name="NVIDIA L4",
        memory_bytes=24.1e9,
        bytes_per_s=0.3e12,
        bfloat16_flops=121e12,
        float32_flops=30.3e12,
    ),
}
"""The SXM modules of the data centre ones; a100 and h100 with 80 GB."""


def gpu_name(device: torch.device) -> GpuName | None:
    """What the table calls a device of this machine; None where it is not in it."""
    if device.type != "cuda":
        return None
    its = torch.cuda.get_device_name(device)
    return next((name for name, gpu in GPUS.items() if gpu.device_name == its), None)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What kernels reach of a data sheet."""

    bandwidth: float
    """Share of the memory's bandwidth."""
    peak: float
    """Share of the peak of matrix products."""
    launch_s: float
    """From one kernel to the next."""


BEST = Reached(bandwidth=0.83, peak=0.8, launch_s=3e-6)
"""Of an H200 4.0 TB/s and 790 TFLOP/s: what well-made kernels reach at sizes that suit them."""
WORST = Reached(bandwidth=0.6, peak=0.5, launch_s=8e-6)
"""Products of odd sizes, short rows, a slow host: assumed, not measured."""


class Kernel(NamedTuple):
    """One launch."""

    name: str
    num_bytes: int
    """That it reads and writes, each tensor once."""
    flops: int
    """Of its matrix products."""
    dtype: torch.dtype
    """Of what it multiplies."""

    def seconds(self, gpu: Gpu, reached: Reached) -> float:
        """The time that a GPU takes for it at least."""
        peak = gpu.bfloat16_flops if self.dtype == torch.bfloat16 else gpu.float32_flops
        moving, multiplying = (
            self.num_bytes / gpu.bytes_per_s / reached.bandwidth,
            self.flops / peak / reached.peak,
        )
        return max(moving, multiplying) + reached.launch_s


class Kernels(TorchDispatchMode):
    """Counts the kernels of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Kernel] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _NO_KERNEL or func.namespace != "aten":
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in written if all(tensor is not other for other in read)]
        if name in _GATHERS:  # they read of their source what they write
            num_bytes = 2 * sum(map(size, new)) + sum(map(size, read[1:]))
        else:
            num_bytes = sum(map(size, read)) + sum(map(size, new))
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        dtype = next((tensor.dtype for tensor in read if tensor.is_floating_point()), torch.float32)
        self.launches[Kernel(name, num_bytes, flops, dtype)] += 1
        return out


@contextmanager
def fake_tensors() -> Iterator[None]:
    """What runs inside has tensors without memory and does no arithmetic."""
    normalise(torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8))  # its constants are kept, and must be real ones
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        # of a deep copy of a parameter, whose address torch looks at
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def seconds(launches: Counter[Kernel], gpu: Gpu, reached: Reached = BEST) -> float:
    """The time that a GPU takes for all of them at least."""
    return sum(number * kernel.seconds(gpu, reached) for kernel, number in launches.items())


_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"} | {
    "detach",
    "alias", "lift_fresh", "_reshape_alias", "set_", "resize_",
}  # fmt: skip
_GATHERS = {"index", "gather", "index_select", "embedding"}


def size(tensor: Tensor) -> int:
    """Bytes that a tensor takes, those of expanded dimensions once."""
    count = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= extent if stride else 1
    return count * tensor.element_size()


class PeakMemory(TorchDispatchMode):
    """The most that tensors hold at one time: those made inside it, until nobody has them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        """Now."""
        self.peak_bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages.add(key)
        self.held_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.held_bytes -= num_bytes
