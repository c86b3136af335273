"""Frames of a clip: the same ones as by decoding everything and counting, from either decoder; and by time
where the rate varies."""

import contextlib
import io
import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import ViewConfig
from salt_distill.common.data import video, views
from salt_distill.common.data.packets import Packets
from salt_distill.common.data.video import decode, open_video, probe, upright_frames

NO_TORCHCODEC = (
    "torchcodec does not import: pip install salt-distill[torchcodec], with FFmpeg's shared libraries"
)
NUM_FRAMES = 60
GOP = "keyint=10:min-keyint=10:scenecut=0:bframes=3"


def encode(
    codec: str,
    container: str,
    options: dict[str, str],
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    *,
    times: list[int] | None = None,
    num_streams: int = 1,
) -> bytes:
    """A texture that moves over NUM_FRAMES frames, so that no frame is like another; ``times`` in
    milliseconds.

    Of several streams the first has half the size.
    """
    texture = np.kron(
        np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)
    )
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        clock = Fraction(1, 25) if times is None else Fraction(1, 1000)
        streams = []
        for number in range(num_streams):
            stream = output.add_stream(codec, rate=25, options=options)
            stream.width, stream.height = size if number == num_streams - 1 else (size[0] // 2, size[1] // 2)
            stream.pix_fmt, stream.codec_context.thread_count = pixel_format, 1
            if times is not None:
                stream.codec_context.time_base = clock
            streams.append(stream)
        for number in range(NUM_FRAMES if times is None else len(times)):
            moved = np.roll(texture, (2 * number, 3 * number), (0, 1))
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(moved[: stream.height, : stream.width]), format="rgb24"
                )
                frame.pts, frame.time_base = number if times is None else times[number], clock
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    return file.getvalue()


STREAMS = {
    "closed mp4": ("libx264", "mp4", {"x264-params": GOP}),
    "closed ts": ("libx264", "mpegts", {"x264-params": GOP}),
    "several slices": ("libx264", "mp4", {"x264-params": f"{GOP}:slices=3"}),
    "interlaced": ("libx264", "mp4", {"x264-params": f"{GOP}:tff=1"}),
    "open mp4": ("libx264", "mp4", {"x264-params": f"{GOP}:open-gop=1:b-pyramid=normal"}),
    "open mkv": ("libx264", "matroska", {"x264-params": f"{GOP}:open-gop=1"}),
    "open ts": ("libx264", "mpegts", {"x264-params": f"{GOP}:open-gop=1"}),
    "intra refresh": ("libx264", "mp4", {"x264-params": "keyint=20:intra-refresh=1:bframes=0"}),
    "raw": ("libx264", "h264", {"x264-params": GOP}),
    "open hevc": (
        "libx265",
        "mp4",
        {"x265-params": "keyint=10:min-keyint=10:open-gop=1:bframes=4:scenecut=0:log-level=none"},
    ),
    "avi": ("mpeg4", "avi", {"bf": "2", "g": "10"}),
    "mpeg2": ("mpeg2video", "mpegts", {"bf": "2", "g": "10"}),
    "vp8": ("libvpx", "webm", {"g": "15", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "vp9": ("libvpx-vp9", "webm", {"g": "15", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "8"}),
    "4:4:4, odd size": ("libx264", "mp4", {"x264-params": GOP}, "yuv444p", (95, 61)),
    "10 bits": ("libx264", "matroska", {"x264-params": GOP}, "yuv420p10le"),
}
STARTS_IN_THE_MIDDLE = {
    "closed mp4", "closed ts", "several slices", "interlaced", "raw", "open hevc", "vp8", "vp9",
    "4:4:4, odd size", "10 bits",
    "late start", "two streams", "variable rate",
}  # fmt: skip
VARIABLE = np.random.default_rng(1).permutation([20] * 40 + [70] * 20).cumsum().tolist()


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    how = {"x264-params": GOP}
    return {name: encode(*how) for name, how in STREAMS.items()} | {
        "late start": encode("libx264", "matroska", how, times=[7000 + 40 * i for i in range(NUM_FRAMES)]),
        "two streams": encode("libx264", "mp4", how, num_streams=2),
        "variable rate": encode("libx264", "mp4", how, times=VARIABLE),
    }


@pytest.fixture(params=["pyav", "torchcodec"])
def decoder(request, monkeypatch) -> str:
    if request.param == "pyav":
        monkeypatch.setattr(video, "_torchcodec", lambda: None)
    elif video._torchcodec() is None:
        pytest.skip(NO_TORCHCODEC)
    return request.param


def counted(data: bytes, wanted: Sequence[int] = range(10**6)) -> dict[int, np.ndarray]:
    """Every frame, or the wanted ones: what PyAV gives when it is asked for one after the other, and nothing
    of ours is."""
    with av.open(io.BytesIO(data)) as container:
        return {
            number: np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), frame.rotation // 90)
            for number, frame in zip(
                range(max(wanted) + 1), container.decode(container.streams.best("video")), strict=False
            )
            if number in wanted
        }


# --- the same frames ---


@pytest.mark.parametrize("name", [*STREAMS, "late start", "two streams", "variable rate"])
def test_frames_are_those_of_a_decoding_of_everything(encoded, decoder, name):
    data, every = encoded[name], counted(encoded[name])
    assert probe(data).num_frames == len(every) == NUM_FRAMES
    assert every[0].shape == (61, 95, 3) if "odd" in name else (64, 96, 3)
    assert all(
        np.array_equal(ours, frame) for ours, frame in zip(upright_frames(data), every.values(), strict=True)
    )
    for first in range(0, NUM_FRAMES, 3):
        idx = [min(first + 4 * i, NUM_FRAMES - 1) for i in range(5)]
        for place, frame in zip(idx, decode(data, idx, NUM_FRAMES), strict=True):
            assert np.array_equal(frame, every[place]), f"frame {place} of {idx}"


@pytest.mark.parametrize("name", [*STREAMS, "late start", "two streams", "variable rate"])
def test_only_what_a_clip_needs_is_decoded(encoded, name):
    with video._open(encoded[name]) as (container, stream):
        packets = Packets(stream, video._demuxed(container, stream), NUM_FRAMES)
        assert (packets._entries(packets._packets)[1:] != []) == (name in STARTS_IN_THE_MIDDLE)
        if name == "closed mp4":
            wanted = {int(time) for time in packets.times[[45, 49]]}
            needed = list(packets.needed(wanted))
            assert (
                len(needed) < 10
            )  # of 60: the frames from 40 on, without those B frames that nothing refers to
            assert {packet.pts for packet in needed} >= wanted


@pytest.mark.parametrize("name", [*STREAMS, "late start", "two streams", "variable rate"])
def test_torchcodec_gets_what_it_decodes_exactly(encoded, name, caplog):
    if video._torchcodec() is None:
        pytest.skip(NO_TORCHCODEC)
    with open_video(encoded[name], NUM_FRAMES) as opened, caplog.at_level(logging.INFO):
        its = opened.frames.func is video._decode_torchcodec  # type: ignore[attr-defined]
        opened.frames([7, 30])
    assert its == (name in STARTS_IN_THE_MIDDLE - {"interlaced", "raw", "10 bits"})
    assert ("with PyAV, since torchcodec failed (it finds other frames)" in caplog.text) == (
        name == "closed ts"
    )


def test_a_decoder_that_finds_too_little_is_not_believed(encoded, caplog, monkeypatch):
    data, every = encoded["closed mp4"], counted(encoded["closed mp4"])
    monkeypatch.setattr(
        Packets, "needed", lambda self, wanted: [packet for packet in self if packet.pts in wanted][1:]
    )
    monkeypatch.setattr(video, "_torchcodec", lambda: None)
    with caplog.at_level(logging.INFO):
        assert np.array_equal(decode(data, [30, 34], NUM_FRAMES), np.stack([every[30], every[34]]))
    assert "decoding a h264 video from its start" in caplog.text


@pytest.mark.parametrize("repeated", [True, False])
def test_parameters_that_change_on_the_way_are_not_skipped(repeated):
    """Two H.264 streams of different parameter sets, one after the other: who starts in the second has to
    know them."""
    first, second = (
        encode("libx264", "h264", {"x264-params": how}) for how in (GOP, f"{GOP}:ref=1:cabac=0:weightp=0")
    )
    if not repeated:  # only its first key frame has them
        units = re.split(b"\0\0\0?\1", second)[1:]
        kept = [unit for place, unit in enumerate(units) if unit[0] & 31 not in (7, 8) or place < 4]
        assert len(kept) < len(units)
        second = b"".join(b"\0\0\0\1" + unit for unit in kept)
    every = counted(first + second)
    assert len(every) == 2 * NUM_FRAMES
    with video._open(first + second) as (container, stream):
        packets = Packets(stream, video._demuxed(container, stream), len(every))
        entries = packets._entries(packets._packets)
    assert any(number > NUM_FRAMES for number in entries) == repeated
    assert any(number < NUM_FRAMES for number in entries[1:])


def test_a_count_that_is_wrong_is_not_used(encoded):
    for num_frames in (NUM_FRAMES - 1, NUM_FRAMES + 1, None):
        with open_video(encoded["closed mp4"], num_frames) as opened:
            assert opened.times is None
            assert len(opened.frames([0, NUM_FRAMES - 1])) == 2
    with pytest.raises(BadVideoError, match=f"frame {NUM_FRAMES} was asked for"):
        decode(encoded["closed mp4"], [3, NUM_FRAMES], NUM_FRAMES + 1)


@pytest.mark.needs_data
@pytest.mark.parametrize("folder", ["videos", "bad", "labelled/asl"])
def test_real_videos_give_the_frames_of_a_decoding_of_everything(shared_videos, decoder, folder):
    rng, num_videos = np.random.default_rng(0), 0
    for path in sorted((shared_videos.parent / folder).glob("*.*"))[:: 6 if folder == "labelled/asl" else 1]:
        data = path.read_bytes()
        try:
            num_frames = probe(data).num_frames
        except BadVideoError:
            continue
        num_videos += 1
        first = int(rng.integers(0, max(1, min(num_frames, 240) - 16)))
        idx = [min(first + 3 * i, num_frames - 1) for i in range(6)]
        reference = counted(data, idx)
        assert np.array_equal(
            decode(data, idx, num_frames), np.stack([reference[number] for number in idx])
        ), path.name
    assert num_videos == {"videos": 22, "bad": 5, "labelled/asl": 4}[folder]


@pytest.mark.needs_data
def test_damage_is_named_and_never_shown(shared_bad, decoder):
    data = (shared_bad / "decord__corrupted.mp4").read_bytes()  # packet 30 of 50 is broken
    intact = counted_until_it_breaks(data)
    assert len(intact) == 28  # then PyAV raises, with frame 28 in its hand
    for place in range(0, 50, 4):
        if place < 28:
            assert np.array_equal(decode(data, [place], 50)[0], intact[place])
            assert np.array_equal(decode(data, [place], 50, seekable=True)[0], intact[place])
        else:
            with pytest.raises(BadVideoError, match="decoding fails after 28 frames"):
                decode(data, [place], 50)
    decode(data, [28], 50, seekable=True)
    for place in range(32, 50, 4):
        with pytest.raises(BadVideoError, match="decoding fails after 28 frames"):
            decode(data, [place], 50, seekable=True)


@pytest.mark.needs_data
def test_what_an_edit_list_leaves_out_is_not_counted(shared_bad, decoder):
    data = (shared_bad / "torchcodec__discard_first_keyframe.mp4").read_bytes()  # 5 of 30 frames
    assert probe(data).num_frames == 25
    every = counted(data)
    for first in range(21):
        assert np.array_equal(
            decode(data, range(first, first + 5), 25),
            np.stack([every[place] for place in range(first, first + 5)]),
        )


def counted_until_it_breaks(data: bytes) -> list[np.ndarray]:
    frames = []
    with contextlib.suppress(BadVideoError):
        for frame in upright_frames(data):
            frames.append(frame.copy())
    return frames


# --- by time ---

VIEW = ViewConfig(num_frames=16, frame_step=4)


@given(
    st.integers(2, 300),
    st.sampled_from([(33, 1), (1001, 0), (100, 20), (3, 1)]),
    st.integers(-(10**9), 10**9),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_a_constant_rate_with_rounded_times_is_sampled_by_counting(
    num_frames, clock, origin, start, frame_step, random
):
    tick, jitter = clock
    times = np.array(
        [
            origin + tick * i + random.randint(-jitter, jitter) * (0 < i < num_frames - 1)
            for i in range(num_frames)
        ]
    )
    times = np.sort(times)
    view = VIEW.model_copy(update={"frame_step": frame_step})
    if 4 * jitter >= tick:  # neighbours in doubt by more than half a frame are not a constant rate
        return
    assert views.frame_idx(view, num_frames, start, times) == views.frame_idx(view, num_frames, start)


def test_a_variable_rate_is_sampled_by_time():
    times = np.concatenate([np.arange(0, 1000, 20), np.arange(1000, 2000, 50)])  # 50 frames a second, then 20
    view = ViewConfig(num_frames=4, frame_step=4)
    step = 4 * (1950 / 69)
    early, late = (views.frame_idx(view, len(times), start, times) for start in (0.2, 0.999))
    for idx in (early, late):
        wanted = times[idx[0]] + step * np.arange(4)
        assert idx == [int(np.abs(times - time).argmin()) for time in wanted]
    assert np.diff(early).max() > 4  # where frames are dense it steps over more of them ...
    assert np.diff(late).max() < 4  # ... and over fewer where they are sparse
    for idx in (early, late):
        assert times[idx[-1]] - times[idx[0]] == pytest.approx(3 * step, abs=50)


@pytest.mark.parametrize("frame_step", [1, 2, 4])
@pytest.mark.parametrize("where", [1, 150, 299])
def test_a_gap_freezes_no_clip(where, frame_step):
    """A late second frame, a pause, a late last frame."""
    times = 40 * np.arange(300)
    times[where:] += 60_000
    view = ViewConfig(num_frames=16, frame_step=frame_step)
    clips = [views.frame_idx(view, 300, start, times) for start in np.linspace(0, 1, 600, endpoint=False)]
    assert min(len(set(idx)) for idx in clips) == 16
    assert set().union(*clips) == set(range(300))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None)
def test_clips_of_any_clock_stay_inside_the_video(durations, start):
    times = np.cumsum([0, *durations])
    idx = views.frame_idx(VIEW, len(times), start, times)
    assert len(idx) == 16
    assert all(0 <= i < len(times) for i in idx)
    assert idx == sorted(idx)


def test_times_of_a_file_reach_the_clip():
    times = [20 * i for i in range(20)] + [400 + 50 * i for i in range(30)]
    data = encode("libx264", "matroska", {"x264-params": GOP}, times=times)
    every = counted(data)
    with open_video(data, 50) as opened:
        assert (opened.times - opened.times[0]).tolist() == times
        idx = views.frame_idx(ViewConfig(num_frames=4, frame_step=4), 50, 0.0, opened.times)
        frames = opened.frames(idx)
    assert np.diff(idx).max() > 4
    assert all(np.array_equal(frame, every[place]) for frame, place in zip(frames, idx, strict=True))


@pytest.mark.needs_data
def test_real_clocks(shared_videos):
    for name, varies in [
        ("torchcodec__nasa_13013_vfr.mp4", True),
        ("mdnassets__flower.webm", False),
        ("moviepy__pigs_in_a_polka.gif", False),
    ]:
        data = Path(shared_videos / name).read_bytes()
        num_frames = probe(data).num_frames
        with open_video(data, num_frames) as opened:
            starts = [views.frame_idx(VIEW, num_frames, start, opened.times) for start in (0.0, 0.4, 0.9)]
        assert (starts != [views.frame_idx(VIEW, num_frames, start) for start in (0.0, 0.4, 0.9)]) == varies
