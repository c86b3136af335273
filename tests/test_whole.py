import shutil

import pytest

from salt_distill.common.whole import whole_file, whole_folder, write_whole


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, "old", synced=True)
    with pytest.raises(OSError, match="disk full"), whole_file(path) as partial:  # noqa: PT012
        partial.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "step-4"
    for content in ("old", "new"):
        with pytest.raises(OSError, match="disk full"), whole_folder(path) as partial:  # noqa: PT012
            (partial / "half").write_text("half")
            raise OSError("disk full")
        with whole_folder(path) as partial:
            assert list(partial.iterdir()) == []  # what an earlier writer left is gone
            (partial / content).mkdir()
            (partial / content / "file").write_text(content)
        assert [file.name for file in path.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [path]


def test_a_partial_file_that_is_taken_away_is_a_sentence(tmp_path):
    sentence = r"a was not written: .partial-a beside it was removed meanwhile: let one command at a time"
    with pytest.raises(OSError, match=sentence), whole_file(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_text("new")
        partial.unlink()
    with pytest.raises(OSError, match=sentence), whole_folder(tmp_path / "a") as partial:
        shutil.rmtree(partial)
    with pytest.raises(FileNotFoundError, match="other"), whole_file(tmp_path / "a"):  # one that is read
        (tmp_path / "other").read_text()


def test_a_partial_file_that_is_a_link_is_not_written_through(tmp_path, monkeypatch):
    precious, partial = tmp_path / "precious", tmp_path / ".partial-a"
    precious.write_text("precious")
    for content in ("first", "written anew"):
        partial.symlink_to(precious)
        write_whole(tmp_path / "a", content, synced=True)
        assert (tmp_path / "a").read_text() == content
    partial.symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(
        type(partial), "unlink", lambda path, missing_ok=False: None
    )  # put there again at once
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", "third")
    assert (precious.read_text(), (tmp_path / "nowhere").exists()) == ("precious", False)


def test_a_partial_folder_that_is_a_link_or_a_file_is_replaced(tmp_path):
    precious, partial = tmp_path / "precious", tmp_path / ".partial-a"
    (precious / "below").mkdir(parents=True)
    for put in (lambda: partial.symlink_to(precious), lambda: partial.write_text("a file")):
        put()
        with whole_folder(tmp_path / "a") as folder:
            (folder / "b").write_text("whole")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in precious.iterdir()] == ["below"]
