"""Files of deploy/: what Ray, Kubernetes and a linter say of them."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from teacher_tools import BATCH_SIZE, save_teacher
from train_tools import ALONE, small_run

from salt_distill.common.config import ServeConfig
from salt_distill.student_trainer.record import Environment

KUBERNETES = "1.34"
DEPLOY = Path(__file__).parent.parent / "deploy"
KUBERAY = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())


def cluster(name: str) -> dict:
    """A file for ``ray up`` with Ray's defaults for all that it leaves out, as Ray takes it."""
    logging.disable(logging.CRITICAL)
    try:
        values = prepare_config(yaml.safe_load((DEPLOY / name).read_text()))
    finally:
        logging.disable(logging.NOTSET)
    validate_config(values)
    return values


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-aws.yaml", "cluster-gcp.yaml"])
def test_ray_takes_the_file_and_every_node_sets_up_from_the_pinned_files(name):
    values = cluster(name)
    assert {"~/salt": ".", "~/.salt": "~/.salt"}.items() <= values["file_mounts"].items()
    assert "~/salt/deploy/node.sh" in values["head_setup_commands"]
    assert "~/salt/deploy/node.sh" in values["worker_setup_commands"]
    assert "pip install --quiet -c constraints.txt" in (DEPLOY / "node.sh").read_text()


@pytest.mark.parametrize("name", ["cluster-aws.yaml", "cluster-gcp.yaml"])
def test_clouds_have_a_head_without_work_spot_students_and_no_public_address(name):
    values = cluster(name)
    head, teacher, student = (values["available_node_types"][kind] for kind in ("head", "teacher", "student"))
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert teacher["resources"]["GPU"] > 0
    assert teacher["resources"]["teacher"] > 0
    assert student["resources"]["GPU"] > 0
    assert values["provider"]["use_internal_ips"]
    spot = {
        "cluster-aws.yaml": ("InstanceMarketOptions", "MarketType", "spot"),
        "cluster-gcp.yaml": ("scheduling", "provisioningModel", "SPOT"),
    }
    option, key, value = spot[name]
    assert student["node_config"][option][key] == value
    assert key not in teacher["node_config"].get(option, {})


def test_a_misspelt_key_is_refused_by_rays_schema():
    values = cluster("cluster.yaml") | {"setup_comands": []}
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(values)


# --- the image ---


def test_the_linter_has_nothing_to_say_of_the_image():
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint is of the extra dev")
    subprocess.run([linter, DEPLOY / "Dockerfile"], check=True)


def test_a_run_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = small_run(out=str(tmp_path))
    start = Environment.here(config, ALONE, decoder="none", after_step=0, peak_flops_per_s=1.0)
    assert start.git_commit is None


# --- Kubernetes ---


def resources(overlay: str) -> list[dict]:
    """What ``kubectl apply -k`` sends."""
    if shutil.which("kubectl") is None:
        if os.environ.get("FAIL_WITHOUT_KUBECTL") == "1":
            pytest.fail("kubectl is absent")
        pytest.skip("kubectl is absent")
    built = subprocess.run(
        ["kubectl", "kustomize", DEPLOY / "kubernetes" / overlay], check=True, capture_output=True, text=True
    )
    return list(yaml.safe_load_all(built.stdout))


def only(found: list[dict], kind: str, name: str) -> dict:
    [one] = [
        resource for resource in found if (resource["kind"], resource["metadata"]["name"]) == (kind, name)
    ]
    return one


def strict(schema: dict) -> dict:
    """The same, with no fields but those that it has."""
    below = {name: strict(value) for name, value in schema.get("properties", {}).items()}
    closed = {"properties": below, "additionalProperties": False} if below else {}
    return {**schema, **closed, **({"items": strict(schema["items"])} if "items" in schema else {})}


def check(resource: dict) -> None:
    """Raises where Kubernetes' schemas, or KubeRay's, do not have it so."""
    if resource["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        return
    spec = resource["spec"]
    jsonschema.validate(spec, strict(KUBERAY[resource["kind"]]))
    cluster = spec["rayClusterConfig" if resource["kind"] == "RayService" else "rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "pod"},
            "template": group["template"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_every_resource_fits_its_schema_and_its_commands_are_ours(overlay):
    found = resources(overlay)
    for resource in found:
        check(resource)
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(only(found, "RayService", "salt-teacher")["spec"]["serveConfigV2"])
    )
    [teacher] = config.applications
    serve = ServeConfig.model_validate(teacher.args)
    assert (serve.tokens, serve.gpus, config.http_options.host) == ("/secrets/tokens.yaml", 1, "0.0.0.0")
    for name in ("salt-student", "salt-precompute"):
        command = shlex.split(only(found, "RayJob", name)["spec"]["entrypoint"].partition("&&")[0])
        program = str(Path(sys.executable).parent / command[0])
        printed = subprocess.run(
            [program, *command[1:], "--print-config"], check=True, capture_output=True, text=True
        )
        assert yaml.safe_load(printed.stdout)["data"] == "s3://BUCKET/shards"


def test_teachers_are_probed_budgeted_and_scaled_and_nothing_runs_as_root():
    for overlay, most in (("small", 2), ("large", 8)):
        found = resources(overlay)
        spec = only(found, "RayService", "salt-teacher")["spec"]
        [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
        [container] = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert container["startupProbe"]["httpGet"]["path"] == "/healthz"
        assert spec["rayClusterConfig"]["enableInTreeAutoscaling"]
        assert group["maxReplicas"] == most
        [teacher] = yaml.safe_load(spec["serveConfigV2"])["applications"]
        assert teacher["args"]["replicas"].endswith(
            f":{most}"
        )  # as many replicas as there may be machines for
        budget = only(found, "PodDisruptionBudget", "salt-teacher")["spec"]["selector"]["matchLabels"]
        assert budget.items() <= group["template"]["metadata"]["labels"].items()
        assert only(found, "Ingress", "salt-teacher")["spec"]["tls"][0]["secretName"] == "salt-tls"
        text = json.dumps(found)
        assert text.count('"runAsNonRoot": true') == text.count('"containers"') == 6
        assert '"image": "salt"' not in text


def test_a_field_that_neither_kuberay_nor_kubernetes_knows_is_refused():
    for change in (
        ("serveConfig",),
        ("rayClusterConfig", "workerGroupSpec"),
        ("rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"),
        ("rayClusterConfig", "headGroupSpec", "template", "spec", "contaners"),
    ):
        resource = only(resources("small"), "RayService", "salt-teacher")
        at = resource["spec"]
        for key in change[:-1]:
            at = at[key]
        at[change[-1]] = []
        with pytest.raises(jsonschema.ValidationError, match=change[-1]):
            check(resource)


@pytest.mark.faults
def test_ray_serve_runs_the_teacher_from_a_configuration_file(tmp_path):
    (tmp_path / "tokens.yaml").write_text(f"students: {{token: {'t' * 32}}}\n")
    args = {
        "ckpt": str(save_teacher(tmp_path / "teacher")),
        "tokens": str(tmp_path / "tokens.yaml"),
        "cpus": 0.5,
        "teacher": {"batch_size": BATCH_SIZE},
    }
    subprocess.run(
        [sys.executable, "-c", SERVED, json.dumps(args)], check=True, cwd=DEPLOY.parent, timeout=200
    )


SERVED = """if True:  # a process of its own: a private Ray's token is read where Ray is imported first
    import json, sys, urllib.request
    from salt_distill.common.config import ServeConfig
    from salt_distill.common.local_ray import ray_to_join
    with ray_to_join(None) as ray_arguments:
        import ray
        from ray import serve
        from salt_distill.teacher_server.ray_serve.deployment import application
        from salt_distill.teacher_server.ray_serve.ingress import free_port
        ray.init(**ray_arguments)
        port = free_port("127.0.0.1")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = ServeConfig.model_validate_json(sys.argv[1])
        serve.run(application(config), name="teacher", route_prefix="/")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30).status == 200
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/teacher", headers={"Authorization": f"Bearer {'t' * 32}"}
        )
        assert json.load(urllib.request.urlopen(asked, timeout=30))["batch_size"] == config.teacher.batch_size
        serve.shutdown()
        ray.shutdown()
"""


def test_the_demo_removes_only_what_a_demo_made(tmp_path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "salt-data"  # ends the demo at its first command
    stub.write_text("#!/bin/sh\nexit 3\n")
    stub.chmod(0o755)

    def demo(out: Path) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(DEPLOY / "demo.sh")],
            env={"PATH": path, "DEMO_OUT": str(out)},
            capture_output=True,
            text=True,
            check=False,
        )

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    refused = demo(mine)
    assert refused.returncode == 2
    assert "which is not empty and was not made by this demo, expected a new folder" in refused.stderr
    assert (mine / "thesis.tex").read_text() == "years"
    for _ in range(2):
        assert demo(tmp_path / "demo").returncode == 3
        assert not (tmp_path / "demo" / "old").exists()
        (tmp_path / "demo" / "old").touch()


@pytest.mark.slow
def test_the_encoders_of_the_repository_know_more_than_random_weights(tmp_path):
    """Of digits and of motion, on test videos that they were not shown."""

    def command(*words) -> None:
        path = Path(sys.executable).parent / words[0]
        subprocess.run([path, *map(str, words[1:])], check=True, cwd=tmp_path, capture_output=True)

    command("salt-data", "synth", "videos", "--num-train", 1000, "--num-test", 400)
    command("salt-data", "pack", "videos", "shards")
    folders = sorted((DEPLOY / "pretrained").glob("*/"))
    checkpoints = [part for folder in folders for part in ("--ckpt", folder)]
    how = ("--random-init", "--epochs", 40, "--lr", 0.003, "--batch-size", 64)
    command("salt-eval", "probe", *checkpoints, *how, "--data", "shards", "--out", "probe.json")
    accuracy = json.loads((tmp_path / "probe.json").read_text())["accuracy"]
    random = accuracy.pop("random-init")
    assert set(accuracy) == {"student-10000-steps", "teacher-30000-steps"}
    for found in accuracy.values():
        assert found["digit"] > random["digit"] + 0.02
        assert found["motion"] > 0.97 > random["motion"]
