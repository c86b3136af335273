"""`salt-eval export`: with `--probe` an encoder and its probe as a ``VJEPA2ForVideoClassification``."""

import json
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from salt_distill.common.config import ExportConfig, FrozenConfig
from salt_distill.common.console import console
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.export import export
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.evaluation.probe.kept import OpenProbe, open_probe, to_transformers
from salt_distill.student_trainer.evaluation.probe.results import chosen_label


def run(choice: ExportConfig) -> None:
    """Writes a checkpoint in another's format, with a classifier where a probe is given."""
    if choice.probe is None and choice.label is not None:
        raise ValueError("got --label without --probe, expected both: a label is a probe's")
    if choice.probe is not None and choice.format != "hf":
        raise ValueError(
            f"got --probe with --format {choice.format}, expected --format hf: the other has no classifier"
        )
    if choice.probe is None:
        export(choice)
    else:
        export_with_probe(choice, choice.probe)


def export_with_probe(choice: ExportConfig, probe: str) -> None:
    """Writes the directory; it appears whole or not at all. Raises ValueError where the probe is of other
    weights, or transformers has no place for it."""
    out = Path(choice.out)
    if out.exists():
        raise ValueError(f"got --out {out}, which exists: give another name")
    encoder = open_encoder(
        FrozenConfig(ckpt=choice.ckpt, num_frames=choice.num_frames, crop_size=choice.crop_size)
    )
    identity = fingerprint(encoder, encoder.load())
    probe_file = open_probe(Path(probe), None, fingerprint=identity)
    label = chosen_label(probe_file.probes, choice.label, probe)
    if probe_file.encoder.num_heads != encoder.config.num_heads:
        raise ValueError(
            f"got a probe of {probe_file.encoder.num_heads} heads for an encoder of"
            f" {encoder.config.num_heads}, expected as many: transformers has one number for both. Train it"
            " with --num-heads"
            f" {encoder.config.num_heads}"
        )
    export(choice, add_to=partial(_add_probe, probe_file, label))
    console.print(
        f"{out}: VJEPA2ForVideoClassification, {label}. Its norms have the encoder's epsilon there, the"
        " probe's have 1e-5: probabilities differ by about 1e-4",
        highlight=False,
        soft_wrap=True,
    )


def _add_probe(probe_file: OpenProbe, label: str, directory: Path) -> None:
    tensors = {
        f"vjepa2.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()
    }
    tensors |= to_transformers(probe_file.probes[label])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    names = probe_file.about.labels[label].class_names
    config |= {
        "architectures": ["VJEPA2ForVideoClassification"],
        "num_pooler_layers": probe_file.about.depth - 1,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
