"""What a step needs around it: retries, environment, later pools and accelerators.

A cluster loses pods for reasons that a second attempt cures. A laptop does not, and there a
stated error must end the run at once: so retries belong to the cluster's placement only.
"""

from __future__ import annotations

from typing import Any, Protocol

from kfp import kubernetes
from kfp.dsl import PipelineTask

RETRIES = 3
BACKOFF_MAX_DURATION = "604800s"
"""A spot pod can be reclaimed long after a step began. The backoff's clock starts with the first
attempt, and its default of one hour would end the retries of every longer step."""


MODEL_CACHE = "tuneline-model-cache"
"""The volume claim of `manifests/base`."""
CACHE_PATH = "/var/cache/tuneline"
"""`TUNELINE_CACHE` of the image."""
CHECKPOINTS = "tuneline-checkpoints"
"""The volume claim of `manifests/base` that a retried training step goes on from."""
CHECKPOINTS_PATH = "/var/lib/tuneline/checkpoints"
_TRAINING_TASK = "finetune"
"""What the names of the components that train begin with."""


class Place(Protocol):
    """Gives a task of a pipeline what it needs."""

    def __call__(self, task: PipelineTask) -> None: ...


def on_cluster(task: Any) -> None:
    """Retries, volumes, and the MLflow server of the namespace's config map and secret."""
    task.set_retry(
        num_retries=RETRIES,
        backoff_duration="30s",
        backoff_factor=2.0,
        backoff_max_duration=BACKOFF_MAX_DURATION,
    )
    kubernetes.use_config_map_as_env(
        task, "tuneline", {"mlflow_tracking_uri": "MLFLOW_TRACKING_URI"}, optional=True
    )
    kubernetes.mount_pvc(task, pvc_name=MODEL_CACHE, mount_path=CACHE_PATH)
    if task.name.startswith(_TRAINING_TASK):
        kubernetes.mount_pvc(task, pvc_name=CHECKPOINTS, mount_path=CHECKPOINTS_PATH)
        task.set_env_variable("TUNELINE_CHECKPOINTS", CHECKPOINTS_PATH)
    kubernetes.use_secret_as_env(
        task,
        "tuneline-mlflow",
        {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
        optional=True,
    )


def on_this_machine(task: Any) -> None:
    """A process inherits its environment, and nothing is tried twice."""
    del task
