"""Every error this package raises on purpose.

    SecateurError
    ├── InputError      an argument that cannot be meant (also a ValueError)
    ├── ModelError      a model that cannot be found, loaded or run
    ├── DataError       data that is missing, empty or of the wrong shape
    ├── CaptureError    torch.export could not follow the model; the message names the line
    ├── AxisError       the axes of a graph contradict each other, or a rule of an operator is wrong
    ├── PlanError       a plan that a graph cannot obey
    │   └── TargetError a budget that cannot be met; the message names the nearest one that can
    ├── CutError        the cut could not be carried out; the model given is unchanged
    ├── TrainingError   a loss that is not finite; the message names the step and the layer
    ├── ProofError      the cut model does not compute what the masked original computes
    ├── ProcessError    processes that share their work went apart: one failed, or they were not given the same
    └── FormatError     a saved folder that is damaged, incomplete, altered or not ours

A message is three facts and an exit: what was found, where, why that cannot be, and what to do about it.
"""

from __future__ import annotations


class SecateurError(Exception):
    """Base of all of them: ``except SecateurError`` catches what this package refuses, and nothing else."""


class InputError(SecateurError, ValueError):
    """An argument that cannot be meant: an unknown name, a percentage outside 0..100, inputs of the wrong shape."""


class ModelError(SecateurError):
    """A model that cannot be found, loaded or run: a bad name, weights that do not fit, NaN in a parameter."""


class DataError(SecateurError):
    """Data that is missing, empty, or not of the shape the model takes."""


class CaptureError(SecateurError):
    """``torch.export`` could not follow the model's forward."""


class AxisError(SecateurError):
    """The axes of a graph contradict each other."""


class PlanError(SecateurError):
    """A plan that a graph cannot obey."""


class TargetError(PlanError):
    """A budget that cannot be met with the units the graph leaves free."""


class CutError(SecateurError):
    """The cut could not be carried out. The model that was given is unchanged."""


class TrainingError(SecateurError):
    """The loss or a gradient is not finite. The model is as it was at the last checkpoint."""


class ProofError(SecateurError):
    """The cut model does not compute what the masked original computes. No result is returned."""


class ProcessError(SecateurError):
    """Processes that share their work went apart. No result is returned in any of them."""


class FormatError(SecateurError):
    """A saved folder that is damaged, incomplete, altered, or written by something else."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Of what an error of somebody else says; '' for one that says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:most]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python or of torch, says that there is no more memory: then nothing is wrong with what was given."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first_line(error, 1000)
