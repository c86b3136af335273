"""`salt-eval`: what a trained encoder is worth."""

from salt_distill.common.command import add_command, new_app, run_app
from salt_distill.common.config import (
    PROTOCOLS,
    EmbedConfig,
    ExportConfig,
    FidelityConfig,
    FlopsConfig,
    PhysicsConfig,
    PicturesConfig,
    PredictConfig,
    ProbeConfig,
    RankConfig,
    ReportConfig,
    SelectConfig,
    SimilarConfig,
    TableConfig,
)

app = new_app("Judges trained encoders, reports on runs, and accounts for the method.")
add_command(
    app,
    "probe",
    ProbeConfig,
    "salt_distill.student_trainer.evaluation.probe.run:run",
    presets=PROTOCOLS,
    help=(
        "Train an attentive probe, a small classifier, on frozen encoders, and measure its accuracy on every"
        " label of a data set.\n\nExample: `salt-eval probe --preset ssv2 --ckpt runs/student-a"
        " --data ssv2-shards --out probe.json`"
    ),
)
add_command(
    app,
    "predict",
    PredictConfig,
    "salt_distill.student_trainer.evaluation.probe.predict:run",
    positional=("videos",),
    help=(
        "Classify videos by a kept probe: class and probability, for each view and for all.\n\nExample:"
        " `salt-eval predict --probe probe.safetensors VIDEOS --out predictions.csv`"
    ),
)
add_command(
    app,
    "embed",
    EmbedConfig,
    "salt_distill.student_trainer.evaluation.embed.run:run",
    positional=("videos",),
    help=(
        "Write features of a folder of videos, without packing or labels: a row for each video or each window"
        " of it.\n\nExample: `salt-eval embed --ckpt runs/student-a VIDEOS --window 2 --out features.parquet`"
    ),
)
add_command(
    app,
    "similar",
    SimilarConfig,
    "salt_distill.student_trainer.evaluation.embed.similar:run",
    positional=("features",),
    help=(
        "Find the clips that are nearest to one of them, in the file of `salt-eval embed`.\n\nExample:"
        " `salt-eval similar features.parquet --query cat.mp4 --out similar.csv`"
    ),
)
add_command(
    app,
    "physics",
    PhysicsConfig,
    "salt_distill.student_trainer.evaluation.physics.run:run",
    help=(
        "Measure how often a model is more surprised by the impossible video of a pair than by the possible"
        " one: IntPhys, GRASP, InfLevel.\n\nExample: `salt-eval physics --ckpt runs/student-a --teacher"
        " runs/teacher --data scenes --out physics.json`"
    ),
)
add_command(
    app,
    "rank",
    RankConfig,
    "salt_distill.student_trainer.evaluation.rank:run",
    help=(
        "Measure RankMe and k-nearest-neighbour accuracy of frozen encoders, without training.\n\n"
        "Example: `salt-eval rank --ckpt runs/teacher --ckpt runs/student-a --data shards --out rank.json`"
    ),
)
add_command(
    app,
    "select",
    SelectConfig,
    "salt_distill.student_trainer.evaluation.select:run",
    positional=("run_dirs",),
    help=(
        "Compare the held-out loss of every checkpoint with its probe's accuracy, and predict the accuracy of"
        " runs without a probe.\n\nExample: `salt-eval select runs/student-* --teacher runs/teacher"
        " --data shards --probe probe.json --out select.json`"
    ),
)
add_command(
    app,
    "export",
    ExportConfig,
    "salt_distill.student_trainer.evaluation.probe.classifier_export:run",
    help=(
        "Write a checkpoint as a Hugging Face VJEPA2 directory, or as a V-JEPA 2 file.\n\n"
        "Example: `salt-eval export --ckpt runs/student-a --format hf --out student-a-hf`"
    ),
)
add_command(
    app,
    "report",
    ReportConfig,
    "salt_distill.student_trainer.evaluation.report.build:run",
    positional=("run_dirs",),
    help=(
        "Write one self-contained HTML page about a set of runs: curves, probes, predicted accuracies,"
        " sharing, pictures."
    ),
)
add_command(
    app,
    "table",
    TableConfig,
    "salt_distill.student_trainer.evaluation.table.run:run",
    positional=("run_dirs",),
    help=(
        "Print a table of finished runs with their results: a row for each, or the paper's tables with their"
        " numbers.\n\nExample: `salt-eval table runs/* --layout paper --probe k400=probe-k400.json --probe"
        " ssv2=probe-ssv2.json --physics physics.json`"
    ),
)
add_command(
    app,
    "pictures",
    PicturesConfig,
    "salt_distill.student_trainer.evaluation.gallery:run",
    help=(
        "Draw what encoders see in clips, a picture and a short video of each: principal components over"
        " time, masks, reconstructed pixels, and where a student's predictions agree with its"
        " teacher.\n\nExample: `salt-eval pictures --ckpt runs/teacher --ckpt runs/student-a --teacher"
        " runs/teacher --data SHARDS --out pictures`"
    ),
)
add_command(
    app,
    "flops",
    FlopsConfig,
    "salt_distill.student_trainer.evaluation.flops_table:run",
    default_preset="vit-l",
    help=(
        "Count the compute of a run and of its teacher's training: by the paper's 6ND, and by every matrix"
        " product for the tokens that the masks keep.\n\nExample: `salt-eval flops --preset vit-g --teacher"
        " vit-l --steps 160000 --teacher-steps 80000`"
    ),
)
add_command(
    app,
    "fidelity",
    FidelityConfig,
    "salt_distill.student_trainer.evaluation.fidelity.page:run",
    help=(
        "Write docs/fidelity.md: every number that the paper and the reference code give about the method,"
        " beside ours."
    ),
)


def main() -> None:
    """The command."""
    run_app(app)
