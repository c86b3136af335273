"""Videos of the kinds that makers of data sets report as read wrongly: each frame carries its number as ten
bars, bar b white where bit b is set."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from pack_tools import encoded_image, packed, samples_of, skipped, write

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import ViewConfig
from salt_distill.common.data import views
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.video import decode, open_video, probe, timed_frames

HEIGHT, WIDTH = 48, 160
GOP = "keyint=20:min-keyint=20:scenecut=0:bframes=3:b-pyramid=normal"


def picture(number: int) -> np.ndarray:
    """Bars above a texture that moves."""
    bars = [255 if number >> bit & 1 else 0 for bit in range(10)]
    texture = np.random.default_rng(0).integers(0, 256, (8, 20, 3), dtype=np.uint8)
    moved = np.roll(np.kron(texture, np.ones((4, 8, 1), np.uint8)), number, 1)
    top = np.repeat(np.repeat(np.array(bars, np.uint8), WIDTH // 10)[None, :, None], 16, 0).repeat(3, 2)
    return np.ascontiguousarray(np.concatenate([top, moved]))


def number_in(frame: np.ndarray) -> int:
    width = frame.shape[1] / 10
    bars = [
        frame[2 : frame.shape[0] // 4, int((bit + 0.3) * width) : int((bit + 0.7) * width)]
        for bit in range(10)
    ]
    return sum(1 << bit for bit, bar in enumerate(bars) if bar.mean() > 128)


def video(
    codec: str,
    container: str,
    options: dict[str, str],
    times_ms: list[int] | range = range(0, 2400, 40),
    pixels: str = "yuv420p",
    first: int = 0,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        constant = list(times_ms) == list(range(0, 40 * len(times_ms), 40))
        stream.codec_context.thread_count = 1
        clock = Fraction(1, 25) if constant else Fraction(1, 1000)
        if not constant:
            stream.codec_context.time_base = clock
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(first + number), format="rgb24")
            frame.pts, frame.time_base = (number if constant else time_ms), clock
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def remuxed(data: bytes, container: str) -> bytes:
    """As `-c copy` does it; packets without a time get one of their own."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.stream = stream
                if packet.pts is None or packet.dts is None:
                    packet.pts = packet.dts = number
                output.mux(packet)
    return file.getvalue()


def assert_as_decoded(data: bytes) -> list[int]:
    """Any frames asked for are those of a decoding of everything; the numbers in them."""
    facts = probe(data)
    every = [frame.copy() for frame, _ in timed_frames(data)]
    assert len(every) == facts.num_frames
    for seekable in (facts.seekable, None):
        for idx in (range(facts.num_frames), [facts.num_frames // 2, facts.num_frames // 2 + 3], [7]):
            frames = decode(data, idx, facts.num_frames, seekable=seekable)
            assert all(np.array_equal(ours, every[place]) for ours, place in zip(frames, idx, strict=True))
    return [number_in(frame) for frame in every]


def clips_of(data: bytes, frame_step: int = 4) -> list[list[int]]:
    """The frames of clips from starts all over a video."""
    facts = probe(data)
    view = ViewConfig(num_frames=16, frame_step=frame_step)
    with open_video(data, facts.num_frames, seekable=facts.seekable) as opened:
        starts = np.linspace(0, 1, 2 * facts.num_frames, endpoint=False)
        return [views.frame_idx(view, facts.num_frames, start, opened.times) for start in starts]


# --- frames in decode order ---

REORDERED = {
    "XviD in AVI": lambda: video("mpeg4", "avi", {"bf": "2", "g": "12"}),
    "H.264 in AVI": lambda: video("libx264", "avi", {"x264-params": GOP}),
    "H.264 in ASF": lambda: video("libx264", "asf", {"x264-params": GOP}),
    "MPEG-2 in MXF": lambda: video("mpeg2video", "mxf", {"bf": "2", "g": "12"}),
    "AVI copied to mp4": lambda: remuxed(video("libx264", "avi", {"x264-params": GOP}), "mp4"),
    "AVI copied to mkv": lambda: remuxed(video("libx264", "avi", {"x264-params": GOP}), "matroska"),
    "mp4 without ctts": lambda: video("libx264", "mp4", {"x264-params": GOP}).replace(b"ctts", b"free"),
}


@pytest.mark.parametrize("kind", REORDERED)
def test_frames_come_in_the_order_of_the_decoder(kind):
    numbers = assert_as_decoded(REORDERED[kind]())
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 50


def test_packet_times_are_used_where_they_lead_to_the_frames():
    assert probe(video("libx264", "mp4", {"x264-params": GOP})).seekable
    assert not probe(REORDERED["H.264 in AVI"]()).seekable


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("01_h264_bframes.avi", range(60)),
        ("01_xvid_packed.avi", range(58)),
        ("01_no_ctts.mp4", None),
        ("02_two_stsd.mp4", None),
        ("05_matrix10.mp4", range(10)),
        ("11_camera.mjpeg", range(20)),
    ],
)
def test_reported_files_give_the_frames_of_a_decoding_of_everything(shared_reports, name, numbers):
    found = assert_as_decoded((shared_reports / name).read_bytes())
    assert numbers is None or found == list(numbers)


# --- the pace ---


@pytest.mark.parametrize(
    "times",
    [
        [*range(0, 4000, 40), *range(64_000, 68_000, 40)],
        [*range(0, 7960, 40), 600_000],
        [0, *range(600_000, 607_960, 40)],
    ],
    ids=["a pause", "a late last frame", "an early first frame"],
)
def test_a_gap_freezes_no_clip(times):
    clips = clips_of(video("libx264", "matroska", {"x264-params": GOP}, times))
    assert min(len(set(clip)) for clip in clips) >= 15
    assert set().union(*clips) == set(range(len(times)))


def test_a_second_clock_freezes_no_clip():
    data = b"".join(
        video("libx264", "mpegts", {"x264-params": GOP}, range(0, 4000, 40), first=n) for n in (0, 100)
    )
    assert assert_as_decoded(data) == list(range(200))
    clips = clips_of(data)
    assert min(len(set(clip)) for clip in clips) >= 15
    assert set().union(*clips) == set(range(200))


# --- what changes, or is lost, on the way ---


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("04_lost_packets_hevc.ts", "a part of it was lost"),
        ("04_damaged_mjpeg.avi", "decoding fails after 6 frames"),
    ],
)
def test_what_was_lost_is_named(shared_reports, name, reason):
    with pytest.raises(BadVideoError, match=reason):
        probe((shared_reports / name).read_bytes())


def packets_of(data: bytes) -> list[bytes]:
    return [data[start : start + 188] for start in range(0, len(data), 188)]


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_loss_in_a_transport_stream_is_told_from_a_seam(codec):
    options = {"x264-params": GOP} if codec == "libx264" else {"bf": "2", "g": "12"}
    whole = video(codec, "mpegts", options, range(0, 1600, 40))
    assert probe(whole + whole).num_frames == 80
    inside_pictures = [
        place
        for place, packet in enumerate(packets_of(whole))
        if (packet[1] & 31) << 8 | packet[2] == 256 and not packet[1] & 64
    ]
    assert probe(whole).num_frames == 40
    for place in inside_pictures[:-1:5]:
        lost = packets_of(whole)
        del lost[place]
        with pytest.raises(BadVideoError, match="a part of it was lost"):
            probe(b"".join(lost))


# --- rates and durations ---


def test_rate_and_duration_are_those_of_the_frames():
    webm = video("libvpx", "webm", {"deadline": "realtime", "cpu-used": "8"}, [*range(0, 4000, 50)])
    position = webm.index(b"\x44\x89")  # the duration: a float of 8 bytes
    forged = webm[: position + 3] + np.array(7e9, ">f8").tobytes() + webm[position + 11 :]
    facts = probe(forged)
    assert (facts.fps, facts.duration_s) == (pytest.approx(20, rel=0.01), pytest.approx(4.0, rel=0.01))


@pytest.mark.needs_data
def test_a_recording_of_a_browser_has_the_rate_of_its_frames(shared_reports):
    facts = probe((shared_reports / "09_mediarecorder.webm").read_bytes())
    assert (facts.fps, facts.duration_s) == (pytest.approx(19, abs=0.5), pytest.approx(4.15, abs=0.05))


@pytest.mark.parametrize("copies", ["fast", "small"])
def test_a_smaller_copy_keeps_the_time_of_each_frame(tmp_path, copies):
    times = [*range(0, 800, 20), *range(800, 4800, 200)]
    write(tmp_path / "v" / "a.mkv", video("libx264", "matroska", {"x264-params": GOP}, times))
    packed(tmp_path / "v", tmp_path / "out", short_side=32, copies=copies)
    (sample,) = samples_of(tmp_path / "out").values()
    data = open_dataset(tmp_path / "out").read(sample)
    with open_video(data, 60, seekable=sample.seekable) as opened:
        assert opened.times is not None
        shares = (opened.times - opened.times[0]) / (opened.times[-1] - opened.times[0])
    assert np.abs(shares - np.array(times) / times[-1]).max() < 1e-4
    assert [number_in(frame) for frame in decode(data, range(60), 60, seekable=True)] == list(range(60))
    with av.open(io.BytesIO(data)) as container:
        num_key_frames = sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    assert (num_key_frames >= 4) == (copies == "fast")


# --- colours, stills, other tracks ---


@pytest.mark.parametrize("matrix", [1, 3, 8, 10, 14])
def test_what_is_packed_can_be_read_whatever_colour_matrix_it_states(matrix):
    data = video("libx264", "mp4", {"x264-params": GOP}, range(0, 400, 40))
    plain = decode(data, range(10), 10)
    context = av.BitStreamFilterContext
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as output:
            copy = output.add_stream_from_template(stream)
            bsf = context(f"h264_metadata=matrix_coefficients={matrix}", stream, copy)
            for packet in source.demux(stream):
                for filtered in bsf.filter(packet if packet.size else None):
                    filtered.stream = copy
                    output.mux(filtered)
    stated = file.getvalue()
    facts = probe(stated)
    frames = decode(stated, range(10), 10, seekable=facts.seekable)
    assert np.array_equal(frames, plain) == (matrix in (3, 8, 14))  # unknown: as if none was stated
    assert np.abs(frames.astype(int) - plain).max() < 80


def test_pictures_one_after_the_other_are_a_video():
    for format in ("JPEG", "PNG"):
        data = b"".join(encoded_image(picture(number), format) for number in range(12))
        assert probe(data).num_frames == 12
        assert assert_as_decoded(data) == list(range(12))
    with_preview = encoded_image(picture(3), "JPEG") + b"\0" * 20
    assert probe(with_preview).num_frames == 1


def test_a_picture_beside_the_video_is_not_taken_for_it():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        cover = output.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 2 * WIDTH, 2 * HEIGHT, "yuvj420p"
        moving = output.add_stream("libx264", rate=25)
        moving.width, moving.height, moving.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        still = av.VideoFrame.from_ndarray(np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.uint8), format="rgb24")
        output.mux(cover.encode(still))
        for number in range(30):
            output.mux(moving.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        for stream in (cover, moving):
            output.mux(stream.encode(None))
    assert assert_as_decoded(file.getvalue()) == list(range(30))


# --- frame folders ---


def test_all_numbers_of_the_names_order_a_frame_folder(tmp_path):
    clock = [f"cam1_12-{58 + second // 60}-{second % 60:02}.png" for second in range(50, 70)]
    for place, name in enumerate(clock):
        write(tmp_path / "v" / "clock" / name, encoded_image(picture(place)))
        write(tmp_path / "v" / "clock" / f"._{name}", b"what macOS writes")
        write(
            tmp_path / "v" / "months" / f"{'Jan' if place < 10 else 'Feb'}_{place}.png",
            encoded_image(picture(0)),
        )
        write(tmp_path / "v" / "points" / f"0.{place + 5}.png", encoded_image(picture(0)))
    packed(tmp_path / "v", tmp_path / "out", images="frames", fps=5, max_bad_fraction=0.9)
    (sample,) = samples_of(tmp_path / "out").values()
    frames = decode(open_dataset(tmp_path / "out").read(sample), range(20), 20)
    assert [number_in(frame) for frame in frames] == list(range(20))
    reasons = skipped(tmp_path / "out")
    assert "differ in more than their numbers" in reasons["months"]
    assert "as fractions or as numbers" in reasons["points"]
