"""Every criterion against its slow twin, on networks whose units are written down by hand."""

from functools import cache

import pytest
import torch

from secateur import score
from secateur.calibrate import Calibration
from secateur.errors import InputError
from secateur.trace import trace
from tests.score import reference
from tests.score.networks import NETWORKS, Attention, Perceptron, data, made

REFUSED = {("bn_scale", Perceptron), ("bn_scale", Attention), ("apoz", Attention)}
BY_REFERENCE = [name for name in score.CRITERIA if hasattr(reference, name)]


@cache
def prepared(kind):
    model, batches = made(kind), data(kind)
    example = torch.ones(kind.example, dtype=torch.float64)
    graph = trace(model, (example,))
    return model, graph, batches, Calibration(model, graph, batches, args=(example,))


def test_every_criterion_has_a_twin():
    """Chance is tested by its seed, and what is built on the elimination of the repair beside that."""
    assert set(score.CRITERIA) - set(BY_REFERENCE) <= {"random", "obs"}
    assert len(BY_REFERENCE) >= 15


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", BY_REFERENCE)
def test_criterion_is_its_slow_twin(name, kind):
    model, graph, batches, calibration = prepared(kind)
    if (name, kind) in REFUSED:
        with pytest.raises(InputError, match=r"[Uu]se "):
            score.score(graph, model, name, calibration=calibration)
        return
    wanted = getattr(reference, name)(model, batches)
    found = score.score(graph, model, name, calibration=calibration)
    assert found.keys() == wanted.keys() == graph.groups.keys()
    for group, values in found.items():
        by_hand = torch.tensor(wanted[group], dtype=torch.float64)
        torch.testing.assert_close(values, by_hand, rtol=1e-7, atol=1e-9, msg=lambda m, g=group: f"{g}: {m}")
        alike = bool(torch.isinf(values).all()) or (name == "fpgm" and len(values) == 2)  # each is as far from the other
        assert alike or len(set(values.tolist())) > 1, f"{group}: equal numbers prove little"
