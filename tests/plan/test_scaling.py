# SPDX-License-Identifier: Apache-2.0
"""The points that docs/results/scaling.md shows are those that the script would compile."""

import json

from hybridlm.config.find import load_config
from hybridlm.config.pods import read_topology
from tests.plan import scaling


def test_every_line_is_of_a_point():
    """None is left of other words, each of them has one line, and a step lies between its ends."""
    lines = [json.loads(line) for line in scaling.FILE.read_text(encoding="utf-8").splitlines()]
    known = scaling.read()
    assert len(lines) == len(known) and set(known) <= set(scaling.POINTS)
    for one in known.values():
        assert "refused" in one or 0 < one["seconds"][0] <= one["seconds"][1]
    assert len(scaling.rows(known)) >= 2 + len(known)


def test_points_are_what_their_curves_say():
    """Weak: 4 rows of 4,096 tokens a chip; the others: a million tokens a step."""
    for curve, names in scaling.CURVES.items():
        for name in names:
            words = list(scaling.POINTS[name])
            topology = words[words.index("--topology") + 1]
            config = load_config(words[1], [word for word in words if "." in word.partition("=")[0]])
            rows = 4 * read_topology(topology).chips if curve == "weak" else 2**20 // config.data.seq_len
            assert (config.data.batch_size, config.data.seq_len == 4096) == (rows, curve != "context" or name == "64")
