"""``probe.safetensors`` and ``probe.predictions.csv``: the probes that were reported, and what they said."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from salt_distill.common.config import ProbeConfig
from salt_distill.common.csv_text import csv_text
from salt_distill.common.model.checkpoint import disk_errors
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.whole import whole_file, write_whole
from salt_distill.student_trainer.evaluation.probe.attentive import AttentiveProbe
from salt_distill.student_trainer.evaluation.probe.results import LabelFacts, LabelResult, ProbeResults
from salt_distill.student_trainer.evaluation.records import EncoderIdentity, Record

_ABOUT = "salt.probe"
"""Key of the file's metadata."""


class ProbedEncoder(Record):
    """The encoder that probes read."""

    ckpt: str | None
    """Where it was; none for fresh weights, which are nowhere."""
    identity: EncoderIdentity
    width: int
    """Channels of a token."""
    num_heads: int
    """Of the probe."""


class KeptProbes(Record):
    """What the file says of its tensors: ``ENCODER.LABEL.NAME``, with the numbers of encoder and label."""

    writer: ClassVar[str] = "salt-eval probe"

    encoders: dict[str, ProbedEncoder]
    labels: dict[str, LabelFacts]
    index_hash: str
    """Of the data set that was learned from."""
    protocol: str
    depth: int
    """Blocks of a probe."""
    segments: int
    """Clips of a video."""
    views: int
    """Squares along the longer side."""
    square: float
    """A crop's sides, as a share of those of the largest."""
    is_image: bool
    """Whether clips are repeated images, resized with antialias."""


@dataclass(frozen=True, kw_only=True)
class OpenProbe:
    """The probes of one encoder, one for each label."""

    about: KeptProbes
    encoder: ProbedEncoder
    probes: dict[str, AttentiveProbe]
    """By label, in eval mode."""


def save_probes(
    path: Path,
    config: ProbeConfig,
    candidates: Mapping[str, tuple[FrozenEncoder, str | None]],
    results: ProbeResults,
    label_results: Mapping[str, Mapping[str, LabelResult]],
) -> None:
    """Writes the probes of every encoder and label; ``candidates``: the encoders, and where they are."""
    encoders = {
        name: ProbedEncoder(
            ckpt=ckpt,
            identity=results.encoders[name],
            width=encoder.config.width,
            num_heads=config.num_heads or encoder.config.num_heads,
        )
        for name, (encoder, ckpt) in candidates.items()
    }
    about = KeptProbes(
        encoders=encoders,
        labels=results.labels,
        index_hash=results.index_hash,
        protocol=results.protocol,
        depth=config.depth,
        segments=config.segments,
        views=config.views,
        square=config.square,
        is_image=config.augment_with == "images",
    )
    tensors = {
        f"{encoder_idx}.{label_idx}.{name}": weight.contiguous()
        for encoder_idx, row in enumerate(label_results.values())
        for label_idx, result in enumerate(row.values())
        for name, weight in result.weights.items()
    }
    with whole_file(path) as partial, disk_errors(path):
        save_file(tensors, partial, metadata={_ABOUT: about.model_dump_json()})


def open_probe(path: Path, encoder: str | None, *, fingerprint: str | None = None) -> OpenProbe:
    """The probes of one of the file's encoders, by its name or its fingerprint; None: the only one that is no
    fresh weights. Raises ValueError where the file is none of ours, or has no such encoder."""
    if not path.is_file():
        raise ValueError(
            f"got --probe {path}, expected probe.safetensors of `salt-eval probe`: it is not there"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = KeptProbes.model_validate_json((file.metadata() or {})[_ABOUT])
            name = _encoder_name(about, encoder, fingerprint, path)
            first = list(about.encoders).index(name)
            probes = {}
            for label_idx, (label, facts) in enumerate(about.labels.items()):
                probed = about.encoders[name]
                probe = AttentiveProbe(probed.width, probed.num_heads, facts.num_classes, about.depth)
                prefix = f"{first}.{label_idx}."
                probe.load_state_dict(
                    {
                        key.removeprefix(prefix): file.get_tensor(key)
                        for key in file.keys()  # noqa: SIM118 - the file is no mapping
                        if key.startswith(prefix)
                    }
                )
                probes[label] = probe.eval().requires_grad_(False)
    except (SafetensorError, KeyError, pydantic.ValidationError, json.JSONDecodeError) as error:
        raise ValueError(
            f"got --probe {path}, expected probe.safetensors of this version's `salt-eval probe`"
            f" ({type(error).__name__}): run it again"
        ) from None
    return OpenProbe(about=about, encoder=about.encoders[name], probes=probes)


def _encoder_name(about: KeptProbes, encoder: str | None, fingerprint: str | None, path: Path) -> str:
    names = [name for name, kept in about.encoders.items() if kept.ckpt is not None]
    if fingerprint is not None:
        same = [name for name in names if about.encoders[name].identity.fingerprint == fingerprint]
        if not same:
            known = (f"{name} ({about.encoders[name].identity.fingerprint[:12]})" for name in names)
            raise ValueError(
                f"got an encoder with fingerprint {fingerprint[:12]}, expected one that {path} has probes of:"
                f" {', '.join(known)}"
            )
        return same[0]
    if encoder in names:
        return encoder
    if encoder is None and len(names) == 1:
        return names[0]
    got = "no --encoder" if encoder is None else f"--encoder {encoder}"
    raise ValueError(f"got {got}, expected one of {', '.join(names)} of {path}")


def save_predictions(
    path: Path, results: ProbeResults, label_results: Mapping[str, Mapping[str, LabelResult]]
) -> None:
    """Writes what every probe said of each clip of the split that is reported on."""
    rows = [("encoder", "fingerprint", "index_hash", "label", "key", "class", "predicted", "probability")]
    for name, row in label_results.items():
        identity = (name, results.encoders[name].fingerprint, results.index_hash)
        for label, result in row.items():
            classes = results.labels[label].class_names
            for clip in result.predictions:
                answer = (classes[clip.actual], classes[clip.predicted], f"{clip.probability:.6f}")
                rows.append((*identity, label, clip.key, *answer))
    write_whole(path, csv_text(rows))


def to_transformers(probe: AttentiveProbe) -> dict[str, torch.Tensor]:
    """The weights under the names of transformers' ``VJEPA2ForVideoClassification``; its key bias is 0."""
    weights = probe.state_dict()
    cross = "pooler.cross_attention_layer."
    names = {
        "token_norm": f"{cross}layer_norm1", "w_query": f"{cross}cross_attn.q_proj",
        "w_key": f"{cross}cross_attn.k_proj", "w_value": f"{cross}cross_attn.v_proj",
        "mlp_norm": f"{cross}layer_norm2", "w_up": f"{cross}mlp.fc1", "w_down": f"{cross}mlp.fc2",
        "classifier": "classifier",
    }  # fmt: skip
    theirs = {"pooler.query_tokens": weights["query"][None, None]}
    for number in range(len(probe.blocks)):
        ours, layer = f"blocks.{number}.", f"pooler.self_attention_layers.{number}."
        names |= {
            f"{ours}self_attn.out_proj": f"{layer}self_attn.out_proj", f"{ours}norm1": f"{layer}layer_norm1",
            f"{ours}norm2": f"{layer}layer_norm2", f"{ours}linear1": f"{layer}mlp.fc1",
            f"{ours}linear2": f"{layer}mlp.fc2",
        }  # fmt: skip
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}self_attn.in_proj_{kind}"].chunk(3)
            theirs |= {
                f"{layer}self_attn.{part}_proj.{kind}": tensor
                for part, tensor in zip("qkv", parts, strict=True)
            }
    theirs |= {
        f"{other}.{kind}": weights[f"{name}.{kind}"]
        for name, other in names.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in weights
    }
    theirs[f"{cross}cross_attn.k_proj.bias"] = torch.zeros(len(weights["query"]))
    return {name: tensor.clone().contiguous() for name, tensor in theirs.items()}
