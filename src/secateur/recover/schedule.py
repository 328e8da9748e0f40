"""Weights become zero while the user's own loop trains the network, by hooks on its optimizer.

    schedule = Schedule(model, optimizer, Gradual(keep="5%", kind="cubic"), steps=epochs * len(loader))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    plan = schedule.plan()

What kinds there are is said in `secateur.recover.gradual`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError, PlanError
from secateur.masks.hold import hooked
from secateur.masks.select import Selection, spread
from secateur.pattern import share, written
from secateur.plan import Cost, Plan
from secateur.recover.checkpoint import spread as spread_like
from secateur.recover.checkpoint import whole
from secateur.recover.gradual import NESTED, Gradual
from secateur.recover.regrow import moved
from secateur.recover.sparse_layers import at, drawn, largest, layers_of, plain
from secateur.trace.tracer import patterns

MOMENTA = ("momentum_buffer", "exp_avg")  # first moments, as the optimizers of torch and most others call them


class Schedule:
    """Makes single weights zero during training, and keeps them zero.

    After every step of the optimizer the weights outside the mask are exactly 0, and so are their gradients and what the optimizer remembers
    of them; in the dense phases of "ac_dc", and before `begin`, nothing is touched. Nothing is added to the model but hooks: its state dict,
    `torch.compile` and `torch.export` see no difference. Gradients may be accumulated over several batches; a step that a gradient scaler
    skips is not counted. A closure given to `optimizer.step` works too (Lightning always gives one); LBFGS begins anew where masks change.

    Weights may be spread over processes (FSDP2's `fully_shard`, before this): every process finds the same masks from the whole weights.

    In a step after which "rigl" grows weights, gradients are dense until `optimizer.step()` is called: the norm that a clipping sees is theirs.

    Args:
        model: the module that is trained, compiled or not. Changed at once where `begin` is 0 and the kind prunes there.
        optimizer: of its parameters.
        how: what goes when.
        steps: how often the training calls `optimizer.step()`; after that the mask is held.

    Attributes:
        step: steps of the optimizer so far.
        masks: name of a weight -> bool tensor of its shape, True stays.
        left: layers that stay dense -> why.

    Raises:
        InputError: it is no model, optimizer or `Gradual`; steps and options contradict each other; no layer of the optimizer's can be made sparse;
            a budget for other layers. PlanError: weights are NaN. Nothing was changed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, how: Gradual, steps: int):
        optimizer = hooked(optimizer)
        if not isinstance(how, Gradual):
            raise InputError(f"how is a {type(how).__name__}, which does not say when weights go.\n  Pass Gradual(keep='5%', kind='cubic').")
        self.how, self.steps, self.time = how, steps, how.over(steps)
        self.model, self.optimizer = plain(model), optimizer
        chosen = _trained(layers_of(self.model, how.pattern, patterns(how.ignore)), self.model, optimizer)
        self.layers, self.left = chosen.layers, chosen.left
        self.weights = {n: self.model.get_parameter(n) for n in self.layers}
        self.shares = self._shares()
        self.random = torch.Generator().manual_seed(how.seed)
        self.step = 0
        self.masks = {n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in self.weights.items()}
        self._spread = dict[str, tuple[Tensor, Tensor]]()  # of weights spread over processes: the mask, and what is gone as they are spread
        first = self._next() if self.time.changes(0) else None
        self._first: dict[str, Tensor] | None = {}  # weights as they were given, until the first step
        if first is not None:
            self._first = {n: p.detach().clone() for n, p in self.weights.items()}
            self.masks = first
            self._apply()
        self._dense: dict[str, Tensor] = {}  # |gradient|, from the beginning of a step to its end
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._gradient(n)) for n, p in self.weights.items()]
        self._handles.append(optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before(args, kwargs)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after()))

    # ------------------------------------------------------------------ what the user asks
    @property
    def sparsity(self) -> float:
        """The share of zeros now among the weights of all layers that are made sparse, from 0 to 1."""
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def plan(self) -> Plan:
        """The zeros as they are now, as `hold`, `mask` and `save` take them. No inputs were seen, so the costs in it count no operations.

        Raises:
            PlanError: nothing is zero now.
        """
        if all(bool(m.all()) for m in self.masks.values()):
            raise PlanError(f"after {self.step} of {self.steps} steps no weight is zero: kind={self.how.kind!r} is dense now, or has not begun.\n"
                            "  Ask for the plan at the end of the training.")  # fmt: skip
        shares = self._shares_now()
        masks = {n: m.detach().cpu().clone() for n, m in self.masks.items()}
        names = {n: written(at(self.how.pattern, shares[n], x) or self.how.pattern, x.transposed, x.groups) for n, x in self.layers.items()}
        parameters = list(self.model.parameters())
        size = sum(t.numel() * t.element_size() for t in (*parameters, *self.model.buffers()))
        cost = Cost(0, sum(p.numel() for p in parameters), size)
        budget = self.how.budget if isinstance(self.how.budget, str) else "given"
        why = {"score": self.how.kind, "pattern": written(self.how.pattern), "budget": budget, "seed": self.how.seed,
               "keep": str(float(self.time.keep)), "step": self.step, "of_steps": self.steps}  # fmt: skip
        return Plan({}, cost, cost, why, masks, names)

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer; the weights stay as they are then. `hold` the plan to train on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ to be cut off and to go on
    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.save`. With those of the model and the optimizer a training goes on as if it had not stopped."""
        return {"options": self._options(), "step": self.step, "masks": {n: m.clone() for n, m in self.masks.items()},
                "shares": {n: str(s) for n, s in self.shares.items()}, "random": self.random.get_state()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The states of the model and of the optimizer may be loaded before this schedule was made, or after.

        Raises:
            InputError: it is the state of another schedule or of another model. Nothing was changed.
        """
        missing = {"options", "step", "masks", "shares", "random"} - set(state if isinstance(state, Mapping) else ())
        if missing:
            raise InputError(f"this is no state of a Schedule: it has no {min(missing)!r}.\n  Pass what schedule.state_dict() gave.")
        for name, mine in self._options().items():
            if state["options"].get(name) != mine:
                raise InputError(f"the state is of a schedule with {name}={state['options'].get(name)}, and this one has {name}={mine}.\n"
                                 "  Make the schedule with the same options and steps.")  # fmt: skip
        for name in sorted(self.masks.keys() | state["masks"].keys()):
            here, given = ("missing" if m is None else f"{m.dtype} {tuple(m.shape)}" for m in (self.masks.get(name), state["masks"].get(name)))
            if here != given:
                raise InputError(f"the mask of {name!r} is {given} in the state and {here} here.\n  Load the state of this model.")
        with torch.no_grad():
            for name, before in (self._first or {}).items():
                p = self.weights[name]
                if torch.equal(whole(p), whole(before.to(p.device).masked_fill(self._gone(name), 0))):
                    p.copy_(before)  # what making this schedule zeroed may be alive in the mask of the state
        self._first = {}
        self.step = int(state["step"])
        self.masks = {n: state["masks"][n].to(p.device, copy=True) for n, p in self.weights.items()}
        self.shares = {n: Fraction(state["shares"][n]) for n in self.weights}
        self.random.set_state(state["random"].cpu())
        self._apply()

    def _options(self) -> dict[str, str]:
        """What two schedules have to have in common, as texts."""
        said = {f.name: str(getattr(self.how, f.name)) for f in fields(self.how)}
        told = {"keep": self.time.keep, "steps": self.steps, "begin": self.time.begin, "end": self.time.end, "every": self.time.every}
        return {**said, **{n: str(v) for n, v in told.items()}}

    # ------------------------------------------------------------------ hooks
    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is not None and not (self.how.kind == "rigl" and self.time.regrows(self.step + 1)):
                p.grad.masked_fill_(self._gone(name), 0)

        return hook

    def _before(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before a step of the optimizer. What it is called with: the gradients of a closure are looked at when it has made them."""
        if self._first is not None:  # the first one: what the optimizer was given may remember weights that went since
            for name in self.masks:
                self._forget(name, ~self.masks[name])
            self._first = None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._seen()
            return None

        def then() -> Any:
            value = closure()
            self._seen()
            return value

        return ((args[0], then, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": then})

    def _seen(self) -> None:
        """Gradients, once they are all there: dense ones are remembered, then they are 0 outside the mask."""
        if self._skipped():
            return
        if self.how.kind == "rigl" and self.time.regrows(self.step + 1):
            self._dense = {n: whole(p.grad.detach()).abs() for n, p in self.weights.items() if p.grad is not None}
        for name, p in self.weights.items():
            if p.grad is not None:
                p.grad.masked_fill_(self._gone(name), 0)

    def _skipped(self) -> bool:
        """Whether a gradient scaler found infinities: it calls a fused optimizer all the same, which then leaves everything as it is."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _after(self) -> None:
        """After a step of the optimizer."""
        if self._skipped():
            return
        self.step += 1
        if self.time.changes(self.step):
            old, self.masks = self.masks, self._next()
            for name in self.masks:  # neither what went nor what came remembers anything
                self._forget(name, ~(old[name].to(self.masks[name].device) & self.masks[name]))
            for held in self.optimizer.state.values():
                if "prev_flat_grad" in held:  # LBFGS has one long vector of all weights, which nothing can be taken out of
                    held.clear()
            if self.how.kind == "ac_dc":
                _still(self.optimizer)
        self._dense = {}
        self._apply()

    def _apply(self) -> None:
        """Make what is outside the masks 0 now."""
        if self.time.dense(self.step):
            return
        with torch.no_grad():
            for name, p in self.weights.items():
                p.masked_fill_(self._gone(name), 0)
                if p.grad is not None:
                    p.grad.masked_fill_(self._gone(name), 0)

    def _mask(self, name: str) -> Tensor:
        """The mask of a weight, whole, on the device that it is on now."""
        if self.masks[name].device != self.weights[name].device:
            self.masks[name] = self.masks[name].to(self.weights[name].device)
        return self.masks[name]

    def _gone(self, name: str) -> Tensor:
        """Where a weight is zero, spread over processes as it is."""
        p, mask = self.weights[name], self._mask(name)
        if not hasattr(p, "full_tensor"):
            return ~mask
        if name not in self._spread or self._spread[name][0] is not mask:
            self._spread[name] = (mask, spread_like(~mask, p))
        return self._spread[name][1]

    def _forget(self, name: str, where: Tensor) -> None:
        """Make what the optimizer remembers of these weights 0, in every state that has a value for each weight."""
        p = self.weights[name]
        for value in self.optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                value.masked_fill_(spread_like(where, value), 0)

    # ------------------------------------------------------------------ which weights stay
    def _shares(self) -> dict[str, Fraction]:
        """What stays of each layer in the end."""
        lamp = self.how.budget == "lamp"  # the others look at shapes alone
        state = {n: whole(p.detach()).cpu() if lamp else torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in self.weights.items()}
        given = self.how.budget if isinstance(self.how.budget, str) else {n: share(s, dense=True) for n, s in self.how.budget.items()}
        return {n: x.keep for n, x in spread(Selection(self.layers), state, self.how.pattern, self.time.keep, given).items()}

    def _shares_now(self) -> dict[str, Fraction]:
        """What stays of each layer after `self.step` steps."""
        done = self.time.done(self.step)
        return {n: 1 - (1 - s) * done for n, s in self.shares.items()}

    def _next(self) -> dict[str, Tensor]:
        """The masks after `self.step` steps, at which they change."""
        if self.step == self.time.begin and self.how.budget == "lamp":
            self.shares = self._shares()
        if self.time.regrows(self.step):
            return {n: self._moved(n) for n in self.layers}
        pattern, shares = self.how.pattern, self._shares_now()
        if self.how.kind == "static" or (self.how.kind in ("rigl", "set") and self.how.start == "random"):
            return drawn(self.layers, self.weights, pattern, shares, self.random)
        found = dict[str, Tensor]()
        for n, layer in self.layers.items():  # one by one: a weight that is spread over processes is whole only here
            found |= largest({n: layer}, {n: whole(self.weights[n])}, pattern, shares, {n: self._mask(n)} if self.how.kind in NESTED else None)
        return found

    def _moved(self, name: str) -> Tensor:
        active, p = self._mask(name), whole(self.weights[name])
        count = int(self.time.moving(self.step) * int(active.sum()))
        score = self._dense.get(name) if self.how.kind == "rigl" else torch.rand(p.shape, generator=self.random).to(p.device)
        if score is None or bool(active.all()):  # without a gradient, or without a place to come to, nothing moves
            return active
        return moved(p, active, score, count)


def _trained(chosen: Selection, model: nn.Module, optimizer: torch.optim.Optimizer) -> Selection:
    """Without the layers whose weights the optimizer does not have.

    Raises:
        InputError: it has none of them.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {n: x for n, x in chosen.layers.items() if id(model.get_parameter(n)) in known}
    if not trained:
        raise InputError(f"the optimizer has none of the {len(chosen.layers)} weights that could be sparse, such as {next(iter(chosen.layers))!r}.\n"
                         "  Make it of this model's parameters: a copy has its own.")  # fmt: skip
    frozen = {x.name: "its weight is not the optimizer's" for n, x in chosen.layers.items() if n not in trained}
    return Selection(trained, {**chosen.left, **frozen})


def _still(optimizer: torch.optim.Optimizer) -> None:
    """Momentum 0 for all parameters; second moments stay, as their bias is corrected by steps that go on."""
    for state in optimizer.state.values():
        for name in MOMENTA:
            if isinstance(state.get(name), Tensor):
                state[name].zero_()
