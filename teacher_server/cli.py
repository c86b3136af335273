"""The command line ``salt-serve``."""

from salt_distill.common.command import add_command, console, new_app, run_app
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


def _teacher(config: ServeConfig) -> None:
    from salt_distill.teacher_server.app import serve_teacher

    serve_teacher(config, console)


def _precompute(config: PrecomputeConfig) -> None:
    from salt_distill.teacher_server.precompute import precompute

    precompute(config, console)


def _verify(config: CacheVerifyConfig) -> None:
    from salt_distill.teacher_server.cache.commands import verify

    verify(config, console)


def _stats(config: CacheStatsConfig) -> None:
    from salt_distill.teacher_server.cache.commands import show_stats

    show_stats(config)


def _gc(config: CacheGcConfig) -> None:
    from salt_distill.teacher_server.cache.commands import collect_garbage

    collect_garbage(config, console)


def _status(config: StatusConfig) -> None:
    from salt_distill.teacher_server.status import show_status

    show_status(config)


def _runs(config: RunsConfig) -> None:
    from salt_distill.teacher_server.status import show_runs

    show_runs(config)


def _drain(config: DrainConfig) -> None:
    from salt_distill.teacher_server.status import drain

    drain(config, stop=False)


def _stop(config: DrainConfig) -> None:
    from salt_distill.teacher_server.status import drain

    drain(config, stop=True)


add_command(
    app,
    "teacher",
    ServeConfig,
    _teacher,
    help=(
        "Serve a frozen teacher; its URL is printed once it is ready. Ctrl-C ends it.\n\n"
        "Example: `salt-serve teacher --ckpt runs/teacher --port 0`"
    ),
)
add_command(
    app,
    "precompute",
    PrecomputeConfig,
    _precompute,
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
    _status,
    help=(
        "Show a running teacher service and its counters.\n\nExample: `salt-serve status --url"
        " http://127.0.0.1:8000 --wait 60`"
    ),
)
add_command(
    app,
    "runs",
    RunsConfig,
    _runs,
    help=(
        "Show the student runs of a teacher service.\n\nExample: `salt-serve runs --url"
        " http://127.0.0.1:8000`"
    ),
)
add_command(
    app,
    "drain",
    DrainConfig,
    _drain,
    help=(
        "Let a teacher service take no new requests, and wait until it has answered what it has begun.\n\n"
        "Example: `salt-serve drain --url http://127.0.0.1:8000`"
    ),
)
add_command(
    app,
    "stop",
    DrainConfig,
    _stop,
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
    _verify,
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
    _stats,
    positional=("targets",),
    help="Show what a cache holds: teacher, targets, bytes.\n\nExample: `salt-serve cache stats TARGETS`",
)
add_command(
    cache,
    "gc",
    CacheGcConfig,
    _gc,
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
