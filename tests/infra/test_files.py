"""Every file of infra/ under the schema or the tool of its kind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sentei.serving.front.access import LOOK_VARIABLE
from sentei.serving.local import SHORT_WAYS
from sentei.serving.settings import AppArgs
from tests.infra.tools import INFRA, ROOT, load_package, read_yaml, run_tool

# Importing Ray Serve warns inside pydantic; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")

SERVE = ("serve.yaml", "serve-vllm.yaml", "serve-gpu.yaml")
CLUSTER_SERVE = {"base": "base", "staging": "base", "production": "production"}  # overlay: whose Serve config
KUBERNETES = "1.33.0"
# What is checked, by the test that does it; a new file belongs here, and needs a test.
CHECKED = {
    "infra/check": "run by CI",
    "infra/README.md": "tests/unit/test_docs.py",
    **dict.fromkeys((f"infra/{name}" for name in SERVE), "test_serve_config"),
    **dict.fromkeys((f"infra/kuberay/{name}/kustomization.yaml" for name in CLUSTER_SERVE), "test_overlay"),
    **dict.fromkeys((f"infra/kuberay/{name}/serve.yaml" for name in ("base", "production")), "test_overlay"),
    "infra/kuberay/base/rayservice.yaml": "test_overlay",
    "infra/kuberay/base/storage.yaml": "test_overlay",
    "infra/kuberay/mlflow/kustomization.yaml": "test_mlflow_for_a_cluster",
    "infra/kuberay/mlflow/mlflow.yaml": "test_mlflow_for_a_cluster",
    "infra/Containerfile": "test_containerfile",
    "infra/Containerfile.dockerignore": "test_image_is_built_of_what_the_wheel_needs",
    "infra/compose/compose.yaml": "test_compose_file",
    "infra/compose/app.yaml": "test_compose_file",
    "infra/compose/databases.sql": "test_compose_file",
    "infra/sentei.service": "test_systemd_unit",
    "infra/prometheus/prometheus.yml": "test_prometheus_config",
    "infra/prometheus/rules.yaml": "tests/infra/test_alerts.py",
    "infra/prometheus/rules_test.yaml": "tests/infra/test_alerts.py",
    "infra/grafana/sentei.json": "tests/infra/test_alerts.py",
    "infra/grafana/datasources.yaml": "test_grafana_finds_what_it_is_given",
    "infra/grafana/dashboards.yaml": "test_grafana_finds_what_it_is_given",
    "infra/schemas/README.md": "tests/unit/test_docs.py",
    "infra/schemas/reduce.py": "ruff",
    "infra/schemas/rayservice.json": "test_schemas_refuse_what_is_wrong",
    "infra/schemas/compose-spec.json": "test_schemas_refuse_what_is_wrong",
}


def schema_errors(document: Any, name: str) -> list[str]:
    """What a vendored schema has to say of a document."""
    schema = json.loads((INFRA / "schemas" / name).read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    return [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(document)
    ]


def test_every_file_is_checked() -> None:
    """No file of infra/ is without a check, and no check without its file."""
    found = {str(path.relative_to(ROOT)) for path in INFRA.rglob("*") if path.is_file()}

    assert {name for name in found if "__pycache__" not in name} == set(CHECKED)


def check_serve_config(config: dict[str, Any], host: str) -> AppArgs:
    """Hold a Serve config against Ray's schema, and its arguments against ours."""
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(config)
    (application,) = parsed.applications

    assert application.import_path == "sentei.serving.app:build"
    assert config["http_options"]["host"] == host
    return AppArgs.model_validate(application.args)


@pytest.mark.parametrize("name", SERVE)
def test_serve_config(name: str) -> None:
    """Ray's schema takes the file, the app its arguments; on one machine it listens on loopback."""
    arguments = check_serve_config(read_yaml(name), "127.0.0.1")

    assert (arguments.gpus_per_replica() > 0) == (name == "serve-gpu.yaml")


def kustomize(overlay: str) -> list[dict[str, Any]]:
    """What an overlay comes to."""
    done = run_tool("kubectl", "kustomize", INFRA / "kuberay" / overlay)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def by_kind(documents: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """The documents of a kind."""
    return (document for document in documents if document["kind"] == kind)


@pytest.mark.parametrize("overlay", CLUSTER_SERVE)
def test_overlay(overlay: str) -> None:
    """KubeRay's schema takes the RayService, Kubernetes' own the rest; what is referred to is there."""
    documents = kustomize(overlay)
    (service,) = by_kind(documents, "RayService")
    names = {document["metadata"]["name"] for document in documents} | {"sentei-secrets"}
    cluster = service["spec"]["rayClusterConfig"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]

    assert schema_errors(service, "rayservice.json") == []
    validate = load_package("kubernetes_validate").validate
    for document in documents:
        if document is not service:
            validate(document, KUBERNETES, strict=True)
    assert cluster["rayVersion"] == version("ray")
    for pod in pods:
        (container,) = pod["containers"]
        sources = [ref["name"] for source in container["envFrom"] for ref in source.values()]
        claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]]
        assert sources == ["sentei-env", "sentei-secrets"]
        assert {*sources, *claims} <= names
        assert ("/" in container["image"]) == (overlay != "base")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config == read_yaml(f"kuberay/{CLUSTER_SERVE[overlay]}/serve.yaml")
    arguments = check_serve_config(config, "0.0.0.0")
    assert_replicas_fit(arguments, cluster["workerGroupSpecs"])


def test_mlflow_for_a_cluster() -> None:
    """Kubernetes takes it; the bucket's key comes from a Secret to the server alone; the app finds it."""
    documents = kustomize("mlflow")
    validate = load_package("kubernetes_validate").validate
    for document in documents:
        validate(document, KUBERNETES, strict=True)
    (deployment,), (service,), (settings,) = (
        list(by_kind(documents, kind)) for kind in ("Deployment", "Service", "ConfigMap")
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    sources = [ref["name"] for source in container["envFrom"] for ref in source.values()]
    (port,) = service["spec"]["ports"]
    arguments = check_serve_config(read_yaml("kuberay/production/serve.yaml"), "0.0.0.0")

    assert sources == [settings["metadata"]["name"], "sentei-mlflow"]
    assert not any("KEY" in name or "PASSWORD" in name for name in settings["data"])
    assert "--artifacts-destination=$(MLFLOW_ARTIFACTS)" in container["args"]
    assert settings["data"]["MLFLOW_ARTIFACTS"].startswith("s3://")
    assert arguments.mlflow_uri == f"http://{service['metadata']['name']}:{port['port']}"
    assert not any("AWS_" in text.read_text() for text in (INFRA / "kuberay" / "base").glob("*.yaml"))


def assert_replicas_fit(arguments: AppArgs, groups: list[dict[str, Any]]) -> None:
    """All replicas, and the surge of a rolling update, find their CPUs on the workers."""
    from sentei.serving.app import SMALL_CPUS

    (group,) = groups
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    per_worker = int(cpus / arguments.replica_cpus)
    small = (2 * arguments.ingress_replicas + 2) * SMALL_CPUS
    models = arguments.dense_replicas + arguments.sparse_replicas

    assert per_worker * group["minReplicas"] >= models
    assert cpus * group["minReplicas"] - models * arguments.replica_cpus >= small


def test_compose_file() -> None:
    """Compose's schema takes the file, what it mounts is there, and the app's arguments are the app's."""
    from sentei.serving.local import read_options

    compose = read_yaml("compose/compose.yaml")
    services, folder = compose["services"], INFRA / "compose"
    mounts = [volume.split(":")[0] for item in services.values() for volume in item.get("volumes", ())]
    targets = re.findall(r"^FROM \S+ AS (\w+)", (INFRA / "Containerfile").read_text(), flags=re.MULTILINE)
    build = services["app"]["build"]

    assert schema_errors(compose, "compose-spec.json") == []
    assert {"app", "postgres", "mlflow", "prometheus", "grafana", "jaeger"} == set(services)
    assert [name for name, item in services.items() if "profiles" in item] == ["jaeger"]
    assert [path for path in mounts if path.startswith(".") and not (folder / path).exists()] == []
    assert {name for name in mounts if not name.startswith(".")} == set(compose["volumes"])
    assert all(port.startswith("127.0.0.1:") for item in services.values() for port in item.get("ports", ()))
    assert (folder / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert build["target"] in targets
    options = read_options(folder / "app.yaml")
    assert (options.port, options.mlflow_uri) == (8000, "http://mlflow:5000")
    assert "CREATE DATABASE mlflow;" in (folder / "databases.sql").read_text()


def test_the_image_sets_what_the_local_app_sets() -> None:
    """Of Ray Serve's ways within a process: `ray serve deploy` in the image behaves like `serving.local`."""
    text = (INFRA / "Containerfile").read_text(encoding="utf-8")

    assert dict(re.findall(r"(RAY_SERVE_\w+)=(\w+)", text)) == SHORT_WAYS


def test_containerfile() -> None:
    """hadolint has nothing to say, and both images are there."""
    done = run_tool("hadolint", "Containerfile")

    assert (done.returncode, done.stdout) == (0, "")
    assert {"cpu", "cuda"} <= set(
        re.findall(r"^FROM \S+ AS (\w+)", (INFRA / "Containerfile").read_text(), re.M)
    )


def test_image_is_built_of_what_the_wheel_needs() -> None:
    """All that the wheel is made of enters the build, and all that enters is there."""
    lines = (INFRA / "Containerfile.dockerignore").read_text().split("\n")
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    links = {path.resolve().name for path in (ROOT / "src" / "sentei").iterdir() if path.is_symlink()}

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (torch,) = re.findall(r'"(torch>=[^"]+)"', (INFRA / "Containerfile").read_text(encoding="utf-8"))

    assert f'"{torch}"' in project
    assert let_in == {"LICENSE", "README.md", "pyproject.toml", "src", *links}
    assert all((ROOT / name).exists() for name in let_in)


def test_systemd_unit(tmp_path: Path) -> None:
    """systemd finds nothing wrong with the unit, and its options are those of the program."""
    text = (INFRA / "sentei.service").read_text(encoding="utf-8")
    unit = tmp_path / "sentei.service"
    unit.write_text(text.replace("/opt/sentei/bin/python", sys.executable), encoding="utf-8")

    done = run_tool("systemd-analyze", "verify", unit)

    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "-m sentei.serving.local --config /etc/sentei/app.yaml --service" in text


def test_prometheus_config() -> None:
    """promtool takes the file; it scrapes what compose calls the app, with the secret that it gives."""
    done = run_tool("promtool", "check", "config", "--syntax-only", "prometheus/prometheus.yml")
    (job,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    compose = read_yaml("compose/compose.yaml")

    assert done.returncode == 0, done.stderr
    assert job["job_name"] == "sentei"
    assert job["static_configs"] == [{"targets": ["app:8000"]}]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret] == {"environment": LOOK_VARIABLE}  # it may look, and order nothing
    assert LOOK_VARIABLE in compose["services"]["app"]["environment"]


def test_grafana_finds_what_it_is_given() -> None:
    """Grafana's own files name the folder and the address that compose gives it."""
    mounts = read_yaml("compose/compose.yaml")["services"]["grafana"]["volumes"]
    (provider,) = read_yaml("grafana/dashboards.yaml")["providers"]
    (source,) = read_yaml("grafana/datasources.yaml")["datasources"]

    assert any(mount.split(":")[1].startswith(provider["options"]["path"] + "/") for mount in mounts)
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")


def test_schemas_refuse_what_is_wrong() -> None:
    """The vendored schemas are no blanks: a misspelt key and a wrong type are named."""
    service = yaml.safe_load((INFRA / "kuberay" / "base" / "rayservice.yaml").read_text(encoding="utf-8"))
    compose = read_yaml("compose/compose.yaml")
    misspelt, wrong = deepcopy(service), deepcopy(service)
    group = misspelt["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "two"
    compose["services"]["app"]["enviroment"] = {}

    assert schema_errors(service, "rayservice.json") == []
    assert ["imagePullPolice" in text for text in schema_errors(misspelt, "rayservice.json")] == [True]
    assert ["'two'" in text for text in schema_errors(wrong, "rayservice.json")] == [True]
    assert ["enviroment" in text for text in schema_errors(compose, "compose-spec.json")] == [True]
