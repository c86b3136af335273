"""``salt-serve cache``: what a target cache holds, whether it is whole, and what of it is not needed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import rich.console
import rich.markup
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from salt_distill.common.config import CacheGcConfig, CacheStatsConfig, CacheVerifyConfig, PrecomputeConfig
from salt_distill.common.console import console
from salt_distill.common.targets import store
from salt_distill.common.targets.codec import CorruptTargetError
from salt_distill.common.targets.locks import writer
from salt_distill.common.targets.segments import SEGMENTS
from salt_distill.common.targets.store import CacheFile, CacheSpec
from salt_distill.common.whole import PARTIAL
from salt_distill.teacher_server.cache.folder import CacheFolder


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
    left, _ = _damage(cache, console)
    if left:
        raise CorruptTargetError(f"{root}: still damaged after the repair: {next(iter(left.values()))[0]}")


def show_stats(config: CacheStatsConfig) -> None:
    """Prints what the cache holds on standard output."""
    cache = _existing(config.targets)
    manifest = cache.manifest()
    spec, listed = _spec(manifest), manifest["files"]
    sizes = {name: size for name, size in cache.sizes().items() if name != store.MANIFEST}
    facts = {
        "teacher": spec.teacher["name"],
        "fingerprint": spec.fingerprint,
        "compute": spec.teacher["compute"],
        "targets": sum(facts["rows"] for facts in listed.values()),
        "tokens": list(spec.shape),
        "target_dtype": spec.target_dtype,
        "views": spec.views,
        "data_seed": spec.data_seed,
        "split": spec.split,
        "skipped": len(manifest["skipped"]),
        "files": len(listed),
        "bytes": sum(sizes[name] for name in listed),
        "unlisted_files": len(sizes.keys() - listed.keys()),
        "unlisted_bytes": sum(size for name, size in sizes.items() if name not in listed),
    }
    if config.json_:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        shown = decimal(value) if name.endswith("bytes") else "-" if value is None else str(value)
        table.add_row(name.replace("_", " "), rich.markup.escape(shown))
    rich.console.Console().print(table)


def collect_garbage(config: CacheGcConfig, console: rich.console.Console = console) -> None:
    """Removes what no student would find: files that no manifest lists, partial ones, and the oldest segments
    beyond ``max_bytes``."""
    root = _of_this_machine(_existing(config.targets))
    with writer(root, alone=True):
        manifest = store.read_manifest(root)
        unlisted = [name for name in _files(root) if name not in manifest["files"]]
        old = _oldest_segments(root, manifest["files"], config.max_bytes)
        freed = sum((root / name).stat().st_size for name in unlisted + old)
        for name in unlisted:
            console.print(f"not in the manifest: {rich.markup.escape(name)}", highlight=False)
        for name in old:
            console.print(
                f"beyond {decimal(config.max_bytes or 0)}: {rich.markup.escape(name)}", highlight=False
            )
        if not config.dry_run:
            left = {name: facts for name, facts in manifest["files"].items() if name not in old}
            store.replace_manifest(root, {**manifest, "files": left})
            for name in unlisted + old:
                (root / name).unlink()  # after the manifest: what that lists is there
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


def _files(root: Path) -> list[str]:
    """Everything in the cache beside its manifest, relative to it."""
    return [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path != root / store.MANIFEST
    ]


def _whole_files(cache: CacheFolder) -> list[str]:
    return [
        name for name in cache.sizes() if name.endswith(".arrow") and not Path(name).name.startswith(PARTIAL)
    ]


def _oldest_segments(root: Path, listed: dict[str, Any], max_bytes: int | None) -> list[str]:
    """The segments to drop, so that all files together have at most ``max_bytes``."""
    total = sum((root / name).stat().st_size for name in listed)
    segments = [name for name in listed if name.startswith(f"{SEGMENTS}/")]
    old = []
    for name in sorted(segments, key=lambda name: (root / name).stat().st_mtime_ns):
        if max_bytes is None or total <= max_bytes:
            break
        old.append(name)
        total -= (root / name).stat().st_size
    return old


def _spec(manifest: dict[str, Any]) -> CacheSpec:
    """What all files should be."""
    return CacheSpec.from_json(
        {name: value for name, value in manifest.items() if name not in ("files", "skipped")}
    )


def _damage(
    cache: CacheFolder, console: rich.console.Console
) -> tuple[dict[str, list[str]], CacheSpec | None]:
    """What is wrong, by file, and what all files should be; None where nobody knows."""
    damage: dict[str, list[str]] = {}
    try:
        manifest = cache.manifest()
        spec, listed = _spec(manifest), manifest["files"]
    except CorruptTargetError as error:
        damage[store.MANIFEST] = [str(error)]
        listed = dict.fromkeys(_whole_files(cache))
        spec = next((spec for name in listed if (spec := _spec_of(cache, name)) is not None), None)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, facts in progress.track(listed.items(), description="files"):
            if spec is not None:
                with cache.at_hand(name) as path:
                    reasons = _damage_of(path, f"{cache.place}/{name}", spec, facts)
                if reasons:
                    damage[name] = reasons
    return damage, spec


def _damage_of(path: Path, called: str, spec: CacheSpec, facts: dict[str, Any] | None) -> list[str]:
    """``facts``: what the manifest says of the file, where there is one."""
    if not path.is_file():
        return [f"{called} is missing"]
    try:
        rows, damage = CacheFile(path, spec, called).check()
    except ValueError as error:
        return [str(error)]
    found = [str(error) for error in damage]
    if facts is not None and not found and (now := store.listing(path, len(rows))) != facts:
        found.append(f"{called}: {store.difference(now, facts)}")
    return found


def _spec_of(cache: CacheFolder, name: str) -> CacheSpec | None:
    """What a file says of itself, where it can be read."""
    with cache.at_hand(name) as path:
        try:
            metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
            return CacheSpec.from_json(json.loads(metadata[b"salt.cache"]))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            return None  # whoever asks what is wrong with it names it


def _repair_precomputed(root: Path, spec: CacheSpec, config: CacheVerifyConfig) -> int:
    """Makes the damaged files again, from videos and teacher; what is whole in them stays. The number of
    targets computed."""
    from salt_distill.teacher_server.cache.target_files import Worker

    if config.ckpt is None or config.data is None:
        raise ValueError(
            "got --repair without --ckpt and --data, expected both: lost targets are computed again from the"
            " videos"
        )
    view, compute = spec.view or {}, spec.teacher["compute"]
    wanted = {
        **{"ckpt": config.ckpt, "data": config.data, "out": str(root), "loader": config.loader},
        **{name: getattr(spec, name) for name in ("views", "data_seed", "split", "target_dtype")},
        **{name: view[name] for name in ("num_frames", "crop_size")},
        "view": {name: view[name] for name in ("frame_step", "scale", "ratio", "flip")},
        "teacher": {
            **{name: compute[name] for name in ("batch_size", "num_threads", "dtype")},
            "compile": compute["compiled"],
        },
    }
    worker = Worker(PrecomputeConfig.model_validate(wanted), device=None)
    made = worker.spec().to_json()
    for name, value in spec.to_json().items():
        if made[name] != value:
            raise ValueError(
                f"{root} holds targets with {name}={value}, expected {made[name]}, which --ckpt and --data"
                " give here"
            )
    try:
        listed = store.read_manifest(root)["files"]
    except CorruptTargetError:
        listed = {}
    files, skipped, num_computed = dict[str, dict[str, Any]](), set[str](), 0
    for task in worker.tasks():
        done = worker.make(task, listed.get(store.file_path(spec, task.view, task.shard)))
        files[done.name] = done.listed
        skipped.update(done.skipped)
        num_computed += done.num_computed
    store.write_manifest(root, spec, files, skipped)
    return num_computed


def _repair_segments(root: Path, spec: CacheSpec, damaged: Iterable[str]) -> int:
    """Drops the targets that are damaged: whoever asks for one has it computed again. How many segments are
    left."""
    files = {}
    for name in _whole_files(CacheFolder(str(root))):
        try:
            rows = CacheFile(root / name, spec).check()[0]
        except ValueError:
            rows = []  # it was named as damaged
        if name in damaged and rows:
            store.write_file(root / name, spec, rows)
        elif name in damaged:
            (root / name).unlink()
        if rows:
            files[name] = store.listing(root / name, len(rows))
    store.write_manifest(root, spec, files, skipped=[])
    return len(files)
