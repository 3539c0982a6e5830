# SPDX-License-Identifier: Apache-2.0
"""Rows over GPUs that are not there: the step compiles, and plans no more memory than the stream for each sublayer."""

import pytest

from hybridlm.config.find import load_config
from hybridlm.plan.described import described
from hybridlm.plan.slices import read_devices

pytestmark = [pytest.mark.slow, pytest.mark.cuda]
TOKENS, WIDTH = 65_536, 512


def compiled(cards: int, *words: str):
    config = load_config("hybrid_tiny", ["--mesh.data=1", f"--mesh.context={cards}", *words])
    with described(config, read_devices(f"h100:{cards}").compilable()) as there:
        return there.trace().lower().compile()


def test_a_row_of_few_chunks_compiles():
    """128 tokens a card: what a shard_map was passed of no size ended the compiler."""
    text = compiled(2, "--model.compute_dtype=bfloat16", "--model.pattern=M", "--optim.rule=AdamW").as_text()
    assert "collective-permute" in text and "ssd_walk" in text


def test_a_sublayer_adds_its_input_alone():
    """Gradients that the scheduler puts off would keep four times as much of each pair of sublayers."""

    def temporaries(pairs: int) -> int:
        words = ("--model.remat=full", "--data.batch_size=1", f"--data.seq_len={TOKENS}", "--optim.rule=AdamW",
                 "--model.compute_dtype=bfloat16", f"--model.d_model={WIDTH}", f"--model.blocks.-.d_ff={4 * WIDTH}",
                 "--model.blocks.M.d_head=64", "--model.blocks.M.d_state=128",
                 f"--model.pattern={'M-' * pairs}")  # fmt: skip
        return compiled(4, *words).memory_analysis().temp_size_in_bytes

    few, more = temporaries(2), temporaries(5)
    stream = TOKENS // 4 * WIDTH * 2
    weights = 16 * WIDTH**2 * 4  # of a pair, in float32: casts and gradients
    assert more - few < 3 * (2 * 1.5 * stream + weights)
