# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in and out: `from_hf`, `to_hf`, and one file for each family that they know."""

from typing import TYPE_CHECKING

from hybridlm.lazy import exporter

if TYPE_CHECKING:
    from hybridlm.hf.families import FAMILIES as FAMILIES
    from hybridlm.hf.load import from_hf as from_hf
    from hybridlm.hf.save import to_hf as to_hf

_EXPORTS = {"FAMILIES": "hybridlm.hf.families", "from_hf": "hybridlm.hf.load", "to_hf": "hybridlm.hf.save"}
__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:
    __getattr__ = exporter(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
