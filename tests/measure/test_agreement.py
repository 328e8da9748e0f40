"""The cost a graph predicts is the cost the counter counts, for the dense model, exactly."""

import pytest

from secateur.measure import count
from secateur.trace import trace
from tests.measure.test_count import CASES

# Operators the axes have no rule for: they are frozen, and their MACs are not in the prediction.
NO_RULE = {"bilinear", "addbmm", "int8 matrices"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_RULE])
def test_graph_predicts_what_is_counted(name):
    model, args, macs = CASES[name]
    predicted = trace(model, args).cost()
    assert predicted == count(model, args)
    assert predicted.macs == macs
