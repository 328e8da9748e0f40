"""Everything that is asked of the user's data, each statistic computed when it is first needed, and once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from secateur.calibrate.activations import Activity, Inputs, Observer
from secateur.calibrate.batches import Batch, read
from secateur.calibrate.gradients import Gradients, curvature, gradients
from secateur.calibrate.loss import Loss
from secateur.calibrate.replay import Replay
from secateur.errors import DataError
from secateur.processes import of, share
from secateur.trace import Graph


class Calibration:
    """Statistics of one model on one set of batches, for the groups of one graph. Sums are kept, never the data; the model
    is left as it was.

    Args:
        model, graph: a model and its trace.
        data: batches (a tensor, `(inputs, labels)`, or a dict of keyword inputs, with "labels" where there are any), on the
            model's device and in its dtype. Read once for each statistic, so an iterator that can be read only once is refused.
            `secateur.processes.Shared(data)`: each of several processes runs its share, and all have the same statistics.
        args, kwargs: the example inputs of the trace; `args` says how many entries of a tuple are inputs.
        loss: `loss(outputs, batch)` -> a scalar tensor, the mean over the batch; the batch comes as `data` gave it. By
            default what the model returns as `.loss`, else cross entropy with the labels.
        seed: for whoever draws samples.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        data: Iterable[Any],
        *,
        args: tuple,
        kwargs: Mapping[str, Any] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ):
        self.model, self.graph, self.data, self.loss, self.seed = model, graph, data, loss, seed
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        self.processes = of(data)

    def batches(self) -> Iterator[Batch]:
        """The data from its beginning; of data that processes share those batches that this one runs.

        Raises:
            DataError: data that can be read only once, that breaks off, or a batch that holds no input.
            ProcessError: the processes were not given the same.
        """
        if isinstance(self.data, Iterator):
            raise DataError(
                f"data is a {type(self.data).__name__}, which can be read once, and every statistic reads it anew.\n"
                "  Pass something that starts over: a list of batches or a DataLoader."
            )
        return share(read(self.data, self.args, self.kwargs), self.processes)

    @property
    def activations(self) -> dict[str, Activity]:
        """What every group's units give, on average over the data. One forward pass, shared with `inputs`.

        Raises:
            DataError: a batch that does not run, or activations that are not finite (the layer and the batch are named).
        """
        return self._seen[0]

    @property
    def inputs(self) -> dict[str, list[Inputs]]:
        """What every layer that contracts a group takes in of it. Raises as `activations`."""
        return self._seen[1]

    @cached_property
    def _seen(self) -> tuple[dict[str, Activity], dict[str, list[Inputs]]]:
        observer = Observer(self.graph)
        with self.processes.watched():
            observer.read(Replay(self.model, self.graph, self.args, self.kwargs), self.batches(), self.processes)
        return observer.activity(), observer.taken_in()

    @cached_property
    def gradients(self) -> Gradients:
        """One forward and backward pass.

        Raises:
            DataError: no labels and no `loss`, or a loss or gradient that is not finite.
        """
        with self.processes.watched():
            return gradients(self.model, self.graph, self.batches(), self.loss, self.processes)

    @cached_property
    def hessian_gradient(self) -> dict[str, Tensor]:
        """H g by parameter name: the Hessian of the mean loss times its gradient. Raises as `gradients`."""
        along = self.gradients.mean
        with self.processes.watched():
            return curvature(self.model, self.batches(), self.loss, along, self.processes)
