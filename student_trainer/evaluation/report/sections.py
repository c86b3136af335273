"""The parts of the report, each from what it needs to its HTML."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from salt_distill.common.config import FrozenConfig, LoaderConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    load_predictor,
    load_vit,
    open_encoder,
    read_config,
)
from salt_distill.common.pictures import (
    CONTEXT,
    DROPPED,
    DROPPED_COLOUR,
    TARGET,
    TARGET_COLOUR,
    describe,
    strip,
    tint_masks,
    token_roles,
)
from salt_distill.student_trainer.evaluation import panels, pictures
from salt_distill.student_trainer.evaluation.report import page
from salt_distill.student_trainer.evaluation.report.figures import (
    Bar,
    Curve,
    Point,
    accuracy_against_flops,
    accuracy_bars,
    loss_curves,
)
from salt_distill.student_trainer.evaluation.report.lineage import training_flops
from salt_distill.student_trainer.evaluation.report.sharing import Sharing
from salt_distill.student_trainer.evaluation.runs import Run

TARGETS = {
    ("vpixel", None): "pixels",
    ("salt", "service"): "served",
    ("salt", "cache"): "cached",
    ("salt", "in-process"): "in-process",
    ("vjepa", None): "moving average",
}
"""What a run learned to predict, and where it came from."""


def headline(runs: Sequence[Run], probe: dict[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of runs, plain text: for the page, and in part for the terminal."""
    labels = list(probe["labels"]) if probe else []
    header = ["run", "targets", "weights", "steps", "compute", "loss", "step", "wait", *labels]
    rows = []
    for run in runs:
        summary = run.summary
        wait = summary["teacher_wait_ms"]
        rows.append(
            [
                run.name,
                TARGETS[run.objective, summary["source"]],
                page.quantity(summary["num_parameters"]["encoder"], "").strip(),
                f"{summary['steps']:,}",
                page.quantity(summary["flops"], "FLOP"),
                f"{summary['loss_first']:.3f} \u2192 {summary['loss_last']:.3f}",
                f"{summary['step_ms']:.0f} ms",
                "-" if wait is None else f"{wait:.1f} ms",
                *(_accuracy(probe, run.name, label) for label in labels),
            ]
        )
    for name, row in (probe["accuracy"] if probe else {}).items():
        if name not in {run.name for run in runs}:  # random-init has an accuracy, but is no run
            rows.append(
                [name, *["-"] * (len(header) - 1 - len(labels)), *(f"{row[label]:.3f}" for label in labels)]
            )
    return header, rows


def curves(runs: Sequence[Run]) -> str:
    """Loss curves: runs whose losses may be compared stand in one chart."""
    charts: dict[tuple[str, str], list[Curve]] = {}
    for colour, run in enumerate(runs):
        # A moving target makes every V-JEPA run a chart of its own; V-Pixel losses have one target, the
        # pixels.
        group = {"vpixel": "", "salt": run.teacher_fingerprint or "", "vjepa": run.name}[run.objective]
        curve = Curve(
            name=run.name,
            colour=colour,
            steps=[line["step"] for line in run.metrics],
            flops=[line["flops"] for line in run.metrics],
            losses=[line["loss"] for line in run.metrics],
        )
        charts.setdefault((run.objective, group), []).append(curve)
    parts = []
    for number, ((objective, group), members) in enumerate(charts.items()):
        names = ", ".join(curve.name for curve in members)
        title, explained, loss_name = {
            "vpixel": (
                f"Stage 1: {names}",
                "Mean squared error of the hidden cubes' normalised pixels.",
                "MSE",
            ),
            "salt": (
                f"Stage 2, teacher {group[:12]}: {names}",
                (
                    "L1 to the frozen teacher's latents. The target does not move, so these losses may be"
                    " compared with each other."
                ),
                "L1",
            ),
            "vjepa": (
                f"EMA baseline: {names}",
                "L1 to the moving average's latents: the target moves, so this loss says little by itself.",
                "L1",
            ),
        }[objective]
        parts += [
            page.heading(title),
            page.note(explained),
            page.panel(loss_curves(members, chart_id=f"loss{number}", loss_name=loss_name)),
        ]
    return page.section("Losses", *parts)


def probe_bars(runs: Sequence[Run], probe: Mapping[str, Any]) -> str:
    """The probe's accuracies as bars with their intervals and the chance level, and as numbers."""
    colours = {run.name: colour for colour, run in enumerate(runs)}
    accuracy, interval, labels = probe["accuracy"], probe["interval"], probe["labels"]
    bars = {
        label: [
            Bar(name=name, colour=colours.get(name), value=row[label], interval=tuple(interval[name][label]))
            for name, row in accuracy.items()
        ]
        for label in labels
    }
    numbers = [
        [name, *(_with_interval(row[label], interval[name][label]) for label in labels)]
        for name, row in accuracy.items()
    ]
    numbers.append(["chance", *(f"{fact['chance']:.3f}" for fact in labels.values())])
    clips = next(iter(labels.values()))
    learned = f"learned on {clips['num_train']:,} clips, scored on {clips['num_test']:,} others"
    return page.section(
        "Frozen-backbone probe",
        page.text(f"An attentive probe on frozen features, {learned}: {probe['protocol']}."),
        page.panel(
            accuracy_bars(bars, {label: fact["chance"] for label, fact in labels.items()}, chart_id="probe")
        ),
        page.note(
            "Thin lines: 95% Wilson interval over the test clips. Dashed: always naming the training split's"
            " most common class."
        ),
        page.table(
            ["encoder", *(f"{label} ({fact['num_classes']} classes)" for label, fact in labels.items())],
            numbers,
        ),
    )


def accuracy_and_compute(
    runs: Sequence[Run], probe: Mapping[str, Any], teachers: Mapping[str, Run | None]
) -> str | None:
    """Accuracy against what a run and its teachers cost to train; None where fewer than two runs have
    both."""
    flops = {run.name: training_flops(run, teachers) for run in runs}
    by_label = {
        label: [
            Point(
                name=run.name,
                colour=colour,
                flops=cost,
                value=probe["accuracy"][run.name][label],
                interval=tuple(probe["interval"][run.name][label]),
            )
            for colour, run in enumerate(runs)
            if (cost := flops[run.name]) is not None and run.name in probe["accuracy"]
        ]
        for label in probe["labels"]
    }
    if not by_label or len(next(iter(by_label.values()))) < 2:
        return None
    unknown = [run.name for run in runs if flops[run.name] is None]
    without = (
        f" Without {', '.join(unknown)}: their teacher's training is not among these runs." if unknown else ""
    )
    return page.section(
        "Accuracy against compute",
        page.text(
            "A student's compute is its own, with its teacher's forwards, and the whole training of the"
            " teacher it learned from: several students of one teacher pay that once, but here each counts it"
            " in full. Dashed: the Pareto front, the best accuracy up to each cost." + without
        ),
        page.panel(accuracy_against_flops(by_label, chart_id="pareto")),
    )


def latents(runs: Sequence[Run], teachers: Mapping[str, Run | None]) -> str:
    """What encoders make of a clip, which the first run has: components over time, and where students'
    predictions agree with their teachers."""
    found = _shown_clip(runs[0])
    assert not isinstance(found, str), "its masks are shown on it before"
    key, clip, config = found
    same = [run for run in runs if read_config(run.path).view.clip_shape == clip.shape]
    shown = [page.figure(pictures.png(strip(clip, config.encoder.tubelet_size)), f"The clip {key}")]
    for run in same:
        [panel] = panels.components(open_encoder(FrozenConfig(ckpt=str(run.path))), clip[None])
        shown.append(page.figure(pictures.png(strip(panel.frames, panel.tubelet_size)), panel.title))
    agreements = []
    for run in same:
        teacher = teachers[run.name]
        if teacher is not None:
            own = read_config(run.path)
            group = pictures.masks_of(
                own, seed=run.config["seed"], step=own.step, batch_size=run.config["batch_size"]
            )
            [predicted] = panels.predictions(run.path, run.name, group, clip[None], teacher=str(teacher.path))
            agreements += [
                page.figure(pictures.png(strip(panel.frames, panel.tubelet_size)), panel.title)
                for panel in predicted
            ]
    parts = [
        page.text(
            "The first three principal components of each encoder's tokens as colours: patterns compare"
            " between encoders, colours do not."
        ),
        page.columns(shown),
    ]
    if agreements:
        parts += [
            page.heading("Predictions against targets"),
            page.text(
                "How close the prediction of each hidden token came to its teacher's latent: dark at a cosine"
                " of 0, yellow at 1. What the student saw is grey."
            ),
            page.columns(agreements),
        ]
    return page.section("Latents", *parts)


def sharing(shared: Sharing, runs: Sequence[Run]) -> str:
    """The service's counters, and what sharing one teacher saved."""
    served = [run.name for run in runs if run.summary["source"] == "service"]
    cached = [run for run in runs if run.summary["source"] == "cache"]
    counters = [
        (f"{shared.clips_served:,}", "targets served"),
        (f"{shared.clips_computed:,}", "clips the teacher computed"),
        (f"{shared.coalesced:,}", "joined a computation under way"),
        (f"{shared.from_memory:,}", "answered from memory"),
        (page.quantity(shared.bytes_in, "B"), "received"),
        (page.quantity(shared.bytes_out, "B"), "sent"),
    ]
    if shared.forward_s > 0:
        counters.append(
            (f"{shared.clips_computed / shared.forward_s:,.0f} clips/s", "in the teacher's forward")
        )
    share = shared.forwards_avoided / max(1, shared.clips_served)
    saved = [
        (f"{shared.forwards_avoided:,}", f"teacher forwards avoided, {share:.0%} of the targets"),
        (page.quantity(shared.flops_saved, "FLOP"), "of teacher compute not spent (2ND)"),
        (page.quantity(shared.bytes_not_uploaded, "B"), "of pixels not uploaded"),
    ]
    against = "Against a teacher that every student runs, and uploads to, for itself."
    why = "A target depends on the clip alone, so students that share a data seed share their targets."
    parts = [
        page.facts(counters),
        page.heading(f"Saved by sharing: {', '.join(served)}"),
        page.facts(saved),
        page.note(f"{against} {why}"),
    ]
    for run in cached:
        num_clips = run.summary["steps"] * run.summary["batch_size"]
        parts.append(
            page.text(
                f"{run.name} read its {num_clips:,} targets from the cache on disk, with no teacher running."
            )
        )
    return page.section("The teacher service", *parts)


def masks_and_reconstruction(run: Run) -> tuple[list[str], str | None]:
    """Sections with the run's masks on a real clip and, for V-Pixel, what it paints into them; or no section
    and why."""
    found = _shown_clip(run)
    if isinstance(found, str):
        return [], found
    key, clip, config = found
    group = pictures.masks_of(
        config, seed=run.config["seed"], step=config.step, batch_size=run.config["batch_size"]
    )
    tubelet = config.encoder.tubelet_size
    shown = []
    for mask_set, mask in zip(config.mask.sets, group.sets, strict=True):
        roles = token_roles(mask, 0, config.grid.num_tokens)
        count = [int((roles == role).sum()) for role in (CONTEXT, TARGET, DROPPED)]
        caption = f"{describe(mask_set)}: {count[0]} tokens seen, {count[1]} predicted, {count[2]} neither"
        shown.append(page.figure(pictures.png(strip(tint_masks(clip, roles, config.grid), tubelet)), caption))
    dropped = "neither: cut off so that all clips of a mask group keep equally many"
    colours = page.colour_key(
        [(TARGET_COLOUR, "predicted (the rest, as it is, is seen)"), (DROPPED_COLOUR, dropped)]
    )
    explained = (
        f"What the run {run.name} hid of a real clip in step {config.step}. "
        "Every set is drawn for every clip; a frozen teacher never sees them."
    )
    original = page.figure(
        pictures.png(strip(clip, tubelet)),
        f"The clip {key}: the first frame of each of its {config.grid.t} tubelets",
    )
    sections = [
        page.section("Masks", page.text(explained), page.columns([original]), colours, page.columns(shown))
    ]
    if run.objective == "vpixel":
        sections.append(_reconstruction(run, config, clip, group))
    return sections, None


def seconds_per_step(seconds: Mapping[str, float]) -> str:
    """Where the time of a script went."""
    total = sum(seconds.values())
    rows = [(name, f"{value:.1f} s", value) for name, value in seconds.items()]
    return page.section(f"Seconds: {total:.0f} in all", page.bar_table(("step", "time"), rows))


def _reconstruction(
    run: Run, config: CheckpointConfig, clip: UInt8[np.ndarray, "t h w 3"], group: pictures.MaskGroup
) -> str:
    encoder, predictor = load_vit(run.path), load_predictor(run.path)
    columns = []
    for set_idx, (mask_set, mask) in enumerate(zip(config.mask.sets, group.sets, strict=True)):
        made = pictures.reconstruct(
            clip,
            mask,
            0,
            set_idx,
            encoder=encoder,
            predictor=predictor,
            config=config,
            pixel_norm=run.config["pixel_norm"],
        )
        shown = [page.heading(describe(mask_set))]
        for title, frames in (
            ("Visible input", made.visible),
            ("Prediction", made.prediction),
            ("Original", clip),
        ):
            shown.append(page.figure(pictures.png(strip(frames, config.encoder.tubelet_size)), title))
        columns.append("".join(shown))
    explained = (
        f"What the run {run.name} paints into the hidden cubes from the visible ones. It predicts normalised"
        " pixels: the mean and the deviation of each cube are taken from the input, so a cube's brightness"
        " and contrast are given, and only its pattern is the model's."
    )
    return page.section("V-Pixel reconstruction", page.text(explained), page.columns(columns))


def _shown_clip(run: Run) -> tuple[str, UInt8[np.ndarray, "t h w 3"], CheckpointConfig] | str:
    """The evaluation view of a run's first sample that can be decoded, among a few, with its key; or why
    there is none."""
    data = Path(run.config["data"])
    if not data.is_dir():
        return f"No pictures: the data set of {run.name}, {data}, is not there (looked from {Path.cwd()})."
    config = read_config(run.path)
    reader = Reader(
        str(data), data_seed=0, views=1, view=config.view, split=run.config["split"], loader=LoaderConfig()
    )
    samples = list(itertools.islice(itertools.chain.from_iterable(reader.samples), 8))
    batch = reader.evaluation(samples)
    reader.close()
    for sample, pixels, good in zip(samples, batch.pixels, batch.good, strict=True):
        if good:
            return sample.key, pixels, config
    return f"No pictures: none of the first clips of {data} can be decoded."


def _accuracy(probe: dict[str, Any] | None, name: str, label: str) -> str:
    if probe is None or name not in probe["accuracy"]:
        return "-"
    return f"{probe['accuracy'][name][label]:.3f}"


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f}  [{interval[0]:.3f}, {interval[1]:.3f}]"
