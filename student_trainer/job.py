"""The Ray Train edge: the same loop in Ray's workers."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from common.config import StudentRun, TeacherRun, TrainConfig, VJepaRun
from common.local_ray import ray_to_join

_RUNS = {run.__name__: run for run in (TeacherRun, StudentRun, VJepaRun)}
_SAY_PENDING_S = 30.0
"""A placement that pends this long says what is missing (DESIGN section 4, Ray)."""
ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the configuration are relative to where the command was given
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
"""What a Ray that trains is started with."""


def run_job(config: TrainConfig, checkpoint: Path | None) -> None:
    """Trains with ``config.workers`` Ray Train workers. Raises what a worker raised, or ValueError where the workers find no place."""
    os.environ.update(ENVIRONMENT)
    with ray_to_join(config.address, environment=ENVIRONMENT) as ray_arguments:
        import ray

        ray.init(**ray_arguments)
        try:
            _fit(config, checkpoint)
        finally:
            ray.shutdown()


def _fit(config: TrainConfig, checkpoint: Path | None) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is said by the worker's own error
    resources: dict[str, float] = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "run": type(config).__name__,
            "config": config.model_dump(mode="json"),
            "checkpoint": None if checkpoint is None else str(checkpoint),
        },
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RunConfig(storage_path=str(Path(config.out).resolve()), name="ray_train"),
    )
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the command's thread, which raises it
            failures.append(error)

    # fit() turns Ctrl-C into success and waits for a placement for ever, so it runs beside the thread that watches for both.
    before = set(_pending_groups())
    with _InterruptFlag() as interrupted:
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        since = time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            if interrupted.is_set():
                raise KeyboardInterrupt
            pending = {name: group for name, group in _pending_groups().items() if name not in before}
            since = since if pending else time.monotonic()
            if time.monotonic() - since > _SAY_PENDING_S:
                raise ValueError(_what_is_missing(next(iter(pending.values()))))
    if failures:
        raise _cause(failures[0])


def _work(values: dict[str, Any]) -> None:
    """A worker's whole work."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from student_trainer.loop import Worker, train

    context = ray.train.get_context()
    config = _RUNS[values["run"]].model_validate(values["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    worker = Worker(rank=context.get_world_rank(), world_size=context.get_world_size(), device=device)
    train(config, worker, None if values["checkpoint"] is None else Path(values["checkpoint"]))


class _InterruptFlag(threading.Event):
    """Set by SIGINT and SIGTERM inside the block."""

    def __enter__(self) -> "_InterruptFlag":
        self._before = {number: signal.signal(number, lambda *_: self.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _pending_groups() -> dict[str, dict[str, Any]]:
    from ray.util import placement_group_table

    return {name: group for name, group in placement_group_table().items() if group["state"] in ("PENDING", "RESCHEDULING")}


def _what_is_missing(group: dict[str, Any]) -> str:
    import ray

    wanted = [dict(bundle) for bundle in group["bundles"].values()]
    return (
        f"the workers wait for a place since {_SAY_PENDING_S:.0f} s: they need {wanted}, free are {ray.available_resources()}: end other jobs, add nodes, "
        "or lower --workers, --cpus-per-worker or --gpus-per-worker"
    )


def _cause(error: BaseException) -> BaseException:
    """The first worker's own error, which says what is wrong; Ray's wrapper around it otherwise."""
    failures = getattr(error, "worker_failures", None) or {}
    return next(iter(failures.values()), error)
