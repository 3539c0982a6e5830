# SPDX-License-Identifier: Apache-2.0
"""Steps over GPUs that are not there: they compile, sum gradients over devices once, and plan no more memory for rows
over them than the stream for each sublayer."""

import pytest

from hybridlm.config.find import load_config
from hybridlm.plan.described import described
from hybridlm.plan.hlo import collectives, parse
from hybridlm.plan.slices import read_devices

pytestmark = [pytest.mark.slow, pytest.mark.cuda]
TOKENS, WIDTH = 65_536, 512


def compiled(cards: int, *words: str, axis: str = "context"):
    config = load_config("hybrid_tiny", ["--mesh.data=1", f"--mesh.{axis}={cards}", *words])
    with described(config, read_devices(f"h100:{cards}").compilable()) as there:
        return there.trace().lower().compile()


def test_a_row_of_few_chunks_compiles():
    """128 tokens a card: what a shard_map was passed of no size ended the compiler."""
    text = compiled(2, "--model.compute_dtype=bfloat16", "--model.pattern=M", "--optim.rule=AdamW").as_text()
    assert "collective-permute" in text and "ssd_walk" in text


@pytest.mark.parametrize(("axis", "kind"), [("context", "all-reduce"), ("fsdp", "reduce-scatter")])
def test_gradients_of_matrices_cross_once_a_step(axis, kind):
    """Of four microbatches: what sums cross in each are smaller than any matrix, but for a table's."""
    words = ("--model.compute_dtype=bfloat16", "--model.pattern=-", "--optim.rule=AdamW", "--optim.accumulate=4",
             f"--model.d_model={WIDTH}", f"--model.blocks.-.d_ff={4 * WIDTH}", "--data.seq_len=1024")  # fmt: skip
    found = collectives(parse(compiled(2, *words, axis=axis).as_text()))
    matrices = 3 * 4 * WIDTH**2 * 2  # of the MLP, in bfloat16
    table = WIDTH * load_config("hybrid_tiny", []).model.vocab_size * 4
    once, often = (sum(c.bytes for c in found if c.kind == kind and (c.runs == 1) is yes) for yes in (True, False))
    assert once >= matrices and often < table + WIDTH**2


@pytest.mark.parametrize(("cards", "rows"), [(4, 1), (1, 2)])
def test_a_sublayer_adds_its_input_alone(cards, rows):
    """Of one microbatch over cards, and of two on one. Gradients that the scheduler puts off would keep four times as
    much of each pair of sublayers."""

    def temporaries(pairs: int) -> int:
        words = ("--model.remat=full", f"--data.batch_size={rows}", f"--optim.accumulate={rows}",
                 f"--data.seq_len={TOKENS * cards // 4}", "--optim.rule=AdamW", "--model.compute_dtype=bfloat16",
                 f"--model.d_model={WIDTH}", f"--model.blocks.-.d_ff={4 * WIDTH}", "--model.blocks.M.d_head=64",
                 "--model.blocks.M.d_state=128", f"--model.pattern={'M-' * pairs}")  # fmt: skip
        return compiled(cards, *words).memory_analysis().temp_size_in_bytes

    few, more = temporaries(2), temporaries(5)
    stream = TOKENS // 4 * WIDTH * 2
    weights = 16 * WIDTH**2 * 4  # of a pair, in float32: casts and gradients, and sums of several microbatches
    assert more - few < 3 * (2 * 1.5 * stream + rows * weights)
