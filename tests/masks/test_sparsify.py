"""The whole way on small networks: exact masks, weights that make up for them, a folder that can be checked."""

import copy
import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur.errors import DataError, FormatError, InputError, ModelError, PlanError
from secateur.models.atomic import sha256
from secateur.models.folder import _sealed, read
from secateur.models.verify import verify
from secateur.pack import read_archive, write_archive
from secateur.pattern import parse_pattern
from secateur.recover.sparse_layers import best, layers_of


class Net(nn.Module):
    """Convolutions with a shortcut, a grouped one, batch norm, and linear layers behind a pool."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(16, 24)
        self.head = nn.Linear(24, 7, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.grouped(torch.relu(self.inner(x)))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.relu(self.mid(self.embed(x))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.2, 0.2)
        model.norm.running_var.uniform_(0.5, 2.0)
    return model


def batches(n=6):
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(3, 3, generator=random)
    return [torch.einsum("nchw,cd->ndhw", torch.randn(16, 3, 8, 8, generator=random), mix) for _ in range(n)]


ARGS = (batches(1)[0][:2],)
HOWS = {
    "free": sc.Sparse("30%"), "row": sc.Sparse("30%", "wanda", sc.Free("row")), "2:4": sc.Sparse(pattern=sc.NM(2, of=4), by="sparsegpt"),
    "blocks": sc.Sparse("50%", pattern=sc.Block(4, 1)), "obc": sc.Sparse("40%", "obc"), "ria": sc.Sparse(0.5, "ria", budget="owl"),
    "erk": sc.Sparse("30%", budget="erk"), "plain": sc.Sparse("30%", "sparsegpt", refit=False, corrected=False),
    "wide blocks": sc.Sparse("50%", pattern=sc.Block(2, 4)), "kernels": sc.Sparse("40%", pattern=sc.Kernels()),
}  # fmt: skip


@pytest.mark.parametrize("name", HOWS)
def test_masks_are_exact_and_the_model_given_is_unchanged(net, name):
    before = copy.deepcopy(net.state_dict())
    result = sc.sparsify(net, ARGS, HOWS[name], batches())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    plan, state = result.plan, result.model.state_dict()
    assert plan.weights.keys() >= {"inner.weight", "grouped.weight", "fc.weight"}
    for key, stays in plan.weights.items():
        assert not state[key][~stays].any() and not (torch.signbit(state[key]) & (state[key] == 0)).any()
        assert parse_pattern(plan.patterns[key]) == HOWS[name].pattern
    if name == "kernels":
        inner = plan.weights["inner.weight"].flatten(2).sum(2)
        assert set(inner.unique().tolist()) == {0, 9} and int((inner == 9).sum()) == int(16 * 16 * 0.4)
    if name == "free":
        assert {k: int(m.sum()) for k, m in plan.weights.items()} == {k: _share(net, k, Fraction(3, 10)) for k in plan.weights}
    assert result.plan.why["kept"] == sum(int(m.sum()) for m in plan.weights.values())
    assert sc.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert result.proof.passed


def _share(net, name, keep):
    """Each group of a grouped convolution rounds down for itself."""
    w, groups = net.get_parameter(name), 2 if name == "grouped.weight" else 1
    return groups * int(w.numel() // groups * keep)


def output_error(net, model):
    x = torch.cat(batches(9)[6:])
    with torch.no_grad():
        return float((net(x) - model(x)).square().mean() / net(x).var())


def test_fitting_beats_the_mask_alone_and_correction_beats_each_layer_by_itself(net):
    errors, own = {}, sc.Sparse("30%", "sparsegpt", refit=False, corrected=False)
    for name, how in {"mask": sc.Sparse("30%", "magnitude"), "own": own, "all": sc.Sparse("30%")}.items():
        errors[name] = output_error(net, sc.sparsify(net, ARGS, how, None if name == "mask" else batches()).model)
    assert errors["all"] < 0.3 * errors["own"] < 0.3 * errors["mask"]


def test_a_plan_is_carried_out_and_then_fitted(net):
    first = sc.sparsify(net, ARGS, sc.Sparse("30%"))
    again = sc.mask(net, ARGS, first.plan)
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    before = output_error(net, again.model)
    sc.mend(again, batches())
    assert output_error(net, again.model) < 0.5 * before
    assert all(not again.model.state_dict()[k][~m].any() for k, m in first.plan.weights.items())
    assert again.plan.why["repair"] == "least_squares"


def test_layers_left_dense_are_named(net):
    result = sc.sparsify(net, ARGS, sc.Sparse(pattern=sc.NM(2, of=4), ignore=["fc"]), batches())
    assert "fc.weight" not in result.plan.weights and "first.weight" not in result.plan.weights
    assert any("first" in note and "inputs in a row" in note for note in result.notes)
    tied = Tied().eval()
    result = sc.sparsify(tied, (torch.tensor([[1, 2], [3, 4]]),), sc.Sparse("50%"))
    assert list(result.plan.weights) == ["mid.weight"]
    assert any("used in more than one place" in note for note in result.notes)


def test_same_seed_same_bytes(net):
    one, two = (sc.sparsify(net, ARGS, sc.Sparse("30%"), batches()).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


# ------------------------------------------------------------ saved
@pytest.fixture(scope="module", params=["free", "2:4", "blocks", "wide blocks", "kernels"])
def folder(request, net, tmp_path_factory):
    result = sc.sparsify(net, ARGS, HOWS[request.param], batches())
    return sc.save(result, tmp_path_factory.mktemp("masks") / "out"), result


def rewritten(folder, change, tmp_path, packed=True):
    """The folder with other tensors, and with the hashes of those: as if it had been saved so."""
    import shutil

    new = tmp_path / f"changed{packed}"
    shutil.copytree(folder, new)
    tensors = read_archive(new / "model.safetensors")
    change(tensors)
    write_archive(tensors, new / "model.safetensors", set(tensors) if packed else ())
    document = json.loads((new / "plan.json").read_text())
    document.pop("sha256")
    document["files"]["model.safetensors"] = {"bytes": (new / "model.safetensors").stat().st_size, "sha256": sha256(new / "model.safetensors")}
    (new / "plan.json").write_text(_sealed(document))
    return new, document


def test_a_saved_model_is_loaded_and_verified(folder):
    path, result = folder
    found = verify(path)
    assert not found.problems and found.weights == len(result.plan.weights)
    assert found.zeros >= found.size - result.plan.why["kept"] > 0
    loaded = sc.load(path)
    with torch.no_grad():
        assert torch.equal(loaded(ARGS[0]), result.model(ARGS[0]))


def test_one_weight_too_many_is_found(folder, tmp_path):
    path, result = folder
    where = tuple((~result.plan.weights["inner.weight"]).nonzero()[0].tolist())

    def change(tensors):
        tensors["inner.weight"][where] = 0.5

    for packed in (True, False):
        new, _ = rewritten(path, change, tmp_path, packed)
        assert ("inner.weight" in load_file(new / "model.safetensors")) != packed
        kept = int(result.plan.weights["inner.weight"].sum())
        assert verify(new).problems == (f"inner.weight: {kept + 1} weights are not zero, and the plan keeps {kept}",)
    dense = sc.save(result, tmp_path / "dense", packed=False)
    new, _ = rewritten(dense, change, tmp_path / "dense_too", False)
    assert verify(new).problems == ("inner.weight: 1 weights that the plan removed are not zero",)


def test_another_weight_in_the_place_of_one_is_found(folder, tmp_path):
    path, result = folder
    stays = result.plan.weights["inner.weight"]
    here, there = (tuple(m.nonzero()[0].tolist()) for m in (stays, ~stays))

    def change(tensors):
        tensors["inner.weight"][there], tensors["inner.weight"][here] = 0.5, 0.0

    new, _ = rewritten(path, change, tmp_path)
    (problem,) = verify(new).problems
    assert problem == f"inner.weight: {int(stays.sum())} weights are not zero, and the plan keeps as many, but not the same ones"


def test_a_negative_zero_is_found(folder, tmp_path):
    path, result = folder
    where = tuple((~result.plan.weights["fc.weight"]).nonzero()[0].tolist())

    def change(tensors):
        tensors["fc.weight"][where] = -0.0

    for packed in (True, False):
        new, _ = rewritten(path, change, tmp_path, packed)
        assert ("fc.weight" in load_file(new / "model.safetensors")) != packed
        assert verify(new).problems == ("fc.weight: 1 zeros are -0",)


@pytest.mark.parametrize("folder", ["2:4", "blocks", "wide blocks", "kernels"], indirect=True)
def test_an_illegal_group_is_found(folder, tmp_path):
    path, _ = folder
    new, document = rewritten(path, lambda tensors: None, tmp_path)
    with pytest.raises(PlanError, match="in the tensors of its folder"):
        sc.Plan.from_json(document["plan"])
    plan = sc.Plan.from_json(read(path).document["plan"])
    assert all(torch.equal(plan.weights[n], m) for n, m in folder[1].plan.weights.items())
    stays = plan.weights["inner.weight"].clone()
    where = tuple((~stays).nonzero()[0].tolist())
    stays[where] = True  # one more in its group, or one alone in its block
    document["plan"] = sc.Plan(plan.keep, plan.before, plan.after, plan.why, {**plan.weights, "inner.weight": stays}, plan.patterns).to_json()
    (new / "plan.json").write_text(_sealed(document))
    (problem,) = verify(new).problems
    assert problem.startswith("inner.weight: its mask is no legal pattern")


def test_a_changed_byte_is_found(folder, tmp_path):
    import shutil

    path, _ = folder
    new = tmp_path / "bytes"
    shutil.copytree(path, new)
    raw = bytearray((new / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (new / "model.safetensors").write_bytes(raw)
    with pytest.raises(FormatError, match="altered"):
        verify(new)


# ------------------------------------------------------------ refused
def test_what_cannot_be_meant_is_refused(net):
    with pytest.raises(InputError, match="does not say how much stays"):
        sc.sparsify(net, ARGS, sc.Sparse())
    with pytest.raises(InputError, match="120"):
        sc.sparsify(net, ARGS, sc.Sparse("120%"))
    with pytest.raises(InputError, match="which keeps 50 %"):
        sc.sparsify(net, ARGS, sc.Sparse("30%", pattern=sc.NM(2, of=4)))
    with pytest.raises(InputError, match="unknown method 'best'"):
        sc.sparsify(net, ARGS, sc.Sparse("30%", by="best"))
    with pytest.raises(InputError, match="unknown budget 'fair'"):
        sc.sparsify(net, ARGS, sc.Sparse("30%", budget="fair"))
    with pytest.raises(InputError, match="needs calibration data"):
        sc.sparsify(net, ARGS, sc.Sparse("30%", by="alps"))
    with pytest.raises(PlanError, match="no layer can be made sparse"):
        sc.sparsify(net, ARGS, sc.Sparse("50%", pattern=sc.Block(64, 1)))
    with pytest.raises(InputError, match="the budget says nothing of"):
        sc.sparsify(net, ARGS, sc.Sparse("50%", budget={"fc.weight": Fraction(1, 2)}))
    with pytest.raises(DataError):
        sc.sparsify(net, ARGS, sc.Sparse("50%"), [])
    with pytest.raises(DataError, match="NaN"):
        sc.sparsify(net, ARGS, sc.Sparse("50%"), [torch.full((4, 3, 8, 8), float("nan"))])
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"fc\.weight"):
        sc.sparsify(broken, ARGS, sc.Sparse("50%"))


def test_a_plan_of_another_model_is_refused(net):
    plan = sc.sparsify(net, ARGS, sc.Sparse("30%")).plan
    with pytest.raises(PlanError, match="in this model and"):
        sc.mask(Tied().eval(), (torch.tensor([[1, 2]]),), plan)
    with pytest.raises(PlanError, match="no single weights"):
        sc.mask(net, ARGS, sc.Plan(plan.keep, plan.before, plan.after))


# ------------------------------------------------------------ what was there before, and what is little
def mlp(*sizes):
    torch.manual_seed(0)
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def rows(width, batches=4, size=64):
    return [torch.randn(size, width, generator=torch.Generator().manual_seed(i)) for i in range(batches)]


def test_zeros_that_were_there_stay_in_every_layer():
    model, x = mlp(8, 32, 32, 6), rows(8)
    first = sc.sparsify(model, (x[0],), sc.Sparse("50%"), x)
    zero = {n: ~m for n, m in first.plan.weights.items()}
    second = sc.sparsify(first.model, (x[0],), sc.Sparse("20%", ignore=["4"]), x)
    third = sc.mend(sc.mask(first.model, (x[0],), second.plan), x)
    for result in (second, third):
        for name, gone in zero.items():
            assert not result.model.get_parameter(name)[gone].any(), name
    assert torch.equal(second.model.get_parameter("4.weight"), first.model.get_parameter("4.weight"))
    pruned = sc.prune(first.model, (x[0],), sc.MACs("60%"), data=x)
    assert any("exactly zero" in note for note in pruned.notes)


def test_no_filter_and_no_row_is_left_empty():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, groups=12)

        def forward(self, x):
            return self.conv(x)

    x = torch.randn(4, 12, 8, 8)
    for data in (None, [x, x + 1]):
        result = sc.sparsify(Depthwise().eval(), (x,), sc.Sparse("10%"), data)
        assert (result.plan.weights["conv.weight"].flatten(1).sum(1) == 1).all()
        assert any("one at least" in note for note in result.notes)


def test_too_little_data_is_said_and_what_says_nothing_is_not_followed():
    model = mlp(8, 64, 4)
    result = sc.sparsify(model, (rows(8)[0],), sc.Sparse("50%", "obc"), [torch.randn(1, 8)])
    assert any("too little data" in note and "64 inputs" in note for note in result.notes)
    magnitude = sc.sparsify(model, (rows(8)[0],), sc.Sparse("50%"))
    assert torch.equal(result.plan.weights["2.weight"], magnitude.plan.weights["2.weight"])
    assert not any("too little" in note for note in sc.sparsify(model, (rows(8)[0],), sc.Sparse("50%"), rows(8)).notes)


def test_half_precision_is_ranked_as_it_is():
    for scale, keep in ((300.0, "20%"), (0.002, "99%")):
        model = nn.Sequential(nn.Linear(64, 64)).half()
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * scale)
        stays = sc.sparsify(model.eval(), (torch.ones(2, 64).half(),), sc.Sparse(keep)).plan.weights["0.weight"]
        size = model[0].weight.abs()
        assert size[stays].min() >= size[~stays].max()


def test_papers_on_networks_with_layers_that_are_left_alone(net):
    """A norm, a shared layer or a dense first convolution upstream is not fitted, and does not get in the way."""
    result = sc.sparsegpt(net, ARGS, batches(), pattern=sc.NM(2, of=4))
    assert "first.weight" not in result.plan.weights and "inner.weight" in result.plan.weights
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = [torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    result = sc.wanda(encoder, (x[0],), x, "50%")
    assert torch.equal(result.model.norm1.weight, encoder.norm1.weight) and len(result.plan.weights) >= 3


def test_grouped_blocks_are_verified_group_by_group(tmp_path):
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=2)).eval()
    result = sc.sparsify(model, (torch.randn(2, 12, 6, 6),), sc.Sparse("50%", pattern=sc.Block(4)))
    assert not verify(sc.save(result, tmp_path / "out")).problems


def test_plans_and_options_that_cannot_be_meant(net):
    plan = sc.sparsify(net, ARGS, sc.Sparse("30%")).plan
    tied = Tied().eval()
    stays = torch.ones(11, 8, dtype=torch.bool)
    with pytest.raises(PlanError, match="cannot be masked"):
        sc.mask(tied, (torch.tensor([[1, 2]]),), sc.Plan({}, plan.before, plan.after, {}, {"out.weight": stays}, {"out.weight": "free"}))
    with pytest.raises(PlanError, match="no pattern"):
        sc.Plan({}, plan.before, plan.after, {}, {"fc.weight": stays})
    with pytest.raises(InputError, match="is no pattern"):
        sc.sparsify(net, ARGS, sc.Sparse("30%", pattern="2:4"))
    with pytest.raises(InputError, match="unknown budget"):
        sc.sparsify(net, ARGS, sc.Sparse(pattern=sc.NM(2, of=4), budget="fair"))
    for bad in ("lots", float("nan"), 7):
        with pytest.raises(InputError):
            sc.sparsify(net, ARGS, sc.Sparse("30%", budget={n: bad for n in plan.weights}))
    shares = {n: "100%" if n == "first.weight" else "20%" for n in plan.weights}
    given = sc.sparsify(net, ARGS, sc.Sparse("30%", budget=shares)).plan.weights
    assert given["first.weight"].all() and int(given["fc.weight"].sum()) == 16 * 24 // 5
    with pytest.raises(InputError, match="is for cuts"):
        sc.mend(sc.mask(net, ARGS, plan), batches(), "bias")


def test_a_cut_is_no_mask_and_a_mask_no_cut(net):
    plan, graph = sc.sparsify(net, ARGS, sc.Sparse("30%")).plan, sc.trace(net, ARGS)
    with pytest.raises(PlanError, match=r"mask\(\) carries it out"):
        sc.cut(net, graph, plan)
    name = next(iter(plan.keep))
    keep = {**plan.keep, name: torch.arange(len(plan.keep[name])) > 0}
    with pytest.raises(PlanError, match="removes units too"):
        sc.mask(net, ARGS, sc.Plan(keep, plan.before, plan.after, {}, plan.weights, plan.patterns))


@pytest.mark.parametrize("by", ["magnitude", "wanda", "sparsegpt", "obc", "alps"])
def test_blocks_of_a_layer_with_zeros_are_whole_and_as_many_as_asked(by, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        net[0].weight[::4] = 0  # a zero in every block of 4 outputs
    x = torch.randn(64, 16)
    result = sc.sparsify(net, (x[:2],), sc.Sparse(keep=0.5, pattern=sc.Block(4, 1), by=by), [x] * 4)
    stays = result.plan.weights["0.weight"]
    assert int(stays.sum()) == 256 and not verify(sc.save(result, tmp_path / by)).problems
    blocks = stays.reshape(8, 4, 16).any(1)
    assert not blocks[:4].all() and not blocks[:, :8].all()  # by their worth, not by their place


def test_a_schedule_ranks_blocks_with_zeros_by_what_is_in_them():
    (layer,) = layers_of(nn.Linear(4, 2), sc.Block(2, 1)).layers.values()
    w = torch.tensor([[0.01, 5, 0.01, 3], [0.01, 0, 0.01, 3]])
    assert best(layer, w.square(), sc.Block(2, 1), Fraction(1, 2), w != 0).tolist() == [[False, True, False, True], [False, False, False, True]]
