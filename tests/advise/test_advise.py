"""A whole search on a small network: rows, commands that make them again, what goes wrong and what is taken up."""

import json
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur.advise import Settings, Source, candidates
from secateur.advise.candidates import careful
from secateur.advise.clock import OutOfTime, at_most
from secateur.advise.make import Maker
from secateur.advise.run import parts
from secateur.errors import DataError, FormatError, InputError
from secateur.job import doubled, example_inputs
from secateur.models import Data, load_data, load_model
from secateur.models.atomic import TENSORS
from secateur.models.data import Batches

RUN = sys.modules["secateur.advise.run"]
NETS = Path(__file__).parent.parent / "models" / "nets.py"
NET, ROWS = f"{NETS}:net", f"{NETS}:rows"
FEW = ("structures macs=50%", "weights keep=20%", "neurons macs=75%")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Three candidates instead of all, and short comparisons."""
    every = {c.name: c for c in candidates()}
    monkeypatch.setattr(RUN, "candidates", lambda: [every[name] for name in FEW])
    monkeypatch.setattr(RUN, "careful", lambda rows, lose: [])
    monkeypatch.setattr(sys.modules["secateur.advise.bench"], "ROUNDS", 3)


def search(out=None, minutes=60.0, **settings):
    data, loaded = load_data(ROWS), load_model(NET)
    chosen = Settings(minutes, 50, runtimes=("torch",), **settings)
    return RUN.advise(loaded, example_inputs(loaded, data, []), data, Source(NET, ROWS, 40), chosen, out=out)


def by_name(done):
    return {row["name"]: row for row in done.rows}


def test_every_row_has_its_figures_or_its_reason(tmp_path):
    done = search(tmp_path / "out")
    rows = by_name(done)
    assert list(rows) == list(FEW) and done.finished
    assert rows["neurons macs=75%"]["state"] == "refused" and "no hidden units" in rows["neurons macs=75%"]["why"]
    for name in FEW[:2]:
        row = rows[name]
        folder = tmp_path / "out" / row["folder"]
        assert row["state"] == "measured" and row["took"] > 0 and row["interval"] > 0 and row["spread"] >= 0
        assert row["bytes"] == (folder / TENSORS).stat().st_size < done.dense["bytes"]
        assert sc.load(folder) is not None
    assert rows["structures macs=50%"]["macs"] <= done.dense["macs"] / 2 and rows["weights keep=20%"]["macs"] == done.dense["macs"]
    assert done.dense["ratio"] == 1 and done.dense["lost"] == 0 and done.metric == "accuracy" and done.held_out == 13
    written = json.loads((tmp_path / "out" / "advise.json").read_text())
    assert written["rows"] == json.loads(json.dumps(done.rows)) and written["verdict"] == done.verdict
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="advice"' in page and rows["structures macs=50%"]["commands"][0] in page


def test_the_printed_commands_make_the_rows_again(tmp_path, run, monkeypatch):
    done = search(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for row in done.rows[:2]:
        for line in row["commands"]:
            run(*shlex.split(line)[1:])
        again, first = tmp_path / row["folder"], tmp_path / "out" / row["folder"]
        assert (again / TENSORS).stat().st_size == row["bytes"]
        one, other = load_file(again / TENSORS), load_file(first / TENSORS)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_promises_most_is_made_with_care_too_and_its_command_has_the_defaults(tmp_path, run, monkeypatch):
    monkeypatch.setattr(RUN, "careful", careful)
    rows = by_name(search(tmp_path / "out", lose=100.0))
    assert list(rows) == [*FEW, "structures macs=50%, careful", "weights keep=20%, careful"]
    monkeypatch.chdir(tmp_path)
    for name in list(rows)[3:]:
        row = rows[name]
        assert row["state"] == "measured" and not any(word in row["commands"][0] for word in ("--rows", "--by", "--repair", "--allocation"))
        run(*shlex.split(row["commands"][0])[1:])
        one, other = (load_file(place / row["folder"] / TENSORS) for place in (tmp_path, tmp_path / "out"))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_without_a_test_part_nothing_is_made_from_all_rows(monkeypatch):
    monkeypatch.setattr(RUN, "careful", careful)
    data, loaded = load_data(ROWS), load_model(NET)
    inputs = example_inputs(loaded, data, [])
    done = RUN.advise(loaded, inputs, replace(data, test=[]), Source(NET, ROWS, 40), Settings(60, 50, runtimes=("torch",)))
    assert list(by_name(done)) == list(FEW)


def test_it_is_traced_and_its_statistics_are_taken_once(monkeypatch):
    seen = []
    for name in ("trace", "study_of"):
        for module in ("prune", "sparsify"):
            place = sys.modules[f"secateur.{module}"]
            real = getattr(place, name)
            monkeypatch.setattr(place, name, lambda *given, _real=real, _name=name, **named: seen.append(_name) or _real(*given, **named))
    search()
    assert seen == ["trace", "study_of"]


def test_what_is_there_is_taken_up_and_what_is_damaged_or_of_other_rows_is_made_again(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = by_name(search(out))
    made = []
    real = Maker.made
    monkeypatch.setattr(Maker, "made", lambda self, candidate: made.append(candidate.name) or real(self, candidate))
    again = by_name(search(out, minutes=30.0))
    assert not made and again[FEW[0]]["kept"] and again[FEW[0]]["seconds"] == first[FEW[0]]["seconds"], "minutes decide nothing"
    (out / first[FEW[1]]["folder"] / TENSORS).write_bytes(b"gone")
    search(out)
    assert made == [FEW[1]]
    search(out, batch=3)
    assert made == [FEW[1], *FEW[:2]], "another batch is another search"
    (out / "advise.json").write_text("{")
    search(out, batch=3)
    assert made[3:] == list(FEW[:2])


def test_ctrl_c_keeps_the_rows_so_far(tmp_path, monkeypatch, run):
    real = Maker.made

    def stopped(self, candidate):
        if candidate.name == FEW[1]:
            raise KeyboardInterrupt
        return real(self, candidate)

    monkeypatch.setattr(Maker, "made", stopped)
    said = run("advise", NET, "--data", ROWS, "--rows", 40, "--runtime", "torch", "-o", tmp_path / "out", code=130)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "advise.json").read_text())["rows"]}
    assert [rows[name]["state"] for name in FEW] == ["measured", "not tried", "not tried"] and rows[FEW[2]]["why"] == "interrupted"
    assert "weights keep=20%: not tried: interrupted" in said and rows[FEW[0]]["commands"][0] in said.replace("\n", "")
    monkeypatch.setattr(Maker, "made", real)
    run("advise", NET, "--data", ROWS, "--rows", 40, "--runtime", "torch", "-o", tmp_path / "out")
    (tmp_path / "out" / FEW[0].replace(" ", "-").replace("=", "-").replace("%", "pct") / TENSORS).unlink()
    monkeypatch.setattr(Maker, "ready", lambda self, candidate: _interrupt())
    run("advise", NET, "--data", ROWS, "--rows", 40, "--runtime", "torch", "-o", tmp_path / "out", code=130)
    rows = {row["name"]: row["state"] for row in json.loads((tmp_path / "out" / "advise.json").read_text())["rows"]}
    assert rows[FEW[0]] == "not tried" and rows[FEW[1]] == "measured", "what lies behind the interrupted one is kept too"


def _interrupt():
    raise KeyboardInterrupt


def test_what_fails_is_a_row_and_not_the_end(monkeypatch):
    monkeypatch.setattr(Maker, "_cut", lambda self, candidate: [].pop())
    rows = by_name(search())
    assert rows[FEW[0]]["state"] == "failed" and rows[FEW[0]]["why"] == "IndexError: pop from empty list"
    assert rows[FEW[1]]["state"] == "measured"


def test_what_is_not_reached_in_time_is_listed(monkeypatch):
    done = search(minutes=1e-6)
    assert {row["state"] for row in done.rows} == {"not tried"} and done.verdict == ["Nothing was measured, so there is nothing to advise."]
    clock = iter(range(0, 10_000, 7))  # every look at the clock finds 7 seconds gone: the first candidate is stopped on its way
    monkeypatch.setattr(RUN, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), process_time=lambda: 0.0))
    done = search(minutes=1.0)
    assert done.rows[0]["state"] == "not tried" and "the time was up" in done.rows[0]["why"]
    assert not issubclass(OutOfTime, Exception)


def test_a_stage_that_tells_nothing_is_stopped_too(monkeypatch):
    swallowed = []

    def silent(self, candidate):
        for _ in range(2):
            try:
                time.sleep(2)
            except BaseException as error:
                if swallowed:
                    raise
                swallowed.append(error)

    monkeypatch.setattr(Maker, "ready", silent)
    monkeypatch.setattr(RUN, "at_most", lambda seconds: at_most(0.2))
    monkeypatch.setattr(sys.modules["secateur.advise.clock"], "_AGAIN", 1.0)
    before = signal.getsignal(signal.SIGALRM)
    done = search()
    assert swallowed
    assert done.rows[0]["state"] == "not tried" and "the time was up" in done.rows[0]["why"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == before
    with at_most(1000.0):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_held_out_rows_are_none_of_those_that_calibrate():
    x = torch.arange(20).float()[:, None]
    with_test = Data("a", Batches(x[:12], size=5), Batches(x[12:], size=5), False)
    train, test = parts(with_test, 6, 4)
    assert torch.cat(list(train)).flatten().tolist() == list(range(6)) and torch.cat(list(test)).flatten().tolist() == [12, 13, 14, 15]
    train, test = parts(replace(with_test, test=[]), 6, 4)
    assert torch.cat(list(train)).flatten().tolist() == list(range(6)) and torch.cat(list(test)).flatten().tolist() == [6, 7, 8, 9]
    train, test = parts(replace(with_test, train=list(with_test.train), test=[]), 7, 100)
    assert torch.cat(list(train)).flatten().tolist() == list(range(7)) and torch.cat(list(test)).flatten().tolist() == list(range(7, 12))
    with pytest.raises(DataError, match="no test part"):
        parts(replace(with_test, test=[]), 12, 4)


def test_what_cannot_be_meant_is_refused_at_once(run):
    with pytest.raises(InputError, match="time is above 0"):
        Settings(0).check()
    with pytest.raises(InputError, match="unknown runtime"):
        Settings(runtimes=("tensorrt",)).check()
    run("advise", NET, code=2)


def test_the_folder_of_a_model_stays_what_it_is(tmp_path):
    """Its report has the name that an advice's has."""
    loaded = load_model(NET)
    args, kwargs = example_inputs(loaded, load_data(ROWS), [])
    folder = sc.save(sc.prune(loaded.model, args, sc.MACs(at_most="70%"), kwargs=kwargs, repair="none"), tmp_path / "out")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match="holds a pruned model"):
        search(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("place", ["file/advice", "a" * 300], ids=["below a file", "too long"])
def test_a_place_where_no_folder_can_be(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FormatError, match="could not be written into"):
        search(tmp_path / place, minutes=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_mlp_has_neurons_and_nothing_else(tmp_path, monkeypatch):
    every = {c.name: c for c in candidates()}
    monkeypatch.setattr(RUN, "candidates", lambda: [every["structures macs=50%"], every["neurons macs=60%"]])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)).eval()
    data = Data("rows", Batches(torch.randn(64, 6)), Batches(torch.randn(32, 6)), False)
    from secateur.models import LoadedModel

    loaded = LoadedModel(model, None, "mlp")
    done = RUN.advise(loaded, doubled(data.example(1)), data, Source("mlp", "rows", 64), Settings(60, runtimes=("torch",)))
    rows = by_name(done)
    assert rows["structures macs=50%"]["state"] == "refused" and "the rows of neurons say it" in rows["structures macs=50%"]["why"]
    assert rows["neurons macs=60%"]["macs"] <= 0.6 * done.dense["macs"] and done.metric == "agreement"
