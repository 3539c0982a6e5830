# SPDX-License-Identifier: Apache-2.0
"""hybridlm: hybrid SSM-attention language models in JAX. docs/library.md lists what is exported, here and below.

Importing it imports `pallas_kernels`, with that package's effects on the process and the switch that turns them off.
"""

import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from hybridlm.errors import importing
from hybridlm.lazy import exporter, no_collections
from hybridlm.moved import MOVED

_IS_COMMAND = os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") in ("hybridlm", "-m")
"""`-m` stands there while `python -m hybridlm` looks for what it runs."""
with no_collections(), importing() if _IS_COMMAND else nullcontext():
    import pallas_kernels as _  # noqa: F401  first of all: it makes JAX safe to compute with on CPU
    from pallas_kernels.moved import MovedModules

if TYPE_CHECKING:  # of the names below, what they are
    from hybridlm.config import Config as Config
    from hybridlm.config.find import load_config as load_config
    from hybridlm.errors import ConfigError as ConfigError
    from hybridlm.errors import RunError as RunError
    from hybridlm.hf import from_hf as from_hf
    from hybridlm.hf import to_hf as to_hf
    from hybridlm.layers.cache import CacheTypes as CacheTypes
    from hybridlm.model.config import ModelConfig as ModelConfig
    from hybridlm.model.generation import generate as generate
    from hybridlm.model.model import HybridLM as HybridLM
    from hybridlm.sharding import MeshConfig as MeshConfig
    from hybridlm.sharding import make_mesh as make_mesh
    from hybridlm.train.loading import LoadedRun as LoadedRun
    from hybridlm.train.loading import load_run as load_run

MovedModules(MOVED).install()

__version__ = "0.1.0"
_EXPORTS = {
    "CacheTypes": "hybridlm.layers.cache",
    "Config": "hybridlm.config",
    "ConfigError": "hybridlm.errors",
    "HybridLM": "hybridlm.model.model",
    "LoadedRun": "hybridlm.train.loading",
    "MeshConfig": "hybridlm.sharding",
    "ModelConfig": "hybridlm.model.config",
    "RunError": "hybridlm.errors",
    "from_hf": "hybridlm.hf",
    "generate": "hybridlm.model.generation",
    "load_config": "hybridlm.config.find",
    "load_run": "hybridlm.train.loading",
    "make_mesh": "hybridlm.sharding",
    "to_hf": "hybridlm.hf",
}
__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # for which all other names are errors
    __getattr__ = exporter(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
