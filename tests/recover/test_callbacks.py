"""Zeros stay zero in the loops of others."""

import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.models.hf import import_transformers
from secateur.models.vision import import_torchvision
from secateur.recover import Gradual, Schedule, callbacks, trainer_callback
from secateur.recover.callbacks import lightning_callback, plain


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x, labels=None):
        y = self.b(torch.relu(self.a(x)))
        return {"loss": (y - labels).square().mean(), "logits": y} if labels is not None else y


def rows(n=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    return [{"x": a, "labels": a[:1]} for a in x]


def trained(callback, model, folder, epochs=3):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers = import_transformers()
    options = transformers.TrainingArguments(str(folder), num_train_epochs=epochs, report_to=[], use_cpu=True, save_strategy="no", weight_decay=0.1,
                                             disable_tqdm=True, learning_rate=0.01)  # fmt: skip
    transformers.Trainer(model, options, train_dataset=rows(), callbacks=[callback]).train()


def test_a_hugging_face_trainer_keeps_the_zeros(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    result = sc.sparsify(Net().eval(), (torch.randn(2, 8),), sc.Sparse(keep="30%", by="magnitude", refit=False))
    before = result.model.a.weight.detach().clone()
    trained(trainer_callback(lambda model, optimizer, steps: sc.hold(model, result.plan, optimizer)), result.model, tmp_path)
    for name, stays in result.plan.weights.items():
        assert not result.model.get_parameter(name)[~stays].any() and not stays.all()
    assert not torch.equal(result.model.a.weight, before)


def test_a_hugging_face_trainer_follows_a_schedule(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, made = Net(), []

    def start(model, optimizer, steps):
        assert steps == 24  # 64 rows in batches of 8, three times
        made.append(Schedule(model, optimizer, Gradual(keep="25%", budget="uniform"), steps))
        return made[0]

    trained(trainer_callback(start), net, tmp_path)
    assert made[0].step == 24 and made[0].sparsity == pytest.approx(0.75, abs=0.02)
    assert float((net.a.weight == 0).float().mean()) == pytest.approx(0.75, abs=0.02)


def test_a_hugging_face_trainer_that_goes_on_follows_the_same_schedule(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers = import_transformers()

    def run(folder, stop):
        torch.manual_seed(0)
        net, made = Net(), []

        def start(model, optimizer, steps):
            made.append(Schedule(model, optimizer, Gradual(keep="25%", budget="uniform"), steps))
            return made[0]

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **given):
                control.should_training_stop = state.global_step == stop

        options = transformers.TrainingArguments(str(folder), num_train_epochs=3, report_to=[], use_cpu=True, save_strategy="steps", save_steps=4,
                                                 disable_tqdm=True, learning_rate=0.01)  # fmt: skip
        trainer = transformers.Trainer(net, options, train_dataset=rows(), callbacks=[trainer_callback(start), Stop()])
        trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
        return net, made[0]

    whole, schedule = run(tmp_path / "whole", -1)
    run(tmp_path / "parts", 8)
    parts, again = run(tmp_path / "parts", -1)
    assert again.step == schedule.step == 24 and again.sparsity == schedule.sparsity
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_hugging_face_trainer_may_not_bring_back_weights_without_the_zeros(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers = import_transformers()
    options = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, eval_strategy="epoch", save_strategy="epoch",
                                             load_best_model_at_end=True, disable_tqdm=True)  # fmt: skip

    def run(kind):
        start = trainer_callback(lambda model, optimizer, steps: Schedule(model, optimizer, Gradual(keep="25%", kind=kind), steps))
        transformers.Trainer(net := Net(), options, train_dataset=rows(), eval_dataset=rows(), callbacks=[start]).train()
        return net

    for kind in ("cubic", "ac_dc", "rigl"):
        with pytest.raises(InputError, match="load_best_model_at_end"):
            run(kind)
    assert float((run("one_shot").a.weight == 0).float().mean()) > 0.5  # all its steps have the zeros


def hooks(model):
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_a_hugging_face_trainer_that_stopped_with_an_error_begins_anew(tmp_path):
    """What was held by the first training is not held twice by the second."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers = import_transformers()
    net, made = Net(), []
    callback = trainer_callback(lambda m, o, steps: made.append(Schedule(m, o, Gradual(keep="25%", budget="uniform"), steps)) or made[-1])

    class Broken(list):
        def __getitem__(self, i):
            raise OSError("the disk is gone")

    options = transformers.TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    with pytest.raises(OSError, match="the disk is gone"):
        transformers.Trainer(net, options, train_dataset=Broken(rows()), callbacks=[callback]).train()
    first = hooks(net)
    transformers.Trainer(net, options, train_dataset=rows(), callbacks=[callback]).train()
    assert len(made) == 2 and first > 0 and hooks(net) == 0
    assert made[0]._handles == []


def test_a_schedule_that_cannot_be_read_is_named_and_leaves_no_hook(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers = import_transformers()
    options = transformers.TrainingArguments(str(tmp_path), num_train_epochs=2, report_to=[], use_cpu=True, save_strategy="epoch", disable_tqdm=True)

    def run(net, again):
        callback = trainer_callback(lambda m, o, steps: Schedule(m, o, Gradual(keep="25%", budget="uniform"), steps))
        transformers.Trainer(net, options, train_dataset=rows(), callbacks=[callback]).train(resume_from_checkpoint=again)

    run(Net(), None)
    first = tmp_path / "checkpoint-8"
    assert not list(first.glob("*.new"))
    held = (first / "secateur.pt").read_bytes()
    for content in (held[: len(held) // 2], b""):
        (first / "secateur.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"goes on at step 8, and .*secateur.pt cannot be read"):
            run(net := Net(), str(first))
        assert hooks(net) == 0


@pytest.fixture
def unheard():
    """Warnings go nowhere. One of a class of Lightning's would be sent from a worker of pytest-xdist to the main process, which would import
    Lightning to read it, and with it torchvision without the shim."""
    with warnings.catch_warnings(record=True):
        yield


def test_lightning_keeps_the_zeros(tmp_path, unheard):
    if find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    if find_spec("torchvision") is not None:
        import_torchvision()  # its operators are declared first, which Lightning's parts import
    module = import_module("lightning.pytorch")

    class Wrapped(module.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            return self.net(batch["x"], batch["labels"])["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    result = sc.sparsify(Net().eval(), (torch.randn(2, 8),), sc.Sparse(keep="30%", by="magnitude", refit=False))
    callback = lightning_callback(lambda wrapped, optimizer, steps: sc.hold(wrapped.net, result.plan, optimizer))
    trainer = module.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False, callbacks=[callback], default_root_dir=str(tmp_path))  # fmt: skip
    trainer.fit(Wrapped(result.model), torch.utils.data.DataLoader(rows(), 8))
    for name, stays in result.plan.weights.items():
        assert not result.model.get_parameter(name)[~stays].any()
    assert hooks(result.model) == 0

    class Broken(Wrapped):
        def training_step(self, batch, number):
            raise OSError("the disk is gone")

    trainer = module.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False, callbacks=[callback], default_root_dir=str(tmp_path))  # fmt: skip
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(Broken(result.model), torch.utils.data.DataLoader(rows(), 8))
    assert hooks(result.model) == 0


def test_wrapped_optimizers_are_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    own = torch.optim.SGD(Net().parameters(), lr=0.1)
    assert plain(Wrapper(Wrapper(own))) is own and plain(own) is own


def test_a_second_training_with_lightnings_callback_begins_anew(monkeypatch):
    class Trainer:
        def __init__(self, optimizer, steps):
            self.optimizers, self.estimated_stepping_batches = [optimizer], steps

    monkeypatch.setattr(callbacks, "_lightning", lambda: object)
    callback = lightning_callback(lambda model, optimizer, steps: Schedule(model, optimizer, Gradual("50%", kind="cubic"), steps))

    def fit(steps, before=None):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if before is not None:
            callback.load_state_dict(before)
        callback.on_train_start(Trainer(optimizer, steps), model)
        begun = callback.held.step
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        callback.on_train_end(None, None)
        return begun, callback.state_dict()

    begun, state = fit(10)
    assert begun == 0 and fit(10, state)[0] == 1 and fit(10)[0] == 0
    with pytest.raises(InputError, match="steps"):
        fit(float("inf"))
    endless = lightning_callback(lambda model, optimizer, steps: steps)
    with pytest.raises(AttributeError):  # a number has no hooks to remove
        endless.on_train_start(Trainer(torch.optim.SGD(Net().parameters(), 0.1), float("inf")), Net())
        endless.on_train_end(None, None)
    assert endless.held == -1
