"""`salt-eval`: what a trained encoder is worth."""

from common.command import add_command, console, new_app, run_app
from common.config import ExportConfig, ProbeConfig, ReportConfig


def _probe(config: ProbeConfig) -> None:
    from student_trainer.evaluation.probe_table import run

    run(config)


def _report(config: ReportConfig) -> None:
    from student_trainer.evaluation.report import run

    run(config)


def _export(config: ExportConfig) -> None:
    from common.model.export import export

    export(config, console)


app = new_app("Judges trained encoders, and reports on runs.")
add_command(app, "probe", ProbeConfig, _probe, help="Accuracy of frozen encoders on every label of a data set, by an attentive probe.")
add_command(
    app,
    "export",
    ExportConfig,
    _export,
    help="Write a checkpoint as a Hugging Face VJEPA2 directory, or as a V-JEPA 2 file.\n\n"
    "Example: `salt-eval export --ckpt runs/student-a --format hf --out student-a-hf`",
)
add_command(
    app,
    "report",
    ReportConfig,
    _report,
    positional=("run_dirs",),
    help="One self-contained HTML page about a set of runs: curves, probes, sharing, pictures.",
)


def main() -> None:
    """The command."""
    run_app(app)
