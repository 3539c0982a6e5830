# SPDX-License-Identifier: Apache-2.0
"""The one place of `hybridlm` that knows of differences between JAX versions (0.10.2 and 0.11.2)."""

import os
from importlib.metadata import version


def avoid_faulty_cpu_fusions() -> None:
    """Turns off XLA's YNNPACK fusions on CPU where they are faulty; to be called before JAX computes anything.

    jaxlib 0.10 puts reductions and small products into fusions that read and write memory that is not theirs: wrong
    results, and now and then a crash. A sum over the second of two blocked axes, `b.sum(-3)` of [..., 2, 16, 2, 16],
    is enough. jaxlib 0.11 is right.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type="
    flags = os.environ.get("XLA_FLAGS", "")
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
