# SPDX-License-Identifier: Apache-2.0
"""Other implementations of Mamba-2, timed beside ours: transformers' own (PyTorch) and mamba2-jax, each in the size of
a config whose sublayers are all Mamba-2, and each by the loop that its documents show: one call a token from the host.

Their state does not grow, so the context of a row changes nothing for them: it is PROMPT tokens that are read.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from hybridlm.errors import ConfigError, require
from hybridlm.hf.config_json import write_values
from hybridlm.hf.families import KNOWN
from hybridlm.infer.bench_models import Ours
from hybridlm.infer.bound import RECURRENT, Moved
from hybridlm.model.config import ModelConfig

PROMPT = 64
"""Tokens that are read before peers write."""
FAMILY = "mamba2"
"""The published family whose words say the size."""


@dataclass(frozen=True)
class Peer:
    """A model of others in the size of ours."""

    name: str
    like: Ours
    """Sizes are counted as of ours."""
    kind: str = RECURRENT
    filled: str = f"{PROMPT} tokens that were read, which is the same for a state"

    @property
    def compute(self) -> str:
        """Type of the weights."""
        return self.like.compute

    def weights(self) -> int:
        """As ours."""
        return self.like.weights()

    def cache(self, batch: int, context: int) -> tuple[int, dict[str, str]]:
        """As ours in bytes; of types nothing is known."""
        return self.like.cache(batch, context)[0], {}

    def beside(self, batch: int) -> int:
        """As ours."""
        return self.like.beside(batch)

    def moved(self, batch: int, context: int) -> Moved:
        """What ours has to move: the same model."""
        return self.like.moved(batch, context)

    def flops(self, context: int) -> float:
        """As ours."""
        return self.like.flops(context)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """With weights as the library draws them."""
        made = OPEN[self.name](self.like.model)
        try:
            yield made
        finally:
            made.close()


class Transformers:
    """`transformers.Mamba2ForCausalLM`, on a GPU where PyTorch sees one."""

    def __init__(self, model: ModelConfig):
        import torch
        from transformers import Mamba2Config, Mamba2ForCausalLM

        self.torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        values = {key: value for key, value in published(model).items() if key not in ("architectures", "model_type")}
        with torch.device(self.device):
            made = Mamba2ForCausalLM(Mamba2Config(**values))
        self.model: Any = made.to(getattr(torch, model.compute_dtype)).eval()
        self.vocab = model.vocab_size

    def decode(self, batch: int, context: int, n_new: int, warm: bool) -> float:
        """See `bench_models.Open`."""
        n_read = min(PROMPT, max(1, context - n_new))
        with self.torch.inference_mode():
            token_B1, kept = self._read(batch, n_read)
            for i in range(2 * n_new):
                if i == n_new:
                    began = self._now()
                token_B1, kept = self._step(token_B1, kept, n_read + i)
            return self._now() - began

    def prefill(self, batch: int, context: int, warm: bool) -> float:
        """All at once, as its `generate` does; logits of the last token alone."""
        with self.torch.inference_mode():
            began = self._now()
            self._read(batch, min(context - 1, PROMPT) if warm else context - 1)
            return self._now() - began

    def close(self) -> None:
        """Gives the memory back, which PyTorch keeps for itself."""
        self.model = None
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()

    def _read(self, batch: int, n_tokens: int) -> tuple[Any, dict[str, Any]]:
        ids_BT = self.torch.randint(self.vocab, (batch, n_tokens), device=self.device)
        return self._next(self.model(ids_BT, use_cache=True, logits_to_keep=1))

    def _step(self, token_B1: Any, kept: dict[str, Any], position: int) -> tuple[Any, dict[str, Any]]:
        places = self.torch.tensor([position], device=self.device)
        more = {"cache_position": places} if "cache_params" in kept else {}  # what versions before cache= ask for
        return self._next(self.model(token_B1, use_cache=True, **kept, **more))

    def _next(self, out: Any) -> tuple[Any, dict[str, Any]]:
        name = "cache" if getattr(out, "cache", None) is not None else "cache_params"
        return out.logits[:, -1:].argmax(-1), {name: getattr(out, name)}

    def _now(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


class Mamba2Jax:
    """`mamba2_jax.Mamba2ForCausalLM` with its own jitted forward and cache."""

    def __init__(self, model: ModelConfig):
        import jax
        from flax import nnx
        from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

        values = published(model)
        require(values["n_groups"] == 1, f"mamba2-jax has one state group, the config {values['n_groups']}")
        same = (
            "vocab_size", "hidden_size", "state_size", "head_dim", "chunk_size", "expand", "conv_kernel",
            "num_hidden_layers", "layer_norm_epsilon", "use_bias", "use_conv_bias", "tie_word_embeddings",
        )  # fmt: skip
        made = Mamba2ForCausalLM(Mamba2Config(**{name: values[name] for name in same}), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(made)
        params = jax.tree.map(lambda a: a.astype(model.compute_dtype), params)
        self.params: Any = params
        self.vocab = model.vocab_size

        def step(params: Any, ids_BT: Any, cache: Any) -> tuple[Any, Any]:
            out = nnx.merge(graphdef, params)(ids_BT, None, cache)
            return out["logits"][:, -1:].argmax(-1), out["cache"]

        self.step = jax.jit(step)

    def decode(self, batch: int, context: int, n_new: int, warm: bool) -> float:
        """See `bench_models.Open`."""
        import jax

        token_B1, cache = self._read(batch, min(PROMPT, max(1, context - n_new)))
        for i in range(2 * n_new):
            if i == n_new:
                jax.block_until_ready((token_B1, cache))
                began = time.perf_counter()
            token_B1, cache = self.step(self.params, token_B1, cache)
        jax.block_until_ready((token_B1, cache))
        return time.perf_counter() - began

    def prefill(self, batch: int, context: int, warm: bool) -> float:
        """All at once: it has no other way. warm: the same, which compiles it."""
        import jax

        began = time.perf_counter()
        jax.block_until_ready(self._read(batch, context - 1))
        return time.perf_counter() - began

    def close(self) -> None:
        """Lets the parameters go."""
        self.params = None

    def _read(self, batch: int, n_tokens: int) -> tuple[Any, Any]:
        ids_BT = np.random.default_rng(0).integers(0, self.vocab, (batch, n_tokens), np.int32)
        return self.step(self.params, ids_BT, None)


OPEN: dict[str, Any] = {"transformers": Transformers, "mamba2-jax": Mamba2Jax}
"""By name, as a row has it."""
NEEDS = {"transformers": ("torch", "transformers"), "mamba2-jax": ("mamba2_jax",)}
"""Modules."""


def published(model: ModelConfig) -> dict[str, Any]:
    """config.json in the words that other implementations read; ConfigError where they cannot say the model."""
    return write_values(KNOWN[FAMILY], model)[0]


def peers(ours: list[Ours]) -> tuple[list[Peer], list[str]]:
    """(peers that are installed, why others are not there) in the size of the first config that they can be of.

    ConfigError where none can be said in their words.
    """
    like = next((one for one in ours if one.kind == RECURRENT and _said(one.model)), None)
    if like is None:
        raise ConfigError("peers: no config here is of Mamba-2 alone, as --config mamba2_1b is: name one")
    found, missing = [], []
    for name, modules in NEEDS.items():
        absent = [module.replace("_", "-") for module in modules if find_spec(module) is None]
        if absent:
            missing.append(f"{name} is not timed: {', '.join(absent)} not installed (pip install 'hybridlm[peers]')")
        else:
            found.append(Peer(name, like))
    return found, missing


def _said(model: ModelConfig) -> bool:
    try:
        published(model)
    except ConfigError:
        return False
    return True
