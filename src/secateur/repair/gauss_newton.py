"""All layers of one branch fitted together: Gauss-Newton, every step a linear least-squares problem.

With the branch y(p) linearised at the weights p0 of its layers,

    min over d of  sum_rows |t - y(p0) - J d|^2 + lambda |d|^2_K,      p = p0 + s d

solved by conjugate gradients on (J^T J + lambda K) d = J^T (t - y). J is never formed: products with it and with its
transpose are derivatives of the branch. K, which also preconditions, is block-diagonal: for a layer with inputs x and
outputs z the Kronecker product of E[x x^T] and the diagonal of E[(dy/dz)^T (dy/dz)] (Martens & Grosse 2015). One layer's
least-squares fit can only recombine the units that stay; together with the layers that make them the units change too.

The step s is the best of a few on chunks held out of the fit, and 0 is among them. No labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.processes import ALONE, Alone
from secateur.repair.branch import Narrow
from secateur.repair.layers import Layer
from secateur.trace.call import shape_of

ROUNDS = 2  # linearisations
STEPS = 8  # of conjugate gradients in each
EQUATIONS = 40  # wanted per weight
FEWEST = 4  # per weight; with fewer there is no fit
EFFORT = 3e12  # multiply-accumulates that one branch may take, a minute or two of one thread
_RUN = 4.5  # runs of the branch that a product with J^T J is worth
STEP_SIZES = (1.0, 0.5, 0.25)
_SAMPLED = 20_000  # rows of a layer's input for K
_PROBED = 4  # chunks for K

Weights = dict[str, Tensor]


@dataclass
class Member:
    """A layer of the branch, with as many groups as stay, and the name of what serves as its bias."""

    layer: Layer
    bias: str | None


@dataclass
class BranchFit:
    """The squared error of a branch as a function of its weights.

    Attributes:
        branch: the network that is fitted. members: the layers whose weights and biases are free.
        goal: chunk -> what the branch should give; both are compared after a ReLU where one follows.
        ridge: lambda, relative to the mean variance of each layer's inputs.
        processes: those that share the chunks. Whatever is summed over chunks is summed over all of them.
        some: a chunk of this process, whose shapes are those of all.
    """

    branch: Narrow
    members: list[Member]
    goal: Callable[[int], Tensor]
    rectified: bool
    ridge: float
    processes: Alone = ALONE
    some: int = 0
    _goals: dict[int, Tensor] = field(default_factory=dict)

    def start(self) -> Weights:
        return {n: self.branch.tensor(n) for m in self.members for n in (m.layer.weight, m.bias) if n}

    def output(self, chunk: int, weights: Weights, added: dict[fx.Node, Tensor] | None = None) -> Tensor:
        y = self.branch.run(chunk, weights, added)[self.branch.branch.end]
        return y.relu() if self.rectified else y

    def wanted(self, chunk: int) -> Tensor:
        if chunk not in self._goals:
            t = self.goal(chunk)
            self._goals[chunk] = t.relu() if self.rectified else t
        return self._goals[chunk]

    def error(self, chunks: list[int], weights: Weights) -> float:
        """Summed over the chunks."""
        with torch.no_grad():
            return self.summed(chunks, lambda c: ((self.output(c, weights) - self.wanted(c)) ** 2).sum(dtype=torch.float64))

    def summed(self, chunks: list[int], of: Callable[[int], Tensor]) -> float:
        """A number, float64, summed over the chunks."""
        own = sum((of(c) for c in chunks if self.processes.mine(c)), torch.zeros((), dtype=torch.float64))
        return float(self.processes.total("an error", {"sum": own})["sum"])

    @property
    def size(self) -> int:
        """Rows of a chunk, in which errors are counted, whatever the layout: any fixed number serves, as it cancels."""
        return self.wanted(self.some).shape[0]

    @property
    def unknowns(self) -> int:
        return sum(w.numel() for w in self.start().values())

    def chunks_for(self, equations: int, most: int) -> int:
        """How many chunks, of `equations` each, a step is taken from; 0 where there are too few, or more than `EFFORT` can pay for."""
        run = sum(self.branch.tensor(m.layer.weight).numel() * m.layer.places for m in self.members) * self.size
        n = min(most, max(1, -(-EQUATIONS * self.unknowns // equations)), int(EFFORT / (ROUNDS * STEPS * _RUN * run)))
        return n if n * equations >= FEWEST * self.unknowns else 0

    def gradient(self, chunks: list[int], weights: Weights) -> Weights:
        """J^T (t - y)."""
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}

        def one(chunk: int) -> tuple:
            with torch.enable_grad():
                y = self.output(chunk, leaves)
            return torch.autograd.grad(y, list(leaves.values()), self.wanted(chunk) - y.detach(), allow_unused=True)

        return self._over(chunks, weights, one, "a gradient")

    def product(self, chunks: list[int], weights: Weights, direction: Weights) -> Weights:
        """J^T J d: one run forwards that carries J d along, and one backwards."""
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}

        def one(chunk: int) -> tuple:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), fwd.dual_level():
                y = self.output(chunk, {n: fwd.make_dual(w, direction[n]) for n, w in leaves.items()})
                value, along = fwd.unpack_dual(y)
            if along is None:
                return tuple(None for _ in leaves)
            # out of the level: inside, the way back would carry derivatives along as well
            return torch.autograd.grad(value, list(leaves.values()), along.detach(), allow_unused=True)

        return self._over(chunks, weights, one, "a product with J^T J")

    def _over(self, chunks: list[int], weights: Weights, one: Callable[[int], tuple], what: str) -> Weights:
        """Derivatives summed over the chunks, in float64, so that it does not matter who has added which."""
        total = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in weights.items()}

        def own() -> None:
            for chunk in filter(self.processes.mine, chunks):
                for sum_, g in zip(total.values(), one(chunk), strict=True):
                    if g is not None:
                        sum_ += g

        self.processes.together(what, own)
        return {n: v.to(weights[n].dtype) for n, v in self.processes.total(what, total).items()}


@dataclass
class Curvature:
    """K of one layer: the inverse of E[x x^T] + lambda I (groups, features, features), lambda, and what each output counts."""

    member: Member
    inverse: Tensor
    ridge: float
    output: Tensor

    def solve(self, weights: Weights, into: Weights) -> None:
        """K^-1 times the layer's part."""
        layer, name = self.member.layer, self.member.layer.weight
        into[name] = layer.stored((layer.matrix(weights[name]) @ self.inverse) / self.output[..., None], weights[name])
        if self.member.bias:
            into[self.member.bias] = weights[self.member.bias] / self.output.reshape(-1)

    def add_ridge(self, weights: Weights, into: Weights) -> None:
        layer, name = self.member.layer, self.member.layer.weight
        into[name] = into[name] + layer.stored(layer.matrix(weights[name]) * (self.ridge * self.output[..., None]), weights[name])


def curvature(fit: BranchFit, chunks: list[int], weights: Weights, random: torch.Generator) -> list[Curvature]:
    """K by layer; E[(dy/dz)^T (dy/dz)] comes from one random probe per chunk (Hutchinson's estimate of a diagonal)."""
    shape, own = fit.wanted(fit.some).shape, fit.processes.mine
    drawn = [(c, *_drawn(fit, shape, len(chunks), random)) for c in chunks]  # the same for any number of processes
    sums = fit.processes.together("K", lambda: _probed(fit, [d for d in drawn if own(d[0])], weights))
    sums = fit.processes.total("K", sums)
    rows, nothing = len(chunks) * fit.size, torch.zeros((), dtype=torch.float64)
    return [
        _curvature(fit, m, sums[f"gram {i}"] / sums[f"seen {i}"], sums.get(f"out {i}", nothing) / rows, weights) for i, m in enumerate(fit.members)
    ]


def _drawn(fit: BranchFit, shape: torch.Size, chunks: int, random: torch.Generator) -> tuple[Tensor, list[Tensor | None]]:
    """A probe of the shape of the output, -1 or 1, and by layer which positions of its input are looked at; None is all."""
    probe = torch.randint(0, 2, shape, generator=random)
    places = []
    for m in fit.members:
        n = max(1, min(m.layer.places, _SAMPLED // (chunks * max(1, shape_of(m.layer.source.meta["val"])[0]))))
        places.append(None if n == m.layer.places else torch.randperm(m.layer.places, generator=random)[:n])
    return probe, places


def _probed(fit: BranchFit, drawn: list[tuple[int, Tensor, list[Tensor | None]]], weights: Weights) -> Weights:
    """The sums that K is made of, float64, those of each layer by its number."""
    sums: Weights = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    for chunk, signs, places in drawn:
        with torch.no_grad():
            values = fit.branch.run(chunk, weights)
        zeros = {m.layer.node: torch.zeros_like(values[m.layer.node], requires_grad=True) for m in fit.members}
        with torch.enable_grad():
            y = fit.output(chunk, weights, zeros)
        grads = torch.autograd.grad(y, list(zeros.values()), signs.to(y.dtype) * 2 - 1, allow_unused=True)
        for i, (m, g, at) in enumerate(zip(fit.members, grads, places, strict=True)):
            r = m.layer.rows(values[fit.branch.flow.inputs(m.layer.node)[m.layer.source]], at).double()
            add(f"gram {i}", r.mT @ r)
            add(f"seen {i}", torch.tensor(r.shape[1]))
            if g is not None:
                add(f"out {i}", m.layer.outputs(g, None).double().square().sum(1))
    return sums


def _curvature(fit: BranchFit, m: Member, gram: Tensor, out: Tensor, weights: Weights) -> Curvature:
    dtype = weights[m.layer.weight].dtype
    ridge = fit.ridge * (float(gram.diagonal(dim1=-2, dim2=-1).mean()) or 1.0)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(gram.shape[-1], dtype=torch.float64))
    each = out.expand(m.layer.matrix(weights[m.layer.weight]).shape[:2])
    return Curvature(m, inverse.to(dtype), ridge, each.clamp_min(max(1e-3 * float(each.mean()), 1e-12)).to(dtype))


def conjugate_gradients(product: Callable[[Weights], Weights], right: Weights, solve: Callable[[Weights], Weights], steps: int) -> Weights:
    """Preconditioned conjugate gradients from 0 (Hestenes & Stiefel 1952)."""
    x = {n: torch.zeros_like(v) for n, v in right.items()}
    r = dict(right)
    z = solve(r)
    p, rz = dict(z), _dot(r, z)
    first = rz
    for _ in range(steps):
        if not rz > 1e-6 * first:
            break
        ap = product(p)
        bend = _dot(p, ap)
        if not bend > 0:
            break
        for n in x:
            x[n] = x[n] + rz / bend * p[n]
            r[n] = r[n] - rz / bend * ap[n]
        z = solve(r)
        new = _dot(r, z)
        p, rz = {n: z[n] + new / rz * p[n] for n in p}, new
    return x


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in a)


def gauss_newton(fit: BranchFit, fitting: list[int], held: list[int], random: torch.Generator) -> tuple[Weights, float, float]:
    """Improve the weights of a branch.

    Args:
        fitting, held: chunks to fit to, and to judge by.

    Returns the weights and the summed squared error on the held-out chunks before and after; no step was taken where they are equal.
    """
    weights = fit.start()
    before = best = fit.error(held, weights)
    n = fit.chunks_for(fit.wanted(fit.some).numel(), len(fitting))
    if not n:
        return weights, before, before
    for _ in range(ROUNDS):
        chunks = [fitting[i] for i in torch.randperm(len(fitting), generator=random)[:n].tolist()]
        step = _step(fit, chunks, weights, random)
        tried = [{k: w + s * step[k] for k, w in weights.items()} for s in STEP_SIZES]
        errors = [fit.error(held, w) for w in tried]
        smallest = min(errors)
        if not smallest < best:
            break
        weights, best = tried[errors.index(smallest)], smallest
    return weights, before, best


def _step(fit: BranchFit, chunks: list[int], weights: Weights, random: torch.Generator) -> Weights:
    """One linearised least-squares problem, solved."""
    parts = curvature(fit, chunks[:_PROBED], weights, random)
    rows = len(chunks) * fit.size

    def product(d: Weights) -> Weights:
        out = {n: v / rows for n, v in fit.product(chunks, weights, d).items()}
        for k in parts:
            k.add_ridge(d, out)
        return out

    def solve(r: Weights) -> Weights:
        out: Weights = {}
        for k in parts:
            k.solve(r, out)
        return {n: out[n] for n in r}

    right = {n: v / rows for n, v in fit.gradient(chunks, weights).items()}
    return conjugate_gradients(product, right, solve, STEPS)
