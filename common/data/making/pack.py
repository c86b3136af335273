"""Videos -> WebDataset shards with an index (DESIGN section 4, Shards)."""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PackConfig
from salt_distill.common.console import console
from salt_distill.common.data.index import write_index
from salt_distill.common.data.making.partial import Finished, PartialFolder
from salt_distill.common.data.making.prepare import Prepared, prepare_all
from salt_distill.common.data.making.sources import Listing, UnpackedVideo, list_sources
from salt_distill.common.data.sample import sidecar_of
from salt_distill.common.data.skipped import FILE_NAME, printable, write_skipped
from salt_distill.common.data.stills import padded_size
from salt_distill.common.whole import named_errors

_OURS = {"index.parquet", "dataset.json", FILE_NAME}
"""What a packed folder holds beside its tars."""


def pack(config: PackConfig, console: rich.console.Console = console) -> None:
    """Writes the shards, then the index; bad files are named in ``skipped.csv``. Continues what a killed run
    of the same command left.

    Raises ValueError where nothing can be read, more than ``max_bad_fraction`` is bad, OUT holds something
    else, or another run writes it.
    """
    out = Path(config.out)
    _require_ours(out)
    listing = list_sources(config)
    if listing.num_left_out:
        _say(
            console,
            f"left out {listing.num_left_out} files that are not videos by their names, such as"
            f" {listing.left_out}",
        )
    if listing.unread_lists:
        _say(
            console,
            f"the labels of {listing.unread_lists[0]} are not read, since it lies in a subfolder: give its"
            f" folder as SRC, or put a labels.csv with paths from {config.src} in {config.src}",
        )

    def stamp(first: int, end: int) -> str:
        return _stamp(listing.sources[first:end])

    with named_errors(out), PartialFolder(out, _plan(config, listing), stamp) as partial:
        if partial.num_discarded:
            _say(
                console,
                f"starts over {partial.num_discarded} shards of an earlier run: files or options have changed"
                " since",
            )
        if partial.finished:
            _say(console, f"continues after {len(partial.finished)} finished shards of an earlier run")
        skipped = _write_shards(config, listing, partial, console)
        write_skipped(partial.folder, skipped)
        write_index(partial.folder, name=listing.name, kind="packed", class_names=listing.class_names)
        partial.swap_in()
    for path, reason in skipped:
        _say(console, f"skipped {path}: {reason}")
    info = json.loads((out / "dataset.json").read_text())
    splits = ", ".join(f"{count} {split}" for split, count in info["splits"].items())
    named = f", {len(skipped)} skipped (named in {out / FILE_NAME})" if skipped else ""
    _say(console, f"{out}: {info['num_samples']} videos ({splits}) in {info['num_shards']} shards{named}")


def _write_shards(
    config: PackConfig, listing: Listing, partial: PartialFolder, console: rich.console.Console
) -> list[tuple[str, str]]:
    """Writes what is not finished yet; gives back what was skipped."""
    shards = _Shards(config.max_shard_bytes, listing, partial)
    total, first = len(listing.sources), shards.next
    _check_bad(config, listing, shards.skipped)
    columns = (
        TextColumn("pack"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pack", total=total, completed=first, rate="")
        started, num_bytes, num_shards = time.monotonic(), 0, len(partial.finished)
        with contextlib.closing(
            prepare_all([source.path for source in listing.sources[first:]], config)
        ) as results:
            for prepared in results:
                shards.add(prepared)
                if isinstance(prepared, BadVideoError):
                    _check_bad(config, listing, shards.skipped)
                else:
                    num_bytes += prepared.num_bytes
                elapsed = time.monotonic() - started
                rate = f"{num_bytes / 1e6 / elapsed:.1f} MB/s"
                progress.update(task, advance=1, rate=rate)
                if (
                    len(partial.finished) > num_shards and not console.is_terminal
                ):  # a log gets a line per shard
                    num_shards = len(partial.finished)
                    seconds = elapsed * (total - shards.next) / (shards.next - first)
                    remaining = timedelta(seconds=round(seconds))
                    _say(
                        console,
                        f"{partial.finished[-1].shard} is finished: {shards.next} of {total} videos, {rate},"
                        f" {remaining} left",
                    )
    return shards.close()


class _Shards:
    """Tars of bounded size, the same bytes for the same sources."""

    def __init__(self, max_bytes: int, listing: Listing, partial: PartialFolder) -> None:
        self._max_bytes, self._listing, self._partial = max_bytes, listing, partial
        finished = partial.finished
        self.next = finished[-1].next if finished else 0
        """Position of the source that is added next."""
        self._num_good = finished[-1].num_good if finished else 0
        self._skipped: list[tuple[str, str]] = []
        self._tar: tarfile.TarFile | None = None

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of everything so far."""
        return [
            *self._listing.skipped,
            *(row for entry in self._partial.finished for row in entry.skipped),
            *self._skipped,
        ]

    def add(self, prepared: Prepared | BadVideoError) -> None:
        """Puts the next source into the tar, or among the skipped."""
        source, name = self._listing.sources[self.next], self._listing.name
        if isinstance(prepared, BadVideoError):
            self._skipped.append((printable(source.path), str(prepared)))
        else:
            key = f"{name}/{source.name}"
            sidecar = sidecar_of(
                key, prepared.sha256, prepared.facts, labels=source.labels, split=source.split, source=name
            )
            self._write([*prepared.members, (".json", sidecar.to_json())])
        self.next += 1

    def close(self) -> list[tuple[str, str]]:
        """Finishes the last tar; gives back what was skipped."""
        self._finish()
        return self.skipped

    def _write(self, members: list[tuple[str, bytes]]) -> None:
        size = sum(tarfile.BLOCKSIZE + padded_size(len(content)) for _, content in members)
        if self._tar is not None and self._tar.offset + size > self._max_bytes:
            self._finish()
        if self._tar is None:
            shard = f"{self._listing.name}-{len(self._partial.finished):06d}.tar"
            self._tar = tarfile.open(self._partial.folder / shard, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for suffix, content in members:
            # Numbered among the good ones: a bad file beside them changes no byte of a shard.
            info = tarfile.TarInfo(f"{self._num_good:08d}{suffix}")
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._num_good += 1

    def _finish(self) -> None:
        """Makes the tar, and the note of it, last; the source that is added next is the first of another
        one."""
        if self._tar is None:
            return
        self._tar.close()
        path = Path(str(self._tar.name))
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        first = self._partial.finished[-1].next if self._partial.finished else 0
        self._partial.add(
            Finished(
                shard=path.name,
                num_bytes=path.stat().st_size,
                next=self.next,
                num_good=self._num_good,
                stamp=_stamp(self._listing.sources[first : self.next]),
                skipped=self._skipped,
            )
        )
        self._tar, self._skipped = None, []


def _plan(config: PackConfig, listing: Listing) -> str:
    """Hash of all that decides the shards, but the content of the files."""
    options = config.model_dump(
        include={"max_shard_bytes", "max_video_bytes", "short_side", "copies", "fps", "timeout_s"}
    )
    hasher = hashlib.sha256(json.dumps([listing.name, options, listing.class_names]).encode())
    for source in listing.sources:
        hasher.update(json.dumps([str(source.path), source.name, source.labels, source.split]).encode())
    return hasher.hexdigest()


def _stamp(sources: Sequence[UnpackedVideo]) -> str:
    """Hash of sizes and times of change: whether files are still those that were packed."""
    hasher = hashlib.sha256()
    for source in sources:
        try:
            status = os.stat(source.path)
            hasher.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        except OSError:
            hasher.update(b"none;")
    return hasher.hexdigest()


def _require_ours(out: Path) -> None:
    """Only what this command wrote is ever replaced."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    others = sorted(name for name in names - _OURS if not re.fullmatch(r".+-\d{6}\.tar", name))
    if names and (
        others or not names >= _OURS or json.loads((out / "dataset.json").read_text())["kind"] != "packed"
    ):
        raise ValueError(
            f"got OUT {out}, which holds something else than shards of this command"
            f" ({', '.join(others or sorted(names))[:80]}), expected a new folder or one that this command"
            " wrote"
        )


def _check_bad(config: PackConfig, listing: Listing, skipped: list[tuple[str, str]]) -> None:
    num_videos = len(listing.sources) + len(listing.skipped)
    if len(skipped) > config.max_bad_fraction * num_videos or len(skipped) == num_videos:
        named = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {num_videos} videos cannot be read so far, expected at most a share of"
            f" --max-bad-fraction {config.max_bad_fraction:g} (the same command with another one goes on from"
            f" here): {named}"
        )


def _say(console: rich.console.Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
