"""The command line ``salt-plan``."""

from salt_distill.common.command import command_app, run_app
from salt_distill.common.config import PlanConfig

app = command_app(
    PlanConfig,
    "salt_distill.common.plan.show:run",
    help=(
        "Compare three ways to give students their targets, a service, a cache, or a teacher in their own"
        " process: time, bytes and money of each, and what limits it.\n\nExample: `salt-plan --student"
        " vit-l,runs=4,gpus=8 --gpu h100 --link-gbps 100 --decode-clips-per-s 416 --disk-gb-per-s 7`"
    ),
)


def main() -> None:
    """Entry point."""
    run_app(app)
