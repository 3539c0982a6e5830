# SPDX-License-Identifier: Apache-2.0
"""hybridlm: hybrid SSM-attention language models in JAX."""

import pallas_kernels as _  # noqa: F401  first of all: it makes JAX safe to compute with on CPU
from hybridlm.lazy import exporter
from hybridlm.moved import MOVED
from pallas_kernels.moved import MovedModules

MovedModules(MOVED).install()

__version__ = "0.1.0"
_EXPORTS = {
    "ConfigError": "hybridlm.errors",
    "HybridLM": "hybridlm.model.model",
    "from_hf": "hybridlm.hf",
    "generate": "hybridlm.model.generation",
    "load_config": "hybridlm.config.find",
    "to_hf": "hybridlm.hf",
}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
