# SPDX-License-Identifier: Apache-2.0
"""Every mixer, read in random pieces around the edges of its blocks and windows, gives one full forward."""

import pytest

from hybridlm.layers.block import free_fields, sees_ahead
from pallas_kernels.ops.attention import xla
from tests.model.model_support import VARIANTS, build, small
from tests.model.pieces import check_pieces
from tests.model.properties import with_field

NAMES = [name for name, block in VARIANTS.items() if not sees_ahead(block) and name != "recurrences"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_random_pieces_of_ragged_rows(name, monkeypatch):
    """Chunks of 4 and attention's blocks of 8 of what would take rows of hundreds to cross."""
    monkeypatch.setattr(xla, "_BLOCK", 8)
    block = VARIANTS[name]
    for path in free_fields(block):
        if path.endswith("chunk"):
            block = with_field(block, path, 4)
    check_pieces(build(small("x-x", {"x": block, "-": VARIANTS["mlp"]})), seed=NAMES.index(name))


@pytest.mark.slow
def test_prefix_tokens():
    """What stands in front of every row takes part in windows and blocks."""
    check_pieces(build(small("Maw", prefix_tokens=3)))
