"""The command line ``salt-data``."""

from common.command import add_command, console, new_app, run_app
from common.config import PackConfig, SynthConfig

app = new_app("Make and pack videos: `synth` writes labelled ones, `pack` turns any folder into WebDataset shards.")


def _synth(config: SynthConfig) -> None:
    from common.data.synth import synthesise

    synthesise(config)


def _pack(config: PackConfig) -> None:
    from common.data.pack import pack

    pack(config, console)


add_command(
    app,
    "synth",
    SynthConfig,
    _synth,
    positional=("out",),
    help="Write labelled videos: handwritten digits (label `digit`) that drift in one of eight directions (label `motion`).\n\n"
    "Example: `salt-data synth VIDEOS`",
)
add_command(
    app,
    "pack",
    PackConfig,
    _pack,
    positional=("src", "out"),
    help="Pack videos into WebDataset shards with an index; unreadable files are named and skipped.\n\nExample: `salt-data pack VIDEOS SHARDS`",
)


def main() -> None:
    """Entry point."""
    run_app(app)
