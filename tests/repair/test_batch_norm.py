import pytest
import torch
from torch import nn

from secateur.errors import DataError
from secateur.repair import batch_norm_statistics


def test_statistics_are_those_of_what_arrives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double().eval()
    batches = [torch.randn(8, 2, 4, 4, dtype=torch.float64) + shift for shift in (0.0, 1.0)]
    used = batch_norm_statistics(model, (((batch,), {}) for batch in batches))
    with torch.no_grad():
        arrived = [model[0](batch) for batch in batches]
    mean = sum(x.mean((0, 2, 3)) for x in arrived) / 2
    var = sum(x.transpose(0, 1).flatten(1).var(1) for x in arrived) / 2  # unbiased, as batch norm keeps it
    assert used == 2
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_a_deep_network_sees_its_own_new_statistics():
    """After re-estimation on one batch, each norm gives mean 0 and variance 1 on that batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(4)]).double().eval()
    x = torch.randn(512, 6, dtype=torch.float64) * 3 + 1
    batch_norm_statistics(model, [((x,), {})])
    with torch.no_grad():
        out = model(x)
    assert out.mean(0).abs().max() < 1e-4
    assert (out.std(0) - 1).abs().max() < 1e-2


def test_weights_and_flags_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch_norm_statistics(model, [((torch.randn(8, 4),), {})])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(module.training for module in model.modules())


def test_nothing_changes_when_the_data_is_bad():
    model = nn.Sequential(nn.BatchNorm1d(4))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(DataError, match="no batch"):
        batch_norm_statistics(model, [])
    with pytest.raises(DataError, match="finite"):
        batch_norm_statistics(model, [((torch.full((4, 4), float("nan")),), {})])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_batch_of_one_value_has_no_variance_and_is_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    before, x = {n: t.clone() for n, t in model.state_dict().items()}, torch.randn(64, 4)
    with pytest.raises(DataError, match="one value to a channel"):
        batch_norm_statistics(model, [((row[None],), {}) for row in x])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    batch_norm_statistics(model, [((x,), {})])
    wanted = {n: t.clone() for n, t in model.state_dict().items()}
    batch_norm_statistics(model, [((x[:1] * 9,), {}), ((x,), {}), ((x[:1],), {})])
    assert all(torch.equal(wanted[n], t) for n, t in model.state_dict().items())


def test_an_instance_norm_is_no_batch_norm():
    """It normalises with copies of its own statistics, so what is behind it sees the same as in the model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(16, 3, 5, 5) + 3
    assert batch_norm_statistics(model[:2], [((x,), {})]) == 0
    assert batch_norm_statistics(model, [((x,), {})]) == 1
    with torch.no_grad():
        arrives = model[:3](x)
    torch.testing.assert_close(model[3].running_mean, arrives.mean((0, 2, 3)))
