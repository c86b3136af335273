"""`salt-eval probe` on real checkpoints and a real packed data set."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from eval_tools import CONFIG, make_dataset, make_models, make_run
from PIL import Image
from train_tools import ALONE

from salt_distill.common.config import FrozenConfig, LoaderConfig, ProbeConfig
from salt_distill.common.data.index import write_index
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.checkpoint import open_encoder, save_checkpoint
from salt_distill.student_trainer.evaluation.probe import features
from salt_distill.student_trainer.evaluation.probe.feature_files import TokensOnDisk
from salt_distill.student_trainer.evaluation.probe.features import EncoderOnDevice, in_batches
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeGrid
from salt_distill.student_trainer.evaluation.probe.run import list_candidates, run

FEW = {"epochs": 15, "batch_size": 8, "lr": (5e-3,)}
GRID = {"epochs": 6, "batch_size": 8, "lr": (5e-3, 1e-5), "weight_decay": (0.01, 0.5)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("eval") / "toy", num_clips=45)


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("eval") / "three", num_clips=45, splits=("train", "val", "test")
    )


def probe(tmp_path, data, **values):
    loader = LoaderConfig(decode_processes=0)  # they take longer to start than these clips to decode
    run(ProbeConfig(data=str(data), out=str(tmp_path / "probe.json"), loader=loader, **values))
    return json.loads((tmp_path / "probe.json").read_text())


def test_table_of_checkpoints_and_random_weights(tmp_path, data, capsys):
    ours, other = make_run(tmp_path / "ours", data), make_run(tmp_path / "other", data, seed=1)
    found = probe(tmp_path, data, ckpt=(str(ours), str(other)), random_init=True, **FEW)
    assert list(found["accuracy"]) == ["random-init", "ours", "other"]
    assert found["labels"]["shade"] == {
        "num_classes": 3, "class_names": ["dark", "middle", "light"], "chance": pytest.approx(1 / 3),
        "num_train": 30, "num_test": 15,
    }  # fmt: skip
    assert found["accuracy"]["ours"]["shade"] > 0.8  # brightness is easy, even for random weights
    for name, row in found["accuracy"].items():
        for label, accuracy in row.items():
            low, high = found["interval"][name][label]
            assert low <= accuracy <= high
            assert accuracy == found["num_correct"][name][label] / 15
    shown = capsys.readouterr().out
    assert "random-init" in shown
    assert "chance" in shown


def test_same_numbers_again_and_whatever_stands_beside(tmp_path, data):
    first, second = make_run(tmp_path / "first", data), make_run(tmp_path / "second", data, seed=1)
    together = probe(tmp_path, data, ckpt=(str(first), str(second)), **FEW)["accuracy"]
    alone = probe(tmp_path, data, ckpt=(str(second),), **FEW)["accuracy"]
    assert together["second"] == alone["second"]


def test_no_labels_is_a_sentence_and_an_empty_table(tmp_path, capsys):
    data = make_dataset(tmp_path / "unlabelled", labels=False, num_clips=9)
    found = probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "run", data)),))
    assert found["accuracy"] == {}
    assert "carry no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("splits", "values", "message"),
    [
        (("train", "validation"), {}, r"got splits train, validation, expected 'train'.*'test' \(or 'val'\)"),
        (("train", "test"), GRID, r"got no split 'val', expected one to choose among 4 settings on"),
    ],
)
def test_splits_that_cannot_be_honest_are_errors(tmp_path, splits, values, message):
    data = make_dataset(tmp_path / "toy", num_clips=9, splits=splits)
    with pytest.raises(ValueError, match=message):
        probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "run", data)),), **values)


def test_the_best_of_a_grid_is_chosen_on_val_and_reported_on_test(tmp_path, three_splits, monkeypatch):
    """Whatever the probes say: the setting that is right on `val` is reported, though another is right on
    `test`."""
    run_dir = make_run(tmp_path / "ours", three_splits)
    found = probe(tmp_path, three_splits, ckpt=(str(run_dir),), **GRID)
    assert (
        found["reported_on"],
        found["labels"]["shade"]["num_train"],
        found["labels"]["shade"]["num_test"],
    ) == ("test", 15, 15)
    assert "the best of 4 settings on 'val'" in found["protocol"]
    assert found["setting"]["ours"]["shade"]["lr"] == 5e-3  # with 1e-5 nothing is learned
    real = ProbeGrid.examine

    def rigged(self, tokens, labels, batch_size):
        examined = real(self, tokens, labels, batch_size)
        best = 1 if calls else 2  # `test` is asked for first, then `val`
        calls.append(None)
        for label in ("shade", "side"):
            for number, name in enumerate(name for name in examined if name[0] == label):
                right = torch.eye(len(examined[name].counts), dtype=torch.int64)
                counts = right if number == best else right.roll(1, 0)
                examined[name] = replace(examined[name], counts=counts)
        return examined

    calls: list[None] = []
    monkeypatch.setattr(ProbeGrid, "examine", rigged)
    found = probe(tmp_path, three_splits, ckpt=(str(run_dir),), **GRID)
    assert found["setting"]["ours"]["side"] == {"lr": 5e-3, "weight_decay": 0.5, "val_accuracy": 1.0}
    assert found["num_correct"]["ours"]["side"] == 0


def test_without_test_the_numbers_say_that_they_are_of_val(tmp_path, capsys):
    data = make_dataset(tmp_path / "toy", num_clips=18, splits=("train", "val"))
    ours = str(make_run(tmp_path / "run", data))
    assert probe(tmp_path, data, ckpt=(ours,), **FEW)["protocol"].endswith("nothing selected")
    found = probe(tmp_path, data, ckpt=(ours,), **GRID)
    assert found["reported_on"] == "val"
    assert (
        "on the clips that it is reported on (there is no 'test'), so on the high side" in found["protocol"]
    )
    assert "has no split 'test': accuracies are of 'val'" in capsys.readouterr().err


def test_classes_have_a_table_and_a_picture(tmp_path, data):
    """Whatever their names are."""
    data, names = shutil.copytree(data, tmp_path / "data"), ["da\trk", "mid\r\ndle", 'li\\t "$gh$t_{']
    write_index(data, name="toy", kind="packed", class_names={"shade": names, "side": ["left", "right"]})
    found = probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "ours", data)),), **FEW)
    with (tmp_path / "probe.classes.tsv").open(newline="") as table:
        lines = list(csv.reader(table, dialect="excel-tab"))
    shades = [dict(zip(lines[0], line, strict=True)) for line in lines[1:] if line[1] == "shade"]
    assert [line["class"] for line in shades] == names
    assert [int(line["num_clips"]) for line in shades] == [5, 5, 5]
    assert sum(int(line["num_correct"]) for line in shades) == found["num_correct"]["ours"]["shade"]
    with Image.open(tmp_path / "probe.confusion" / "ours-shade.png") as picture:
        assert min(picture.size) > 300


class Counting:
    """Clips through frozen encoders."""

    def __init__(self, monkeypatch):
        self.clips = 0
        real = EncoderOnDevice.tokens

        def counted(frozen, pixels, num_views):
            self.clips += pixels.shape[0] * pixels.shape[1]
            return real(frozen, pixels, num_views)

        monkeypatch.setattr(EncoderOnDevice, "tokens", counted)


def test_a_second_probe_of_kept_features_costs_no_forward(tmp_path, data, monkeypatch):
    forwards = Counting(monkeypatch)
    ours, folder = str(make_run(tmp_path / "ours", data)), tmp_path / "features"
    first = probe(tmp_path, data, ckpt=(ours,), features=str(folder), **FEW)
    assert forwards.clips == 45
    monkeypatch.setattr(features.Reader, "segments", None)  # nor is anything decoded
    again = probe(tmp_path, data, ckpt=(ours,), features=str(folder), **FEW)
    deeper = probe(tmp_path, data, ckpt=(ours,), features=str(folder), depth=2, **FEW)
    monkeypatch.undo()
    assert forwards.clips == 45
    assert again["accuracy"] == first["accuracy"]
    assert deeper["protocol"].startswith("1 self-attention block and a cross-attention block")
    in_memory = probe(tmp_path, data, ckpt=(ours,), **FEW)
    assert (
        abs(in_memory["accuracy"]["ours"]["shade"] - first["accuracy"]["ours"]["shade"]) <= 1 / 15
    )  # float16
    table = pa.ipc.open_file(str(next(folder.glob("*-test-*.arrow")))).read_all()  # plain pyarrow reads it
    assert table["key"].to_pylist() == [sample.key for sample in open_dataset(data).samples("test")[0]]


def test_features_belong_to_weights_and_clips(tmp_path, data, monkeypatch):
    forwards = Counting(monkeypatch)
    a, b = str(make_run(tmp_path / "a", data)), str(make_run(tmp_path / "b", data, seed=1))
    few = {"features": str(tmp_path / "features"), "epochs": 1}
    for count, values in enumerate(
        [{"ckpt": (a,)}, {"ckpt": (b,)}, {"ckpt": (a,), "square": 0.5}, {"ckpt": (a,), "frame_step": 2}],
        start=1,
    ):
        probe(tmp_path, data, **values, **few)
        assert forwards.clips == 45 * count
    path = next((tmp_path / "features").glob("*-train-*.arrow"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    found = TokensOnDisk(path, [], ALONE)
    with pytest.raises(ValueError, match="are not those that were written: delete the file"):
        list(found.batches(in_batches(np.arange(30), 8), 0))


def test_segments_and_views_reach_the_probe(tmp_path, data, monkeypatch):
    forwards = Counting(monkeypatch)
    found = probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "ours", data)),), segments=2, views=3, **FEW)
    assert forwards.clips == 30 * 2 + 15 * 2 * 3
    assert "2 clips x 3 views" in found["protocol"]
    assert found["accuracy"]["ours"]["shade"] > 0.8


def test_fresh_clips_in_every_epoch(tmp_path, data, monkeypatch):
    forwards = Counting(monkeypatch)
    found = probe(
        tmp_path,
        data,
        ckpt=(str(make_run(tmp_path / "ours", data)),),
        augment=True,
        max_feature_bytes=1000,
        **FEW,
    )
    assert forwards.clips == 15 * 30 + 15  # nothing is kept
    assert found["accuracy"]["ours"]["shade"] > 0.6


@pytest.mark.parametrize("augment", [False, True])
def test_a_killed_probe_goes_on_after_its_last_whole_epoch(tmp_path, data, monkeypatch, augment):
    values = {
        "ckpt": (str(make_run(tmp_path / "ours", data)),),
        "augment": augment,
        "depth": 2,
        **FEW,
        "epochs": 5,
    }
    whole = probe(tmp_path, data, **values)
    real, epochs = ProbeGrid.train_epoch, []

    def killed(grid, tokens, labels):
        if grid.epoch == 3 and not epochs[3:]:
            raise KeyboardInterrupt
        epochs.append(grid.epoch)
        real(grid, tokens, labels)

    monkeypatch.setattr(ProbeGrid, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        probe(tmp_path, data, **values)
    with pytest.raises(ValueError, match=r"--resume: got seed=7, expected 0 as in .*leave out --resume"):
        probe(tmp_path, data, **values, resume=True, seed=7)
    epochs.append(-1)
    assert probe(tmp_path, data, **values, resume=True) == whole
    assert epochs == [0, 1, 2, -1, 3, 4]
    assert not list(tmp_path.glob(".probe*"))


def test_too_little_memory_is_an_error_before_anything_is_decoded(tmp_path, data):
    with pytest.raises(
        ValueError, match=r"got 45 clips whose pixels and tokens take .* GB.*--max-feature-bytes"
    ):
        probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "run", data)),), max_feature_bytes=1000)


def test_features_are_a_function_of_the_clip_alone(tmp_path, data):
    samples = list(open_dataset(data).samples("test")[0])
    reader = Reader(
        str(data),
        data_seed=0,
        views=1,
        view=CONFIG.view,
        split="all",
        loader=LoaderConfig(decode_processes=0),
    )
    clips = features.DecodedClips(reader, samples, lambda sample, epoch: SegmentCut(CONFIG.view, 1, 1, 1.0))
    ((good, pixels),) = clips.batches(in_batches(np.arange(15), 15))
    evaluated = reader.evaluation(samples)
    reader.close()
    assert good.all()
    assert (pixels[:, 0] == evaluated.pixels).all()  # one segment and one whole square: the evaluation view
    encoder = open_encoder(FrozenConfig(ckpt=str(make_run(tmp_path / "run", data))))
    module = encoder.load().train()
    frozen = [
        EncoderOnDevice(encoder, module, torch.device("cpu"), batch_size=size, bfloat16=False)
        for size in (8, 1)
    ]
    together, alone = (one.tokens(pixels, 1) for one in frozen)
    assert not module.training
    assert together.shape == (15, 1, CONFIG.grid.num_tokens, CONFIG.encoder.width)
    assert (together - alone).abs().max() < 1e-5


def test_names_of_rows(tmp_path, data):
    def config(*paths, **values):
        return ProbeConfig(ckpt=tuple(map(str, paths)), data=str(data), out="probe.json", **values)

    a, b = make_run(tmp_path / "x" / "student", data), make_run(tmp_path / "y" / "student", data)
    assert [c.name for c in list_candidates(config(a, b))] == [str(a), str(b)]
    inside = list_candidates(config(a / "checkpoints" / "step-3", a, random_init=True))
    assert [c.name for c in inside] == ["random-init", "student/step-3", "student"]
    encoder, predictor = make_models()
    save_checkpoint(
        tmp_path / "plain", CONFIG, {"model": encoder.state_dict(), "predictor": predictor.state_dict()}, {}
    )
    assert [c.name for c in list_candidates(config(tmp_path / "plain"))] == ["plain"]
    with pytest.raises(ValueError, match="expected every checkpoint once"):
        list_candidates(config(a, a))
