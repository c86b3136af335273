"""Golden losses: ten steps of each objective through the real loop. ``python tests/test_golden.py`` records
them anew."""

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from train_tools import ALONE, CPU, RandomClips, tensors_of

from salt_distill.common.config import StudentRun, TeacherComputeConfig, TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.model.checkpoint import save_checkpoint
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.targets.local_targets import LocalTargets

GOLDEN = Path(__file__).parent / "golden"
RUN = {
    "data": "none",
    "steps": 10,
    "batch_size": 30,  # a mask group of 24 and one of 6
    "seed": 3,
    "log_every": 1,
    "init_std": 0.07,
    "encoder": {"width": 96, "depth": 4, "num_heads": 3, "mlp_width": 384, "patch_size": 8},
    "predictor": {"width": 48, "depth": 2, "num_heads": 2, "mlp_width": 192},
    "view": {"num_frames": 8, "frame_step": 1, "crop_size": 32},
    "mask": {"sets": [{"num_blocks": 8, "area_fraction": 0.15}, {"num_blocks": 2, "area_fraction": 0.7}],
    "truncate": "first"},
    "optim": {"lr": 5e-4, "start_lr": 2e-4, "final_lr": 1e-6, "warmup_steps": 3, "weight_decay": 0.04,
    "final_weight_decay": 0.4, "clip_grad": 0.5},
    "compute": {"dtype": "float32"},
}  # fmt: skip
RUNS: dict[str, tuple[type[TrainConfig], dict]] = {
    "vpixel": (TeacherRun, {"pixel_norm": "channel"}),
    "salt": (StudentRun, {"teacher_ckpt": "a teacher with random weights", "target_dtype": "float16"}),
    "vjepa": (VJepaRun, {"ema": {"start": 0.9, "end": 1.0}}),
}


def run(objective: str, out: Path) -> list[float]:
    """The losses of a golden run."""
    config_class, values = RUNS[objective]
    config = config_class.model_validate(RUN | values | {"out": str(out)})
    sources = []
    if isinstance(config, StudentRun):
        teacher, checkpoint_config = new_objective(
            TeacherRun.model_validate(RUN | {"out": str(out), "seed": 4})
        )
        save_checkpoint(out / "teacher", checkpoint_config, tensors_of(teacher), {})
        frozen = Teacher.load(out / "teacher", TeacherComputeConfig(), CPU)
        sources = [LocalTargets(frozen, config.target_dtype)]
    out.mkdir(exist_ok=True)
    train_on(RandomClips(config.view.clip_shape), sources, config, ALONE, None)  # type: ignore[arg-type]
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def here() -> dict[str, str | int]:
    """What decides the last bits. The processor's name too: libraries choose their kernels by more than the
    vector extension."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": names[0] if names else platform.processor(),
        "num_threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("objective", RUNS)
def test_ten_steps_give_the_golden_losses(objective, tmp_path):
    golden = json.loads((GOLDEN / f"{objective}.json").read_text())
    losses = run(objective, tmp_path / "run")
    if golden["recorded_with"] == here():
        assert losses == golden["losses"]
    else:
        np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            golden = {"recorded_with": here(), "losses": run(name, Path(folder) / "run")}
        (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=2) + "\n")
