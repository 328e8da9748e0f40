"""Parts of a data set, errors of outputs and what they mean: no runtime is needed for any of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.errors import DataError, InputError
from secateur.measure.latency import Latency
from secateur.quantise import How, Row
from secateur.quantise.by_onnxruntime import symmetric
from secateur.quantise.judge import BOUND, POINTS, verdict, warnings
from secateur.quantise.rows import accuracy, error, parts

X, Y = torch.arange(23.0)[:, None], torch.arange(23)


def batches(*sizes):
    return list(zip(X.split(list(sizes)), Y.split(list(sizes)), strict=True))


@pytest.mark.parametrize("size", [None, 1, 4, 100])
@pytest.mark.parametrize("at_most", [None, 1, 9, 23, 50])
def test_parts_are_the_first_rows_in_order(size, at_most):
    found = parts(batches(10, 3, 10), ((X[:1],), {}), size, whole=False, at_most=at_most)
    wanted = X[:at_most]
    assert torch.equal(torch.cat([p.call[0][0] for p in found]), wanted)
    assert torch.equal(torch.cat([p.labels for p in found]), Y[:at_most])
    assert size is None or max(len(p.labels) for p in found) <= size


def test_whole_parts_have_as_many_rows_as_the_file_takes():
    found = parts(batches(10, 3, 10), ((X[:4],), {}), 4, whole=True, at_most=14)
    assert [len(p.labels) for p in found] == [4, 4, 4, 4]
    assert torch.equal(found[2].call[0][0], X[13:17])  # of a batch of ten two rows are left over, and the batch of three is too small
    with pytest.raises(DataError, match="part of 4 rows"):
        parts(batches(3, 3, 3, 14)[:3], ((X[:4],), {}), 4, whole=True, at_most=None)


def test_keywords_that_the_call_does_not_have_are_left_out():
    found = parts([{"ids": X, "labels": Y}], ((), {"ids": X[:1]}), 5, whole=False, at_most=None)
    assert all(list(p.call[1]) == ["ids"] for p in found)
    assert torch.equal(torch.cat([p.labels for p in found]), Y)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        parts([], ((X[:1],), {}), 1, whole=False, at_most=None)


def test_error_is_the_euclidean_one_over_everything():
    rng = np.random.default_rng(0)
    wanted = [[rng.standard_normal((3, 4)).astype(np.float32), np.arange(3)] for _ in range(2)]
    found = [[a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), b + 7] for a, b in wanted]
    a, b = (np.concatenate([call[0].ravel() for call in outputs]).astype(np.float64) for outputs in (found, wanted))
    assert error(found, wanted) == pytest.approx(math.sqrt(((a - b) ** 2).sum() / (b**2).sum()))
    assert error(wanted, wanted) == 0
    found[1][0][0, 0] = np.nan
    assert math.isnan(error(found, wanted))


def test_equal_infinities_are_no_error():
    """A mask of classes is minus infinity in every precision."""
    wanted = [[np.array([[3.0, -np.inf, 4.0]], dtype=np.float32)]]
    assert error(wanted, wanted) == 0
    assert error([[np.array([[3.0, -np.inf, 4.5]], dtype=np.float32)]], wanted) == pytest.approx(0.1)
    assert error([[np.array([[3.0, 0.0, 4.0]], dtype=np.float32)]], wanted) == math.inf


def test_outputs_that_are_decisions_tell_no_error():
    with pytest.raises(InputError, match="none of floating point"):
        error([[np.arange(3)]], [[np.arange(3)]])


def test_accuracy_takes_the_outputs_call_by_call():
    test = parts(batches(10, 13), ((X[:1],), {}), None, whole=False, at_most=None)
    right = [[np.eye(23, dtype=np.float32)[p.labels.numpy()]] for p in test]
    assert accuracy(right, test) == 1
    wrong = [[np.roll(right[0][0], 1, axis=1)], right[1]]
    assert accuracy(wrong, test) == pytest.approx(13 / 23)


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_within_half_a_step_and_zeros_stay_zero(seed):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((6, 3, 3)) * 10.0 ** rng.integers(-6, 6, (6, 1, 1))).astype(np.float32)
    w[rng.random(w.shape) < 0.5] = 0
    w[2] = 0
    codes, scale = symmetric(w)
    assert codes.dtype == np.int8 and codes.min() >= -127
    for row, code, step in zip(w, codes, scale, strict=True):  # slow on purpose: one weight at a time
        for value, whole in zip(row.ravel(), code.ravel(), strict=True):
            assert abs(float(value) - float(whole) * float(step)) <= float(step) / 2 * (1 + 1e-5)
            assert value != 0 or whole == 0
        assert not row.any() or abs(code).max() == 127


# ---------------------------------------------------------------- what it means
def row(name, ms, bytes_=100, accuracy=0.9, error=0.01, zeros=0):
    return Row(name, bytes_, accuracy, error, 0.0, Latency(ms / 1e3, 0, 20, 1, 1, 1), ms, 1000, zeros)


FOUR = [row("dense", 4), row("pruned", 2, 50, 0.88), row("dense int8", 2.2, 30, 0.899), row("pruned int8", 1.2, 15, 0.875)]


def test_nothing_is_warned_of_where_all_is_well():
    assert warnings(FOUR, lambda name: ["layer"]) == []


def test_lost_accuracy_names_the_layers():
    bad = [*FOUR[:3], replace(FOUR[3], accuracy=0.88 - POINTS - 0.001)]
    assert len(warnings(bad, lambda name: [f"worst of {name}"])) == 1
    assert "loses 5.10 points" in (said := warnings(bad, lambda name: [f"worst of {name}"])[0]) and "worst of pruned int8" in said
    assert warnings([*FOUR[:3], replace(FOUR[3], accuracy=0.88 - POINTS + 0.001)], lambda name: []) == []


@pytest.mark.parametrize("off", [BOUND * 1.01, math.nan, math.inf])
def test_outputs_that_are_off_are_said(off):
    assert "outputs of dense int8" in warnings([*FOUR[:2], replace(FOUR[2], error=off), FOUR[3]], lambda name: [])[0]


def test_slower_int8_is_said():
    slow = [*FOUR[:2], row("dense int8", 5, 30), FOUR[3]]
    assert "dense int8 is slower than float32 here: 5.000 ms to 4.000 ms" in warnings(slow, lambda name: [])[0]


def test_lost_zeros_are_said():
    rows = [row("model", 2, zeros=500), row("model int8", 1, 30, zeros=499)]
    assert "zeros were lost" in warnings(rows, lambda name: [])[0]
    assert warnings([rows[0], replace(rows[1], zeros=500)], lambda name: []) == []


def test_int8_alone_that_does_all_that_pruning_does_is_said():
    assert "alone does all" not in verdict(FOUR)[0]  # it is slower than the pruned model
    assert "int8 alone does all that pruning alone does" in verdict([*FOUR[:2], replace(FOUR[2], seconds=FOUR[1].seconds), FOUR[3]])[0]
    assert verdict(FOUR)[1].endswith("0.55 times the time, 0.50 times the bytes (15 B to 30 B), -2.40 points of accuracy")
    assert verdict([*FOUR[:3], replace(FOUR[3], seconds=FOUR[2].seconds)])[1].endswith("It makes int8 no quicker here")
    assert verdict([replace(FOUR[0], name="model"), replace(FOUR[2], name="model int8")]) == []


def test_without_labels_nearness_to_the_dense_model_decides():
    off = {"dense": 0.0, "pruned": 0.3, "dense int8": 0.02, "pruned int8": 0.31}
    rows = [replace(r, accuracy=None, against_dense=off[r.name], seconds=FOUR[1].seconds) for r in FOUR]
    assert "int8 alone does all" in verdict(rows)[0]
    worse = [replace(r, against_dense=0.4) if r.name == "dense int8" else r for r in rows]
    assert "int8 alone does all" not in verdict(worse)[0]


@pytest.mark.parametrize("how", [
    How(runtime="tensorrt"), How(kind="int4"), How(ranges="luck"), How(ranges="minmax", kind="weights"), How(rows=0), How(rounds=1),
    How(runtime="openvino", ranges="entropy"),
])  # fmt: skip
def test_settings_that_no_tool_has_are_refused(how):
    with pytest.raises(InputError):
        how.check()


CALLED = (torch.arange(12.0).view(6, 2), torch.arange(6))


@pytest.mark.parametrize("call, data", [
    (((CALLED[0],), {"turned": True}), [CALLED]), (((CALLED[0], True), {}), [CALLED]), (((), {"x": CALLED[0], "turned": True}), [{"x": CALLED[0]}]),
])  # fmt: skip
def test_a_flag_of_the_example_is_in_every_call_and_rows_can_be_read_again(call, data):
    found = parts(data, call, 4, whole=False, at_most=None)
    (again,) = parts([found[0].given], call, 2, whole=False, at_most=2)
    for part, rows in zip((*found, again), (slice(0, 4), slice(4, 6), slice(0, 2)), strict=True):
        x, turned = (*part.call[0], *part.call[1].values())
        assert turned is True and torch.equal(x, CALLED[0][rows])
