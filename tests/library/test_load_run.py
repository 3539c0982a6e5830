# SPDX-License-Identifier: Apache-2.0
"""`hybridlm.load_run`: a run's model, tokenizer, config and step, on one device and over a mesh."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import hybridlm
from hybridlm.layers.params import param_info
from hybridlm.sharding import param_shardings
from hybridlm.train import sample
from tests.library.runs import write_run
from tests.train.conftest import small_config

TEXT = "documents, eight devices"
CONFIG = small_config("model.vocab_size=320")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, CONFIG, steps=(3, 5))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """(the run as one device has it, logits of a text)."""
    run = hybridlm.load_run(folder)
    return run, logits(run)


def logits(run) -> np.ndarray:
    tokens_BT = np.array([run.tokenizer.encode(TEXT)] * 8)
    return np.asarray(jax.jit(lambda model: model(tokens_BT))(run.model))


def leaves(run) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(run.model, nnx.Param))


def test_one_device_without_a_mesh(folder, one):
    run, _ = one
    assert run == (run.model, run.tokenizer, CONFIG, 5)
    assert run.tokenizer.decode(run.tokenizer.encode(TEXT)) == TEXT
    assert {device for leaf in leaves(run) for device in leaf.devices()} == {jax.local_devices()[0]}
    first = hybridlm.load_run(str(folder), 3)
    assert first.step == 3
    expected = nnx.state(hybridlm.HybridLM(CONFIG.model, rngs=nnx.Rngs(3)), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first.model, nnx.Param), expected)
    model, tokenizer, step = sample.load_run(folder)
    assert (type(model), tokenizer.fingerprint, step) == (hybridlm.HybridLM, run.tokenizer.fingerprint, 5)


@pytest.mark.parametrize("how", ["set", "given"])
def test_eight_devices_equal_one(folder, one, how):
    """Parameters lie as training lays them out, each device with its share; logits are the same."""
    mesh = hybridlm.make_mesh(hybridlm.MeshConfig(fsdp=2, tensor=2))
    if how == "set":
        with jax.set_mesh(mesh):
            run = hybridlm.load_run(folder)
            found = logits(run)
    else:
        run = hybridlm.load_run(folder, mesh=mesh)
        found = logits(run)
    expected = jax.tree.leaves(param_shardings(param_info(run.model), mesh))
    for leaf, sharding in zip(leaves(run), expected, strict=True):
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert any(shard.data.size * 4 == leaf.size for leaf in leaves(run) for shard in leaf.addressable_shards)
    for leaf, whole in zip(leaves(run), leaves(one[0]), strict=True):
        np.testing.assert_array_equal(leaf, whole)
    np.testing.assert_allclose(found, one[1], rtol=2e-4, atol=2e-5)


def test_what_cannot_be_loaded_is_one_line(folder, tmp_path):
    error = lambda *args, **options: pytest.raises(hybridlm.ConfigError, match=options.pop("match"))
    with error(match=r"^step \(4\) has no checkpoint in .*: there are \[3, 5\]$"):
        hybridlm.load_run(folder, 4)
    with error(match=r"^\S+ holds no run \(no config.json\)$"):
        hybridlm.load_run(tmp_path / "none")
    with error(match=r"^model\.\S+ \(\d+\) not divisible by mesh\.\S+ \(8\)$"):
        hybridlm.load_run(folder, mesh=hybridlm.make_mesh(hybridlm.MeshConfig(tensor=8)))
    explicit = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with error(match=r"^mesh axis fsdp \(Explicit\) must be Auto: "):
        hybridlm.load_run(folder, mesh=explicit)


def test_a_mesh_with_axes_of_others_keeps_parameters_whole(folder, one):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    run = hybridlm.load_run(folder, mesh=mesh)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in leaves(run))
