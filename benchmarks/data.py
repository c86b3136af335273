"""Clips of a data set over bare decoders on the same files, and packing over decoding, in one run. `python
benchmarks/data.py --help`."""

import argparse
import contextlib
import io
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import rich.console

from salt_distill.common.clip import BadVideoError, clip_digest
from salt_distill.common.config import LoaderConfig, PackConfig, ViewConfig
from salt_distill.common.data import views
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.index import SCHEMA, write_dataset
from salt_distill.common.data.making.pack import pack
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.video import VIDEO_SUFFIXES, open_video, probe

VIEW = ViewConfig()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--videos", help="folder of videos; else eight are made: 320 x 256, 10 s, 30 frames a second"
    )
    parser.add_argument("--clips", type=int, default=48, help="clips of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="decoding processes of the reader, and workers of the packing",
    )
    parser.add_argument(
        "--samples", type=int, help="instead: opens a made data set of so many samples, 1000 in a shard"
    )
    parser.add_argument(
        "--copies",
        type=int,
        metavar="PIXELS",
        help="instead: reads the two kinds of copies of --short-side PIXELS",
    )
    arguments = parser.parse_args()
    if arguments.samples is not None:
        return opening(arguments.samples)
    with tempfile.TemporaryDirectory() as scratch:
        videos = arguments.videos or f"{scratch}/videos"
        if arguments.videos is None:
            make_videos(Path(videos))
        if arguments.copies is not None:
            return copies(videos, scratch, arguments)
        packing(Path(videos), scratch, arguments)
        reading(f"{scratch}/0", arguments)


def make_videos(folder: Path):
    """A texture that pans, with a little noise: about as many bits as a film of this size takes."""
    folder.mkdir()
    for number in range(8):
        rng = np.random.default_rng(number)
        octaves = [
            np.kron(rng.normal(size=(512 // size, 640 // size, 3)), np.ones((size, size, 1)))
            for size in (4, 8, 16, 32)
        ]
        texture, noise = 128 + 22 * sum(octaves), rng.normal(scale=4, size=(8, 256, 320, 3))
        down, along = rng.integers(-3, 4, 2)
        pictures = (
            np.roll(texture, (down * i, along * i), (0, 1))[:256, :320] + noise[i % 8] for i in range(300)
        )
        frames = (
            av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            for picture in pictures
        )
        (folder / f"{number}.mp4").write_bytes(encode_mp4(frames, width=320, height=256, fps=30, crf=18))


def packing(videos: Path, scratch: str, arguments):
    """Packs as often as there are rounds, each time after one process has only decoded the same files."""
    paths = [path for path in sorted(videos.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} videos, {megabytes:.1f} MB")
    seconds: dict[str, list[float]] = {"decoding": [], "packing": []}
    for number in range(arguments.rounds):
        started = time.perf_counter()
        num_frames = sum(frames_of(path) for path in paths)
        seconds["decoding"].append(time.perf_counter() - started)
        started = time.perf_counter()
        config = PackConfig(
            src=str(videos), out=f"{scratch}/{number}", workers=arguments.processes, max_bad_fraction=0.9
        )
        pack(config, rich.console.Console(quiet=True))
        seconds["packing"].append(time.perf_counter() - started)
    for name, title in (
        ("decoding", "decoding, 1 process"),
        ("packing", f"packing, {arguments.processes} workers"),
    ):
        median = np.median(seconds[name])
        print(
            f"{title:32} {megabytes / median:8.2f} MB/s {len(paths) / median:8.1f} videos/s"
            f" {num_frames / median:8.0f} frames/s"
        )


def copies(videos: str, scratch: str, arguments):
    """Reads the same clips of copies with x264's defaults and of copies made for training, in turns."""
    readers, cpu = {}, {}
    for kind in ("small", "fast"):
        config = PackConfig(src=videos, out=f"{scratch}/{kind}", short_side=arguments.copies, copies=kind)
        pack(config, rich.console.Console(quiet=True))
        readers[kind], cpu[kind] = new_reader(config.out, 0), []
    for _ in range(arguments.rounds):
        for kind, reader in readers.items():
            with timed([], cpu[kind], []):
                reader.clips(range(arguments.clips))
    for kind, reader in readers.items():
        num_bytes = sum(sample.size for shard in reader.samples for sample in shard)
        print(
            f"{kind}: {arguments.clips / np.median(cpu[kind]):.1f} clips/s of a core,"
            f" {num_bytes / 1e6:.1f} MB"
        )
        reader.close()


def reading(shards: str, arguments):
    """Reads the same clips in turns with each decoder and reader."""
    readers = {
        "reader, in this process": new_reader(shards, 0),
        f"reader, {arguments.processes} decoding processes": new_reader(shards, arguments.processes),
    }
    samples, numbers = clips_of(readers["reader, in this process"], arguments.clips)
    encoded = [readers["reader, in this process"].dataset.read(sample) for sample in samples]
    draws = [views.draw(0, sample.key, number) for sample, number in zip(samples, numbers, strict=True)]
    wanted = [
        wanted_of(data, sample, draw) for data, sample, draw in zip(encoded, samples, draws, strict=True)
    ]
    for reader in readers.values():
        reader.clips(range(2 * arguments.processes))  # starts the processes
    bare = {"bare decoder, from the start": from_the_start, "bare decoder, that seeks": seeking}
    wall: dict[str, list[float]] = {name: [] for name in [*bare, *readers]}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    for _ in range(arguments.rounds):
        for name, decode in bare.items():
            with timed(wall[name], cpu[name], []):
                for data, (idx, times) in zip(encoded, wanted, strict=True):
                    decode(data, idx, times)
        for name, reader in readers.items():
            with timed(wall[name], cpu[name], workers_of(reader)):
                reader.clips(range(arguments.clips))
    num_videos, sizes = (
        len({sample.key for sample in samples}),
        {(sample.width, sample.height) for sample in samples},
    )
    print(f"clips of {num_videos} videos of {len(sizes)} sizes, decoded by {reader.decoder}")
    for name in wall:
        seconds, cores = np.median(wall[name]), np.median(cpu[name])
        share = " ".join(
            f"{np.median(cpu[other]) / cores:6.2f} of the one {other.split(', ')[1]}" for other in bare
        )
        print(
            f"{name:32} {arguments.clips / seconds:7.1f} clips/s {arguments.clips / cores:7.1f} clips/s of a"
            f" core: {share}"
        )
    for number, pid in enumerate(workers_of(reader)):
        print(f"memory of decoding process {number}: {memory_mb(pid):.0f} MB of its own")
    stages(encoded, samples, draws)
    for reader in readers.values():
        reader.close()


def new_reader(shards: str, processes: int) -> Reader:
    loader = LoaderConfig(decode_processes=processes)
    return Reader(shards, data_seed=0, views="fresh", view=VIEW, split="all", loader=loader)


def clips_of(reader: Reader, count: int):
    """The samples of the first slots, and the view of each."""
    places = [reader.order.locate(slot) for slot in range(count)]
    return [reader.samples[shard][place] for _, shard, place in places], [number for number, _, _ in places]


def frames_of(path: Path) -> int:
    """Frames of a video, all decoded; 0 for one that is bad."""
    try:
        return probe(path.read_bytes()).num_frames
    except BadVideoError:
        return 0


def wanted_of(data: bytes, sample: Sample, draw: views.Draw):
    """The frames of a clip, and the times of all frames where the file tells them."""
    with open_video(data, sample.num_frames, seekable=sample.seekable) as video:
        return views.frame_idx(VIEW, sample.num_frames, draw.start, video.times), video.times


def from_the_start(data: bytes, frame_idx: list[int], times) -> np.ndarray:
    """What a short program would do: decode from the start to the last frame of the clip, and convert the
    clip's frames to RGB."""
    wanted, last, frames = set(frame_idx), max(frame_idx), {}
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames[number] = frame.to_ndarray(format="rgb24")
            if number == last:
                break
    return np.stack([frames[number] for number in frame_idx])


def seeking(data: bytes, frame_idx: list[int], times) -> np.ndarray:
    """What a better one would do, that somebody told the times: seek to the key frame before the clip. It may
    get other frames, unnoticed."""
    if times is None:
        return from_the_start(data, frame_idx, times)
    wanted, frames = set(times[frame_idx].tolist()), {}
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        container.seek(min(wanted), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames[frame.pts] = frame.to_ndarray(format="rgb24")
            if frame.pts >= max(wanted):
                break
    return np.stack([frames[time] for time in times[frame_idx].tolist() if time in frames])


def opening(num_samples: int):
    """What a rank needs to open a data set and to find samples in it, in a process of its own."""
    numbers = np.arange(num_samples)
    values = {
        "labels": pa.MapArray.from_arrays(
            np.arange(num_samples + 1, dtype=np.int32), ["class"] * num_samples, numbers % 400
        )
    }
    values |= {name: [name] * num_samples for name in ("split", "codec", "source")}
    values |= {name: numbers for name in ("num_frames", "width", "height", "offset", "size")}
    values |= {name: numbers.astype(float) for name in ("fps", "duration_s")}
    values |= {
        "key": [f"source/videos/{number:012d}.mp4" for number in numbers],
        "sha256": [f"{number:064x}" for number in numbers],
    }
    values |= {"seekable": [True] * num_samples}
    values |= {"tar": [f"made-{number // 1000:06d}.tar" for number in numbers]}
    with tempfile.TemporaryDirectory() as scratch:
        for tar in set(values["tar"]):
            (Path(scratch) / tar).touch()
        write_dataset(
            Path(scratch), pa.table(values, SCHEMA), name="made", kind="packed", class_names={}, more={}
        )
        code = f"import benchmarks.data; benchmarks.data.report_opening({scratch!r})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def report_opening(data: str):
    before, started = memory_mb(os.getpid(), "VmRSS"), time.perf_counter()
    reader = Reader(data, data_seed=0, views="fresh", view=VIEW, split="all", loader=LoaderConfig())
    opened = time.perf_counter()
    print(
        f"{reader.num_samples} samples: opened in {opened - started:.1f} s, kept in"
        f" {memory_mb(os.getpid(), 'VmRSS') - before:.0f} MB"
    )
    slots = np.random.default_rng(0).integers(0, 10**12, 100).tolist()
    for title, chosen in (("anywhere", slots), ("in order", range(slots[0], slots[0] + 10_000))):
        started = time.perf_counter()
        for slot in chosen:
            reader.order.locate(slot)
        print(f"a slot {title} is found in {1e6 * (time.perf_counter() - started) / len(chosen):.0f} us")
    reader.close()


@contextlib.contextmanager
def timed(wall: list[float], cpu: list[float], pids: list[int]):
    """Seconds on the clock, and of this process and these others on their cores."""
    started, before = time.perf_counter(), cpu_seconds(pids)
    yield
    wall.append(time.perf_counter() - started)
    cpu.append(cpu_seconds(pids) - before)


def cpu_seconds(pids: list[int]) -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def workers_of(reader: Reader) -> list[int]:
    return [worker.process.pid for worker in reader._pool._workers]


def memory_mb(pid: int, what: str = "VmHWM") -> float:
    """Its resident set, the largest so far or (VmRSS) the one now, less what it shares with files on disk."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(lines[what].split()[0]) - int(lines["RssFile"].split()[0])) / 1000


def stages(encoded, samples, draws):
    """Where the time of a clip goes, in this process."""
    spent = dict.fromkeys(("read packets", "decode and convert", "crop and resize", "digest"), 0.0)
    for data, sample, draw in zip(encoded, samples, draws, strict=True):
        marks = [time.process_time()]
        with open_video(data, sample.num_frames, seekable=sample.seekable) as video:
            marks.append(time.process_time())
            frames = video.frames(views.frame_idx(VIEW, sample.num_frames, draw.start, video.times))
            marks.append(time.process_time())
            clip = views.apply(VIEW, frames, draw)
            marks.append(time.process_time())
        clip_digest(clip)
        marks.append(time.process_time())
        for name, (first, second) in zip(spent, itertools.pairwise(marks), strict=True):
            spent[name] += second - first
    print(
        "ms a clip: "
        + ", ".join(f"{name} {1000 * seconds / len(samples):.1f}" for name, seconds in spent.items())
    )


if __name__ == "__main__":
    main()
