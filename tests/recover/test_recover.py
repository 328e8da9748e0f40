"""Training back: zeros stay, runs go on as if never stopped, what is not finite is caught, teachers teach."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import DataError, FormatError, InputError, TrainingError
from secateur.job import Cast
from secateur.models.data import Batches
from secateur.models.folder import read, save_trained
from secateur.models.returned import Told
from secateur.pack.archive import is_deflated
from secateur.recover import Training, recover
from secateur.recover import loss as losses
from secateur.recover.checkpoint import FILE, state_of
from secateur.recover.order import Order, part_of
from secateur.recover.validate import validated


class Net(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 4)])
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.layers[1](self.drop(torch.relu(self.layers[0](x))))


def rows(n=90, size=32, seed=0):
    """Four classes of noisy stripes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=g)
    waves = torch.stack([torch.sin(torch.arange(8) * (k + 1) * 0.7) for k in range(4)])
    return Batches(waves[labels][:, None, None, :] + 0.3 * torch.randn(n, 1, 8, 8, generator=g), labels, size)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def masked(model, x):
    return sc.sparsify(model.eval(), (x,), sc.Sparse(keep="30%", by="magnitude", refit=False))


HOWS = {
    "lora": Training(epochs=3, train="lora", lr=0.02, rank=2),
    "sgd": Training(epochs=3, lr=0.05), "adamw": Training(epochs=3, optimizer="adamw", lr=0.01), "average": Training(epochs=3, ema=0.9),
    "bfloat16": Training(epochs=2, precision="bfloat16", lr=0.05), "moved": Training(epochs=2, augment="flip_crop", channels_last=True),
    "boxed": Training(epochs=2, cutmix=0.5, lr=0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", HOWS)
def test_it_learns_and_its_zeros_stay(name):
    result = masked(net(), rows().inputs[:2])
    gone = {n: ~m for n, m in result.plan.weights.items()}
    before = copy.deepcopy(result.model.state_dict())
    done = recover(result.model, rows(), HOWS[name], plan=result.plan, valid=rows(40, seed=1))
    losses_seen = [row["loss"] for row in done.history]
    assert losses_seen[-1] < losses_seen[0] and len(losses_seen) == HOWS[name].epochs
    assert all(0 <= row["valid"] <= 1 for row in done.history)
    state = dict(done.model.named_parameters())
    assert any(bool(m.any()) for m in gone.values())
    for n, m in gone.items():
        assert not state[n][m].any() and not torch.equal(state[n], before[n])
    assert not done.model.training  # as it was given


def interrupted(model, how, folder, at, **more):
    """Stopped by an error of the data after `at` batches, again and again until it is through."""

    class Failing(nn.Module):
        pass

    class Loader:
        def __init__(self):
            self.left = at

        def __len__(self):
            return len(rows())

        def __iter__(self):
            for batch in rows():
                self.left -= 1
                if self.left < 0:
                    raise OSError("the disk is gone")
                yield batch

    for _ in range(100):
        try:
            return recover(copy.deepcopy(model), Loader(), how, folder=folder, **more)
        except DataError as error:
            assert "the disk is gone" in str(error) and str(folder) in str(error)
    raise AssertionError


@pytest.mark.parametrize("how", [Training(epochs=2.5), Training(epochs=2, ema=0.8, optimizer="adamw", lr=0.01)])
def test_a_run_that_is_stopped_again_and_again_is_the_same_to_the_bit(how, tmp_path):
    whole = recover(net(), list(rows()), how)
    parts = interrupted(net(), how, tmp_path / "run", at=4)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [{k: r[k] for k in ("epoch", "step", "lr", "loss")} for r in whole.history] == [
        {k: r[k] for k in ("epoch", "step", "lr", "loss")} for r in parts.history
    ]


def test_a_run_that_is_through_is_not_begun_again(tmp_path):
    how = Training(epochs=1)
    check_through(how, tmp_path)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_whose_average_came_back_is_not_begun_again(train, tmp_path):
    check_through(Training(epochs=1, ema=0.9, train=train), tmp_path)


def check_through(how, tmp_path):
    first = recover(net(), rows(), how, folder=tmp_path)
    seen = []
    for given in (net(), first.model):  # what it began with, or what came of it
        again = recover(given, rows(), how, folder=tmp_path, progress=lambda *a: seen.append(a))
        assert not seen and all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    recover(net(), rows(), Training(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match="epochs was 1"):
        recover(net(), rows(), Training(epochs=2), folder=tmp_path)
    wide = net()
    wide.layers = nn.ModuleList([nn.Linear(8, 17), nn.Linear(17, 4)])
    for other in (wide, net(1)):
        with pytest.raises(InputError, match="other weights"):
            recover(other, rows(), Training(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match="teacher was None"):
        recover(net(), rows(), Training(epochs=1), folder=tmp_path, teacher=net(2))
    with pytest.raises(InputError, match="zeros was None"):
        recover(net(), rows(), Training(epochs=1), folder=tmp_path, plan=masked(net(), rows().inputs[:2]).plan)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match="cannot be read"):
        recover(net(), rows(), Training(epochs=1), folder=tmp_path)


def test_what_was_stopped_while_it_was_measured_is_measured(tmp_path):
    class Killed(BaseException):
        pass

    class Valid:
        left = 1

        def __iter__(self):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return iter(rows(40, seed=1))

    how = Training(epochs=2, ema=0.5)
    whole = recover(net(), rows(), how, valid=rows(40, seed=1))
    with pytest.raises(Killed):
        recover(net(), rows(), how, valid=Valid(), folder=tmp_path)  # after the last step
    told = []
    parts = recover(net(), rows(), how, valid=rows(40, seed=1), folder=tmp_path, watch=lambda history, steps: told.append(history))
    assert [{**a, "seconds": 0} for a in whole.history] == [{**b, "seconds": 0} for b in parts.history] and told == [parts.history]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_masked_weights_that_are_frozen_need_no_holding():
    result = masked(net(), rows().inputs[:2])
    for name in result.plan.weights:
        result.model.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(result.model.state_dict())
    recover(result.model, rows(), Training(epochs=1), plan=result.plan)
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    assert "layers.1.bias" in moved and not moved & result.plan.weights.keys()


class Bomb(nn.Module):
    """Infinite from the third call in training on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * float("inf") if self.calls > 4 else x


def test_what_is_not_finite_is_named_and_the_last_good_state_comes_back():
    model = net(dropout=0.0)
    model.drop = Bomb()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"(?s)step 4 of .*layer 'drop'"):
        recover(model, rows(), Training(epochs=5))
    state = model.state_dict()
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
    assert not torch.equal(state["conv.weight"], before["conv.weight"])  # of the first epoch's end: three steps in
    assert model.drop.calls > 4


class Noisy(torch.utils.data.Dataset):
    """Rows with noise that is drawn as they are asked for."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        x, y = rows(60).inputs[i], rows(60).labels[i]
        return x + torch.randn_like(x), y


@pytest.mark.parametrize("own", [False, True, "workers"])
def test_a_loader_that_shuffles_and_draws_is_resumed_to_the_bit(own, tmp_path):
    class Stop(Exception):
        pass

    def loader():
        if own == "workers":  # which live longer than an epoch
            return torch.utils.data.DataLoader(Noisy(), 16, shuffle=True, num_workers=1, persistent_workers=True)
        generator = torch.Generator().manual_seed(7) if own else None
        return torch.utils.data.DataLoader(Noisy(), 16, shuffle=True, generator=generator)

    def stopping(at):
        def progress(step, steps, loss):
            if step == at:
                raise Stop

        return progress

    how = Training(epochs=3, every=0.0)
    whole = recover(net(), loader(), how)
    for at in (3, 6, 10):
        with pytest.raises(Stop):
            recover(net(), loader(), how, folder=tmp_path, progress=stopping(at))
    parts = recover(net(), loader(), how, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True))


def test_weights_that_were_there_under_the_mask_do_not_come_back():
    plan = masked(net(), rows().inputs[:2]).plan
    for how in (Training(epochs=1, ema=0.9), Training(epochs=1)):
        done = recover(net(), rows(), how, plan=plan)  # the dense model, none of its weights zero yet
        assert not any(done.model.get_parameter(n)[~m].any() for n, m in plan.weights.items())
    with pytest.raises(TrainingError):
        bad = net()
        recover(bad, rows(), Training(epochs=1), plan=plan, loss=lambda output, labels: output.sum() * float("nan"))
    assert not any(bad.get_parameter(n)[~m].any() for n, m in plan.weights.items())


def test_nothing_else_is_changed(tmp_path):
    model, teacher = net().eval(), net(1)
    state = torch.get_rng_state()
    wrong = [(rows(4).inputs, torch.tensor([9, 9, 9, 9]))]
    with pytest.raises(DataError):
        recover(model, rows(), Training(epochs=2, ema=0.5, channels_last=True), valid=wrong, teacher=teacher, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and teacher.training and not model.training
    assert model.conv.weight.is_contiguous() and all(p.grad is None for p in model.parameters()) and (tmp_path / FILE).exists()
    kept = torch.load(tmp_path / FILE, weights_only=True)["model"]
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())  # the weights, not their average


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.own, self.slow = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, momentum=None)
        self.drop, self.b = nn.Dropout(0.5, inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.drop(self.slow(self.own(self.a(x))).mean((2, 3))))


def test_graphs_train_and_rest():
    from secateur.recover import modes

    torch.manual_seed(0)
    x = rows(32).inputs
    graph = torch.export.export(Odd().eval(), (x,)).module()
    before, was = graph.get_buffer("slow.running_mean").clone(), str(graph.graph)
    with torch.no_grad():
        rest = graph(x)
        with modes.training(graph) as mode:
            first, second = graph(x), graph(x)
            assert not torch.equal(graph.get_buffer("slow.running_mean"), before)
            with mode.rest():
                assert torch.equal(graph(x), graph(x))
            assert torch.isfinite(first).all() and str(graph.graph) != was
    assert str(graph.graph) == was and rest.shape == second.shape
    done = recover(graph, rows(64), Training(epochs=1, lr=0.01), valid=rows(64, seed=1))
    assert len(done.history) == 1 and str(graph.graph) == was


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    def loss(output, labels):
        return F.cross_entropy(output, labels) + (output - output.detach()).sqrt().sum()  # its derivative is infinite at 0

    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="gradient"):
        recover(model, rows(), Training(epochs=1), loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_teacher_alone_teaches():
    teacher = recover(net(), rows(400), Training(epochs=12, lr=0.1)).model.eval()
    weights = copy.deepcopy(teacher.state_dict())
    student = net(3)
    x = rows(400, seed=5).inputs

    def apart(model):
        model.eval()
        with torch.no_grad():
            return float(losses.distance(model(x), teacher(x), 4.0))

    before = apart(student)
    recover(student, Batches(x, None, 32), Training(epochs=8, lr=0.1), teacher=teacher)
    assert apart(student) < 0.3 * before
    assert all(torch.equal(a, weights[n]) for n, a in teacher.state_dict().items())
    with pytest.raises(DataError, match="no teacher"):
        recover(net(), Batches(x, None, 32), Training(epochs=1))


def test_a_teacher_of_other_outputs_is_refused():
    for outputs in (1, 7):  # one would be spread over all classes
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
        with pytest.raises(DataError, match=rf"\(32, 4\) and the teacher \(32, {outputs}\)"):
            recover(net(), rows(), Training(epochs=1), teacher=teacher)


def test_a_teacher_is_at_rest_and_afterwards_as_it_was():
    teacher = net(1).eval()
    shapes = ({0: torch.export.Dim.AUTO},)
    graph = torch.export.export(teacher, (rows().inputs[:4],), dynamic_shapes=shapes).module()  # refuses eval()
    teacher.drop.train()
    ours, theirs = (recover(net(), rows(), Training(epochs=1), teacher=t).history[0]["loss"] for t in (teacher, graph))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert teacher.drop.training and not teacher.training and not teacher.norm.training


class Tripling(nn.Module):
    """Three times its inputs go through, written over them or not."""

    def __init__(self, inside, seed=0):
        super().__init__()
        self.net, self.inside = net(seed, dropout=0.0), inside

    def forward(self, x):
        return self.net(x.mul_(3.0) if self.inside else x * 3.0)


def test_a_teacher_sees_the_inputs_though_the_model_writes_over_them():
    told = [recover(Tripling(inside), rows(), Training(epochs=1), teacher=Tripling(inside, 1)).history[0]["loss"] for inside in (False, True)]
    assert told[0] == told[1]


def test_inputs_have_the_dtype_of_each_model():
    how = Training(epochs=1, features=0.1)
    fine = recover(net(dropout=0.0), rows(), how, teacher=net(1)).history[0]["loss"]
    coarse = recover(net(dropout=0.0).bfloat16(), rows(), how, teacher=net(1), valid=rows(40, seed=1))
    assert coarse.model.conv.weight.dtype == torch.bfloat16 and coarse.history[0]["loss"] == pytest.approx(fine, rel=0.05)
    assert recover(net(dropout=0.0), rows(), how, teacher=net(1).bfloat16()).history[0]["loss"] == pytest.approx(fine, rel=0.05)


def test_inner_outputs_are_matched_by_name_and_shape():
    teacher, student = net(), net(1)
    student.layers[0], student.layers[1] = nn.Linear(8, 16), nn.Linear(16, 4)
    x = rows().inputs[:1]
    assert losses.matched(student, teacher, lambda m: m(x)) == ["layers.0", "layers.1"]
    student.layers[0], student.layers[1] = nn.Linear(8, 12), nn.Linear(12, 4)
    assert losses.matched(student.eval(), teacher.eval(), lambda m: m(x)) == ["layers.1"]
    done = recover(student, rows(), Training(epochs=1, features=1.0), teacher=teacher)
    assert done.notes == [] and math.isfinite(done.history[0]["loss"])


def test_the_distance_to_a_teacher_is_its_formula():
    torch.manual_seed(0)
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for row in range(5):
        p = [math.exp(v / 3) for v in t[row].tolist()]
        q = [math.exp(v / 3) for v in s[row].tolist()]
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(losses.distance(s, t, 3.0)) == pytest.approx(9 * total / 5, rel=1e-5)
    assert float(losses.distance(t, t, 3.0)) == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_numbers_is_learned_by_squared_error():
    torch.manual_seed(0)
    for shape in ((6,), (6, 1), (6, 1, 4, 4)):  # of which a softmax would be 1
        s, t = torch.randn(shape), torch.randn(shape)
        assert float(losses.distance(s, t, 4.0)) == pytest.approx(float((s - t).square().mean()))
    s, t = torch.randn(6, 3), torch.randn(6, 3)
    assert float(losses.distance(s, t, 4.0, torch.randn(6, 3))) == pytest.approx(float((s - t).square().mean()))
    assert float(losses.distance(s, t, 4.0, torch.tensor([0, 1, 2, 0, 1, 2]))) == float(losses.distance(s, t, 4.0))

    x, teacher, student = torch.randn(64, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    apart = [float((student(x) - teacher(x)).square().mean())]
    recover(student, Batches(x, None, 16), Training(epochs=20, lr=0.05), teacher=teacher)
    apart.append(float((student(x) - teacher(x)).square().mean()))
    assert apart[1] < 0.05 * apart[0]


def test_norms_and_biases_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    recover(model, rows(), Training(epochs=1, train="norms", lr=0.1))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    moved.discard("conv.bias")  # the norm behind it takes its effect away
    assert moved == {"norm.weight", "norm.bias", "layers.0.bias", "layers.1.bias"}


BAD = [{"epochs": -1}, {"optimizer": "adagrad"}, {"ema": 1.0}, {"lr": float("nan")}, {"batch": 0}, {"batch": 2.5}, {"distil": 2}, {"clip": 0}]


@pytest.mark.parametrize("bad", BAD)
def test_choices_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Training(**bad)


def test_data_that_fails_at_once_is_named():
    def reading():
        raise OSError("the disk is gone")

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            yield reading()

    with pytest.raises(DataError, match="first batch: OSError: the disk is gone"):
        recover(net(), Loader(), Training(epochs=1))


def test_it_trains_where_gradients_are_off():
    with torch.no_grad():
        found = recover(net(), rows(), Training(epochs=1))
        assert not torch.is_grad_enabled()
    whole = recover(net(), rows(), Training(epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), whole.model.parameters(), strict=True))


def test_data_that_does_not_fit_is_refused():
    wrong = {
        "empty": [], "an iterator": iter(rows()), "three parts": [(torch.randn(2, 1, 8, 8), torch.zeros(2).long(), 1)],
        "too many labels": [(torch.randn(2, 1, 8, 8), torch.zeros(3).long())], "no tensors": [("a", "b")],
    }  # fmt: skip
    for data in wrong.values():
        with pytest.raises(DataError):
            recover(net(), data, Training(epochs=1))
    with pytest.raises(DataError, match="batch"):
        recover(net(), list(rows()), Training(epochs=1, batch=8))


class Flat(nn.Module):
    """A batch norm of rows alone."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x.flatten(1))))


@pytest.mark.parametrize("captured", [False, True])
def test_a_batch_of_one_row_does_not_spoil_the_statistics(captured):
    torch.manual_seed(0)
    model = Flat()
    if captured:  # its operators make NaN of one row, and say nothing
        shapes = ({0: torch.export.Dim.AUTO},)
        model = torch.export.export(model.eval(), (rows().inputs[:4],), dynamic_shapes=shapes).module()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"(?s)step 2 .*another batch size"):
        recover(model, rows(65, 32), Training(epochs=2))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    recover(model, rows(65, 33), Training(epochs=2))
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


def test_a_batch_that_does_not_fit_is_named_and_moves_nothing():
    model, given = net(), rows()
    before = copy.deepcopy(model.state_dict())
    last = Batches(given.inputs, torch.where(torch.arange(90) < 89, given.labels, 4), 32)
    with pytest.raises(DataError, match=r"(?s)step [012] does not fit: .*out of bounds\.\n"):
        recover(model, last, Training(epochs=1))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # the statistics too, which were measured before the loss
    with pytest.raises(DataError, match="gives a dict"):
        losses.task_loss({"words": given.inputs}, given.labels)


@pytest.mark.parametrize("error", [InputError("no such class.\n  Give another."), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_says_enough_is_raised_as_it_is_and_moves_nothing(error):
    def loss(output, labels):
        raise error

    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as said:
        recover(model, rows(), Training(epochs=1), loss=loss)
    assert said.value is error and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    taught = net()
    with pytest.raises(type(error)) as said:
        validated([(rows().inputs, rows().labels)], lambda parts: loss(*parts[:2]), taught)
    assert said.value is error
    with pytest.raises(DataError, match=r"validation data does not fit: \.\n"):  # an error without a word
        validated([(rows().inputs, rows().labels)], lambda parts: silent(), taught)


def silent():
    raise ValueError


def test_soft_labels_with_a_loss_of_ones_own_are_no_numbers():
    """The teacher's part of the loss is then that of class scores, as it is with class numbers."""
    given = rows()
    soft = Batches(given.inputs, F.one_hot(given.labels, 4).float() * 0.8 + 0.1, 32)
    students = []
    for data, loss in ((given, None), (soft, lambda output, labels: F.cross_entropy(output, labels))):
        students.append(net())
        recover(students[-1], data, Training(epochs=1, distil=1.0), teacher=net(2), loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


def test_class_numbers_are_whole_numbers_of_any_kind():
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    for kind in (torch.uint8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(losses.task_loss(scores, labels.to(kind)), F.cross_entropy(scores, labels))


def test_the_rate_rises_and_falls():
    how = Training(warmup=0.1)
    rates = [how.at(i, 100) for i in range(100)]
    assert rates[0] < rates[5] < rates[10] == pytest.approx(1.0) and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Training().rate(net(), 256) == pytest.approx(0.04) and Training(lr=0.3).rate(net(), 256) == 0.3
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    graph = torch.export.export(convolutional, (torch.randn(2, 3, 8, 8),)).module()
    assert Training().kind(convolutional) == Training().kind(graph) == "sgd"
    assert Training().kind(nn.Linear(2, 2)) == "adamw"


def test_every_row_comes_once_in_an_epoch_in_an_order_of_its_own():
    data = rows(50, 8)
    orders = []
    for epoch in range(3):
        xs = torch.cat([x for x, _ in Order(data, None, 3).epoch(epoch)])
        assert torch.equal(xs.flatten(1).sort(0).values, data.inputs.flatten(1).sort(0).values)
        orders.append(xs)
        tail = torch.cat([x for x, _ in Order(data, None, 3).epoch(epoch, 2)])
        assert torch.equal(tail, xs[16:])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    parts = [part_of(next(Order(data, None, 3).epoch(0)), r, 3)[0] for r in range(3)]
    assert torch.equal(torch.cat(parts), orders[0][:8]) and {len(p) for p in parts} == {2, 3}


def test_epochs_of_a_run_have_orders_of_their_own():
    seen = []

    def loss(output, labels):
        seen.append(labels.clone())
        return F.cross_entropy(output, labels)

    recover(net(), rows(), Training(epochs=2), loss=loss)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    how, held = Training(epochs=1), list(rows())
    recover(net(), rows(), how, folder=tmp_path)
    recover(net(), rows(), how, folder=tmp_path)
    with pytest.raises(InputError, match="data was '3 batches of"):
        recover(net(), rows(seed=1), how, folder=tmp_path)
    recover(net(), held, how, folder=tmp_path / "list")
    recover(net(), list(rows(seed=1)), how, folder=tmp_path / "list")  # its values may be drawn at random: only their form is compared
    with pytest.raises(InputError, match="data was"):
        recover(net(), [(x[..., :4], y) for x, y in held], how, folder=tmp_path / "list")


def test_a_loader_with_a_generator_of_its_own_is_in_the_same_order_within_what_names_its_errors():
    data = torch.utils.data.TensorDataset(torch.arange(20.0))
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(9))
    orders = [Order(around, None, 0) for around in (loader, Told("data", loader), Cast(nn.Linear(1, 1), Told("data", loader)))]
    found = [[batch[0].tolist() for batch in order.epoch(0)] for order in orders for _ in range(2)]
    assert all(one == found[0] for one in found) and found[0] != sorted(found[0])


def test_classes_of_images_are_their_second_dimension_also_where_sizes_agree():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 5, 5, 5), torch.randint(0, 5, (2, 5, 5))
    assert torch.equal(losses.task_loss(scores, labels), F.cross_entropy(scores, labels))
    words, next_words = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    assert torch.equal(losses.task_loss(words, next_words), F.cross_entropy(words.flatten(0, 1), next_words.flatten()))


def test_a_folder_is_not_written_with_weights_under_its_mask(tmp_path):
    result = masked(net(), rows().inputs[:2])
    saved = read(sc.save(result, tmp_path / "out"))
    state = state_of(result.model)
    state["layers.0.weight"] += 1.0
    with pytest.raises(FormatError, match=r"layers.0.weight: \d+ weights that the plan removed are not zero"):
        save_trained(saved, state, tmp_path / "to", {})
    with pytest.raises(FormatError, match="is not in the model as it was"):
        save_trained(saved, {n: t.bfloat16() for n, t in state_of(result.model).items()}, tmp_path / "to", {})
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("entropy", [True, False])
def test_a_folder_is_written_as_it_was_saved(entropy, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    result = sc.sparsify(model, (torch.randn(2, 256),), sc.Sparse(keep="5%", by="magnitude", refit=False))
    saved = read(sc.save(result, tmp_path / "out", entropy=entropy))
    done = save_trained(saved, state_of(result.model), tmp_path / "to", {})
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", done)]
    assert [is_deflated(f) for f in files] == [entropy, entropy] and files[0].stat().st_size == files[1].stat().st_size


def test_every_epoch_is_told_and_measured():
    told, valid = [], rows(40, seed=1)
    done = recover(net(dropout=0.0), rows(), Training(epochs=2.5), valid=valid, watch=lambda history, steps: told.append((history, steps)))
    assert [len(history) for history, _ in told] == [0, 1, 2, 3] and {steps for _, steps in told} == {8}
    assert told[-1][0] == done.history and told[1][0] == done.history[:1]
    model = done.model.eval()
    with torch.no_grad():
        scores = model(valid.inputs)
    assert done.history[-1]["valid_loss"] == pytest.approx(float(F.cross_entropy(scores, valid.labels)), rel=1e-5)
    assert done.history[-1]["valid"] == pytest.approx(float((scores.argmax(1) == valid.labels).float().mean()))


def test_validation_data_without_labels_is_measured_against_the_teacher():
    teacher, valid = net(1), Batches(rows(40, seed=1).inputs, None, 16)
    done = recover(net(dropout=0.0), rows(), Training(epochs=1, distil=1.0), valid=valid, teacher=teacher)
    with torch.no_grad():
        wanted = losses.distance(done.model.eval()(valid.inputs), teacher.eval()(valid.inputs), 4.0)
    assert done.history[0]["valid_loss"] == pytest.approx(float(wanted), rel=1e-5) and "valid" not in done.history[0]
    nothing = torch.full((40, 4), float("nan"))  # is not right, though the largest of it would be class 0
    labels = torch.zeros(40).long()
    found = validated([(valid.inputs, labels)], lambda parts: (nothing.sum(), nothing), teacher)
    assert found["valid"] == 0 and math.isnan(found["valid_loss"])
    with pytest.raises(DataError, match="validation data is empty"):
        recover(net(), rows(), Training(epochs=1), valid=[])
