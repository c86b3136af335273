"""What the rounding of targets costs: bytes, and the student's loss after the same steps against targets that
are not rounded at all.

`python benchmarks/targets.py --ckpt RUNS/teacher --data SHARDS`; results are in docs/targets.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from salt_distill.common.config import StudentRun, preset_layer
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets import codec
from salt_distill.student_trainer.loop import Worker, train_on
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.targets.local_targets import LocalTargets

LAST_STEPS = 50
"""Whose losses are averaged."""


class ExactTargets(LocalTargets):
    """Targets of a teacher in this process as it computes them: float32."""

    def _compute(self, batch):
        out = torch.empty(len(batch.good), self.spec.num_tokens, self.spec.width)
        size = int(self.spec.compute["batch_size"])
        for first in range(0, len(out), size):
            out[first : first + size] = self._teacher.forward(batch.pixels[first : first + size])
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="the frozen teacher")
    parser.add_argument("--data", required=True, help="packed shards, all of whose videos decode")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    losses = {
        dtype: [loss_after(arguments, seed, dtype) for seed in range(arguments.seeds)]
        for dtype in ("float32", *codec.TARGET_DTYPES)
    }
    for dtype, of_seeds in losses.items():
        differences = [loss - exact for loss, exact in zip(of_seeds, losses["float32"], strict=True)]
        print(
            json.dumps(
                {
                    "dtype": dtype,
                    "losses": of_seeds,
                    "differences": differences,
                    "mean": statistics.mean(differences),
                }
            )
        )


def loss_after(arguments, seed, dtype):
    """Mean loss of the last steps of a run with its own seeds of initialisation and masks, on the same
    clips."""
    with tempfile.TemporaryDirectory() as out:
        values = {
            **{
                "data": arguments.data,
                "out": out,
                "steps": arguments.steps,
                "seed": seed,
                "views": 1,
                "workers": 0,
                "log_every": 1,
            },
            **{"teacher_ckpt": arguments.ckpt, "optim": {"warmup_steps": arguments.steps // 10}},
        }
        preset = preset_layer(StudentRun, arguments.preset)
        config = StudentRun.model_validate(
            {**preset, **values, "optim": {**preset["optim"], **values["optim"]}}
        )
        teacher = Teacher.load(arguments.ckpt, config.teacher, torch.device("cpu"))
        source = ExactTargets(teacher, "float16") if dtype == "float32" else LocalTargets(teacher, dtype)
        reader = Reader(
            config.data, data_seed=0, views=1, view=config.view, split="train", loader=config.loader
        )
        torch.set_num_threads(config.num_threads)
        train_on(reader, [source], config, Worker(rank=0, world_size=1, device=torch.device("cpu")), None)
        source.close()
        reader.close()
        return statistics.mean(line["loss"] for line in read_metrics(Path(out))[-LAST_STEPS:])


if __name__ == "__main__":
    main()
