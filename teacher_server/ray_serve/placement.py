"""What Ray lacks to place a worker, as a sentence."""

from collections.abc import Mapping

SAY_PENDING_S = 30.0
"""A placement that pends this long says what is missing (DESIGN section 4, Ray)."""


def check_fits(total: Mapping[str, float], *, cpus: float, gpus: float, flags: str) -> None:
    """Raises ValueError where a Ray that does not grow has less in all than is asked for."""
    if (missing := what_is_missing(total, cpus=cpus, gpus=gpus)) is not None:
        raise ValueError(
            f"this machine has too little in all: {missing}: lower {flags}, or give the --address of a"
            " cluster"
        )


def what_is_missing(resources: Mapping[str, float], *, cpus: float, gpus: float) -> str | None:
    """What is asked for and what is there, for ``resources`` as Ray counts them; None where they suffice."""
    has_cpus, has_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if has_cpus >= cpus and has_gpus >= gpus:
        return None
    return f"it needs {cpus:g} CPUs and {gpus:g} GPUs, and there are {has_cpus:g} and {has_gpus:g}"
