# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in and out: `from_hf`, `to_hf`, and one file for each family that they know."""

_EXPORTS = {"FAMILIES": "hybridlm.hf.families", "from_hf": "hybridlm.hf.load", "to_hf": "hybridlm.hf.save"}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    """Public names, imported when first used: a published config alone does not wait for the model's imports."""
    if name in _EXPORTS:
        from importlib import import_module

        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hybridlm.hf' has no attribute {name!r}")
