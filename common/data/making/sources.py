"""What there is to pack: a folder, a glob or a list -> videos with names, labels and splits."""

import glob
import hashlib
import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from salt_distill.common.config import PackConfig
from salt_distill.common.data.making.lists import Row, class_names_of, read_list
from salt_distill.common.data.skipped import printable
from salt_distill.common.data.stills import IMAGE_SUFFIXES
from salt_distill.common.data.video import VIDEO_SUFFIXES

Rows = dict[str, tuple[Path, Row]]
"""Name -> where the video is, and what a list says of it."""

_LABELS = "labels.csv"
"""The list that is read where it lies in the folder to pack."""


@dataclass(frozen=True)
class UnpackedVideo:
    """One video before it is packed: a file, or a folder of frames."""

    path: Path
    name: str
    """Path inside SRC, with its suffix; as a list writes it."""
    labels: dict[str, int]
    split: str


@dataclass
class Listing:
    """What SRC holds."""

    name: str
    """Of the source, in keys and file names."""
    class_names: dict[str, list[str]]
    sources: list[UnpackedVideo]
    """In the order in which they are packed."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what cannot even be tried."""
    num_left_out: int = 0
    """Files that are not named as what was asked for."""
    left_out: str = ""
    """The first of them."""
    unread_lists: list[str] = field(default_factory=list)
    """Lists of labels in subfolders, which nothing reads."""


def is_of_the_kernel(path: Path) -> bool:
    """Whether a path leads, by links too, to what the kernel shows as files: processes, devices."""
    return Path(os.path.realpath(path)).parts[:2] in (("/", "proc"), ("/", "sys"))


def list_sources(config: PackConfig) -> Listing:
    """What ``config.src`` holds, in an order that mixes folders: by the hash of the name, so that a shard is
    no single class.

    Raises ValueError where there is nothing to pack, or labels or splits are not where the options say.
    """
    src = Path(config.src)
    table = src / _LABELS if src.is_dir() else src
    _require_no_video(src)
    listing, sources = _from_list(config, src, table) if table.is_file() else _from_folder(config, src)
    if not listing.name:
        raise ValueError(f"got SRC {src}, which has no name, expected --name")
    for name in [name for name in sources if printable(name) != name]:
        listing.skipped.append((printable(sources.pop(name)[0]), "its name is not UTF-8"))
    named = {name: _placed(config, name, row) for name, (_, row) in sources.items()}
    if config.label_from_folder is not None:
        listing.class_names[config.label_from_folder] = class_names_of(
            {row.labels[config.label_from_folder] for row in named.values()}
        )
    value_of = {
        label: {name: value for value, name in enumerate(names)}
        for label, names in listing.class_names.items()
    }
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest()):
        path, row = sources[name][0], named[name]
        labels = {label: value_of[label][class_name] for label, class_name in row.labels.items()}
        listing.sources.append(UnpackedVideo(path, name, labels, row.split or config.split))
    return listing


def _from_list(config: PackConfig, src: Path, table: Path) -> tuple[Listing, Rows]:
    """What a list names."""
    if config.images is not None:
        raise ValueError(
            f"got --images {config.images} with the list {table}, expected it for a folder or glob: a list"
            " names what is packed"
        )
    try:
        rows, class_names = read_list(table)
    except ValueError as error:
        if table is src:
            raise
        raise ValueError(f"{error}. To pack the folder without this list, give the glob '{src}/*'") from error
    listing = Listing(config.name or (src.stem if src.is_file() else src.resolve().name), class_names, [])
    return listing, {row.name: (table.parent / row.path, row) for row in rows}


def _from_folder(config: PackConfig, src: Path) -> tuple[Listing, Rows]:
    """What a folder holds, or a glob matches."""
    if config.fps is not None and config.images != "frames":
        raise ValueError(
            f"got --fps {config.fps:g} for SRC {src}, expected it with --images frames or a list: a video"
            " states its own rate"
        )
    tree = _Tree(*_roots(config.src), config.images)
    listing = Listing(
        config.name or tree.base.resolve().name,
        {},
        [],
        tree.skipped,
        tree.num_left_out,
        tree.left_out,
        tree.unread_lists,
    )
    return listing, {name: (path, Row(name, {}, None)) for name, path in tree.paths.items()}


def _require_no_video(src: Path) -> None:
    if src.is_file() and src.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise ValueError(
            f"got SRC {src}, one video or image, expected a folder of them, a quoted glob or a list: give the"
            f" folder {src.parent}"
        )


def _placed(config: PackConfig, name: str, row: Row) -> Row:
    """The row with the label and split that its folders give."""
    parts = PurePosixPath(name).parts
    if len(parts) < 1 + (config.label_from_folder is not None) + config.split_from_folder:
        expected = "/".join(
            [
                "SRC",
                *["SPLIT"] * config.split_from_folder,
                *["CLASS"] * (config.label_from_folder is not None),
                "VIDEO",
            ]
        )
        raise ValueError(f"got {name}, expected {expected} for --label-from-folder and --split-from-folder")
    if config.label_from_folder in row.labels or (config.split_from_folder and row.split is not None):
        raise ValueError(
            f"{config.src}: got a list that states what --label-from-folder or --split-from-folder would,"
            " expected one of them"
        )
    labels = (
        row.labels if config.label_from_folder is None else row.labels | {config.label_from_folder: parts[-2]}
    )
    return replace(row, labels=labels, split=parts[0] if config.split_from_folder else row.split)


def _roots(src: str) -> tuple[Path, list[Path]]:
    """(folder that names are relative to, what to walk) of a folder or a glob."""
    if Path(src).is_dir():
        return Path(src), [Path(src)]
    if not glob.has_magic(src):
        raise ValueError(f"got SRC {src}, expected a folder of videos, a list or a glob: there is none")
    parts = Path(src).parts
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    roots = [Path(path) for path in sorted(glob.glob(src, recursive=True))]
    if not roots:
        raise ValueError(f"got SRC {src}, a glob that matches nothing")
    return base, roots


class _Tree:
    """The videos below some folders."""

    def __init__(self, base: Path, roots: list[Path], images: str | None) -> None:
        self.base, self._images = base, images
        self.paths: dict[str, Path] = {}
        """Name -> a file, or a folder of frames."""
        self.skipped: list[tuple[str, str]] = []
        self.num_left_out, self.left_out = 0, ""
        self.unread_lists: list[str] = []
        self._num_images = 0
        named_as_videos: list[Path] = []
        for root in roots:
            if not root.is_dir():
                self._take(root.parent, [root.name])
                continue
            for parent, folders, files in os.walk(root, onerror=self._unreadable, followlinks=True):
                here = Path(parent)
                folders[:] = [folder for folder in folders if not self._is_no_way(here / folder)]
                named_as_videos += [
                    here / folder for folder in folders if Path(folder).suffix.lower() in VIDEO_SUFFIXES
                ]
                self._take(here, files)
        inhabited = (
            {parent for path in self.paths.values() for parent in (path, *path.parents)}
            if named_as_videos
            else set()
        )
        for folder in named_as_videos:
            if folder not in inhabited:
                self._add(folder)  # whoever named it meant a video
        if not self.paths:
            images = (
                f": its {self._num_images} images need --images each or --images frames"
                if self._num_images and not self._images
                else ""
            )
            raise ValueError(
                f"got SRC {base}, expected videos in it or in its subfolders"
                f" ({' '.join(sorted(VIDEO_SUFFIXES))}){images}"
            )

    def _take(self, folder: Path, files: list[str]) -> None:
        num_images = 0
        for file in files:
            suffix = Path(file).suffix.lower()
            if file == _LABELS:
                self.unread_lists.append(printable(folder / file))
            num_images += suffix in IMAGE_SUFFIXES and not file.startswith("._")
            if file.startswith("._"):  # what macOS writes beside files
                self.num_left_out += 1
                self.left_out = self.left_out or printable(folder / file)
            elif suffix in VIDEO_SUFFIXES or (suffix in IMAGE_SUFFIXES and self._images == "each"):
                self._add(folder / file)
            elif suffix not in IMAGE_SUFFIXES or self._images is None:
                self.num_left_out += 1
                self.left_out = self.left_out or printable(folder / file)
        self._num_images += num_images
        if num_images and self._images == "frames":
            self._add(folder)

    def _add(self, path: Path) -> None:
        self.paths[
            self.base.resolve().name if path == self.base else path.relative_to(self.base).as_posix()
        ] = path

    def _unreadable(self, error: OSError) -> None:
        self.skipped.append((printable(error.filename), error.strerror or str(error)))

    def _is_no_way(self, folder: Path) -> bool:
        """Whether a folder is a link to one that it lies in, or to what the kernel shows as files; walking on
        would never end."""
        if not folder.is_symlink():
            return False
        target = os.path.realpath(folder)
        if is_of_the_kernel(folder):
            self.skipped.append((printable(folder), f"it is a link to {target}, which is on no disk"))
            return True
        loop = any(os.path.realpath(parent) == target for parent in Path(os.path.abspath(folder)).parents)
        if loop:
            self.skipped.append((printable(folder), "it is a link to a folder that it lies in"))
        return loop
