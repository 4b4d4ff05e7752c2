"""Each rule finds its breach in a package that KFP's own compiler made, and nothing in ours."""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from kfp import dsl, kubernetes
from kfp.compiler import Compiler
from kfp.dsl.pipeline_context import Pipeline

from tuneline.errors import UsageError
from tuneline_pipelines import cli, lint

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE = "registry.example.com/work:1.2@sha256:" + "0" * 64


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def work(text: str = "") -> str:
    return text


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def count() -> int:
    return 1


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_model() -> str:
    return "1"


@dsl.container_component
def shell(needed: str, optional: str = "x"):
    return dsl.ContainerSpec(image=IMAGE, command=["echo"], args=[needed, optional])


def on_gpu(task: Any) -> Any:
    """Everything that a step with an accelerator needs."""
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit("1")
    task.set_retry(3, backoff_max_duration="604800s")
    kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    kubernetes.add_node_selector(task, "pool", "a100")
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="1Gi")
    return task


def compiled(
    build: Callable[..., None], tmp_path: Path, *, as_a_user: bool = True, **options: Any
) -> list[Any]:
    """The documents of a pipeline with this body, whose steps run as a user."""

    @functools.wraps(build)
    def body(*values: Any, **named: Any) -> None:
        build(*values, **named)
        for task in Pipeline.get_default_pipeline().tasks.values():
            if as_a_user and task.container_spec is not None:
                kubernetes.set_security_context(task, run_as_user=10001, run_as_non_root=True)

    path = tmp_path / "package.yaml"
    Compiler().compile(dsl.pipeline(name="p", **options)(body), str(path))
    return lint.read(path)


def rules(documents: list[Any], **options: Any) -> dict[str, str]:
    """The rules that were broken, each with its last sentence."""
    return {finding.rule: str(finding) for finding in lint.check(documents, **options)}


def sound(pool: str = "a", number: str = "1"):
    task = on_gpu(work(text=pool))
    task.set_accelerator_limit(number)
    register_model().set_caching_options(False)


def test_a_sound_package_has_no_finding_even_as_a_release(tmp_path: Path) -> None:
    assert lint.check(compiled(sound, tmp_path), release=True) == []


@pytest.mark.parametrize("package", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_package_of_ours_has_no_finding(package: Path) -> None:
    assert lint.check(lint.read(package)) == []


def test_a_number_as_a_resource_is_found(tmp_path: Path) -> None:
    def pipeline(gpus: int = 1):
        on_gpu(work()).set_accelerator_limit(gpus)

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"resource-is-string"}
    assert "'pipelinechannel--gpus' of type NUMBER_INTEGER" in found["resource-is-string"]
    assert "annotate the parameter as str" in found["resource-is-string"]

    def from_a_task():
        on_gpu(work()).set_accelerator_limit(count().output)

    assert set(rules(compiled(from_a_task, tmp_path))) == {"resource-is-string"}


def test_a_resource_that_does_not_enter_a_condition_is_found(tmp_path: Path) -> None:
    def pipeline(gpus: str = "1", go: str = "yes"):
        with dsl.If(go == "yes"):
            on_gpu(work()).set_accelerator_limit(gpus)

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"input-exists"}
    assert "condition-1/work: input 'pipelinechannel--gpus'" in found["input-exists"]
    assert "register_pipeline_channels" in found["input-exists"]

    def registered(gpus: str = "1", go: str = "yes"):
        with dsl.If(go == "yes"):
            task = on_gpu(work()).set_accelerator_limit(gpus)
            task.register_pipeline_channels([gpus])

    assert rules(compiled(registered, tmp_path)) == {}


def test_a_label_that_does_not_enter_a_loop_is_found(tmp_path: Path) -> None:
    def pipeline(selector: dict = {"a": "b"}):  # noqa: B006  KFP writes it into the package
        with dsl.ParallelFor(["x", "y"]) as item:
            kubernetes.add_node_selector_json(on_gpu(work(text=item)), selector)

    documents = compiled(pipeline, tmp_path)
    assert rules(documents) == {}  # kfp-kubernetes hands it in
    inputs = documents[0]["components"]["comp-for-loop-2"]["inputDefinitions"]["parameters"]
    del inputs["pipelinechannel--selector"]
    assert (
        "nodeSelector: 'pipelinechannel--selector' is no input" in rules(documents)["input-exists"]
    )


def test_an_output_that_nobody_makes_is_found(tmp_path: Path) -> None:
    def pipeline():
        work(text=register_model().set_caching_options(False).output)

    documents = compiled(pipeline, tmp_path)
    tasks = documents[0]["root"]["dag"]["tasks"]
    broken = copy.deepcopy(documents)
    source = tasks["work"]["inputs"]["parameters"]["text"]["taskOutputParameter"]
    source["outputParameterKey"] = "gone"
    assert "'register-model' has no output 'gone'" in rules(documents)["input-exists"]
    del broken[0]["root"]["dag"]["tasks"]["register-model"]
    assert "'register-model' is no task" in rules(broken)["input-exists"]


def test_a_resource_that_is_no_input_of_its_task_is_found(tmp_path: Path) -> None:
    documents = compiled(sound, tmp_path)
    del documents[0]["root"]["dag"]["tasks"]["work"]["inputs"]["parameters"][
        "pipelinechannel--number"
    ]
    assert set(rules(documents)) == {"resource-is-passed"}


def test_a_condition_or_loop_over_what_is_not_there_is_found(tmp_path: Path) -> None:
    def pipeline(go: str = "yes", items: list = []):  # noqa: B006
        with dsl.If(go == "yes"):
            work()
        with dsl.ParallelFor(items):
            work()

    documents = compiled(pipeline, tmp_path)
    assert rules(documents) == {}
    for name, sentence in (("condition-1", "the condition reads"), ("for-loop-1", "the loop goes")):
        broken = copy.deepcopy(documents)
        group = next(
            task
            for key, task in broken[0]["root"]["dag"]["tasks"].items()
            if key.partition("-")[0] == name.partition("-")[0]
        )
        group["inputs"]["parameters"].clear()
        assert sentence in rules(broken)["input-exists"]


def test_a_null_that_enters_a_group_is_found(tmp_path: Path) -> None:
    def pipeline(go: str = "yes", note: Optional[str] = None):  # noqa: UP045  KFP knows no other form
        work(text=note)  # at the top it is well
        with dsl.If(go == "yes"):
            work(text=note)

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"null-stays-out"} and "'note' is optional" in found["null-stays-out"]


def test_a_container_that_is_not_given_what_its_command_names_is_found(tmp_path: Path) -> None:
    def pipeline():
        shell(needed="a")

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"container-inputs"} and "pass optional" in found["container-inputs"]

    def whole():
        shell(needed="a", optional="b")

    assert rules(compiled(whole, tmp_path)) == {}


def test_a_bare_step_with_an_accelerator_breaks_four_rules(tmp_path: Path) -> None:
    def pipeline():
        work().set_accelerator_type("nvidia.com/gpu").set_accelerator_limit("1")

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"gpu-toleration", "gpu-selector", "gpu-shm", "gpu-retry"}
    assert "no retry" in found["gpu-retry"]

    def late():
        on_gpu(work()).set_retry(3)

    found = rules(compiled(late, tmp_path))
    assert set(found) == {"gpu-retry"} and "3600 s after the first" in found["gpu-retry"]


def test_an_effect_that_is_cached_is_found(tmp_path: Path) -> None:
    def pipeline():
        register_model()
        work().set_display_name("register")  # its name on a page does nothing

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"effects-uncached"}
    assert found["effects-uncached"].startswith("register-model: ")


@pytest.mark.parametrize(
    ("image", "always", "in_release"),
    [
        ("work", True, True),
        ("work:latest", True, True),
        ("registry.example.com:5000/work", True, True),
        ("registry.example.com:5000/work:1.2", False, True),
        (IMAGE, False, False),
    ],
)
def test_an_image_that_can_change_is_found(
    image: str, always: bool, in_release: bool, tmp_path: Path
) -> None:
    def pipeline():
        work().set_container_image(image)

    documents = compiled(pipeline, tmp_path)
    assert ("image-pinned" in rules(documents)) is always
    assert ("image-pinned" in rules(documents, release=True)) is in_release


def test_secrets_are_found_in_the_open_and_without_a_name(tmp_path: Path) -> None:
    def pipeline():
        task = work().set_env_variable("HF_TOKEN", "hf_abc").set_env_variable("HOME", "/tmp")
        kubernetes.use_secret_as_env(task, "", {"token": "OTHER"})

    found = rules(compiled(pipeline, tmp_path))
    assert set(found) == {"no-secret", "secret-named"}
    assert "HF_TOKEN" in found["no-secret"] and "hf_abc" not in found["no-secret"]


def test_an_importer_in_a_condition_is_found(tmp_path: Path) -> None:
    def pipeline(go: str = "yes"):
        dsl.importer(artifact_uri="s3://b/x", artifact_class=dsl.Dataset)
        with dsl.If(go == "yes"):
            dsl.importer(artifact_uri="s3://b/y", artifact_class=dsl.Dataset)

    documents = compiled(pipeline, tmp_path)
    findings = [f for f in lint.check(documents) if f.rule == "importer-on-top"]
    assert [finding.where.partition("/")[0] for finding in findings] == ["condition-1"]


def test_a_workspace_without_access_modes_is_found(tmp_path: Path) -> None:
    def pipeline():
        work()

    def packaged(**patch: Any) -> list[Any]:
        workspace = dsl.WorkspaceConfig(
            size="1Gi", kubernetes=dsl.KubernetesWorkspaceConfig(pvcSpecPatch=patch)
        )
        config = dsl.PipelineConfig(workspace=workspace)
        return compiled(pipeline, tmp_path, pipeline_config=config)

    assert set(rules(packaged(storageClassName="fast"))) == {"workspace-mode"}
    assert rules(packaged(accessModes=["ReadWriteOnce"])) == {}


@pytest.mark.parametrize(
    ("name", "place", "found"),
    [
        ("MLFLOW_TRACKING_URI", "config map", True),
        ("MLFLOW_TRACKING_URI", "value", True),
        ("MLFLOW_RUN_ID", "field", True),
        ("MLFLOW_EXPERIMENT_ID", "secret", True),
        ("MLFLOW_TRACKING_USERNAME", "config map", True),
        ("MLFLOW_TRACKING_USERNAME", "secret", False),  # two secrets merge, the later one stays
        ("TUNELINE_MLFLOW_TRACKING_URI", "config map", False),
    ],
)
def test_a_variable_of_kfps_mlflow_plugin_is_found(
    name: str, place: str, found: bool, tmp_path: Path
) -> None:
    def pipeline():
        task = work()
        if place == "value":
            task.set_env_variable(name, "http://mlflow:5000")
        elif place == "config map":
            kubernetes.use_config_map_as_env(task, "settings", {"key": name})
        elif place == "secret":
            kubernetes.use_secret_as_env(task, "login", {"key": name})
        else:
            kubernetes.use_field_path_as_env(task, name, "metadata.name")

    broken = rules(compiled(pipeline, tmp_path))
    assert set(broken) == ({"plugin-variable"} if found else set())
    assert not found or f"sets {name}" in broken["plugin-variable"]


def test_a_step_that_may_run_as_root_is_found(tmp_path: Path) -> None:
    def pipeline():
        work()

    found = rules(compiled(pipeline, tmp_path, as_a_user=False))
    assert set(found) == {"non-root"} and "run_as_non_root=True" in found["non-root"]

    def as_root():
        kubernetes.set_security_context(work(), run_as_user=0, run_as_non_root=True)

    assert set(rules(compiled(as_root, tmp_path, as_a_user=False))) == {"non-root"}


def test_every_rule_has_a_failing_example_here() -> None:
    source = Path(__file__).read_text()
    assert [rule for rule in lint.RULES if f'"{rule}"' not in source] == []
    text = (Path(lint.__file__)).read_text()
    used = set(re.findall(r'Finding\(\s*"([a-z-]+)"', text))
    assert used == set(lint.RULES)


def test_a_package_inside_of_a_kubernetes_object_is_read(tmp_path: Path) -> None:
    def pipeline():
        kubernetes.set_security_context(register_model(), run_as_user=1, run_as_non_root=True)

    path = tmp_path / "object.yaml"
    Compiler().compile(dsl.pipeline(name="p")(pipeline), str(path), kubernetes_manifest_format=True)
    assert set(rules(lint.read(path))) == {"effects-uncached"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "can't be read"),
        ("apiVersion: v1\nkind: Pod\n", "is no compiled KFP v2 pipeline"),
        ("- 1\n", "is no compiled KFP v2 pipeline"),
        ("", "is no compiled KFP v2 pipeline"),
    ],
)
def test_what_is_no_package_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        lint.read(path)
    with pytest.raises(UsageError, match="No such file"):
        lint.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ({"components": None}, "component 'comp-work', which the package does not have"),
        ({"components": {"comp-work": None}}, "component 'comp-work'"),
        (
            {"deploymentSpec": {"executors": {"exec-work": {"container": "x"}}}},
            "executor 'exec-work' has neither",
        ),
        ({"deploymentSpec": {}}, "executor 'exec-work' has neither"),
        ({"root": {"dag": {"tasks": {"work": None}}}}, "component '', which the package"),
        ({"root": "x"}, "the pipeline has no task"),
    ],
)
def test_a_mangled_package_does_not_pass(broken: dict, fault: str, tmp_path: Path) -> None:
    documents = compiled(sound, tmp_path)
    documents[0].update(broken)
    sentences = [str(f) for f in lint.check(documents) if f.rule == "runs-something"]
    assert any(fault in sentence for sentence in sentences), sentences


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = GOLDEN / "finetune-lora.yaml"
    assert cli.main(["lint", str(good)]) == 0
    assert "1 package, no finding" in capsys.readouterr().out
    assert cli.main(["lint", str(good), "--release"]) == 1
    assert "has no digest" in capsys.readouterr().out
    bad = tmp_path / "bad.yaml"
    documents = list(yaml.safe_load_all(good.read_text()))
    documents[0]["root"]["dag"]["tasks"]["promote"]["cachingOptions"] = {"enableCache": True}
    bad.write_text(yaml.safe_dump_all(documents))
    assert cli.main(["lint", str(good), str(bad)]) == 1
    assert f"{bad}: promote: the step is cached" in capsys.readouterr().out
