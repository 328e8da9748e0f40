"""What a step makes of images, and of what a teacher gives to them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError, InputError
from secateur.models.data import Batches
from secateur.recover import Training, recover
from secateur.recover import loss as losses
from secateur.recover.checkpoint import digest, state_of
from secateur.recover.images import augmented, boxed, shown
from tests.recover.nets import net, rows


def test_augmented_images_are_moved_ones():
    torch.manual_seed(0)
    x = torch.rand(40, 2, 8, 8) + 1
    flipped = augmented(x, "flip", 1)
    same, turned = ((flipped == v).flatten(1).all(1) for v in (x, x.flip(-1)))
    assert bool((same | turned).all()) and 5 < int(same.sum()) < 35
    moved, padded = augmented(x, "flip_crop", 1), F.pad(x, (1, 1, 1, 1))
    for i in range(40):
        options = [p[:, a : a + 8, b : b + 8] for p in (padded[i], padded[i].flip(-1)) for a in range(3) for b in range(3)]
        assert any(torch.equal(moved[i], o) for o in options)
    assert torch.equal(augmented(x, "flip_crop", 1), moved) and torch.equal(augmented(x, "none", 1), x)


def test_a_box_of_every_image_shows_the_image_at_the_other_end():
    x, areas, none = torch.rand(7, 3, 12, 20), [], 0
    for seed in range(600):
        found, part = boxed(x, 0.7, seed)
        other = (found != x).any(1)[torch.arange(7) != 3]  # the one in the middle is its own partner
        none += part == 1
        assert torch.equal(found[3], x[3]) and bool((other == other[:1]).all())
        high, wide = other[0].any(1), other[0].any(0)
        assert torch.equal(other[0], high[:, None] & wide[None, :])  # a box: as many rows and columns as its corners span
        assert all(not ends.any() or int(ends.sum()) == int(ends.nonzero().max() - ends.nonzero().min()) + 1 for ends in (high, wide))
        assert torch.equal(found, torch.where(other[:1, None], x.flip(0), x)) and part == pytest.approx(1 - float(other[0].float().mean()))
        areas += [1 - part] if part < 1 else []
    assert 140 < none < 240  # 0.3 of 600, and a few boxes of no width
    assert 0.28 < sum(areas) / len(areas) < 0.37  # 0.5 - 0.2 + 1/48 of the image, by integration over areas and middles


def test_labels_count_by_area():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    soft = 0.3 * F.one_hot(labels, 4).float() + 0.7 * F.one_hot(labels.flip(0), 4).float()
    assert float(losses.of_both(losses.task_loss, scores, labels, 0.3)) == pytest.approx(float(F.cross_entropy(scores, soft)), rel=1e-5)
    assert float(losses.of_both(losses.task_loss, scores, labels, 1.0)) == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-6)
    assert losses.of_both(lambda output, _: output.sum(), scores, None, 0.3) == scores.sum()


class Seen(nn.Module):
    """A classifier of 16 pixels that is told apart left from right, and what it was shown. `spoils`: it writes into its inputs."""

    def __init__(self, seed, spoils=False):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.shown, self.spoils = nn.Linear(16, 4), [], spoils

    def forward(self, x):
        self.shown.append(x.clone())
        scores = self.layer(x.flatten(1))
        if self.spoils:
            x.mul_(3)
        return scores


def test_the_teacher_sees_what_the_model_sees_and_its_mirror_image():
    data, seen = Batches(torch.randn(40, 1, 4, 4), torch.randint(0, 4, (40,)), 10), []
    model, teacher = Seen(0), Seen(1, spoils=True)
    how = Training(epochs=1, lr=0.0, distil=1.0, cutmix=0.6, mirror=True, augment="flip", temperature=2)
    recover(model, data, how, teacher=teacher, progress=lambda step, steps, loss: seen.append(loss))
    shown, taught, turned = model.shown[:], teacher.shown[0::2], teacher.shown[1::2]
    assert len(seen) == len(shown) == len(taught) == len(turned) == 4
    for x, same, mirror, loss in zip(shown, taught, turned, seen, strict=True):
        assert torch.equal(x, same) and torch.equal(mirror, x.flip(-1))
        target = (teacher(x.clone()) + teacher(x.flip(-1))) / 2
        far = 4 * F.kl_div((model(x) / 2).log_softmax(1), (target / 2).softmax(1), reduction="batchmean")
        assert loss == pytest.approx(float(far.detach()), rel=1e-4)


def test_the_labels_of_a_box_count_in_training():
    """Every image is filled with its own number, which is its label too."""
    numbers, seen, asked = torch.arange(40), [], []
    data = Batches((numbers + 1.0).view(-1, 1, 1, 1).expand(40, 1, 4, 4).clone(), numbers, 10)

    def loss(output, labels):
        asked.append(labels)
        return output.sum() * 0 + (labels * torch.arange(10.0)).sum()

    recover(model := Seen(0), data, Training(epochs=1, lr=0.0, cutmix=0.8), loss=loss, progress=lambda step, steps, loss: seen.append(loss))
    mixtures = 0
    for x, value in zip(model.shown, seen, strict=True):
        own = asked.pop(0)
        part = float((x == own.view(-1, 1, 1, 1) + 1).float().mean())
        if part < 1:
            assert torch.equal(asked.pop(0), own.flip(0))
            mixtures += 1
        assert value == pytest.approx(part * float(loss(x, own)) + (1 - part) * float(loss(x, own.flip(0))), rel=1e-5)
        del asked[-2:]
    assert mixtures and not asked


def test_a_run_that_is_stopped_shows_the_same_boxes(tmp_path):
    how, stop = Training(epochs=2, cutmix=0.8, mirror=True, lr=0.05, every=0), 0

    def stopping(step, steps, loss):
        if step == stop:
            raise KeyboardInterrupt

    whole = recover(net(), rows(), how, teacher=net(1))
    for at in (2, 4):
        stop = at
        with pytest.raises(KeyboardInterrupt):
            recover(net(), rows(), how, teacher=net(1), folder=tmp_path, progress=stopping)
    stop = -1
    again = recover(net(), rows(), how, teacher=net(1), folder=tmp_path, progress=stopping)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True))


MAPS, LINES = torch.zeros(8, 8, 8, dtype=torch.long), Batches(torch.randn(8, 5), torch.zeros(8, dtype=torch.long), 4)


@pytest.mark.parametrize(
    ("data", "how", "said"),
    [
        (Batches(torch.randn(8, 1, 8, 8), MAPS, 4), {"cutmix": 1.0}, "labels of (4, 8, 8)"),
        (LINES, {"cutmix": 1.0}, "inputs of (4, 5)"),
        ([{"x": torch.randn(4, 1, 8, 8), "labels": torch.zeros(4).long()}], {"cutmix": 1.0}, "cutmix is for images"),
        (LINES, {"mirror": True}, "mirror is for images"),
        (Batches(torch.randn(8, 1, 8, 8), MAPS, 4), {"augment": "flip"}, "augment is for images"),  # which would move, and the map not
        ([{"x": torch.randn(4, 1, 8, 8), "labels": torch.zeros(4).long()}], {"augment": "flip_crop"}, "inputs by name"),
    ],
)
def test_what_is_no_image_is_refused_and_the_model_is_as_it_was(data, how, said):
    def model():
        return nn.Sequential(nn.Linear(5, 4)) if data is LINES else net()

    pruned = model()
    before = digest(state_of(pruned))
    with pytest.raises(DataError) as error:
        recover(pruned, data, Training(epochs=1, **how), teacher=model())
    assert said in str(error.value) and "Leave it out" in str(error.value) and digest(state_of(pruned)) == before


def test_the_box_of_a_step_is_the_same_in_all_processes():
    x, how = (torch.rand(6, 1, 8, 8),), Training(cutmix=1.0)
    first, second = (shown(x, None, how, (3, rank)) for rank in (0, 1))
    assert torch.equal(first[0][0], second[0][0]) and first[1] == second[1] < 1
    parts = {shown(x, None, how, (step, 0))[1] for step in range(20)}
    assert len(parts) > 10  # and another one in another step


def test_features_are_those_of_the_image_not_of_its_mirror_image():
    teacher, student, seen = net(1, dropout=0.0), net(2, dropout=0.0), []
    data, how = rows(12, size=12), {"epochs": 1, "lr": 0.0, "distil": 0.0}
    for features, mirror in ((0.0, False), (2.0, False), (2.0, True)):
        chosen = Training(**how, features=features, mirror=mirror)
        recover(student, data, chosen, teacher=teacher, progress=lambda step, steps, loss: seen.append(loss))
    assert seen[1] > seen[0] + 1e-3 and seen[2] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("how", [{"mirror": True}, {"features": 1.0}])
def test_what_is_of_a_teacher_is_refused_without_one(how):
    with pytest.raises(InputError, match="is of a teacher"):
        recover(net(), rows(), Training(epochs=1, **how))


def test_a_loss_that_looks_empty_is_a_loss():
    class Own(nn.Sequential):
        def forward(self, output, labels):
            return output.sum() * 0 + 123.0

    assert [row["loss"] for row in recover(net(), rows(), Training(epochs=1), loss=Own()).history] == [pytest.approx(123.0)]


def test_a_teacher_that_gives_maps_has_no_mirror():
    model, data = nn.Conv2d(1, 3, 3, padding=1), Batches(torch.randn(8, 1, 8, 8), MAPS, 4)
    with pytest.raises(DataError, match="gives \\(4, 3, 8, 8\\)"):
        recover(model, data, Training(epochs=1, mirror=True), teacher=nn.Conv2d(1, 3, 3, padding=1))


def test_what_is_off_is_not_in_the_settings():
    assert not {"cutmix", "mirror"} & set(Training().to_json())  # a checkpoint of a version without them goes on
    assert json.loads(json.dumps(Training(cutmix=0.5, mirror=True).to_json()))["cutmix"] == 0.5
    with pytest.raises(InputError, match="cutmix=2"):
        Training(cutmix=2)
