# SPDX-License-Identifier: Apache-2.0
"""The guides' manifest and job script say what the pod, the program and its exit codes are."""

import re

import pytest
import yaml

from hybridlm.config.find import load_config, read_config
from hybridlm.config.pods import read_topology
from tests.docs.pages import ROOT, find_blocks

FOLDER = ROOT / "docs/pods"
HOST = {"tpu-v5-lite-podslice": ("v5e", 4), "tpu-v5p-slice": ("v5p", 4), "tpu-v6e-slice": ("v6e", 4)}
"""GKE's name of an accelerator -> ours, chips of a host."""


def blocks(page: str, language: str) -> list[str]:
    return [b.code for b in find_blocks((FOLDER / page).read_text()) if b.language == language]


@pytest.fixture
def jobset():
    (manifest,) = blocks("gke.md", "yaml")
    return yaml.safe_load(manifest)


def fields(node, known: dict, path: str = "") -> None:
    """AssertionError for a field that its type does not have, or that has a value of another type."""
    assert isinstance(node, dict), f"{path} must have fields"
    for name, value in node.items():
        here = f"{path}.{name}"
        assert name in known, f"no field {here}"
        kind = known[name]
        if isinstance(kind, dict):
            fields(value, kind, here)
        elif isinstance(kind, list):
            assert isinstance(value, list), f"{here} must be a list"
            for item in value:
                fields(item, kind[0], here) if isinstance(kind[0], dict) else _is(item, kind[0], here)
        else:
            _is(value, kind, here)


def _is(value, kind, path: str) -> None:
    if kind is dict:
        assert isinstance(value, dict) and all(isinstance(v, str | int) for v in value.values()), path
    else:
        assert type(value) is kind, f"{path} must be {kind.__name__}"


CONTAINER = {"name": str, "image": str, "workingDir": str, "command": [str], "resources": {"limits": dict}}
POD = {
    "restartPolicy": str, "terminationGracePeriodSeconds": int, "hostNetwork": bool, "dnsPolicy": str,
    "nodeSelector": dict, "containers": [CONTAINER],
}  # fmt: skip
ON_EXIT = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "completionMode": str, "parallelism": int, "completions": int, "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": ON_EXIT}]}, "template": {"spec": POD},
}  # fmt: skip
RULE = {"name": str, "action": str, "onJobFailureReasons": [str], "targetReplicatedJobs": [str]}
JOBSET = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip
"""What a JobSet of v1alpha2 is made of, as far as the guide goes."""


def test_the_manifest_has_the_fields_of_a_jobset(jobset):
    fields(jobset, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    rule = jobset["spec"]["failurePolicy"]["rules"][0]
    assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?", rule["name"])
    broken = yaml.safe_load(yaml.safe_dump(jobset))
    broken["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    with pytest.raises(AssertionError, match=r"no field .*paralelism"):
        fields(broken, JOBSET)


def test_the_manifest_is_of_the_pod_that_its_config_is_set_for(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["python", "train.py"]
    name = container["command"][2].removeprefix("--config=")
    config = load_config(name, container["command"][3:])
    topology = read_topology(name.partition(":")[2])
    generation, per_host = HOST[pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]]
    assert topology.name == f"{generation}:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}"
    assert replicated["replicas"] == topology.slices == config.mesh.slice
    assert container["resources"]["limits"] == {"google.com/tpu": per_host}
    hosts = topology.chips // topology.slices // per_host
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    assert "exclusive-topology" in next(iter(jobset["metadata"]["annotations"]))


def test_the_manifest_restarts_what_goes_on_and_ends_what_does_not(jobset):
    """By the exit codes of docs/pods/watching.md."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", (FOLDER / "watching.md").read_text(), re.M)
             for code in row.split(",")}  # fmt: skip
    assert codes == {0, 1, 2, 75, 129, 130, 143}
    assert (rule["action"], set(rule["onExitCodes"]["values"])) == ("FailJob", {1, 2})
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 30


def test_the_job_script_has_a_task_a_gpu():
    script = blocks("slurm.md", "sh")[0]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.M))
    assert len(options) == script.count("#SBATCH")
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue open-mode output"
    assert set(options) == set(known.split())
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    config = load_config("hybrid_1b", re.findall(r"--(?:mesh|data|optim)\.\w+=\d+", script))
    gpus = int(options["nodes"]) * int(options["gpus-per-node"])
    assert config.mesh.data * config.mesh.fsdp == gpus
    assert config.data.batch_size % (config.optim.accumulate * gpus) == 0
    assert "75" in script and "143" in script


def test_every_setting_of_a_pod_is_on_the_page():
    from hybridlm.config.find import pod_names

    rows = dict(re.findall(r"^\| `(hybrid_\w+:[^`]+)` \|[^|]*\| ([^|]+) \|$", (FOLDER / "index.md").read_text(), re.M))
    assert set(rows) == set(pod_names())
    for name, mesh in rows.items():
        sizes = {axis: int(size) for axis, size in (word.split() for word in mesh.split(", "))}
        assert {a: s for a, s in vars(read_config(name).mesh).items() if s != 1} == sizes, name
