# SPDX-License-Identifier: Apache-2.0
"""Trained models at work: texts as they are written, and conversations; and what their caches take."""

from hybridlm.lazy import exporter

_EXPORTS = {
    "Conversation": "hybridlm.infer.chat",
    "Options": "hybridlm.infer.texts",
    "write": "hybridlm.infer.texts",
}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
