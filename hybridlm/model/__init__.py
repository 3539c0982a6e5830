# SPDX-License-Identifier: Apache-2.0
"""Language models of a pattern of blocks: config, modules, start, generation."""

from hybridlm.lazy import exporter

_EXPORTS = {
    "Cache": "hybridlm.model.model",
    "HybridLM": "hybridlm.model.model",
    "ModelConfig": "hybridlm.model.config",
    "ParamInfo": "hybridlm.layers.params",
    "Sublayer": "hybridlm.model.sublayer",
    "param_info": "hybridlm.layers.params",
}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
