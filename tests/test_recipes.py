"""The files of recipes/: what they mean to the commands that take them, their sums, and the layouts that they
pack."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from command_tools import losses
from pack_tools import grey_video, samples_of, write
from pages import ROOT
from typer.testing import CliRunner

import salt_distill.common.data.making.cli as data
import salt_distill.student_trainer.cli as train
from salt_distill.common.config import MASK_GROUP_SIZE, OptimConfig
from salt_distill.common.data.index import load_index

RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("one-gpu", "eight-gpus", "cluster")
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
)
PAPERS_BATCH = 3072


def command_of(recipe: str) -> str:
    return recipe.removesuffix(".yaml").rpartition("-")[2]


def run(app, *words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def printed(*words: object) -> tuple[dict, str]:
    """A configuration that `salt-train` prints, and what it says beside it."""
    done = CliRunner().invoke(train.app, [*map(str, words), "--print-config"])
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.stdout), done.stderr


def test_there_is_a_recipe_of_each_kind_for_each_machine():
    assert {Path(recipe).parent.name for recipe in RECIPES} == {"one-gpu", "eight-gpus", "cluster"}
    assert {Path(recipe).stem.rpartition("-")[0] for recipe in RECIPES} == {"tiny", "small", "vit-b", "vit-l"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_sums_of_a_recipe(recipe):
    teacher = ["--teacher-url", "http://teacher"] if command_of(recipe) == "student" else []
    config, said = printed(command_of(recipe), "--config", ROOT / recipe, *teacher)
    assert said == ""  # it has a rate and a warm-up of its own
    scale = (config["batch_size"] / PAPERS_BATCH) ** 0.5
    for name in ("lr", "start_lr", "final_lr"):
        of_paper = OptimConfig.model_fields[name].default
        assert config["optim"][name] == pytest.approx(of_paper * scale, rel=1e-3), name
    papers_steps = {"teacher": 80_000, "student": 160_000}[command_of(recipe)]
    assert (config["steps"], config["optim"]["warmup_steps"]) == (papers_steps, 10_000)
    assert config["batch_size"] % (MASK_GROUP_SIZE * max(config["workers"], 1)) == 0
    if config["workers"]:
        assert config["loader"]["decode_processes"] <= config["cpus_per_worker"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_comment_of_a_recipe_has_its_own_commands(recipe):
    text = (ROOT / recipe).read_text()
    commands = re.findall(rf"#   salt-train {command_of(recipe)} --config {recipe} (.*)", text)
    assert len(commands) == 2
    assert commands[0] == "--estimate --gpu h100"
    printed(command_of(recipe), "--config", ROOT / recipe, *commands[1].split())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_time_of_a_recipe_is_what_its_command_counts(recipe):
    said = run(train.app, command_of(recipe), "--config", ROOT / recipe, "--estimate", "--gpu", "h100")
    counted = re.search(r"A step: ([\d,]+) to ([\d,]+) ms; [\d,]+ steps: ([\d.]+) to ([\d.]+) hours", said)
    assert counted, said
    text = (ROOT / recipe).read_text()
    hours = re.search(r"# (\d+) to (\d+) hours", text)
    milliseconds = re.search(r"steps of (\d+) to (\d+) ms", text)
    assert hours
    assert milliseconds
    # The count is PyTorch's kernels, which another version may have otherwise.
    assert [*map(int, milliseconds.groups())] == pytest.approx([*map(float, counted.groups()[:2])], rel=0.1)
    assert [*map(int, hours.groups())] == pytest.approx([*map(float, counted.groups()[2:])], rel=0.15)
    assert "fits" in said


@pytest.mark.slow
def test_a_recipe_trains_with_other_values(tmp_path):
    for number in range(6):
        write(tmp_path / "videos" / f"{number}.mp4", grey_video(*range(0, 240, 6), fps=10, size=(64, 64)))
    run(data.app, "pack", tmp_path / "videos", tmp_path / "shards")
    small = ["encoder.width=24", "encoder.num_heads=2", "encoder.depth=1", "predictor.width=24"]
    small += ["predictor.num_heads=2", "predictor.depth=1", "view.crop_size=32", "view.num_frames=4"]
    small += ["optim.warmup_steps=1", "loader.decode_processes=0"]
    run(
        train.app, "teacher", "--config", ROOT / "recipes/one-gpu/tiny-teacher.yaml",
        "--data", tmp_path / "shards", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 6,
        "--log-every", 1, *[word for value in small for word in ("--set", value)],
    )  # fmt: skip
    assert len(losses(tmp_path / "run")) == 2
    made = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (made["optim"]["lr"], made["batch_size"], made["keep_last"]) == (1.5625e-4, 6, 3)


def test_another_batch_size_than_the_presets_is_said():
    config, said = printed("teacher", "--preset", "tiny", "--batch-size", 192)
    assert config["optim"]["lr"] == 6.25e-4
    assert " ".join(said.split()) == (
        "batch_size=192 in place of the preset's 3072: optim.lr stays 0.000625; the square-root rule for"
        " AdamW gives --set optim.lr=0.000156"
    )
    assert "optim.lr stays 0.001;" in printed("teacher", "--preset", "nano", "--batch-size", 48)[1]
    for words in (["--batch-size", 3072], ["--batch-size", 192, "--set", "optim.lr=1e-3"]):
        assert printed("teacher", "--preset", "tiny", *words)[1] == ""


def test_a_file_whose_group_is_no_mapping_is_told_so(tmp_path):
    file = write(tmp_path / "run.yaml", "optim: 3\n")
    done = CliRunner().invoke(train.app, ["teacher", "--config", str(file), "--print-config"])
    assert "optim: got 3, expected keys and values" in str(done.exception)


# Archives as they are handed out, small


def seconds(number: int, length: int = 10) -> bytes:
    return grey_video(*[5 * number] * length, fps=1)


def webm(number: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", "webm") as container:
        stream = container.add_stream("libvpx-vp9", 12, width=32, height=24, pix_fmt="yuv420p")
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 40 + 20 * number, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def write_kinetics(folder: Path, ids: dict[str, list[str]], first: int) -> None:
    """Videos without folders of classes, and annotations that name one video more than there are."""
    for split, names in ids.items():
        rows = ["label,youtube_id,time_start,time_end,split"]
        for number, name in enumerate([*names, "gone0000000"]):
            rows.append(f'"class {number % 2}",{name},1,11,{split}')
            if name in names:
                write(folder / split / f"{name}_000001_000011.mp4", seconds(first))
                first += 1
        write(folder / "annotations" / f"{split}.csv", "\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("archives")
    write_kinetics(root / "k400", {"train": ["a0000000000", "b0000000000"], "val": ["c0000000000"]}, 1)
    write(root / "k400/train/b0000000000_000001_000011.mp4", b"damaged")
    write(root / "k400/replacement/replacement_for_corrupted_k400/b0000000000_000002_000012.mp4", seconds(2))
    write_kinetics(root / "k600", {"train": ["b0000000000", "-_000000000"], "val": ["d0000000000"]}, 10)
    write_kinetics(root / "k700", {"train": ["c0000000000", "e0000000000"], "val": ["f0000000000"]}, 20)
    write(root / "k600/annotations/test.csv", "youtube_id,time_start,time_end,split\ng0000000000,1,11,test\n")
    write(root / "k600/test/g0000000000_000001_000011.mp4", seconds(30))
    for number in range(3):
        write(root / f"ssv2/20bn-something-something-v2/{number}.webm", webm(number))
    for split, numbers in (("train", (0, 1)), ("validation", (2,))):
        entries = [
            {
                "id": str(number),
                "label": "holding a pen",
                "template": "Holding [something]",
                "placeholders": [],
            }
            for number in numbers
        ]
        write(root / f"ssv2/labels/{split}.json", json.dumps(entries))
    for number, length in enumerate((2, 5, 30, 60)):
        write(root / f"panda70m/00000/0000000_0000{number}.mp4", seconds(40 + number, length))
        write(root / f"panda70m/00000/0000000_0000{number}.txt", "a caption")
        write(root / f"panda70m/00000/0000000_0000{number}.json", "{}")
    return root


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))


def listed(layout: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "recipes/data/lists.py"
    return subprocess.run(
        [sys.executable, script, layout, folder], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.slow
def test_released_archives_become_the_mixture_of_the_paper(archives):
    for name in ("k400", "k600", "k700"):
        assert listed("kinetics", archives / name).returncode == 0
    assert "3 videos; 1 more are named and not there" in listed("kinetics", archives / "k400").stdout
    assert "3 videos; 0 more" in listed("ssv2", archives / "ssv2").stdout
    assert rows_of(archives / "k400")[1:3] == [
        ["train/a0000000000_000001_000011.mp4", "class 0", "train"],
        [
            "replacement/replacement_for_corrupted_k400/b0000000000_000002_000012.mp4", "class 1", "train",
        ],
    ]  # fmt: skip
    assert ["test/g0000000000_000001_000011.mp4", "", "test"] in rows_of(archives / "k600")
    packed = archives / "packed"
    for folder, name in (("k400", "K400"), ("k600", "K600"), ("k700", "K700"), ("ssv2", "SSv2")):
        recipe = ROOT / "recipes/data" / ("ssv2.yaml" if folder == "ssv2" else "kinetics.yaml")
        run(data.app, "pack", archives / folder, packed / name, "--config", recipe)
    recipe = ROOT / "recipes/data/panda70m.yaml"
    run(data.app, "pack", archives / "panda70m", packed / "Panda70M", "--config", recipe)
    assert set(samples_of(packed / "SSv2", "val")) == {"ssv2/20bn-something-something-v2/2.webm"}
    shutil.copy(ROOT / "recipes/data/v-3.6m.yaml", packed)
    run(data.app, "mix", packed / "v-3.6m.yaml", packed / "V-3.6M")
    keys = [key.partition("/")[2] for key in sorted(samples_of(packed / "V-3.6M", "train"))]
    assert [Path(key).name for key in keys] == [
        "b0000000000_000002_000012.mp4",
        "a0000000000_000001_000011.mp4",
        "-_000000000_000001_000011.mp4",
        "e0000000000_000001_000011.mp4",
        "0000000_00001.mp4",
        "0000000_00002.mp4",
        "0.webm",
        "1.webm",
    ]
    removed = {each.path: each.removed for each in load_index(packed / "V-3.6M")[0].selections}
    assert removed["../Panda70M"]["out of range"] == 2


def test_another_layout_writes_no_list(tmp_path):
    write(tmp_path / "a.mp4", seconds(1))
    done = listed("kinetics", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "got 0 rows of annotations and 1 videos, none of them in both" in done.stderr
    assert not (tmp_path / "labels.csv").exists()
