"""Every method is a function (task, share, seed) -> (model, what is worth knowing). None trains; only Taylor sees labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import nn

import secateur as sc
from benchmarks.no_training import peer, scores
from benchmarks.no_training.tasks import Task
from secateur.measure import count
from secateur.repair import batch_norm_statistics

Info = dict[str, Any]
PLAIN = {"allocation": "global", "repair": "none"}  # what sc.prune did before it had more to offer
Method = Callable[[Task, float, int], tuple[nn.Module, Info]]


def budget(task: Task, share: float, model: nn.Module) -> sc.MACs:
    """The share of the dense model's multiply-accumulates as a whole number of them."""
    return sc.MACs(at_most=math.floor(share * count(model, task.args()).macs))


def pruned(task: Task, share: float, seed: int, **options: Any) -> sc.Result:
    """One call of `sc.prune` on the dense model of a task. Options that this version does not know yet are left out: each
    baseline names what the versions without the option did."""
    model = task.dense()
    known = inspect.signature(sc.prune).parameters
    passed = {k: v for k, v in options.items() if k in known}
    return sc.prune(model, task.args(), budget(task, share, model), seed=seed, ignore=task.ignore, **passed)


def facts(result: sc.Result, **more: Any) -> Info:
    """What the library says about its result."""
    info = {"how": result.cut.how, "notes": result.notes, "why": {k: v for k, v in result.plan.why.items() if k != "versions"}}
    info["why"] = {k: v for k, v in info["why"].items() if isinstance(v, (str, int, float))}
    repairs = getattr(result, "repairs", None)
    if repairs is not None:
        info["repaired_layers"] = len(repairs)
    return info | more


def ours(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """The one call with its defaults: inputs only, no labels."""
    if "repair" not in inspect.signature(sc.prune).parameters:
        raise NotImplementedError("this version of sc.prune has no repair=: there is nothing to measure yet")
    result = pruned(task, share, seed, data=task.inputs(seed))
    return result.model, facts(result)


def ours_layers(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """The same with every layer fitted by itself: the closed form alone, no derivatives."""
    result = pruned(task, share, seed, data=task.inputs(seed), repair="least_squares")
    return result.model, facts(result)


def _then_batch_norm(task: Task, seed: int, result: sc.Result, **more: Any) -> tuple[nn.Module, Info]:
    inputs = [((x,), {}) for x in task.inputs(seed)]
    return result.model, facts(result, batch_norm_batches=batch_norm_statistics(result.model, inputs), **more)


def magnitude(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """L2 of a unit's weights, all groups ranked together; BatchNorm re-estimated."""
    return _then_batch_norm(task, seed, pruned(task, share, seed, score="l2", **PLAIN))


def magnitude_inner(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """The same with the residual stream kept whole."""
    score = scores.inside(sc.score.l2, task.writers(task.dense()))
    return _then_batch_norm(task, seed, pruned(task, share, seed, score=score, **PLAIN))


def random(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """Random units; BatchNorm re-estimated."""
    return _then_batch_norm(task, seed, pruned(task, share, seed, score="random", **PLAIN))


def taylor(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """First-order Taylor with labels, squared; BatchNorm re-estimated."""
    score = scores.taylor(task.calibrate(seed), task.loss)
    return _then_batch_norm(task, seed, pruned(task, share, seed, score=score, **PLAIN), labels=True)


def taylor_inner(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """The same with the residual stream kept whole."""
    score = scores.inside(scores.taylor(task.calibrate(seed), task.loss), task.writers(task.dense()))
    return _then_batch_norm(task, seed, pruned(task, share, seed, score=score, **PLAIN), labels=True)


def flap(task: Task, share: float, seed: int) -> tuple[nn.Module, Info]:
    """FLAP-like: fluctuation scores inside the residual stream, as the paper has it; the mean of what was removed goes into
    the biases. BatchNorm stays as it is."""
    dense = task.dense()
    moments = scores.Moments(dense, task.inputs(seed))
    result = pruned(task, share, seed, score=scores.inside(scores.flap(moments), task.writers(dense)), **PLAIN)
    return result.model, facts(result, biases=scores.compensate(result, dense, moments))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours_layers": ours_layers,
    "magnitude": magnitude,
    "magnitude_inner": magnitude_inner,
    "taylor": taylor,
    "taylor_inner": taylor_inner,
    "flap": flap,
    "random": random,
}


def method(name: str) -> Method:
    """A method by its name; `torch_pruning/...` is one variant of Torch-Pruning."""
    return peer.Variant.parse(name).run if name.startswith(peer.PREFIX) else METHODS[name]


def makes_sense(name: str, task: Task) -> bool:
    """Whether keeping the residual stream is a choice: there is one and the task does not keep it anyway."""
    return not name.endswith("_inner") or bool(task.stream and not task.ignore)


def needs_no_seed(name: str, model: nn.Module) -> bool:
    """Whether every seed gives the same: a criterion of weights alone, on a network without BatchNorm."""
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    by_weights = name.startswith("magnitude") or (name.startswith(peer.PREFIX) and "taylor" not in name)
    return name == "dense" or (by_weights and not has_norm)

