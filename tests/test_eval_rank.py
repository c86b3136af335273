"""RankMe against closed forms, k-NN against a loop, and the command."""

import json
import math

import pytest
import torch
from eval_tools import make_dataset, make_run

from salt_distill.common.config import LoaderConfig, RankConfig
from salt_distill.common.model.teacher import fingerprint as fingerprint_of
from salt_distill.student_trainer.evaluation.candidates import open_candidates
from salt_distill.student_trainer.evaluation.rank import KNN_TEMPERATURE, knn, rankme, run


def test_rankme_of_known_spectra():
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64))
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    assert rankme(directions) == pytest.approx(8, rel=1e-4)  # all alike
    assert rankme(directions[:, :1] @ rotation[:1]) == pytest.approx(1, rel=1e-4)  # a line
    two = torch.tensor([3.0, 1.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rankme(directions * two @ rotation) == pytest.approx(expected, rel=1e-4)
    geometric = 0.5 ** torch.arange(8, dtype=torch.float64)
    shares = geometric / geometric.sum()
    assert rankme(directions * geometric @ rotation) == pytest.approx(
        math.exp(-(shares * shares.log()).sum()), rel=1e-4
    )


def test_rankme_is_of_features_as_they_are():
    """Neither centred nor scaled: a common mean takes most of the rank away, a common factor nothing."""
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert rankme(features * 7) == pytest.approx(rankme(features), rel=1e-5)
    assert rankme(features + 30) < 0.3 * rankme(features)


def test_neighbours_vote_by_their_cosine():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 5, generator=generator), torch.randn(25, 5, generator=generator)
    label = torch.randint(4, (60,), generator=generator)
    slow = []
    for row in test:
        cosine = [float(row @ other / (row.norm() * other.norm())) for other in train]
        votes = [0.0] * 4
        for number in sorted(range(60), key=lambda n: -cosine[n])[:7]:
            votes[label[number]] += math.exp(cosine[number] / KNN_TEMPERATURE)
        slow.append(votes.index(max(votes)))
    assert knn(train, label, test, num_classes=4, k=7).tolist() == slow
    assert knn(train, label, train * 3, num_classes=4, k=1).tolist() == label.tolist()


def test_the_command(tmp_path, capsys):
    data = make_dataset(tmp_path / "toy", num_clips=75)
    values = {
        "ckpt": (str(make_run(tmp_path / "ours", data)),),
        "out": str(tmp_path / "rank.json"),
        "loader": LoaderConfig(decode_processes=0),
    }
    run(RankConfig(data=str(data), **values))
    found = json.loads((tmp_path / "rank.json").read_text())["encoders"]["ours"]
    assert 1 <= found["rankme"] <= found["width"] == 24
    assert found["num_clips"] == 24
    assert found["knn"]["shade"]["accuracy"] > 0.9
    assert set(found["knn"]) == {"shade", "side"}
    assert "k-NN shade" in capsys.readouterr().out
    run(RankConfig(data=str(data), random_init=True, seed=3, **values))
    again = json.loads((tmp_path / "rank.json").read_text())["encoders"]
    assert list(again) == ["random-init", "ours"]
    assert again["ours"] == found
    fingerprint = again["random-init"]["identity"]["fingerprint"]
    [random, _] = open_candidates(values["ckpt"], None, None, None, random_seed=3)
    assert fingerprint == fingerprint_of(random, random.load()) != found["identity"]["fingerprint"]
    few = make_dataset(tmp_path / "few", num_clips=45)
    with pytest.raises(
        ValueError, match=r"got 15 clips of split 'test' for 24 channels, expected at least as many"
    ):
        run(RankConfig(data=str(few), **values))
