"""The command line ``salt-serve``."""

from salt_distill.common.command import add_command, new_app, run_app
from salt_distill.common.config import (
    CacheGcConfig,
    CacheStatsConfig,
    CacheVerifyConfig,
    DrainConfig,
    PrecomputeConfig,
    RunsConfig,
    ServeConfig,
    StatusConfig,
)

app = new_app(
    "Serve a frozen teacher: `teacher` over HTTP to any number of students, `precompute` to files that need"
    " no teacher any more."
)


add_command(
    app,
    "teacher",
    ServeConfig,
    "salt_distill.teacher_server.app:serve_teacher",
    help=(
        "Serve a frozen teacher; its URL is printed once it is ready. Ctrl-C ends it.\n\n"
        "Example: `salt-serve teacher --ckpt runs/teacher --port 0`"
    ),
)
add_command(
    app,
    "precompute",
    PrecomputeConfig,
    "salt_distill.teacher_server.precompute:precompute",
    help=(
        "Write a frozen teacher's targets to disk or to an object store, for students with `--targets`."
        " Repeat the command to continue one that was killed.\n\nExample: `salt-serve precompute --ckpt"
        " runs/teacher --data SHARDS --views 4 --out TARGETS`"
    ),
)
add_command(
    app,
    "status",
    StatusConfig,
    "salt_distill.teacher_server.status:show_status",
    help=(
        "Show a running teacher service and its counters.\n\nExample: `salt-serve status --url"
        " http://127.0.0.1:8000 --wait 60`"
    ),
)
add_command(
    app,
    "runs",
    RunsConfig,
    "salt_distill.teacher_server.status:show_runs",
    help=(
        "Show the student runs of a teacher service.\n\nExample: `salt-serve runs --url"
        " http://127.0.0.1:8000`"
    ),
)
add_command(
    app,
    "drain",
    DrainConfig,
    "salt_distill.teacher_server.status:drain",
    help=(
        "Let a teacher service take no new requests, and wait until it has answered what it has begun.\n\n"
        "Example: `salt-serve drain --url http://127.0.0.1:8000`"
    ),
)
add_command(
    app,
    "stop",
    DrainConfig,
    "salt_distill.teacher_server.status:stop",
    help=(
        "Drain a teacher service, and end it. Ctrl-C in `salt-serve teacher` does the same.\n\n"
        "Example: `salt-serve stop --url http://127.0.0.1:8000`"
    ),
)

cache = new_app(
    "What a target cache holds (`stats`), whether it is whole (`verify`), and what of it nobody needs (`gc`)."
)
add_command(
    cache,
    "verify",
    CacheVerifyConfig,
    "salt_distill.teacher_server.cache.commands:verify",
    positional=("targets",),
    help=(
        "Read every target of a cache, and name what is damaged or missing.\n\n"
        "Example: `salt-serve cache verify TARGETS --repair --ckpt runs/teacher --data SHARDS`"
    ),
)
add_command(
    cache,
    "stats",
    CacheStatsConfig,
    "salt_distill.teacher_server.cache.commands:show_stats",
    positional=("targets",),
    help="Show what a cache holds: teacher, targets, bytes.\n\nExample: `salt-serve cache stats TARGETS`",
)
add_command(
    cache,
    "gc",
    CacheGcConfig,
    "salt_distill.teacher_server.cache.commands:collect_garbage",
    positional=("targets",),
    help=(
        "Remove files that the manifest does not list and, with `--max-bytes`, the oldest that a service or a"
        " student wrote.\n\nExample: `salt-serve cache gc TARGETS --dry-run`"
    ),
)
app.add_typer(cache, name="cache")


def main() -> None:
    """Entry point."""
    run_app(app)
