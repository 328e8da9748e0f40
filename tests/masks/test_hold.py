"""Zeros stay zero through training, and nothing of the mask is left in files or in the way of compilers."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


ARGS = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05),
    "adam, foreach off": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, foreach=False),
}


def train(model, optimizer, steps=5):
    random = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(32, 6, generator=random)
        nn.functional.mse_loss(model(x), x[:, :3].sin()).backward()
        optimizer.step()


def zeros(model, plan):
    return all(
        not model.get_parameter(n)[~m].any() and not (torch.signbit(model.get_parameter(n)) & (model.get_parameter(n) == 0)).any()
        for n, m in plan.weights.items()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_and_the_others_learn(name):
    result = sc.magnitude(net(), ARGS, "30%")
    model = result.model.train()
    free = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    keys = list(model.state_dict())
    held = sc.hold(model, result.plan, optimizer)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer)
    assert zeros(model, result.plan)
    assert all(bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    for p in model.parameters():  # momentum of a removed weight would move it as soon as the hold is off
        for kept in ("momentum_buffer", "exp_avg"):
            if kept in optimizer.state[p] and p.dim() == 2:
                assert not optimizer.state[p][kept][p == 0].any()
    train(free, OPTIMIZERS[name](free.parameters()))
    assert not zeros(free, result.plan)
    held.remove()
    train(model, optimizer)
    assert not zeros(model, result.plan) and not list(model.buffers())


def test_held_models_are_copied_exported_saved_and_moved(tmp_path):
    result = sc.magnitude(net(), ARGS, "30%")
    optimizer = torch.optim.SGD(result.model.parameters(), 0.1)
    held = sc.hold(result.model, result.plan, optimizer)
    assert not list(result.model.buffers())
    twin = copy.deepcopy(result.model)
    other = torch.optim.SGD(twin.parameters(), 0.1)
    sc.hold(twin, result.plan, other)  # a copy is held anew
    train(twin, other)
    assert zeros(twin, result.plan)
    program = torch.export.export(result.model, ARGS)
    assert torch.equal(program.module()(*ARGS), result.model(*ARGS))
    assert torch.equal(sc.load(sc.save(result, tmp_path / "out"), net)(*ARGS), result.model(*ARGS))
    train(result.model.double().float(), optimizer)
    assert zeros(result.model, result.plan)
    held.remove()


def test_a_compiled_model_is_held():
    result = sc.magnitude(net(), ARGS, "30%")
    compiled = torch.compile(result.model, backend="aot_eager")
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1, momentum=0.9)
    sc.hold(compiled, result.plan, optimizer)
    train(compiled, optimizer)
    assert zeros(result.model, result.plan)


def test_low_rank_updates_lose_no_zero():
    result = sc.magnitude(net(), ARGS, "30%")
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, generator=random), torch.randn(16, 2, generator=random)
    before = result.model.get_parameter("0.weight").clone()
    sc.merge_low_rank(result.model, result.plan, {"0.weight": (a, b)}, scale=0.5)
    after, stays = result.model.get_parameter("0.weight"), result.plan.weights["0.weight"]
    assert zeros(result.model, result.plan)
    assert torch.allclose(after[stays], (before + 0.5 * b @ a)[stays])
    with pytest.raises(InputError, match="A is"):
        sc.merge_low_rank(result.model, result.plan, {"0.weight": (b, a)})


def test_low_rank_updates_of_half_precision_are_added_up_in_single():
    """The product of two halves may have no half; what has none is refused before anything is written."""
    result = sc.magnitude(net().half(), (ARGS[0].half(),), "30%")
    before = {n: p.clone() for n, p in result.model.named_parameters()}
    a, b = torch.full((1, 6), 300.0), torch.full((16, 1), 300.0)
    sc.merge_low_rank(result.model, result.plan, {"0.weight": (a, b)}, scale=1e-3)
    stays = result.plan.weights["0.weight"]
    assert torch.equal(result.model.get_parameter("0.weight")[stays], (before["0.weight"].float() + 90).half()[stays])
    result.model.get_parameter("0.weight").data.copy_(before["0.weight"])
    small = {n: (torch.ones(1, p.shape[1]), torch.ones(p.shape[0], 1)) for n, p in before.items() if p.dim() == 2}
    for factors, scale in (({**small, "0.weight": (a, b)}, 1.0), (small, float("nan"))):
        with pytest.raises(InputError, match="would not be finite"):
            sc.merge_low_rank(result.model, result.plan, factors, scale)
        assert all(torch.equal(before[n], p) for n, p in result.model.named_parameters())


def test_what_cannot_be_held_is_refused():
    result = sc.magnitude(net(), ARGS, "30%")
    optimizer = torch.optim.SGD(result.model.parameters(), 0.1)
    with pytest.raises(InputError, match="none of the masked weights"):
        sc.hold(result.model, result.plan, torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(PlanError, match="in this model"):
        sc.hold(nn.Linear(6, 16), result.plan, optimizer)
    with pytest.raises(PlanError, match="no single weights"):
        sc.hold(result.model, sc.Plan({}, result.before, result.after), optimizer)
    with pytest.raises(InputError, match="is a NoneType"):
        sc.hold(result.model, result.plan, None)
    with pytest.raises(InputError, match="hold NaN"):
        sc.merge_low_rank(result.model, result.plan, {"0.weight": (torch.full((2, 6), torch.nan), torch.ones(16, 2))})


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "obc", "alps"])
def test_papers_by_name(name):
    recipe, data = getattr(sc, name), [torch.randn(32, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    result = recipe(net(), ARGS, "50%") if name == "magnitude" else recipe(net(), ARGS, data, "50%")
    assert result.plan.why["score"] == name and 0.4 < result.plan.why["kept"] / result.plan.why["of_weights"] <= 0.5
    if name in ("magnitude", "wanda"):  # these leave the weights that stay alone
        dense = net()
        assert all(torch.equal(result.model.get_parameter(n)[m], dense.get_parameter(n)[m]) for n, m in result.plan.weights.items())
