"""The `labels.csv` of released archives, for `salt-data pack`: what their annotations say of the videos that
are there. Needs nothing but Python.

    python recipes/data/lists.py kinetics FOLDER
    python recipes/data/lists.py ssv2 FOLDER
"""

import csv
import json
import sys
from pathlib import Path

SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
VIDEOS = {".mp4", ".mkv", ".webm"}
ID_LETTERS = 11
"""Of YouTube: the times in the names of Kinetics' files are not always those of its annotations."""
Row = tuple[str, str, str]
"""What a video is known by, its class (empty where nobody says), its split."""


def kinetics(folder: Path) -> tuple[list[Row], dict[str, Path]]:
    """Rows of `annotations/SPLIT.csv`, where test sets may lack a label, and videos by their YouTube id."""
    rows = []
    for path in sorted((folder / "annotations").glob("*.csv")):
        if path.stem in SPLITS:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    rows.append((row["youtube_id"], row.get("label") or "", SPLITS[path.stem]))
    replacements_last = sorted(videos(folder), key=lambda path: path.is_relative_to(folder / "replacement"))
    return rows, {path.stem[:ID_LETTERS]: path for path in replacements_last}


def ssv2(folder: Path) -> tuple[list[Row], dict[str, Path]]:
    """Rows of `train.json` and `validation.json`, whatever stands before, and videos by their number; a class
    is a template without brackets."""
    rows = []
    for path in sorted(folder.rglob("*.json")):
        split = path.stem.rpartition("-")[2]
        if split in ("train", "validation"):
            for entry in json.loads(path.read_text()):
                label = entry["template"].replace("[", "").replace("]", "")
                rows.append((str(entry["id"]), label, SPLITS[split]))
    return rows, {path.stem: path for path in videos(folder)}


def videos(folder: Path) -> list[Path]:
    """All below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in VIDEOS)


def main(layout: str, folder: Path) -> None:
    """Writes `labels.csv`, and says how many videos it names and how many are not there."""
    rows, found = {"kinetics": kinetics, "ssv2": ssv2}[layout](folder)
    first_of = {key: (key, label, split) for key, label, split in reversed(rows)}
    here = [row for key, row in sorted(first_of.items()) if key in found]
    if not here:
        sys.exit(
            f"{folder}: got {len(rows)} rows of annotations and {len(found)} videos, none of them in both,"
            f" expected the layout that recipes/data/{layout}.yaml describes"
        )
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "action", "split"))
        writer.writerows((found[key].relative_to(folder), label, split) for key, label, split in here)
    print(f"{table}: {len(here):,} videos; {len(first_of) - len(here):,} more are named and not there")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("kinetics", "ssv2"):
        sys.exit(f"got {' '.join(sys.argv[1:]) or 'nothing'}, expected kinetics FOLDER or ssv2 FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
