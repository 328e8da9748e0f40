"""Replacing a folder: only what is ours, told by what is in its files and not by their names, and whole whoever else writes it."""

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

import secateur as sc
from secateur import report
from secateur.errors import InputError
from secateur.models import atomic
from secateur.models.atomic import refuse_foreign, replace_folder


def filled(text="new", **files):
    """A function that writes a folder as `save` does: the files, then a plan.json that lists them."""

    def fill(fresh):
        for name, content in {"model.safetensors": text, **files}.items():
            (fresh / name).write_text(content)
        listed = {path.name: {} for path in fresh.iterdir()}
        (fresh / "plan.json").write_text(json.dumps({"format": "secateur/1", "files": listed}))

    return fill


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OURS, OUR_REPORT = {"format": "secateur/1", "files": {"model.safetensors": {}}}, {"format": "secateur-report/1"}
FOREIGN = {
    "a model": {"model.safetensors": "precious"},
    "a page": {"report.html": "my own page"},
    "a model below a report of ours": {"report.json": OUR_REPORT, "report.html": "", "model.safetensors": "precious"},
    "a page beside a model of ours": {"plan.json": OURS, "model.safetensors": "", "report.html": "my own page"},
    "a file that our plan does not list": {"plan.json": OURS, "model.safetensors": "", "graph.json": "{}"},
    "a plan without a format": {"plan.json": {"files": {"model.safetensors": {}}}, "model.safetensors": "precious"},
    "a plan of another format": {"plan.json": {**OURS, "format": "secateurs/1"}, "model.safetensors": "precious"},
    "a format that is a number": {"plan.json": {**OURS, "format": 1}, "model.safetensors": "precious"},
    "a plan that is a list": {"plan.json": [OURS], "model.safetensors": "precious"},
    "a plan that is no JSON": {"plan.json": "buy milk"},
    "a plan that lists a number": {"plan.json": {**OURS, "files": 1}},
    "a file in a folder that is listed": {"plan.json": {**OURS, "files": {"more/a.json": {}}}, "more/a.json": "{}", "more/thesis.txt": "ten years"},
    "a folder": {"plan.json": OURS, "model.safetensors": "", "more/thesis.txt": "ten years"},
}
OF_OURS = {
    "a model": {"plan.json": OURS, "model.safetensors": "old"},
    "a model and its report": {"plan.json": OURS, "model.safetensors": "old", "report.json": OUR_REPORT, "report.html": "<html>"},
    "a model of a later version": {"plan.json": {**OURS, "format": "secateur/9"}, "model.safetensors": "old"},
    "a report that came before its model": {"report.json": OUR_REPORT, "report.html": "<html>"},
    "a report cut off before its page": {"report.json": OUR_REPORT},
    "a folder that is listed": {"plan.json": {**OURS, "files": {"more/a.json": {}}}, "more/a.json": "{}"},
    "nothing": {},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_refused_and_stays(name, tmp_path):
    put(tmp_path / "out", FOREIGN[name])
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"holds \d files that secateur did not write \(.*\), going by plan.json and report.json .*\n  Choose"):
        replace_folder(tmp_path / "out", filled())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", OF_OURS)
def test_what_is_ours_is_replaced(name, tmp_path):
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", OF_OURS[name])
    replace_folder(tmp_path / "out", filled())
    assert sorted(tree(tmp_path)) == ["out/model.safetensors", "out/plan.json"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_what_save_and_a_report_write_is_ours_and_a_model_of_the_user_is_not(result, tmp_path):
    sc.save(result, tmp_path / "out")
    report.write(tmp_path / "out", report.facts(result))
    report.write(tmp_path / "live", report.facts(result))
    for name in ("out", "live"):
        assert sc.load(sc.save(result, tmp_path / name)) is not None
    put(tmp_path / "mine", {"model.safetensors": "precious"})
    with pytest.raises(InputError, match="did not write"):
        sc.save(result, tmp_path / "mine")
    assert tree(tmp_path / "mine") == {"model.safetensors": b"precious"}


def test_what_came_while_it_was_written_stays(tmp_path):
    def fill(fresh):
        filled()(fresh)
        put(tmp_path / "out", {"thesis.txt": "ten years"})

    with pytest.raises(InputError, match=r"thesis\.txt"):
        replace_folder(tmp_path / "out", fill)
    assert tree(tmp_path) == {"out/thesis.txt": b"ten years"} and os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- names beside the folder
@pytest.mark.parametrize("other", [{".out.old/thesis.txt": "ten years"}, {".out.old": "ten years"}, {".out.old/model.safetensors": "precious"}])
@pytest.mark.parametrize("there", [True, False])
def test_what_lies_where_the_old_one_goes_is_refused_and_stays(there, other, tmp_path):
    put(tmp_path, other)
    if there:
        put(tmp_path / "out", OF_OURS["a model"])
    before = tree(tmp_path)
    for work in (lambda: replace_folder(tmp_path / "out", filled()), lambda: refuse_foreign(tmp_path / "out")):
        with pytest.raises(InputError, match=r"\.out\.old (holds 1 files that secateur did not write|is a file)"):
            work()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_run_left_is_removed(there, tmp_path):
    for name in ["out", ".out.old"] if there else [".out.old"]:
        put(tmp_path / name, OF_OURS["a model and its report"])
    replace_folder(tmp_path / "out", filled())
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "model.safetensors").read_text() == "new"


def test_a_kill_while_the_old_one_is_removed_does_not_stand_in_the_way(tmp_path, monkeypatch):
    put(tmp_path / "out", OF_OURS["a model"])
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: (Path(path) / "plan.json").unlink(missing_ok=True))  # and no farther
    replace_folder(tmp_path / "out", filled("second"))
    monkeypatch.undo()
    replace_folder(tmp_path / "out", filled("third"))
    assert (tmp_path / "out" / "model.safetensors").read_text() == "third" and not (tmp_path / ".out.old").exists()


# ---------------------------------------------------------------- several at once
def at_once(*works):
    wrong = []

    def run(work):
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return wrong


def test_two_threads_do_not_write_into_one_folder(tmp_path):
    """The second one begins and ends while the first one is at work."""
    put(tmp_path / "out", OF_OURS["a model"])
    begun, done = threading.Event(), threading.Event()

    def first(fresh):
        (fresh / "a").write_text("first")
        begun.set()
        assert done.wait(60)
        filled("first", a="first")(fresh)

    def second():
        assert begun.wait(60)
        replace_folder(tmp_path / "out", filled("second", b="second"))
        assert (tmp_path / "out" / "b").read_text() == "second"
        done.set()

    assert not at_once(lambda: replace_folder(tmp_path / "out", first), second)
    assert sorted(tree(tmp_path)) == ["out/a", "out/model.safetensors", "out/plan.json"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("lock", [True, False])
def test_many_threads_leave_one_whole_folder(lock, tmp_path, monkeypatch):
    def work(name):
        def run():
            for _ in range(10):
                replace_folder(tmp_path / "out", filled(name, **{name: name}))

        return run

    monkeypatch.setattr(atomic, "PATIENCE", 60.0)  # a busy machine
    if not lock:  # what a file system without locks does: some may fail, and then say so
        monkeypatch.setattr(fcntl, "flock", lambda handle, how: (_ for _ in ()).throw(OSError("no locks")))
    wrong = at_once(*map(work, "abcd"))
    assert not (lock and wrong), wrong
    assert all(isinstance(error, sc.errors.SecateurError) for error in wrong), wrong
    written = tree(tmp_path / "out")
    assert set(written) == {"model.safetensors", "plan.json", written["model.safetensors"].decode()}
    assert not lock or os.listdir(tmp_path) == ["out"]


def test_somebody_else_who_keeps_the_lock_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PATIENCE", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    replace_folder(tmp_path / "out", filled())
    os.close(handle)
    assert os.listdir(tmp_path) == ["out"]
