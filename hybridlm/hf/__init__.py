# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in and out: `from_hf`, `to_hf`, and one file for each family that they know."""

from hybridlm.hf.families import FAMILIES
from hybridlm.hf.load import from_hf
from hybridlm.hf.save import to_hf

__all__ = ["FAMILIES", "from_hf", "to_hf"]
