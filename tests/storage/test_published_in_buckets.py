# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in a bucket: read by ranges, each byte once; written as to a folder."""

import json

import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm import storage
from hybridlm.config import MeshConfig
from hybridlm.errors import ConfigError
from hybridlm.hf import from_hf, tensors, to_hf
from hybridlm.sharding import make_mesh
from hybridlm.storage import files
from tests.hf.hf_support import FOLDER, golden
from tests.storage.conftest import upload

pytestmark = pytest.mark.buckets
NAME = "zamba2"


@pytest.fixture
def far(bucket) -> str:
    """A golden checkpoint in a bucket."""
    upload(FOLDER / NAME, f"{bucket}/{NAME}")
    return f"{bucket}/{NAME}"


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """Sizes of the ranges that a bucket was asked for."""
    sizes = []
    read_range = files.read_range

    def reading(path, start, stop):
        sizes.append(stop - start if storage.in_bucket(path) else 0)
        return read_range(path, start, stop)

    monkeypatch.setattr(storage, "read_range", reading)
    return sizes


def params(model) -> dict[str, np.ndarray]:
    return {str(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("devices", [1, 8])
def test_a_model_is_read_once(far, sent, devices):
    """Equal to the bit to that of the folder, on any mesh, and no byte is asked for twice."""
    mesh = None if devices == 1 else make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    found, expected = params(from_hf(far, mesh=mesh)), params(golden(NAME)[0])
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
    assert sum(sent) <= storage.size(storage.as_path(f"{far}/model.safetensors"))


def test_shards_and_their_index(bucket, tmp_path, sent):
    """Large tensors come in several parts at once."""
    here, far = tmp_path / "here", f"{bucket}/sharded"
    to_hf(golden(NAME)[0], here, max_shard_bytes=60_000)
    to_hf(golden(NAME)[0], far, max_shard_bytes=60_000)
    _, objects = storage.find(far)
    written = {path.name: storage.read_bytes(path) for path in objects}
    expected = {file.name: file.read_bytes() for file in here.iterdir()}
    assert written.keys() == expected.keys() and len(written) > 3
    card = "README.md"  # begins with the folder's name
    assert {**written, card: b""} == {**expected, card: b""}
    found, expected = params(from_hf(far)), params(golden(NAME)[0])
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_an_export_keeps_files_and_refuses_to_overwrite(far, bucket):
    storage.write_text(storage.as_path(f"{far}/tokenizer_config.json"), '{"eos_token": "</s>"}')
    model = from_hf(far)
    assert model.source == far
    out = f"{bucket}/out"
    to_hf(model, out)
    assert storage.read_bytes(storage.as_path(f"{out}/tokenizer_config.json")) == b'{"eos_token": "</s>"}'
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        to_hf(model, out)
    to_hf(model, out, overwrite=True)
    np.testing.assert_equal(params(from_hf(out)), params(model))


def test_an_export_that_fails_leaves_no_object(bucket, monkeypatch):
    def failing(*_):
        raise OSError(5, "broken")

    monkeypatch.setattr(tensors.Source, "make", failing, raising=False)
    monkeypatch.setattr("hybridlm.hf.save._make", failing)
    with pytest.raises(OSError, match="broken"):
        to_hf(golden(NAME)[0], f"{bucket}/out")
    assert storage.find(f"{bucket}/out")[1] == []


def test_init_hf_gives_the_config(far):
    config = hybridlm.load_config("configs/continue_from_hf.py", {"init.hf": far})
    assert config.model.d_model == golden(NAME)[0].config.d_model


@pytest.mark.parametrize("damage", ["no config", "cut", "no bucket", "not JSON"])
def test_what_cannot_be_read_is_one_line(far, damage):
    weights, config = (storage.as_path(f"{far}/{name}") for name in ("model.safetensors", "config.json"))
    match damage:
        case "no config":
            storage.remove(config)
            told = "has no config.json"
        case "cut":
            storage.write_bytes(weights, storage.read_bytes(weights)[:-100])
            told = "is cut short or damaged"
        case "no bucket":
            far, told = "s3://no-such-bucket/model", "there is no bucket"
        case "not JSON":
            storage.write_text(config, json.dumps([]))
            told = "is no JSON object"
    with pytest.raises(ConfigError, match=told):
        from_hf(far)


def test_a_write_without_a_bucket_is_one_line(s3):
    with pytest.raises(ConfigError, match="there is no bucket s3://no-such-bucket"):
        to_hf(golden(NAME)[0], "s3://no-such-bucket/out")
