"""A run's copy in an object store: complete when the run ends, good to go on from on another machine, and
never silently absent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from s3_server import CREDENTIALS, S3Server, s3_server
from service_tools import wait_until
from train_tools import ALONE, ClipsUntil, StoppedError, small_run

from salt_distill.common.config import TrainConfig, VJepaRun
from salt_distill.common.model.checkpoint import find_checkpoint
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.run_directory import check_run, claimed, read_metrics
from salt_distill.student_trainer.storage import UploadError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bucket").mkdir()
    with s3_server(tmp_path / "bucket") as server:
        yield server


def run_of(out: Path, storage: str | None, **values) -> TrainConfig:
    values = {
        "log_every": 1,
        "keep_every": 2,
        "optim": {"warmup_steps": 1, "clip_grad": 0.5},
        "steps": 6,
    } | values
    return small_run(VJepaRun, out=str(out), storage=storage, **values)


class Clips(ClipsUntil):
    """Those of a test; when a step asks for its clips, ``at`` that step is called."""

    def __init__(self, config: TrainConfig, last_step: int, at: Callable[[int], None]) -> None:
        super().__init__(config, last_step)
        self._size, self._at = config.batch_size, at

    def clips(self, slots):
        self._at(slots.start // self._size + 1)
        return super().clips(slots)


def train(config: TrainConfig, at: Callable[[int], None] = lambda step: None, *, last_step: int = 6) -> None:
    torch.set_num_threads(1)
    check_run(config)
    with claimed(config) as checkpoint:
        train_on(Clips(config, last_step, at), (), config, ALONE, checkpoint)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_goes_on_from_its_copy_on_another_machine_to_the_bit(bucket: S3Server, tmp_path):
    """The store fails now and then, and the machine with the run directory is gone after step 4."""
    train(run_of(tmp_path / "whole", None))

    def fail(step: int) -> None:
        bucket.faults = 2 if step in (3, 5) else bucket.faults

    address = bucket.address("runs/a")
    first = tmp_path / "first"
    with pytest.raises(StoppedError):
        train(run_of(first, address), fail, last_step=5)
    stored = bucket.folder / "runs" / "a"
    wait_until(
        lambda: (
            (stored / "checkpoint").exists() and (stored / "checkpoint").read_text() == "checkpoints/step-4\n"
        )
    )
    assert files(stored / "checkpoints" / "step-4") == files(first / "checkpoints" / "step-4")
    for name in ("config.yaml", "environment.json"):
        assert (stored / name).read_bytes() == (first / name).read_bytes()

    second = tmp_path / "second"
    with pytest.raises(ValueError, match=r"got --storage s3://.*, which holds a run already: add --resume"):
        check_run(run_of(second, address))
    train(run_of(second, address, resume=True), fail)
    assert [line["step"] for line in read_metrics(second)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in read_metrics(second)] == [
        line["loss"] for line in read_metrics(tmp_path / "whole")
    ]
    for name in ("model", "predictor", "online"):
        whole, found = (find_checkpoint(run) / f"{name}.safetensors" for run in (tmp_path / "whole", second))
        assert whole.read_bytes() == found.read_bytes()
    assert (stored / "checkpoint").read_text() == "checkpoints/step-6\n"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "summary.json"):
        assert (stored / name).read_bytes() == (second / name).read_bytes()
    assert len(json.loads((second / "environment.json").read_text())) == 2  # both machines


def test_a_store_that_refuses_stops_the_run_with_a_sentence_and_catches_up(bucket: S3Server, tmp_path):
    def deny(step: int) -> None:
        bucket.denied = bucket.denied or step == 3

    config = run_of(tmp_path / "run", bucket.address("runs/a"))
    with pytest.raises(
        UploadError, match=r"step-\d could not be copied to s3://.*ACCESS_DENIED.*It is whole in .*--resume"
    ):
        train(config, deny)
    newest = find_checkpoint(tmp_path / "run").name
    assert newest in ("step-2", "step-4", "step-6")
    bucket.denied = False
    train(run_of(tmp_path / "run", bucket.address("runs/a"), resume=True))
    assert (bucket.folder / "runs" / "a" / "checkpoint").read_text() == "checkpoints/step-6\n"


def test_a_damaged_copy_is_not_gone_on_from(tmp_path):
    storage = tmp_path / "storage"
    train(run_of(tmp_path / "run", str(storage), steps=2))
    path = storage / "checkpoints" / "step-2" / "online.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        ValueError, match=r"step-2 is damaged, remove it there: .*online\.safetensors: got sha256 "
    ):
        train(run_of(tmp_path / "other", str(storage), resume=True))
    with pytest.raises(ValueError, match="which holds no run: leave --resume out"):
        check_run(run_of(tmp_path / "third", str(tmp_path / "nothing"), resume=True))
