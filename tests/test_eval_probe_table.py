"""`salt-eval probe` on real checkpoints and a real packed data set."""

import json

import pytest
from eval_tools import CONFIG, make_dataset, make_models, make_run

from common.config import ProbeConfig
from common.model.checkpoint import save_checkpoint
from student_trainer.evaluation.features import frozen_tokens, load_clips
from student_trainer.evaluation.probe_table import list_candidates, run

FEW = {"epochs": 15, "batch_size": 8, "lr": 5e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("eval") / "toy", num_clips=45)


def probe(tmp_path, data, **values):
    run(ProbeConfig(data=str(data), out=str(tmp_path / "probe.json"), **values))
    return json.loads((tmp_path / "probe.json").read_text())


def test_table_of_checkpoints_and_random_weights(tmp_path, data, capsys):
    ours, other = make_run(tmp_path / "ours", data), make_run(tmp_path / "other", data, seed=1)
    found = probe(tmp_path, data, ckpt=(str(ours), str(other)), random_init=True, **FEW)
    assert list(found["accuracy"]) == ["random-init", "ours", "other"]
    assert found["labels"]["shade"] == {
        "num_classes": 3, "class_names": ["dark", "middle", "light"], "chance": pytest.approx(1 / 3), "num_train": 30, "num_test": 15,
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


def test_no_test_split_is_an_error(tmp_path):
    data = make_dataset(tmp_path / "toy", num_clips=9, splits=("train", "validation"))
    with pytest.raises(ValueError, match=r"got splits train, validation, expected 'train'.*'test'"):
        probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "run", data)),))


def test_too_little_memory_is_an_error_before_anything_is_decoded(tmp_path, data):
    with pytest.raises(ValueError, match=r"got 45 clips whose pixels and tokens take .* GB.*--max-feature-bytes"):
        probe(tmp_path, data, ckpt=(str(make_run(tmp_path / "run", data)),), max_feature_bytes=1000)


def test_features_are_a_function_of_the_clip_alone(data):
    from common.config import LoaderConfig
    from common.data.shards import open_dataset

    samples = list(open_dataset(data).samples("test")[0])
    clips = load_clips(str(data), samples, CONFIG.view, LoaderConfig.model_validate({}), ["side"])
    encoder, _ = make_models()
    encoder.train()
    sizes = {"mean": CONFIG.mean, "std": CONFIG.std, "device": next(encoder.parameters()).device}
    together = frozen_tokens(encoder, clips.pixels, batch_size=8, **sizes)
    assert not encoder.training
    assert together.shape == (15, CONFIG.grid.num_tokens, CONFIG.encoder.width)
    assert (together - frozen_tokens(encoder, clips.pixels, batch_size=1, **sizes)).abs().max() < 1e-5


def test_names_of_rows(tmp_path, data):
    def config(*paths, **values):
        return ProbeConfig(ckpt=tuple(map(str, paths)), data=str(data), out="probe.json", **values)

    a, b = make_run(tmp_path / "x" / "student", data), make_run(tmp_path / "y" / "student", data)
    assert [c.name for c in list_candidates(config(a, b))] == [str(a), str(b)]
    inside = list_candidates(config(a / "checkpoints" / "step-3", a, random_init=True))
    assert [c.name for c in inside] == ["random-init", "student/step-3", "student"]
    encoder, predictor = make_models()
    save_checkpoint(tmp_path / "plain", CONFIG, {"model": encoder.state_dict(), "predictor": predictor.state_dict()}, {})
    assert [c.name for c in list_candidates(config(tmp_path / "plain"))] == ["plain"]
    with pytest.raises(ValueError, match="expected every checkpoint once"):
        list_candidates(config(a, a))
