"""One process, or several that gather statistics together.

All are given the same data, the same model and the same options. A part of the data (a batch, a chunk of rows) is run by one of them, and
what they add up meets where a statistic is closed:

    total     sums over a share become sums over everything
    lent      what one process computed is what all go on with
    gathered  named tensors, each computed by one process, are in all of them

Before anything is exchanged all of them say what they are about to exchange and whether they are well. So a process that fails, or that
goes another way than the others, is an error in words in all of them and nobody waits for it.

    torch.distributed.init_process_group("gloo")
    sc.prune(model, (x,), sc.MACs("50%"), data=Shared(batches))
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError, ProcessError

TURN = 8  # parts after which the order of processes moves on
PATIENCE = timedelta(days=1)  # one process may measure or save while the others wait; one that is gone is noticed at once

Tensors = dict[str, Tensor]
Value = TypeVar("Value")


class Alone:
    """This process alone: every part is its own, and nothing has to be exchanged."""

    rank, world = 0, 1

    def mine(self, part: int) -> bool:
        """Whether this process runs part `part` of the data, counted from 0."""
        return True

    def total(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        """Sums over all processes, by name; what a process has not seen counts as 0."""
        return dict(own)

    def lent(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        """The tensors of the first process that has any."""
        return dict(own)

    def gathered(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        """The tensors of all processes; no name is in two of them."""
        return dict(own)

    def fact(self, what: str, own: Value) -> Value:
        """The value of process 0, which JSON can say."""
        return own

    def same(self, what: str, own: str, otherwise: str) -> None:
        """
        Raises:
            ProcessError: `own` is not the same in all processes; `otherwise` says what to do about it.
        """

    def together(self, what: str, make: Callable[[], Value]) -> Value:
        """`make()`; where it raises a RuntimeError in one process, all raise one."""
        return make()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An error inside is told to the other processes, which stop too, unless all have it."""
        yield


ALONE = Alone()


class Processes(Alone):
    """All processes of the default group of `torch.distributed`. Statistics meet on CPUs over gloo, whatever backend that group has.

    Raises:
        InputError: `torch.distributed` is not initialised.
    """

    def __init__(self) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise InputError(
                "data is to be shared out over processes, and torch.distributed is not initialised.\n"
                "  Call torch.distributed.init_process_group('gloo') first, in every process, or pass the data as it is."
            )
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.broken = False

    def mine(self, part: int) -> bool:
        return owner(part, self.world) == self.rank

    def total(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        shapes: dict[str, Any] = {}
        for rank, found in enumerate(self._meet(f"sums of {what}", _shapes(own))):
            odd = next((n for n, form in found.items() if shapes.setdefault(n, form) != form), None)
            if odd is not None:
                self.broken = True
                raise ProcessError(
                    f"{odd!r} of the sums of {what} is {found[odd]} in process {rank} of {self.world}, and {shapes[odd]} in one before it.\n"
                    "  Give all processes the same model, data and options."
                )
        out = {}
        for name, form in shapes.items():
            whole = own[name].detach().to("cpu", copy=True).contiguous() if name in own else _empty(form).zero_()
            self._run(partial(distributed.all_reduce, whole, group=self.group))
            out[name] = whole.to(own[name].device) if name in own else whole
        return out

    def lent(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        met = self._meet(f"{what} of one process", _shapes(own))
        source = next((rank for rank, shapes in enumerate(met) if shapes), 0)
        return self._spread(met[source], source, own)

    def gathered(self, what: str, own: Mapping[str, Tensor]) -> Tensors:
        out: Tensors = {}
        for source, shapes in enumerate(self._meet(f"{what} of each process", _shapes(own))):
            out |= self._spread(shapes, source, own)
        return out

    def fact(self, what: str, own: Value) -> Value:
        return self._meet(what, own if self.rank == 0 else None)[0]

    def same(self, what: str, own: str, otherwise: str) -> None:
        met = self._meet(f"a comparison of {what}", own)
        odd = next((rank for rank, other in enumerate(met) if other != met[0]), None)
        if odd is not None:
            raise ProcessError(f"{what} of process {odd} of {self.world} differs from that of process 0.\n  {otherwise}")

    def together(self, what: str, make: Callable[[], Value]) -> Value:
        said: str | None = None
        try:
            found = make()
        except RuntimeError as error:
            said = str(error)
        first = next((s for s in self._meet(f"whether {what} can be had", said) if s is not None), None)
        if first is not None:
            raise RuntimeError(first)
        return found

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            if not self.broken:
                said = (str(error).strip().splitlines() or [""])[0]
                with suppress(ProcessError):  # the others may be gone: what is raised is what happened here
                    self._meet("an error", None, f"{type(error).__name__}: {said}")
            raise

    # ------------------------------------------------------------ how they meet
    def _meet(self, what: str, facts: Any, failed: str = "") -> list[Any]:
        """The facts of every process, in their order.

        Raises:
            ProcessError: one failed or is gone, or they are not at the same place. After that nothing can be exchanged any more.
        """
        if self.broken:
            raise ProcessError("the processes went apart before this.\n  The first error says why; start all of them again.")
        own = torch.frombuffer(bytearray(json.dumps([what, failed, facts], default=str).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._run(partial(distributed.all_gather, sizes, torch.tensor([len(own)]), group=self.group))
        padded = [torch.zeros(max(int(s) for s in sizes), dtype=torch.uint8) for _ in sizes]
        mine = padded[0].clone()
        mine[: len(own)] = own
        self._run(partial(distributed.all_gather, padded, mine, group=self.group))
        met = [json.loads(bytes(p[: int(s)].tolist())) for p, s in zip(padded, sizes, strict=True)]
        kinds = {one[1].partition(":")[0] for one in met}
        if failed and len(kinds) == 1:
            return []  # all have it, so all do the same about it
        self.broken = bool(kinds - {""}) or len({one[0] for one in met}) > 1
        if self.broken and not failed:
            raise ProcessError(_apart(met, self.world))
        return [one[2] for one in met]

    def _spread(self, shapes: Mapping[str, Any], source: int, own: Mapping[str, Tensor]) -> Tensors:
        out = {}
        for name, form in shapes.items():
            value = own[name].detach().to("cpu", copy=True).contiguous() if self.rank == source else _empty(form)
            raw = value.reshape(-1).view(torch.uint8)  # bytes: gloo does not know every dtype
            self._run(partial(distributed.broadcast, raw, src=source, group=self.group))
            out[name] = value.to(own[name].device) if name in own else value
        return out

    def _run(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # what the backend raises where a connection is lost
            self.broken = True
            raise ProcessError(
                f"process {self.rank} of {self.world} lost its connection to the others: one of them has ended.\n"
                "  Its own message says why. Put that right, and start all of them again."
            ) from error


def owner(part: int, world: int) -> int:
    """Which process runs a part: one after the other, and of every eighth part, by which fits are judged, one after the other as well."""
    turn = next(k for k in range(world) if gcd(TURN + k, world) == 1)
    return (part + part // TURN * turn) % world


def _apart(met: list[Any], world: int) -> str:
    failed = next(((rank, one[1]) for rank, one in enumerate(met) if one[1]), None)
    if failed:
        return f"process {failed[0]} of {world} stopped: {failed[1]}\n  All stop with it: put that right, and start them again."
    odd = next(rank for rank, one in enumerate(met) if one[0] != met[0][0])
    return (
        f"process 0 of {world} is at {met[0][0]!r} and process {odd} at {met[odd][0]!r}, so they do not do the same work.\n"
        "  Give all processes the same model, data, options and versions."
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}


def _empty(form: Any) -> Tensor:
    shape, dtype = form
    return torch.empty(shape, dtype=getattr(torch, dtype))


# ---------------------------------------------------------------- data that processes share
class Shared:
    """Data that all processes are given whole, in the same order, and run in shares: `prune(..., data=Shared(batches))`, likewise
    `sparsify`, `mend` and `sweep`. All end with the same plan and the same weights.

    Args:
        data: batches, something that can be gone through more than once.
        processes: as another `Shared` has them; by default all of `torch.distributed`.

    Raises:
        InputError: `torch.distributed` is not initialised, or data that can be read only once.
    """

    def __init__(self, data: Iterable[Any], processes: Alone | None = None):
        if isinstance(data, Iterator):
            raise InputError(f"data is a {type(data).__name__}, which can be read once.\n  Pass something that starts over: a list or a DataLoader.")
        self.data, self.processes = data, processes if processes is not None else Processes()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def of(data: Any) -> Alone:
    """The processes that share `data`; this one alone where nothing is said."""
    return getattr(data, "processes", None) or ALONE


def share(items: Iterable[Value], processes: Alone) -> Iterator[Value]:
    """Of items that all processes go through to the end those that this one runs.

    Raises:
        ProcessError: the processes were not given the same.
    """
    if processes.world == 1:
        yield from items
        return
    seen = Fingerprint()
    for number, item in enumerate(items):
        seen.add(item)
        if processes.mine(number):
            yield item
    check_data(processes, seen)


class Fingerprint:
    """A checksum of tensors in their order."""

    def __init__(self) -> None:
        self.items = self.sum = 0

    def add(self, item: Any) -> None:
        self.items += 1
        for t in tree_leaves(getattr(item, "given", item)):  # of a `Batch` what the data set gave
            if isinstance(t, Tensor) and t.numel():
                self.sum = zlib.crc32(memoryview(_bytes(t)), self.sum)

    def __str__(self) -> str:
        return f"{self.items} {self.sum}"


def check_data(processes: Alone, seen: Fingerprint) -> None:
    """
    Raises:
        ProcessError: the processes were not given the same.
    """
    processes.same("the data", str(seen), (
        "Every process is to be given all batches in the same order, and runs its share of them: fix the seed of what shuffles, and leave "
        "out samplers that give each process rows of its own."
    ))  # fmt: skip


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, shapes, dtypes and every bit."""
    found = hashlib.sha256()
    for name, t in tensors.items():
        found.update(f"{name} {tuple(t.shape)} {t.dtype};".encode())
        found.update(memoryview(_bytes(t)))
    return found.hexdigest()


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def launched() -> int:
    """How many processes `torchrun` started; `WORLD_SIZE` says so."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def started() -> Iterator[Alone]:
    """The processes that `torchrun` started, for one command; else this process alone.

    Raises:
        ProcessError: one of them fails; then all do.
    """
    if launched() <= 1:
        yield ALONE
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        processes = Processes()
        with processes.watched():
            yield processes
            processes.same("the end", "", "")  # so that an error of one that writes is an error of all
    finally:
        distributed.destroy_process_group()
