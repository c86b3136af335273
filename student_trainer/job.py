"""The Ray Train edge: what a process does alone, in Ray's workers."""

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from salt_distill.common.config import EmbedConfig, ProbeConfig, TrainConfig
from salt_distill.common.devices import gpus_of_worker, require_device
from salt_distill.common.local_ray import is_lost, join, leave, ray_to_join
from salt_distill.common.termination import end_in_time, exit_by, taking_time
from salt_distill.student_trainer.run_directory import says_how_to_go_on
from salt_distill.student_trainer.stop_request import StopRequests, ask_to_stop

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from salt_distill.student_trainer.dry_run import DryRun
    from salt_distill.student_trainer.ranks import Worker

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STOP_S = 90.0
"""How long workers that were asked to stop may take for the step under way and its checkpoint."""
_SAY_PENDING_S = 30.0
"""A placement that pends this long says what is missing (DESIGN section 4, Ray)."""
ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
"""What a Ray that trains is started with."""
_ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"}
"""Of an elastic run. What Ray Train believes of the cluster is up to 20 s old, so after a node's loss it asks
for a place that is no longer there; only when that took too long does it ask for fewer workers."""


def run_job(config: TrainConfig) -> None:
    """Trains in Ray Train workers. Raises what a worker raised, or ValueError where the workers find no
    place."""
    work = partial(_train, config.absolute())
    in_workers(
        work,
        config,
        folder=Path(config.out),
        max_failures=config.max_failures,
        around=says_how_to_go_on(config),
    )


def dry_run_job(config: TrainConfig) -> "DryRun":
    """What ``config``'s beginning comes to in Ray Train workers. Raises as ``run_job`` does."""
    with tempfile.TemporaryDirectory() as folder:
        return in_workers(partial(_try, config.absolute()), config, folder=Path(folder))


def in_workers(
    work: "Callable[[Worker], T]",
    config: TrainConfig | ProbeConfig | EmbedConfig,
    *,
    folder: Path,
    max_failures: int = 0,
    around: AbstractContextManager[None] | None = None,
) -> T:
    """What ``work`` comes to on rank 0, when it is done on all ranks: as many Ray Train workers as ``config``
    asks for.

    ``folder``: where Ray Train keeps its own files. ``max_failures``: times that lost workers are replaced,
    and the work begun again. ``around``: the work, but not what cleans up after it. Raises as ``run_job``
    does.
    """
    environment = ENVIRONMENT | ({} if isinstance(config.workers, int) else _ELASTIC)
    os.environ.update(environment)
    with ray_to_join(config.address, environment=environment) as ray_arguments:
        import ray

        join(ray_arguments)
        try:
            resources = ray.cluster_resources()
            if isinstance(config, TrainConfig):
                require_device(config, resources)
            gpus = gpus_of_worker(config, resources)
            with around or nullcontext():
                return _fit(work, config.model_copy(update={"gpus_per_worker": gpus}), folder, max_failures)
        finally:
            leave()


def _trainer(
    work: "Callable[[Worker], T]",
    config: TrainConfig | ProbeConfig | EmbedConfig,
    folder: Path,
    max_failures: int,
) -> "TorchTrainer":
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class StopAtOwnErrors(UserCallback):
        """Ends the run where starting it again would end in the same sentence, however many failures are
        allowed."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, ValueError):
                    raise error

    return TorchTrainer(
        lambda: work(_worker(config)),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(
                config.workers
                if isinstance(config.workers, int)
                else (config.fewest_workers, config.most_workers)
            ),
            use_gpu=bool(config.gpus_per_worker),
            resources_per_worker=_resources(config),
        ),
        run_config=RunConfig(
            storage_path=str(folder.resolve()),
            name="ray_train",
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[StopAtOwnErrors()],
        ),
    )


def _fit(
    work: "Callable[[Worker], T]",
    config: TrainConfig | ProbeConfig | EmbedConfig,
    folder: Path,
    max_failures: int,
) -> T:
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is said by the worker's own error
    trainer = _trainer(work, config, folder, max_failures)
    results: list[T] = []
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit().return_value)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - handed to the command's thread, which raises it
            failures.append(error)

    # fit() turns Ctrl-C into success and waits for a placement for ever, so it runs beside the thread that
    # watches for both.
    with _Interrupted() as interrupted:
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        placement = _Placement(config)
        while thread.is_alive():
            thread.join(0.2)
            if interrupted.number is not None:
                _stop(thread, failures, interrupted.number)
            placement.look()
    if failures:
        raise _cause(failures[0])
    return results[0]


def _stop(training: threading.Thread, failures: Sequence[BaseException], number: int) -> NoReturn:
    """Ends this process by a signal; workers that have learned something first write a checkpoint."""
    end_in_time(128 + number)
    if not is_lost() and ask_to_stop():
        with taking_time():
            training.join(_STOP_S)
        for error in failures:
            logger.error("no checkpoint of the last step was written: %s", _cause(error))
        if training.is_alive():
            logger.error("the workers wrote no checkpoint within %.0f s, and are ended", _STOP_S)
    exit_by(number)


def _worker(config: TrainConfig | ProbeConfig | EmbedConfig) -> "Worker":
    """Where this process stands, as Ray Train says."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from salt_distill.student_trainer.ranks import Worker

    context = ray.train.get_context()
    device = get_device() if config.gpus_per_worker else torch.device("cpu")
    assert isinstance(device, torch.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what gathers and scatters takes the current one
    return Worker(rank=context.get_world_rank(), world_size=context.get_world_size(), device=device)


def _train(config: TrainConfig, worker: "Worker") -> None:
    """A worker's whole training, each time that Ray starts it: from the newest checkpoint that there is by
    then. Returns early where the command asks for it."""
    from salt_distill.student_trainer.loop import train_on
    from salt_distill.student_trainer.opening import opened
    from salt_distill.student_trainer.ranks import StopRequest
    from salt_distill.student_trainer.run_directory import claimed

    if worker.rank == 0:
        worker = replace(worker, is_asked_to_stop=StopRequests().is_asked)
    with (
        suppress(StopRequest),
        opened(config, worker) as (reader, sources),  # first: what is wrong with them leaves `out` as it was
        claimed(config) if worker.rank == 0 else nullcontext() as checkpoint,
    ):
        train_on(reader, sources, config, worker, checkpoint)


def _try(config: TrainConfig, worker: "Worker") -> "DryRun":
    """A worker's part of a dry run."""
    from salt_distill.student_trainer.dry_run import begin

    return begin(config, worker)


def _resources(config: TrainConfig | ProbeConfig | EmbedConfig) -> dict[str, float]:
    """What Ray sets aside for a worker."""
    return {"CPU": config.cpus_per_worker} | (
        {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    )


def _amounts(resources: Mapping[str, float], kinds: Iterable[str]) -> str:
    """How much of each kind: 1 CPU and 2 GPUs."""
    amounts = {kind: resources.get(kind, 0.0) for kind in kinds}
    return " and ".join(f"{amount:g} {kind}{'s' * (amount != 1)}" for kind, amount in amounts.items())


class _Placement:
    """Says what is missing where the workers find no place. A run that had one waits for another, since nodes
    may come back."""

    def __init__(self, config: TrainConfig | ProbeConfig | EmbedConfig) -> None:
        self._config = config
        self._had_one = False
        self._waits_since: float | None = None
        self._looked_s = 0.0

    def look(self) -> None:
        """To be called again and again. Raises ValueError where there was no place for 30 s and never one
        before."""
        if time.monotonic() - self._looked_s < 1:
            return
        self._looked_s = time.monotonic()
        states = self._states()
        self._had_one |= "CREATED" in states
        if not (states & {"PENDING", "RESCHEDULING"} or (not states and not self._room())):
            self._waits_since = None
            return
        self._waits_since = self._waits_since or time.monotonic()
        if time.monotonic() - self._waits_since > _SAY_PENDING_S:
            if not self._had_one:
                raise ValueError(self._what_is_missing())
            logger.warning("%s", self._what_is_missing())
            self._waits_since = time.monotonic()

    def _states(self) -> set[str]:
        """Of the places of this run's workers, which Ray Train asks for anew each time that it starts
        them."""
        import ray
        from ray.util import placement_group_table

        job = (
            ray.get_runtime_context().get_job_id()
        )  # a placement group's id ends with that of the job that made it
        return {group["state"] for name, group in placement_group_table().items() if name.endswith(job)} - {
            "REMOVED"
        }

    def _room(self) -> bool:
        """Whether the cluster has room for the fewest workers: of an elastic run no place is asked for before
        it has."""
        import ray

        free = ray.available_resources()
        return all(
            free.get(name, 0.0) >= self._config.fewest_workers * amount
            for name, amount in _resources(self._config).items()
        )

    def _what_is_missing(self) -> str:
        import ray

        workers, asked, free = (
            self._config.fewest_workers,
            _resources(self._config),
            ray.available_resources(),
        )
        return (
            f"the run has waited {_SAY_PENDING_S:.0f} s for a place: it needs {workers}"
            f" worker{'s' * (workers > 1)} with {_amounts(asked, asked)}{' each' * (workers > 1)},"
            f" and Ray has {_amounts(free, asked)} free: end other jobs, add nodes, or lower --workers,"
            " --cpus-per-worker or --gpus-per-worker"
        )


class _Interrupted:
    """Which of SIGINT and SIGTERM came inside the block."""

    number: int | None = None

    def __enter__(self) -> "_Interrupted":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.number = self.number or number


def _cause(error: BaseException) -> BaseException:
    """The first worker's own error, which says what is wrong; Ray's wrapper around it otherwise."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError):
        return _cause(error.controller_failure)
    return next(iter(error.worker_failures.values()), error) if isinstance(error, WorkerGroupError) else error
