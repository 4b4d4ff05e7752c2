"""The node pools of a cluster: what a step with an accelerator asks of Kubernetes.

`pools.yaml` names them; on a cluster it lies in the config map `tuneline-pools`, elsewhere
`TUNELINE_POOLS` names a file, and without one the file beside this module applies. A pool is
resolved on a CPU node when a run begins, so that labels and prices change without a new package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from tuneline.errors import UsageError, did_you_mean
from tuneline.settings import Settings

VARIABLE: Final = "TUNELINE_POOLS"
_QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
_SHIPPED: Final = Path(__file__).with_name("pools.yaml")


class Toleration(Settings):
    """Of a taint, with Kubernetes' own keys."""

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    tolerationSeconds: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _is_one(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError("operator Exists takes no value: leave it out, or use Equal")
        if self.operator == "Equal" and not self.key:
            raise ValueError("operator Equal needs a key")
        return self


class Pool(Settings):
    """One kind of node."""

    accelerator: str = Field(
        default="", pattern=r"^$|^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*)$"
    )
    """Resource name, as nvidia.com/gpu; unset: a pool of CPUs."""
    count: int = Field(default=0, ge=0, le=64)
    """Accelerators for one step."""
    cpu: str = Field(default="1", pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """Cores that a step asks for."""
    memory: str = Field(default="4Gi", pattern=_QUANTITY)
    """Memory that a step asks for and may use."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes."""
    tolerations: tuple[Toleration, ...] = ()
    """Of the nodes' taints."""
    node_affinity: dict[str, Any] = Field(default_factory=dict)
    """`nodeAffinity` as Kubernetes has it."""
    shm: str = Field(default="16Gi", pattern=_QUANTITY)
    """Most of /dev/shm, through which data loader and NCCL exchange tensors; counts as memory. KFP
    takes no parameter for it: a package has the largest of all pools."""
    spot: bool = False
    """Nodes can be taken away at any time: a step goes on from its last checkpoint."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of the nodes that one step takes, in the currency of your bill."""
    accelerator_memory_gb: float | None = Field(default=None, gt=0)
    """Of one accelerator, in GB (1e9 bytes)."""

    @field_validator("node_affinity")
    @classmethod
    def _has_known_terms(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = (
            "requiredDuringSchedulingIgnoredDuringExecution",
            "preferredDuringSchedulingIgnoredDuringExecution",
        )
        if unknown := sorted(value.keys() - set(known)):
            raise ValueError(f"{unknown[0]} is unknown; terms are {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _counts_what_it_names(self) -> Pool:
        if bool(self.accelerator) != bool(self.count):
            raise ValueError(
                "accelerator and count belong together: name both, or neither for a pool of CPUs"
            )
        if self.accelerator and not (self.node_selector or self.node_affinity):
            raise ValueError(
                "an accelerator needs node_selector or node_affinity, or any node that has one of "
                "whatever kind would do"
            )
        return self

    def placement(self) -> dict[str, Any]:
        """What the setters of KFP take. Resources are strings: of a number, KFP's driver makes
        nothing, and the step would run without an accelerator."""
        return {
            "accelerator": self.accelerator or "nvidia.com/gpu",
            "count": str(self.count),
            "one": str(min(self.count, 1)),
            "cpu": self.cpu,
            "memory": self.memory,
            "node_selector": dict(self.node_selector),
            "tolerations": [
                {k: v for k, v in toleration.model_dump().items() if v not in ("", None)}
                for toleration in self.tolerations
            ],
            "node_affinity": dict(self.node_affinity),
        }  # fmt: skip


class Pools(Settings):
    """All of a cluster."""

    pools: dict[str, Pool] = Field(min_length=1)
    """By name, the default first."""

    @property
    def names(self) -> list[str]:
        """The default first."""
        return list(self.pools)

    @property
    def without_accelerator(self) -> str:
        """The first pool of CPUs, or the first of all: a single machine has what it has."""
        return next((name for name, pool in self.pools.items() if not pool.count), self.names[0])

    @property
    def largest_shm(self) -> str:
        """Of all pools."""
        return max((pool.shm for pool in self.pools.values()), key=bytes_of)

    def named(self, name: str) -> Pool:
        """The pool of that name.

        Raises:
            UsageError: there is none.
        """
        if name not in self.pools:
            raise UsageError(
                f"gpu_pool '{name}' is unknown; pools are {', '.join(self.pools)}."
                f"{did_you_mean(name, self.names)}"
            )
        return self.pools[name]


_FACTORS: Final = {
    "": 1.0, "m": 1e-3, "k": 1e3, "Ki": 2.0**10, "M": 1e6, "Mi": 2.0**20, "G": 1e9, "Gi": 2.0**30,
    "T": 1e12, "Ti": 2.0**40,
}  # fmt: skip


def bytes_of(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    number = quantity.rstrip("mkKMGTi")
    return float(number) * _FACTORS[quantity.removeprefix(number)]


def read(path: Path | None = None) -> Pools:
    """The pools of a file; of `TUNELINE_POOLS`, or of those that ship, where none is given.

    Raises:
        UsageError: no such file, or faults in it.
    """
    path = path or Path(os.environ.get(VARIABLE) or _SHIPPED)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"pools file {path} does not exist: on a cluster apply the config map tuneline-pools "
            f"(manifests/base), elsewhere set {VARIABLE} to a file, or unset it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(f"pools file {path}", error) from error
    return parse(text, f"pools file {path}")


def parse(text: str, source: str) -> Pools:
    """The pools of a file's text.

    Args:
        text: YAML.
        source: where it is from, as a fault names it.

    Raises:
        UsageError: faults in it.
    """
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _unreadable(source, error) from error
    if not isinstance(values, Mapping):
        raise UsageError(f"{source} must hold a mapping with `pools`")
    try:
        return Pools.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc'])}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise UsageError(f"{source}:\n" + "\n".join(f"- {f}" for f in faults)) from error


def _unreadable(source: str, error: Exception) -> UsageError:
    return UsageError(f"{source} can't be read: {' '.join(str(error).split())}")
