import time

import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.measure import compare, latency, measure


def test_compare_sees_a_factor_of_three(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def of(seconds):
        def call():
            now[0] += seconds

        return call

    found = compare({"one": of(0.004), "three": of(0.012)}, rounds=5)
    assert found.ratio["three"] == pytest.approx(3.0) and found.ratio["one"] == 1.0
    assert found.seconds["one"].median == pytest.approx(0.004) and found.seconds["one"].spread == pytest.approx(0.0, abs=1e-9)


def test_rounds_take_turns():
    order = []
    log = {name: lambda name=name: (order.append(name), time.sleep(0.003)) for name in "ab"}
    compare(log, rounds=2)
    assert order[-4:] == ["a", "b", "b", "a"]


def test_quick_functions_are_called_many_times_per_sample():
    assert compare({"nothing": lambda: None}, rounds=2).seconds["nothing"].calls > 100


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    inside = []
    found = compare({"f": lambda: inside.append(torch.get_num_threads())}, rounds=2, threads=1)
    assert set(inside) == {1}
    assert torch.get_num_threads() == before
    assert found.seconds["f"].threads == 1


@pytest.mark.parametrize("wrong", [{"rounds": 1}, {"threads": 0}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(InputError):
        compare({"f": lambda: None}, **wrong)
    with pytest.raises(InputError):
        compare({})


def test_latency_states_its_batch():
    timed = latency(nn.Linear(4, 4), (torch.zeros(3, 4),), rounds=2)
    assert (timed.batch, timed.rounds, timed.threads) == (3, 2, 1)
    assert timed.median > 0


def test_latency_of_nothing_is_refused():
    with pytest.raises(InputError, match="meta"):
        latency(nn.Linear(4, 4, device="meta"), (torch.zeros(3, 4),))


def test_measure_gives_one_flat_dictionary():
    found = measure(nn.Linear(4, 6), (torch.zeros(3, 4),), rounds=2).to_json()
    assert (found["macs"], found["params"], found["bytes"], found["batch"]) == (72, 30, 120, 3)
    assert found["peak_bytes"] == 120 + 3 * 4 * 4 + 3 * 6 * 4
    assert found["latency_median_s"] > 0


def test_measure_on_the_meta_device_has_everything_but_seconds():
    found = measure(nn.Linear(4, 6, device="meta"), (torch.zeros(3, 4),)).to_json()
    assert (found["macs"], found["latency_median_s"], found["device"]) == (72, None, "meta")
    assert found["peak_bytes"] == 120 + 3 * 4 * 4 + 3 * 6 * 4


def test_the_least_of_a_few_turns_leaves_out_what_others_take(monkeypatch):
    """Every second call is held up, as by another process: the least of four turns does not show it, one turn does."""
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def steady():
        now[0] += 0.004

    def held_up():
        calls.append(None)
        now[0] += 0.004 if len(calls) % 2 else 0.02

    assert compare({"steady": steady, "held up": held_up}, rounds=4, least_of=4).ratio["held up"] == pytest.approx(1)
    assert compare({"steady": steady, "held up": held_up}, rounds=4).ratio["held up"] == pytest.approx(3)
    with pytest.raises(InputError, match="1 turn"):
        compare({"f": steady}, least_of=0)
