"""Run the steps of a local run in containers of an image, as locked up as on a cluster.

`kfp.local.DockerRunner` starts them. What it does not do is here: it lets the engine remove a
container that has ended and takes "there is no such container" for success, so that a failed step
can pass; here a container is waited for, and removed afterwards.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from tuneline.base_model import CODE_PIN, HUB_SCHEME, cache_dir, check_folder, weight_files
from tuneline.errors import TunelineError
from tuneline.recipe import is_task_file

if TYPE_CHECKING:
    from docker import DockerClient
    from kfp import local

    from tuneline.recipe import Recipe

USER: Final = 10001
"""Of the images."""
HOME: Final = "/home/tuneline"
CACHE: Final = "/var/cache/tuneline"
STOP_SECONDS: Final = 30
"""Grace period of a step, as on a cluster: training writes a checkpoint."""
_HANDED_IN: Final = (
    "MLFLOW_", "TUNELINE_", "AWS_", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "GOOGLE_APPLICATION_CREDENTIALS", "OMP_",
)  # fmt: skip
"""What the names of the variables begin with."""
_LOCAL_SCHEMES: Final = ("", "sqlite", "file")
_ADDRESSES: Final = (
    "MLFLOW_TRACKING_URI", "TUNELINE_MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "TUNELINE_CHECKPOINTS",
)  # fmt: skip
"""Variables that name something that every run reaches."""


_LOCKED_UP: Final[dict[str, Any]] = {
    "network_mode": "none",
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}
_ANSWER: Final = "versions:"
_VERSIONS: Final = """
import importlib.metadata as m, json
print("versions:", json.dumps({d.metadata["Name"]: d.version for d in m.distributions()}))
"""


def check(image: str) -> None:
    """Refuse an image in which no step of this version can run, before any is started.

    Raises:
        TunelineError: no engine answers, there is no such image, or it lacks kfp or tuneline or has
            another version of them.
    """
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    hint = "build it with `make images`"
    try:
        client = docker.from_env()
    except DockerException as error:
        raise TunelineError(
            f"no container engine answers, which --image {image} needs: start Docker, or name it "
            f"with DOCKER_HOST ({error})"
        ) from error
    said = io.StringIO()
    with contextlib.closing(client), contextlib.redirect_stdout(said):
        try:
            code = _run(client, image, ["python", "-c", _VERSIONS], {}, **_LOCKED_UP)
        except (RuntimeError, RequestException) as error:
            raise TunelineError(f"image '{image}' can't be tried: {error}; {hint}") from error
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    answers = [line for line in lines if line.startswith(_ANSWER)]
    if code or not answers:
        why = lines[-1][:300] if lines else f"exit code {code}, and it says nothing"
        raise TunelineError(f"image '{image}' can't start Python ({why}): {hint}")
    found = json.loads(answers[-1].removeprefix(_ANSWER))
    for name, parts in (("tuneline", 3), ("kfp", 2)):
        ours, theirs = version(name), found.get(name)
        if theirs is None or ours.split(".")[:parts] != theirs.split(".")[:parts]:
            raise TunelineError(
                f"image '{image}' has {f'{name} {theirs}' if theirs else f'no {name}'}, this is "
                f"{name} {ours}, and a step has to run what was compiled: {hint}"
            )


def runner(recipe: Recipe, workdir: Path) -> local.DockerRunner:
    """A runner whose containers see the work folder, the cache, and the recipe's own files.

    The root file system is read-only, no capability is left, and there is no network, unless the
    environment or the recipe names something on another machine. As root the work folder is given
    to the images' user; anyone else's containers run as that user.

    Args:
        recipe: whose local paths are mounted, read-only.
        workdir: absolute.

    Raises:
        TunelineError: a folder can't be made.
    """
    from docker.types import Mount
    from kfp import local

    from tuneline.checkpoints_root import ROOT_VARIABLE, remote_root

    environment = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_IN)}
    # inside -> outside: a folder may be seen at two places
    writable = {workdir: workdir, Path(CACHE): cache_dir().absolute()}
    if remote_root() is None and (root := os.environ.get(ROOT_VARIABLE)):
        # as the environment of the steps names it; in the work folder it is there already
        checkpoints = Path(root).absolute()
        environment[ROOT_VARIABLE] = str(checkpoints)
        if workdir not in (checkpoints, *checkpoints.parents):
            writable[checkpoints] = checkpoints
    try:
        for folder in writable.values():
            folder.mkdir(parents=True, exist_ok=True)
            if os.getuid() == 0:
                _give(folder)
    except OSError as error:
        raise TunelineError(
            f"{error.filename} can't be made for the containers ({error.strerror}): name another "
            "folder with --workdir or TUNELINE_CACHE"
        ) from error
    network = _network(recipe, environment)
    if network == "none":
        environment.setdefault("HF_HUB_OFFLINE", "1")  # what is in the cache, without trying first
    readable = _readable([recipe.model_dump(mode="json"), environment], set(writable.values()))
    user, group = (USER, USER) if os.getuid() == 0 else (os.getuid(), os.getgid())
    return local.DockerRunner(
        user=f"{user}:{group}",
        environment={**environment, "TUNELINE_CACHE": CACHE, "HOME": HOME},
        **{**_LOCKED_UP, "network_mode": network},
        tmpfs={"/tmp": "mode=1777", HOME: f"mode=1777,uid={user}"},
        shm_size="1g",
        working_dir=str(Path.cwd()),  # which the recipe's paths may start from
        mounts=[
            *(Mount(str(inside), str(path), type="bind") for inside, path in writable.items()),
            *(Mount(str(p), str(p), type="bind", read_only=True) for p in readable),
        ],
    )


def _give(folder: Path) -> None:
    """The folder and what is in it to the images' user."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)


def _network(recipe: Recipe, environment: dict[str, str]) -> str:
    """`none` where nothing is to be reached; the host's own for a server on its loopback."""
    named = [environment[name] for name in _ADDRESSES if environment.get(name)]
    remote = _remote(recipe, environment)
    if any(reference.startswith(HUB_SCHEME) for reference in remote):
        named += [environment["HF_ENDPOINT"]] if environment.get("HF_ENDPOINT") else []
    servers = [uri for uri in map(urlsplit, named + remote) if uri.scheme not in _LOCAL_SCHEMES]
    if not servers:
        return "none"
    loopback = any(uri.hostname in ("localhost", "127.0.0.1", "::1") for uri in servers)
    return "host" if loopback else "bridge"


def _remote(recipe: Recipe, environment: dict[str, str]) -> list[str]:
    """What the recipe names and a step has to fetch from another machine."""
    data = recipe.data
    sources = {source.path for source in (*data.train, *data.test, *data.evaluation_sets)}
    base = recipe.model.base_model.partition(CODE_PIN)[0]
    found = [reference for reference in sorted(sources) if "://" in reference]
    found += [base] if "://" in base and not _is_in_cache(base) else []
    # lm-eval's own tasks bring their documents from the hub
    tasks = recipe.evaluation.tasks
    found += [f"{HUB_SCHEME}{task}" for task in tasks if not is_task_file(task)]
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        found = [reference for reference in found if not reference.startswith(HUB_SCHEME)]
    return found


def _is_in_cache(reference: str) -> bool:
    """Whether a base model of the hub lies whole in the cache that containers see."""
    if not reference.startswith(HUB_SCHEME):
        return False
    repository, _, revision = reference.removeprefix(HUB_SCHEME).partition("@")
    name = f"models--{repository.replace('/', '--')}"
    folder = cache_dir() / "hub" / name / "snapshots" / revision
    try:
        check_folder(folder, reference)
        return bool(revision) and all(file.is_file() for file in weight_files(folder))
    except (TunelineError, OSError, ValueError, KeyError):
        return False


def _readable(values: Any, writable: set[Path]) -> list[Path]:
    """Files and folders of this machine that are named anywhere in `values`, the outermost ones."""
    found: set[Path] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            walk(list(value.values()))
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and value:
            # of a glob, the folder that it looks in
            path = Path(value.partition("*")[0]).absolute()
            found.add(path.parent if "*" in value and not path.is_dir() else path)

    walk(values)
    found = {path for path in found if path.exists() and path != Path("/")}
    return sorted(p for p in found - writable if not (found | writable) & set(p.parents))


@contextlib.contextmanager
def waited_for() -> Iterator[None]:
    """Within it, `kfp.local` reports of a container what the container's own exit code says."""
    from kfp.local import docker_task_handler as handler

    theirs = handler.run_docker_container
    handler.run_docker_container = _run
    try:
        yield
    finally:
        handler.run_docker_container = theirs


def _run(
    client: DockerClient, image: str, command: list[str], volumes: dict[str, Any], **options: Any
) -> int:
    """The exit code of a container whose output is printed line by line while it runs.

    Raises:
        RuntimeError: there is no such image, or the engine can't start it.
    """
    from docker.errors import APIError, ImageNotFound

    del volumes  # the pipeline root, which lies in the work folder
    try:
        container = client.containers.create(image=image, command=command, **options)
    except ImageNotFound as error:
        raise RuntimeError(
            f"there is no image '{image}' on this machine: build it with `make images`, or pull it"
        ) from error
    try:
        container.start()
        pending = b""
        for chunk in container.logs(stream=True, follow=True):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                print(line.decode("utf-8", "replace"))
        if pending:
            print(pending.decode("utf-8", "replace"))
        return int(container.wait()["StatusCode"])
    except APIError as error:
        raise RuntimeError(
            f"the container of '{image}' can't be run: {error.explanation}"
        ) from error
    except BaseException:
        container.stop(timeout=STOP_SECONDS)
        raise
    finally:
        container.remove(force=True)
