"""`salt-plan`: the plan as tables, or as JSON."""

import json
import math
from typing import Any

import rich.markup
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from salt_distill.common.config import PlanConfig
from salt_distill.common.plan.arithmetic import (
    Choice,
    best,
    cache,
    in_process,
    num_runs,
    passes_per_month,
    serve,
    serve_by_size,
    sharing_gain,
)
from salt_distill.common.plan.facts import Facts, gather

NUM_LIMITS_SHOWN = 4


def run(config: PlanConfig) -> None:
    """Prints the plan, and draws it into ``config.chart``."""
    facts = gather(config)
    choices = plan(facts, replicas=config.teacher_replicas)
    if config.chart is not None:
        from salt_distill.common.plan.chart import draw

        draw(choices, config.chart)
    if config.json_:
        print(json.dumps(to_json(facts, choices), indent=2))
    else:
        _print(facts, choices)


def plan(facts: Facts, *, replicas: int | None) -> list[Choice]:
    """What there is to choose from."""
    given = (facts.teacher, facts.students, facts.work, facts.site)
    choices = [serve(*given, replicas=replicas), cache(*given), in_process(*given)]
    if (
        len(facts.students) > 1 and replicas is None and facts.site.num_gpus is None
    ):  # else what there is would have to be divided
        choices.insert(1, serve_by_size(*given))
    return choices


def to_json(facts: Facts, choices: list[Choice]) -> dict[str, Any]:
    """Plain types; rates per second, sizes in bytes, prices in dollars."""
    runs = num_runs(facts.students)
    return {
        "teacher": {
            **vars(facts.teacher),
            "flops": facts.teacher_flops,
            "source": facts.teacher_speed.source,
        },
        "students": [
            {
                **vars(student),
                "source": speed.source,
                "gpus_that_one_teacher_gpu_feeds": facts.teacher.clips_per_s / student.clips_per_s,
                "teacher_share": share,
                "sharing_saves": sharing_gain(share, runs),
            }
            for student, speed, share in zip(
                facts.students, facts.student_speeds, facts.teacher_shares, strict=True
            )
        ],
        "clips_per_run": facts.work.num_slots,
        "choices": [_choice_json(choice) for choice in choices],
        "best": best(choices).name,
        "cache_pays_above_passes_per_month": _finite(passes_per_month(facts.teacher, facts.site)),
    }


def _choice_json(choice: Choice) -> dict[str, Any]:
    fields = {name: value for name, value in vars(choice).items() if name != "limits"}
    totals = {
        "hours": choice.hours,
        "gpu_hours": choice.gpu_hours,
        "price": choice.price,
        "clips_per_s": choice.binding.clips_per_s,
    }
    limits = [limit._asdict() for limit in sorted(choice.limits, key=lambda limit: limit.clips_per_s)]
    return {**fields, **totals, "binds": choice.binding.what, "limits": limits}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _print(facts: Facts, choices: list[Choice]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 150)  # a wide table is read by scrolling, not cut off
    console.print(_sizes(facts))
    console.print(_choices(choices))
    for sentence in _sentences(facts, choices):
        console.print(sentence, soft_wrap=True)


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _sizes(facts: Facts) -> Table:
    table = _table(
        "",
        "runs",
        "GPUs each",
        "clips/s of a GPU",
        "a teacher GPU feeds",
        "its share",
        "sharing saves",
        "speed from",
    )
    table.add_row(
        "teacher",
        "",
        "",
        f"{facts.teacher.clips_per_s:,.1f}",
        "",
        "",
        "",
        rich.markup.escape(facts.teacher_speed.source),
    )
    for student, speed, share in zip(facts.students, facts.student_speeds, facts.teacher_shares, strict=True):
        table.add_row(
            student.name,
            str(student.runs),
            str(student.gpus),
            f"{student.clips_per_s:,.1f}",
            f"{facts.teacher.clips_per_s / student.clips_per_s:,.1f} GPUs",
            f"{share:.0%}",
            f"{sharing_gain(share, num_runs(facts.students)):.0%}",
            rich.markup.escape(speed.source),
        )
    return table


def _choices(choices: list[Choice]) -> Table:
    table = _table(
        "",
        "replicas",
        "clips/s of a run",
        "bound by",
        "hours",
        "GPU hours",
        "teacher's",
        "uploaded",
        "sent",
        "on disk",
        "price",
    )
    cheapest = best(choices)
    for choice in choices:
        table.add_row(
            choice.name,
            str(choice.replicas or ""),
            f"{choice.binding.clips_per_s:,.1f}",
            choice.binding.what,
            _number(choice.hours),
            _number(choice.gpu_hours),
            _number(choice.teacher_gpu_hours),
            *(
                decimal(size) if size else ""
                for size in (choice.bytes_to_teacher, choice.bytes_from_teacher, choice.disk_bytes)
            ),
            f"${_number(choice.price)}",
            style="bold" if choice is cheapest else "dim" if choice.refused else "",
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _sentences(facts: Facts, choices: list[Choice]) -> list[str]:
    cheapest = best(choices)
    others = [choice for choice in choices if choice is not cheapest and choice.refused is None]
    dearer = "; ".join(
        f"{choice.name} ${_number(choice.price)} and {_number(choice.hours)} h" for choice in others
    )
    verdict = {
        "serve": f"Serve it from {cheapest.replicas} replica{'s' if cheapest.replicas > 1 else ''}",
        "serve by size": (
            f"Serve it to each size in a group of its own, from {cheapest.replicas} replicas in all"
        ),
        "cache": "Cache the targets",
        "in-process": "Let each student compute its targets in its own process",
    }[cheapest.name]
    sentences = [f"[bold]{verdict}[/]: ${_number(cheapest.price)} and {_number(cheapest.hours)} h; {dearer}."]
    sentences += [
        f"Not to be had: {choice.name}, {choice.refused}." for choice in choices if choice.refused is not None
    ]
    for choice in choices:
        ranked = sorted(choice.limits, key=lambda limit: limit.clips_per_s)[:NUM_LIMITS_SHOWN]
        sentences.append(
            f"{choice.name} allows, in clips/s of a run: "
            + ", ".join(f"{what} {_number(rate)}" for what, rate in ranked)
        )
    passes = passes_per_month(facts.teacher, facts.site)
    return [
        *sentences,
        (
            f"A target of {decimal(facts.teacher.target_bytes)} is kept for a month at the price of"
            f" {_number(passes)} forwards; a teacher's forward is {facts.teacher_flops / 1e12:.3g} TFLOP. Its"
            " share and what sharing saves are of the 6ND of a step, per run."
        ),
    ]
