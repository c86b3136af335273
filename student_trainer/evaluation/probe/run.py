"""`salt-eval probe`: the accuracy of several frozen encoders on every label of a data set."""

import shutil
import time
from functools import partial
from pathlib import Path

import torch

from salt_distill.common.config import ProbeConfig
from salt_distill.common.console import console, new_results
from salt_distill.common.devices import device_here
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.untouched import left_as_it_was
from salt_distill.student_trainer.evaluation.candidates import open_candidates
from salt_distill.student_trainer.evaluation.probe.features import common_labels, labelled_samples
from salt_distill.student_trainer.evaluation.probe.kept import save_predictions, save_probes
from salt_distill.student_trainer.evaluation.probe.output import table, write
from salt_distill.student_trainer.evaluation.probe.results import (
    TEST,
    TRAIN,
    VAL,
    ProbeResults,
    protocol,
    reported_on,
)
from salt_distill.student_trainer.evaluation.probe.runner import ProbeOutcome, ProbeRunner, ProbeTask
from salt_distill.student_trainer.evaluation.records import index_hash
from salt_distill.student_trainer.ranks import Worker


def run(config: ProbeConfig) -> None:
    """Judges every checkpoint, prints the table, writes the files."""
    started = time.monotonic()
    candidates = list_candidates(config)  # what is wrong with them is said before any worker starts
    task, partial = open_task(config)
    for name in partial:
        _say(f"label {name!r} is left out: not every clip of {config.data} carries it")
    if task is None:
        write(Path(config.out), _results(config, None, {}, ""), {})
        _say(f"no probe: the clips of {config.data} carry no labels; {config.out} holds an empty table")
        return
    if task.split == VAL:
        _say(f"{config.data} has no split 'test': accuracies are of 'val'")
    out = Path(config.out).resolve()
    state = out.with_name(f".{out.name}.training")
    if not config.resume:
        shutil.rmtree(state, ignore_errors=True)
    with left_as_it_was(state, unless=lambda: any(state.glob("*.*"))):
        outcome = _outcome(config, task, candidates, state)
    names = dict(zip(outcome.results, (candidate.name for candidate in candidates), strict=True))
    results = _results(config, outcome, names, task.split)  # workers know other paths
    label_results = {names[name]: row for name, row in outcome.results.items()}
    write(out, results, label_results)
    places = [None] * (len(candidates) - len(config.ckpt)) + [str(path) for path in config.absolute().ckpt]
    by_name = {encoder.name: (encoder, ckpt) for encoder, ckpt in zip(candidates, places, strict=True)}
    save_probes(out.with_suffix(".safetensors"), config, by_name, results, label_results)
    save_predictions(out.with_name(f"{out.stem}.predictions.csv"), results, label_results)
    shutil.rmtree(state, ignore_errors=True)
    caption = f"{results.protocol}; {time.monotonic() - started:.0f} s"
    new_results().print(table(results, caption))


def _results(
    config: ProbeConfig, outcome: ProbeOutcome | None, names: dict[str, str], split: str
) -> ProbeResults:
    """What is written; ``names``: of the encoders here, by their names on the workers."""
    return ProbeResults.of(
        {} if outcome is None else {names[name]: row for name, row in outcome.results.items()},
        encoders={} if outcome is None else {names[name]: row for name, row in outcome.encoders.items()},
        labels={} if outcome is None else outcome.labels,
        index_hash=index_hash(config.data),
        reported_on=split,
        protocol=protocol(config, split),
    )


def _outcome(
    config: ProbeConfig, task: ProbeTask, candidates: list[FrozenEncoder], state: Path
) -> ProbeOutcome:
    """Of this process, or of Ray's workers together."""
    if config.workers == 0:
        torch.set_num_threads(config.num_threads)
        alone = Worker(rank=0, world_size=1, device=device_here(config))
        return ProbeRunner(config, task, state, alone, _say).all(candidates)
    from salt_distill.student_trainer.job import in_workers

    state.mkdir(parents=True, exist_ok=True)
    work = partial(_probe_in_worker, config.absolute(), state)
    sentences, outcome = in_workers(work, config, folder=state)
    for sentence in sentences:
        _say(sentence)
    return outcome


def _probe_in_worker(config: ProbeConfig, state: Path, worker: Worker) -> tuple[list[str], ProbeOutcome]:
    """A worker's whole work, and what is to be said about it."""
    torch.set_num_threads(config.num_threads)
    task, _ = open_task(config)
    assert task is not None, "without labels no worker starts"
    sentences: list[str] = []
    runner = ProbeRunner(config, task, state, worker, sentences.append)
    return sentences, runner.all(list_candidates(config))


def open_task(config: ProbeConfig) -> tuple[ProbeTask | None, list[str]]:
    """What all encoders are asked, if the clips carry any label, and the labels that only some of them
    carry."""
    splits = labelled_samples(config.data)
    labels, partial = common_labels([sample for members in splits.values() for sample in members])
    if not labels:
        return None, partial
    num_settings = len(config.lr) * len(config.weight_decay)
    split = reported_on(list(splits), num_settings, config.data)
    needed = {TRAIN, split} | ({VAL} if num_settings > 1 else set())
    samples = {name: splits[name] for name in (TRAIN, VAL, TEST) if name in needed}
    return ProbeTask(samples=samples, labels=labels, split=split), partial


def list_candidates(config: ProbeConfig) -> list[FrozenEncoder]:
    """What to judge, in the order given; ``random-init`` first."""
    seed = config.seed if config.random_init else None
    return open_candidates(
        config.ckpt, config.num_frames, config.crop_size, config.frame_step, random_seed=seed
    )


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
