"""On what a command computes."""

from typing import Annotated, Literal

from pydantic import Field

Device = Literal["auto", "cpu"]
"""GPUs where there are any, or the CPU all the same."""

GpusPerWorker = Annotated[float, Field(ge=0)] | None


def require_one_device(device: Device, gpus: float | None) -> None:
    """Raises ValueError where GPUs are asked for beside the CPU."""
    if device == "cpu" and gpus:
        raise ValueError(f"got --device cpu with --gpus-per-worker {gpus:g}, expected one of them")
