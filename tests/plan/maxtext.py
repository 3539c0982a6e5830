# SPDX-License-Identifier: Apache-2.0
"""Transformers as MaxText's published speeds are of, for plans: `--config tests/plan/maxtext.py:32b:v5p:4x4x4`.

Shapes are those of its `global_parameter_scale` 16 and 32 (base.yml and `get_individual_scales`), rows, mesh and
recomputation those of configs/v5p/32b.sh, configs/v5e/32b.sh and 16b.sh. Its remat_policy=minimal keeps the result of
every product, as `kernels` does here for all but the attention's last one, which no gradient asks for.
"""

from hybridlm.config import MLP, Attention, Config, DataConfig, MeshConfig, ModelConfig
from hybridlm.config.pods import Pod

SIZES = {"16b": 4096, "32b": 8192}
"""Name -> width."""
PODS = {
    "32b:v5p:4x4x4": Pod(MeshConfig(data=1, fsdp=16, tensor=4), batch_size=448, remat="kernels"),
    "32b:v5e:16x16": Pod(MeshConfig(data=1, fsdp=256), batch_size=1024, remat="full"),
    "16b:v5e:16x16": Pod(MeshConfig(data=1, fsdp=256), batch_size=1536, remat="full"),
}
"""v5p-128 in its words, which counts cores, and v5e-256."""


def config(size: str) -> Config:
    return Config(
        name=f"maxtext_{size}",
        model=ModelConfig(
            vocab_size=32_000,
            d_model=SIZES[size],
            pattern="*-" * 32,
            blocks={"*": Attention(n_heads=64, n_kv_heads=64, d_head=128), "-": MLP(d_ff=28_672)},
            tie_embeddings=False,
        ),
        data=DataConfig(seq_len=2048, batch_size=448),
    )
