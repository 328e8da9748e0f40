"""Runs go on as if never stopped, with the rows in the order they would have had; what they save is what was pruned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import DataError, FormatError, InputError, TrainingError
from secateur.job import Cast
from secateur.models.folder import read, save_trained
from secateur.models.returned import Told
from secateur.pack.archive import is_deflated
from secateur.recover import Training, recover
from secateur.recover.checkpoint import FILE, state_of
from secateur.recover.order import Order, part_of
from tests.recover.nets import Net, masked, net, rows


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


def test_samplers_within_samplers_are_in_the_same_order():
    data = torch.utils.data.TensorDataset(torch.arange(20.0))
    inner = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(9))
    loader = torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(inner, 4, False))
    order = Order(loader, None, 0)
    found = [[batch[0].tolist() for batch in order.epoch(0)] for _ in range(2)]
    assert found[0] == found[1] != [batch[0].tolist() for batch in order.epoch(1)]


class Growing(Net):
    """Its cache has the size of the images once it has seen some."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x):
        if len(self.cache) != x.shape[-1]:
            self.cache = torch.arange(float(x.shape[-1]))
        return super().forward(x + 0.01 * self.cache)


def test_a_buffer_that_has_changed_its_shape_is_gone_on_with(tmp_path):
    how, left = Training(epochs=2), [5]

    def stopping(step, steps, loss):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    def grown():
        torch.manual_seed(0)
        return Growing()

    whole = recover(grown(), rows(), how)
    with pytest.raises(KeyboardInterrupt):
        recover(grown(), rows(), how, folder=tmp_path, progress=stopping)
    parts = recover(grown(), rows(), how, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True))
    with pytest.raises(TrainingError):
        recover(grown(), rows(), how, loss=lambda output, labels: output.sum() * float("nan"))
