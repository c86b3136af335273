"""Several data sets -> one, as a selection of their samples (arXiv:2509.24317, Appendix A): an index that
points into their tars."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from salt_distill.common.config import MixConfig, MixRecipe, MixSource
from salt_distill.common.config.layers import read_config
from salt_distill.common.console import new_results
from salt_distill.common.data.index import SCHEMA, load_index, write_dataset
from salt_distill.common.data.index_table import MixedFolder, MixedSource
from salt_distill.common.data.making.exclusions import Exclusion, identities_of
from salt_distill.common.draws import words

REASONS = ("other splits", "excluded", "out of range", "duplicates", "same identity", "not drawn")
"""Why a sample is not in the mixture, in the order in which it is asked."""
_OURS = {"index.parquet", "dataset.json"}


class RecipeSource:
    """A data set and what the recipe says about it."""

    def __init__(self, config: MixSource, folder: Path) -> None:
        self.config, self.path = config, folder / config.path
        info, self.index = load_index(self.path)
        if info.kind == "mixture":
            raise ValueError(
                f"sources: got the mixture {config.path}, expected a packed data set: list the sources of the"
                " mixture instead"
            )
        self.name: str = config.name or info.name
        self.class_names = info.class_names
        self.index_hash = info.index_hash


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a mixture takes of one source, and what became of the rest."""

    rows: np.ndarray
    """Positions in the source's index, ascending."""
    removed: dict[str, int]
    """Samples that were not taken, for each of REASONS."""


def mix(config: MixConfig) -> None:
    """Writes the mixture and prints its table. Raises ValueError where the recipe cannot be followed, or OUT
    holds something else."""
    recipe_path, out = Path(config.recipe), Path(config.out)
    recipe, _ = read_config(MixRecipe, recipe_path)
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - _OURS):
        raise ValueError(
            f"got OUT {out}, which holds something else than a mixture, expected a new folder or one that"
            " this command wrote"
        )
    sources = [RecipeSource(source, recipe_path.parent) for source in recipe.sources]
    name, count = Counter(source.name for source in sources).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"sources: got {count} of the name {name!r}, expected a name for each: set `name` where they are"
            " alike"
        )
    exclusions = [Exclusion(exclusion, recipe_path.parent) for exclusion in recipe.exclude]
    taken: set[str] = set()
    selections = [select(source, exclusions, taken, recipe.seed) for source in sources]
    out.mkdir(parents=True, exist_ok=True)
    labels, class_names = _common_labels(sources)
    index = pa.concat_tables(
        [
            _rows(source, selection, its_labels, out)
            for source, selection, its_labels in zip(sources, selections, labels, strict=True)
        ]
    )
    mixed = [
        MixedSource(name=source.name, num_samples=len(selection.rows), weight=source.config.weight)
        for source, selection in zip(sources, selections, strict=True)
    ]
    folders = [
        MixedFolder(path=_relative(source.path, out), index_hash=source.index_hash, removed=selection.removed)
        for source, selection in zip(sources, selections, strict=True)
    ]
    write_dataset(
        out,
        index,
        name=recipe.name,
        kind="mixture",
        class_names=class_names,
        sources=mixed,
        selections=folders,
    )
    _report(recipe, sources, selections, exclusions, index)


def select(source: RecipeSource, exclusions: Sequence[Exclusion], taken: set[str], seed: int) -> Selection:
    """The samples of a source that the recipe asks for; ``taken`` holds the contents and identities that the
    mixture has already, and gets theirs."""
    config, index = source.config, source.index
    rows, removed = np.arange(len(index)), {}

    def keep(reason: str, mask: np.ndarray) -> None:
        nonlocal rows
        removed[reason] = int((~mask).sum())
        rows = rows[mask]

    splits, hashes, seconds = (index[name].to_numpy() for name in ("split", "sha256", "duration_s"))
    if config.split not in ("all", *splits):
        raise ValueError(
            f"sources: {config.path}: got split {config.split!r}, expected one of"
            f" {', '.join(sorted(set(splits)))}, or all"
        )
    keep("other splits", (splits == config.split) | (config.split == "all"))
    keys = _keys(source, rows)
    identities = identities_of(config.identity, keys, f"sources: {config.path}")
    masks = [exclusion.mask(keys, hashes[rows], identities) for exclusion in exclusions]
    identity_of = dict(zip(rows.tolist(), identities, strict=True))
    keep("excluded", ~_any(masks, len(rows)))
    last = np.inf if config.max_duration_s is None else config.max_duration_s
    keep("out of range", (seconds[rows] >= config.min_duration_s) & (seconds[rows] <= last))
    mask = np.ones(len(rows), bool)
    seen: set[str] = set()
    for place, content in enumerate(hashes[rows]):
        mask[place] = content not in taken and content not in seen
        seen.add(content)
    keep("duplicates", mask)
    keep("same identity", np.array([identity_of[row] not in taken for row in rows.tolist()], bool))
    keep("not drawn", _drawn(config, seconds[rows], hashes[rows], seed))
    if not len(rows):
        what = ", ".join(f"{count} {reason}" for reason, count in removed.items() if count)
        raise ValueError(
            f"sources: {config.path}: got no sample for the mixture, expected some; of its {len(index)}"
            f" samples: {what}"
        )
    taken.update(hashes[rows])
    taken.update(identity for row in rows.tolist() if (identity := identity_of[row]) is not None)
    return Selection(rows=rows, removed=removed)


def strata_shares(available: Sequence[int], count: int) -> list[int]:
    """How many samples each stratum gives so that together they are ``count``, or all there are.

    Equal shares; a stratum that has fewer gives all it has, and the others share what it lacks. So the
    numbers of two strata that have samples left differ by at most one.
    """
    shares, remaining = [0] * len(available), count
    for place, stratum in enumerate(sorted(range(len(available)), key=lambda stratum: available[stratum])):
        shares[stratum] = min(available[stratum], remaining // (len(available) - place))
        remaining -= shares[stratum]
    return shares


def _drawn(config: MixSource, seconds: np.ndarray, hashes: np.ndarray, seed: int) -> np.ndarray:
    """Mask of the samples that are drawn: of each stratum those whose hashes with the seed are least, so that
    more contain fewer."""
    mask = np.ones(len(seconds), bool)
    if config.count is None:
        return mask
    inner_edges = np.linspace(config.min_duration_s, config.max_duration_s or 0, config.strata + 1)[1:-1]
    stratum = np.digitize(seconds, inner_edges)  # a sample on an edge belongs to the longer ones
    luck = np.array([words(seed, f"mix {content}", 0, 1)[0] for content in hashes], np.uint64)
    members = [np.flatnonzero(stratum == number) for number in range(config.strata)]
    shares = strata_shares([len(rows) for rows in members], config.count)
    for rows, share in zip(members, shares, strict=True):
        mask[rows[np.argsort(luck[rows], kind="stable")[share:]]] = False
    return mask


def _any(masks: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.logical_or.reduce([np.zeros(length, bool), *masks])


def _keys(source: RecipeSource, rows: np.ndarray) -> list[str]:
    """``source/name`` in the mixture."""
    chosen = source.index.select(["key", "source"]).take(rows)
    pairs = zip(chosen["key"].to_pylist(), chosen["source"].to_pylist(), strict=True)
    return [f"{source.name}/{key.removeprefix(name + '/')}" for key, name in pairs]


def _rows(source: RecipeSource, selection: Selection, labels: dict[str, str], out: Path) -> pa.Table:
    """Rows of the mixture's index."""
    rows = source.index.take(selection.rows)
    tar_of = {tar: _relative(source.path / tar, out) for tar in set(rows["tar"].to_pylist())}
    columns: dict[str, list[Any]] = {
        "key": _keys(source, selection.rows),
        "labels": [[(labels[label], value) for label, value in row] for row in rows["labels"].to_pylist()],
        "source": [source.name] * len(rows),
        "tar": [tar_of[tar] for tar in rows["tar"].to_pylist()],
    }
    for name, values in columns.items():
        rows = rows.set_column(
            SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
        )
    return rows


def _relative(path: Path, out: Path) -> str:
    """So that sources and mixture may move together."""
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()


def _common_labels(sources: Sequence[RecipeSource]) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """For each source its labels' names in the mixture, and the class names; one name with other classes
    becomes ``SOURCE.LABEL``."""
    classes: dict[str, set[tuple[str, ...]]] = {}
    for source in sources:
        for label, names in source.class_names.items():
            classes.setdefault(label, set()).add(tuple(names))
    labels, class_names = [], {}
    for source in sources:
        renamed = {
            label: label if len(classes[label]) == 1 else f"{source.name}.{label}"
            for label in source.class_names
        }
        labels.append(renamed)
        class_names |= {renamed[label]: names for label, names in source.class_names.items()}
    return labels, class_names


def _report(
    recipe: MixRecipe,
    sources: Sequence[RecipeSource],
    selections: Sequence[Selection],
    exclusions: Sequence[Exclusion],
    index: pa.Table,
) -> None:
    """The table of arXiv:2509.24317, Table 2, with what was left out, and what the recipe asked for in
    vain."""
    console = new_results()
    console.print(_table(recipe, sources, selections, index))
    for exclusion in exclusions:
        console.print(
            f"excluded by {exclusion.path}: {exclusion.num_found} samples{_by_identity(exclusion)}; it names"
            f" {exclusion.num_named}",
            highlight=False,
        )
    for source, selection in zip(sources, selections, strict=True):
        if source.config.count is not None and len(selection.rows) < source.config.count:
            console.print(
                f"{source.name}: {source.config.count:,} were asked for, it has {len(selection.rows):,}",
                highlight=False,
            )


def _by_identity(exclusion: Exclusion) -> str:
    return f", {exclusion.num_by_identity} of them by their identity" if exclusion.num_by_identity else ""


def _table(
    recipe: MixRecipe, sources: Sequence[RecipeSource], selections: Sequence[Selection], index: pa.Table
) -> Table:
    reasons = [reason for reason in REASONS if any(selection.removed[reason] for selection in selections)]
    weighted = recipe.sources[0].weight is not None
    table = Table()
    table.add_column("Dataset")
    for title in ("Sample count", *(["weight"] if weighted else []), *reasons):
        table.add_column(title, justify="right")
    for source, selection in zip(sources, selections, strict=True):
        weight = [f"{source.config.weight:g}"] if weighted else []
        table.add_row(
            source.name,
            f"{len(selection.rows):,}",
            *weight,
            *(f"{selection.removed[reason]:,}" for reason in reasons),
        )
    table.add_section()
    totals = (f"{sum(selection.removed[reason] for selection in selections):,}" for reason in reasons)
    table.add_row(f"[bold]{recipe.name}[/]", f"[bold]{len(index):,}[/]", *([""] if weighted else []), *totals)
    return table
