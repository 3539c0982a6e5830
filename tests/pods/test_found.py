# SPDX-License-Identifier: Apache-2.0
"""Whether this is a cluster: every kind that JAX detects, flags and variables, and what is told where it is unclear."""

import http.server
import json
import os
import threading

import jax
import pytest

from hybridlm.cluster import ClusterConfig, find_place
from hybridlm.errors import ConfigError
from tests.pods.processes import FOREIGN, free_port, run_together

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[007-010]", "SLURM_NTASKS": "8", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_VERSION": "4.1.6",
}  # fmt: skip


@pytest.fixture
def env(monkeypatch):
    """Sets variables in an environment that says nothing of a cluster."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "XLA_FLAGS"):
            monkeypatch.delenv(name)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_alone(env):
    assert find_place(ClusterConfig()) is None
    env(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_PROCID="0")  # in a batch script, outside of srun
    assert find_place(ClusterConfig()) is None
    env(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")  # numbers alone
    assert find_place(ClusterConfig()) is None
    env(KUBERNETES_SERVICE_HOST="10.0.0.1")  # a pod of no Job
    assert find_place(ClusterConfig()) is None


def test_one_task_is_alone(env):
    """JAX would give it one GPU of a host's and take over its signals."""
    env(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_place(ClusterConfig()) is None
    env(JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    assert find_place(ClusterConfig()) is None


@pytest.mark.parametrize(("kind", "variables"), [("Slurm", SLURM), ("Ompi", OPEN_MPI)])
def test_launchers(env, kind, variables):
    env(**variables)
    place = find_place(ClusterConfig())
    assert (place.found_by, place.arguments) == (kind, {})
    assert find_place(ClusterConfig(off=True)) is None
    place = find_place(ClusterConfig(coordinator="head:99", devices=(0, 1)))
    assert place.arguments == {"coordinator_address": "head:99", "local_device_ids": [0, 1]}
    assert place.found_by == f"{kind} and --cluster.coordinator"


def test_variables_and_flags(env):
    env(JAX_COORDINATOR_ADDRESS="head:99", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    expected = {"coordinator_address": "head:99", "num_processes": 4, "process_id": 3}
    assert find_place(ClusterConfig()).arguments == expected
    assert find_place(ClusterConfig(index=2)).arguments == expected | {"process_id": 2}  # a flag goes before
    flags = ClusterConfig(coordinator="other:1", processes=2, index=0)
    assert find_place(flags).arguments == {"coordinator_address": "other:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(coordinator="head"), r"cluster.coordinator \('head'\) must be HOST:PORT"),
        (dict(coordinator="head:0x10"), "must be HOST:PORT"),
        (dict(coordinator="head:70000"), "must be HOST:PORT"),
        (dict(processes=0), r"cluster.processes \(0\) must be at least 1"),
        (dict(index=-1), r"cluster.index \(-1\) must not be negative"),
        (dict(processes=2, index=2), r"cluster.index \(2\) must be less than cluster.processes \(2\)"),
        (dict(timeout=0), r"cluster.timeout \(0\) must be at least 1"),
        (dict(devices=(-1,)), r"cluster.devices \(\(-1,\)\) must not be negative"),
    ],
)
def test_wrong_flags(fields, said):
    with pytest.raises(ConfigError, match=said):
        ClusterConfig(**fields)


def test_what_is_missing_is_told(env):
    with pytest.raises(ConfigError, match=r"^--cluster.index without --cluster.coordinator and --cluster.processes: g"):
        find_place(ClusterConfig(index=1))
    env(JAX_COORDINATOR_ADDRESS="head:99", JAX_PROCESS_ID="1")
    with pytest.raises(
        ConfigError, match=r"^JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID without --cluster.processes: give"
    ):
        find_place(ClusterConfig())
    env(JAX_NUM_PROCESSES="two")
    with pytest.raises(ConfigError, match=r"^JAX_NUM_PROCESSES \('two'\) is not a whole number"):
        find_place(ClusterConfig())
    env(JAX_NUM_PROCESSES="1")
    with pytest.raises(ConfigError, match=r"cluster.index \(1\) must be less than cluster.processes \(1\)"):
        find_place(ClusterConfig())


def test_an_unreadable_environment_is_told(env):
    env(**SLURM | {"SLURM_NTASKS": "many"})
    said = r"looks like a cluster \(Slurm\), but JAX cannot tell its processes \(ValueError: .*--cluster.off=True"
    with pytest.raises(ConfigError, match=said):
        find_place(ClusterConfig())


def test_an_indexed_job_without_its_package_is_told(env, caplog):
    env(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1")
    assert find_place(ClusterConfig()) is None
    (record,) = caplog.records
    assert "pip install kubernetes" in record.getMessage() and "\n" not in record.getMessage()


# Cloud TPU ----------------------------------------------------------------------------------------------------------

TPU = """
import json, os, sys
import jax
from hybridlm.cluster import ClusterConfig, find_place
from hybridlm.errors import ConfigError
found = []
for variables in json.load(open(sys.argv[1])):
    os.environ.update(variables)
    if "GCE_METADATA_IP" in variables:
        del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX sets it on a machine without TPU chips
    try:
        place = find_place(ClusterConfig())
        found.append(place and place.found_by)
    except ConfigError as error:
        found.append(str(error))
    for name in variables:
        del os.environ[name]
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
print(json.dumps(found))
"""
"""JAX itself, told to take this machine for a TPU VM."""


@pytest.fixture
def metadata():
    """A metadata server: its address, and the attributes of the instance that it knows."""
    attributes: dict[str, str] = {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            right = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", attributes
        server.shutdown()


def test_cloud_tpus(metadata, tmp_path):
    """On GKE by variables or a file, on a TPU VM by the metadata server; one host is no cluster, slices multiply."""
    pytest.importorskip("requests", reason="JAX asks the metadata server by requests")
    server, attributes = metadata
    attributes |= {
        "agent-worker-number": "1", "worker-network-endpoints": "unknown:0:10.0.0.1,unknown:1:10.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nWORKER_ID: '1'",
    }  # fmt: skip
    (tmp_path / "addresses").write_text("a:1,b:1,c:1\n")
    gke = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "MEGASCALE_NUM_SLICES": "1"}
    cases = [
        (gke, "GkeTpu"),
        (gke | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (gke | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GkeTpu"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}, "GkeTpu"),
        ({"GCE_METADATA_IP": server}, "GceTpu"),
        ({"GCE_METADATA_IP": server, "MEGASCALE_NUM_SLICES": "4"}, "GceTpu"),
        ({"GCE_METADATA_IP": "127.0.0.1:1"}, "this looks like a cluster (GceTpu), but JAX cannot tell its processes"),
    ]
    if jax.__version_info__ >= (0, 11):
        in_file = {"TPU_PROCESS_ADDRESSES_PATH": f"{tmp_path}/addresses", "TPU_WORKER_ID": "0"}
        cases.append((in_file | {"MEGASCALE_NUM_SLICES": "1"}, "GkeTpu"))
    found = ask_as_tpu([variables for variables, _ in cases], tmp_path)
    for (variables, expected), answer in zip(cases, found, strict=True):
        assert answer == expected or (expected and len(expected) > 10 and answer.startswith(expected)), (
            variables,
            answer,
        )
    attributes["worker-network-endpoints"] = "10.0.0.1"  # one host
    assert ask_as_tpu([{"GCE_METADATA_IP": server}], tmp_path) == [None]


@pytest.mark.slow
def test_gke_whose_nodes_have_a_metadata_server(metadata, tmp_path):
    """JAX asks it six times for what a TPU VM's would know."""
    pytest.importorskip("requests", reason="JAX asks the metadata server by requests")
    gke = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "1"}
    assert ask_as_tpu([gke | {"GCE_METADATA_IP": metadata[0]}], tmp_path) == ["GkeTpu"]


def ask_as_tpu(environments: list[dict[str, str]], folder) -> list[str | None]:
    (folder / "ask.py").write_text(TPU)
    (folder / "environments.json").write_text(json.dumps(environments))
    ((code, out, error),) = run_together(["ask.py", "environments.json"], [{"JAX_FORCE_TPU_INIT": "1"}], folder)
    assert code == 0, error
    return json.loads(out)


# Joining ------------------------------------------------------------------------------------------------------------

JOIN = """
import json, logging, os, sys
from contextlib import nullcontext
logging.disable(logging.WARNING)
import pallas_kernels
import jax
from hybridlm.cluster import ClusterConfig, join
from hybridlm.errors import ConfigError, RunError
os.environ.pop("TPU_SKIP_MDS_QUERY", None)
try:
    joined = join(ClusterConfig(**json.loads(sys.argv[1])), lambda: nullcontext({"heartbeat_timeout_seconds": 30}))
except (ConfigError, RunError) as error:
    print(type(error).__name__, error)
    sys.exit(2)
print(joined, jax.process_index(), jax.process_count())
"""


def join(folder, envs, **flags) -> list[tuple[int, str, str]]:
    (folder / "join.py").write_text(JOIN)
    return run_together(["join.py", json.dumps(flags)], envs, folder)


def test_two_tasks_of_slurm_join(tmp_path):
    port = str(free_port())
    common = SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port}
    said = join(tmp_path, [common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)])
    assert [out for _, out, _ in said] == ["True 0 2\n", "True 1 2\n"], said


@pytest.mark.slow
def test_two_tpu_vms_join(metadata, tmp_path):
    """Each asks a metadata server of its own which worker it is."""
    pytest.importorskip("requests", reason="JAX asks the metadata server by requests")
    server, attributes = metadata
    attributes |= {"agent-worker-number": "0", "worker-network-endpoints": "localhost,localhost", "tpu-env": ""}
    port = str(free_port())
    tpu = {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": port}
    # the second one is told its number by a variable, which goes before: one server knows one instance
    said = join(tmp_path, [tpu, tpu | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_PROCESS_ID": "1"}])
    assert [out for _, out, _ in said] == ["True 0 2\n", "True 1 2\n"], said


@pytest.mark.slow
def test_two_processes_by_flags_join(tmp_path):
    flags = {"coordinator": f"localhost:{free_port()}", "processes": 2}
    said = join(tmp_path, [{"JAX_PROCESS_ID": str(i)} for i in range(2)], **flags)
    assert [out for _, out, _ in said] == ["True 0 2\n", "True 1 2\n"], said


def test_who_does_not_come_is_told(tmp_path):
    flags = {"coordinator": f"localhost:{free_port()}", "processes": 2, "index": 0, "timeout": 2}
    for index in range(2):  # the one that hosts the service, and one that does not find it
        ((code, _, error),) = join(tmp_path, [{}], **flags | {"index": index})
        assert code == 75, error
        flag_words = "--cluster.coordinator and --cluster.processes and --cluster.index"
        said = f"error: cluster of {flag_words}: not all processes came within 2 s (cluster.timeout); start all of them"
        assert error.startswith(said) and error.count("\n") == 1
