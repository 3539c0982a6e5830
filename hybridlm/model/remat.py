# SPDX-License-Identifier: Apache-2.0
"""What the backward pass recomputes, by name.

none     nothing: every intermediate is kept.
full     everything in a sublayer but its input.
dots     everything but the results of matrix products without batch dims: the projections are kept.
mixer    everything inside sequence mixers, of which only the input is kept; feed-forward sublayers keep theirs.
kernels  everything but what matrix products, scans and attention give: nothing that is slow to make again.
a,b,...  everything but a sublayer's input and the intermediates with these names, see `kept`; `kernels` among them
         stands for what that policy keeps.

Beside these, all keep what devices that share a row have told each other (`pallas_kernels.context.SENT`): it is small.
"""

from collections.abc import Callable, Iterable, Mapping

import jax

from hybridlm.errors import ConfigError, cut
from hybridlm.exchange import GATHERED
from hybridlm.layers import BLOCKS
from hybridlm.layers.block import Block, Kept, keeping, walk
from hybridlm.layers.fork import NORMED
from pallas_kernels.context import SENT

PRODUCTS = frozenset({"mlp_in"})
"""Names of products that kernels may make: `dots` knows others by what they are."""
POLICIES = ("none", "full", "dots", "mixer", "kernels")
OF_SUBLAYER = {
    NORMED: Kept("normed input of a sublayer"),
    GATHERED: Kept("what devices that share tensor, or experts, tell each other of it"),
}


def kept(blocks: Iterable[Block]) -> dict[str, Kept]:
    """Intermediates that a custom policy can keep, by name: those of a sublayer, of BLOCKS and of these blocks."""
    inside = (part for block in blocks for _, part in walk(block))
    return OF_SUBLAYER | {name: what for block in (*BLOCKS, *inside) for name, what in block.KEPT.items()}


def check(remat: str, blocks: Iterable[Block] = ()) -> None:
    """ConfigError for what is neither a policy nor a list of known names."""
    if remat in POLICIES:
        return
    names = ("kernels", *kept(blocks))
    for name in remat.split(","):
        if name.strip() not in names:
            known = f"{', '.join(POLICIES)}, or a comma-separated list of {', '.join(names)}"
            said, unknown = cut(remat, 80), cut(name.strip(), 80)
            raise ConfigError(f"model.remat ({said!r}): {unknown!r} is not known; known are {known}")


def wrap(function: Callable, remat: str, block: Block, *, in_loop: bool) -> Callable:
    """`function`, which runs one sublayer of the block, under the policy. in_loop: the body of a real loop, which XLA
    cannot merge with its recomputation; elsewhere that has to be forbidden."""
    if remat == "none" or (remat == "mixer" and not block.MIXES_TOKENS):
        return function
    policies, names = jax.checkpoint_policies, _names(remat, block)
    policy = policies.save_only_these_names(*names, SENT)
    if remat == "dots":
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policy)

    def kept_apart(*args):
        with keeping(names):
            return function(*args)

    return jax.checkpoint(kept_apart, policy=policy, prevent_cse=not in_loop)


def _names(remat: str, block: Block) -> frozenset[str]:
    """Names of the block's intermediates that a policy keeps."""
    if remat in ("full", "mixer"):
        return frozenset()
    if remat == "dots":
        return PRODUCTS
    names = [name.strip() for name in remat.split(",")]
    names += _of_kernels(kept([block])) if "kernels" in names else []
    return frozenset(names)


def _of_kernels(names: Mapping[str, Kept]) -> list[str]:
    return [name for name, what in names.items() if what.kernels]
