# SPDX-License-Identifier: Apache-2.0
"""What a model with a fixed state can reach at best, by counting: no training goes past it.

A model that carries `bits` bits from one token to the next is in one of 2**bits states when it is asked. Both bounds
follow from that alone, whatever the model computes, however it is trained, and with what was drawn beside the answers
(keys, places, filler) given to it for free. They bound from above: what training finds is less, mostly much less.

- One answer of `choices` that are equally likely: 2**bits states lead to at most 2**bits different answers, so that
  accuracy is at most min(1, 2**bits / choices). (Jelassi et al. 2024 have this of a whole string.)
- n answers that hold `entropy` bits together: the state tells at most `bits` of them, so that entropy - bits stay open.
  By Fano's inequality (Cover and Thomas 2006, theorem 2.10.1), added up over the answers by the chain rule, a mean
  accuracy of p leaves open at most n (h(p) + (1 - p) log2(choices - 1)) bits, h the binary entropy. The bound is the
  largest p for which that is enough. It holds, too, where a model reads the earlier answers before the next is asked,
  and of a question drawn after the state is fixed: then all that might be asked counts as the n answers.
"""

import math

from hybridlm.errors import require


def listed(bits: float, choices: int) -> float:
    """min(1, 2**bits / choices): accuracy at one answer, of equally likely ones, from a state of so many bits."""
    check_bits(bits)
    return 1.0 if bits >= math.log2(choices) else 2.0**bits / choices


def fano(bits: float, answers: int, choices: int, entropy: float) -> float:
    """Mean accuracy at `answers` answers, of `choices` values each and `entropy` bits together: see above."""
    check_bits(bits)
    if bits >= entropy or choices == 1:
        return 1.0
    needed = (entropy - bits) / answers
    low, high = 1.0 / choices, 1.0  # what a mean accuracy leaves open falls from log2(choices) to 0 between them
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _open(middle, choices) >= needed else (low, middle)
    return high


def check_bits(bits: float) -> None:
    """ConfigError for a state that cannot be."""
    require(bits >= 0, f"bits ({bits}) of a state must be at least 0")


def _open(p: float, choices: int) -> float:
    """Bits that an answer can have left where it is guessed with probability p."""
    binary = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    return binary + (1 - p) * math.log2(choices - 1)
