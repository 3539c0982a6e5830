# SPDX-License-Identifier: Apache-2.0
"""One device equals eight: parameters, loss and all gradients; what a mesh cannot split is one clear line."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import (
    MLP,
    Attention,
    Config,
    ConfigError,
    DataConfig,
    Mamba2,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from hybridlm.config.mesh import check_config, repeated
from hybridlm.model import init
from hybridlm.model.model import HybridLM, param_info
from tests.model.model_support import QUICK, log_likelihoods, named, packed_rows
from tests.tolerances import check_close

pytestmark = pytest.mark.quick
MODEL = ModelConfig(
    vocab_size=40,
    d_model=16,
    pattern="M*-M*-w",
    blocks={
        "M": Mamba2(d_state=4, d_head=4, n_heads=8, n_groups=2, chunk=8, proj_bias=True),
        "*": Attention(n_heads=8, n_kv_heads=2, d_head=4, gate="elementwise", qkv_bias=True),
        "w": Attention(n_heads=8, n_kv_heads=4, d_head=4, gate="head", window=4, sinks=True, qk_norm=True),
        "-": MLP(d_ff=24),
    },
    tie_embeddings=False,
    init_std=0.3,
    compute_dtype="float32",
)
MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "fsdp and tensor": MeshConfig(1, 2, 4),
    "all": MeshConfig(2, 2, 2),
    "context": MeshConfig(2, 1, 1, 4),
    "context and others": MeshConfig(1, 2, 2, 2),
}
SLOW = ("data", "fsdp", "tensor", "fsdp and tensor", "context", "all")
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [3] * 4, [1] * 14 + [0] * 2] * 4, np.int32)


@functools.cache
def step(mesh_config: MeshConfig, n_devices: int):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
    model = init.init_sharded(MODEL, mesh, seed=3)
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, 40, (8, 16)).astype(np.int32) for _ in range(2)] + [SEGMENTS]
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def loss(params, tokens, targets, ids):
        scores = log_likelihoods(nnx.merge(graphdef, params), tokens, targets, ids)
        return (scores * (ids != 0)).sum() / (SEGMENTS != 0).sum()

    with jax.set_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params, *batch)
    return params, value, grads


@pytest.fixture(scope="module")
def one():
    return step(MeshConfig(1, 1, 1), 1)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MESHES])
def test_one_device_equals_eight(name, one):
    params, loss, grads = step(MESHES[name], 8)
    for path, value in named(one[0]).items():
        np.testing.assert_array_equal(named(params)[path], value, err_msg=path)
    check_close(loss, one[1], dtype="float32", what="loss")
    for path, grad in named(one[2]).items():
        check_close(named(grads)[path], grad, dtype="float32", what=f"gradient of {path}")


@pytest.mark.slow
def test_padding_anywhere_with_tokens_split():
    """Documents over the edges of shards, padding inside them: the rows' tokens change devices and come back."""
    rows = packed_rows()
    model = jax.jit(lambda: HybridLM(MODEL, rngs=nnx.Rngs(0)), compiler_options=QUICK)()
    run = jax.jit(lambda model: model(rows.tokens, rows.segment_ids), compiler_options=QUICK)
    expected = run(model)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, context=4), jax.devices()[:4])):
        actual = run(jax.device_put(model, jax.sharding.PartitionSpec()))
    real = rows.segment_ids != 0
    check_close(np.asarray(actual)[real], np.asarray(expected)[real], dtype="float32", what="logits")


def test_parameters_are_born_sharded():
    params = step(MESHES["context and others"], 8)[0]
    held = {".".join(map(str, path)): leaf[...].addressable_shards for path, leaf in nnx.to_flat_state(params)}
    held = {path: shards[0].data.shape for path, shards in held.items()}
    assert held["groups.0.0.mixer.in_zx"] == (2, 8, 2, 4, 4)
    assert held["groups.0.0.mixer.A_log"] == (2, 4)
    assert held["embedding"] == (20, 8)
    assert held["groups.0.2.mixer.w_in"] == (2, 8, 2, 12)
    assert part_of("groups.0.0.mixer.in_zx") == (2, 8, 2, 2, 4)
    assert part_of("groups.0.0.mixer.in_BC") == (2, 8, 2, 2, 4)  # 2 groups on 4 shards: whole


def part_of(name: str) -> tuple[int, ...]:
    """Shape of a parameter on a device of 2 times 4."""
    model, mesh = init.abstract(MODEL), sharding.make_mesh(MESHES["fsdp and tensor"])
    of = lambda tree: {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.State(tree))}
    return of(sharding.param_shardings(model.info, mesh))[name].shard_shape(of(model.shapes)[name].shape)


def test_no_device_holds_a_whole_sharded_parameter_while_drawing():
    """Eight devices, each an eighth: the program that draws the parameters takes about two eighths beside its own."""
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    config = replace(MODEL, d_model=512, pattern="M-" * 2, tie_embeddings=True)
    info = param_info(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
    total = 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(info))
    memory = init.compile_init(config, mesh).memory_analysis()
    assert memory.output_size_in_bytes < total / 7
    assert memory.temp_size_in_bytes < total * 3 / 8


def test_param_info_matches_the_parameters():
    model = nnx.eval_shape(lambda: HybridLM(MODEL, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    info = param_info(model)
    assert jax.tree.structure(params) == jax.tree.structure(param_info(params)) == jax.tree.structure(info)

    def check(leaf, info):
        assert leaf.shape == info.shape
        assert leaf.ndim == len(info.axes) + info.stacked
        assert leaf.dtype == np.float32
        assert (info.n_in > 0) == (info.kind == "matrix")
        assert not info.fused_axes or info.kind == "matrix"

    jax.tree.map(check, params, info)
    by_name = {path: leaf for path, leaf in flat(info)}
    assert by_name["groups.0.0.mixer.in_zx"].axes == ("d_model", None, "heads", "d_head")
    assert by_name["groups.0.0.mixer.in_zx"].fused_axes == (1,)
    assert by_name["groups.0.0.mixer.out"].n_in == 2
    assert by_name["groups.0.1.mixer.w_o"].n_in == 2
    assert by_name["groups.0.0.mixer.dt_bias"].kind == "recurrence"
    assert by_name["groups.1.0.mixer.sinks"].kind == "sink"
    assert by_name["embedding"].kind == by_name["output"].kind == "embedding"
    assert not by_name["norm.weight"].stacked
    assert by_name["groups.1.0.norm.weight"].stacked


def flat(info):
    return [(".".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(info)]


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (MeshConfig(1, 1, 8), {"vocab_size": 42}, r"model\.vocab_size \(42\) not divisible by mesh\.tensor \(8\)"),
        (MeshConfig(1, 8, 1), {"d_model": 20}, r"model\.d_model \(20\) not divisible by mesh\.fsdp \(8\)"),
        (
            MeshConfig(2, 1, 4),
            {"pattern": "*", "blocks": {"*": Attention(n_heads=6, d_head=8)}},
            r"model\.blocks\.\*\.n_heads \(6\) not divisible by mesh\.tensor \(4\)",
        ),
        (
            MeshConfig(2, 1, 4),
            {"pattern": "M", "blocks": {"M": Mamba2(d_head=16, expand=3)}},
            r"model\.blocks\.M\.n_heads \(3\) not divisible by mesh\.tensor \(4\)",
        ),
        (
            MeshConfig(2, 1, 4),
            {"pattern": "-", "blocks": {"-": MLP(d_ff=30)}},
            r"model\.blocks\.-\.d_ff \(30\) not divisible by mesh\.tensor \(4\)",
        ),
    ],
)
def test_what_does_not_divide(mesh, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        init.init_sharded(replace(MODEL, **changes), sharding.make_mesh(mesh), seed=0)


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (1, r"data\.batch_size \(12\) not divisible by mesh\.data \* mesh\.fsdp \(8\)"),
        (2, r"data\.batch_size / optim\.accumulate \(6\) not divisible by mesh\.data \* mesh\.fsdp \(8\)"),
    ],
)
def test_rows_that_do_not_divide(accumulate, message):
    config = Config(model=MODEL, data=DataConfig(batch_size=12), optim=OptimConfig(accumulate=accumulate))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_config(config, sharding.make_mesh(MeshConfig(4, 2, 1)))


def test_tokens_that_do_not_divide():
    config = Config(model=MODEL, data=DataConfig(seq_len=18, batch_size=8))
    with pytest.raises(ConfigError, match=r"^data\.seq_len \(18\) not divisible by mesh\.context \(4\)$"):
        check_config(config, sharding.make_mesh(MeshConfig(2, context=4)))


def test_experts_that_are_not_there():
    config = Config(model=MODEL, data=DataConfig(batch_size=8, seq_len=16))
    with pytest.raises(ConfigError, match=r"^mesh\.expert \(4\): no block of model\.pattern has experts to split"):
        check_config(config, sharding.make_mesh(MeshConfig(2, expert=4)))


def test_what_is_repeated_is_said():
    """Served as it is, see test_one_device_equals_eight: 2 and 4 key/value heads and 2 groups over 8."""
    said = repeated(Config(model=MODEL), sharding.make_mesh(MeshConfig(1, tensor=8)))
    assert said is not None and "\n" not in said
    assert said.startswith("mesh.tensor (8) does not divide 2 state groups, 2 key/value heads, 4 key/value heads: ")
    assert repeated(Config(model=MODEL), sharding.make_mesh(MeshConfig(4, tensor=2))) is None
    assert repeated(Config(model=MODEL), sharding.make_mesh(MeshConfig(8))) is None


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(3, 1, 1),
            r"mesh \(data 3\) needs 3 devices, 8 are there; nearest that fit: data 8, or data 4 x fsdp 2, or .*",
        ),
        (
            MeshConfig(-1, 3, 1),
            r"mesh \(data -1 x fsdp 3\): 8 devices not divisible by 3; nearest .*: data 2 x fsdp 4, .*",
        ),
        (
            MeshConfig(2, 2, 4),
            r"mesh \(data 2 x fsdp 2 x tensor 4\) needs 16 devices, 8 are there; nearest that fit: .*",
        ),
    ],
)
def test_meshes_that_do_not_fit(mesh, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        sharding.make_mesh(mesh)


def test_mesh_takes_what_is_left():
    for mesh, devices, sizes in (
        (MeshConfig(-1, 2, 2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(2, context=-1), 8, {"data": 2, "context": 4}),
        (MeshConfig(1, 1, 1), 1, {}),
    ):
        shape = sharding.make_mesh(mesh, jax.devices()[:devices]).shape
        assert {name: size for name, size in shape.items() if size != 1} == sizes


@pytest.mark.slow
def test_generation_on_a_mesh_equals_one_device(one):
    import hybridlm

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: HybridLM(MODEL, rngs=nnx.Rngs(0))))
    tokens = np.random.default_rng(1).integers(0, 40, (2, 5))
    expected = hybridlm.generate(nnx.merge(graphdef, one[0]), tokens, max_new_tokens=6)
    mesh = sharding.make_mesh(MESHES["fsdp and tensor"])
    model = init.init_sharded(MODEL, mesh, seed=3)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(hybridlm.generate(model, tokens, max_new_tokens=6), expected)
