"""The graph's arguments and Ray's errors, without starting Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from sentei.serving.errors import (
    BadLogitsError,
    ConfigError,
    EngineBusyError,
    VariantError,
    WrongArtifactError,
)
from sentei.serving.settings import AppArgs

# Importing Ray Serve warns inside pydantic; it is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


def test_app_without_adapter_is_dense_only() -> None:
    """The default adapter may be absent: the app says where it looked and how to make one."""
    from sentei.serving.app import missing_adapter

    assert "adapters/pocket" in missing_adapter(AppArgs())
    assert "sentei distill" in missing_adapter(AppArgs())


def test_named_adapter_must_exist(tmp_path: Path) -> None:
    """An adapter that was asked for by name and is not there is an error."""
    from sentei.serving.app import missing_adapter

    with pytest.raises(ConfigError, match=r"manifest\.json"):
        missing_adapter(AppArgs(adapter=str(tmp_path)))


def test_shipped_serve_config_fits_the_arguments() -> None:
    """The file that the guide deploys has known arguments, listens on loopback, and names the builder."""
    path = Path(__file__).parents[2] / "infra" / "serve.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    (application,) = config["applications"]

    assert config["http_options"]["host"] == "127.0.0.1"
    assert application["import_path"] == "sentei.serving.app:build"
    assert AppArgs.model_validate(application["args"]).model == "pocket"


@pytest.mark.parametrize("option", [{"modle": "x"}, {"threads": 0}, {"limits": {"max_concurrent": 0}}])
def test_bad_option_is_refused(option: dict[str, Any]) -> None:
    """An unknown or impossible option is an error, never a default."""
    with pytest.raises(ValidationError):
        AppArgs.model_validate(option)


def test_local_file_errors_name_the_file(tmp_path: Path) -> None:
    """A local config with an unknown key names file and key."""
    from sentei.serving.local import read_options

    path = tmp_path / "serve.yaml"
    path.write_text("modle: pocket\n", encoding="utf-8")

    with pytest.raises(ConfigError, match=r"serve\.yaml(.|\n)*modle"):
        read_options(path)


def test_ray_errors_get_our_names() -> None:
    """A dead actor is a crash, NaN logits and a full queue keep their words, anything else is an error."""
    from ray.exceptions import ActorDiedError, RayTaskError

    from sentei.serving.handles import translate

    def raised(cause: Exception) -> Exception:
        return RayTaskError("generate", "traceback", cause)

    died = translate("sparse", ActorDiedError())
    nan = translate("sparse", raised(BadLogitsError("NaN")))
    busy = translate("sparse", raised(EngineBusyError("full")))
    other = translate("sparse", raised(RuntimeError("boom")))
    swapped = translate("sparse", raised(WrongArtifactError("a is wanted, b runs here")))

    assert isinstance(died, VariantError)
    assert isinstance(nan, VariantError)
    assert isinstance(other, VariantError)
    assert isinstance(swapped, VariantError)
    assert (died.reason, nan.reason, other.reason) == ("crash", "nan_logits", "error")
    assert swapped.reason == "artifact"
    assert isinstance(busy, EngineBusyError)


def test_ingress_runs_as_often_as_the_settings_say() -> None:
    """One ingress is no service while it restarts: the file that we ship has two."""
    from sentei.serving.app import build

    found = [build(AppArgs(ingress_replicas=n))._bound_deployment.num_replicas for n in (1, 3)]
    path = Path(__file__).parents[2] / "infra" / "serve.yaml"
    (application,) = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]

    assert found == [1, 3]
    assert application["args"]["ingress_replicas"] == 2


def test_each_model_replica_gets_the_gpu_that_its_device_needs() -> None:
    """Ray gives the models the GPUs that the settings name, one each on cuda, and nobody else."""
    from sentei.serving.app import GPU_NOTE, build

    def gpus(**options: Any) -> dict[str, float]:
        ingress = build(AppArgs(controller=False, **options))._bound_deployment
        parts = {"ingress": ingress, "dense": ingress.init_args[1]._bound_deployment}
        return {name: part.ray_actor_options.get("num_gpus", 0.0) for name, part in parts.items()}

    assert gpus() == {"ingress": 0.0, "dense": 0.0}
    assert gpus(device="cuda") == {"ingress": 0.0, "dense": 1.0}
    assert gpus(device="cuda", replica_gpus=0.5) == {"ingress": 0.0, "dense": 0.5}
    assert "CPUs only" in GPU_NOTE
    with pytest.raises(ConfigError, match="device is 'cpu' and replica_gpus 1"):
        build(AppArgs(device="cpu", replica_gpus=1))


def test_a_service_outlives_its_standard_input() -> None:
    """Under a supervisor, without standard input, the app runs until SIGTERM; else until its input closes."""
    code = (
        "import signal, sys; from sentei.serving import local; signal.signal(signal.SIGTERM, local._leave);"
        "print('up', flush=True); local.wait_for_end(is_service=sys.argv[1] == 'service')"
    )
    started = {
        kind: subprocess.Popen(
            [sys.executable, "-c", code, kind], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        for kind in ("service", "plain")
    }

    assert all(process.stdout is not None and process.stdout.readline() for process in started.values())
    assert started["plain"].wait(30) == 0
    assert started["service"].poll() is None
    started["service"].terminate()
    assert started["service"].wait(30) == 0
    for process in started.values():
        process.communicate()  # closes its output


def test_all_ingresses_say_the_same_of_the_model(tmp_path: Path) -> None:
    """When a model was first served is the store's to know, not the process's that is asked."""
    from sentei.monitors.store import Store
    from sentei.serving.deployments import CREATED, _created_s

    with Store.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        found = {_created_s(store) for _ in range(2)}
        store.save_value(CREATED, "7")
        later = _created_s(store)

    assert (len(found), later) == (1, 7)


def test_a_relative_model_is_looked_up_beside_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config file can be read from anywhere: its folders are those beside it, or those below the user's."""
    from sentei.serving.local import read_options

    (tmp_path / "config" / "checkpoint").mkdir(parents=True)
    (tmp_path / "user" / "adapter").mkdir(parents=True)
    path = tmp_path / "config" / "serve.yaml"
    path.write_text("model: ./checkpoint\nadapter: adapter\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "user")

    options = read_options(path)

    assert options.model == str(tmp_path / "config" / "checkpoint")
    assert options.adapter == str(tmp_path / "user" / "adapter")
    assert options.logical_name() == "checkpoint"


def test_a_relative_model_of_a_deployed_config_is_looked_up_in_the_users_folder(tmp_path: Path) -> None:
    """`ray serve deploy` says nothing of its file: PWD of Ray's processes, or `base_folder`, is the place."""
    (tmp_path / "models" / "mine").mkdir(parents=True)

    assert AppArgs(model="models/mine").at(tmp_path).model == str(tmp_path / "models" / "mine")
    assert AppArgs(model="mine", base_folder="models").at(tmp_path).model == str(tmp_path / "models" / "mine")


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "a/b/nowhere", "/nowhere/at/all"])
def test_a_model_that_is_not_there_says_where_was_looked(model: str, tmp_path: Path) -> None:
    """The error names the value, the folder looked up, and the way out."""
    with pytest.raises(ConfigError) as refused:
        AppArgs(model=model).at(tmp_path)

    assert repr(model) in str(refused.value)
    assert str(tmp_path / model) in str(refused.value)
    assert "base_folder" in str(refused.value)


@pytest.mark.parametrize("model", ["pocket", "gemma-3-270m", "org/model"])
def test_names_and_hub_ids_stay_what_they_are(model: str, tmp_path: Path) -> None:
    """A folder called `pocket` beside the config file does not take the place of the pocket model."""
    (tmp_path / "pocket").mkdir()

    assert AppArgs(model=model).at(tmp_path).model == model


def test_a_taken_port_is_named() -> None:
    """Before Ray starts: who wants a port that another listens on is told which, and the way out."""
    from sentei.serving.local import _take_port

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(
            ConfigError, match=rf"127\.0\.0\.1:{port} cannot be listened on .*0: any free one"
        ):
            _take_port("127.0.0.1", port)

    assert _take_port("127.0.0.1", port) == port
