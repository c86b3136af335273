"""Packing: dirty folders, a decoder that crashes, kills, and two at once."""

import json
import os
import shutil
import signal
import socket
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from pack_tools import (
    VIDEO,
    contents,
    encoded_image,
    grey_video,
    packed,
    samples_of,
    skipped,
    start_pack,
    write,
)

import salt_distill.common.data.making.pack
from salt_distill.common.data.making.prepare import prepare_all

# --- dirty folders ---


def test_whatever_is_in_a_folder_costs_only_itself(tmp_path):
    src = tmp_path / "src"
    png = encoded_image(np.zeros((16, 16, 3), np.uint8))
    for name, data in {
        "good.mp4": VIDEO, "UPPER.MP4": VIDEO, "umlaut-ä 1.mp4": VIDEO, "empty.mp4": b"",
        'em\rp\tt\ny "\\.mp4': b"", "text.mp4": b"no video\n" * 99, "cut.mp4": VIDEO[:-400],
        "image.mp4": png, "video.png": VIDEO, "large.mp4": VIDEO + bytes(20_000), "one.mp4": grey_video(10),
        "tiny.mp4": grey_video(1, 2, size=(4, 4)),
        "clips.mp4/inside.mp4": VIDEO,
    }.items():  # fmt: skip
        write(src / name, data)
    (src / "folder.mp4").mkdir()
    (src / "dangling.mp4").symlink_to("nowhere.mp4")
    (src / "loop.mp4").symlink_to("loop.mp4")
    (src / "round").symlink_to("..")
    (src / "linked").symlink_to(write(tmp_path / "elsewhere" / "far.mp4").parent)
    os.mkfifo(src / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(src / "socket.mp4"))
    (src / "device.mp4").symlink_to("/dev/zero")
    Path(os.fsdecode(os.fsencode(src) + b"/latin-\xe4.mp4")).write_bytes(VIDEO)
    printed = packed(src, tmp_path / "out", images="each", max_bad_fraction=0.9, max_video_bytes=20_000)
    good = {"good.mp4", "UPPER.MP4", "umlaut-ä 1.mp4", "clips.mp4/inside.mp4", "linked/far.mp4"}
    assert set(samples_of(tmp_path / "out")) == {f"src/{name}" for name in good}
    reasons = skipped(tmp_path / "out")
    assert reasons == {
        "empty.mp4": "the file is empty",
        'em\rp\tt\ny "\\.mp4': "the file is empty",
        "text.mp4": "it is no video that FFmpeg can open (Invalid data found when processing input)",
        "cut.mp4": "it is no video that FFmpeg can open (End of file)",
        "image.mp4": "it is an image, although it is named as a video",
        "video.png": "it is no image, although it is named as one",
        "large.mp4": "it has more than the 20000 bytes that --max-video-bytes allows",
        "one.mp4": "it has 1 frame, expected at least 2",
        "tiny.mp4": "it has 4x4 pixels, expected at least 8x8",
        "folder.mp4": "it is a folder without images, expected a file or a folder of frames",
        "dangling.mp4": "No such file or directory",
        "loop.mp4": "Too many levels of symbolic links",
        "round": "it is a link to a folder that it lies in",
        "pipe.mp4": "it is a named pipe, expected a regular file",
        "socket.mp4": "it is a socket, expected a regular file",
        "device.mp4": "it is a device, expected a regular file",
        "latin-\\xe4.mp4": "its name is not UTF-8",
    }
    assert f"5 videos (5 train) in 1 shards, {len(reasons)} skipped" in printed
    assert all(f"{name}: {reason}" in printed for name, reason in reasons.items() if "\r" not in name)
    odd = 'em\rp\tt\ny "\\.mp4: the file is empty'  # a terminal has its own spaces
    assert "".join(odd.split()) in "".join(printed.split())
    with pytest.raises(
        ValueError,
        match=r"\d of 22 videos cannot be read so far, expected at most a share of --max-bad-fraction 0\.3 ",
    ):
        packed(src, tmp_path / "strict", images="each", max_bad_fraction=0.3, max_video_bytes=20_000)
    assert not (tmp_path / "strict").exists()


@pytest.mark.needs_data
def test_labels_one_folder_down_are_not_passed_over_in_silence(tmp_path):
    (tmp_path / "src" / "below").mkdir(parents=True)
    (tmp_path / "src" / "below" / "a.mp4").write_bytes(VIDEO)
    (tmp_path / "src" / "below" / "labels.csv").write_text("path,label\na.mp4,x\n")
    said = packed(tmp_path / "src", tmp_path / "out")
    assert f"the labels of {tmp_path}/src/below/labels.csv are not read, since it lies in a sub" in said


def test_every_bad_file_has_a_reason(shared_bad, tmp_path):
    packed(shared_bad, tmp_path / "out", max_bad_fraction=0.9)
    assert skipped(tmp_path / "out") == {
        "decord__corrupted.mp4": "decoding fails after 28 frames (Invalid data found when processing input)",
        "derived__truncated_bug_no_moov.mp4": (
            "it is no video that FFmpeg can open (Invalid data found when processing input)"
        ),
        "moviepy__bitmap.mp4": "it has 1x1 pixels, expected at least 8x8",
        "moviepy__result.webm": "the file is empty",
        "small__AudioVideoInterleave.avi": "no frame of its video stream can be decoded",
        "small__Mpeg4.mp4": "it has no video stream",
        "small__mp4-with-audio.mp4": "it has no video stream",
        "small__webm.webm": "it has 1 frame, expected at least 2",
    }
    assert {sample.num_frames for sample in samples_of(tmp_path / "out").values()} == {3, 25}  # odd, not bad


def child_processes() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


@pytest.mark.needs_data
def test_a_crash_of_the_decoder_costs_its_file(shared_videos, tmp_path, monkeypatch):
    first, second, third = sorted(
        (f"{letter}.mp4" for letter in "abc"), key=lambda name: sha256(name.encode()).digest()
    )
    for name in (first, third):
        write(tmp_path / "v" / name)
    write(
        tmp_path / "v" / second, (shared_videos / "intel__bottle-detection.mp4").read_bytes()
    )  # takes a second to decode
    before = child_processes()

    def struck(*arguments):
        """The real thing, and a signal to its process while it decodes the second file."""
        results = prepare_all(*arguments)
        yield next(results)
        (worker,) = child_processes() - before
        time.sleep(0.2)
        os.kill(worker, signal.SIGSEGV)
        yield from results

    monkeypatch.setattr(salt_distill.common.data.making.pack, "prepare_all", struck)
    packed(tmp_path / "v", tmp_path / "out")
    assert skipped(tmp_path / "out") == {second: "the decoder crashed (signal 11)"}
    assert set(samples_of(tmp_path / "out")) == {f"v/{first}", f"v/{third}"}


@pytest.mark.needs_data
def test_a_file_that_takes_too_long_costs_itself(shared_videos, tmp_path):
    write(tmp_path / "v" / "short.mp4")
    write(
        tmp_path / "v" / "long.mp4", (shared_videos / "intel__bottle-detection.mp4").read_bytes()
    )  # takes a second to decode
    packed(tmp_path / "v", tmp_path / "out", timeout_s=0.3)
    assert skipped(tmp_path / "out") == {"long.mp4": "the decoder did not answer within 0.3 s"}


# --- kills, and two at once ---


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Twelve videos and two bad files."""
    folder = tmp_path_factory.mktemp("many") / "many"
    for number in range(12):
        write(folder / f"{number}.mp4", grey_video(*[20 * number + t for t in range(12)], size=(32, 32)))
    for number in range(2):
        write(folder / f"bad-{number}.mp4", b"no video")
    return folder


SHARD_BYTES = 10_240


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted pack of ``many`` writes."""
    out = tmp_path_factory.mktemp("whole") / "many"
    packed(many, out, max_shard_bytes=SHARD_BYTES)
    assert len(list(out.glob("*.tar"))) >= 4
    return contents(out)


def journal_of(out: Path) -> Path:
    return out.with_name(f".partial-{out.name}.jsonl")


def keys_in(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        sidecars = [opened.extractfile(member) for member in opened if member.name.endswith(".json")]
        return [json.loads(file.read())["key"] for file in sidecars if file is not None]


def killed(many: Path, out: Path, num_shards: int) -> dict[str, int]:
    """Packs until the journal has some shards, kills; the inodes of what is there."""
    process = start_pack(many, out, "--max-shard-bytes", str(SHARD_BYTES))
    while process.poll() is None and (
        not journal_of(out).exists() or journal_of(out).read_bytes().count(b"\n") <= num_shards
    ):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return {path.name: path.stat().st_ino for path in out.with_name(f".partial-{out.name}").glob("*.tar")}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_killed_pack_goes_on_after_its_last_shard(many, whole, tmp_path, num_shards):
    before = killed(many, tmp_path / "many", num_shards)
    assert len(before) >= num_shards
    assert "finished shards of an earlier run" in packed(many, tmp_path / "many", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "many") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
    kept = [name for name, inode in before.items() if (tmp_path / "many" / name).stat().st_ino == inode]
    assert len(kept) >= num_shards


def test_a_note_cut_off_by_the_kill_is_no_shard(many, whole, tmp_path):
    killed(many, tmp_path / "many", 2)
    journal = journal_of(tmp_path / "many")
    journal.write_bytes(journal.read_bytes()[:-9])
    assert "continues after" in packed(many, tmp_path / "many", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "many") == whole


def test_a_shard_that_is_not_whole_is_written_again(many, whole, tmp_path):
    killed(many, tmp_path / "many", 2)
    second = sorted((tmp_path / ".partial-many").glob("*.tar"))[1]
    second.write_bytes(second.read_bytes()[:-512])
    assert "continues after 1 finished shards" in packed(many, tmp_path / "many", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "many") == whole


def test_what_changed_since_the_kill_is_packed_again(many, tmp_path):
    src = tmp_path / "many"
    shutil.copytree(many, src)
    killed(src, tmp_path / "out", 3)
    lines = journal_of(tmp_path / "out").read_bytes().splitlines()
    second = json.loads(lines[2])["shard"]
    in_second = keys_in(tmp_path / ".partial-out" / second)
    changed = write(src / in_second[0].removeprefix("many/"), grey_video(1, 2, 3))
    printed = packed(src, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert "continues after 1 finished shards" in printed
    assert "files or options have changed" in printed
    sample = samples_of(tmp_path / "out")[f"many/{changed.name}"]
    assert sample.num_frames == 3
    packed(src, tmp_path / "fresh", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_options_start_over(many, tmp_path):
    killed(many, tmp_path / "many", 2)
    printed = packed(many, tmp_path / "many", max_shard_bytes=2 * SHARD_BYTES)
    assert "starts over" in printed
    assert "continues" not in printed
    packed(many, tmp_path / "fresh", name="many", max_shard_bytes=2 * SHARD_BYTES)
    assert contents(tmp_path / "many") == contents(tmp_path / "fresh")


def test_a_larger_share_of_bad_files_goes_on_where_the_smaller_stopped(many, whole, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"1 of 14 videos cannot be read so far, .*the same command with another one goes on from here",
    ):
        packed(many, tmp_path / "many", max_shard_bytes=SHARD_BYTES, max_bad_fraction=0)
    packed(many, tmp_path / "many", max_shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "many") == whole


def test_two_packs_of_one_folder_at_once_are_refused(many, whole, tmp_path):
    out = tmp_path / "many"
    process = start_pack(many, out)
    while not journal_of(out).exists() or not journal_of(out).read_bytes():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match="which another `salt-data pack` is writing, expected one at a time"):
        packed(many, out, max_shard_bytes=SHARD_BYTES)
    process.kill()
    process.wait()
    packed(many, out, max_shard_bytes=SHARD_BYTES)  # a lock ends with its process
    assert contents(out) == whole


def test_shards_are_as_large_as_they_may_be(many, tmp_path):
    packed(many, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    sizes = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            sizes.append(
                [(member.offset, member.offset_data + -(-member.size // 512) * 512) for member in tar]
            )
    assert all(members[-1][1] <= SHARD_BYTES for members in sizes)
    first_sample = [members[1][1] for members in sizes[1:]]  # would not have fitted into the shard before
    assert all(
        members[-1][1] + size > SHARD_BYTES for members, size in zip(sizes, first_sample, strict=False)
    )
