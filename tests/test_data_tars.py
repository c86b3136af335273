"""Tars that others packed, of the kinds that are reported: every member that could be a video is a sample, or
is named with its reason."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pack_tools import VIDEO, encoded_image, grey_video, packed, samples_of, skipped, write

from salt_distill.common.data.sample import SIDECAR_FIELDS
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.skipped import read_skipped


def tar_of(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A text is what a link points to."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def keys(data: Path) -> set[str]:
    return {key.rpartition("/")[2] for key in samples_of(data)}


def test_every_member_that_could_be_a_video_is_a_sample_or_named(tmp_path):
    theirs = tmp_path / "theirs"
    members: list[tuple[str, bytes | str]] = [
        ("good.mp4", VIDEO),
        ("good.webm", VIDEO),
        ("good.jpg", encoded_image_of_noise()),
        ("good.txt", b"what is seen"),
        ("./good.mp4", VIDEO),
        ("trip.1.mp4", VIDEO),
        ("trip.2.mp4", VIDEO),
        ("odd.video", VIDEO),
        ("blob.bin", VIDEO),
        ("link.mp4", "good.mp4"),
        ("._good.mp4", b"what macOS writes"),
        (b"latin-\xe4.mp4".decode("utf-8", "surrogateescape"), VIDEO),
        ("one.mp4", grey_video(10)),
        ("small.mp4", grey_video(10, 20, size=(4, 4))),
        ("named.mp4", encoded_image_of_noise()),
        ("other.m2ts", VIDEO),
    ]
    tar_of(theirs / "a.tar", members)
    write(theirs / "b.tar.gz", b"\x1f\x8b")
    assert keys(theirs) == {"good", "other"}
    reasons = read_skipped(theirs)
    assert len(reasons) == len(members) - 3 + 1  # two samples and a text; a compressed tar
    assert {reason.partition(",")[0].partition(":")[0] for _, reason in reasons} >= {
        "its sample has a video before it",
        "the tar has a member of this name before it",
        "its video ends in .1.mp4",
        "left out",
        "it is a link to good.mp4",
        "its name is not UTF-8",
        "it has 1 frame",
        "it has 4x4 pixels",
        "it is an image",
        "it is compressed",
    }


def encoded_image_of_noise() -> bytes:
    return encoded_image(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_an_index_follows_its_tars(tmp_path):
    theirs = tmp_path / "theirs"
    tar_of(theirs / "a.tar", [("a.mp4", VIDEO)])
    assert keys(theirs) == {"a"}
    tar_of(theirs / "b.tar", [("b.mp4", VIDEO)])
    assert keys(theirs) == {"a", "b"}
    tar_of(theirs / "a.tar", [("other.mp4", grey_video(1, 2, 3))])
    before = (theirs / "dataset.json").read_bytes()
    assert keys(theirs) == {"other", "b"}
    assert (theirs / "dataset.json").read_bytes() != before
    (theirs / "b.tar").unlink()
    assert keys(theirs) == {"other"}


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_tar_that_ends_at_a_header_is_named(tmp_path, damage):
    tar = tar_of(tmp_path / "theirs" / "a.tar", [("a.mp4", VIDEO), ("b.mp4", VIDEO)])
    with tarfile.open(tar) as archive:
        second = archive.getmembers()[1].offset
    data = bytearray(tar.read_bytes())
    if damage == "cut":
        data = data[: second + 100]
    else:
        data[second + 3] ^= 1
    tar.write_bytes(data)
    assert keys(tmp_path / "theirs") == {"a"}
    assert f"no whole header at byte {second}" in skipped(tmp_path / "theirs")["a.tar"]


def test_classes_by_name_and_by_number(tmp_path):
    words = [("0.mp4", VIDEO), ("0.cls", b"dog"), ("1.mp4", VIDEO), ("1.cls", b"\xef\xbb\xbfcat\n")]
    words.append(("2.mp4", VIDEO))
    tar_of(tmp_path / "words" / "a.tar", words)
    tar_of(tmp_path / "words" / "b.tar", [("3.mp4", VIDEO), ("3.cls", b"ant")])
    dataset = open_dataset(tmp_path / "words")
    assert dataset.class_names == {"class": ["ant", "cat", "dog"]}
    labels = {key[-1]: sample.labels for key, sample in samples_of(tmp_path / "words").items()}
    assert labels == {"0": {"class": 2}, "1": {"class": 1}, "2": {}, "3": {"class": 0}}
    for place, content in enumerate([b"1.0", b"3000000000000", b"-1", b"9" * 30, b"", b"x" * 2000]):
        tar_of(tmp_path / "numbers" / f"{place}.tar", [("0.mp4", VIDEO), ("0.cls", content)])
    assert [sample.labels for sample in samples_of(tmp_path / "numbers").values()] == [{"class": 1}]
    assert len(read_skipped(tmp_path / "numbers")) == 5


def test_a_bad_sidecar_costs_its_sample_alone(tmp_path):
    write(tmp_path / "v" / "a.mp4")
    packed(tmp_path / "v", tmp_path / "ours")
    (sample,) = samples_of(tmp_path / "ours").values()
    facts = {name: getattr(sample, name) for name in SIDECAR_FIELDS}
    older = {name: value for name, value in facts.items() if name != "seekable"}
    sidecars = {
        "good": json.dumps(facts),
        "older": json.dumps(older | {"key": "v/older"}),
        "again": json.dumps(facts),
        "deep": "[" * 100_000,
        "label": json.dumps(facts | {"key": "v/label", "labels": {"class": 10**9}}),
        "count": json.dumps(facts | {"key": "v/count", "num_frames": "many"}),
        "size": json.dumps(facts | {"key": "v/size", "width": 2**80}),
    }
    members = [(f"{name}.mp4", VIDEO) for name in sidecars]
    members += [(f"{name}.json", text.encode()) for name, text in sidecars.items()]
    tar_of(tmp_path / "theirs" / "a.tar", members)  # type: ignore[arg-type]
    assert set(samples_of(tmp_path / "theirs")) == {"v/a.mp4", "v/older"}
    assert samples_of(tmp_path / "theirs")["v/older"].seekable is None
    assert len(read_skipped(tmp_path / "theirs")) == 5


def test_compressed_tars_alone_are_an_error_of_their_own(tmp_path):
    write(tmp_path / "theirs" / "a.tar.gz", b"\x1f\x8b")
    with pytest.raises(ValueError, match="got compressed tars only"):
        open_dataset(tmp_path / "theirs")
