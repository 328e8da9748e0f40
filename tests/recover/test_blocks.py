"""Block by block: against a slow twin, on rows that are not trained on, put back where it does not help."""

import copy
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import DataError, InputError
from secateur.models.data import Batches
from secateur.recover import Reconstruction, reconstruct
from secateur.recover.blocks import HELD_OUT
from tests.recover.worker import Mixer


class Wide(nn.Module):
    """Blocks that give a pair and take a mask by name."""

    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList([Pair(width) for _ in range(3)])
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        x, mask = self.first(x[:, 0]), torch.ones(1)
        for block in self.blocks:
            x, mask = block(x, mask=mask)
        return self.last(x.mean(1))


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.5)

    def forward(self, x, *, mask):
        return x + mask * self.down(self.drop(torch.relu(self.up(x)))), mask


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(8, 2)

    def forward(self, x):
        return self.only(x)


def dense(kind=Mixer):
    torch.manual_seed(0)
    return kind().eval()


def inputs(n=120):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def pruned(kind=Mixer):
    return sc.sparsify(dense(kind), (inputs(2),), sc.Sparse(keep="30%", by="magnitude", refit=False))


def caught(model, name, x):
    """(inputs, output) of a block in a whole forward."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, kwargs, y: seen.append((args, kwargs, y)), with_kwargs=True)
    with torch.no_grad():
        model(x)
    handle.remove()
    args, kwargs, y = seen[0]
    return args, kwargs, y[0] if isinstance(y, tuple) else y


def relative(a, b):
    return float((a - b).square().sum() / b.square().sum())


def twin(model, teacher, batches, how, plan):
    """The same, written down from the formula: whole forwards, a mask put on after every step."""
    train, tests = [b for i, b in enumerate(batches) if i % HELD_OUT != HELD_OUT - 1], batches[HELD_OUT - 1 :: HELD_OUT]
    rows = []
    for k in range(len(model.blocks)):
        name, block = f"blocks.{k}", model.blocks[k]
        masks = {p: plan.weights[f"{name}.{n}"] for n, p in block.named_parameters() if f"{name}.{n}" in plan.weights}

        def error(name=name):
            found = [(caught(model, name, x)[2], caught(teacher, name, x)[2]) for x in tests]
            return sum(float((a - b).square().sum()) for a, b in found) / sum(float(b.square().sum()) for _, b in found)

        before, kept = error(), copy.deepcopy(block.state_dict())
        optimizer = torch.optim.AdamW(block.parameters(), weight_decay=0.0)
        drawn, order = torch.Generator().manual_seed(how.seed + k), []
        while len(order) < how.steps:
            order += torch.randperm(len(train), generator=drawn).tolist()
        held = [(*caught(model, name, x)[:2], caught(teacher, name, x)[2]) for x in train]
        for step in range(how.steps):
            for group in optimizer.param_groups:
                group["lr"] = how.lr * (1 + math.cos(math.pi * step / how.steps)) / 2
            args, kwargs, wanted = held[order[step]]
            given = block(*args, **kwargs)
            loss = ((given[0] if isinstance(given, tuple) else given) - wanted).square().sum() / wanted.square().sum()
            optimizer.zero_grad()
            loss.backward()
            for p, mask in masks.items():
                p.grad *= mask
            torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
        after = error()
        if after >= before:
            block.load_state_dict(kept)
        rows.append((name, before, after))
    return rows


@pytest.mark.parametrize("kind", [Mixer, Wide])
def test_it_is_the_slow_twin(kind):
    result, teacher, how = pruned(kind), dense(kind), Reconstruction(steps=12, lr=5e-3, seed=4)
    other = copy.deepcopy(result.model)
    batches = list(inputs().split(10))
    with_labels = [(x, torch.full((len(x),), 10**6)) for x in batches]  # which no one looks at
    done = reconstruct(result.model, teacher, with_labels, how, plan=result.plan)
    rows = twin(other, teacher, batches, how, result.plan)
    assert [b.layer for b in done.blocks] == [name for name, *_ in rows] and not any(b.why for b in done.blocks)
    for block, (_, before, after) in zip(done.blocks, rows, strict=True):
        assert (block.before, block.after) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-3)) and block.after < block.before
        assert block.rows == 100
    for (name, a), b in zip(done.model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert done.after < done.before
    assert all(not done.model.get_parameter(n)[~m].any() for n, m in result.plan.weights.items())


def test_only_the_blocks_change_and_everything_else_is_left():
    result, teacher = pruned(Wide), dense(Wide).train()
    before, weights, state = copy.deepcopy(result.model.state_dict()), copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    done = reconstruct(result.model.train(), teacher, Batches(inputs(), None, 40), Reconstruction(steps=5), plan=result.plan)
    moved = {n for n, t in done.model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(n.startswith("blocks.") for n in moved)
    assert all(torch.equal(t, weights[n]) for n, t in teacher.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
    assert done.model.training and teacher.training and all(p.grad is None and p.requires_grad for p in done.model.parameters())


def test_held_out_rows_are_not_trained_on():
    result, seen = pruned(), []
    result.model.blocks[0].register_forward_hook(lambda m, args, y: seen.append(args[0].clone()) if torch.is_grad_enabled() else None)
    batches = list(inputs().split(10))
    reconstruct(result.model, dense(), batches, Reconstruction(steps=30), plan=result.plan)
    first = [result.model.first(x[:, 0]) for x in batches]
    for at, x in enumerate(first):
        assert any(torch.equal(x, y) for y in seen) == (at % HELD_OUT != HELD_OUT - 1)


@pytest.mark.parametrize("lr", [1e6, 30.0])
def test_what_got_worse_is_put_back(lr):
    result = pruned()
    before = copy.deepcopy(result.model.state_dict())
    done = reconstruct(result.model, dense(), list(inputs().split(10)), Reconstruction(steps=3, lr=lr), plan=result.plan)
    assert all("did not help" in b.why and b.after == b.before for b in done.blocks) and done.after == done.before
    assert all(torch.equal(t, before[n]) for n, t in done.model.state_dict().items())
    assert [row["used"] for row in done.to_json()["blocks"]] == [False, False]


def test_all_is_put_back_where_the_output_of_the_whole_got_worse():
    """Blocks come nearer to the dense ones, and the output cannot come nearer: the head does not look at them."""
    result, teacher = pruned(), dense()
    with torch.no_grad():
        for model in (result.model, teacher):
            model.last.weight.zero_()
    before = copy.deepcopy(result.model.state_dict())
    done = reconstruct(result.model, teacher, list(inputs().split(10)), Reconstruction(steps=5, lr=5e-3), plan=result.plan)
    assert done.before == done.after == 0.0 and all("with all blocks" in b.why for b in done.blocks)
    assert all(torch.equal(t, before[n]) for n, t in done.model.state_dict().items())


def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(block, blocks):
        raise Stop

    how, data = Reconstruction(steps=6), list(inputs().split(10))
    whole = reconstruct(pruned(Wide).model, dense(Wide), data, how, plan=pruned(Wide).plan)
    for _ in range(2):
        with pytest.raises(Stop):
            reconstruct(pruned(Wide).model, dense(Wide), data, how, plan=pruned(Wide).plan, folder=tmp_path, progress=stop)
    seen = []
    rest = reconstruct(pruned(Wide).model, dense(Wide), data, how, plan=pruned(Wide).plan, folder=tmp_path, progress=lambda *a: seen.append(a))
    assert seen == [(3, 3)] and rest.blocks == whole.blocks and (rest.before, rest.after) == (whole.before, whole.after)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), rest.model.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="steps was 6"):
        reconstruct(pruned(Wide).model, dense(Wide), data, Reconstruction(steps=7), plan=pruned(Wide).plan, folder=tmp_path)


def test_a_run_does_not_go_on_with_other_rows(tmp_path):
    how, rows = Reconstruction(steps=2), inputs()
    reconstruct(pruned(Wide).model, dense(Wide), Batches(rows, None, 10), how, plan=pruned(Wide).plan, folder=tmp_path)
    reconstruct(pruned(Wide).model, dense(Wide), Batches(rows, None, 10), how, plan=pruned(Wide).plan, folder=tmp_path)
    with pytest.raises(InputError, match="data was"):
        reconstruct(pruned(Wide).model, dense(Wide), Batches(rows + 1, None, 10), how, plan=pruned(Wide).plan, folder=tmp_path)


def test_rows_are_no_more_than_asked_and_few_batches_are_cut():
    result = pruned()
    done = reconstruct(result.model, dense(), Batches(inputs(), None, 50), Reconstruction(steps=1, rows=100), plan=result.plan)
    assert {b.rows for b in done.blocks} == {80}
    done = reconstruct(pruned().model, dense(), [inputs(2)], Reconstruction(steps=1))
    assert {b.rows for b in done.blocks} == {1}


def test_what_has_no_blocks_is_told():
    x = inputs(20)
    graph = torch.export.export(dense(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    with pytest.raises(InputError, match="captured graph"):
        reconstruct(graph, dense(), [x])
    with pytest.raises(InputError, match="module list"):
        reconstruct(Head(), Head(), [x])
    for few in ([], [inputs(1)]):
        with pytest.raises(DataError, match="rows"):
            reconstruct(pruned().model, dense(), few)
    for bad in ({"steps": -1}, {"steps": 1.5}, {"rows": 1}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Reconstruction(**bad)


def test_a_block_that_is_called_twice_is_left():
    class Twice(Mixer):
        def forward(self, x):
            x = self.first(x[:, 0])
            return self.last(self.blocks[1](self.blocks[0](self.blocks[0](x))).mean(1))

    model = dense(Twice)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.mul_(0.5)
    done = reconstruct(model, dense(Twice), list(inputs().split(10)), Reconstruction(steps=3))
    assert [b.layer for b in done.blocks] == ["blocks.1"] and "blocks.0" in done.notes[0]


def test_a_teacher_of_other_outputs_is_refused():
    teacher = dense()
    teacher.last = nn.Linear(16, 1)  # it would be spread over all outputs
    with pytest.raises(InputError, match=r"the teacher .*, 1"):
        reconstruct(pruned().model, teacher, [inputs()], Reconstruction(2))


class Adding(nn.Module):
    """Adds to what it was given, in place or not."""

    def __init__(self, width, inside):
        super().__init__()
        self.up, self.inside = nn.Linear(width, width), inside

    def forward(self, x):
        more = torch.tanh(self.up(x.clone()))
        return (x.add_(more) if self.inside else x + more) * 1.0


def test_blocks_that_write_into_their_inputs_are_trained_as_those_that_do_not():
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Adding(8, inside), nn.Linear(8, 4)).eval()
        weak = copy.deepcopy(model)
        with torch.no_grad():
            weak[2].up.weight[:, ::2] = 0
        found.append(reconstruct(weak, model, [inputs()], Reconstruction(20)))
    assert found[0].blocks == found[1].blocks and found[0].after < found[0].before
    assert all(torch.equal(a, b) for a, b in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True))


def test_a_teacher_of_less_precision_teaches_too():
    found = reconstruct(pruned().model, dense().bfloat16(), [inputs()], Reconstruction(20))
    assert found.after < found.before
