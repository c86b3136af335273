"""What there is to pack: lists, folders and globs."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
from pack_tools import VIDEO, encoded_image, packed, samples_of, skipped, write

from salt_distill.common.data.making.lists import read_list
from salt_distill.common.data.shards import open_dataset

# --- lists ---


@pytest.mark.parametrize(
    ("text", "paths", "labels"),
    [
        ("a.mp4 3\nb/c.mp4 0\n", ["a.mp4", "b/c.mp4"], [3, 0]),
        ("riding a mule/x y.mp4 1\n\nz.mp4 2", ["riding a mule/x y.mp4", "z.mp4"], [1, 2]),
        ('"x y.mp4" 1\n', ["x y.mp4"], [1]),
        ("x y.mp4::7\nz.mp4::0\n", ["x y.mp4", "z.mp4"], [7, 0]),
        ("/data/k400/a.mp4 12\n", ["/data/k400/a.mp4"], [12]),
    ],
)
def test_vjepa_lists(tmp_path, text, paths, labels):
    rows, class_names = read_list(write(tmp_path / "train.csv", text))
    assert [row.path for row in rows] == paths
    assert [int(row.labels["class"]) for row in rows] == labels
    assert class_names == {
        "class": [str(number) for number in range(max(labels) + 1)]
    }  # numbers keep their meaning in every list


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.mp4 3\nb.mp4\n", r"line 2: got 'b\.mp4', expected V-JEPA's `path label`"),
        ("a.mp4 1.5\n", "line 1: got 'a.mp4 1.5', expected V-JEPA"),
        (
            "file,label\na.mp4,1\n",
            (
                "line 1: got 'file,label', expected V-JEPA.* or a CSV file whose first line names its"
                " columns: `path`"
            ),
        ),
        ("path,label\na.mp4,1\nb.mp4\n", r"line 3 has not as many cells as the header"),
        ("path,label\na.mp4,1\na.mp4,2\n", r"two rows have the path 'a\.mp4'"),
        ("path,label\n/a.mp4,1\na.mp4,2\n", r"two rows have the path 'a\.mp4'"),
        (b"path,label\na.mp4,caf\xe9\n", "line 2: got a label that is not UTF-8"),
        ("", "got no rows"),
        ("path,label\n", "got no rows"),
        ("path,label\n./a.mp4,1\na.mp4,2\n", r"two rows have the path 'a\.mp4', once as '\./a\.mp4'"),
        ("path,label,Subset\na.mp4,x,train\n", "line 1: got the column 'Subset', which looks like the split"),
        (
            "path,usage\na.mp4,Train\nb.mp4,val\n",
            "line 1: got the column 'usage', which looks like the split",
        ),
        ("path,data_split,c\na.mp4,1,2\n", "line 1: got the column 'data_split', which looks like the split"),
        ("path,split,Split\na.mp4,val,val\n", "line 1: got two columns 'split'"),
        ("path\tlabel\na.mp4\t1\n", "line 1: got .* columns with tabs between them"),
        ("path;label\na.mp4;1\n", "line 1: got .* columns with semicolons between them"),
        ("path,label\na.mp4,1\n".encode("utf-16"), "line 1: got a list in UTF-16"),
        (b"\0\0\0 ftypisom\0\0\2\0", "train.csv: got a file that is no text, expected a list of videos"),
        ("a.mp4\nb.mp4\n", r"line 1: got 'a\.mp4', a path without a label"),
        ("a.mp4 0\nb.mp4 -1\n", "line 2: got the class number -1"),
    ],
)
def test_a_list_that_cannot_be_read_names_the_line(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_list(write(tmp_path / "train.csv", text))


def test_a_header_is_read_as_people_write_it(tmp_path):
    rows, class_names = read_list(
        write(tmp_path / "t.csv", "Path, Label ,SPLIT \n./a.mp4, x, val\nb.mp4,y,\n")
    )
    assert [(row.name, row.labels, row.split) for row in rows] == [
        ("a.mp4", {"Label": "x"}, "val"),
        ("b.mp4", {"Label": "y"}, None),
    ]
    assert class_names == {"Label": ["x", "y"]}


def test_classes_that_are_numbers_come_in_their_order(tmp_path):
    for values, expected in (
        (["10", "2", "-1"], ["-1", "2", "10"]),
        (["10.0", "2.0"], ["2.0", "10.0"]),
        (["1", "01", "10"], ["01", "1", "10"]),
        (["b", "1"], ["1", "b"]),
    ):
        text = "path,c\n" + "".join(f"{place}.mp4,{value}\n" for place, value in enumerate(values))
        assert read_list(write(tmp_path / "t.csv", text))[1] == {"c": expected}
    assert read_list(write(tmp_path / "t.csv", "a.mp4 1.0\n"))[0][0].labels == {"class": "1"}


def test_one_video_is_no_source(tmp_path):
    write(tmp_path / "v" / "a.mp4")
    with pytest.raises(ValueError, match=r"one video or image, expected a folder of them"):
        packed(tmp_path / "v" / "a.mp4", tmp_path / "out")


def test_links_to_what_is_on_no_disk_are_not_followed(tmp_path):
    write(tmp_path / "v" / "a.mp4")
    (tmp_path / "v" / "processes").symlink_to("/proc")
    (tmp_path / "v" / "status.mp4").symlink_to("/proc/self/status")
    packed(tmp_path / "v", tmp_path / "out", max_bad_fraction=0.9)
    assert set(samples_of(tmp_path / "out")) == {"v/a.mp4"}
    assert {name: reason.split(",")[1] for name, reason in skipped(tmp_path / "out").items()} == {
        "processes": " which is on no disk",
        "status.mp4": " which is on no disk",
    }


def test_a_csv_that_excel_saved(tmp_path):
    rows, class_names = read_list(
        write(tmp_path / "train.csv", "\ufeffpath,split,action\r\na.mp4,val,wave\r\nb.mp4,,clap\r\n")
    )
    assert [(row.path, row.split, row.labels) for row in rows] == [
        ("a.mp4", "val", {"action": "wave"}),
        ("b.mp4", None, {"action": "clap"}),
    ]
    assert class_names == {"action": ["clap", "wave"]}


def test_a_vjepa_list_is_packed(tmp_path):
    write(tmp_path / "videos" / "a b.mp4")
    write(tmp_path / "videos" / "no-suffix")
    table = write(
        tmp_path / "train.csv", f"videos/a b.mp4 4\n{tmp_path}/videos/no-suffix 2\nvideos/gone.mp4 0\n"
    )
    packed(table, tmp_path / "out", split="val")
    samples = samples_of(tmp_path / "out")
    assert {key: (sample.labels, sample.split) for key, sample in samples.items()} == {
        "train/videos/a b.mp4": ({"class": 4}, "val"),
        f"train{tmp_path}/videos/no-suffix": ({"class": 2}, "val"),
    }
    assert skipped(tmp_path / "out") == {"gone.mp4": "No such file or directory"}
    tars = [str(tar) for tar in (tmp_path / "out").glob("*.tar")]
    assert [sample["mp4"] for sample in webdataset.WebDataset(tars, shardshuffle=False)] == [VIDEO, VIDEO]


# --- folders ---


@pytest.fixture
def kinetics(tmp_path) -> Path:
    """Six videos of two classes and two splits."""
    for split, names in (("train", "abcd"), ("val", "ef")):
        for name in names:
            write(tmp_path / "k" / split / ("bowling" if name in "ace" else "archery") / f"{name}.mp4")
    return tmp_path / "k"


def test_labels_and_splits_from_folders(kinetics, tmp_path):
    packed(kinetics, tmp_path / "out", label_from_folder="action", split_from_folder=True)
    assert open_dataset(tmp_path / "out").class_names == {"action": ["archery", "bowling"]}
    assert {key: (sample.split, sample.labels) for key, sample in samples_of(tmp_path / "out").items()} == {
        f"k/{split}/{action}/{name}.mp4": (split, {"action": ["archery", "bowling"].index(action)})
        for split, action, name in [
            ("train", "bowling", "a"), ("train", "archery", "b"), ("train", "bowling", "c"), ("train",
            "archery", "d"),
            ("val", "bowling", "e"), ("val", "archery", "f"),
        ]
    }  # fmt: skip


def test_a_video_in_no_class_folder_is_named(kinetics, tmp_path):
    write(kinetics / "train" / "g.mp4")
    with pytest.raises(
        ValueError, match=r"got train/g\.mp4, expected SRC/SPLIT/CLASS/VIDEO for --label-from-folder"
    ):
        packed(kinetics, tmp_path / "out", label_from_folder="action", split_from_folder=True)


def test_a_list_and_a_folder_cannot_both_give_a_label(kinetics, tmp_path):
    table = write(kinetics / "labels.csv", "path,action\ntrain/bowling/a.mp4,strike\n")
    with pytest.raises(ValueError, match="a list that states what --label-from-folder"):
        packed(table, tmp_path / "out", label_from_folder="action")
    packed(table, tmp_path / "out", label_from_folder="folder")
    assert open_dataset(tmp_path / "out").class_names == {"action": ["strike"], "folder": ["bowling"]}


def test_a_shard_is_no_single_class(tmp_path):
    """Folders are often sorted by class, and a run shuffles only a few shards together."""
    for number in range(60):
        write(tmp_path / "v" / f"class-{number // 20}" / f"{number:02d}.mp4")
    packed(tmp_path / "v", tmp_path / "out", label_from_folder="c", max_shard_bytes=30_000)
    for shard in open_dataset(tmp_path / "out").samples("all")[:-1]:
        assert len(shard) > 6
        assert {sample.labels["c"] for sample in shard} == {0, 1, 2}


def test_a_glob_takes_what_it_matches(kinetics, tmp_path):
    packed(f"{kinetics}/*/bowling", tmp_path / "out")
    assert set(samples_of(tmp_path / "out")) == {
        f"k/{name}" for name in ("train/bowling/a.mp4", "train/bowling/c.mp4", "val/bowling/e.mp4")
    }
    packed(f"{kinetics}/**/[ab].mp4", tmp_path / "out", name="ab")
    assert set(samples_of(tmp_path / "out")) == {"ab/train/bowling/a.mp4", "ab/train/archery/b.mp4"}
    with pytest.raises(ValueError, match="a glob that matches nothing"):
        packed(f"{kinetics}/*/juggling", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {},
            (
                "expected videos in it or in its subfolders .*: its 1 images need --images each or --images"
                " frames"
            ),
        ),
        ({"fps": 5}, "got --fps 5 .* a video states its own rate"),
    ],
)
def test_options_that_do_not_fit_the_source(tmp_path, config, sentence):
    write(tmp_path / "v" / "1.png", encoded_image(np.zeros((16, 16, 3), np.uint8)))
    with pytest.raises(ValueError, match=sentence):
        packed(tmp_path / "v", tmp_path / "out", **config)


def test_what_is_not_named_as_a_video_is_counted(tmp_path):
    for name in ("a.mp4", "notes.txt", "no-suffix"):
        write(tmp_path / "v" / name)
    assert "left out 2 files that are not videos by their names, such as" in packed(
        tmp_path / "v", tmp_path / "out"
    )
