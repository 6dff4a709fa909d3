import pytest

from hsd.files import replacing


def test_a_file_that_was_being_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "folder" / "a.json"
    with replacing(path) as part:
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_and_replaces_no_other(tmp_path):
    path = tmp_path / "new" / "model"

    def save(text):
        with replacing(path) as part:
            part.mkdir()
            (part / "weights").write_text(text)
            if text == "half":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save("half")
    assert not any(path.parent.iterdir())
    save("first")
    with pytest.raises(OSError):
        save("second")
    assert [p.name for p in path.parent.iterdir()] == ["model"] and (path / "weights").read_text() == "first"
