"""The command line ``salt-train``."""

from salt_distill.common.command import add_command, new_app, run_app
from salt_distill.common.config import StudentRun, SweepConfig, TeacherRun, VJepaRun

app = new_app(
    "Train video encoders by SALT: `teacher` makes a frozen teacher by masked pixel reconstruction, `student`"
    " learns from its latents; `vjepa` is the baseline without a frozen teacher.\n\nThe paper's sizes are"
    " presets; `--preset nano` learns something on a CPU in minutes."
)


add_command(
    app,
    "teacher",
    TeacherRun,
    "salt_distill.student_trainer.start:start",
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
    "salt_distill.student_trainer.start:start",
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
    "salt_distill.student_trainer.start:start",
    default_preset="vit-l",
    help=(
        "Train the baseline, V-JEPA 2: the targets come from a moving average of the encoder itself, which is"
        " also what is evaluated. Encoder, predictor, masks and optimizer are SALT's, so that only the source"
        " of the targets differs.\n\nExample: `salt-train vjepa --preset nano --data SHARDS --out runs/ema`"
    ),
)
add_command(
    app,
    "sweep",
    SweepConfig,
    "salt_distill.student_trainer.sweep.run:run",
    positional=("file",),
    help=(
        "Train several students of one teacher, as many at a time as Ray has room for; ends with a table of"
        " them. Repeat the command to continue what is not done.\n\nExample: `salt-train sweep sweep.yaml"
        " --teacher-url http://127.0.0.1:8000 --out runs/sweep`"
    ),
)


def main() -> None:
    """Entry point."""
    run_app(app)
