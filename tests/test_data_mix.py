"""Mixtures: what is taken of each source, the table of it, and that every sample is read from its source."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pack_tools import contents, grey_video, new_reader, packed, samples_of, write

from salt_distill.common.config import MixConfig, MixRecipe
from salt_distill.common.data.index import load_index
from salt_distill.common.data.making.mix import mix, strata_shares
from salt_distill.common.data.shards import open_dataset


def clip(number: int, seconds: int) -> bytes:
    """A video of its own for each number and length."""
    return grey_video(*[5 * number] * seconds, fps=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Data sets in the manner of Appendix A: `k400` and `k600` share five videos, `k400` has one twice;
    `panda` has 40 of 2 to 41 s."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(12):
        write(root / "k400" / ("wave" if number % 2 else "clap") / f"{number}.mp4", clip(number, 4))
        write(root / "k600" / ("wave" if number % 3 else "dance") / f"{number}.mp4", clip(7 + number, 4))
    write(root / "k400" / "wave" / "again.mp4", clip(0, 4))
    for number in range(40):
        write(root / "panda" / f"{number}.mp4", clip(20, 2 + number))
    write(root / "val" / "validation" / "a.mp4", clip(2, 4))
    write(root / "val" / "validation" / "b.mp4", clip(14, 4))
    write(root / "val" / "train" / "c.mp4", clip(3, 4))
    for name in ("k400", "k600"):
        packed(root / name, root / "packed" / name, label_from_folder="action", max_shard_bytes=20_000)
    packed(root / "panda", root / "packed" / "panda", max_shard_bytes=20_000)
    packed(root / "val", root / "packed" / "val", split_from_folder=True)
    return root / "packed"


def mixed(sources: Path, out: Path, recipe: dict) -> Path:
    """The mixture of a recipe that stands beside its sources."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"name": out.name} | recipe))
    for part in ("sources", "exclude"):
        for entry in recipe.get(part, ()):
            assert not Path(entry if isinstance(entry, str) else entry["path"]).is_absolute()
    shutil.copytree(sources, out.parent, dirs_exist_ok=True)
    mix(MixConfig(recipe=str(path), out=str(out)))
    return out


# --- how many of each stratum ---


@pytest.mark.parametrize(
    ("available", "count", "shares"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([10, 10, 10], 10, [3, 3, 4]),
        ([2, 10, 10], 12, [2, 5, 5]),  # what the first lacks is shared by the others
        ([1, 0, 3, 20], 12, [1, 0, 3, 8]),
        ([5, 5], 99, [5, 5]),
        ([7], 3, [3]),
    ],
)
def test_strata_give_equal_shares_as_far_as_they_can(available, count, shares):
    assert strata_shares(available, count) == shares


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 120))
def test_strata_give_what_is_asked_and_nobody_is_favoured(available, count):
    shares = strata_shares(available, count)
    assert sum(shares) == min(count, sum(available))
    assert all(0 <= share <= there for share, there in zip(shares, available, strict=True))
    with_more = [share for share, there in zip(shares, available, strict=True) if share < there]
    assert all(min(with_more) >= share - 1 for share in shares) if with_more else True


# --- what is taken ---


def test_the_table_is_the_one_of_the_paper(sources, tmp_path, capsys):
    recipe = {
        "sources": [
            "k400",
            "k600",
            {"path": "panda", "count": 12, "min_duration_s": 4, "max_duration_s": 40, "strata": 4},
        ],
        "exclude": [{"path": "val", "split": "validation"}, "seen.txt"],
    }
    (tmp_path / "seen.txt").write_text("k600/dance/6.mp4\nk600/never/there.mp4\n")
    mixed(sources, tmp_path / "V-29", recipe)
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("│")
    ]
    header = next(line for line in printed.splitlines() if "Dataset" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == [
        "Dataset",
        "Sample count",
        "excluded",
        "out of range",
        "duplicates",
        "not drawn",
    ]
    # k400: 13 with one twice, one in the validation set; k600: 12 of which 5 are k400's, one of the
    # validation set, one in the list.
    assert rows == [
        ["k400", "11", "1", "0", "1", "0"],
        ["k600", "5", "2", "0", "5", "0"],
        ["panda", "12", "0", "3", "0", "25"],
        ["V-29", "28", "3", "3", "6", "25"],
    ]
    assert "excluded by val: 2 samples; it names 2" in printed
    assert "excluded by seen.txt: 1 samples; it names 2" in printed


def test_every_sample_is_read_from_its_source(sources, tmp_path):
    out = mixed(
        sources, tmp_path / "mix", {"sources": ["k400", {"path": "panda", "name": "p70m", "count": 6}]}
    )
    assert {path.name for path in out.iterdir()} == {"dataset.json", "index.parquet"}
    dataset = open_dataset(out)
    samples = samples_of(out)
    own = {
        f"k400/{key.removeprefix('k400/')}": (tmp_path / "k400", sample)
        for key, sample in samples_of(tmp_path / "k400").items()
    }
    own |= {
        f"p70m/{key.removeprefix('panda/')}": (tmp_path / "panda", sample)
        for key, sample in samples_of(tmp_path / "panda").items()
    }
    assert len(samples) == 12 + 6
    for key, sample in samples.items():
        folder, original = own[key]
        assert dataset.read(sample) == open_dataset(folder).read(original)
        assert sample.source == key.split("/")[0]
        assert sample.sha256 == original.sha256
    assert json.loads((out / "dataset.json").read_text())["sources"] == [
        {"name": "k400", "num_samples": 12, "weight": None},
        {"name": "p70m", "num_samples": 6, "weight": None},
    ]
    assert new_reader(out).clips(range(18)).good.all()


def test_sources_and_mixture_move_together_and_apart_is_an_error(sources, tmp_path):
    (tmp_path / "here").mkdir()
    mixed(sources, tmp_path / "here" / "mix", {"sources": ["k400", "panda"]})
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert new_reader(tmp_path / "there" / "mix").clips(range(5)).good.all()
    shutil.copytree(tmp_path / "there" / "mix", tmp_path / "alone" / "mix")
    with pytest.raises(
        FileNotFoundError,
        match=r"is a mixture of .*k400, which is not there: move sources and mixture together",
    ):
        open_dataset(tmp_path / "alone" / "mix")
    (tmp_path / "v").mkdir()
    write(tmp_path / "v" / "other.mp4", clip(1, 3))
    packed(tmp_path / "v", tmp_path / "there" / "k400")
    with pytest.raises(ValueError, match=r"k400, which was packed anew since: run `salt-data mix` again"):
        open_dataset(tmp_path / "there" / "mix")


def test_durations_are_drawn_evenly_and_reproducibly(sources, tmp_path):
    def seconds(name: str, *, count: int = 12, seed: int = 0) -> list[float]:
        panda = {"path": "panda", "min_duration_s": 4, "max_duration_s": 40, "strata": 4, "count": count}
        samples = samples_of(mixed(sources, tmp_path / name, {"sources": [panda], "seed": seed}))
        return sorted(sample.duration_s for sample in samples.values())

    drawn = seconds("a")
    assert np.histogram(drawn, [4, 13, 22, 31, 40])[0].tolist() == [3, 3, 3, 3]
    assert np.histogram(seconds("b", count=34), [4, 13, 22, 31, 40])[0].tolist() == [
        8,
        8,
        9,
        9,
    ]  # of 9, 9, 9 and 10
    assert seconds("c") == drawn
    assert seconds("d", seed=1) != drawn
    assert set(drawn) < set(seconds("e", count=24))  # more contain fewer
    assert seconds("f", count=99) == list(range(4, 41))


def test_the_first_source_keeps_a_video_that_several_have(sources, tmp_path):
    for name, order in (("ab", ["k400", "k600"]), ("ba", ["k600", "k400"])):
        samples = samples_of(mixed(sources, tmp_path / name, {"sources": order}))
        assert sum(sample.source == order[0] for sample in samples.values()) == 12
        assert sum(sample.source == order[1] for sample in samples.values()) == 7
        assert len({sample.sha256 for sample in samples.values()}) == len(samples) == 19


def test_what_was_not_drawn_from_one_source_may_come_from_another(sources, tmp_path):
    samples = samples_of(
        mixed(sources, tmp_path / "mix", {"sources": [{"path": "k400", "count": 1}, "k600"]})
    )
    assert sum(sample.source == "k600" for sample in samples.values()) >= 11


def test_labels_with_the_same_classes_are_one(sources, tmp_path):
    dataset = open_dataset(mixed(sources, tmp_path / "two", {"sources": ["k400", "k600"]}))
    assert dataset.class_names == {"k400.action": ["clap", "wave"], "k600.action": ["dance", "wave"]}
    for key, sample in samples_of(tmp_path / "two").items():
        source, action, _ = key.split("/")
        assert sample.labels == {f"{source}.action": dataset.class_names[f"{source}.action"].index(action)}
    shutil.copytree(sources / "k400", tmp_path / "copy")
    same = mixed(
        sources, tmp_path / "same", {"sources": [{"path": "k400", "count": 3}, {"path": "copy", "name": "k"}]}
    )
    assert open_dataset(same).class_names == {"action": ["clap", "wave"]}


def test_weights_are_kept_for_the_reader(sources, tmp_path, capsys):
    out = mixed(
        sources,
        tmp_path / "mix",
        {"sources": [{"path": "k400", "weight": 0.25}, {"path": "panda", "weight": 0.75}]},
    )
    assert [source.weight for source in load_index(out)[0].sources] == [0.25, 0.75]
    assert "weight" in capsys.readouterr().out


def test_the_same_recipe_gives_the_same_bytes(sources, tmp_path):
    recipe = {"sources": ["k400", {"path": "panda", "count": 7}]}
    first = contents(mixed(sources, tmp_path / "mix", recipe))
    assert contents(mixed(sources, tmp_path / "mix", recipe)) == first


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"sources": ["k400", {"path": "k600", "weight": 1}]}, "got a weight for some and none for k400"),
        ({"sources": ["k400", "k400"]}, "got 2 of the name 'k400', expected a name for each"),
        (
            {"sources": [{"path": "k400", "strata": 3, "count": 5}]},
            "strata: expected .* max_duration_s as the last edge",
        ),
        (
            {"sources": [{"path": "k400", "min_duration_s": 9, "max_duration_s": 4}]},
            "max_duration_s: got 4, expected more than",
        ),
        ({"sources": [{"path": "k400", "cuont": 5}]}, "sources.0.cuont: unknown key"),
        ({"sources": []}, "sources: got \\[\\], expected at least 1 of them"),
        (
            {"sources": [{"path": "k400", "split": "trian"}]},
            "got split 'trian', expected one of train, or all",
        ),
        (
            {"sources": [{"path": "k400", "min_duration_s": 60}]},
            "got no sample for the mixture, .* of its 13 samples: 13 out of range",
        ),
        (
            {"sources": ["k400"], "exclude": [{"path": "val", "split": "test"}]},
            "exclude: .*got split 'test', expected one of train, validation",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(sources, tmp_path, recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        mixed(sources, tmp_path / "mix", recipe)
    assert not (tmp_path / "mix").exists()


def test_a_mixture_is_no_source_and_replaces_nothing_else(sources, tmp_path):
    mixed(sources, tmp_path / "mix", {"sources": ["k400"]})
    with pytest.raises(ValueError, match="got the mixture mix, expected a packed data set"):
        mixed(sources, tmp_path / "more", {"sources": ["mix"]})
    with pytest.raises(ValueError, match="which holds something else than a mixture"):
        mixed(sources, tmp_path / "k600", {"sources": ["k400"]})
    assert samples_of(tmp_path / "k600").keys() == samples_of(sources / "k600").keys()


def test_one_video_of_other_bytes_is_taken_once(tmp_path, capsys):
    """As Kinetics' versions overlap: by the YouTube id in the names."""
    names = {
        "k400": ["abcdefghij0_000001_000011", "abcdefghij1_000001_000011"],
        "k700": ["abcdefghij1_000001_000011", "abcdefghij2_000004_000014", "abcdefghij-_000004_000014"],
        "val": ["abcdefghij2_000004_000014"],
    }
    for place, (source, ids) in enumerate(names.items()):
        for number, name in enumerate(ids):
            write(tmp_path / "v" / source / f"{name}.mp4", clip(10 * place + number, 3))
        packed(tmp_path / "v" / source, tmp_path / "packed" / source)
    identity = r"([\w-]{11})_\d{6}_\d{6}"
    recipe = {
        "sources": [{"path": name, "identity": identity} for name in ("k400", "k700")],
        "exclude": [{"path": "val", "identity": identity}],
    }
    out = mixed(tmp_path / "packed", tmp_path / "all", recipe)
    assert sorted(samples_of(out)) == [
        "k400/abcdefghij0_000001_000011.mp4",
        "k400/abcdefghij1_000001_000011.mp4",
        "k700/abcdefghij-_000004_000014.mp4",
    ]
    assert load_index(out)[0].selections[1].removed["same identity"] == 1
    assert "excluded by val: 1 samples, 1 of them by their identity" in capsys.readouterr().out
    with pytest.raises(ValueError, match="which is in no key, such as 'k400/"):
        mixed(
            tmp_path / "packed",
            tmp_path / "typo",
            {"sources": [{"path": name, "identity": "(x+)"} for name in ("k400", "k700")]},
        )
    with pytest.raises(ValueError, match="with 0 groups, expected one"):
        mixed(tmp_path / "packed", tmp_path / "none", {"sources": [{"path": "k400", "identity": "x"}]})


@pytest.mark.parametrize(
    ("sources_with", "excluded_with", "sentence"),
    [
        (
            [],
            ["val", "test"],
            "got an identity for val, test and none for a source, expected one for the sources",
        ),
        (
            ["k400"],
            [],
            "got an identity for k400 alone, expected one for another source or an entry",
        ),
        ([], [], None),
        (["k400"], ["val"], None),
        (["k400", "k700"], [], None),
    ],
)
def test_an_identity_that_meets_no_other_is_an_error(sources_with, excluded_with, sentence):
    def entries(names, those_with):
        return [{"path": name} | ({"identity": "(.+)"} if name in those_with else {}) for name in names]

    recipe = {
        "name": "m",
        "sources": entries(["k400", "k700"], sources_with),
        "exclude": entries(["val", "test"], excluded_with),
    }
    expected = nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence)
    with expected:
        MixRecipe.model_validate(recipe)


def test_an_exclusion_list_that_excel_saved(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "v" / "s" / f"{name}.mp4", clip(len(name) + ord(name) % 9, 3))
    packed(tmp_path / "v" / "s", tmp_path / "packed" / "s")
    (tmp_path / "packed" / "list.txt").write_bytes(b"\xef\xbb\xbfs/a.mp4\r\n")
    out = mixed(tmp_path / "packed", tmp_path / "m", {"sources": ["s"], "exclude": ["list.txt"]})
    assert set(samples_of(out)) == {"s/b.mp4"}
