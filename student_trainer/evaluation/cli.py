"""`salt-eval`: what a trained encoder is worth."""

from salt_distill.common.command import add_command, console, new_app, run_app
from salt_distill.common.config import (
    PROTOCOLS,
    ExportConfig,
    FidelityConfig,
    FlopsConfig,
    PhysicsConfig,
    PicturesConfig,
    ProbeConfig,
    RankConfig,
    ReportConfig,
    SelectConfig,
)


def _probe(config: ProbeConfig) -> None:
    from salt_distill.student_trainer.evaluation.probe.run import run

    run(config)


def _physics(config: PhysicsConfig) -> None:
    from salt_distill.student_trainer.evaluation.physics.run import run

    run(config)


def _rank(config: RankConfig) -> None:
    from salt_distill.student_trainer.evaluation.rank import run

    run(config)


def _select(config: SelectConfig) -> None:
    from salt_distill.student_trainer.evaluation.select import run

    run(config)


def _report(config: ReportConfig) -> None:
    from salt_distill.student_trainer.evaluation.report.build import run

    run(config)


def _pictures(config: PicturesConfig) -> None:
    from salt_distill.student_trainer.evaluation.gallery import run

    run(config)


def _flops(config: FlopsConfig) -> None:
    from salt_distill.student_trainer.evaluation.flops_table import run

    run(config)


def _fidelity(config: FidelityConfig) -> None:
    from salt_distill.student_trainer.evaluation.fidelity.page import run

    run(config)


def _export(config: ExportConfig) -> None:
    from salt_distill.common.model.export import export

    export(config, console)


app = new_app("Judges trained encoders, reports on runs, and accounts for the method.")
add_command(
    app,
    "probe",
    ProbeConfig,
    _probe,
    presets=PROTOCOLS,
    help=(
        "Accuracy of frozen encoders on every label of a data set, by an attentive probe; in this process, or"
        " shared by `--workers` of Ray.\n\nExample: `salt-eval probe --preset ssv2 --ckpt runs/student-a"
        " --data ssv2-shards --out probe.json`"
    ),
)
add_command(
    app,
    "physics",
    PhysicsConfig,
    _physics,
    help=(
        "How often a student is more surprised by the impossible video of a pair: IntPhys, GRASP,"
        " InfLevel.\n\nExample: `salt-eval physics --ckpt runs/student-a --teacher runs/teacher --data scenes"
        " --out physics.json`"
    ),
)
add_command(
    app,
    "rank",
    RankConfig,
    _rank,
    help=(
        "RankMe and k-NN accuracy of frozen encoders, without training anything.\n\n"
        "Example: `salt-eval rank --ckpt runs/teacher --ckpt runs/student-a --data shards --out rank.json`"
    ),
)
add_command(
    app,
    "select",
    SelectConfig,
    _select,
    positional=("run_dirs",),
    help=(
        "The loss of every checkpoint on held-out clips against probe accuracy, and the accuracy that it"
        " predicts for runs not probed.\n\nExample: `salt-eval select runs/student-* --teacher runs/teacher"
        " --data shards --probe probe.json --out select.json`"
    ),
)
add_command(
    app,
    "export",
    ExportConfig,
    _export,
    help=(
        "Write a checkpoint as a Hugging Face VJEPA2 directory, or as a V-JEPA 2 file.\n\n"
        "Example: `salt-eval export --ckpt runs/student-a --format hf --out student-a-hf`"
    ),
)
add_command(
    app,
    "report",
    ReportConfig,
    _report,
    positional=("run_dirs",),
    help=(
        "One self-contained HTML page about a set of runs: curves, probes, predicted accuracies, sharing,"
        " pictures."
    ),
)
add_command(
    app,
    "pictures",
    PicturesConfig,
    _pictures,
    help=(
        "What encoders make of clips, a picture and a short video of each: principal components over time,"
        " masks, what stage 1 paints, and where a student's predictions agree with its teacher.\n\nExample:"
        " `salt-eval pictures --ckpt runs/teacher --ckpt runs/student-a --teacher runs/teacher --data SHARDS"
        " --out pictures`"
    ),
)
add_command(
    app,
    "flops",
    FlopsConfig,
    _flops,
    default_preset="vit-l",
    help=(
        "The compute of a run and of its teacher's training: the paper's 6ND, and every matrix product at the"
        " tokens that the masks keep.\n\nExample: `salt-eval flops --preset vit-g --teacher vit-l --steps"
        " 160000 --teacher-steps 80000`"
    ),
)
add_command(
    app,
    "fidelity",
    FidelityConfig,
    _fidelity,
    help=(
        "Every number that the paper and the reference code give about the method beside ours: writes"
        " docs/fidelity.md."
    ),
)


def main() -> None:
    """The command."""
    run_app(app)
