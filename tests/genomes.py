# SPDX-License-Identifier: Apache-2.0
"""Small genomes as FASTA files: sequences with something to learn, on both strands, as real files have them."""

import gzip
from pathlib import Path

import numpy as np

PAIRS = str.maketrans("ACGTNacgtn", "TGCANtgcan")


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its own direction; upper and lower case stay."""
    return sequence.translate(PAIRS)[::-1]


def make_genome(n_records: int = 8, length: int = 600, seed: int = 0, n_motifs: int = 3) -> list[str]:
    """Sequences of a few motifs on either strand with random bases between them; parts in lower case, some N."""
    rng = np.random.default_rng(seed)
    motifs = ["".join(rng.choice(list("ACGT"), 24)) for _ in range(n_motifs)]
    records = []
    for _ in range(n_records):
        parts = []
        while sum(map(len, parts)) < length:
            motif = motifs[rng.integers(len(motifs))]
            motif = reverse_complement(motif) if rng.integers(2) else motif
            between = "".join(rng.choice(list("ACGT"), rng.integers(2, 8)))
            parts += [motif.lower() if rng.integers(4) == 0 else motif, between]
        record = list("".join(parts)[:length])
        record[length // 3 : length // 3 + 2] = "NN"
        records.append("".join(record))
    return records


def write_fasta(path: Path, records: list[str], width: int = 60, end: str = "\n") -> Path:
    """The records, lines of `width` letters; compressed where the name ends in .gz."""
    lines = []
    for i, record in enumerate(records):
        lines.append(f">chr{i + 1} made up")
        lines += [record[start : start + width] for start in range(0, len(record), width)]
    content = (end.join(lines) + end).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
