# SPDX-License-Identifier: Apache-2.0
"""What publishers say of their models' caches, with where they say it."""

from typing import NamedTuple


class Claim(NamedTuple):
    """Of one published model."""

    says: str
    """In a few words."""
    source: str
    """Where that stands."""
    context: int | None = None
    """Tokens of the one row that it is said of; None: any."""


JAMBA = "Lieber et al. 2024, arXiv:2403.19887"
CLAIMS = {
    "hybrid_1b": Claim("8 times smaller keys and values than a transformer's at 7 to 1 (87.5% less), of Jamba", JAMBA),
    "jamba_52b": Claim("4 GB of keys and values (Mixtral 32 GB, Llama-2 7B 128 GB)", f"{JAMBA}, table 1", 262_144),
    "jamba_398b": Claim("9 GB of keys and values", "Jamba Team 2024, arXiv:2408.12570, table 1", 262_144),
    "kimi_linear_48b-a3b": Claim("up to 75% less than of latent attention alone", "Kimi Team 2025, arXiv:2510.26692"),
    "hymba_1.5b": Claim(
        "11.67 times smaller than of Llama-3.2-3B; layers share keys and values there, not here",
        "Dong et al. 2024, arXiv:2411.13676",
    ),
}  # fmt: skip
"""Name of a config -> what is published of it. Of other configs nothing is known here."""
