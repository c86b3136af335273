"""What is told of finished runs: ``salt-eval report`` and ``salt-eval table``."""

from typing import Literal, Self

from pydantic import model_validator

from salt_distill.common.config.base import Config


class ReportConfig(Config):
    """One page about a set of runs."""

    run_dirs: tuple[str, ...] = ()
    """Run directories."""
    runs: str | None = None
    """Folder of run directories; its probe.json, select.json, server.json and steps.tsv are read where they
    exist."""
    out: str | None = None
    """The page; summary.json is written beside it. None: report.html in the folder of `--runs`."""

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval",)

    @model_validator(mode="after")
    def _has_runs(self) -> Self:
        if not self.run_dirs and self.runs is None:
            raise ValueError("got no runs, expected run directories, or --runs FOLDER")
        if self.out is None and self.runs is None:
            raise ValueError(
                "got no --out, expected a path for the page: only with --runs is there a folder for it"
            )
        return self


class TableConfig(Config):
    """`salt-eval table`: finished runs and what was measured of them."""

    run_dirs: tuple[str, ...] = ()
    """Run directories: students, and their teachers too."""
    runs: str | None = None
    """Folder of run directories, all of which are taken."""
    layout: Literal["runs", "paper"] = "runs"
    """`runs`: a row each. `paper`: Tables 9, 12, 13, 14 and 16 of arXiv:2509.24317 with their numbers; what
    was not run stays empty."""
    probe: tuple[str, ...] = ()
    """NAME=FILE: a benchmark and a JSON file of `salt-eval probe` on it. `--layout paper` knows k400, ssv2,
    in1k, coin, diving48 and jester."""
    label: str | None = None
    """Label whose accuracy is meant; none: the only one of each file."""
    physics: tuple[str, ...] = ()
    """JSON file of `salt-eval physics`; it knows its benchmark."""
    out: str | None = None
    """Markdown file of the tables; none: they are printed alone."""
    json_: bool = False
    """One JSON list for programs, instead of tables for people."""

    @property
    def probes(self) -> list[tuple[str, str]]:
        """Benchmarks and files."""
        pairs = (entry.partition("=") for entry in self.probe)
        return [(name, path) for name, _, path in pairs]

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if not self.run_dirs and self.runs is None:
            raise ValueError("got no runs, expected run directories, or --runs FOLDER")
        for entry in self.probe:
            name, equals, path = entry.partition("=")
            if not (name and equals and path):
                raise ValueError(f"got --probe {entry}, expected NAME=FILE, such as k400=probe-k400.json")
            if self.layout == "paper" and name not in _PROBED:
                raise ValueError(
                    f"got --probe {entry} with --layout paper, expected its name to be one of"
                    f" {', '.join(_PROBED)}"
                )
        return self


_PROBED = ("k400", "ssv2", "in1k", "coin", "diving48", "jester")
