"""What is known of a video, or why it cannot be used."""

from dataclasses import dataclass


class BadVideoError(ValueError):
    """A video that cannot be used; the message is the reason, one sentence without the video's name."""


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
