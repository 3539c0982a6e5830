# SPDX-License-Identifier: Apache-2.0
"""Two real processes train as one: rows wherever the mesh has their devices, a corpus that one of them tokenises."""

import json
from pathlib import Path

import pytest

from hybridlm.config.overrides import override
from hybridlm.probes.in_training import IN_TRAINING
from tests.contributing.runs import records, small_run
from tests.pods.processes import free_port, run_together
from tests.train.conftest import write_texts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of the run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    return [record["loss"] for record in records(small_run(folder))]


def train(folder: Path, mesh: dict, order=(0, 1, 2, 3), words=((), ()), folders=None) -> list[tuple[int, str, str]]:
    """The run of two processes of two devices each; words, folders: of each."""
    address = f"localhost:{free_port()}"
    envs = []
    for i in range(2):
        own = str((folders or [folder] * 2)[i])
        arguments = json.dumps([own, json.dumps(mesh), json.dumps(order), f"--run.dir={folder}/run", *words[i]])
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        envs.append(place | {"ARGUMENTS": arguments})
    code = "import json, os, sys; from tests.pods.run import main; sys.exit(main(*json.loads(os.environ['ARGUMENTS'])))"
    return run_together(["-c", code], envs, folder)


def losses(folder: Path) -> list[float]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if (record := json.loads(line))["kind"] == "train"]


@pytest.mark.slow
def test_hosts_whose_devices_alternate_in_the_mesh(tmp_path, alone):
    """As on a torus; each with a cache of its own, which the second gets from the first: it has no text at all."""
    write_texts(tmp_path)
    caches = [(f"--data.cache_dir={tmp_path}/cache-{i}",) for i in range(2)]
    second = tmp_path / "second"
    second.mkdir()
    (second / "train-0.txt").write_text("other text, which nobody reads")
    said = train(tmp_path, {"data": 1, "fsdp": 4}, (0, 2, 1, 3), caches, [tmp_path, second])
    assert [code for code, _, _ in said] == [0, 0], said
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)
    entries = [{f.name: f.read_bytes() for f in (tmp_path / f"cache-{i}").glob("*/*")} for i in range(2)]
    assert len(entries[0]) == 5 and entries[0] == entries[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "order"),
    [
        ({"data": 4}, (3, 1, 0, 2)),
        ({"data": 2, "fsdp": 2}, (0, 1, 2, 3)),
        ({"data": 2, "fsdp": 2}, (2, 0, 3, 1)),
        ({"data": 1, "fsdp": 2, "slice": 2}, (3, 1, 0, 2)),
    ],
)
def test_any_order_on_a_shared_cache(tmp_path, alone, mesh, order):
    write_texts(tmp_path)
    said = train(tmp_path, mesh, order)
    assert [code for code, _, _ in said] == [0, 0], said
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 1, "fsdp": 2, "context": 2}])
def test_probes_of_processes_together_are_those_of_one(tmp_path, mesh):
    """Tasks and held-out text, whose rows each of them has a part of; one that cannot be is told on all."""
    tasks = ["--probe.tasks", "copying", "repeated_bigrams:frequent=100", "--probe.examples=9", "--run.eval_every=3"]
    found = {}
    for name, sizes in (("one", None), ("two", mesh)):
        folder = tmp_path / name
        folder.mkdir()
        write_texts(folder)
        if sizes is None:
            records(override(small_run(folder), tasks), probes=IN_TRAINING)
        else:
            said = train(folder, sizes, words=[tasks, tasks])
            assert [code for code, _, _ in said] == [0, 0], said
        lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        found[name] = [record for record in lines if record["kind"] == "probe"]
    assert [record["step"] for record in found["two"]] == [3, 6] and found["one"][0]["copying/32"] is not None
    for one, two in zip(found["one"], found["two"], strict=True):
        assert one.keys() == two.keys()
        numbers = [name for name in one if isinstance(one[name], float) and name != "seconds"]
        assert [two[name] for name in numbers] == pytest.approx([one[name] for name in numbers], rel=1e-3)
    wrong = train(tmp_path / "two", mesh, words=[["--probe.tasks=copy", "--probe.every=0"]] * 2)
    assert [code for code, _, _ in wrong] == [2, 2] and all("no task of that name" in e for _, _, e in wrong), wrong


def test_what_the_first_cannot_read_is_told_on_all(tmp_path):
    write_texts(tmp_path)
    said = train(tmp_path, {"data": 4}, words=[("--data.path=nothing/*.txt",), ()])
    assert [code for code, _, _ in said] == [2, 2], said
    first, second = (error.strip().splitlines()[-1] for _, _, error in said)
    assert first == second and first.startswith("error: ") and "nothing/*.txt" in first


@pytest.mark.slow
def test_another_tokenizer_on_one_host_is_told_on_all(tmp_path):
    from tokenizers import Tokenizer, models

    write_texts(tmp_path)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(70)}, unk_token="w0")).save(f"{tmp_path}/tokenizer.json")
    said = train(tmp_path, {"data": 4}, words=[(), (f"--data.tokenizer={tmp_path}/tokenizer.json",)])
    assert [code for code, _, _ in said] == [2, 2], said
    for _, _, error in said:
        assert "error: process 1 of 2: data.tokenizer" in error and "is another one on this host" in error


@pytest.mark.slow
def test_a_host_that_cannot_write_its_cache_is_told_on_all(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "file").write_text("")
    words = [(), (f"--data.cache_dir={tmp_path}/file/cache",)]
    said = train(tmp_path, {"data": 4}, words=words)
    assert [code for code, _, _ in said] == [2, 2], said
    assert all("process 1 of 2: cannot write the token cache under" in error for _, _, error in said)
