"""What is lost on held-out rows, against counting by hand; its interval against resampling."""

import math

import pytest
import torch
from torch import nn

from secateur.advise.held_out import HeldOut
from secateur.errors import DataError, InputError
from secateur.models.quality import accuracy


class Scores(nn.Module):
    """Gives the rows of a table, by the number in its input."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x):
        return self.table[x.long().flatten()]


def numbered(rows, size=7):
    return list(torch.arange(rows).float()[:, None].split(size))


def calls(batch):
    return ((batch[0] if isinstance(batch, (tuple, list)) else batch),), {}


def tables(rows=50, classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, classes, generator=random)
    return dense, dense + 0.8 * torch.randn(rows, classes, generator=random), torch.randint(0, classes, (rows,), generator=random)


def test_with_labels_it_is_the_difference_of_two_accuracies():
    dense, other, labels = tables()
    x = torch.cat(numbered(50))
    held = HeldOut(Scores(dense), list(zip(x.split(7), labels.split(7), strict=True)), True, True, calls)
    found = held.lost(Scores(other))
    right = [sum(int(t[i].argmax()) == int(labels[i]) for i in range(50)) for t in (dense, other)]
    assert found.points == pytest.approx(100 * (right[0] - right[1]) / 50) and found.points != 0
    assert held.value == pytest.approx(right[0] / 50) and found.value == pytest.approx(right[1] / 50)
    assert held.metric == "accuracy" and held.rows == 50


def test_without_labels_it_is_the_rows_with_another_winner():
    dense, other, _ = tables(seed=1)
    held = HeldOut(Scores(dense), numbered(50), False, True, calls)
    differ = sum(int(dense[i].argmax()) != int(other[i].argmax()) for i in range(50))
    assert held.metric == "agreement"
    assert held.lost(Scores(other)).points == pytest.approx(2 * differ) and differ > 0


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_of_nan_are_lost(labelled):
    """argmax takes the first NaN for the largest score, which here stands where it should."""
    dense, other = torch.zeros(8, 3), torch.zeros(8, 3)
    dense[:, 0] = other[:, 0] = 1.0
    other[:6] = float("nan")
    x = numbered(8)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x] if labelled else x
    held = HeldOut(Scores(dense), batches, labelled, True, calls)
    assert held.lost(Scores(other)).points == 75.0
    if labelled:
        assert accuracy(Scores(other), batches) == 0.25


def test_tokens_of_a_row_count_as_one_row():
    dense, other = torch.zeros(3, 5, 4), torch.zeros(3, 5, 4)
    dense[:, :, 0] = 1
    other[:, :, 0] = 1
    other[1, :2, 3] = 9  # two of five tokens of one of three rows
    held = HeldOut(Scores(dense), numbered(3), False, True, calls)
    assert held.rows == 3 and held.lost(Scores(other)).points == pytest.approx(100 * 2 / 15)


def test_of_other_outputs_it_is_the_squared_error_over_their_variance():
    dense, other, _ = tables(seed=2)
    held = HeldOut(Scores(dense), numbered(50), False, False, calls)
    wanted = float(((other - dense) ** 2).mean() / ((dense - dense.mean(0)) ** 2).mean())
    assert held.metric == "error" and held.lost(Scores(other)).points == pytest.approx(100 * wanted, rel=1e-5)


def test_a_model_loses_nothing_to_itself_and_the_interval_says_how_sure_that_is():
    for rows in (10, 100, 1000):
        dense, _, _ = tables(rows)
        found = HeldOut(Scores(dense), numbered(rows, 100), False, True, calls).lost(Scores(dense))
        assert found.points == 0 and found.interval == pytest.approx(100 * 1.96 / (rows + 2))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Rows drawn again and again from a population whose loss is known: 95 % of the intervals hold it."""
    random = torch.Generator().manual_seed(5)
    hits = []
    for _ in range(400):
        u = torch.rand(120, generator=random)
        dense_right, other_right = u < 0.9, (u < 0.82) | (u > 0.98)  # true loss: 0.9 - 0.84
        scores = [torch.stack([~right, right], 1).float() for right in (dense_right, other_right)]
        held = HeldOut(Scores(scores[0]), list(zip(torch.cat(numbered(120)).split(40), torch.ones(3, 40).long(), strict=True)), True, True, calls)
        found = held.lost(Scores(scores[1]))
        hits.append(abs(found.points - 6) <= found.interval)
    share = sum(hits) / len(hits)
    assert abs(share - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 400)


def test_what_cannot_be_compared_is_refused():
    dense, other, _ = tables()
    with pytest.raises(DataError, match="no row to compare"):
        HeldOut(Scores(dense), [], False, True, calls)
    held = HeldOut(Scores(dense), numbered(50), False, True, calls)
    with pytest.raises(InputError, match="cannot be compared"):
        held.compared(torch.zeros(3))
