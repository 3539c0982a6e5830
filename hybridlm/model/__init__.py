# SPDX-License-Identifier: Apache-2.0
"""Language models of a pattern of blocks: config, modules, start, generation."""

_EXPORTS = {
    "Cache": "hybridlm.model.model",
    "HybridLM": "hybridlm.model.model",
    "ModelConfig": "hybridlm.model.config",
    "ParamInfo": "hybridlm.layers.params",
    "Sublayer": "hybridlm.model.sublayer",
    "param_info": "hybridlm.layers.params",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    """Public names, imported when first used: a config alone does not wait for the model's imports."""
    if name in _EXPORTS:
        from importlib import import_module

        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hybridlm.model' has no attribute {name!r}")
