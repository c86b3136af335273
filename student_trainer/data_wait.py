"""Whether a run's steps wait for their clips, and what would help then."""

import os
from statistics import median

import numpy as np

from salt_distill.common.config import TrainConfig
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.local_ray import is_private
from salt_distill.common.metrics_line import MetricsLine

_LEAST_S = 10.0
"""Training that is looked at, in seconds."""
_SHARE = 0.5
"""Of the time of a step: from here on the clips decide how fast the run is."""
_NUM_LOOKED_AT = 500
"""Videos whose sizes are looked at."""


class DataWait:
    """What the lines of a run's metrics, one after the other, come to."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._after_step: int | None = None
        self._waited_ms = self._ms = 0.0
        self._is_said = False

    def sentence(self, line: MetricsLine) -> str | None:
        """What to do where most of the time goes into waiting; once, and never again. The first line is left
        out: every run waits for its first clips."""
        before, self._after_step = self._after_step, line.step
        if before is None or line.step <= before or self._is_said:
            return None
        self._waited_ms += line.data_wait_ms * (line.step - before)
        self._ms += line.step_ms * (line.step - before)
        share = self._waited_ms / max(self._ms, 1e-9)
        if self._ms < 1000 * _LEAST_S or share < _SHARE:
            return None
        self._is_said = True
        knobs = _knobs(self._config) or ["give it more CPUs, or fewer frames to decode per clip"]
        return f"the steps wait for clips {share:.0%} of their time: {', or '.join(knobs)}"


def _knobs(config: TrainConfig) -> list[str]:
    """What would help, from what is known here: of workers on other machines neither CPUs nor videos are."""
    loader = config.loader
    found = []
    if "://" in config.data and loader.shard_cache_dir is None:
        found.append("keep what is read on a local disk with --set loader.shard_cache_dir=DIR")
    if config.most_workers and not is_private(config.address):
        found.append(
            "decode in more processes, where a worker has the CPUs, with --set"
            f" loader.decode_processes={loader.decode_processes + 2}"
        )
        found.append("make smaller copies of large videos with salt-data pack --short-side")
        return found
    num_cpus = len(os.sched_getaffinity(0)) // max(config.most_workers, 1)
    if num_cpus > loader.decode_processes:
        found.append(
            f"decode in more processes with --set loader.decode_processes={num_cpus}, now"
            f" {loader.decode_processes}"
        )
    crop = max(config.view.height, config.view.width)
    short_side = _short_side(config.data)
    if short_side > 2 * crop:
        copies = 2 * round(crop * 8 / 7 / 2)  # 256 pixels for crops of 224
        found.append(
            f"make smaller copies with salt-data pack --short-side {copies}: half of the videos have"
            f" {short_side:.0f} pixels or more, crops {crop}"
        )
    return found


def _short_side(data: str) -> float:
    """The median over the videos of a data set, in pixels."""
    dataset = open_dataset(data)
    num_videos = sum(len(samples) for samples in dataset.samples("all"))
    rows = np.unique(np.linspace(0, num_videos - 1, _NUM_LOOKED_AT).astype(np.int32))
    return median(min(sample.width, sample.height) for sample in dataset.take(rows))
