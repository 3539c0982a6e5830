# SPDX-License-Identifier: Apache-2.0
"""Every published family, read in random pieces, ragged, together and alone, gives its own full forward."""

import pytest

from tests.hf.hf_support import GOLDEN, golden
from tests.model.pieces import check_pieces


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_random_pieces_of_ragged_rows(name):
    check_pieces(golden(name)[0], seed=GOLDEN.index(name))
