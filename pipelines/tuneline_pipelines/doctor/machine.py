"""The interpreter, the installed packages and the accelerators. Nothing heavy is imported: versions
come from the packages' metadata, accelerators from their drivers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OLDEST_PYTHON: Final = (3, 11)
_KFP: Final = ("kfp", "kfp-kubernetes")
_SHOWN: Final = ("torch", "transformers", "peft", "mlflow")
_DRIVER_SECONDS: Final = 10
"""Without persistence mode, nvidia-smi wakes every device first."""


def python() -> Iterator[Finding]:
    """Its version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        yield error("python", found, "tuneline needs 3.11 or newer")
    else:
        yield ok("python", f"{found} ({sys.executable})")


def packages() -> Iterator[Finding]:
    """Whether each package that tuneline asks for is there, in the range that it is written for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("tuneline") or ()]
    except metadata.PackageNotFoundError:
        yield warning(
            "packages",
            "tuneline is not installed, so what it needs is not recorded",
            "install it, as `make setup` does",
        )
        return
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = [fault for r in needed if r.name not in _KFP if (fault := _fault_of(r))]
    yield from faults
    # of an extra what is there has to fit; that it is not there is a choice
    for requirement in wanted:
        found = _version(requirement.name)
        if requirement in needed or not found:
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield warning(f"package {requirement.name}", *_out_of_range(requirement, found))
    if not faults:
        shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
        yield ok("packages", f"{len(needed)} in the ranges that they are needed in ({shown})")


def _fault_of(requirement: Requirement) -> Finding | None:
    found, name = _version(requirement.name), f"package {requirement.name}"
    if not found:
        return error(name, "not installed", _install(requirement))
    if not requirement.specifier.contains(found, prereleases=True):
        return error(name, *_out_of_range(requirement, found))
    if not _is_importable(requirement.name):
        return error(
            name,
            f"{found} is recorded as installed, and its module can't be found",
            f"pip install --force-reinstall --no-deps '{requirement.name}=={found}'",
        )
    return None


def _out_of_range(requirement: Requirement, found: str) -> tuple[str, str]:
    return f"{found} is out of the range {requirement.specifier}", _install(requirement)


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _is_importable(name: str) -> bool:
    module = name.lower().replace("-", "_")
    if _is_found(module):
        return True
    # named otherwise than its package, as yaml of PyYAML
    files = metadata.distribution(name).files or ()
    tops = {
        file.parts[0] for file in files if file.name == "__init__.py" and len(file.parts) > 1
    } | {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}
    return any(_is_found(top) for top in tops if top.isidentifier())


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: half of it is imported
        return False


def kfp(compiled_with: Iterable[str] = ()) -> Iterator[Finding]:
    """Whether KFP's SDK is there: the first thing that the process of every step imports.

    Args:
        compiled_with: `sdkVersion` of compiled packages, as `kfp-2.17.0`.
    """
    found = {name: _version(name) for name in _KFP}
    why = "components are compiled without installing it, so that every step would end at once"
    missing = [name for name, version in found.items() if not (version and _is_importable(name))]
    if missing:
        yield error(
            "kfp",
            f"{' and '.join(missing)} can't be found; {why}",
            f"pip install 'kfp=={_tested_minor()}.*' 'kfp-kubernetes=={_tested_minor()}.*' "
            "(constraints.txt has the tested versions)",
        )
        return
    minors = {name: _minor(version) for name, version in found.items()}
    minor = minors["kfp"]
    if len(set(minors.values())) > 1:
        text = ", ".join(f"{name} {version}" for name, version in found.items())
        yield error("kfp", f"{text} don't belong together", "install both at one minor version")
        return
    if others := sorted(
        {sdk for sdk in compiled_with if _minor(sdk.removeprefix("kfp-")) != minor}
    ):
        yield error(
            "kfp",
            f"{found['kfp']}, and the packages were compiled with {', '.join(others)}",
            "compile them again with the kfp that the image has, or build the image with theirs",
        )
        return
    yield ok("kfp", found["kfp"])


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _tested_minor() -> str:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tuneline") or ()
    except metadata.PackageNotFoundError:
        lines = ()
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == "kfp":
            return min(s.version for s in requirement.specifier if s.operator == ">=")
    return "2.17"


def accelerators(*, ask_torch: bool = False) -> Iterator[Finding]:
    """What the drivers show, and whether this torch can use it.

    Args:
        ask_torch: import torch and compute something on each device; takes seconds.
    """
    found = _by_driver()
    yield from found
    devices = [f for f in found if f.level == "ok" and f.value != _NONE]
    build = _version("torch").partition("+")[2]
    if devices and build == "cpu":
        yield error(
            "torch",
            f"{_version('torch')} is a build for CPUs, and there are accelerators",
            "install the build of torch for CUDA or ROCm",
        )
    elif ask_torch:
        yield from _by_torch(expected=bool(devices))


_NONE: Final = "none"


def _by_driver() -> list[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        if list(Path("/dev").glob("nvidia[0-9]*")):
            return [
                warning(
                    "accelerators",
                    "NVIDIA devices without nvidia-smi",
                    "--torch asks torch for them",
                )
            ]
        if Path("/dev/kfd").exists():
            return [ok("accelerators", "AMD (/dev/kfd); --torch asks torch for them")]
        return [ok("accelerators", _NONE)]
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_DRIVER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [
            error(
                "accelerators",
                f"nvidia-smi does not answer within {_DRIVER_SECONDS} s",
                "look at the driver: dmesg, or drain the node",
            )
        ]
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        return [
            error(
                "accelerators",
                f"nvidia-smi fails ({said or done.returncode})",
                "the driver and its library must be of one version",
            )
        ]
    return [ok("accelerators", f"{lines.count(line)} x {line}") for line in dict.fromkeys(lines)]


def _by_torch(*, expected: bool) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        state = error if expected else ok
        yield state(
            "torch",
            f"{torch.__version__} sees no accelerator",
            "its CUDA must not be newer than the driver's" if expected else "",
        )
        return
    for number in range(torch.cuda.device_count()):
        name = f"torch cuda:{number}"
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            computed = float((ones @ ones).sum())
        except RuntimeError as fault:  # torch's errors of a device are of this class
            yield error(name, f"can't compute: {str(fault).splitlines()[0]}", "replace the device")
            continue
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        text = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}"
        if computed == 256.0**3:
            yield ok(name, text)
        else:
            yield error(name, f"{text} computes wrongly", "replace the device")


def bitsandbytes() -> Iterator[Finding]:
    """Whether its compiled library is there: without it, qlora and nf4 fail after the base is
    loaded."""
    spec = find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        return  # the packages' line says so
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(
        path.stem.removeprefix("libbitsandbytes_") for path in folder.glob("libbits*.so")
    )
    if sys.platform == "darwin":
        found += [path.stem for path in folder.glob("libbits*.dylib")]
    if found:
        cuda = [name.removeprefix("cuda") for name in found if name.startswith("cuda")]
        newest = f", CUDA up to {cuda[-1][:-1]}.{cuda[-1][-1]}" if cuda else ", no CUDA"
        yield ok("bitsandbytes", f"{_version('bitsandbytes')}{newest}")
    else:
        yield warning(
            "bitsandbytes",
            f"{folder} has no compiled library",
            "qlora and export.quantization nf4 can't be used: install the wheel of this platform",
        )
