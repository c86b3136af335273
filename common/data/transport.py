"""What was lost of an MPEG transport stream on its way: told apart from the seam of two streams that are
whole."""

from collections.abc import Sequence

import av
import numpy as np

from salt_distill.common.clip import BadVideoError

_SYNC, _PACKET = 0x47, 188
_STRIDES = (188, 192, 204)
"""Bytes from one packet to the next: plain, after a time stamp (Blu-ray, cameras), before parity bytes."""
_COUNTER = 16
"""Packets of a stream are counted modulo this."""


def require_all_packets(data: bytes, container: str, stream_id: int, packets: Sequence[av.Packet]) -> None:
    """Raises BadVideoError where something of a stream was lost: what FFmpeg marks as damaged, and breaks in
    the counters of a transport stream, some of which FFmpeg does not mark. The seam of two transport streams
    that are whole is no loss, although FFmpeg marks it."""
    marked = [number for number, packet in enumerate(packets) if packet.is_corrupt]
    whole = _is_whole(data, stream_id, packets) if container == "mpegts" else None
    if whole is None and marked:
        raise BadVideoError(
            f"a part of it was lost: packet {marked[0]} of {len(packets)} is damaged or cut short"
        )
    if whole is False:
        raise BadVideoError("a part of it was lost: packets of its transport stream are missing")


def _is_whole(data: bytes, stream_id: int, pictures: Sequence[av.Packet]) -> bool | None:
    """Whether every break in the counters of a stream's packets is a seam: the picture before it is there to
    its end, and a key frame follows. None where packets do not follow each other at even distances."""
    first = data.find(_SYNC)
    stride = next((stride for stride in _STRIDES if _is_aligned(data, first, stride)), None)
    if stride is None:
        return None
    num_packets = (len(data) - first - _PACKET) // stride + 1
    packets = np.lib.stride_tricks.as_strided(
        np.frombuffer(data, np.uint8, offset=first), (num_packets, _PACKET), (stride, 1), writeable=False
    )
    if (packets[:, 0] != _SYNC).any():
        return None
    of_stream = np.flatnonzero((packets[:, 1] & 31).astype(int) << 8 | packets[:, 2] == stream_id)
    headers = packets[of_stream]
    has_payload = headers[:, 3] & 16 != 0
    if (headers[:, 1] & 128).any():  # the receiver's mark
        return False
    headers, of_stream = headers[has_payload], of_stream[has_payload]
    steps = np.diff(headers[:, 3] & 15) % _COUNTER
    announced = (headers[:, 3] & 32 != 0) & (headers[:, 4] > 0) & (headers[:, 5] & 128 != 0)
    # A step of 0 is a packet that was sent twice.
    breaks = [place for place in np.flatnonzero(steps > 1) + 1 if not announced[place]]
    key_frames = [packet.pos for packet in pictures if packet.is_keyframe and packet.pos is not None]
    starts = {
        (pos - first + stride - 1) // stride for pos in key_frames
    }  # FFmpeg counts a time stamp before a packet to it
    return all(
        headers[place, 1] & 64 != 0
        and int(of_stream[place]) in starts
        and _ends_a_picture(headers[place - 1])
        for place in breaks
    )


def _is_aligned(data: bytes, first: int, stride: int) -> bool:
    return first >= 0 and all(byte == _SYNC for byte in data[first : first + 5 * stride : stride])


def _ends_a_picture(packet: np.ndarray) -> bool:
    """Whether a packet is filled up, as only the last one of a picture is."""
    if not packet[3] & 32:
        return False
    length, flags = int(packet[4]), int(packet[5])
    used = 1 + 6 * bool(flags & 16) + 6 * bool(flags & 8) + bool(flags & 4)
    return length == 0 or length > used
