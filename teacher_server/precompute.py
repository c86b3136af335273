"""``salt-serve precompute``: a frozen teacher's targets on disk, a file for each view of each shard."""

import datetime
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.markup
import torch
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.config import PrecomputeConfig
from common.data.files import absolute
from common.local_ray import is_private, ray_to_join
from common.targets import codec, store
from common.targets.codec import CorruptTargetError
from common.targets.locks import writer
from common.targets.store import CacheSpec
from teacher_server.placement import SAY_PENDING_S, check_fits, what_is_missing
from teacher_server.target_files import FileDone, FileTask, Worker

PLAIN_LINES = 10
"""Lines of a whole command where there is no terminal to draw a bar on."""
_ROW_BYTES = 200
"""Of a row in a file, beside its target."""


def precompute(config: PrecomputeConfig, console: rich.console.Console) -> None:
    """Writes the cache. A command that was killed goes on after its last whole file when it is repeated."""
    paths = {name: absolute(getattr(config, name)) for name in ("data", "out")}
    config = config.absolute().model_copy(update=paths)  # a worker may have another working directory
    with writer(Path(config.out), alone=True):
        if config.workers == 0:
            worker = Worker(config, device=None)
            tasks = worker.tasks()
            check_manifest(Path(config.out), worker.spec())
            _say_estimate(config, worker.spec(), tasks, worker.rate, console)
            _collect(config, worker.spec(), tasks, (worker.make(task) for task in tasks), console)
        else:
            _run_actors(config, console)


def _run_actors(config: PrecomputeConfig, console: rich.console.Console) -> None:
    """The same with Ray actors, each of which makes one file at a time."""
    with ray_to_join(config.address) as ray_arguments:
        import ray
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool

        ray.init(**ray_arguments)
        try:
            if is_private(config.address):
                check_fits(
                    ray.cluster_resources(),
                    cpus=config.workers * config.cpus_per_worker,
                    gpus=config.workers * config.gpus_per_worker,
                    flags="--workers, --cpus-per-worker and --gpus-per-worker",
                )
            actor_class = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker)(Worker)
            device = torch.device("cuda" if config.gpus_per_worker else "cpu")
            actors = [actor_class.remote(config, device) for _ in range(config.workers)]
            _, waiting = ray.wait([actor.spec.remote() for actor in actors], num_returns=len(actors), timeout=SAY_PENDING_S)
            missing = what_is_missing(ray.available_resources(), cpus=config.cpus_per_worker, gpus=config.gpus_per_worker)
            if waiting and missing is not None:
                console.print(f"{len(waiting)} of {len(actors)} workers wait for a place: {missing} free", highlight=False)
            spec, tasks = ray.get([actors[0].spec.remote(), actors[0].tasks.remote()])
            check_manifest(Path(config.out), spec)
            _say_estimate(config, spec, tasks, lambda: sum(ray.get([actor.rate.remote() for actor in actors])), console)
            done: Any = ActorPool(actors).map(lambda actor, task: actor.make.remote(task), tasks)
            _collect(config, spec, tasks, done, console)
        except RayTaskError as error:
            raise error.cause from error  # what went wrong there, as it would be said here
        finally:
            ray.shutdown()


def _collect(
    config: PrecomputeConfig, spec: CacheSpec, tasks: list[FileTask], done: Iterator[FileDone], console: rich.console.Console
) -> None:
    """Follows the files as they come, then writes the manifest."""
    root = Path(config.out)
    files, skipped = dict[str, int](), dict[str, str]()
    total = sum(task.num_samples for task in tasks)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("targets", total=total, rate="", size="")
        finished, printed, num_bytes = 0, 0, 0
        for file in done:
            files[file.name] = file.num_rows
            for key, reason in file.skipped.items():
                if key not in skipped:
                    console.print(f"left out {rich.markup.escape(key)}: {rich.markup.escape(reason)}", highlight=False)
                    skipped[key] = reason
            if file.remark is not None:
                console.print(rich.markup.escape(file.remark), highlight=False)
            finished += file.num_samples
            num_bytes += (root / file.name).stat().st_size
            speed = progress.tasks[0].speed
            progress.update(bar, completed=finished, rate="" if speed is None else f"{speed:.0f} clips/s", size=decimal(num_bytes))
            if not console.is_terminal and (finished - printed >= total / PLAIN_LINES or finished == total):
                printed = finished
                console.print(f"targets: {finished}/{total} clips, {decimal(num_bytes)}", highlight=False)
    store.write_manifest(root, spec, files, skipped)
    console.print(f"{config.out}: {sum(files.values())} targets of teacher {spec.fingerprint[:12]} in {len(files)} files", highlight=False)


def _say_estimate(
    config: PrecomputeConfig, spec: CacheSpec, tasks: Sequence[FileTask], measure: Callable[[], float], console: rich.console.Console
) -> None:
    """Says what is to come. Raises ValueError where the disk is too small for it.

    ``measure``: clips per second of the teachers alone; where decoding is slower than they are, it takes longer.
    """
    root = Path(config.out)
    missing = sum(task.num_samples for task in tasks if not (root / store.file_path(spec, task.view, task.shard)).exists())
    total = sum(task.num_samples for task in tasks)
    num_bytes = missing * (codec.num_bytes(spec.target_dtype, *spec.shape) + _ROW_BYTES)
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise ValueError(
            f"got {decimal(free)} free in {root}, expected {decimal(num_bytes)} for {missing} targets of {spec.shape[0]} tokens of width {spec.shape[1]} in "
            f"{spec.target_dtype}: free the disk, choose another --out, fewer --views, or --target-dtype int8"
        )
    if not missing:
        console.print(f"all {total} targets are there, and are checked", highlight=False)
        return
    clips_per_s = measure()
    duration = datetime.timedelta(seconds=round(missing / clips_per_s))
    there = f", {total - missing} more are there" if missing < total else ""
    console.print(
        f"{missing} targets to come{there}: {decimal(num_bytes)} of {decimal(free)} free, at least {duration} at {clips_per_s:.3g} clips/s",
        highlight=False,
    )


def check_manifest(root: Path, spec: CacheSpec) -> None:
    """Raises ValueError where the folder holds a finished cache of another kind."""
    if not (root / store.MANIFEST).is_file():
        return
    try:
        found = store.read_manifest(root)
    except CorruptTargetError:
        return  # the files say what they are, and it is written anew
    for name, value in spec.to_json().items():
        if found.get(name) != value:
            raise ValueError(f"{root}: got a cache with {name}={found.get(name)}, expected {value}: precompute into an empty folder")
