"""A part of a file of this machine, which a decoding process reads by itself. It imports no pyarrow."""

from dataclasses import dataclass

from salt_distill.common.clip import BadVideoError


@dataclass(frozen=True)
class Slice:
    """Bytes of a file of this machine."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises BadVideoError where they are not there."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise BadVideoError(f"{self.path} cannot be read ({error.strerror})") from error
        require_whole(data, self.size, self.path)
        return data


def require_whole(data: bytes, size: int, path: str) -> None:
    """Raises BadVideoError unless all bytes of a sample are there."""
    if len(data) != size:
        raise BadVideoError(
            f"{path} has {len(data)} of its {size} bytes, so the tar was cut or replaced after it was indexed"
        )
