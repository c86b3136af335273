"""The report's page as HTML: one file, nothing loaded from outside, light or dark as the reader wants."""

import functools

import jinja2

from salt_distill.student_trainer.evaluation.report.blocks import ReportPage


def html_of(page: ReportPage) -> str:
    """The whole document; every text is escaped."""
    environment = _environment()
    style, _, _ = environment.loader.get_source(environment, "style.css")  # type: ignore[union-attr]
    return environment.get_template("page.html").render(page=page, style=style)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("salt_distill.student_trainer.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def quantity(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.23 GB."""
    size, prefix = decimal_prefix(value)
    return f"{value / size:.3g} {prefix}{unit}"


def decimal_prefix(value: float) -> tuple[float, str]:
    """The size and the letter that a number of this size is told with: 1e9 and G."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return size, prefix
    return 1.0, ""


def duration(seconds: float) -> str:
    """For people: 36 s, 12.3 min, 4.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
