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

from common.config import CacheGcConfig, CacheStatsConfig, CacheVerifyConfig, PrecomputeConfig
from common.targets import store
from common.targets.codec import CorruptTargetError
from common.targets.locks import writer
from common.targets.segments import SEGMENTS
from common.targets.store import CacheFile, CacheSpec


def verify(config: CacheVerifyConfig, console: rich.console.Console) -> None:
    """Reads the whole cache and names what is wrong; puts it right with ``repair``, else raises CorruptTargetError."""
    root = _existing(config.targets)
    damage, spec = _damage(root, console)
    for reason in (reason for reasons in damage.values() for reason in reasons):
        console.print(f"damaged: {rich.markup.escape(reason)}", highlight=False, soft_wrap=True)
    if not damage:
        console.print(f"{root}: nothing is damaged", highlight=False)
        return
    if not config.repair:
        raise CorruptTargetError(f"{root}: {len(damage)} of its files are damaged: add --repair, and students may use it again")
    if spec is None:
        raise CorruptTargetError(f"{root}: no file in it says what it held: delete it, and precompute again")
    with writer(root, alone=True):
        if spec.views is None:
            console.print(f"{root}: {_repair_segments(root, spec, damage)} segments are left, without what was damaged", highlight=False)
        else:
            console.print(f"{root}: {_repair_precomputed(root, spec, damage, config)} targets computed again", highlight=False)
    left, _ = _damage(root, console)
    if left:
        raise CorruptTargetError(f"{root}: still damaged after the repair: {next(iter(left.values()))[0]}")


def show_stats(config: CacheStatsConfig) -> None:
    """Prints what the cache holds on standard output."""
    root = _existing(config.targets)
    spec, listed = _read(root)
    sizes = {name: (root / name).stat().st_size for name in _files(root)}
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
        "skipped": len(store.read_manifest(root)["skipped"]),
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


def collect_garbage(config: CacheGcConfig, console: rich.console.Console) -> None:
    """Removes what no student would find: files that no manifest lists, partial ones, and the oldest segments beyond ``max_bytes``."""
    root = _existing(config.targets)
    with writer(root, alone=True):
        manifest = store.read_manifest(root)
        unlisted = [name for name in _files(root) if name not in manifest["files"]]
        old = _oldest_segments(root, manifest["files"], config.max_bytes)
        freed = sum((root / name).stat().st_size for name in unlisted + old)
        for name in unlisted:
            console.print(f"not in the manifest: {rich.markup.escape(name)}", highlight=False)
        for name in old:
            console.print(f"beyond {decimal(config.max_bytes or 0)}: {rich.markup.escape(name)}", highlight=False)
        if not config.dry_run:
            left = {name: facts for name, facts in manifest["files"].items() if name not in old}
            store.replace_manifest(root, {**manifest, "files": left})
            for name in unlisted + old:
                (root / name).unlink()  # after the manifest: what that lists is there
        console.print(f"{root}: {decimal(freed)} {'would be freed' if config.dry_run else 'freed'}", highlight=False)


def _existing(targets: str) -> Path:
    root = Path(targets)
    if not root.is_dir():
        raise ValueError(f"got {root}, expected the folder of a target cache, as `salt-serve precompute` writes it")
    return root


def _files(root: Path) -> list[str]:
    """Everything in the cache beside its manifest, relative to it."""
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file() and path != root / store.MANIFEST]


def _whole_files(root: Path) -> list[str]:
    return [name for name in _files(root) if name.endswith(".arrow") and not Path(name).name.startswith(store.PARTIAL)]


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


def _read(root: Path) -> tuple[CacheSpec, dict[str, Any]]:
    """What all files should be, and what the manifest says of each."""
    manifest = store.read_manifest(root)
    return CacheSpec.from_json({name: value for name, value in manifest.items() if name not in ("files", "skipped")}), manifest["files"]


def _damage(root: Path, console: rich.console.Console) -> tuple[dict[str, list[str]], CacheSpec | None]:
    """What is wrong, by file, and what all files should be; None where nobody knows."""
    damage: dict[str, list[str]] = {}
    try:
        spec, listed = _read(root)
    except CorruptTargetError as error:
        damage[store.MANIFEST] = [str(error)]
        listed = dict.fromkeys(_whole_files(root))
        spec = next((spec for name in listed if (spec := _spec_of(root / name)) is not None), None)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, facts in progress.track(listed.items(), description="files"):
            if spec is not None and (reasons := _damage_of(root / name, spec, facts)):
                damage[name] = reasons
    return damage, spec


def _damage_of(path: Path, spec: CacheSpec, facts: dict[str, Any] | None) -> list[str]:
    """``facts``: what the manifest says of the file, where there is one."""
    if not path.is_file():
        return [f"{path} is missing"]
    try:
        rows, damage = CacheFile(path, spec).check()
    except ValueError as error:
        return [str(error)]
    found = [str(error) for error in damage]
    if facts is not None and not found and (now := store.listing(path, len(rows))) != facts:
        found.append(f"{path}: got {now['rows']} rows with sha256 {now['sha256']}, expected {facts['rows']} with {facts['sha256']}")
    return found


def _spec_of(path: Path) -> CacheSpec | None:
    """What a file says of itself, where it can be read."""
    try:
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
        return CacheSpec.from_json(json.loads(metadata[b"salt.cache"]))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None  # whoever asks what is wrong with it names it


def _repair_precomputed(root: Path, spec: CacheSpec, damaged: Iterable[str], config: CacheVerifyConfig) -> int:
    """Makes the damaged files again, from videos and teacher; what is whole in them stays. The number of targets computed."""
    from teacher_server.target_files import Worker

    if config.ckpt is None or config.data is None:
        raise ValueError("got --repair without --ckpt and --data, expected both: lost targets are computed again from the videos")
    view, compute = spec.view or {}, spec.teacher["compute"]
    wanted = {
        **{"ckpt": config.ckpt, "data": config.data, "out": str(root), "loader": config.loader},
        **{name: getattr(spec, name) for name in ("views", "data_seed", "split", "target_dtype")},
        **{name: view[name] for name in ("num_frames", "crop_size")},
        "view": {name: view[name] for name in ("frame_step", "scale", "ratio", "flip")},
        "teacher": {**{name: compute[name] for name in ("batch_size", "num_threads", "dtype")}, "compile": compute["compiled"]},
    }
    worker = Worker(PrecomputeConfig.model_validate(wanted), device=None)
    made = worker.spec().to_json()
    for name, value in spec.to_json().items():
        if made[name] != value:
            raise ValueError(f"{root} holds targets with {name}={value}, expected {made[name]}, which --ckpt and --data give here")
    files, skipped, num_computed = dict[str, int](), set[str](), 0
    for task in worker.tasks():
        name = store.file_path(spec, task.view, task.shard)
        done = worker.make(task, anew=name in damaged)
        files[name] = done.num_rows
        skipped.update(done.skipped)
        num_computed += done.num_computed
    store.write_manifest(root, spec, files, skipped)
    return num_computed


def _repair_segments(root: Path, spec: CacheSpec, damaged: Iterable[str]) -> int:
    """Drops the targets that are damaged: whoever asks for one has it computed again. How many segments are left."""
    files = {}
    for name in _whole_files(root):
        try:
            rows = CacheFile(root / name, spec).check()[0]
        except ValueError:
            rows = []  # it was named as damaged
        if name in damaged and rows:
            store.write_file(root / name, spec, rows)
        elif name in damaged:
            (root / name).unlink()
        if rows:
            files[name] = len(rows)
    store.write_manifest(root, spec, files, skipped=[])
    return len(files)
