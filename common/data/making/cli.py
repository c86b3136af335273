"""The command line ``salt-data``."""

from salt_distill.common.command import add_command, new_app, run_app
from salt_distill.common.config import (
    InspectConfig,
    MixConfig,
    PackConfig,
    PretextConfig,
    ScenesConfig,
    SynthConfig,
)

app = new_app(
    "Videos as a data set: `synth` makes labelled ones, `pack` turns any folder into WebDataset shards, `mix`"
    " selects from several, `inspect` shows what is in them."
)


add_command(
    app,
    "synth",
    SynthConfig,
    "salt_distill.common.data.making.synth:synthesise",
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
    "salt_distill.common.data.making.scenes:make_scenes",
    positional=("out",),
    help=(
        "Write pairs of possible and impossible videos, in IntPhys's folders, for `salt-eval"
        " physics`.\n\nExample: `salt-data scenes SCENES`"
    ),
)
add_command(
    app,
    "pretext",
    PretextConfig,
    "salt_distill.common.data.making.pretext:make_pretext",
    positional=("src", "out"),
    help=(
        "Cut labelled clips from unlabelled videos: which way time runs (label `arrow`), how fast it plays"
        " (`speed`), whether its halves were exchanged (`order`), which video it is from"
        " (`origin`).\n\nExample: `salt-data pretext VIDEOS CLIPS`, then `salt-data pack CLIPS SHARDS`"
    ),
)
add_command(
    app,
    "pack",
    PackConfig,
    "salt_distill.common.data.making.pack:pack",
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
    "salt_distill.common.data.making.mix:mix",
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
    "salt_distill.common.data.making.inspect:inspect",
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
