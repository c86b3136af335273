"""`salt-eval embed`, `similar` and `predict` on files that nobody packed, and the probe that is kept."""

import csv
import io
import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from eval_tools import CONFIG, make_dataset, make_models, make_run, save
from PIL import Image
from transformers import VJEPA2ForVideoClassification

from salt_distill.common.config import (
    EmbedConfig,
    ExportConfig,
    LoaderConfig,
    PredictConfig,
    ProbeConfig,
    SimilarConfig,
)
from salt_distill.common.config.embed import VideosConfig
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.video import decode
from salt_distill.common.model.checkpoint import load_encoder
from salt_distill.common.model.pixels import normalise
from salt_distill.student_trainer.evaluation.embed import run as embedding
from salt_distill.student_trainer.evaluation.embed import similar
from salt_distill.student_trainer.evaluation.embed.files import read_features
from salt_distill.student_trainer.evaluation.embed.windows import WindowsCut, windows_of
from salt_distill.student_trainer.evaluation.probe import classifier_export as exporting
from salt_distill.student_trainer.evaluation.probe import predict
from salt_distill.student_trainer.evaluation.probe import run as probing
from salt_distill.student_trainer.evaluation.probe.kept import open_probe

LOADER = VideosConfig(decode_processes=0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twenty videos of 3 s, in two folders, each of another brightness, and a file that is none."""
    folder = tmp_path_factory.mktemp("embed") / "videos"
    for number in range(20):
        path = folder / ("dark" if number < 10 else "light") / f"{number:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = np.arange(24)[:, None, None, None] * 2 + 8 * number
        frames = np.broadcast_to(level, (24, 40, 48, 3)).astype(np.uint8)
        made = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
        path.write_bytes(encode_mp4(made, width=48, height=40, fps=8, crf=10))
    (folder / "dark" / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not asked for")
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    save(folder / "ckpt", CONFIG, *make_models(4))
    return folder / "ckpt"


def embed(out, videos, ckpt, **values):
    embedding.run(EmbedConfig(videos=str(videos), ckpt=str(ckpt), out=str(out), loader=LOADER, **values))
    return read_features(out)


def test_a_folder_of_videos_becomes_rows(tmp_path, videos, ckpt, capsys):
    """A row is the mean of the tokens of the middle clip, as our encoder gives them for these frames."""
    about, table = embed(tmp_path / "clips.parquet", videos, ckpt)
    assert pq.read_table(tmp_path / "clips.parquet").column_names == [
        "path",
        "window",
        "start_s",
        "end_s",
        "features",
    ]
    paths = table["path"].to_pylist()
    assert paths == sorted(str(path.relative_to(videos)) for path in videos.rglob("[0-9]*.mp4"))
    assert "left out: dark/broken.mp4: " in capsys.readouterr().err
    frames = decode((videos / paths[3]).read_bytes(), [10, 11, 12, 13])
    image = [np.asarray(Image.fromarray(frame[:, 4:44])) for frame in frames]
    square = np.stack([np.full((32, 32, 3), frame.mean((0, 1)).round(), np.uint8) for frame in image])
    with torch.no_grad():
        tokens = load_encoder(ckpt)(normalise(torch.from_numpy(square)[None], CONFIG.mean, CONFIG.std))
    row = table["features"][3].as_py()
    assert np.abs(np.array(row, np.float32) - tokens.mean((0, 1)).numpy()).max() < 0.02
    assert (table["start_s"][3].as_py(), table["end_s"][3].as_py()) == (10 / 8, 14 / 8)
    assert (about.encoder.view, about.shape) == (CONFIG.view, (CONFIG.encoder.width,))
    with pytest.raises(ValueError, match="which is there already"):
        embed(tmp_path / "clips.parquet", videos, ckpt)


def test_windows_follow_each_other(tmp_path, videos, ckpt):
    assert [(w.start_s, w.end_s) for w in windows_of(80, 8, CONFIG.view, 4, 2)] == [
        (0, 4),
        (2, 6),
        (4, 8),
        (6, 10),
    ]

    def frames_of(num_frames, number, times=None):
        window = windows_of(num_frames, 8, CONFIG.view, 4, None)[number]
        return WindowsCut(CONFIG.view, (window,), num_frames / 8).frame_idx(num_frames, times)

    assert frames_of(80, 1) == frames_of(80, 1, 50 * np.arange(80)) == [36, 44, 52, 60]
    assert frames_of(8, 0) == [1, 3, 5, 7], "a short video has one"
    # 2 s at 8 frames a second, a pause of 6 s, 2 s more: seconds 4 to 8 show the frame before the pause
    paused = 125 * np.arange(32)
    paused[16:] += 6000
    window = windows_of(32, 32 / 10, CONFIG.view, 4, None)[1]
    assert WindowsCut(CONFIG.view, (window,), 10.0).frame_idx(32, paused) == [15, 15, 15, 15]
    _, steps = embed(tmp_path / "steps.arrow", videos / "light", ckpt, window=1.0, tokens="step")
    assert steps["window"].to_pylist() == [0, 1, 2] * 10
    _, tokens = embed(tmp_path / "all.arrow", videos / "light", ckpt, window=1.0, tokens="all", batch_size=2)
    n, e = CONFIG.grid.num_tokens, CONFIG.encoder.width
    every = np.array(tokens["features"].to_pylist(), np.float32).reshape(30, CONFIG.grid.t, -1, e)
    by_step = np.array(steps["features"].to_pylist(), np.float32).reshape(30, CONFIG.grid.t, e)
    assert every.size == 30 * n * e
    np.testing.assert_allclose(every.mean(2), by_step, atol=3e-3)


def test_it_goes_on_where_it_was_left(tmp_path, videos, ckpt, monkeypatch):
    _, whole = embed(tmp_path / "whole.arrow", videos, ckpt)
    real, groups = embedding._write_group, []

    def killed(config, group, *others):
        if group == 1 and groups == [0]:
            raise KeyboardInterrupt
        groups.append(group)
        real(config, group, *others)

    monkeypatch.setattr(embedding, "_write_group", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "again.arrow", videos, ckpt)
    with pytest.raises(ValueError, match="got parts of another `salt-eval embed`"):
        embed(tmp_path / "again.arrow", videos, ckpt, tokens="all")
    (videos / "another.mp4").write_bytes(b"it moves every later video to another place")
    with pytest.raises(ValueError, match="got parts of another `salt-eval embed`"):
        embed(tmp_path / "again.arrow", videos, ckpt)
    (videos / "another.mp4").unlink()
    groups.append(-1)
    _, again = embed(tmp_path / "again.arrow", videos, ckpt)
    assert groups == [0, -1, 1]
    assert again.equals(whole)
    assert not list(tmp_path.glob(".*"))


def test_what_is_alike_is_near(tmp_path, videos, ckpt):
    embed(tmp_path / "clips.parquet", videos, ckpt)
    values = {"features": str(tmp_path / "clips.parquet"), "out": str(tmp_path / "similar.csv"), "num": 5}
    similar.run(
        SimilarConfig(**values, query="light/15.mp4", sheet=str(tmp_path / "sheet.png"), videos=str(videos))
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "similar.csv").read_text())))
    cosines = [float(row["cosine"]) for row in rows]
    assert len(rows) == 5
    assert cosines == sorted(cosines, reverse=True)
    assert "light/15.mp4" not in [row["path"] for row in rows]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 192, 2 * 224)
        assert abs(sheet.getpixel((96, 96))[0] - (8 * 15 + 24)) < 12, "its own middle frame comes first"
    with pytest.raises(
        ValueError, match=r"got --query cat.mp4, expected a video of the file, such as dark/00.mp4"
    ):
        similar.run(SimilarConfig(**values, query="cat.mp4"))
    (tmp_path / "similar.csv").unlink()
    similar.run(SimilarConfig(**values, query=f"{videos}/light/15.mp4"))  # as a shell completes it
    assert list(csv.DictReader(io.StringIO((tmp_path / "similar.csv").read_text()))) == rows


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A probe of three squares of two encoders, kept."""
    folder = tmp_path_factory.mktemp("probed")
    data = make_dataset(folder / "toy", num_clips=30)
    run = make_run(folder / "ours", data)
    probing.run(
        ProbeConfig(
            ckpt=(str(run),), data=str(data), out=str(folder / "probe.json"),
            loader=LoaderConfig(decode_processes=0),
            random_init=True, epochs=10, batch_size=8, lr=(5e-3,), views=3, depth=2,
        )
    )  # fmt: skip
    return folder, data, run


def test_saved_predictions_give_the_accuracy_again(probed):
    folder, _, _ = probed
    results = json.loads((folder / "probe.json").read_text())
    rows = list(csv.DictReader(io.StringIO((folder / "probe.predictions.csv").read_text())))
    for name, row in results["accuracy"].items():
        for label, accuracy in row.items():
            mine = [r for r in rows if (r["encoder"], r["label"]) == (name, label)]
            assert accuracy == sum(r["class"] == r["predicted"] for r in mine) / len(mine)
            assert {r["fingerprint"] for r in mine} == {results["encoders"][name]["fingerprint"]}


def test_a_kept_probe_says_of_files_what_it_said_of_the_split(tmp_path, probed):
    folder, data, _ = probed
    values = {"probe": str(folder / "probe.safetensors"), "out": str(tmp_path / "out.csv"), "loader": LOADER}
    predict.run(PredictConfig(videos=str(data), **values))
    said = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert {row["view"] for row in said} == {"all", "0", "1", "2"}
    answers = {
        (r["video"], r["label"]): (r["class"], float(r["probability"])) for r in said if r["view"] == "all"
    }
    rows = list(csv.DictReader(io.StringIO((folder / "probe.predictions.csv").read_text())))
    kept = [row for row in rows if row["encoder"] == "ours"]
    assert len(kept) == 9 * 2
    for row in kept:
        name, probability = answers[row["key"], row["label"]]
        assert name == row["predicted"]
        assert probability == pytest.approx(float(row["probability"]), abs=1e-4)
    save(tmp_path / "other", CONFIG, *make_models(9))
    with pytest.raises(ValueError, match=r"got encoder .*other with fingerprint .*, expected .* give --ckpt"):
        predict.run(PredictConfig(videos=str(data), ckpt=str(tmp_path / "other"), **values))
    with pytest.raises(ValueError, match="got --encoder nobody, expected one of ours"):
        predict.run(PredictConfig(videos=str(data), encoder="nobody", **values))


def test_transformers_classifies_with_it(tmp_path, probed):
    folder, _, run = probed
    values = {"ckpt": str(run), "format": "hf", "probe": str(folder / "probe.safetensors")}
    exporting.run(ExportConfig(**values, label="shade", out=str(tmp_path / "hf")))
    model, loading = VJEPA2ForVideoClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    # The run is a stage 1's, whose predictor predicts pixels: transformers makes up one of no blocks.
    assert all(name.startswith("vjepa2.predictor.") for name in loading["missing_keys"]), loading
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert list(model.config.id2label.values()) == ["dark", "middle", "light"]
    clip = torch.randn(2, 3, *CONFIG.view.clip_shape[:3], generator=torch.Generator().manual_seed(0))
    kept = open_probe(folder / "probe.safetensors", "ours")
    with torch.no_grad():
        expected = kept.probes["shade"](load_encoder(run)(clip))
        logits = model.eval()(clip.transpose(1, 2)).logits
    assert (logits - expected).abs().max() < 1e-3
    with pytest.raises(ValueError, match="got no --label, expected one of shade, side"):
        exporting.run(ExportConfig(**values, out=str(tmp_path / "again")))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
