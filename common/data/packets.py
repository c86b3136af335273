"""The packets of a video stream: which frame each one shows, and which of them have to be decoded for a
frame."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from jaxtyping import Int64

_SELF_CONTAINED = frozenset(["vp8", "vp9", "av1"])
"""Codecs whose decoder forgets everything at a key frame. Others are decoded from their start, except H.264
and HEVC, which say where it does."""
_START_CODE = re.compile(b"\x00\x00\x01")


class Packets:
    """All packets of a stream in decoding order, still encoded."""

    def __init__(self, stream: Any, packets: Iterable[av.Packet], num_frames: int | None) -> None:
        """``num_frames``: as counted by whoever decoded all of the video."""
        self._packets = list(packets)
        changes = (
            number for number, packet in enumerate(self._packets) if packet.has_sidedata("new_extradata")
        )
        self._first_change = next(changes, len(self._packets))
        """The first packet that brings other parameter sets along, outside of its units."""
        self._units = _Units(stream.codec.canonical_name, bytes(stream.codec_context.extradata or b""))
        self.times = self._times(num_frames)
        """When each frame is shown, in ticks, ascending. None where the packets do not tell this of just
        ``num_frames`` frames."""

    def __iter__(self) -> Iterator[av.Packet]:
        return iter(self._packets)

    def needed(self, wanted: set[int]) -> Iterator[av.Packet]:
        """What gives the frames shown at these times exactly as a decoding of everything does: from the last
        point before them where the decoder starts afresh to the last of them, without the frames that no
        other one refers to. For videos whose ``times`` are known."""
        places = [number for number, packet in enumerate(self._packets) if packet.pts in wanted]
        # Nothing wanted is decoded before the entry, and nothing shown before it is wanted.
        ahead = self._packets[: places[0] + 1]
        first = max(
            (number for number in self._entries(ahead) if (ahead[number].pts or 0) <= min(wanted)), default=0
        )
        for packet in self._packets[first : places[-1] + 1]:
            if (
                packet.pts in wanted
                or not self._units.is_disposable(packet)
                or packet.has_sidedata("new_extradata")
            ):
                yield packet

    def starts_afresh_at_key_frames(self) -> bool:
        """Whether a decoder may start at any key frame, as one does that takes their word for it."""
        return self._entries(self._packets) == [
            number for number, packet in enumerate(self._packets) if packet.is_keyframe
        ]

    def _times(self, num_frames: int | None) -> Int64[np.ndarray, " n"] | None:
        if any(packet.pts is None for packet in self._packets):
            return None
        ticks = [
            packet.pts for packet in self._packets if not packet.is_discard
        ]  # the rest is outside of the edit list of an mp4
        times = np.unique(np.array(ticks, np.int64))
        return times if len(times) == len(ticks) == num_frames else None

    def _entries(self, packets: list[av.Packet]) -> list[int]:
        """The places of the packets from which a decoder gives what is shown after them without what comes
        before them."""
        entries = []
        parameters: set[bytes] = set()
        for number, packet in enumerate(packets[: self._first_change]):
            packet_parameters = self._units.parameter_sets(packet)
            # Parameter sets may stand beside the pictures: a decoder that starts here has to know those that
            # came before.
            if (
                packet.is_keyframe
                and self._units.starts_afresh(packet)
                and all(self._units.is_known(unit, packet_parameters) for unit in parameters)
            ):
                entries.append(number)
            parameters |= packet_parameters
        return entries


class _Units:
    """What the units of a packet of H.264 or HEVC say of it."""

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec, self._extradata = codec, extradata
        at = {"h264": 4, "hevc": 21}.get(codec, 0)
        self._length_size = (
            (extradata[at] & 3) + 1 if at and extradata[:1] == b"\1" and len(extradata) > at else 0
        )
        """Bytes of the length before each unit, as mp4 and Matroska have it; 0 where start codes stand
        between them."""

    def starts_afresh(self, packet: av.Packet) -> bool:
        """Whether what is shown after this key frame never refers to what comes before it."""
        if self._codec == "h264":
            # IDR; other key frames are recovery points, after which pictures may only get better.
            return any(unit[0] & 31 == 5 for unit in self._split(packet))
        if self._codec == "hevc":
            return any(16 <= unit[0] >> 1 & 63 <= 21 for unit in self._split(packet))  # IRAP
        return self._codec in _SELF_CONTAINED

    def is_disposable(self, packet: av.Packet) -> bool:
        """Whether H.264 says that no other picture refers to this one (nal_ref_idc 0 in each of its
        slices)."""
        if self._codec != "h264":
            return False
        slices = [unit[0] for unit in self._split(packet) if 1 <= unit[0] & 31 <= 5]
        return bool(slices) and all(header & 96 == 0 for header in slices)

    def parameter_sets(self, packet: av.Packet) -> set[bytes]:
        """The units that later ones refer to by number."""
        if self._codec == "h264":
            return {bytes(unit) for unit in self._split(packet) if 7 <= unit[0] & 31 <= 8}
        if self._codec == "hevc":
            return {bytes(unit) for unit in self._split(packet) if 32 <= unit[0] >> 1 & 63 <= 34}
        return set()

    def is_known(self, unit: bytes, packet_parameters: set[bytes]) -> bool:
        """Whether a decoder that starts at a packet with these parameter sets knows another one."""
        return unit in packet_parameters or unit in self._extradata

    def _split(self, packet: av.Packet) -> Iterator[memoryview]:
        """The units, none of them empty."""
        data = memoryview(packet)
        if not self._length_size:
            starts = [found.end() for found in _START_CODE.finditer(data)]
            for start, end in zip(starts, [*(start - 3 for start in starts[1:]), len(data)], strict=True):
                if start < end:
                    yield data[start:end]
            return
        start = self._length_size
        while start < len(data):
            end = start + int.from_bytes(data[start - self._length_size : start], "big")
            if start < end:
                yield data[start:end]
            start = end + self._length_size
