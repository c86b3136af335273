"""`salt-eval probe` in several processes, with plain PyTorch: the numbers of one, whichever part of the clips
each of them has."""

import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from eval_tools import make_dataset, make_run
from train_tools import ALONE, CPU

from salt_distill.common.config import LoaderConfig, ProbeConfig
from salt_distill.common.data.shards import open_dataset
from salt_distill.student_trainer.evaluation.probe.features import TokensInMemory, part_of
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeGrid
from salt_distill.student_trainer.evaluation.probe.run import list_candidates, open_task
from salt_distill.student_trainer.evaluation.probe.runner import ProbeOutcome, ProbeRunner
from salt_distill.student_trainer.ranks import Worker

FEW = {"epochs": 3, "batch_size": 8, "lr": (5e-3, 1e-3)}
CLOSE = 1e-4
"""Of a probe's weights, relative to their norm: AdamW moves a weight by its gradient over the gradient's own
size, so a sum in another order, where it is near 0, shows. `test_the_order_of_a_sum_alone` measures what that
does to one process."""


@dataclass(frozen=True)
class Job:
    """A command, or what is left of one that is stopped before an epoch."""

    name: str
    num_workers: int
    config: ProbeConfig
    stopped_before: int | None = None

    @property
    def state(self) -> Path:
        return Path(self.config.out).with_name(f"{Path(self.config.out).name}.training")


class StoppedError(RuntimeError):
    """The command ends here."""


def judge(job: Job, worker: Worker) -> tuple[ProbeOutcome, list[str]]:
    """What a rank of the command finds and says."""
    exam, _ = open_task(job.config)
    assert exam is not None
    real, said = ProbeGrid.train_epoch, []

    def stopped(grid, tokens, labels):
        if grid.epoch == job.stopped_before:
            raise StoppedError
        real(grid, tokens, labels)

    with patch.object(ProbeGrid, "train_epoch", stopped):
        verdict = ProbeRunner(job.config, exam, job.state, worker, said.append).all(
            list_candidates(job.config)
        )
    return verdict, said


def judge_rank(rank: int, jobs: list[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        if rank >= job.num_workers:
            continue
        store = f"file://{folder / f'store-{job.name}'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=job.num_workers)
        try:
            verdict, said = judge(job, Worker(rank=rank, world_size=job.num_workers, device=CPU))
            found = {
                "counts": counts_of(verdict),
                "facts": {label: facts.model_dump() for label, facts in verdict.labels.items()},
                "said": said,
            }
        except (StoppedError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        (folder / f"{job.name}-{rank}.json").write_text(json.dumps(found))
        torch.distributed.destroy_process_group()


def counts_of(verdict: ProbeOutcome) -> dict[str, dict[str, list[list[int]]]]:
    return {
        name: {label: found.counts.tolist() for label, found in row.items()}
        for name, row in verdict.results.items()
    }


def weights(state: Path, number: int) -> torch.Tensor:
    """Those of all of an encoder's probes, after the last epoch."""
    saved = torch.load(state / f"{number}.pt", weights_only=True)
    assert saved["epoch"] == FEW["epochs"]
    return torch.cat([value.flatten() for probe in saved["probes"] for value in probe.values()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """45 clips of three splits, of which two cannot be decoded: one to learn from and one to be scored on."""
    folder = make_dataset(
        tmp_path_factory.mktemp("eval") / "toy", num_clips=45, splits=("train", "val", "test")
    )
    for split in ("train", "test"):
        sample = open_dataset(folder).samples(split)[0][7]
        with (folder / sample.tar).open("r+b") as tar:
            tar.seek(sample.offset)
            tar.write(bytes(sample.size))
    return folder


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """Every job's files of its ranks, and its probes, beside what one process finds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    one, two = (str(make_run(folder / name, data, seed=seed)) for seed, name in enumerate(("one", "two")))
    few = make_dataset(folder / "few", num_clips=8)  # two to be scored on

    def job(
        name: str, num_workers: int, out: str | None = None, stopped_before: int | None = None, **values
    ) -> Job:
        loader = LoaderConfig(decode_processes=0, max_bad_fraction=values.pop("max_bad_fraction", 0.2))
        values = {
            "data": str(data),
            "ckpt": (one,),
            "out": str(folder / (out or f"{name}.json")),
            "loader": loader,
            **FEW,
        } | values
        return Job(name, num_workers, ProbeConfig(**values), stopped_before)

    kept = {"features": str(folder / "features")}
    jobs = {
        made.name: made
        for made in (
            job("alone", 1, ckpt=(one, two)),
            job("alone-files", 1, features=str(folder / "features-alone")),
            job("alone-augment", 1, augment=True),
            job("alone-parts", 1, micro_batch_size=3),
            job("alone-few", 1, data=str(few), lr=(5e-3,), features=str(folder / "features-few-alone")),
            job("memory", 3, ckpt=(one, two)),
            job("files", 3, **kept),
            job("files-again", 2, **kept),
            job("augment", 2, augment=True, micro_batch_size=3),
            job("killed", 2, out="resumed.json", ckpt=(one, two), stopped_before=2),
            job("resumed", 3, ckpt=(one, two), resume=True),
            job("few", 3, data=str(few), lr=(5e-3,), features=str(folder / "features-few")),
            job("none-may-be-bad", 3, max_bad_fraction=0),
        )
    }
    for made in jobs.values():
        if made.num_workers == 1:
            verdict, said = judge(made, ALONE)
            (folder / f"{made.name}-0.json").write_text(
                json.dumps(
                    {
                        "counts": counts_of(verdict),
                        "facts": {label: facts.model_dump() for label, facts in verdict.labels.items()},
                        "said": said,
                    }
                )
            )
    together = [made for made in jobs.values() if made.num_workers > 1]
    torch.multiprocessing.spawn(judge_rank, (together, folder), nprocs=3)
    return folder, jobs


def said(folder: Path, name: str, rank: int = 0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("memory", "alone"),
        ("files", "alone-files"),
        ("augment", "alone-augment"),
        ("resumed", "alone"),
        ("few", "alone-few"),
    ],
)
def test_several_find_what_one_finds(name, alone, found):
    """Two or three processes, of which one may have nothing to be scored on. ``resumed``: three go on where
    two were stopped."""
    folder, jobs = found
    ranks = [said(folder, name, rank) for rank in range(jobs[name].num_workers)]
    assert all(rank["counts"] == ranks[0]["counts"] for rank in ranks)
    assert ranks[0]["counts"] == said(folder, alone)["counts"]
    assert ranks[0]["facts"] == said(folder, alone)["facts"]
    for number in range(len(jobs[name].config.ckpt)):
        assert distance(weights(jobs[name].state, number), weights(jobs[alone].state, number)) < CLOSE


def test_the_order_of_a_sum_alone(found):
    """What tells rounding from a wrong mean: one process that adds up parts of a batch is as near itself;
    another encoder's probe is far."""
    _, jobs = found
    assert 0 < distance(weights(jobs["alone-parts"].state, 0), weights(jobs["alone"].state, 0)) < CLOSE
    assert distance(weights(jobs["alone"].state, 1), weights(jobs["alone"].state, 0)) > 100 * CLOSE


def test_what_stops_one_stops_all(found):
    """Two of the three parts of a split have no bad clip; each rank says the same."""
    folder, _ = found
    first, *others = [said(folder, "none-may-be-bad", rank)["error"] for rank in range(3)]
    assert first.startswith("ValueError: got 1 clips that cannot be decoded among")
    assert others == [first, first]
    assert said(folder, "killed", 1) == {"error": "StoppedError: "}


def test_bad_clips_are_named_once(found):
    folder, _ = found
    for name in ("memory", "files", "augment"):
        keys = [
            sentence.split(": ")[1]
            for sentence in said(folder, name)["said"]
            if sentence.startswith("left out: ")
        ]
        assert sorted(keys) == ["toy/019", "toy/025"]
    learned = said(folder, "memory")["facts"]["shade"]
    assert (learned["num_train"], learned["num_test"]) == (14, 14)


def test_files_of_features_are_those_of_one_process(found, data):
    """Each whole, its rows in the order of the clips; the second command writes none, and says what the first
    left out."""
    folder, _ = found
    paths = sorted((folder / "features").iterdir())
    assert [path.name for path in paths] == sorted(
        path.name for path in (folder / "features-alone").iterdir()
    )
    assert len(paths) == 3
    for path in paths:
        ours, alone = (
            pa.ipc.open_file(pa.memory_map(str(of))).read_all()
            for of in (path, folder / "features-alone" / path.name)
        )
        assert ours["key"].to_pylist() == alone["key"].to_pylist()
        one, other = (
            np.stack([np.array(row, np.float16) for row in table["tokens"].to_pylist()])
            for table in (ours, alone)
        )
        np.testing.assert_allclose(one, other, atol=2e-3)
        assert ours.schema.metadata == alone.schema.metadata
    assert said(folder, "files-again")["counts"] == said(folder, "files")["counts"]
    assert not [
        sentence for sentence in said(folder, "files-again")["said"] if sentence.startswith("left out: ")
    ]
    assert sum("1 clips of" in sentence for sentence in said(folder, "files-again")["said"]) == 2


def test_parts_and_shares_are_whole():
    numbers = np.random.default_rng(0).permutation(11)
    workers = [Worker(rank=rank, world_size=4, device=CPU) for rank in range(4)]
    assert np.concatenate([part_of(numbers, worker) for worker in workers]).tolist() == numbers.tolist()
    sizes = [5, 0, 2, 4]
    kept = [
        TokensInMemory(np.ones(11, bool), torch.zeros(size, 1, 2, 3), sum(sizes[:rank]))
        for rank, size in enumerate(sizes)
    ]
    shares = [of_rank.share(numbers) for of_rank in kept]
    assert [len(share) for share in shares] == sizes
    assert sorted(np.concatenate(shares).tolist()) == list(range(11))
