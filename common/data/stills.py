"""Encoded images -> frames: a still image, or the numbered images of a frame folder.

A frame folder stands in a shard as plain members ``00000001.000000.jpg``, ``00000001.000001.jpg``, ..., one
sample for WebDataset. Its encoded bytes are that run of the tar, headers included, so that one read gets them
all and the frames of a clip are found without decoding others.
"""

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.video_facts import VideoFacts

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"])
"""Names that are taken for images, in lower case."""
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_STARTS = (_JPEG, _PNG, b"BM", b"II*\0", b"MM\0*")
_JPEG_MARKER = re.compile(b"\xff[^\x00\xff\xd0-\xd7]")
_MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
"""Pillow's modes of 8 bits a channel at most: it would cut deeper ones off at 255."""
_BLOCK = 512
"""Bytes of a tar's unit."""
_JPEG_QUALITY = 95

warnings.filterwarnings(
    "ignore", category=UserWarning, module="PIL"
)  # of odd metadata, a line per image; what matters is raised


def stills_in(data: bytes) -> list[memoryview] | None:
    """The encoded images in these bytes: one, or those of a run of tar members; None where they are a video
    (or nothing known), as images one after the other are, of a camera or of FFmpeg's pipes."""
    if data[257:262] == b"ustar":
        return _members(memoryview(data))
    is_image = data.startswith(_STARTS) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    return [memoryview(data)] if is_image and not _is_followed_by_another(data) else None


def probe_stills(images: Sequence[memoryview]) -> VideoFacts:
    """Facts of images as the frames of a video. They state no rate: it is given as one frame a second. Raises
    BadVideoError unless all decode."""
    shape, codec = (0, 0, 0), ""
    for number, image in enumerate(images):
        pixels, format = _open(image, number)
        if number and pixels.shape != shape:
            raise BadVideoError(f"frame {number} has another size than the frames before it")
        shape, codec = pixels.shape, codec or format
    return VideoFacts(
        num_frames=len(images),
        fps=1.0,
        width=shape[1],
        height=shape[0],
        duration_s=float(len(images)),
        codec=codec,
    )


def decode_stills(images: Sequence[memoryview], frame_idx: Iterable[int]) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames asked for, RGB, upright. Raises BadVideoError where one of them cannot be had."""
    frame_idx = list(frame_idx)
    if max(frame_idx) >= len(images):
        raise BadVideoError(f"frame {max(frame_idx)} was asked for, but it has {len(images)} frames")
    decoded = {i: _open(images[i], i)[0] for i in set(frame_idx)}
    if len({frame.shape for frame in decoded.values()}) > 1:
        raise BadVideoError("its frames have several sizes")
    return np.stack([decoded[i] for i in frame_idx])


def shrink_still(image: memoryview, short_side: int) -> bytes:
    """The image as a JPEG whose shorter side has at most this many pixels."""
    picture = Image.fromarray(_open(image, 0)[0])
    scale = min(1.0, short_side / min(picture.size))
    small = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BOX
    )
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def content_hash(images: Iterable[memoryview | bytes]) -> str:
    """sha256 of the encoded images one after the other, hex: the same wherever in a tar they stand."""
    hasher = hashlib.sha256()
    for image in images:
        hasher.update(image)
    return hasher.hexdigest()


def padded_size(num_bytes: int) -> int:
    """Bytes that a member's content takes in a tar."""
    return -(-num_bytes // _BLOCK) * _BLOCK


def _is_followed_by_another(data: bytes) -> bool:
    """Whether a second image of the same kind stands behind the first one. The preview in a camera's file
    with several pictures (MPO) is none."""
    if data.startswith(_JPEG):
        end = _jpeg_end(data)
        return data[end:].lstrip(b"\0\xff\r\n")[:1] == b"\xd8" and b"MPF\0" not in data[:end]
    if data.startswith(_PNG):
        end = data.find(b"IEND", 8) + 8
        return end > 8 and data.startswith(_PNG, end)
    if data.startswith(b"BM"):
        return data[int.from_bytes(data[2:6], "little") :][:2] == b"BM" and len(data) > 2 * 26
    return data[:4] == b"RIFF" and data[8 + int.from_bytes(data[4:8], "little") :][:4] == b"RIFF"


def _jpeg_end(data: bytes) -> int:
    """Where the first image of these bytes ends; at their end where it is cut."""
    start = 2
    while start + 4 <= len(data):
        marker = data[start + 1]
        if marker == 0xD9:
            return start + 2
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xDA:  # what follows is pixels, until a marker that is no part of them
            match = _JPEG_MARKER.search(data, start)
            if match is None:
                break
            start = match.start()
    return len(data)


def _members(run: memoryview) -> list[memoryview]:
    """The contents of consecutive members, as `salt-data pack` writes them; tarfile takes longer for 300
    headers than 16 frames for decoding."""
    images = []
    start = 0
    while start < len(run):
        header = bytes(run[start : start + _BLOCK])
        try:
            size = int(header[124:135], 8)
        except ValueError as error:
            raise BadVideoError(f"its frame {len(images)} is no member of a tar") from error
        start += _BLOCK
        images.append(run[start : start + size])
        start += padded_size(size)
    if start != len(run):
        raise BadVideoError(f"frame {len(images) - 1} is cut off")
    return images


def _open(image: memoryview, number: int) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Pixels and format of an image."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if (
                getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
            ):  # a camera's JPEG with a preview after it
                raise BadVideoError(f"frame {number} is an animation, expected one image")
            if opened.mode not in _MODES:
                raise BadVideoError(
                    f"frame {number} has pixels of mode {opened.mode}, expected at most 8 bits a channel"
                )
            format = (opened.format or "").lower()
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB")), format
    except BadVideoError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # All of these are what Pillow says of damaged headers.
        raise BadVideoError(
            f"frame {number} cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
