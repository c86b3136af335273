"""What the commands of `salt-eval` write as JSON, and read from each other."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from salt_distill.common.config import ViewConfig, explain
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.text_files import read_text
from salt_distill.common.whole import write_whole


class Record(BaseModel):
    """Frozen; an unknown or missing key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    writer: ClassVar[str] = "salt-eval"
    """The command that writes the file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the file holds. Raises ValueError where it is not there, or was written by something else."""
        if not path.is_file():
            raise ValueError(f"got {path}, expected the JSON file of `{cls.writer}`: it is not there")
        try:
            return cls.model_validate_json(read_text(path))
        except ValidationError as error:
            problem = explain(error).splitlines()[0]
            raise ValueError(
                f"{path}: got {problem}; expected what `{cls.writer}` of this version writes: run it again"
            ) from None

    def write(self, path: Path) -> None:
        """Makes the file; it appears whole."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")


class EncoderIdentity(Record):
    """Which weights a number is of, and on which clips. Numbers of several commands are joined by this."""

    fingerprint: str
    """Of architecture and weights (Note [fingerprint]): equal for equal weights, whatever they are called."""
    view: ViewConfig
    """The clips that the encoder was given."""

    @classmethod
    def of(cls, encoder: FrozenEncoder, fingerprint: str) -> Self:
        """Of an encoder that has been loaded."""
        return cls(fingerprint=fingerprint, view=encoder.view)

    @property
    def clips(self) -> str:
        """The clips in words."""
        view = self.view
        return f"{view.num_frames} frames, one in {view.frame_step}, of {view.size_text} pixels"


def index_hash(data: str) -> str:
    """The hash of a packed data set's index, which says what clips it has."""
    return open_dataset(data).index_hash
