"""``checkpoints/best``: a link to the checkpoint with the least held-out loss, which every reader of
checkpoints follows."""

import os
from pathlib import Path

_NAME = "best"


def best_of(run: Path) -> Path | None:
    """Where it points, in ``run``; None without one."""
    link = run / "checkpoints" / _NAME
    return link.parent / os.readlink(link) if link.is_symlink() else None


def point_to_best(run: Path, step: int, keep_every: int) -> set[Path]:
    """Points it at the checkpoint of ``step``, at once; the one where it pointed before, if that was kept for
    being the best alone. A machine that a run has moved to may lack the checkpoint: then there is no link."""
    link, before, now = run / "checkpoints" / _NAME, best_of(run), run / "checkpoints" / f"step-{step}"
    if not now.is_dir() or before == now:
        return set()
    partial = link.with_name(f".{_NAME}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(now.name)
    partial.replace(link)
    is_kept = before is not None and int(before.name.removeprefix("step-")) % keep_every == 0
    return set() if before is None or is_kept else {before}
