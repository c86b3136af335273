"""Surprise: windows and numbers by hand, pairs from the folders of three benchmarks, scenes made here, and
the whole command."""

import csv
import json

import av
import numpy as np
import pytest
import torch
from eval_tools import CONFIG, ENCODER, make_models, save
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from salt_distill.common.config import (
    EmaConfig,
    FrozenConfig,
    PhysicsConfig,
    ScenesConfig,
    TeacherComputeConfig,
    ViewConfig,
)
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.making.scenes import PROPERTIES, SCREEN, make_scenes, scene
from salt_distill.common.model.checkpoint import CheckpointConfig, new_predictor, open_encoder
from salt_distill.common.model.masking import MaskGroup, MaskSet
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.evaluation.physics.benchmarks import (
    PairVideo,
    grasp,
    inflevel,
    intphys,
    read_pair,
)
from salt_distill.student_trainer.evaluation.physics.predictors import open_predictor
from salt_distill.student_trainer.evaluation.physics.results import (
    FILTERED,
    PairSurprise,
    PhysicsResults,
    accuracies,
    best_context,
    macro,
)
from salt_distill.student_trainer.evaluation.physics.run import context_lengths, judge, run
from salt_distill.student_trainer.evaluation.physics.surprise import surprise
from salt_distill.student_trainer.vpixel import VPixel

VIEW = ViewConfig(crop_size=16)
SETTINGS = {"window": 4, "crop_size": None, "batch_size": 2, "num_threads": 1}


class Still:
    """Hand-made: a token is the mean of a frame, and what was seen last is expected to stay."""

    def targets(self, windows):
        return torch.from_numpy(windows.astype(np.float32).mean((2, 3, 4)))[..., None]

    def predictions(self, windows, context):
        return self.targets(windows)[:, context - 1 : context].expand(-1, windows.shape[1] - context, -1)


def film_of(levels) -> np.ndarray:
    """Plain frames of these brightnesses."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 4, 4, 3)).copy()


def test_surprise_by_hand():
    video = film_of([10, 10, 10, 10, 30, 30, 30, 50])
    found = surprise(Still(), video, window=4, contexts=[1, 3], stride=2, batch_size=2)
    # Windows from 0, 2 and 4. One frame seen: of the three after it (0, 0, 0), (0, 20, 20) and (0, 0, 20)
    # differ.
    assert found == pytest.approx(np.array([[0, 40 / 3, 20 / 3], [0, 0, 20]]))
    assert (surprise(Still(), video, window=4, contexts=[1, 3], stride=2, batch_size=16) == found).all()
    assert surprise(Still(), video, window=4, contexts=[1], stride=1, batch_size=3).shape == (1, 5)


def test_accuracies_by_hand():
    def judged(of, possible, impossible):
        return PairSurprise(pair=Pairs.of(of), possible=np.array(possible), impossible=np.array(impossible))

    class Pairs:
        @staticmethod
        def of(name):
            return type("Named", (), {"property": name, "name": name})()

    pairs = [
        # Context 2: means 2 and 2, a tie, which is wrong; maxima 3 and 2. Context 4: right in both ways. The
        # least: (1, 1) and (1, 2).
        judged("a", [[1.0, 3.0], [2.0, 1.0]], [[2.0, 2.0], [1.0, 5.0]]),
        judged("b", [[1.0, 1.0], [9.0, 9.0]], [[2.0, 0.5], [1.0, 1.0]]),
    ]
    found = accuracies(pairs, [2, 4])
    right = {
        how: {name: [row["a"].num_correct, row["b"].num_correct] for name, row in rows.items()}
        for how, rows in found.items()
    }
    assert right["average"] == {"2": [0, 1], "4": [1, 0], FILTERED: [1, 0]}
    assert right["maximum"] == {"2": [0, 1], "4": [1, 0], FILTERED: [1, 0]}
    assert [macro(row) for row in found["average"].values()] == [0.5, 0.5, 0.5]
    assert best_context(found["average"]) == 1.0  # the headline takes another context for each property


def test_contexts_are_the_papers():
    assert context_lengths(16, 2) == [2, 4, 6, 8, 10]
    assert context_lengths(32, 2) == [4, 8, 12, 16, 20]
    assert context_lengths(8, 2) == [2, 4]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    make_scenes(ScenesConfig(out=str(out), num_scenes=1, size=32, num_frames=20))
    return out


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_scene_breaks_one_rule_out_of_sight(name):
    config = ScenesConfig(out="", size=48, num_frames=40)
    videos = scene(config, name, 0)
    assert sorted(possible for possible, _ in videos) == [False, False, True, True]
    assert all(
        (frames == again).all()
        for (_, frames), (_, again) in zip(videos, scene(config, name, 0), strict=True)
    )
    impossible = [frames for possible, frames in videos if not possible]
    possible = [frames for possible, frames in videos if possible]
    for broken in impossible:
        agree = [(broken == frames).all((1, 2, 3)) for frames in possible]
        if name not in ("wall", "float"):
            first, second = sorted(agree, key=lambda same: same[0], reverse=True)
            assert first[:20].all()  # one world until the middle, then the other
            assert second[20:].all()
            jump = np.abs(np.diff(broken.astype(int), axis=0)).max((1, 2, 3))[19]
            assert jump == 0 or name == "vanish"  # nothing is seen to happen: the screen is between
        else:
            assert max(same.argmin() for same in agree) > 10  # alike until the ball meets what is there
    assert not any((a == b).all() for a in impossible for b in possible)
    assert SCREEN[2] - SCREEN[0] > 0.18  # wider than the ball


def test_quadruplets_become_pairs_that_part_last(scenes):
    pairs = intphys(scenes)
    assert sorted({pair.property for pair in pairs}) == sorted(PROPERTIES)
    assert len(pairs) == 2 * len(PROPERTIES)
    for pair in pairs:
        possible, impossible = (
            np.stack(film.frames(range(20), 20)) for film in (pair.possible, pair.impossible)
        )
        assert (possible[:7] == impossible[:7]).all()  # the ball meets the wall in frame 8
        assert (possible[7:] != impossible[7:]).any()


def test_a_model_that_knows_the_rule_is_right_and_one_that_is_wrong_is_not(scenes):
    """Hand-made: what a video's pair looked like is expected; of the impossible video nothing is as
    expected."""

    class Knows(Still):
        def __init__(self, sign):
            self.sign = sign

        def targets(self, windows):
            brightness = torch.from_numpy(windows.astype(np.float32)).flatten(2)
            return self.sign * brightness

        def predictions(self, windows, context):
            expected = self.targets(windows)[:, context:].clone()
            for row, window in enumerate(windows):
                if window.tobytes() in self.impossible:
                    expected[row] += 1
            return expected

    pairs = [pair for pair in intphys(scenes) if pair.property in ("colour", "float")]
    for swapped, accuracy in ((False, 1.0), (True, 0.0)):
        model = Knows(1)
        model.impossible = set()
        for pair in pairs:
            clips = read_pair(pair, 2, VIEW)
            sides = [
                {clip[start : start + 4].tobytes() for start in range(0, len(clip) - 3, 2)} for clip in clips
            ]
            model.impossible |= sides[0] - sides[1] if swapped else sides[1] - sides[0]
        judged, skipped = judge(
            model, pairs, frame_step=2, view=VIEW, window=4, contexts=[2], stride=2, batch_size=3
        )
        assert skipped == {}
        assert {score.accuracy for score in accuracies(judged, [2])["average"][FILTERED].values()} == {
            accuracy
        }


def test_what_is_taken_of_a_video(tmp_path):
    """49 of IntPhys's 100 frames; GRASP's to the end; InfLevel's after what shows the objects, the longer one
    shortened at its start."""
    for name, count in (
        ("P_Gravity/7.mp4", 43),
        ("IP_Gravity/7.mp4", 43),
        ("long.mp4", 60),
        ("short.mp4", 48),
    ):
        write_video(tmp_path / name, count)
    folder = tmp_path / "dev" / "O1" / "01"
    for number in range(1, 5):
        (folder / str(number) / "scene").mkdir(parents=True)
        (folder / str(number) / "status.json").write_text(
            json.dumps({"header": {"is_possible": number in (2, 3)}})
        )
        for frame in range(100):
            level = frame if frame < 50 + number % 2 else 200 + number
            Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(
                folder / str(number) / "scene" / f"scene_{frame + 1:03d}.png"
            )
    pairs = intphys(tmp_path / "dev")
    parents = [
        (pair.property, pair.possible.path.parent.name, pair.impossible.path.parent.name) for pair in pairs
    ]
    assert parents == [
        ("O1", "2", "4"), ("O1", "3", "1"),
    ]  # fmt: skip
    possible, impossible = read_pair(pairs[0], 2, ViewConfig(crop_size=[4, 6]))
    assert possible.shape == impossible.shape == (49, 4, 6, 3)
    assert possible[:25, 0, 0, 0].tolist() == list(range(0, 50, 2))

    (pair,) = grasp(tmp_path)
    assert (pair.property, pair.possible.path.parent.name) == ("Gravity", "P_Gravity")
    clip, _ = read_pair(pair, 10, VIEW)
    assert (clip[:, 8, 8, 0] / 4).round().tolist() == [0, 10, 20, 30, 40]

    with (tmp_path / "continuity.csv").open("w", newline="") as file:
        fields = [
            "vid1_path",
            "vid1_label",
            "vid1_end_priming_2",
            "vid2_path",
            "vid2_label",
            "vid2_end_priming_2",
        ]
        csv.writer(file).writerows([fields, ["long.mp4", "impossible", 9, "short.mp4", "possible", 4]])
    (pair,) = inflevel(tmp_path)
    possible, impossible = read_pair(pair, 5, VIEW)  # 43 frames are left of the short one, 50 of the long one
    assert (possible[:, 8, 8, 0] / 4).round().tolist() == list(range(5, 48, 5))
    assert (impossible[:, 8, 8, 0] / 4).round().tolist() == list(range(17, 60, 5))


def write_video(path, count: int) -> None:
    """Frame i is of brightness 4 i."""
    path.parent.mkdir(exist_ok=True)
    frames = [
        av.VideoFrame.from_ndarray(np.full((32, 48, 3), 4 * number, np.uint8), format="rgb24")
        for number in range(count)
    ]
    path.write_bytes(encode_mp4(frames, width=48, height=32, fps=10, crf=0, pix_fmt="yuv444p"))


def test_folders_that_are_not_the_benchmark_are_errors(tmp_path, scenes):
    (tmp_path / "P_A").mkdir()
    (tmp_path / "P_A" / "0.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"IP_A: got 0 videos, expected the 1 names"):
        grasp(tmp_path)
    for number in range(1, 5):
        (tmp_path / "O1" / "01" / str(number) / "scene").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"got 0 possible and 0 impossible videos, expected 2 and 2, each with a status.json"
    ):
        intphys(tmp_path)


def test_unreadable_videos_are_named_until_they_are_many(scenes):
    pairs = intphys(scenes)[:4]
    broken = [pair.__class__(**vars(pair) | {"possible": PairVideo(path=scenes)}) for pair in pairs]
    settings = {"frame_step": 2, "view": VIEW, "window": 4, "contexts": [2], "stride": 2, "batch_size": 3}
    judged, skipped = judge(Still(), [broken[0], *pairs[1:]], **settings)
    assert len(judged) == 3
    assert "holds no images" in skipped[pairs[0].name]
    with pytest.raises(ValueError, match="got 2 pairs of 4 that cannot be read"):
        judge(Still(), broken, **settings)
    with pytest.raises(ValueError, match="got 9 frames with a step of 2, expected at least a window of 12"):
        judge(Still(), pairs, **settings | {"window": 12})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a student that names it."""
    folder = tmp_path_factory.mktemp("models")
    encoder, predictor = make_models(1)
    save(folder / "teacher", CONFIG, encoder, predictor)
    teacher = Teacher(
        open_encoder(FrozenConfig(ckpt=str(folder / "teacher"))), TeacherComputeConfig(), torch.device("cpu")
    )
    values = {
        "objective": "salt",
        "predictor_out_width": ENCODER.width,
        "teacher_fingerprint": teacher.spec.fingerprint,
    }
    config = CheckpointConfig.model_validate(CONFIG.model_dump() | values)
    student, _ = make_models(2)
    latents = new_predictor(config)
    latents.init_weights(torch.Generator().manual_seed(3), std=0.1)
    save(folder / "student", config, student, latents)
    return folder, teacher


def test_the_command_on_made_scenes(tmp_path, models, scenes, capsys):
    folder, _ = models
    out = tmp_path / "physics.json"
    run(
        PhysicsConfig(
            ckpt=str(folder / "student"),
            teacher=str(folder / "teacher"),
            data=str(scenes),
            out=str(out),
            window=8,
        )
    )
    found = json.loads(out.read_text())
    assert found["contexts"] == [2, 4]
    assert set(found["accuracy"]["average"][FILTERED]) == set(PROPERTIES)
    assert len(found["surprise"]) == 2 * len(PROPERTIES)
    assert set(found["fixed_context"]["average"]) == {"2", "4", FILTERED}
    assert found["best_context"]["average"] >= max(found["fixed_context"]["average"].values())
    assert "Relative accuracy, average surprise" in capsys.readouterr().out


def test_the_student_sees_the_context_alone_and_the_teacher_all(models):
    folder, teacher = models
    student = open_predictor(
        str(folder / "student"),
        str(folder / "teacher"),
        **SETTINGS,
    )
    windows = np.random.default_rng(0).integers(0, 256, (2, *CONFIG.view.clip_shape), dtype=np.uint8)
    changed = windows.copy()
    changed[:, 2:] = 255 - changed[:, 2:]
    assert torch.equal(student.predictions(windows, 2), student.predictions(changed, 2))
    assert not torch.equal(student.targets(windows)[:, :16], student.targets(changed)[:, :16])
    assert torch.equal(student.targets(windows), teacher.forward(windows))
    found = surprise(student, windows[0], window=4, contexts=[2], stride=2, batch_size=2)
    expected = (student.predictions(windows[:1], 2) - teacher.forward(windows[:1])[:, 16:]).abs().mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_another_teacher_is_refused(tmp_path, models):
    folder, _ = models
    encoder, predictor = make_models(9)
    save(tmp_path / "other", CONFIG, encoder, predictor)
    with pytest.raises(
        ValueError, match=r"student: got teacher .*other with fingerprint .*, which it learned from"
    ):
        open_predictor(str(folder / "student"), str(tmp_path / "other"), **SETTINGS)
    with pytest.raises(
        ValueError, match="got --teacher None for a run of salt, expected --teacher, the frozen encoder"
    ):
        open_predictor(str(folder / "student"), None, **SETTINGS)
    with pytest.raises(
        ValueError, match=r"got --teacher .*teacher for a run of vpixel, expected none: it predicts pixels"
    ):
        open_predictor(str(tmp_path / "other"), str(folder / "teacher"), **SETTINGS)
    with pytest.raises(
        ValueError, match=r"got a stage 1 without its run's config.yaml, expected the run directory"
    ):
        open_predictor(str(tmp_path / "other"), None, **SETTINGS)


def test_the_baseline_has_its_targets_with_it(tmp_path):
    """Of a V-JEPA checkpoint the encoder that learned predicts, and its moving average says what is there."""
    assert EmaConfig().start < 1
    values = {"objective": "vjepa", "predictor_out_width": ENCODER.width}
    config = CheckpointConfig.model_validate(CONFIG.model_dump() | values)
    average, online = Encoder(ENCODER), Encoder(ENCODER)
    for seed, encoder in enumerate((average, online)):
        init_weights(encoder, torch.Generator().manual_seed(seed), std=0.1)
    predictor = new_predictor(config)
    predictor.init_weights(torch.Generator().manual_seed(3), std=0.1)
    save(tmp_path / "ema", config, average, predictor, online=online)
    student = open_predictor(
        str(tmp_path / "ema"), None, window=4, crop_size=None, batch_size=2, num_threads=1
    )
    assert torch.equal(student.encoder.norm.weight, online.norm.weight)
    assert torch.equal(student.encoder.patch_embed.weight, online.patch_embed.weight)
    windows = np.random.default_rng(0).integers(0, 256, (1, *CONFIG.view.clip_shape), dtype=np.uint8)
    expected = Teacher(
        open_encoder(FrozenConfig(ckpt=str(tmp_path / "ema"))), TeacherComputeConfig(), torch.device("cpu")
    ).forward(windows)
    assert (student.targets(windows) - expected).abs().max() < 1e-5


# --- what predicts pixels ---


RUN = "data: none\nsplit: train\nseed: 0\nbatch_size: 6\n"


def noise(num_clips: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_clips, *CONFIG.view.clip_shape), dtype=np.uint8)


@pytest.mark.parametrize("pixel_norm", ["channel", "joint"])
def test_a_stage_1_is_surprised_by_pixels(tmp_path, pixel_norm):
    """Its squared error is the loss that it was trained with, under a mask that hides what is to come."""
    encoder, predictor = make_models(1)
    save(tmp_path / "run", CONFIG, encoder, predictor)
    (tmp_path / "run" / "config.yaml").write_text(f"{RUN}pixel_norm: {pixel_norm}\n")
    model = open_predictor(str(tmp_path / "run"), None, **SETTINGS)
    windows = noise(2)
    error = model.predictions(windows, 2) - model.targets(windows)[:, 16:]
    idx = torch.arange(32).expand(2, -1)
    masks = MaskGroup(first=0, size=2, sets=(MaskSet(visible_idx=idx[:, :16], hidden_idx=idx[:, 16:]),))
    loss = VPixel(encoder, predictor, pixel_norm=pixel_norm)(torch.from_numpy(windows), masks)
    assert error.square().mean((1, 2)) == pytest.approx(loss[0].detach(), rel=1e-5)
    assert model.teacher_fingerprint is None


def test_a_videomae_predicts_what_transformers_predicts(tmp_path):
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, decoder_hidden_size=24, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=48, use_mean_pooling=False,
    )  # fmt: skip
    theirs = VideoMAEForPreTraining(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    theirs.save_pretrained(tmp_path / "full")
    model = open_predictor(str(tmp_path / "full"), None, **SETTINGS)
    windows = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    hidden = torch.arange(32).expand(2, -1) >= 16
    with torch.no_grad():
        answer = theirs(normalise(torch.from_numpy(windows)).transpose(1, 2), bool_masked_pos=hidden)
    predictions = model.predictions(windows, 2)
    assert (predictions - answer.logits).abs().max() < 1e-4 * answer.logits.abs().max()
    error = predictions - model.targets(windows)[:, 16:]
    assert error.square().mean().item() == pytest.approx(answer.loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match="got clips of 8 frames of 32 pixels, expected 4 of 32"):
        open_predictor(str(tmp_path / "full"), None, **SETTINGS | {"window": 8})
    theirs.videomae.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="got a model without a decoder, expected one that predicts pixels"):
        open_predictor(str(tmp_path / "encoder"), None, **SETTINGS)


def test_the_command_for_what_predicts_pixels(tmp_path, scenes):
    encoder, predictor = make_models(1)
    save(tmp_path / "run", CONFIG, encoder, predictor)
    (tmp_path / "run" / "config.yaml").write_text(f"{RUN}pixel_norm: channel\n")
    out = tmp_path / "physics.json"
    run(PhysicsConfig(ckpt=str(tmp_path / "run"), data=str(scenes), out=str(out), window=8))
    results = PhysicsResults.read(out)
    assert results.teacher_fingerprint is None
    assert len(results.surprise) == 2 * len(PROPERTIES)
