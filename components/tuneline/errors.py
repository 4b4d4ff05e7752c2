"""Every error that a user can cause, and the exit code that it ends a step with.

    TunelineError                 1   the step failed for a stated reason
    |-- UsageError                2   wrong command line
    |-- RecipeError               2   wrong recipe, all faults at once
    |-- DataError                 1   input rows, files or chat template
    |-- ModelError                1   base model folder, revision, format
    |-- ArtifactError             1   a step's input is missing, damaged or of another kind
    |-- MethodError               1   the method does not fit the model
    |-- TrainingError             1   training can't go on
    |-- MergeError                1   merged weights are not what the adapter computes
    |-- StorageError              1   object store
    |-- ClusterError              1   Kubeflow Pipelines, or a run there
    `-- RegistryError             1   MLflow tracking or registry
        `-- ConflictError         1   another promotion was first

A message says what was wrong with its value, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TERMINATED = 143


class TunelineError(Exception):
    """Root of the tree; `exit_code` is what the process ends with."""

    exit_code = EXIT_FAILED


class UsageError(TunelineError):
    """The command line can't be carried out as written."""

    exit_code = EXIT_USAGE


class RecipeError(TunelineError):
    """The recipe has faults.

    Attributes:
        faults: one sentence each, every one that was found.
    """

    exit_code = EXIT_USAGE

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        head = f"{source}: {len(faults)} fault{'s' if len(faults) != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {fault}" for fault in faults)]))


class DataError(TunelineError):
    """Input rows, files, or the chat template that renders them."""


class ModelError(TunelineError):
    """The base model can't be used."""


class ArtifactError(TunelineError):
    """An artifact is missing, damaged, or not of the kind that the step reads."""


class MethodError(TunelineError):
    """The fine-tuning method and the model or its options don't fit."""


class TrainingError(TunelineError):
    """Training can't go on."""


class MergeError(TunelineError):
    """The adapter can't be merged, or the merged model computes something else."""


class StorageError(TunelineError):
    """An object store can't be reached, refuses, or holds something else."""


class ClusterError(TunelineError):
    """Kubeflow Pipelines can't be reached or refuses, or a run there failed."""


class RegistryError(TunelineError):
    """MLflow tracking or the model registry."""


class ConflictError(RegistryError):
    """The champion is not the expected one: another promotion or rollback was first."""


class Terminated(BaseException):
    """SIGTERM arrived; the message, if any, says what was saved and what to do.

    Not a `TunelineError`, so that nothing takes it for a failure to handle.
    """


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest allowed word, or an empty string."""
    matches = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
