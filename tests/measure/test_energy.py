"""Energy: counters in a folder made up for the test, and the estimate beside a count by hand."""

import json
import os
import sys

import pytest
import torch
from torch import nn

from secateur import cli
from secateur.measure import energy as module_energy
from secateur.measure import measure
from secateur.measure.energy import Counters, beside, bytes_moved, energy, estimate, measured

NONE = Counters((), "the test has none")
PACKAGE = 50_000_000  # microjoules at which the made-up counters begin again


def zone(root, number, name, value, end=PACKAGE):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", value), ("max_energy_range_uj", end)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def machine(root):
    """Two packages, cores and DRAM inside one of them, and a platform that holds everything."""
    files = {number: zone(root, number, name, 1_000_000) for number, name in
             (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "package-1"), ("2", "psys"))}  # fmt: skip
    (root / "intel-rapl").mkdir()  # the control type itself has no counter
    return files


def add(file, microjoules):
    file.write_text(f"{(int(file.read_text()) + microjoules) % PACKAGE}\n")


# ---------------------------------------------------------------- measured
def test_packages_and_their_dram_are_summed_and_nothing_twice(tmp_path):
    files, counters = machine(tmp_path), Counters.of(tmp_path)
    assert [z.name for z in counters.zones] == ["package-0", "dram", "package-1"]
    before = counters.read()
    for number, used in (("0", 3_000_000), ("0:0", 2_000_000), ("0:1", 500_000), ("1", 1_000_000), ("2", 9_000_000)):
        add(files[number], used)
    assert counters.joules(before, counters.read()) == pytest.approx(4.5)


@pytest.mark.parametrize("used", [0, 1, 7_654_321, PACKAGE - 1])
@pytest.mark.parametrize("start", [0, 1, PACKAGE // 2, PACKAGE - 1])
def test_a_counter_that_begins_again_loses_nothing(start, used, tmp_path):
    file = zone(tmp_path, "0", "package-0", start)
    counters = Counters.of(tmp_path)
    before = counters.read()
    add(file, used)
    assert counters.joules(before, counters.read()) == pytest.approx(used * 1e-6)


def test_joules_of_a_call_and_what_the_machine_takes_at_rest(tmp_path, monkeypatch):
    """A machine of 8 W at rest, on which one call takes 10 ms and 2 J on top: the clock and the counter are both made up."""
    file = zone(tmp_path, "0", "package-0", PACKAGE - 3_000_000)
    now = [100.0]

    def spend(seconds, joules=0.0):
        now[0] += seconds
        add(file, round(1e6 * (8 * seconds + joules)))

    real = sys.modules["secateur.measure.energy"]
    monkeypatch.setattr(real.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(real.time, "sleep", spend)
    found = measured({"a": lambda: spend(0.01, 2.0), "b": lambda: spend(0.02, 0.5)}, Counters.of(tmp_path), shortest=0.04)
    assert found["a"].joules == pytest.approx(2.08) and found["a"].above_idle == pytest.approx(2.0)
    assert found["b"].joules == pytest.approx(0.66) and found["b"].above_idle == pytest.approx(0.5)
    assert found["a"].idle_watts == pytest.approx(8) and found["a"].spread == pytest.approx(0, abs=1e-4)
    assert (found["a"].calls, found["b"].calls) == (20, 10), "five rounds, each at least as long as asked"
    assert found["a"].kind == "measured" and found["a"].source == "RAPL: package-0"


def test_a_model_is_measured_where_there_is_a_counter(tmp_path):
    file = zone(tmp_path, "0", "package-0", 0)

    class Hungry(nn.Linear):
        def forward(self, x):
            add(file, 1000)
            return super().forward(x)

    found = energy(Hungry(4, 4), (torch.zeros(1, 4),), counters=Counters.of(tmp_path))
    assert found.kind == "measured" and found.joules == pytest.approx(1e-3) and "estimate" not in json.dumps(found.to_json())
    both = beside(Hungry(4, 4), nn.Linear(4, 4), (torch.zeros(1, 4),), counters=Counters.of(tmp_path))
    assert {one.kind for one in both.values()} == {"estimate"}, "one of them is too small for the counter: neither is measured"
    assert "stand still" in both["dense"].leaves_out


def test_why_there_is_no_measurement_is_said(tmp_path):
    still = energy(nn.Linear(4, 4), (torch.zeros(1, 4),), counters=_still(tmp_path / "a"))
    assert still.kind == "estimate" and "the energy counters stand still" in still.leaves_out
    assert Counters.of(tmp_path / "nothing").why == "this machine shows no energy counter"
    zone(tmp_path / "b", "0", "psys", 0)
    assert Counters.of(tmp_path / "b").zones == ()
    zone(tmp_path / "c", "0", "package-0", "what")
    assert Counters.of(tmp_path / "c").zones == ()
    on_meta = energy(nn.Linear(4, 4, device="meta"), (torch.zeros(1, 4),), counters=_still(tmp_path / "d"))
    assert on_meta.kind == "estimate" and on_meta.joules > 0 and "'meta'" in on_meta.leaves_out


def _still(root):
    zone(root, "0", "package-0", 5)
    return Counters.of(root)


def test_counters_for_root_alone_are_not_read(tmp_path, monkeypatch):
    """Linux shows them to root alone since 2020. The tests may run as root, so reading is refused by hand."""
    zone(tmp_path, "0", "package-0", 5)
    read = type(tmp_path).read_text

    def refused(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, os.strerror(13))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "read_text", refused)
    found = Counters.of(tmp_path)
    assert found.zones == () and found.why == "the energy counters may be read by root alone"


# ---------------------------------------------------------------- estimated
def test_the_formula_by_hand():
    """Horowitz 2014: 3.7 + 0.9 pJ a float32 multiply and add, 1.1 + 0.4 for 16 bits, 0.2 + 0.1 for int8, 1300 pJ for 8 bytes of DRAM."""
    for dtype, picojoules in (("float32", 4.6), ("bfloat16", 1.5), ("float16", 1.5), ("int8", 0.3)):
        found = estimate(1_000_000, 8_000, dtype)
        assert found.joules == pytest.approx(1e-12 * (1_000_000 * picojoules + 1_000 * 1300))
        assert found.joules == pytest.approx(found.joules_macs + found.joules_bytes)
        assert found.kind == "estimate" and "Horowitz" in found.source and "caches" in found.leaves_out
    none = estimate(5, 5, "float64")
    assert none.joules is None and "no figure for float64" in none.source and none.to_json()["joules"] is None


def test_an_estimate_in_another_dtype_counts_the_bytes_of_that_dtype():
    model, x, none = nn.Linear(100, 100).eval(), torch.randn(1, 100), Counters((), "no counter")
    asked = energy(model, (x,), dtype="bfloat16", counters=none)
    cast = energy(nn.Linear(100, 100).bfloat16(), (x.bfloat16(),), counters=none)
    assert asked.joules == pytest.approx(cast.joules) and asked.joules_bytes < 0.6 * energy(model, (x,), counters=none).joules_bytes
    assert model.weight.dtype == torch.float32


def test_bytes_of_a_small_network_by_hand():
    """Every operator reads what it is given and writes what it makes; views, and a ReLU that writes in place, make nothing new."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 5), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    image, maps, weight = 2 * 3 * 16, 2 * 8 * 16, 8 * 3 * 9
    conv = image + weight + 8 + maps
    relu = maps + maps
    linear = maps + 5 * 128 + 5 + 2 * 5
    last = 2 * 5 + 2 * 5
    assert bytes_moved(net, (x,)) == 4 * (conv + relu + linear + last)
    macs = 2 * 16 * 8 * 3 * 9 + 2 * 5 * 128
    found = energy(net, (x,), counters=NONE)
    assert found.macs == macs and found.joules == pytest.approx(1e-12 * (4.6 * macs + 162.5 * 4 * (conv + relu + linear + last)))
    assert "the test has none" in found.leaves_out
    on_meta = nn.Linear(128, 5, device="meta")
    assert bytes_moved(on_meta, (torch.zeros(2, 128),)) == 4 * (256 + 640 + 5 + 10)


def test_what_repeats_or_is_looked_up_counts_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale = nn.Embedding(1000, 16), nn.Parameter(torch.ones(16))

        def forward(self, ids):
            return self.table(ids) * self.scale.expand(3, 16)

    rows = 3 * 16 * 4
    looked_up = rows + 3 * 8 + rows  # three rows of the table, three ids of 8 bytes, what comes out
    times = rows + 16 * 4 + rows  # an expanded vector is there once
    assert bytes_moved(Odd(), (torch.tensor([1, 2, 3]),)) == looked_up + times


def test_a_smaller_network_takes_less():
    def net(width):
        return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 4))

    both = beside(net(64), net(16), (torch.zeros(2, 32),), counters=NONE)
    assert both["pruned"].joules < both["dense"].joules
    assert both["dense"].macs == 4 * both["pruned"].macs


# ---------------------------------------------------------------- where it is shown
def test_measure_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["secateur.measure.energy"].Counters, "of", classmethod(lambda cls: NONE))
    found = measure(nn.Linear(8, 8), (torch.zeros(2, 8),), rounds=2)
    facts = found.to_json()
    assert facts["energy_kind"] == "estimate" and facts["energy_joules"] == module_energy(nn.Linear(8, 8), (torch.zeros(2, 8),)).joules
    assert cli.main(["measure", "torch.nn:Identity", "--input", "2x8", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "energy, estimate (batch of 2)" in said and "Horowitz" in said and "caches" in said
