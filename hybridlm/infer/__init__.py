# SPDX-License-Identifier: Apache-2.0
"""Trained models at work: texts as they are written, and conversations."""

from hybridlm.lazy import exporter

_EXPORTS = {
    "Conversation": "hybridlm.infer.chat",
    "Options": "hybridlm.infer.write",
    "write": "hybridlm.infer.write",
}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
