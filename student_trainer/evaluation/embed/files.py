"""Files of features: Arrow or Parquet, a row for each clip, readable by plain pyarrow."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float16

from salt_distill.common.whole import whole_file
from salt_distill.student_trainer.evaluation.embed.windows import Window
from salt_distill.student_trainer.evaluation.records import EncoderIdentity, Record

_ABOUT = b"salt.embed"
"""Schema metadata."""


class FeatureTable(Record):
    """What the rows are, in the schema's metadata."""

    writer: ClassVar[str] = "salt-eval embed"

    encoder: EncoderIdentity
    compute: dict[str, str]
    """Device kind, precision and versions of the forward."""
    decoder: str
    videos: str
    """What was embedded: the folder, file or address as it was given."""
    videos_identity: str
    """sha256 of the videos' names and sizes, or the packed data set's index hash."""
    tokens: Literal["clip", "step", "all"]
    window_s: float | None
    stride_s: float | None
    shape: tuple[int, ...]
    """Of a row's features, channels last, time-major."""


def table_of(
    about: FeatureTable,
    rows: Sequence[tuple[str, int, Window]],
    features: Float16[np.ndarray, "rows ..."],
) -> pa.Table:
    """Rows of (path, number of the window, window) with their features."""
    size = int(np.prod(about.shape))
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), size)
    columns = {
        "path": pa.array([path for path, _, _ in rows], pa.string()),
        "window": pa.array([number for _, number, _ in rows], pa.int32()),
        "start_s": pa.array([window.start_s for _, _, window in rows], pa.float64()),
        "end_s": pa.array([window.end_s for _, _, window in rows], pa.float64()),
        "features": values,
    }
    return pa.table(columns).replace_schema_metadata({_ABOUT: about.model_dump_json().encode()})


def write_part(path: Path, table: pa.Table) -> None:
    """An Arrow file; it appears whole."""
    with (
        whole_file(path, synced=False, many_writers=True) as partial,
        pa.ipc.new_file(str(partial), table.schema) as file,
    ):
        file.write_table(table)


def join_parts(out: Path, parts: Sequence[Path]) -> int:
    """Makes one file of the parts, in their order, a part at a time; gives the rows."""
    schema = _read_arrow(parts[0]).schema
    num_rows = 0
    with whole_file(out) as partial:
        is_parquet = out.suffix == ".parquet"
        writer = pq.ParquetWriter(partial, schema) if is_parquet else pa.ipc.new_file(str(partial), schema)
        with writer:
            for part in parts:
                table = _read_arrow(part)
                num_rows += len(table)
                writer.write_table(table)
    return num_rows


def read_features(path: Path) -> tuple[FeatureTable, pa.Table]:
    """A file of `salt-eval embed`. Raises ValueError where it is none."""
    if not path.is_file():
        raise ValueError(f"got --features {path}, expected a file of `salt-eval embed`: it is not there")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_arrow(path)
        return FeatureTable.model_validate_json((table.schema.metadata or {})[_ABOUT]), table
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ValueError(
            f"got --features {path}, expected a file of `salt-eval embed` of this version:"
            f" {type(error).__name__}"
        ) from None


def matrix(table: pa.Table, shape: Sequence[int]) -> Float[np.ndarray, "rows ..."]:
    """The features of all rows, in float32."""
    flat = table["features"].combine_chunks().flatten().to_numpy()
    return flat.astype(np.float32).reshape(-1, *shape)


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()
