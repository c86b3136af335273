"""Frames -> a small mp4, the same bytes every time."""

import io
from collections.abc import Iterable
from fractions import Fraction

import av


def encode_mp4(
    frames: Iterable[av.VideoFrame],
    *,
    width: int,
    height: int,
    fps: float,
    crf: int,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """H.264 in mp4 with every frame, at a constant rate; ``width`` and ``height`` even, ``crf`` 0 (lossless)
    to 51 (worst).

    One thread, because libx264 cuts the picture differently for every number of them.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": str(crf), "preset": "veryfast"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            # A frame decoded from elsewhere brings its own clock and picture type along.
            frame.pts, frame.time_base, frame.pict_type = number, 1 / stream.codec_context.framerate, 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
