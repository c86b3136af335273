"""The start of a run of `salt-train teacher`, `student` or `vjepa`, in this process or in workers of Ray."""

from pathlib import Path

from salt_distill.common.config import TrainConfig
from salt_distill.common.console import console, say
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.devices import device_here, require_device, resources_here
from salt_distill.common.local_ray import is_private
from salt_distill.common.model.checkpoint import POINTER
from salt_distill.student_trainer import dry_run, estimate
from salt_distill.student_trainer.data_wait import DataWait
from salt_distill.student_trainer.job import run_job
from salt_distill.student_trainer.loop import Worker, train_on
from salt_distill.student_trainer.opening import opened
from salt_distill.student_trainer.progress import show_progress
from salt_distill.student_trainer.run_directory import (
    check_run,
    claimed,
    no_trace_of_a_failed_start,
    says_how_to_go_on,
)


def start(config: TrainConfig) -> None:
    """Trains to the last step. With ``estimate`` says what that would take, with ``dry_run`` tries it."""
    if config.estimate:
        estimate.run(config)
        return
    if not config.most_workers or is_private(config.address):
        require_device(config, resources_here())  # of another Ray it is known when it is joined
    if config.dry_run:
        dry_run.run(config)
        return
    check_run(config)
    if config.most_workers and is_private(config.address):
        open_dataset(config.data).samples(config.split)  # before a Ray starts, which takes seconds
    pointer = Path(config.out) / POINTER
    with (
        no_trace_of_a_failed_start(config),
        show_progress(Path(config.out), config.steps, console, DataWait(config).sentence),
    ):
        if config.workers == 0:
            worker = Worker(rank=0, world_size=1, device=device_here(config))
            with (
                says_how_to_go_on(config),
                opened(config, worker) as (reader, sources),
                claimed(config) as checkpoint,
            ):
                train_on(reader, sources, config, worker, checkpoint)
        else:
            run_job(config)
    # With a storage, the first worker may have had its run directory on another machine.
    if pointer.exists():
        say(f"{config.out}: done, the newest checkpoint is {pointer.read_text().strip()}")
    else:
        say(f"{config.storage}: done")
