"""What a data set takes: the rules of `salt-data pack`, for tars that others packed too."""

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.stills import IMAGE_SUFFIXES
from salt_distill.common.data.video import VIDEO_SUFFIXES
from salt_distill.common.data.video_facts import VideoFacts

MIN_FRAMES = 2
MIN_SIDE = 8
"""Pixels. Smaller videos show nothing that an encoder could learn from."""

_IMAGE_CODECS = frozenset(["mjpeg", "png", "bmp", "webp"])
"""What FFmpeg calls images that follow each other in a file."""


def require_usable(facts: VideoFacts, suffix: str, *, is_image: bool) -> None:
    """Raises BadVideoError where a video or image is not what its name says, or shows too little. ``suffix``:
    of its name, in lower case; any that is known of neither fits both."""
    if suffix in VIDEO_SUFFIXES and is_image:
        raise BadVideoError("it is an image, although it is named as a video")
    if suffix in IMAGE_SUFFIXES and not is_image:
        raise BadVideoError(
            f"it holds {facts.num_frames} images one after the other, although it is named as one"
            if facts.codec in _IMAGE_CODECS
            else "it is no image, although it is named as one"
        )
    if not is_image and facts.num_frames < MIN_FRAMES:
        raise BadVideoError(f"it has {facts.num_frames} frame, expected at least {MIN_FRAMES}")
    if min(facts.width, facts.height) < MIN_SIDE:
        raise BadVideoError(
            f"it has {facts.width}x{facts.height} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}"
        )
