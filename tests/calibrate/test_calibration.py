"""Laws of the statistics: how the data is dealt does not matter, and the model is left as it was, whatever happens."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import score
from secateur.calibrate import Calibration
from secateur.errors import DataError, InputError
from secateur.trace import trace
from tests.score.networks import NETWORKS, Residual, data, made


def calibrated(model, batches, example=None, **more):
    example = batches[0][0] if example is None else example
    graph = trace(model, (example,))
    return graph, Calibration(model, graph, batches, args=(example,), **more)


def check_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ---------------------------------------------------------------- how the data is dealt
@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (1, 10)])
def test_batches_of_any_size_give_the_same_means(kind, sizes):
    model = made(kind)
    graph, one = calibrated(model, data(kind, (5, 6)), example=torch.ones(kind.example, dtype=torch.float64))
    other = Calibration(model, graph, data(kind, sizes), args=one.args)
    for field in ("mean", "mean_square", "mean_abs", "zeros"):
        check_close(*({n: getattr(a, field) for n, a in c.activations.items()} for c in (one, other)))
    for field in ("mean", "mean_square", "column_abs", "column_square"):
        check_close(*({n: torch.stack([getattr(i, field) for i in rows]) for n, rows in c.inputs.items()} for c in (one, other)))
    check_close(one.gradients.mean, other.gradients.mean, atol=1e-12, rtol=1e-9)
    check_close(one.hessian_gradient, other.hessian_gradient, atol=1e-12, rtol=1e-7)


def test_the_order_of_rows_does_not_matter_and_their_number_cancels():
    model = made(Residual)
    ((x, y),) = data(Residual, (11,))
    graph, once = calibrated(model, [(x, y)])
    twice = Calibration(model, graph, [(x.flip(0), y.flip(0)), (x, y)], args=once.args)
    for name in ("wanda", "apoz", "activation_mean", "flap", "taylor", "fisher"):
        check_close(score.score(graph, model, name, calibration=once), score.score(graph, model, name, calibration=twice))


def test_float32_sums_are_those_of_float64():
    """Inputs far from 0: a mean square of 10^6 and the zeros of a ReLU, over many rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(1000 * torch.randn(512, 4) + 300, torch.zeros(512, dtype=torch.long)) for _ in range(6)]
    _, narrow = calibrated(model, batches)
    _, wide = calibrated(copy.deepcopy(model).double(), [(x.double(), y) for x, y in batches])
    a, b = narrow.activations["0:out"], wide.activations["0:out"]
    assert a.mean.dtype == torch.float64
    for field in ("mean", "mean_square", "mean_abs"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-5, atol=0)
    torch.testing.assert_close(a.zeros, b.zeros, rtol=0, atol=2 / 3072)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """4,097 is no number of half precision, and the square of 300 is none of float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).to(dtype)
    with torch.no_grad():
        model[2].weight *= 1e-3  # a loss that half precision holds
        model[0].weight.copy_(torch.tensor([[1.0], [1.0], [300.0]]))
        model[0].bias.zero_()
    x = torch.ones(4097, 1, dtype=dtype)
    _, found = calibrated(model, [(x, torch.zeros(4097, dtype=torch.long))])
    assert found.activations["0:out"].mean.tolist() == [1.0, 1.0, 300.0]
    assert found.activations["0:out"].mean_square.tolist() == pytest.approx([1.0, 1.0, 90000.0], rel=1e-6)
    assert score.score(found.graph, model, "taylor", calibration=found)["0:out"].dtype == torch.float64


# ---------------------------------------------------------------- each statistic once, and only what is needed
class Counted:
    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


def test_every_statistic_is_gathered_once_and_only_when_asked_for():
    model, batches = made(Residual), Counted(data(Residual))
    graph, found = calibrated(model, batches, example=torch.ones(Residual.example, dtype=torch.float64))
    assert batches.times == 0
    for name in ("wanda", "flap", "apoz", "activation_mean"):
        score.score(graph, model, name, calibration=found)
    assert batches.times == 1
    for name in ("taylor", "taylor_squared", "fisher", "snip"):
        score.score(graph, model, name, calibration=found)
    assert batches.times == 2
    score.score(graph, model, "grasp", calibration=found)
    assert batches.times == 3


def test_labels_are_not_needed_for_activations():
    model, inputs = made(Residual), [x for x, _ in data(Residual)]
    graph, found = calibrated(model, inputs, example=inputs[0])
    with_labels = Calibration(model, graph, data(Residual), args=found.args)
    check_close(*(score.score(graph, model, "wanda", calibration=c) for c in (found, with_labels)))


# ---------------------------------------------------------------- losses
class Keyword(nn.Module):
    """Takes a dict; gives logits, and a loss where it is given labels."""

    def __init__(self, own_loss):
        super().__init__()
        self.a, self.b, self.own_loss = nn.Linear(4, 5), nn.Linear(5, 3), own_loss

    def forward(self, values=None, labels=None):
        logits = self.b(torch.relu(self.a(values)))
        out = {"hidden": values, "logits": logits}
        if labels is not None and self.own_loss:
            out["loss"] = 3 * F.cross_entropy(logits, labels)
        return out


class Deaf(Keyword):
    def forward(self, values=None):
        return super().forward(values)


def test_a_dict_with_labels_uses_the_loss_of_the_model_else_cross_entropy():
    torch.manual_seed(0)
    model = Keyword(own_loss=True).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    graph = trace(model, (), {"values": x})
    gradients = {}
    for name, kind, batch in (("own", Keyword(True), {"values": x, "labels": y}), ("entropy", Keyword(False), {"values": x, "labels": y}),
                              ("deaf", Deaf(False), {"values": x, "labels": y})):  # fmt: skip
        kind = kind.double()
        kind.load_state_dict(model.state_dict())
        gradients[name] = Calibration(kind, graph, [batch], args=(), kwargs={"values": x}).gradients.mean
    F.cross_entropy(model(x)["logits"], y).backward()
    by_hand = {n: p.grad for n, p in model.named_parameters()}
    check_close(gradients["own"], {n: 3 * g for n, g in by_hand.items()})
    check_close(gradients["entropy"], by_hand)
    check_close(gradients["deaf"], by_hand)
    model.zero_grad()
    found = Calibration(model, graph, [{"values": x, "labels": y}], args=(), kwargs={"values": x})
    assert found.activations["a:out"].mean_abs.shape == (5,), "the graph was traced without labels, and runs without"


def test_a_loss_of_the_user_sees_outputs_and_the_batch_as_it_came():
    model, seen = made(Residual), []
    x = data(Residual)[0][0]

    def loss(outputs, batch):
        seen.append(batch)
        return outputs.square().mean()

    _, found = calibrated(model, [x], example=x, loss=loss)
    other = copy.deepcopy(model).eval()
    other(x).square().mean().backward()
    check_close(dict(found.gradients.mean), {n: p.grad for n, p in other.named_parameters()})
    assert seen == [x]


@pytest.mark.parametrize("last", [True, False])
def test_labels_of_every_position(last):
    """Classes are the last dimension of a sequence, and dimension 1 of an image."""
    torch.manual_seed(0)
    model = (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)) if last else nn.Sequential(nn.Conv1d(4, 5, 1), nn.Conv1d(5, 3, 1))).double()
    x = torch.randn((2, 7, 4) if last else (2, 4, 7), dtype=torch.float64)
    y = torch.randint(0, 3, (2, 7))
    _, found = calibrated(model, [(x, y)])
    out = model(x).transpose(1, 2) if last else model(x)
    F.cross_entropy(out, y).backward()
    check_close(dict(found.gradients.mean), {n: p.grad for n, p in model.named_parameters()})


# ---------------------------------------------------------------- what is left behind
class Restless(nn.Module):
    """Counts its calls in a buffer and in an attribute, writes into its input, and has a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.a.bias.requires_grad_(False)
        self.norm.eval()
        self.fail = False

    def forward(self, x):
        self.calls += 1
        x.clamp_(max=0.5)
        if self.fail:
            raise RuntimeError("out of order")
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


def photograph(model):
    """Everything that must not change, to be compared bit for bit."""
    tensors = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {n: m.training for n, m in model.named_modules()}
    asks = {n: (p.requires_grad, None if p.grad is None else p.grad.clone(), id(p)) for n, p in model.named_parameters()}
    return tensors, flags, asks


def same(before, after):
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())
    assert before[1] == after[1]
    for n, (flag, grad, identity) in before[2].items():
        now_flag, now_grad, now_identity = after[2][n]
        assert (flag, identity) == (now_flag, now_identity), n
        assert (grad is None) == (now_grad is None) and (grad is None or torch.equal(grad, now_grad)), n


@pytest.mark.parametrize("name", [name for name in score.CRITERIA if name != "obs"])  # which `prune` computes
@pytest.mark.parametrize("wrong", ["", "labels", "nan", "shape", "model"])
def test_the_model_and_the_data_are_left_as_they_were(name, wrong):
    torch.manual_seed(0)
    model = Restless()
    model.a.weight.grad = torch.randn(6, 4)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    graph = trace(model, (x,))
    batches = [(x, y), (x.clone(), y)]
    if wrong:
        bad = {"labels": (x, y + 7), "nan": (x / 0, y), "shape": (x[:, :3], y), "model": (x, y)}[wrong]
        batches[1] = bad
    model.fail = wrong == "model"
    before, data_before = photograph(model), [t.clone() for b in batches for t in b]
    found = Calibration(model, graph, batches, args=(x,))
    if not wrong:
        score.score(graph, model, name, calibration=found)
    else:
        try:
            score.score(graph, model, name, calibration=found)
        except sc.SecateurError as error:
            assert "\n" in str(error), "what was found, and what to do about it"
            if wrong in ("nan", "shape"):
                assert "batch 2" in str(error) or name == "synflow"
        else:
            blind = score.CRITERIA[name].needs == "weights" or (wrong in ("labels", "model") and score.CRITERIA[name].needs == "inputs")
            assert blind and not (wrong == "model" and name == "synflow")
    same(before, photograph(model))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(data_before, (t for b in batches for t in b), strict=True))
    assert torch.is_grad_enabled()


def test_inside_no_grad_and_inference_mode_gradients_are_the_same():
    model, batches = made(Residual), data(Residual)
    graph, found = calibrated(model, batches)
    plain = found.gradients.mean
    with torch.no_grad():
        check_close(plain, Calibration(model, graph, batches, args=found.args).gradients.mean)
        assert not torch.is_grad_enabled()


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(("criterion", "word"), [("taylor", "labels"), ("wanda", "inputs")])
def test_without_data_the_message_says_what_is_missing(criterion, word):
    model = made(Residual)
    graph = trace(model, (data(Residual)[0][0],))
    with pytest.raises(InputError, match=f"{criterion}.*needs data, .*{word}(?s:.*)data="):
        score.score(graph, model, criterion)


def test_without_labels_the_message_says_what_to_give():
    model, inputs = made(Residual), [x for x, _ in data(Residual)]
    graph, found = calibrated(model, inputs, example=inputs[0])
    with pytest.raises(DataError, match=r"batch 1 .*no labels(?s:.*)loss="):
        score.score(graph, model, "taylor", calibration=found)


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_nan_is_traced_to_its_layer_and_batch(criterion):
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.b(torch.log(self.a(x))))

    torch.manual_seed(0)
    model = Log()
    with torch.no_grad():
        model.a.weight.fill_(1.0)
        model.a.bias.zero_()
    y = torch.zeros(2, dtype=torch.long)
    batches = [(torch.ones(2, 3), y), (torch.ones(2, 3), y), (-torch.ones(2, 3), y)]
    graph, found = calibrated(model, batches)
    with pytest.raises(DataError, match="batch 3 of data" + (".*8 of 8 activations.*'b'" if criterion == "wanda" else "")):
        score.score(graph, model, criterion, calibration=found)


def test_what_can_be_read_once_is_refused_before_it_is_read():
    model = made(Residual)
    once = iter(data(Residual))
    graph, found = calibrated(model, once, example=data(Residual)[0][0])
    with pytest.raises(DataError, match="once"):
        score.score(graph, model, "wanda", calibration=found)
    assert len(list(once)) == 3


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_no_batch_and_empty_batches_are_refused(criterion):
    model, example = made(Residual), data(Residual)[0][0]
    graph = trace(model, (example,))
    for batches, word in (([], "no batch"), ([(example[:0], torch.zeros(0, dtype=torch.long))], "no rows"), (["text"], "str")):
        with pytest.raises(DataError, match=word):
            score.score(graph, model, criterion, calibration=Calibration(model, graph, batches, args=(example,)))


def test_a_forward_that_depends_on_the_batch_is_refused():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) if len(x) == 2 else torch.tanh(self.a(x)))

    model = Moody()
    _, found = calibrated(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))], example=torch.randn(2, 3))
    with pytest.raises(DataError, match="other ops"):
        found.activations  # noqa: B018  # computed when looked at


# ---------------------------------------------------------------- prune
def test_prune_hands_the_data_to_the_criterion():
    model, batches = made(Residual), data(Residual)
    example = torch.ones(Residual.example, dtype=torch.float64)
    graph, found = calibrated(model, batches, example=example)
    for name in ("taylor", "wanda"):
        result = sc.prune(model, (example,), sc.MACs(at_most="60%"), data=batches, score=name)
        scores = score.score(graph, model, name, calibration=found)
        wanted = sc.plan(graph, scores, sc.MACs(at_most="60%"))
        assert all(torch.equal(mask, wanted.keep[n]) for n, mask in result.plan.keep.items())
        assert result.plan.why["score"] == name
    with pytest.raises(InputError, match="needs data"):
        sc.prune(model, (example,), sc.MACs(at_most="60%"), score="taylor")


def test_prune_takes_a_loss():
    model, inputs = made(Residual), [x for x, _ in data(Residual)]
    calls = []

    def loss(outputs, batch):
        calls.append(batch)
        return outputs.logsumexp(1).mean()

    sc.prune(model, (inputs[0],), sc.MACs(at_most="60%"), data=inputs, score="taylor", loss=loss)
    assert len(calls) == len(inputs)
