"""Frames -> a small mp4, the same bytes every time."""

import io
from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType

import av

FAST_DECODING = {"tune": "fastdecode", "g": "16"}
"""Options of libx264 for copies that are read in training: simpler pictures, and a key frame every 16
frames."""


def encode_mp4(
    frames: Iterable[av.VideoFrame],
    *,
    width: int,
    height: int,
    fps: float,
    crf: int,
    pix_fmt: str = "yuv420p",
    tick_s: Fraction | None = None,
    options: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """H.264 in mp4 with every frame; ``width`` and ``height`` even, ``crf`` 0 (lossless) to 51 (worst).

    With ``tick_s`` each frame is shown at its own ``pts``, in ticks of that length after the first one; else
    the rate is constant. ``options``: more of libx264's.

    Note [the same bytes]: one thread, because libx264 cuts the picture differently for every number of them.
    And no macroblock tree (``mbtree``): with it the bytes differ from time to time, except where the width is
    a multiple of 128 pixels. Of clips of 16 frames of 456 x 256, most had several encodings among six."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": str(crf), "preset": "veryfast", "mbtree": "0", **options},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        constant, first = tick_s is None, 0
        clock = 1 / stream.codec_context.framerate if tick_s is None else tick_s
        stream.codec_context.time_base = clock
        for number, frame in enumerate(frames):
            # A frame decoded from elsewhere brings its own clock and picture type along.
            time = number if constant else frame.pts
            assert time is not None, f"frame {number} has no time"
            if number == 0:
                first = time
            frame.pts, frame.time_base, frame.pict_type = time - first, clock, 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
