"""``salt-serve precompute``: a frozen teacher's targets on disk, a file for each view of each shard."""

import fcntl
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.markup
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.config import PrecomputeConfig
from common.data.facts import BadVideoError
from common.data.files import absolute
from common.data.reader import Reader
from common.data.sample import Sample
from common.data.tasks import Clip
from common.local_ray import is_private, ray_to_join
from common.model.checkpoint import open_encoder
from common.model.teacher import Teacher
from common.targets import codec, store
from common.targets.codec import CorruptTargetError
from common.targets.store import CacheFile, CacheRow, CacheSpec
from teacher_server.placement import SAY_PENDING_S, check_fits, what_is_missing

PLAIN_LINES = 10
"""Lines of a whole command where there is no terminal to draw a bar on."""


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One file to come."""

    view: int
    shard_idx: int
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class FileDone:
    """One file that is there, whole."""

    name: str
    """Relative to the cache."""
    num_rows: int
    num_samples: int
    skipped: dict[str, str]
    """Samples that do not decode, with the reason where this command met it."""
    remark: str | None
    """What people should know: the file was damaged, and made anew."""


class Worker:
    """A teacher and a reader that make files of the cache. Each file is a pure function of the configuration."""

    def __init__(self, config: PrecomputeConfig, device: torch.device | None) -> None:
        self._root, self._batch_size, self._views = Path(config.out), config.teacher.batch_size, config.views
        encoder = open_encoder(config)
        view = config.view.over(encoder.view)
        self._teacher = Teacher(encoder, config.teacher, device)
        self._reader = Reader(
            config.data, data_seed=config.data_seed, views=config.views, view=view, split=config.split, loader=config.loader
        )
        self._max_bad_fraction = config.loader.max_bad_fraction
        self._spec = CacheSpec(
            teacher=self._teacher.spec.to_json(),
            target_dtype=config.target_dtype,
            shape=(self._teacher.spec.num_tokens, self._teacher.spec.width),
            data_seed=config.data_seed,
            views=config.views,
            view=view.model_dump(mode="json"),
            decoder=self._reader.decoder,
            index_hash=self._reader.index_hash,
            split=config.split,
        )

    def spec(self) -> CacheSpec:
        """What all files have in common."""
        return self._spec

    def tasks(self) -> list[FileTask]:
        """The files of the cache: all views of a shard follow each other, so that a frame cache serves them."""
        return [
            FileTask(view=view, shard_idx=shard_idx, num_samples=len(samples))
            for shard_idx, samples in enumerate(self._reader.samples)
            for view in range(self._views)
            if len(samples)
        ]

    def make(self, task: FileTask) -> FileDone:
        """Makes a file, unless it is there and undamaged. Raises ValueError where it is another command's."""
        samples = self._reader.samples[task.shard_idx]
        name = store.file_path(self._spec, task.view, self._reader.dataset.shards[task.shard_idx])
        remark, skipped = None, dict[str, str]()
        if (self._root / name).exists():
            file = CacheFile(self._root / name, self._spec)
            try:
                keys = file.verify(self._spec)
            except CorruptTargetError as error:
                remark = f"{error}; the file is made anew"
            else:
                skipped = {sample.key: "left out before" for sample in samples if sample.key not in keys}
                return FileDone(name=name, num_rows=len(file), num_samples=len(samples), skipped=skipped, remark=None)
        num_rows = store.write_file(self._root / name, self._spec, self._rows(samples, task.view, skipped))
        return FileDone(name=name, num_rows=num_rows, num_samples=len(samples), skipped=skipped, remark=remark)

    def _rows(self, samples: Sequence[Sample], view: int, skipped: dict[str, str]) -> Iterator[CacheRow]:
        for group in self._groups(samples, view):
            skipped.update({sample.key: str(clip) for sample, clip in group if isinstance(clip, BadVideoError)})
            if len(skipped) > self._max_bad_fraction * max(len(samples), 100):
                key, reason = next(iter(skipped.items()))
                raise ValueError(
                    f"got {len(skipped)} videos that do not decode in a shard of {len(samples)}, expected at most "
                    f"loader.max_bad_fraction={self._max_bad_fraction:g} of them; the first is {key}: {reason}"
                )
            good = [(sample, *clip) for sample, clip in group if not isinstance(clip, BadVideoError)]
            if good:
                targets = self._teacher.forward(np.stack([pixels for _, pixels, _ in good]))
                for (sample, _, digest), encoded in zip(good, codec.encode(targets, self._spec.target_dtype), strict=True):
                    yield CacheRow(clip_digest=digest, key=sample.key, view=view, encoded=encoded)

    def _groups(self, samples: Sequence[Sample], view: int) -> Iterator[list[tuple[Sample, Clip | BadVideoError]]]:
        """The clips of each forward; those of the next one are decoded meanwhile."""
        ahead: deque[list[tuple[Sample, Future[Clip]]]] = deque()
        for first in range(0, len(samples), self._batch_size):
            group = [samples[number] for number in range(first, min(first + self._batch_size, len(samples)))]
            ahead.append([(sample, self._reader.submit(sample, view)) for sample in group])
            if len(ahead) == 2:
                yield [(sample, _clip(clip)) for sample, clip in ahead.popleft()]
        while ahead:
            yield [(sample, _clip(clip)) for sample, clip in ahead.popleft()]


def _clip(clip: Future[Clip]) -> Clip | BadVideoError:
    try:
        return clip.result()
    except BadVideoError as error:
        return error


def precompute(config: PrecomputeConfig, console: rich.console.Console) -> None:
    """Writes the cache. A command that was killed goes on after its last whole file when it is repeated."""
    paths = {name: absolute(getattr(config, name)) for name in ("data", "out")}
    config = config.absolute().model_copy(update=paths)  # a worker may have another working directory
    with _only_writer(Path(config.out)):
        if config.workers == 0:
            worker = Worker(config, device=None)
            tasks = worker.tasks()
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
    _check_manifest(root, spec)
    files, skipped = dict[str, int](), dict[str, str]()
    total = sum(task.num_samples for task in tasks)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("targets", total=total, rate="")
        finished, printed = 0, 0
        for file in done:
            files[file.name] = file.num_rows
            for key, reason in file.skipped.items():
                if key not in skipped:
                    console.print(f"left out {rich.markup.escape(key)}: {rich.markup.escape(reason)}", highlight=False)
                    skipped[key] = reason
            if file.remark is not None:
                console.print(rich.markup.escape(file.remark), highlight=False)
            finished += file.num_samples
            speed = progress.tasks[0].speed
            progress.update(bar, completed=finished, rate="" if speed is None else f"{speed:.0f} clips/s")
            if not console.is_terminal and (finished - printed >= total / PLAIN_LINES or finished == total):
                printed = finished
                console.print(f"targets: {finished}/{total} clips", highlight=False)
    store.write_manifest(root, spec, files, skipped)
    console.print(f"{config.out}: {sum(files.values())} targets of teacher {spec.fingerprint[:12]} in {len(files)} files", highlight=False)


def _check_manifest(root: Path, spec: CacheSpec) -> None:
    """Raises ValueError where the folder holds a finished cache of another kind."""
    path = root / store.MANIFEST
    if not path.is_file():
        return
    found = json.loads(path.read_text())
    for name, value in spec.to_json().items():
        if found.get(name) != value:
            raise ValueError(f"{path}: got a cache with {name}={found.get(name)}, expected {value}: precompute into an empty folder")


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    """Raises ValueError where another command writes the same cache."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{root}: another `salt-serve precompute` writes this cache: wait for it, or give another --out") from error
        yield
    finally:
        os.close(descriptor)
