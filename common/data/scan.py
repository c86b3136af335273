"""The samples of a WebDataset tar, whoever packed it."""

import json
import posixpath
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.sample import (
    CLASS,
    MAX_CLASSES,
    Sample,
    is_sidecar,
    require_sidecar,
    sha256_of,
    sidecar_of,
)
from salt_distill.common.data.skipped import printable
from salt_distill.common.data.stills import IMAGE_SUFFIXES, padded_size, stills_in
from salt_distill.common.data.usable import require_usable
from salt_distill.common.data.video import VIDEO_SUFFIXES, probe
from salt_distill.common.data.video_facts import VideoFacts

_BESIDE_A_VIDEO = frozenset([
    ".json", ".cls", ".cls2", ".index", ".inx", ".id", ".txt", ".text", ".transcript", ".caption", ".srt",
    ".vtt", ".ass", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".html", ".md", ".npy", ".npz", ".pt",
    ".pth", ".pyd", ".pkl", ".pickle", ".ten", ".tb", ".mp", ".msg", ".safetensors", ".h5", ".hdf5",
    ".parquet", ".arrow", ".wav", ".mp3", ".flac", ".m4a", ".aac", ".opus", ".log", ".sha256", ".md5", ".url",
    ".info",
])  # fmt: skip
"""Names of what stands beside the video of a sample. A member with any other name may be a video."""
_FRAME = re.compile(r"\.\d+(" + "|".join(sorted(IMAGE_SUFFIXES)).replace(".", r"\.") + ")")
"""What follows a sample's stem in the name of a frame."""
_NUMBER = re.compile(r"([+-]?[0-9]+)(\.0*)?")
_MAX_JSON_BYTES, _MAX_CLS_BYTES = 10_000_000, 1000

Members = dict[str, tarfile.TarInfo]
"""Those of one sample, by what follows the stem in their names, in lower case."""
Skipped = list[tuple[str, str]]
"""(path, reason) of what is in no sample."""


@dataclass(frozen=True)
class Scanned:
    """A sample, and the name of its class where its ``.cls`` holds that in place of a number."""

    sample: Sample
    class_name: str | None


def scan(tar: Path, source: str, skipped: Skipped, pool: DecodePool) -> list[Scanned]:
    """The samples of one tar. Members belong together up to the first dot of their base name, as in
    WebDataset; each that could be a video is in a sample or in ``skipped``."""
    pending: list[tuple[str, Callable[[], Scanned]]] = []
    with tarfile.open(tar, "r:") as archive:
        for stem, members in _groups(archive, tar.name, skipped).items():
            chosen: list[str] = []
            try:
                chosen = _chosen(members)
                if chosen:
                    key = f"{source}/{tar.stem}/{stem}"
                    pending.append((stem, _described(archive, members, chosen, key, source, pool)))
            except BadVideoError as error:
                skipped.append((f"{tar.name}/{stem}", str(error)))
            for suffix in members.keys() - set(chosen):
                if chosen and _may_be_a_video(suffix):
                    reason = f"its sample has a video before it, {stem}{chosen[0]}"
                    skipped.append((f"{tar.name}/{members[suffix].name}", reason))
    scanned = []
    for stem, described in pending:
        try:
            scanned.append(described())
        except BadVideoError as error:
            skipped.append((f"{tar.name}/{stem}", str(error)))
    return scanned


def _groups(archive: tarfile.TarFile, tar: str, skipped: Skipped) -> dict[str, Members]:
    """The members of each sample, by their stem; of members of one name the first one."""
    groups: dict[str, Members] = {}
    for member in archive:
        if member.isdir():
            continue
        path = PurePosixPath(posixpath.normpath(member.name))
        stem, dot, suffix = path.name.partition(".")
        suffix = (dot + suffix).lower()
        members = groups.setdefault(str(path.with_name(stem)), {}) if stem else {}
        reason = _refusal(member, path.name, suffix)
        if (
            reason is None
            and _may_be_a_video(suffix)
            and suffix.count(".") > 1
            and not _FRAME.fullmatch(suffix)
        ):
            reason = f"its video ends in {suffix}, expected one dot in the name, as in 000001.mp4"
            skipped.append((f"{tar}/{path.with_name(stem)}", reason))
            continue
        if reason is None and suffix in members:
            reason = "the tar has a member of this name before it"
        if reason is None:
            members[suffix] = member
        elif _may_be_a_video(suffix):
            skipped.append((f"{tar}/{printable(member.name)}", reason))
    reason = _cut(archive)
    if reason is not None:
        skipped.append((tar, reason))
    return groups


def _may_be_a_video(suffix: str) -> bool:
    return PurePosixPath("x" + suffix).suffix not in _BESIDE_A_VIDEO


def _refusal(member: tarfile.TarInfo, name: str, suffix: str) -> str | None:
    """Why a member is in no sample, whatever it holds."""
    last = PurePosixPath("x" + suffix).suffix
    if member.issym() or member.islnk():
        return f"it is a link to {printable(member.linkname)}, expected a file"
    if not member.isreg():
        return "it is no regular file"
    if printable(member.name) != member.name:
        return "its name is not UTF-8"
    if name.startswith("."):
        return "its name begins with a dot"
    if _may_be_a_video(suffix) and last not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return f"left out: its name ends in {last or 'no suffix'}, which is not known as that of a video"
    return None


def _cut(archive: tarfile.TarFile) -> str | None:
    """What is wrong with the end of a tar whose members were walked through: tarfile stops without a word at
    a header that is cut or damaged."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and not any(block):
        return None
    return (
        f"it has no whole header at byte {archive.offset}, and not the mark of a tar's end either: it was cut"
        " or damaged there, and what may have come after is lost"
    )


def _chosen(members: Members) -> list[str]:
    """The suffixes of the members that are the sample's video, or the frames of it; none where no member
    is."""
    videos = [suffix for suffix in members if suffix in VIDEO_SUFFIXES]
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if videos or images:
        return (videos or images)[:1]
    frames = [suffix for suffix in members if _FRAME.fullmatch(suffix)]
    start = members[frames[0]].offset if frames else 0
    for suffix in frames:
        frame = members[suffix]
        if frame.offset != start:
            raise BadVideoError(f"its frame {frame.name} does not follow the frame before it in the tar")
        start = frame.offset_data + padded_size(frame.size)
    return frames


def _described(
    archive: tarfile.TarFile, members: Members, chosen: list[str], key: str, source: str, pool: DecodePool
) -> Callable[[], Scanned]:
    """What gives a sample: its sidecar if it is one of ours, else it is being probed, under ``key``: others
    count anew in every tar."""
    first, last = members[chosen[0]], members[chosen[-1]]
    is_run = _FRAME.fullmatch(chosen[0]) is not None
    offset = first.offset if is_run else first.offset_data
    size = last.offset_data + (padded_size(last.size) if is_run else last.size) - offset
    tar = Path(str(archive.name)).name
    if ".json" in members:
        facts = _json(archive, members[".json"])
        if is_sidecar(facts):
            sample = Sample(**vars(require_sidecar(facts)), tar=tar, offset=offset, size=size)
            return lambda: Scanned(sample, None)
    if is_run:
        raise BadVideoError(
            "it is numbered images whose rate no sidecar states, expected what `salt-data pack --images"
            " frames` writes"
        )
    class_of = _class(_read(archive, members[".cls"], _MAX_CLS_BYTES)) if ".cls" in members else None
    labels = {CLASS: class_of} if isinstance(class_of, int) else {}
    probed = pool.submit((str(archive.name), offset, size, chosen[0]))

    def scanned() -> Scanned:
        sha256, facts = probed.result()
        sidecar = sidecar_of(key, sha256, facts, labels=labels, split="train", source=source)
        sample = Sample(**vars(sidecar), tar=tar, offset=offset, size=size)
        return Scanned(sample, class_of if isinstance(class_of, str) else None)

    return scanned


def probe_place(place: tuple[str, int, int, str]) -> tuple[str, VideoFacts]:
    """sha256 and facts of the encoded bytes at (file, offset, size), whose name ends in this suffix.
    BadVideoError where they are nothing for a data set. Runs in worker processes."""
    path, offset, size, suffix = place
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    facts = probe(data)
    require_usable(facts, suffix, is_image=stills_in(data) is not None)
    return sha256_of(data), facts


def _class(content: bytes) -> int | str:
    """The number or the name in a ``.cls``."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    number = _NUMBER.fullmatch(text)
    if number and 0 <= int(number[1]) < MAX_CLASSES:
        return int(number[1])
    if number or not text or not text.isprintable():
        raise BadVideoError(
            f"its .cls holds {content[:40]!r}, expected the name of its class, or its number below"
            f" {MAX_CLASSES:,}"
        )
    return text


def _json(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    content = _read(archive, member, _MAX_JSON_BYTES)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadVideoError(f"its .json is not JSON that can be read ({error})") from error


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    if member.size > max_bytes:
        raise BadVideoError(f"its {member.name} has {member.size:,} bytes, expected at most {max_bytes:,}")
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()
