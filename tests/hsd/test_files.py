from pathlib import Path

import pytest

from hsd.files import check_file, check_folder, replacing


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
    (part := path.with_name("model.part")).mkdir()  # of a process that was killed
    (part / "more weights").touch()
    save("first")
    with pytest.raises(OSError):
        save("second")
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert [p.name for p in path.iterdir()] == ["weights"] and (path / "weights").read_text() == "first"


@pytest.mark.parametrize(
    ("path", "as_file", "as_folder"),
    [
        ("new", "", ""),
        ("folder/new/deep", "", ""),
        ("file", "", "a folder, got file, which is a file"),
        ("folder", "a file, got folder, which is a folder", ""),
        ("link", "a file, got link, which is a folder", ""),
        (
            "file/x/y",
            "a file in a folder, got file/x/y, where {here}/file is no folder",
            "a folder in a folder, got file/x/y",
        ),
        ("lost", "a file, got lost, which is a link to nowhere", "a folder, got lost, which is a link to nowhere"),
        ("lost/x", "a file in a folder, got lost/x", "a folder in a folder, got lost/x"),
        ("a" * 300, "File name too long", "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_named_with_its_argument(path, as_file, as_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    Path("lost").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for check, said in ((check_file, as_file), (check_folder, as_folder)):
        if not said:
            check("--out", Path(path))
            continue
        with pytest.raises(ValueError, match=r"^--out: expected ") as raised:
            check("--out", Path(path))
        assert said.format(here=tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is made


def test_what_must_be_new_does_not_exist(tmp_path):
    check_file("OUT", tmp_path / "x", new=True)
    check_folder("OUT", tmp_path / "x", new=True)
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match=r"OUT: expected a new file, got .*x, which is a file that exists"):
        check_file("OUT", tmp_path / "x", new=True)
    with pytest.raises(ValueError, match=r"OUT: expected a new folder, got .*, which is a folder that exists"):
        check_folder("OUT", tmp_path, new=True)


def test_a_closed_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    check_folder("--out", tmp_path.parent)
    (tmp_path / "old").touch()
    for path in (tmp_path / "x", tmp_path / "old"):
        with pytest.raises(
            ValueError, match=f"--out: expected a file that can be written, got {path}, where {tmp_path} "
        ):
            check_file("--out", path)
