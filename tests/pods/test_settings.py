# SPDX-License-Identifier: Apache-2.0
"""Settings for pods: named as the planner names slices, laid on the described ones, batches that divide."""

import math

import pytest

from hybridlm.config.find import load_config, pod_names, read_config
from hybridlm.config.mesh import check_config
from hybridlm.config.pods import Pod, Topology, read_topology
from hybridlm.errors import ConfigError
from hybridlm.sharding import RULES, MeshConfig, make_mesh
from tests.pods.slices import devices

SIZED = """
from hybridlm.config import Config, MeshConfig
from hybridlm.config.pods import Pod
SIZES = ("s", "l")
PODS = {"l:v5e:2x2": Pod(MeshConfig(data=1, fsdp=4), batch_size=8, accumulate=2, remat="full")}

def config(size):
    return Config(name=f"mine_{size}")
"""


def test_words_of_topologies():
    assert read_topology("v5p:8x8x16") == Topology("v5p:8x8x16") and read_topology("v5p:8x8x16").chips == 1024
    assert read_topology("2xv5e:16x16") == Topology("v5e:16x16", 2)
    assert (read_topology("2xv5e:16x16").chips, read_topology("tpu7x:2x2x1").devices) == (512, 8)
    for words in ("v5p:8x8x16", "2xv5e:16x16", "16xtpu7x:4x4x8", "v6e:1x1"):
        assert str(read_topology(words)) == words
    for words in ("", "v5p", "v5p:8", "v5p:8x8x8x8", "v5p:0x8", "0xv5e:2x2", "2v5e:2x2", "h100:8x1 ", "v5e:2x2x"):
        with pytest.raises(ConfigError, match=r"topology \(.*\) must be GENERATION:CHIPSxCHIPS"):
            read_topology(words)


@pytest.mark.parametrize("name", pod_names())
def test_the_batch_divides(name):
    stem, _, words = name.partition(":")
    config, bare = read_config(name), read_config(stem)
    topology = read_topology(words)
    sizes = vars(config.mesh)
    assert math.prod(sizes.values()) == topology.devices and sizes["slice"] == topology.slices
    rows = math.prod(sizes[axis] for axis in RULES["batch"])
    assert config.data.batch_size % (config.optim.accumulate * rows) == 0
    changed = {"mesh", "data.batch_size", "optim.accumulate", "model.remat"}
    from hybridlm.config.stored import differences

    assert {path if not path.startswith("mesh.") else "mesh" for path in differences(bare, config)} <= changed


@pytest.mark.libtpu
@pytest.mark.parametrize("name", pod_names())
def test_it_lies_on_the_described_slices(name):
    config = read_config(name)
    mesh = make_mesh(config.mesh, devices(name.partition(":")[2]))
    check_config(config, mesh)
    assert mesh.size == read_topology(name.partition(":")[2]).devices


def test_a_name_with_a_pod_takes_overrides_and_the_bare_one_stays():
    config = load_config("hybrid_1b:v5e:16x16", ["--data.batch_size=1024"])
    assert (config.name, config.data.batch_size, config.mesh.fsdp) == ("hybrid_1b", 1024, 256)
    assert load_config("hybrid_1b").mesh == MeshConfig()
    assert {"hybrid_8b:v5p:8x8x16", "hybrid_1b:v5e:16x16", "hybrid_1b:2xv5e:16x16"} <= set(pod_names())


def test_a_pod_of_a_size(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SIZED)
    config = read_config(f"{file}:l:v5e:2x2")
    assert (config.name, config.mesh.fsdp, config.model.remat) == ("mine_l", 4, "full")
    assert (config.data.batch_size, config.optim.accumulate) == (8, 2)
    with pytest.raises(ConfigError, match=r"size \(s:v5e:2x2\) must be one of s, l"):
        read_config(f"{file}:s:v5e:2x2")


def test_what_is_no_pod_is_told():
    with pytest.raises(
        ConfigError, match=r"pod \(v5p:3x3\) must be one of v5p:8x8x16, .* --config hybrid_8b with --mesh"
    ):
        read_config("hybrid_8b:v5p:3x3")
    with pytest.raises(ConfigError, match=r"size \(v5e:2x2\) is given, but this config has no sizes"):
        read_config("hybrid_tiny:v5e:2x2")
    with pytest.raises(ConfigError, match=r"no config named 'hybrid_8:v5p:8x8x16': did you mean hybrid_8b:v5p:8x8x16"):
        read_config("hybrid_8:v5p:8x8x16")
    with pytest.raises(ConfigError, match=r"data.batch_size \(6\) not divisible by optim.accumulate \(4\)"):
        Pod(MeshConfig(), batch_size=6, accumulate=4).set_in(read_config("hybrid_tiny"))
