# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in and out: `from_hf`, `to_hf`, and one file for each family that they know."""

from hybridlm.lazy import exporter

_EXPORTS = {"FAMILIES": "hybridlm.hf.families", "from_hf": "hybridlm.hf.load", "to_hf": "hybridlm.hf.save"}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
