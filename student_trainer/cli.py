"""The command line ``salt-train``."""

from salt_distill.common.command import add_command, console, new_app, run_app
from salt_distill.common.config import StudentRun, SweepConfig, TeacherRun, TrainConfig, VJepaRun

app = new_app(
    "Train video encoders by SALT: `teacher` makes a frozen teacher by masked pixel reconstruction, `student`"
    " learns from its latents; `vjepa` is the baseline without a frozen teacher.\n\nThe paper's sizes are"
    " presets; `--preset nano` learns something on a CPU in minutes."
)


def _train(config: TrainConfig) -> None:
    if config.estimate:
        from salt_distill.student_trainer.estimate import run

        run(config)
        return

    from pathlib import Path

    from salt_distill.student_trainer.progress import show_progress
    from salt_distill.student_trainer.run_directory import check_run, claimed

    check_run(config)
    with show_progress(Path(config.out), config.steps, console):
        if config.workers == 0:
            import torch

            from salt_distill.student_trainer.loop import Worker, opened, train_on

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            worker = Worker(rank=0, world_size=1, device=device)
            with claimed(config) as checkpoint, opened(config, worker) as (reader, source):
                train_on(reader, source, config, worker, checkpoint)
        else:
            from salt_distill.student_trainer.job import run_job

            run_job(config)
    pointer = (
        Path(config.out) / "checkpoint"
    )  # with a storage, the first worker may have had its run directory on another machine
    where = (
        f"{config.out}: done, the newest checkpoint is {pointer.read_text().strip()}"
        if pointer.exists()
        else f"{config.storage}: done"
    )
    console.print(where, highlight=False)


def _sweep(config: SweepConfig) -> None:
    from salt_distill.student_trainer.sweep.run import run

    run(config, console)


add_command(
    app,
    "teacher",
    TeacherRun,
    _train,
    default_preset="vit-l",
    help=(
        "Stage 1, V-Pixel: train an encoder by masked pixel reconstruction; it becomes the frozen"
        " teacher.\n\nExample: `salt-train teacher --preset nano --data SHARDS --out runs/teacher`"
    ),
)
add_command(
    app,
    "student",
    StudentRun,
    _train,
    default_preset="vit-l",
    help=(
        "Stage 2, SALT: train a student to predict a frozen teacher's latents. The targets come from a"
        " service (`--teacher-url`), a cache on disk (`--targets`), or a teacher in this process"
        " (`--teacher-ckpt`).\n\nExample: `salt-train student --preset nano --data SHARDS --teacher-url"
        " http://127.0.0.1:8000 --out runs/student-a`"
    ),
)
add_command(
    app,
    "vjepa",
    VJepaRun,
    _train,
    default_preset="vit-l",
    help=(
        "The baseline, V-JEPA 2: the targets come from a moving average of the encoder that learns, which is"
        " also what is judged. Encoder, predictor, masks and optimizer are SALT's, so that a comparison"
        " changes one thing.\n\nExample: `salt-train vjepa --preset nano --data SHARDS --out runs/ema`"
    ),
)
add_command(
    app,
    "sweep",
    SweepConfig,
    _sweep,
    positional=("file",),
    help=(
        "Several students of one teacher, at a time as far as Ray has room, sharing its work; ends in a table"
        " of them. Repeat the command to continue what is not done.\n\nExample: `salt-train sweep sweep.yaml"
        " --teacher-url http://127.0.0.1:8000 --out runs/sweep`"
    ),
)


def main() -> None:
    """Entry point."""
    run_app(app)
