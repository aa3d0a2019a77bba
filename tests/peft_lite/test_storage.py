"""Files are written whole or not at all, whatever lies at their place."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_lite import storage


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    storage.write_text(final, "old")

    def fail() -> None:
        with storage.writing(final) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert final.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_file_stands_until_the_new_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")
    with storage.writing(final) as partial:
        partial.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"


def test_a_file_left_by_a_kill_or_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.txt.partial").symlink_to(victim)
    storage.write_text(tmp_path / "a.txt", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_rules_the_mode(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        storage.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        storage.write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_tensors_come_back_with_their_words(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    storage.write_tensors(tmp_path / "a.safetensors", tensors)
    again = load_file(tmp_path / "a.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    storage.write_json(tmp_path / "a.json", {"b": 1, "a": "é"}, sort_keys=True)
    assert list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ["a", "b"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    storage.replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["new"]
    assert not (tmp_path / "new").exists()


def test_bytes_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        (path,) = (p for p in (tmp_path, *tmp_path.iterdir()) if p.stat().st_ino == number)
        events.append(("on the disk", path.name))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        events.append(("renamed to", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    folder = ("on the disk", tmp_path.name)
    storage.write_text(tmp_path / "a", "new")
    assert events == [("on the disk", "a.partial"), ("renamed to", "a"), folder]
    events.clear()
    storage.write_pair(tmp_path / "t", {"a": torch.ones(2)}, tmp_path / "c", {"b": 1})
    partial = [("on the disk", name) for name in ("t.partial", "c.partial")]
    names = [("renamed to", name) for name in "tc"]
    assert events == [*partial, folder, names[0], folder, names[1], folder]
    events.clear()
    (tmp_path / "written").mkdir()
    storage.replace_folder(tmp_path / "written", tmp_path / "final")
    assert events == [folder]
