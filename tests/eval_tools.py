"""A small labelled data set and small run directories: what the tests of salt-eval share."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from salt_distill.common.config import (
    BlockSetConfig,
    EncoderConfig,
    MaskConfig,
    PredictorConfig,
    StudentRun,
    TeacherRun,
    ViewConfig,
    dump_yaml,
)
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.index import write_index
from salt_distill.common.data.sample import sha256_of, sidecar_of
from salt_distill.common.data.video import probe
from salt_distill.common.model.checkpoint import CheckpointConfig, new_predictor, point_to, save_checkpoint
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.evaluation.probe.results import ChosenSetting, LabelFacts, ProbeResults
from salt_distill.student_trainer.evaluation.records import EncoderIdentity

VIEW = ViewConfig(num_frames=4, frame_step=1, crop_size=32)
ENCODER = EncoderConfig(width=24, depth=1, num_heads=2, mlp_width=48, patch_size=8)
PREDICTOR = PredictorConfig(width=12, depth=1, num_heads=1, mlp_width=24)
MASK = MaskConfig(
    sets=(BlockSetConfig(num_blocks=2, area_fraction=0.15), BlockSetConfig(num_blocks=1, area_fraction=0.7))
)
CONFIG = CheckpointConfig(
    objective="vpixel",
    step=3,
    encoder=ENCODER,
    predictor=PREDICTOR,
    predictor_out_width=3 * 2 * 8 * 8,
    view=VIEW,
    mask=MASK,
)
FINGERPRINT = "ab" * 32


def probe_results(
    accuracy: dict[str, dict[str, float]], fingerprints: dict[str, str], num_classes: int = 4
) -> ProbeResults:
    """What `salt-eval probe` would have found, with an interval of 0.1 below and 0.05 above."""
    labels = {
        label: LabelFacts(
            num_classes=num_classes,
            class_names=tuple(map(str, range(num_classes))),
            chance=0.125,
            num_train=120,
            num_test=80,
        )
        for label in next(iter(accuracy.values()))
    }
    return ProbeResults(
        accuracy=accuracy,
        interval={
            name: {label: (value - 0.1, value + 0.05) for label, value in row.items()}
            for name, row in accuracy.items()
        },
        num_correct={name: dict.fromkeys(row, 10) for name, row in accuracy.items()},
        setting={
            name: dict.fromkeys(row, ChosenSetting(lr=1e-3, weight_decay=0.01, val_accuracy=None))
            for name, row in accuracy.items()
        },
        encoders={name: EncoderIdentity(fingerprint=fingerprints[name], view=VIEW) for name in accuracy},
        labels=labels,
        index_hash="cd" * 32,
        reported_on="test",
        protocol="a protocol",
    )


def make_dataset(
    folder: Path, *, labels: bool = True, num_clips: int = 30, splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """A shard of noisy videos: `shade` (3 classes) is their brightness, `side` (2) the lighter half; every
    third is of the second split, or of three."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "toy-000000.tar", "w") as tar:
        for number in range(num_clips):
            shade, side = number % 3, int(rng.integers(2))
            frames = rng.integers(0, 30, (6, 32, 32, 3)) + 20 + 60 * shade
            frames[:, :, 16 * side : 16 * (side + 1)] += 30
            video = encode_mp4(
                [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames.astype(np.uint8)],
                width=32,
                height=32,
                fps=8,
                crf=10,
            )
            sidecar = sidecar_of(
                f"toy/{number:03d}",
                sha256_of(video),
                probe(video),
                labels={"shade": shade, "side": side} if labels else {},
                split=splits[number // 3 % 3] if len(splits) == 3 else splits[number // 3 % 3 == 2],
                source="toy",
            )
            for suffix, data in ((".mp4", video), (".json", sidecar.to_json())):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    class_names = {"shade": ["dark", "middle", "light"], "side": ["left", "right"]} if labels else {}
    write_index(folder, name="toy", kind="packed", class_names=class_names)
    return folder


def make_models(seed: int = 0) -> tuple[Encoder, Any]:
    """An encoder and a predictor with weights from ``seed``."""
    encoder, predictor = Encoder(ENCODER), new_predictor(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    init_weights(encoder, generator, std=0.02)
    predictor.init_weights(generator, std=0.02)
    return encoder.eval(), predictor.eval()


def save(
    directory: Path, config: CheckpointConfig, encoder: Encoder, predictor: Any, online: Encoder | None = None
) -> None:
    """A checkpoint of these models."""
    modules = {"model": encoder, "predictor": predictor} | ({} if online is None else {"online": online})
    save_checkpoint(directory, config, {name: module.state_dict() for name, module in modules.items()}, {})


def make_run(run: Path, data: Path, *, source: str | None = None, seed: int = 0) -> Path:
    """A finished run directory with a real checkpoint and made-up metrics: a teacher, or a student where
    there is a source."""
    encoder, predictor = make_models(seed)
    save(run / "checkpoints" / "step-3", CONFIG, encoder, predictor)
    point_to(run, run / "checkpoints" / "step-3")
    values = {
        "data": str(data), "out": str(run), "steps": 3, "batch_size": 5, "seed": seed,
        "optim": {"warmup_steps": 1},
        "encoder": ENCODER, "predictor": PREDICTOR, "view": VIEW, "mask": MASK,
    }  # fmt: skip
    config = (
        TeacherRun(**values) if source is None else StudentRun(teacher_url="http://127.0.0.1:1", **values)
    )
    (run / "config.yaml").write_text(dump_yaml(config))
    lines = [{"step": step, "loss": 1.0 / step + seed / 10, "flops": 1e9 * step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "objective": "vpixel" if source is None else "salt",
        "source": source,
        "steps": 3,
        "batch_size": 5,
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "flops": lines[-1]["flops"],
        "teacher_wait_ms": None if source is None else 1.5,
        "step_ms": 20.0,
        "num_parameters": {"encoder": 1000, "predictor": 100},
        "teacher": None if source is None else {"fingerprint": FINGERPRINT},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run
