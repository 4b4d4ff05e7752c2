"""What a step needs around it: a node pool, retries, time limits, volumes, secrets, a queue.

A cluster loses pods for reasons that a second attempt cures. A laptop does not, and there a
stated error must end the run at once: so retries belong to the cluster's placement only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from tuneline import by_uri
from tuneline.checkpoints_root import ROOT_VARIABLE, remote_root
from tuneline.finetune.methods import METHODS
from tuneline.images import CPU, CPU_IMAGE_VARIABLE, GPU
from tuneline.pools import VARIABLE as POOLS_VARIABLE
from tuneline.tracking import CLUSTER_URI_VARIABLE

RETRIES: Final = 3
TRAINING_RETRIES: Final = 30
"""A training goes on from its checkpoint, and a spot node may be reclaimed many times in a week.
With the doubling pauses of the other steps, the fifteenth would be most of it: these stay equal."""
BACKOFF_MAX_DURATION: Final = "604800s"
"""A spot pod can be reclaimed long after a step began. The backoff's clock starts with the first
attempt, and its default of one hour would end the retries of every longer step."""
TIMEOUT_SECONDS: Final = 24 * 3600
"""Of a pod without an accelerator: longer than any step, shorter than for ever."""
ACCELERATED_TIMEOUT_SECONDS: Final = 7 * 24 * 3600
"""Of a pod with one; the next attempt goes on from a checkpoint. Both count from when a node has
taken the pod: what waits in a queue is ended by the run's deadline alone."""
_KEPT_SECONDS: Final = 30 * 24 * 3600
RUN_CONFIG: Final = dsl.PipelineConfig(
    active_deadline_seconds=14 * 24 * 3600,
    ttl_seconds_after_finished=_KEPT_SECONDS,
    ttl_seconds_after_success=_KEPT_SECONDS,
    ttl_seconds_after_failure=_KEPT_SECONDS,
)
"""Of every pipeline. What a finished run leaves in Kubernetes goes after 30 days; its record in KFP
and MLflow stays. All three are set: KFP's controller has defaults of an hour for success and
failure, which Argo takes before that for both."""
USER: Final = 10001
"""Of our images. Said here too, an image of another user can't run as root."""
_REQUESTS: Final = {
    "prepare-data": ("1", "2Gi"),
    "merge": ("1", "4Gi"),
    "promote": ("500m", "2Gi"),
}
"""CPU and memory of steps without an accelerator, by what their names begin with: so much is kept
free for them, and they take more where there is more. Measured peaks: preparing 1.2 GB, merging
1.36B parameters with its proof 2.0 GB; a promotion loads the model."""
_SMALL_REQUEST: Final = ("250m", "1Gi")

MODEL_CACHE: Final = "tuneline-model-cache"
"""The volume claim of `manifests/base`."""
CACHE_PATH: Final = "/var/cache/tuneline"
"""`TUNELINE_CACHE` of the image."""
CHECKPOINTS: Final = "tuneline-checkpoints"
"""The volume claim of `manifests/base` that a retried training step goes on from."""
CHECKPOINTS_PATH: Final = "/var/lib/tuneline/checkpoints"
POOLS: Final = "tuneline-pools"
"""The config map with `pools.yaml`."""
POOLS_PATH: Final = "/etc/tuneline"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
QUEUE: Final = "tuneline"
"""KFP takes no parameter in a label: one queue for all pools, whose flavors match by node label.
Where Kueue is not installed, the label does nothing."""
_SECRETS: Final[dict[str, dict[str, str]]] = {
    "tuneline-mlflow": {
        "username": "MLFLOW_TRACKING_USERNAME",
        "password": "MLFLOW_TRACKING_PASSWORD",
    },
    "tuneline-hub": {"token": "HF_TOKEN"},
    "tuneline-s3": {
        "access_key_id": "AWS_ACCESS_KEY_ID",
        "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    },
}
"""Secret -> its keys and the variables that they become. All of them are optional."""
_SETTINGS: Final = {
    "mlflow_tracking_uri": CLUSTER_URI_VARIABLE,
    "s3_endpoint_url": "AWS_ENDPOINT_URL",
    "s3_region": "AWS_DEFAULT_REGION",
    "weights_root": by_uri.VARIABLE,
}
"""Keys of the config map `tuneline` and the variables that they become. None may have a name that
KFP's MLflow plugin gives a value to: `tuneline lint` says why."""
_TRAINING_TASK: Final = "finetune"
"""What the names of the components that train begin with."""
_PARALLEL_TASKS: Final = tuple(
    f"finetune-{name.replace('_', '-')}"
    for name in ("chosen", *(method.name for method in METHODS))
)
_POOL_TASK: Final = "resolve-pool"

Pool = Mapping[str, Any]
"""The outputs of `resolve_pool`."""


class Place(Protocol):
    """Gives a task of a pipeline what it needs.

    Args:
        task: of the pipeline.
        pool: where it runs if it needs an accelerator.
    """

    def __call__(self, task: PipelineTask, pool: Pool | None = None) -> None: ...


def on_cluster(shm: str) -> Place:
    """Placement for a package; `TUNELINE_CHECKPOINTS=s3://...` replaces the volume of that name.

    Args:
        shm: most of /dev/shm for steps with an accelerator, as `16Gi`.
    """

    def place(task: Any, pool: Pool | None = None) -> None:
        task.set_caching_options(False)  # docs/decisions/0004-no-kfp-caching.md
        trains = task.name.startswith(_TRAINING_TASK)
        task.set_retry(
            num_retries=TRAINING_RETRIES if trains else RETRIES,
            backoff_duration="60s" if trains else "30s",
            backoff_factor=1.0 if trains else 2.0,
            backoff_max_duration=BACKOFF_MAX_DURATION,
        )
        kubernetes.set_security_context(task, run_as_user=USER, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, "tuneline", _SETTINGS, optional=True)
        for secret, keys in _SECRETS.items():
            kubernetes.use_secret_as_env(task, secret, keys, optional=True)
        kubernetes.mount_pvc(task, pvc_name=MODEL_CACHE, mount_path=CACHE_PATH)
        if trains:
            if (root := remote_root()) is None:
                kubernetes.mount_pvc(task, pvc_name=CHECKPOINTS, mount_path=CHECKPOINTS_PATH)
            task.set_env_variable(ROOT_VARIABLE, root or CHECKPOINTS_PATH)
        if task.name.startswith(_POOL_TASK):
            kubernetes.use_config_map_as_volume(task, POOLS, POOLS_PATH, optional=True)
            task.set_env_variable(POOLS_VARIABLE, f"{POOLS_PATH}/pools.yaml")
        task.set_env_variable("TUNELINE_IMAGE", GPU)
        task.set_env_variable(CPU_IMAGE_VARIABLE, CPU)
        if pool is None:
            fitting = (r for name, r in _REQUESTS.items() if task.name.startswith(name))
            cpu, memory = next(fitting, _SMALL_REQUEST)
            task.set_cpu_request(cpu).set_memory_request(memory)
            kubernetes.set_timeout(task, TIMEOUT_SECONDS)
        else:
            _use(task, pool, shm)

    return place


def _use(task: Any, pool: Pool, shm: str) -> None:
    # training has a process for each accelerator, everything else uses one
    count = pool["count"] if task.name.startswith(_PARALLEL_TASKS) else pool["one"]
    task.set_accelerator_type(pool["accelerator"]).set_accelerator_limit(count)
    task.set_cpu_request(pool["cpu"])
    task.set_memory_request(pool["memory"]).set_memory_limit(pool["memory"])
    # In a loop or a condition, what only a resource or a label refers to would not be handed in.
    task.register_pipeline_channels(list(pool.values()))
    kubernetes.add_node_selector_json(task, pool["node_selector"])
    kubernetes.add_toleration_json(task, pool["tolerations"])
    kubernetes.add_node_affinity_json(task, pool["node_affinity"])
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=shm)
    kubernetes.add_pod_label(task, QUEUE_LABEL, QUEUE)
    kubernetes.set_timeout(task, ACCELERATED_TIMEOUT_SECONDS)


def on_this_machine(task: Any, pool: Pool | None = None) -> None:
    """A process inherits its environment, and nothing is tried twice."""
    del pool
    task.set_caching_options(False)
