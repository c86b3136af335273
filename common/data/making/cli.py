"""The command line ``salt-data``."""

from salt_distill.common.command import add_command, console, new_app, run_app
from salt_distill.common.config import InspectConfig, MixConfig, PackConfig, ScenesConfig, SynthConfig

app = new_app(
    "Videos as a data set: `synth` makes labelled ones, `pack` turns any folder into WebDataset shards, `mix`"
    " selects from several, `inspect` shows what is in them."
)


def _synth(config: SynthConfig) -> None:
    from salt_distill.common.data.making.synth import synthesise

    synthesise(config)


def _scenes(config: ScenesConfig) -> None:
    from salt_distill.common.data.making.scenes import make_scenes

    make_scenes(config)


def _pack(config: PackConfig) -> None:
    from salt_distill.common.data.making.pack import pack

    pack(config, console)


def _mix(config: MixConfig) -> None:
    from salt_distill.common.data.making.mix import mix

    mix(config)


def _inspect(config: InspectConfig) -> None:
    from salt_distill.common.data.making.inspect import inspect

    inspect(config)


add_command(
    app,
    "synth",
    SynthConfig,
    _synth,
    positional=("out",),
    help=(
        "Write labelled videos: handwritten digits (label `digit`) that drift in one of eight directions"
        " (label `motion`).\n\nExample: `salt-data synth VIDEOS`"
    ),
)
add_command(
    app,
    "scenes",
    ScenesConfig,
    _scenes,
    positional=("out",),
    help=(
        "Write pairs of possible and impossible videos, in IntPhys's folders, for `salt-eval"
        " physics`.\n\nExample: `salt-data scenes SCENES`"
    ),
)
add_command(
    app,
    "pack",
    PackConfig,
    _pack,
    positional=("src", "out"),
    help=(
        "Pack videos, frame folders or images into WebDataset shards with an index; unreadable files are"
        " named and skipped. A killed run continues where it was.\n\nExample: `salt-data pack VIDEOS SHARDS`"
    ),
)
add_command(
    app,
    "mix",
    MixConfig,
    _mix,
    positional=("recipe", "out"),
    help=(
        "Select from several packed data sets: counts, durations, no duplicates, no validation samples."
        " Copies no video.\n\nExample: `salt-data mix RECIPE.yaml MIXTURE`, with `name: MIXTURE` and"
        " `sources: [SHARDS, OTHER_SHARDS]` in the recipe"
    ),
)
add_command(
    app,
    "inspect",
    InspectConfig,
    _inspect,
    positional=("data",),
    default_preset="vit-l",
    help=(
        "Show what a data set holds, and what a model would see of it.\n\nExample: `salt-data inspect SHARDS"
        " --sheet sheet.png`"
    ),
)


def main() -> None:
    """Entry point."""
    run_app(app)
