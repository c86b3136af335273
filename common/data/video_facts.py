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
    """From the first frame to the end of the last one."""
    codec: str
    seekable: bool = True
    """Whether the times of its packets are those of its frames, in the order in which the decoder gives them.
    Where they are not, its frames can only be counted from the start."""
