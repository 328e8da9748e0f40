"""Where the compiled kernels lie: code is loaded from there, so nobody else may have put it there."""

import importlib
import os
import stat
import tempfile

import pytest

build_module = importlib.import_module("secateur.runtime.build")  # the package has a function of that name


@pytest.fixture
def guessed(tmp_path, monkeypatch):
    """A user without a home: the folder whose name anybody can guess."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SECATEUR_KERNELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_module.Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build_module._without_home.cache_clear()
    yield tmp_path / f"secateur-{os.getuid()}"
    build_module._without_home.cache_clear()


def test_without_a_home_it_is_a_folder_for_the_user_alone(guessed):
    assert build_module.folder() == guessed and stat.S_IMODE(guessed.stat().st_mode) == 0o700
    build_module._without_home.cache_clear()
    assert build_module.folder() == guessed, "the next process finds what this one compiled"


def by_another(path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: path.parent.stat().st_uid + 1)
    path = path.with_name(f"secateur-{os.getuid()}")
    path.mkdir(mode=0o700)
    return path


def for_all(path, monkeypatch):
    path.mkdir()
    path.chmod(0o777)
    return path


def for_the_group(path, monkeypatch):
    path.mkdir()
    path.chmod(0o770)
    return path


def a_link(path, monkeypatch):
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")
    return path


def a_file(path, monkeypatch):
    path.write_text("")
    return path


@pytest.mark.parametrize("planted", [by_another, for_all, for_the_group, a_link, a_file])
def test_what_somebody_else_can_write_is_not_loaded(planted, guessed, monkeypatch):
    there = planted(guessed, monkeypatch)
    if there.is_dir():
        (there / build_module._name()).write_bytes(b"anything")
    found = build_module.folder()
    assert found.resolve() != there.resolve() and found.parent == there.parent and stat.S_IMODE(found.stat().st_mode) == 0o700
    assert not list(found.iterdir()) and build_module.folder() == found, "one folder for the whole process"
