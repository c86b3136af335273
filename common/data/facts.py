"""What is known of a video."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What is known of a video after decoding it once."""

    num_frames: int
    fps: float
    """Mean frames per second."""
    width: int
    """Pixels, as displayed: after rotation."""
    height: int
    duration_s: float
    codec: str
