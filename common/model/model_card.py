"""The README.md of an exported model."""

from salt_distill.common.model.checkpoint import CheckpointConfig

_CARD = """---
library_name: transformers
---
# {name}

A video encoder trained by SALT ([arXiv:2509.24317](https://arxiv.org/abs/2509.24317)): objective `{objective}`, {step} steps{teacher}.
{width} channels, {depth} blocks, {num_heads} heads, tokens of {tubelet_size}x{patch_size}x{patch_size} pixels.

```python
from transformers import AutoVideoProcessor, VJEPA2Model

model = VJEPA2Model.from_pretrained("DIR").eval()
processor = AutoVideoProcessor.from_pretrained("DIR")
pixels = processor(video, return_tensors="pt")["pixel_values_videos"]  # [batch, time, channels, height, width]
tokens = model(pixels, skip_predictor=True).last_hidden_state          # the final norm is included
```

- Give it clips of {crop_size}x{crop_size} pixels: `VJEPA2Model` takes positions from `crop_size` in `config.json`, whatever it is given. Any number of
  frames is right ({num_frames} here).
- {predictor}
"""
_WITH_PREDICTOR = """The predictor is here, with {num_sets} mask tokens, one for each mask set of the training; `VJEPA2Model` uses number {used}.
  Its `forward` masks the output of an encoder that has seen the whole clip. In training the encoder saw the context alone."""
_WITHOUT_PREDICTOR = """There is no predictor here: {obstacle}. `VJEPA2Model` always has one; this one has no blocks and random weights, as transformers
  says when it loads. Pass `skip_predictor=True`."""


def model_card(config: CheckpointConfig, *, name: str, obstacle: str | None) -> str:
    """What a directory holds and how it is used right. ``obstacle``: why the predictor is left out, if it
    is."""
    num_sets = len(config.mask.sets)
    predictor = (
        _WITH_PREDICTOR.format(num_sets=num_sets, used=1 % num_sets)
        if obstacle is None
        else _WITHOUT_PREDICTOR.format(obstacle=obstacle)
    )
    return _CARD.format(
        name=name,
        objective=config.objective,
        step=config.step,
        teacher=(
            ""
            if not config.teacher_fingerprint
            else f", frozen teacher{'s' * (len(config.teacher_fingerprint) > 1)} "
            + ", ".join(f"`{teacher[:12]}`" for teacher in config.teacher_fingerprint)
        ),
        predictor=predictor,
        **config.encoder.model_dump(),
        **config.view.model_dump(),
    )
