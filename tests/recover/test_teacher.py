"""What is asked of the outputs: the distance to a teacher, and the loss against labels of every form."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError
from secateur.models.data import Batches
from secateur.recover import Training, recover
from secateur.recover import loss as losses
from secateur.recover.validate import validated
from tests.recover.nets import net, rows


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


def test_soft_labels_with_a_loss_of_ones_own_are_no_numbers():
    """The teacher's part of the loss is then that of class scores, as it is with class numbers."""
    given = rows()
    soft = Batches(given.inputs, F.one_hot(given.labels, 4).float() * 0.6 + 0.1, 32)
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


def test_classes_of_images_are_their_second_dimension_also_where_sizes_agree():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 5, 5, 5), torch.randint(0, 5, (2, 5, 5))
    assert torch.equal(losses.task_loss(scores, labels), F.cross_entropy(scores, labels))
    words, next_words = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    assert torch.equal(losses.task_loss(words, next_words), F.cross_entropy(words.flatten(0, 1), next_words.flatten()))


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


def agreeing(form, **more):
    """The share of decisions that a student makes as its teacher does, before and after it was taught. They begin with other biases, which a distance
    over another dimension than that of the classes does not see."""
    torch.manual_seed(0)
    dims = form.count("L")
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    teacher = nn.Sequential(layer(1, 4, 3, padding=1), Last() if form.endswith("C") else nn.Identity())
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].bias += torch.tensor([3.0, 0, 0, 0])
    x = torch.randn(64, 1, *[6] * dims)
    dim = -1 if form.endswith("C") else 1
    with torch.no_grad():
        wanted = teacher(x).argmax(dim)
        before = float((student(x).argmax(dim) == wanted).float().mean())
        recover(student, Batches(x, wanted if more.pop("labels") else None, 16), Training(epochs=30, lr=0.1, distil=1.0), teacher=teacher, **more)
        return before, float((student(x).argmax(dim) == wanted).float().mean())


class Last(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


@pytest.mark.parametrize("loss", [None, losses.task_loss])
@pytest.mark.parametrize("form", ["NCL", "NLC", "NCLL", "NLLC", "NCLLL", "NLLLC"])
def test_classes_are_where_the_labels_leave_them(form, loss):
    before, after = agreeing(form, labels=True, loss=loss)
    assert before < 0.5 and after > 0.9


@pytest.mark.parametrize("form", ["NLC", "NCLL", "NCLLL"])
def test_without_labels_classes_are_last_or_those_of_images(form):
    before, after = agreeing(form, labels=False)
    assert before < 0.5 and after > 0.9


@pytest.mark.parametrize(("form", "labels"), [("NCL", False), ("NLC", False), ("NCL", True), ("NCLL", False)])
def test_that_the_classes_were_guessed_is_said(form, labels):
    net, x = (nn.Conv1d if form != "NCLL" else nn.Conv2d)(1, 4, 3, padding=1), torch.randn(8, 1, *[6] * form.count("L"))
    net = nn.Sequential(net, Last()) if form == "NLC" else net
    done = recover(copy.deepcopy(net), Batches(x, net(x).argmax(1) if labels else None, 4), Training(epochs=1), teacher=net)
    assert done.notes == ([losses.GUESSED] if form != "NCLL" and not labels else [])


@pytest.mark.parametrize("labels", ["numbers", "shares"])
def test_numbers_and_shares_of_classes_are_told_apart_with_a_loss_of_ones_own(labels):
    torch.manual_seed(0)
    teacher = nn.Linear(4, 3)
    student, x = copy.deepcopy(teacher), torch.randn(128, 4)
    with torch.no_grad():
        student.bias += 5  # of all outputs alike: shares do not change
    given = teacher(x).detach() if labels == "numbers" else torch.softmax(teacher(x).detach(), 1)
    recover(student, Batches(x, given, 32), Training(epochs=30, lr=0.2, distil=1.0), teacher=teacher, loss=nn.SmoothL1Loss())
    apart = float((student(x) - teacher(x)).square().mean())
    assert apart < 2 if labels == "numbers" else apart > 20


def test_rows_whose_label_does_not_count_are_not_measured():
    model, given = net(dropout=0.0).eval(), rows(60, size=20)
    full = validated(list(given), lambda parts: _own(model, parts), model)
    some = [(x, torch.where(torch.arange(len(y)) < 5, y, losses.IGNORED)) for x, y in given]
    found = validated([*some, (given.inputs, torch.full((60,), losses.IGNORED))], lambda parts: _own(model, parts), model)
    first = Batches(torch.cat([x[:5] for x, _ in some]), torch.cat([y[:5] for _, y in some]), 15)
    assert found == pytest.approx(validated(list(first), lambda parts: _own(model, parts), model)) and found != full
    uneven = [(x, torch.where(torch.arange(len(y)) < (5 if k else 20), y, losses.IGNORED)) for k, (x, y) in enumerate(given)]
    kept = [(x[y != losses.IGNORED], y[y != losses.IGNORED]) for x, y in uneven]
    assert validated(uneven, lambda parts: _own(model, parts), model) == pytest.approx(validated(kept, lambda parts: _own(model, parts), model))
    with pytest.raises(DataError, match="no row with a label"):
        validated([(given.inputs, torch.full((60,), losses.IGNORED))], lambda parts: _own(model, parts), model)


def _own(model, parts):
    with torch.no_grad():
        scores = model(*parts[0])
    return losses.task_loss(scores, parts[2]), scores


def test_a_batch_whose_labels_do_not_count_teaches_nothing():
    given = rows(64)
    for part in (slice(32, 64), slice(0, 32)):
        labels = given.labels.clone()
        labels[part] = losses.IGNORED
        batches = [(given.inputs[:32], labels[:32]), (given.inputs[32:], labels[32:])]
        model = net(dropout=0.0)
        recover(model, batches, Training(epochs=1, lr=0.05))
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_whether_the_first_label_of_a_sequence_counts():
    scores = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    batch = {"labels": torch.randint(0, 7, (2, 5))}

    def causal(batch):
        return {"loss": F.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())}

    def each(batch):
        return {"loss": F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())}

    assert not losses.first_counts(batch, causal) and losses.first_counts(batch, each)
    assert losses.first_counts({"labels": torch.zeros(2, 1).long()}, causal) and losses.first_counts((1, 2), causal)
    some = {"labels": torch.tensor([[3, losses.IGNORED, 1], [losses.IGNORED, 2, 2]])}
    assert losses.counted(some) == 4 and losses.counted(some, first=False) == 3
    assert losses.counted({"labels": torch.zeros(6, 1).long()}) == 6
