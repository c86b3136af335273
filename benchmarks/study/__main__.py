"""The paper's claims at small scale, on moving digits and pen strokes: runs what is not there yet, and writes
a page of what was found. `make study`."""

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.study.experiment import Lengths
from benchmarks.study.jobs import study
from benchmarks.study.page import write_page
from benchmarks.study.record import Record, RecordError
from benchmarks.study.runner import JobError, run
from benchmarks.study.strokes import ARCHIVE


def main() -> int:
    """The exit status: 0 where all has run, 3 where time was up before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        help="folder of data, checkpoints and logs; a second start goes on in it (default: %(default)s)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("docs/study.md"),
        help="page to write. Beside it are its figures and, as .jsonl, what each command found; what is in"
        " there is not run again, nor on another machine (default: %(default)s)",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="also equal FLOPs, sizes, teacher data, masks, splits of a budget, chained stages",
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on later")
    parser.add_argument(
        "--at-once",
        type=int,
        default=os.cpu_count(),
        help="commands that run at a time, each with one thread (default: %(default)s)",
    )
    parser.add_argument(
        "--labelled",
        type=Path,
        default=Path("../shared/data/labelled"),
        help=f"folder with {ARCHIVE}; without it no pen strokes",
    )
    parser.add_argument(
        "--real",
        type=Path,
        default=Path("../shared/data/videos"),
        help="with --large: folder of real videos, to learn from and to test on; without it none (default:"
        " %(default)s)",
    )
    for name, what in {
        "seeds": "seeds of teacher, student and baseline, and of the experiments on the paper's first claims",
        "large-seeds": "seeds of the other experiments of --large and of real videos",
        "steps": "steps of a teacher",
        "videos": "training videos of moving digits, and most of real videos",
        "probe-epochs": "passes of a probe",
    }.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            default=getattr(Lengths(), name.replace("-", "_")),
            help=f"{what} (default: %(default)s)",
        )
    arguments = parser.parse_args()
    lengths = Lengths(
        seeds=arguments.seeds,
        large_seeds=arguments.large_seeds,
        steps=arguments.steps,
        videos=arguments.videos,
        probe_epochs=arguments.probe_epochs,
    )
    labelled = arguments.labelled if (arguments.labelled / ARCHIVE).exists() else None
    if labelled is None:
        print(f"no pen strokes: {arguments.labelled / ARCHIVE} is not there", file=sys.stderr)
    real = arguments.real if arguments.real.is_dir() else None
    if real is None and arguments.large:
        print(f"no real videos: {arguments.real} is not there", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        record = Record(arguments.page.with_suffix(".jsonl"), lengths)
        whole = run(
            study(lengths, record, labelled=labelled, real=real, is_large=arguments.large),
            arguments.out,
            record,
            at_once=arguments.at_once,
            minutes=arguments.minutes,
        )
    except (JobError, RecordError) as error:
        print(error, file=sys.stderr)
        return 1
    write_page(arguments.page, record, lengths, has_strokes=labelled is not None, has_real=real is not None)
    print(
        f"{arguments.page} says what was found"
        + ("" if whole else "; time was up before the end: the same command goes on"),
        file=sys.stderr,
    )
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
