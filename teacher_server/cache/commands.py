"""``salt-serve cache``: what a target cache holds, whether it is whole, and what of it is not needed."""

import contextlib
import json
import os
import stat
from collections.abc import Container, Mapping
from pathlib import Path

import rich.console
import rich.markup
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from salt_distill.common.config import CacheGcConfig, CacheStatsConfig, CacheVerifyConfig, PrecomputeConfig
from salt_distill.common.console import console, new_results
from salt_distill.common.targets.cache_file import CacheFile, file_path, spec_of, write_file
from salt_distill.common.targets.codec import CorruptTargetError
from salt_distill.common.targets.locks import writer
from salt_distill.common.targets.manifest import (
    MANIFEST,
    SEGMENTS,
    CacheSpec,
    FileListing,
    Manifest,
    is_file_name,
    is_own_name,
)
from salt_distill.teacher_server.cache.cache_folder import CacheFolder


def verify(config: CacheVerifyConfig, console: rich.console.Console = console) -> None:
    """Reads the whole cache and names what is wrong; puts it right with ``repair``, else raises
    CorruptTargetError."""
    cache = _existing(config.targets)
    if config.repair and cache.local is None:
        raise ValueError(
            f"got --repair with {cache.place}, expected a folder of this machine: repeat the `salt-serve"
            " precompute` that made it, with the same flags. It checks every file, and makes what is damaged"
            " again"
        )
    damage, spec = _damage(cache, console)
    for reason in (reason for reasons in damage.values() for reason in reasons):
        console.print(f"damaged: {rich.markup.escape(reason)}", highlight=False, soft_wrap=True)
    if not damage:
        console.print(f"{cache.place}: nothing is damaged", highlight=False)
        return
    if not config.repair:
        how = "add --repair" if cache.local is not None else "repeat its `salt-serve precompute`"
        raise CorruptTargetError(
            f"{cache.place}: {len(damage)} of its files are damaged: {how}, and students may use it again"
        )
    root = _of_this_machine(cache)
    if spec is None:
        raise CorruptTargetError(f"{root}: no file in it says what it held: delete it, and precompute again")
    with writer(root, alone=True):
        if spec.views is None:
            console.print(
                f"{root}: {_repair_segments(root, spec, damage)} segments are left, without what was damaged",
                highlight=False,
            )
        else:
            console.print(
                f"{root}: {_repair_precomputed(root, spec, config)} targets computed again", highlight=False
            )
    still_damaged, _ = _damage(cache, console)
    if still_damaged:
        raise CorruptTargetError(
            f"{root}: still damaged after the repair: {next(iter(still_damaged.values()))[0]}"
        )


def show_stats(config: CacheStatsConfig) -> None:
    """Prints what the cache holds on standard output."""
    cache = _existing(config.targets)
    manifest = cache.manifest()
    spec = manifest.spec
    sizes = {name: size for name, size in cache.sizes().items() if name != MANIFEST}
    facts = {
        "teacher": spec.teacher.name,
        "fingerprint": spec.fingerprint,
        "compute": spec.teacher.compute,
        "targets": sum(listing.rows for listing in manifest.files.values()),
        "tokens": list(spec.shape),
        "target_dtype": spec.target_dtype,
        "views": spec.views,
        "data_seed": spec.data_seed,
        "split": spec.split,
        "skipped": len(manifest.skipped),
        "files": len(manifest.files),
        "bytes": sum(sizes.get(name, 0) for name in manifest.files),
        "unlisted_files": len(sizes.keys() - manifest.files.keys()),
        "unlisted_bytes": sum(size for name, size in sizes.items() if name not in manifest.files),
    }
    if config.json_:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        cell = decimal(value) if name.endswith("bytes") else "-" if value is None else str(value)
        table.add_row(name.replace("_", " "), rich.markup.escape(cell))
    new_results().print(table)


def collect_garbage(config: CacheGcConfig, console: rich.console.Console = console) -> None:
    """Removes what no student would find: files that no manifest lists, partial ones, and the oldest segments
    beyond ``max_bytes``. What no cache writes stays, and links are not followed."""
    root = _of_this_machine(_existing(config.targets))
    with writer(root, alone=True):
        manifest = Manifest.read(root)
        files, foreign = _files(root)
        for name in foreign:
            console.print(f"not of a cache, and left alone: {rich.markup.escape(name)}", highlight=False)
        unlisted = [name for name in files if name not in manifest.files]
        oldest = _oldest_segments(manifest, files, config.max_bytes)
        for name in unlisted:
            console.print(f"not in the manifest: {rich.markup.escape(name)}", highlight=False)
        for name in oldest:
            console.print(
                f"beyond {decimal(config.max_bytes or 0)}: {rich.markup.escape(name)}", highlight=False
            )
        if not config.dry_run:
            newest = {name: listing for name, listing in manifest.files.items() if name not in oldest}
            manifest.model_copy(update={"files": newest}).write(root)
            _remove(root, {*unlisted, *oldest})  # after the manifest: what that lists is there
        freed = sum(files[name].st_size for name in (*unlisted, *oldest))
        console.print(
            f"{root}: {decimal(freed)} {'would be freed' if config.dry_run else 'freed'}", highlight=False
        )


def _existing(targets: str) -> CacheFolder:
    cache = CacheFolder(targets)
    if not (cache.sizes() if cache.local is None else cache.local.is_dir()):
        raise ValueError(
            f"got {cache.place}, expected the folder of a target cache, as `salt-serve precompute` writes it"
        )
    return cache


def _of_this_machine(cache: CacheFolder) -> Path:
    if cache.local is None:
        raise ValueError(
            f"got {cache.place}, expected a folder of this machine: nothing is written through to an object"
            " store, and what its manifest does not list is removed with the store's own tools"
        )
    return cache.local


def _files(root: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """The files beside the manifest that a cache writes, by their names in it; and what else is there."""
    files, foreign = dict[str, os.stat_result](), list[str]()
    for folder, subfolders, names, descriptor in os.fwalk(root, follow_symlinks=False):
        for name in (*names, *subfolders):
            path = Path(folder, name).relative_to(root).as_posix()
            facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if path == MANIFEST or stat.S_ISDIR(facts.st_mode):
                continue
            if stat.S_ISREG(facts.st_mode) and is_own_name(path):
                files[path] = facts
            else:
                foreign.append(path)
    return dict(sorted(files.items())), foreign


def _remove(root: Path, names: Container[str]) -> None:
    """Removes files of a cache, in the folder that each was found in, whatever has become of the folder's
    name."""
    for folder, _, files, descriptor in os.fwalk(root, follow_symlinks=False):
        for name in files:
            if Path(folder, name).relative_to(root).as_posix() in names:
                os.unlink(name, dir_fd=descriptor)


def _whole_files(cache: CacheFolder) -> list[str]:
    return [name for name in cache.sizes() if is_file_name(name)]


def _oldest_segments(
    manifest: Manifest, files: Mapping[str, os.stat_result], max_bytes: int | None
) -> list[str]:
    """The segments to drop, so that all files together have at most ``max_bytes``."""
    listed = {name: files[name] for name in manifest.files if name in files}
    total = sum(facts.st_size for facts in listed.values())
    segments = [name for name in listed if name.startswith(f"{SEGMENTS}/")]
    oldest = []
    for name in sorted(segments, key=lambda name: listed[name].st_mtime_ns):
        if max_bytes is None or total <= max_bytes:
            break
        oldest.append(name)
        total -= listed[name].st_size
    return oldest


def _damage(
    cache: CacheFolder, console: rich.console.Console
) -> tuple[dict[str, list[str]], CacheSpec | None]:
    """What is wrong, by file, and what all files should be; None where nobody knows."""
    damage: dict[str, list[str]] = {}
    try:
        manifest = cache.manifest()
        spec, listings = manifest.spec, dict[str, FileListing | None](manifest.files)
    except CorruptTargetError as error:
        damage[MANIFEST] = [str(error)]
        listings = dict.fromkeys(_whole_files(cache))
        spec = next((spec for name in listings if (spec := _spec_of(cache, name)) is not None), None)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, listing in progress.track(listings.items(), description="files"):
            if spec is not None:
                with cache.at_hand(name) as path:
                    reasons = _damage_of(path, f"{cache.place}/{name}", spec, listing)
                if reasons:
                    damage[name] = reasons
    return damage, spec


def _damage_of(path: Path, called: str, spec: CacheSpec, listing: FileListing | None) -> list[str]:
    """``listing``: what the manifest says of the file, where there is one."""
    if not path.is_file():
        return [f"{called} is missing"]
    try:
        whole, damage = CacheFile(path, spec, called).check()
    except ValueError as error:
        return [str(error)]
    if damage:
        return [str(error) for error in damage]
    if listing is not None and (now := FileListing.of(path, len(whole))) != listing:
        return [f"{called}: {now.difference(listing)}"]
    return []


def _spec_of(cache: CacheFolder, name: str) -> CacheSpec | None:
    with cache.at_hand(name) as path:
        return spec_of(path)


def _repair_precomputed(root: Path, spec: CacheSpec, config: CacheVerifyConfig) -> int:
    """Makes the damaged files again, from videos and teacher; what is whole in them stays. The number of
    targets computed."""
    from salt_distill.teacher_server.cache.target_files import TargetMaker

    if config.ckpt is None or config.data is None:
        raise ValueError(
            "got --repair without --ckpt and --data, expected both: lost targets are computed again from the"
            " videos"
        )
    view, compute = spec.to_json()["view"], spec.teacher.compute
    values = {
        **{"ckpt": config.ckpt, "data": config.data, "out": str(root), "loader": config.loader},
        **{name: getattr(spec, name) for name in ("views", "data_seed", "split", "target_dtype")},
        **{name: view[name] for name in ("num_frames", "crop_size")},
        "view": {name: view[name] for name in view.keys() - {"num_frames", "crop_size", "version"}},
        "teacher": {
            **{name: compute[name] for name in ("batch_size", "num_threads", "dtype")},
            "compile": compute["compiled"],
        },
    }
    maker = TargetMaker(PrecomputeConfig.model_validate(values), device=None)
    if (difference := spec.difference(maker.spec())) is not None:
        raise ValueError(f"{root} holds targets with {difference}, which --ckpt and --data give here")
    listings = dict[str, FileListing]()
    with contextlib.suppress(CorruptTargetError):
        listings = Manifest.read(root).files
    files, skipped, num_computed = dict[str, FileListing](), set[str](), 0
    for task in maker.tasks():
        done = maker.make(task, listings.get(file_path(spec, task.view, task.shard)))
        files[done.name] = done.listing
        skipped.update(done.skipped)
        num_computed += done.num_computed
    Manifest(spec=spec, files=files, skipped=tuple(skipped)).write(root)
    return num_computed


def _repair_segments(root: Path, spec: CacheSpec, damaged: Container[str]) -> int:
    """Drops the targets that are damaged: whoever asks for one has it computed again. How many segments are
    left."""
    listings, lost = dict[str, FileListing](), set[str]()
    for name in _files(root)[0]:
        if not is_file_name(name):
            continue
        path = root / name
        try:
            file = CacheFile(path, spec)
            whole, _ = file.check()
        except ValueError:
            whole = []
        if not whole:
            if name in damaged:
                lost.add(name)
            continue  # what was not named as damaged stays: `gc` names what the manifest does not list
        if len(whole) != len(file) or name in damaged:
            write_file(path, spec, file.rows(whole))
        listings[name] = FileListing.of(path, len(whole))
    Manifest(spec=spec, files=listings).write(root)
    _remove(root, lost)
    return len(listings)
