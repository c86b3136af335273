"""`salt-eval flops`: what a run, and the runs that made its teacher, cost."""

import json
from collections.abc import Sequence

from rich import box
from rich.table import Table

from salt_distill.common.config import EncoderConfig, FlopsConfig, PredictorConfig, preset_layer
from salt_distill.common.console import new_results
from salt_distill.common.model.flops import kept_tokens
from salt_distill.common.model.grid import token_grid
from salt_distill.student_trainer.evaluation.fidelity.paper_flops import tables
from salt_distill.student_trainer.evaluation.fidelity.paper_table import HOW_TO_READ, remarks, text_of
from salt_distill.student_trainer.run_flops import NAMES, RunFlops, scientific
from salt_distill.student_trainer.vpixel import pixel_width


def run(config: FlopsConfig) -> None:
    """Prints a table, or JSON."""
    if config.paper:
        _print_paper(as_json=config.json_)
        return
    chain = runs_of(config)
    if config.json_:
        totals = {name: sum(getattr(run, name).total for run in chain) for name in ("six_n_d", "exact")}
        print(json.dumps({"runs": [run.to_json() for run in chain], "total": totals}, indent=2))
    else:
        _print(chain)


def runs_of(config: FlopsConfig) -> list[RunFlops]:
    """The runs that ``config`` means, in the order in which they train; the last one is the run itself."""
    grid = token_grid(config.view, config.encoder)
    kept = kept_tokens(config.mask, grid, seed=config.seed, batch_size=config.batch_size)

    def new(
        objective: str,
        encoder: EncoderConfig,
        predictor: PredictorConfig,
        teacher: EncoderConfig | None,
        steps: int,
    ) -> RunFlops:
        return RunFlops(
            objective=objective,
            encoder=encoder,
            predictor=predictor,
            out_width=pixel_width(encoder) if teacher is None else teacher.width,
            teacher=teacher,
            steps=steps,
            batch_size=config.batch_size,
            grid=grid,
            kept=kept,
        )

    if config.teacher is None:
        return [new("vpixel", config.encoder, config.predictor, None, config.steps)]
    if config.teacher == "ema":
        return [new("vjepa", config.encoder, config.predictor, config.encoder, config.steps)]
    teacher = FlopsConfig.model_validate(preset_layer(FlopsConfig, config.teacher))
    if token_grid(config.view, teacher.encoder) != grid:
        raise ValueError(
            f"got a teacher {config.teacher} with patches of {teacher.encoder.patch_size} pixels and"
            f" {teacher.encoder.tubelet_size} frames, expected the student's {config.encoder.patch_size} and"
            f" {config.encoder.tubelet_size}: both cut a clip into the same tokens"
        )
    chain = []
    for number, steps in enumerate(config.teacher_steps):
        objective, frozen = ("vpixel", None) if number == 0 else ("salt", teacher.encoder)
        chain.append(new(objective, teacher.encoder, teacher.predictor, frozen, steps))
    return [*chain, new("salt", config.encoder, config.predictor, teacher.encoder, config.steps)]


def _print(chain: Sequence[RunFlops]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("run", "part", "weights", "tokens seen", "6ND", "exact", "attention"):
        table.add_column(name, justify="left" if name in ("run", "part") else "right", no_wrap=True)
    for run in chain:
        for number, (part, weights) in enumerate(run.parameters.items()):
            if weights:
                table.add_row(
                    f"{NAMES[run.objective]}, {run.steps:,} steps" if number == 0 else "",
                    part,
                    f"{weights / 1e6:,.2f} M",
                    scientific(run.tokens[part] * run.num_clips),
                    scientific(getattr(run.six_n_d, part)),
                    scientific(getattr(run.exact, part)),
                )
        share = f"{run.exact.attention / run.exact.total:.0%}"
        table.add_row(
            "",
            "together",
            "",
            "",
            scientific(run.six_n_d.total),
            scientific(run.exact.total),
            share,
            end_section=True,
        )
    if len(chain) > 1:
        totals = (scientific(sum(getattr(run, name).total for run in chain)) for name in ("six_n_d", "exact"))
        table.add_row("all runs", "", "", "", *totals)
    console = new_results()
    console.print(table)
    run = chain[-1]
    shares = ", ".join(f"{visible:.1%} and {hidden:.1%}" for visible, hidden in run.shares)
    for sentence in (
        (
            "6ND (arXiv:2509.24317, Appendix F): 6 per weight and token, 2 for a teacher's. In each mask set"
            " the encoder counts a tenth of the tokens, the predictor all."
        ),
        (
            "exact: 2 per multiplication of every matrix product, attention included, at the tokens that the"
            f" masks keep: of {run.grid.num_tokens:,} per clip, {shares} are seen and predicted (mask sets in"
            f" order; mean of {len(run.kept)} mask groups)."
        ),
    ):
        console.print(sentence, highlight=False, soft_wrap=True)


def _print_paper(*, as_json: bool) -> None:
    if as_json:
        cells = [
            {
                "cell": f"{oracle.source}: {oracle.name}",
                "paper": oracle.expected,
                "ours": oracle.find(),
                "holds": oracle.verdict.holds,
                "how": oracle.verdict.words,
                "differs": oracle.differs,
            }
            for table in tables()
            for oracle in table.oracles
        ]
        print(json.dumps(cells, indent=2))
        return
    console = new_results(250)
    console.print(HOW_TO_READ, highlight=False, soft_wrap=True)
    for table in tables():
        drawn = Table(box=box.SIMPLE_HEAD, title=f"{table.title}, printed / ours", title_justify="left")
        for column in table.columns:
            drawn.add_column(column, no_wrap=True)
        for row in table.rows:
            drawn.add_row(*map(text_of, row))
        console.print(drawn)
        for sentence in remarks(table):
            console.print(f"- {sentence}", highlight=False, soft_wrap=True)
