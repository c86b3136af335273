"""How fast `salt-data pack` is, against one process that only decodes the same files. `python benchmarks/data_pack.py --help`."""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import rich.console

from common.config import PackConfig, SynthConfig
from common.data.facts import BadVideoError
from common.data.pack import pack
from common.data.synth import synthesise
from common.data.video import VIDEO_SUFFIXES, probe


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", help="folder of videos; else some are made: 40 pixels, 16 frames, a few kB each")
    parser.add_argument("--copies", type=int, default=1, help="times that the folder is packed under other names")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        src = Path(scratch) / "src"
        for copy in range(arguments.copies):
            if arguments.videos is None:
                synthesise(SynthConfig(out=str(src / str(copy)), num_train=500, num_test=1))
                (src / str(copy) / "labels.csv").unlink()
            else:
                shutil.copytree(arguments.videos, src / str(copy))
        paths = [path for path in sorted(src.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        print(f"{len(paths)} videos, {megabytes:.1f} MB")
        seconds: dict[str, list[float]] = {"decode": [], "pack": []}
        for number in range(arguments.rounds):
            started = time.perf_counter()
            num_frames = sum(frames_of(path) for path in paths)
            seconds["decode"].append(time.perf_counter() - started)
            started = time.perf_counter()
            config = PackConfig(src=str(src), out=f"{scratch}/{number}", workers=arguments.workers, max_bad_fraction=0.99)
            pack(config, rich.console.Console(quiet=True))
            seconds["pack"].append(time.perf_counter() - started)
        for name, title in (("decode", "decode, 1 process"), ("pack", f"pack, {arguments.workers} workers")):
            median = np.median(seconds[name])
            print(f"{title:20} {megabytes / median:8.2f} MB/s {len(paths) / median:8.1f} videos/s {num_frames / median:9.0f} frames/s")
        share = np.median(seconds["decode"]) / np.median(seconds["pack"]) / arguments.workers
        print(f"pack does {share:.2f} of the bare decoder's work, per worker; starting the workers is counted")


def frames_of(path):
    """Frames of a video, all decoded; 0 for one that is bad."""
    try:
        return probe(path.read_bytes()).num_frames
    except BadVideoError:
        return 0


if __name__ == "__main__":
    main()
