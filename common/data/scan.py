"""The samples of a WebDataset tar, whoever packed it."""

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.facts import VideoFacts
from salt_distill.common.data.making.lists import CLASS
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.sample import Sample, describe, is_sidecar, sha256_of
from salt_distill.common.data.stills import IMAGE_SUFFIXES, padded_size
from salt_distill.common.data.video import VIDEO_SUFFIXES, probe

_FRAME = re.compile(r"\.\d+(" + "|".join(sorted(IMAGE_SUFFIXES)).replace(".", r"\.") + ")")
"""What follows a sample's stem in the name of a frame."""


def scan(tar: Path, source: str, skipped: list[tuple[str, str]], pool: DecodePool) -> list[Sample]:
    """The samples of one tar; those that cannot be used go to ``skipped``. Members belong together up to the
    first dot of their base name, as in WebDataset."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    samples: list[tuple[str, tuple[int, int], Callable[[], dict[str, Any]]]] = []
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, _, suffix = path.name.partition(".")
            if member.isfile() and stem:
                groups.setdefault(str(path.with_name(stem)), {})["." + suffix.lower()] = member
        for stem, members in groups.items():
            try:
                place = _place_of(members)
                if place is not None:
                    samples.append(
                        (
                            stem,
                            place,
                            _facts(archive, members, place, f"{source}/{tar.stem}/{stem}", source, pool),
                        )
                    )
            except BadVideoError as error:
                skipped.append((f"{tar.name}/{stem}", str(error)))
    found = []
    for stem, (offset, size), facts in samples:
        try:
            found.append(Sample(**facts(), tar=tar.name, offset=offset, size=size))
        except BadVideoError as error:
            skipped.append((f"{tar.name}/{stem}", str(error)))
    return found


def _place_of(members: dict[str, tarfile.TarInfo]) -> tuple[int, int] | None:
    """(offset, size) of a sample's encoded bytes in the tar; None where no member is a video or an image."""
    suffixes = [suffix for suffix in members if suffix in VIDEO_SUFFIXES] or [
        suffix for suffix in members if suffix in IMAGE_SUFFIXES
    ]
    if suffixes:
        return members[suffixes[0]].offset_data, members[suffixes[0]].size
    frames = [member for suffix, member in members.items() if _FRAME.fullmatch(suffix)]
    if frames:
        start = frames[0].offset
        for frame in frames:
            if frame.offset != start:
                raise BadVideoError(f"its frame {frame.name} does not follow the frame before it in the tar")
            start = frame.offset_data + padded_size(frame.size)
        return frames[0].offset, start - frames[0].offset
    named = next(
        (suffix for suffix in members if PurePosixPath(suffix).suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES),
        None,
    )
    if named is not None:
        raise BadVideoError(f"its video ends in {named}, expected one dot in the name, as in 000001.mp4")
    return None


def _facts(
    archive: tarfile.TarFile,
    members: dict[str, tarfile.TarInfo],
    place: tuple[int, int],
    key: str,
    source: str,
    pool: DecodePool,
) -> Callable[[], dict[str, Any]]:
    """What gives a sample's sidecar: its own if it is one of ours, else it is being probed, under ``key``:
    others count anew in every tar."""
    if ".json" in members:
        try:
            facts = json.loads(_read(archive, members[".json"]))
        except ValueError as error:
            raise BadVideoError(f"its .json is not JSON ({error})") from error
        if is_sidecar(facts):
            return lambda: {"seekable": None, **facts}
    if not members.keys() & (VIDEO_SUFFIXES | IMAGE_SUFFIXES):
        raise BadVideoError(
            "it is numbered images whose rate no sidecar states, expected what `salt-data pack --images"
            " frames` writes"
        )
    labels = {}
    if ".cls" in members:
        label = _read(archive, members[".cls"]).strip()
        if not label.isdigit():
            raise BadVideoError(f"its .cls holds {label[:40]!r}, expected the number of its class")
        labels[CLASS] = int(label)
    probed = pool.submit((str(archive.name), *place))

    def described() -> dict[str, Any]:
        sha256, video_facts = probed.result()
        return describe(key, sha256, video_facts, labels=labels, split="train", source=source)

    return described


def probe_place(place: tuple[str, int, int]) -> tuple[str, VideoFacts]:
    """sha256 and facts of the encoded bytes at (file, offset, size). Runs in worker processes."""
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    return sha256_of(data), probe(data)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()
