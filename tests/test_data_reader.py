"""Clips from decoding processes: the same bytes as from this process; a crash, a stall or damage costs one
video."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pack_tools import VIEW, packed, samples_of
from train_tools import RandomClips, small_run

from salt_distill.common.clip import BadVideoError, clip_digest
from salt_distill.common.config import LoaderConfig, ViewConfig
from salt_distill.common.data import views
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.reader import CENTRE_VIEW, Reader
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.tasks import Cut, Decoder, Task
from salt_distill.common.data.video import decoder_name, open_video
from salt_distill.common.model.grid import token_grid
from salt_distill.student_trainer.batches import Batches


def new_reader(data: Path, *, view: ViewConfig = VIEW, **loader) -> Reader:
    config = LoaderConfig.model_validate({"decode_processes": 1, **loader})
    return Reader(str(data), data_seed=0, views="fresh", view=view, split="all", loader=config)


@pytest.fixture(scope="module")
def real(shared_videos, tmp_path_factory) -> Path:
    """Six real videos, each in a shard of its own."""
    src, out = tmp_path_factory.mktemp("real") / "src", tmp_path_factory.mktemp("real") / "out"
    src.mkdir()
    names = (
        "torchcodec__nasa_13013 torchcodec__nasa_13013_vfr torchcodec__nasa_13013_rotated sleap__small_robot"
        " imageio__realshort"
    )
    for name in names.split():
        shutil.copy(shared_videos / f"{name}.mp4", src)
    shutil.copy(shared_videos / "moviepy__pigs_in_a_polka.gif", src)
    packed(src, out, max_shard_bytes=1)
    return out


# --- the same bytes ---


@pytest.mark.needs_data
def test_processes_threads_and_caches_give_the_same_clips(real, tmp_path):
    view = ViewConfig(num_frames=8, frame_step=4, crop_size=64)
    batches = []
    for loader in (
        {"decode_processes": 0},
        {"decode_processes": 2},
        {"decode_processes": 1, "frame_cache_bytes": 80_000_000},  # room for some of them
        {"decode_processes": 1, "shard_cache_dir": str(tmp_path / "cache")},
    ):
        reader = new_reader(real, view=view, **loader)
        batches.append([reader.clips(range(9)), reader.clips(range(3, 15))])  # twice, so that a cache is used
        reader.close()
    for first, second in batches:
        assert first.good.all()
        assert first.digests == batches[0][0].digests
        assert second.digests == batches[0][1].digests
        assert first.digests[3:] == second.digests[:6]
        assert second.digests == tuple(clip_digest(clip) for clip in second.pixels)


@pytest.mark.needs_data
def test_a_clip_is_what_its_parts_say(real):
    """Read, decoded, cut by hand: by time where the rate varies, upright, one draw for all frames."""
    view = ViewConfig(num_frames=8, frame_step=3, crop_size=48)
    reader = new_reader(real, view=view, decode_processes=0)
    for key, sample in samples_of(real).items():
        draw = views.draw(0, key, 5)
        with open_video(reader.dataset.read(sample), sample.num_frames) as video:
            idx = views.frame_idx(view, sample.num_frames, draw.start, video.times)
            frames = np.stack(video.frames(range(sample.num_frames)))[idx]
        assert frames.shape[1:3] == (sample.height, sample.width)
        pixels, digest = reader.submit(sample, 5).result()
        assert np.array_equal(pixels, views.apply(view, frames, draw))
        assert digest == clip_digest(pixels)


@pytest.mark.needs_data
def test_runs_of_one_data_seed_see_the_same_bytes_whatever_else_differs(real):
    def digests(batch_size: int, num_batches: int, **loader) -> list[bytes]:
        reader = new_reader(real, **loader)
        found = [
            reader.clips(range(step * batch_size, (step + 1) * batch_size)).digests
            for step in range(num_batches)
        ]
        reader.close()
        return [digest for batch in found for digest in batch]

    assert (
        digests(4, 6, decode_processes=2)
        == digests(12, 2, decode_processes=0)
        == digests(1, 24, decode_processes=1)
    )


@pytest.mark.parametrize(
    ("module", "others"),
    [
        (
            "salt_distill.student_trainer.storage",
            {"av", "PIL"},
        ),  # copying a checkpoint needs no video decoder
        ("salt_distill.common.data.tasks", {"torch", "pyarrow"}),  # nor a decoding process a model
        ("salt_distill.common.data.making.prepare", {"torch", "pyarrow"}),
    ],
)
def test_what_is_not_needed_is_not_imported(module, others):
    code = f"import sys, {module}; print(*{others} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_decodes_imports_no_torch(shards):
    """It would take a process seconds and hundreds of megabytes, and there is one for each core."""
    if decoder_name().startswith("torchcodec"):
        pytest.skip("torchcodec imports torch")
    task = Task(open_dataset(shards).encoded(next(iter(samples_of(shards).values()))), 12, None)
    reader = new_reader(shards)
    assert reader._pool.submit(task).result().frames.shape == (12, 40, 40, 3)
    (worker,) = reader._pool._workers
    maps = Path(f"/proc/{worker.process.pid}/maps")
    if sys.platform == "linux":
        loaded = maps.read_text()
        assert "libavcodec" in loaded
        assert "libtorch" not in loaded
        assert "libarrow" not in loaded
    reader.close()


def test_a_decoder_that_is_not_the_named_one_stops_the_run(shards, capfd):
    reader = new_reader(shards)
    pool = DecodePool(1, timeout_s=60, call=Decoder("some other"))
    with pytest.raises(RuntimeError, match=r"a decoding process cannot start \(exit code 1\)"):
        pool.submit(reader.dataset.encoded(next(iter(samples_of(shards).values())))).result()
    assert (
        f"got the decoder {reader.decoder} in a decoding process, expected some other"
        in capfd.readouterr().err
    )
    pool.close()


def test_batches_are_read_ahead_of_the_step_and_no_further():
    config = small_run(steps=20, loader={"prefetch_steps": 3})
    reader = RandomClips(config.view.clip_shape)
    batches = Batches(
        reader=reader,  # type: ignore[arg-type]
        sources=(),
        mask=config.mask,
        grid=token_grid(config.view, config.encoder),
        seed=0,
        batch_size=30,
        rank=0,
        world_size=1,
        prefetch_steps=config.loader.prefetch_steps,
    )
    steps = batches.steps(3, 20)
    for step in (3, 4):
        assert next(steps).result().step == step
        until = time.monotonic() + 10
        while len(reader.slots) < 30 * (step - 3 + 4) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert reader.slots == set(range(2 * 30, (step - 1 + 4) * 30))
    steps.close()


# --- what costs one video ---


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.needs_data
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_crash_of_the_decoder_in_the_middle_costs_its_video(shared_videos, tmp_path):
    for name in ("intel__bottle-detection.mp4", "imageio__realshort.mp4"):
        (tmp_path / "src").mkdir(exist_ok=True)
        shutil.copy(shared_videos / name, tmp_path / "src")
    packed(tmp_path / "src", tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    long, short = samples["src/intel__bottle-detection.mp4"], samples["src/imageio__realshort.mp4"]
    reader = new_reader(tmp_path / "out", view=ViewConfig(num_frames=150, frame_step=1, crop_size=224))
    reader.submit(short, 0).result()
    (worker,) = reader._pool._workers
    before = cpu_seconds(worker.process.pid)
    broken, after = reader.submit(long, CENTRE_VIEW), reader.submit(short, 0)
    while cpu_seconds(worker.process.pid) < before + 0.1:
        assert not broken.done()
        time.sleep(0.005)
    os.kill(worker.process.pid, signal.SIGSEGV)
    with pytest.raises(BadVideoError, match=r"^the decoder crashed \(signal 11\)$"):
        broken.result()
    assert after.result()[1] == reader.submit(short, 0).result()[1]
    reader.submit(long, CENTRE_VIEW).result()  # it was not the video's fault
    reader.close()


def test_a_shard_that_never_answers_costs_its_videos(shards, tmp_path):
    data = tmp_path / "toy"
    shutil.copytree(shards, data)
    reader, clean = new_reader(data, decode_timeout_s=3), new_reader(shards)
    shard = min((shard for shard in reader.samples if len(shard)), key=len)
    (data / shard[0].tar).unlink()
    os.mkfifo(data / shard[0].tar)
    keep = [sample for sample in samples_of(shards).values() if sample.tar != shard[0].tar][:3]
    batch = reader.evaluation([keep[0], shard[0], keep[1], keep[2]])
    assert batch.good.tolist() == [True, False, True, True]
    assert reader.skipped == {shard[0].key: "the decoder did not answer within 3 s"}
    assert [*batch.digests[:1], *batch.digests[2:]] == list(clean.evaluation(keep).digests)
    assert batch.digests[1] == clip_digest(np.zeros(VIEW.clip_shape, np.uint8))
    reader.close()
    clean.close()


def test_an_error_that_is_no_video_s_stops_the_run(shards, monkeypatch):
    reader = new_reader(shards, decode_processes=0)
    monkeypatch.setattr(Cut, "clip", lambda self, frames: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.clips(range(3))
    assert not reader.skipped


def test_closing_a_reader_ends_its_processes(shards):
    reader = new_reader(shards, decode_processes=2)
    reader.clips(range(8))
    workers = list(reader._pool._workers)
    assert workers
    reader.close()
    assert all(worker.process.poll() is not None for worker in workers)
