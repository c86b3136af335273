"""``salt-serve precompute``: a frozen teacher's targets on disk or in an object store, a file for each view
of each shard."""

import contextlib
import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.markup
import torch
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from salt_distill.common.config import PrecomputeConfig
from salt_distill.common.console import console
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.devices import device_here, gpus_of_worker
from salt_distill.common.folders.fetched import copies
from salt_distill.common.local_ray import is_private, join, leave, ray_to_join
from salt_distill.common.targets import codec
from salt_distill.common.targets.cache_file import file_path
from salt_distill.common.targets.codec import CorruptTargetError
from salt_distill.common.targets.manifest import MANIFEST, CacheSpec, FileListing, Manifest
from salt_distill.common.untouched import left_as_it_was
from salt_distill.teacher_server.cache.cache_folder import CacheFolder
from salt_distill.teacher_server.cache.target_files import FileDone, FileTask, TargetMaker
from salt_distill.teacher_server.ray_serve.placement import SAY_PENDING_S, check_fits, what_is_missing

PLAIN_LINES = 10
"""Lines of a whole command where there is no terminal to draw a bar on."""
_ROW_BYTES = 200
"""Of a row in a file, beside its target."""


def precompute(config: PrecomputeConfig, console: rich.console.Console = console) -> None:
    """Writes the cache. A command that was killed goes on after its last whole file when it is repeated."""
    config = config.absolute()  # a worker may have another working directory
    cache = CacheFolder(config.out)
    cache.require_own()
    if config.workers and is_private(config.address):
        open_dataset(config.data).samples(config.split)  # before a Ray starts, which takes seconds
    with _no_trace_of_a_failed_start(cache), cache.alone():
        if config.workers == 0:
            maker = TargetMaker(config, device_here(config))
            spec, tasks = maker.spec(), maker.tasks()
            listings = _listings(cache, spec, tasks)
            _say_estimate(cache, spec, tasks, maker.rate, lambda: [maker.room()], console)
            _collect(cache, spec, tasks, map(maker.make, tasks, listings), console)
        else:
            _run_actors(config, cache, console)


def _no_trace_of_a_failed_start(cache: CacheFolder) -> contextlib.AbstractContextManager[None]:
    """A block that makes files; where it ends with an error before one is whole, the folder is as before."""
    local = cache.local
    if local is None:
        return contextlib.nullcontext()
    return left_as_it_was(local, unless=lambda: any(local.rglob("*.arrow")) or (local / MANIFEST).exists())


def _run_actors(config: PrecomputeConfig, cache: CacheFolder, console: rich.console.Console) -> None:
    """The same with Ray actors, each of which makes one file at a time."""
    with ray_to_join(config.address) as ray_arguments:
        import ray
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool

        join(ray_arguments)
        try:
            resources = ray.cluster_resources()
            gpus = gpus_of_worker(config, resources)
            if is_private(config.address):
                check_fits(
                    resources,
                    cpus=config.workers * config.cpus_per_worker,
                    gpus=config.workers * gpus,
                    flags="--workers, --cpus-per-worker and --gpus-per-worker",
                )
            actor_class = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=gpus)(TargetMaker)
            device = torch.device("cuda" if gpus else "cpu")
            actors = [actor_class.remote(config, device) for _ in range(config.workers)]
            _, waiting = ray.wait(
                [actor.spec.remote() for actor in actors], num_returns=len(actors), timeout=SAY_PENDING_S
            )
            missing = what_is_missing(ray.available_resources(), cpus=config.cpus_per_worker, gpus=gpus)
            if waiting and missing is not None:
                console.print(
                    f"{len(waiting)} of {len(actors)} workers wait for a place: {missing} free",
                    highlight=False,
                )
            spec, tasks = ray.get([actors[0].spec.remote(), actors[0].tasks.remote()])
            listings = _listings(cache, spec, tasks)

            def rate() -> float:
                return sum(ray.get([actor.rate.remote() for actor in actors]))

            def rooms() -> list[tuple[str, int]]:
                return ray.get([actor.room.remote() for actor in actors])

            _say_estimate(cache, spec, tasks, rate, rooms, console)
            work = list(zip(tasks, listings, strict=True))
            done: Any = ActorPool(actors).map(lambda actor, arguments: actor.make.remote(*arguments), work)
            _collect(cache, spec, tasks, done, console)
        except RayTaskError as error:
            raise error.cause from error  # what went wrong there, as it would be said here
        finally:
            leave()


def _collect(
    cache: CacheFolder,
    spec: CacheSpec,
    tasks: list[FileTask],
    done: Iterator[FileDone],
    console: rich.console.Console,
) -> None:
    """Follows the files as they come, then writes the manifest."""
    files, skipped = dict[str, FileListing](), dict[str, str]()
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
            files[file.name] = file.listing
            for key, reason in file.skipped.items():
                if key not in skipped:
                    console.print(
                        f"left out {rich.markup.escape(key)}: {rich.markup.escape(reason)}", highlight=False
                    )
                    skipped[key] = reason
            if file.remark is not None:
                console.print(rich.markup.escape(file.remark), highlight=False)
            finished += file.num_samples
            num_bytes += file.num_bytes
            speed = progress.tasks[0].speed
            progress.update(
                bar,
                completed=finished,
                rate="" if speed is None else f"{speed:.0f} clips/s",
                size=decimal(num_bytes),
            )
            if not console.is_terminal and (finished - printed >= total / PLAIN_LINES or finished == total):
                printed = finished
                console.print(f"targets: {finished}/{total} clips, {decimal(num_bytes)}", highlight=False)
    with cache.at_hand(MANIFEST) as path:
        Manifest(spec=spec, files=files, skipped=tuple(skipped)).write(path.parent)
        cache.put(MANIFEST, path)
    num_rows = sum(listing.rows for listing in files.values())
    console.print(
        f"{cache.place}: {num_rows} targets of teacher {spec.fingerprint[:12]} in {len(files)} files",
        highlight=False,
    )


def _say_estimate(
    cache: CacheFolder,
    spec: CacheSpec,
    tasks: Sequence[FileTask],
    measure: Callable[[], float],
    rooms: Callable[[], list[tuple[str, int]]],
    console: rich.console.Console,
) -> None:
    """Says what is to come. Raises ValueError where a disk is too small for it.

    ``measure``: clips per second of the teachers alone; where decoding is slower than they are, it takes
    longer. ``rooms``: each worker's machine, and the free bytes there.
    """
    there = cache.sizes()
    to_come = [task.num_samples for task in tasks if file_path(spec, task.view, task.shard) not in there]
    missing, total = sum(to_come), sum(task.num_samples for task in tasks)
    if not missing:
        console.print(f"all {total} targets are there, and are checked", highlight=False)
        return
    row_bytes = codec.num_bytes(spec.target_dtype, *spec.shape) + _ROW_BYTES
    num_bytes = missing * row_bytes
    if cache.local is None:
        _check_rooms(cache, max(to_come) * row_bytes, rooms())
        room = f"to {cache.place}"
    else:
        free = cache.free_bytes()
        if num_bytes > free:
            raise ValueError(
                f"got {decimal(free)} free in {cache.place}, expected {decimal(num_bytes)} for {missing}"
                f" targets of {spec.shape[0]} tokens of width {spec.shape[1]} in {spec.target_dtype}: free"
                " the disk, choose another --out, fewer --views, or --target-dtype int8"
            )
        room = f"of {decimal(free)} free"
    clips_per_s = measure()
    duration = datetime.timedelta(seconds=round(missing / clips_per_s))
    more = f", {total - missing} more are there" if missing < total else ""
    console.print(
        f"{missing} targets to come{more}: {decimal(num_bytes)} {room}, at least {duration} at"
        f" {clips_per_s:.3g} clips/s",
        highlight=False,
    )


def _check_rooms(cache: CacheFolder, file_bytes: int, rooms: list[tuple[str, int]]) -> None:
    """Raises ValueError where a machine has no room for the files that its workers make, on their way to a
    store."""
    free = dict(rooms)
    for machine, num_workers in Counter(machine for machine, _ in rooms).items():
        if num_workers * file_bytes > free[machine]:
            raise ValueError(
                f"got {decimal(free[machine])} free on {machine} under {copies()}, expected"
                f" {decimal(num_workers * file_bytes)} for {num_workers} files at a time on their way to"
                f" {cache.place}: free the disk, set XDG_CACHE_HOME to a larger one, or give fewer --workers"
                " or --target-dtype int8"
            )


def _listings(cache: CacheFolder, spec: CacheSpec, tasks: Sequence[FileTask]) -> list[FileListing | None]:
    """What the manifest says of each file, where there is a whole one. Raises ValueError where it is of a
    finished cache of another kind."""
    unknown: list[FileListing | None] = [None] * len(tasks)
    if MANIFEST not in cache.sizes():
        return unknown
    try:
        manifest = cache.manifest()
    except CorruptTargetError:
        return unknown  # the files say what they are, and it is written anew
    if (difference := manifest.spec.difference(spec)) is not None:
        raise ValueError(f"{cache.place}: got a cache with {difference}: precompute into an empty folder")
    return [manifest.files.get(file_path(spec, task.view, task.shard)) for task in tasks]
