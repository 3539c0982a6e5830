# SPDX-License-Identifier: Apache-2.0
"""Pallas TPU (Mosaic) attention of few queries over a long cache (decoding): the cache is read once, where it lies.

Softmax runs online over blocks of the cache; a list of the blocks between the first and the last visible one of each
batch row, made before the kernel starts, is all that is fetched (Dao et al. 2023, Flash-Decoding, for the split of the
cache over cores). The blocks are cut from the layout that XLA gives an array [B, S, K, P] in HBM, so no copy is made:

- "rows", P a multiple of 128 and K of 8 (or K small): seen as [B, S K, P]. All query heads meet all key heads in one
  product, and a mask keeps the pairs of a group: the matrix unit has time for it while the next block is fetched. Where
  the queries are too many for that, the rows of a key head are gathered by strided loads.
- "heads", P a multiple of 128, other K: XLA keeps [B, K, S, P], and a key head is a block of its own.
- "lanes", other P: XLA keeps [B, K, P, S], tokens along lanes.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.mosaic_tpu import F32, LANES, LOG2E, NN, NT, SUBLANES, dot, round_up, widen
from pallas_kernels.ops.attention.mask import LOWEST, Mask, visible_pairs
from pallas_kernels.ops.attention.tpu.common import HIDDEN, VMEM_BYTES, log2_scores
from pallas_kernels.varying import call_varying

MOST_QUERIES = 16
MOST_ROWS = 1024  # queries x heads
JOINT_ROWS = 64  # queries x heads up to which they meet every key head in one product
MOST_JOINT_ROWS = 256  # the same where strided loads are not to be had
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 22  # of a block of keys
MOST_TOKENS = 8192  # of a block
MOST_SCORES = 1 << 17  # alive together
MOST_WORDS = 1 << 15  # blocks listed in scalar memory
FIRST, LAST, VISIBLE = 1, 2, 4  # flags of a word: first and last block of its batch row, anything to see
BLOCK_SHIFT, ROW_SHIFT = 3, 17
MOST_BLOCKS = MOST_BATCH = 1 << 14


@dataclasses.dataclass(frozen=True)
class Decode:
    """Static description of a call."""

    layout: str  # "rows", "heads" or "lanes"
    joint: bool  # all query heads meet all keys in one product
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int  # of q and k
    v_width: int
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    ids: bool
    positions: str  # "", "counted" or "given"
    gate: str  # "", "head" or "channel"
    sinks: bool
    tokens: int  # of a block of the cache
    parts: int  # shares of the cache, one a core
    interpret: bool | object = False

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def products(self) -> int:
        """Products of queries and keys a block."""
        return 1 if self.joint else self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a product: [queries, heads], or [queries, group] filled up to whole registers."""
        return self.queries * self.heads if self.joint else round_up(self.queries * self.group, SUBLANES)

    @property
    def repeat(self) -> int:
        """Lanes of a token in a product: its key heads, if they stand there together."""
        return self.kv_heads if self.joint else 1

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return -(-self.keys // self.tokens)

    @property
    def ragged(self) -> bool:
        """The last block is not full."""
        return self.keys % self.tokens != 0


class Visits(typing.NamedTuple):
    """The blocks to visit: words [parts n], of which each part walks `count`; whole [(B or 1) blocks]: all visible."""

    words: jax.Array | np.ndarray
    whole: jax.Array | np.ndarray
    count: jax.Array | int


def choose_layout(n_kv_heads: int, width: int, v_width: int) -> str | None:
    """The view of the cache that costs nothing, or None where k and v have none in common."""
    if width % LANES and v_width % LANES:
        return "lanes"
    if width % LANES or v_width % LANES:
        return None
    if n_kv_heads == 1 or n_kv_heads % 8 == 0 or (n_kv_heads in (2, 4) and width == v_width == LANES):
        return "rows"
    return "heads" if n_kv_heads not in (2, 4) else None


def joins(layout: str, q_shape: tuple, n_kv_heads: int, v_width: int) -> bool:
    """Whether all query heads meet all keys in one product."""
    _, n_queries, n_heads, width = q_shape
    strided = width == v_width == LANES  # Mosaic's strided loads are one register wide
    return layout == "rows" and (n_kv_heads == 1 or not strided or n_queries * n_heads <= JOINT_ROWS)


def serves(q_shape: tuple, k_shape: tuple, v_width: int, itemsize: int) -> bool:
    """Whether this kernel takes the call, of shapes that the TPU kernels serve at all."""
    n_batch, n_queries, n_heads, width = q_shape
    n_keys, n_kv_heads = k_shape[1:3]
    layout = choose_layout(n_kv_heads, width, v_width)
    wasteful = n_kv_heads > 1 and joins(layout, q_shape, n_kv_heads, v_width)
    if layout is None or n_queries > MOST_QUERIES or n_queries * n_heads > (MOST_JOINT_ROWS if wasteful else MOST_ROWS):
        return False
    n_blocks = -(-n_keys // block_tokens(n_keys, n_kv_heads, max(width, v_width), itemsize))
    return n_blocks < MOST_BLOCKS and n_batch < MOST_BATCH and n_batch * n_blocks <= MOST_WORDS


def block_tokens(n_keys: int, n_kv_heads: int, width: int, itemsize: int) -> int:
    """Tokens of a block of the cache: a multiple of 128, or all."""
    token_bytes = n_kv_heads * width * itemsize
    n_bytes = min(MOST_BYTES, max(LEAST_BYTES, n_keys * token_bytes // 8))
    return min(n_keys, max(LANES, min(MOST_TOKENS, n_bytes // token_bytes // LANES * LANES)))


def list_visits(mask: Mask, n_batch: int, s: Decode) -> Visits:
    """What each core walks: the blocks from the first to the last visible one of each batch row, shared evenly.

    NumPy arrays if the mask's are.
    """
    xp = np if all(isinstance(array, np.ndarray) for array in jax.tree.leaves(mask)) else jnp
    some, whole = _seen_blocks(mask, s, xp)
    some = xp.broadcast_to(some, (n_batch, s.blocks))
    index = np.arange(s.blocks, dtype=np.int32)
    first_B = xp.where(some, index, s.blocks).min(1)
    end_B = xp.where(some, index + 1, 0).max(1)
    share_B = -(-xp.maximum(end_B - first_B, 0) // s.parts)
    part = np.arange(s.parts, dtype=np.int32)[:, None]
    begin_pB = xp.minimum(first_B[None] + part * share_B[None], end_B[None])
    found_pB = xp.clip(end_B[None] - begin_pB, 0, share_B[None])
    begin_pB = xp.clip(begin_pB, 0, s.blocks - 1)
    visits_pB = xp.maximum(found_pB, 1)
    stop_pB = xp.cumsum(visits_pB, axis=1)
    n = np.arange(n_batch * -(-s.blocks // s.parts), dtype=np.int32)[:, None]
    rows = np.arange(n_batch, dtype=np.int32)
    row_pn = xp.minimum((xp.expand_dims(n, 0) >= stop_pB[:, None]).sum(2), n_batch - 1)
    here = row_pn[:, :, None] == xp.expand_dims(rows, (0, 1))  # [parts, n, B]

    def of_row(table_pB):
        return xp.where(here, table_pB[:, None], 0).sum(2)

    step_pn = xp.expand_dims(n[:, 0], 0) - of_row(stop_pB - visits_pB)
    visits_pn, found_pn = of_row(visits_pB), of_row(found_pB)
    flags = (step_pn == 0) * FIRST + (step_pn == visits_pn - 1) * LAST + (step_pn < found_pn) * VISIBLE
    block_pn = of_row(begin_pB) + xp.minimum(step_pn, visits_pn - 1)
    words = flags + (block_pn << BLOCK_SHIFT) + (row_pn << ROW_SHIFT)
    count = stop_pB[:, -1].max()
    if xp is np:
        words, count = words[:, :count], int(count)
    else:
        count = count.astype(jnp.int32)
    return Visits(words.astype(np.int32).reshape(-1), whole.astype(np.int32).reshape(-1), count)


def _seen_blocks(mask: Mask, s: Decode, xp):
    """(anything visible, everything visible) by block, bool [B or 1, blocks]."""
    high = np.iinfo(np.int32).max

    def limits(array, n_blocks, size, but=None):
        """Smallest and largest entry of each block, without those equal to `but`."""
        cut = xp.pad(array, ((0, 0), (0, n_blocks * size - array.shape[1])), mode="edge")
        cut = cut.reshape(array.shape[0], n_blocks, size)
        if but is None:
            return cut.min(2), cut.max(2)
        return xp.where(cut != but, cut, high).min(2), xp.where(cut != but, cut, -high).max(2)

    query_limits = functools.partial(limits, n_blocks=1, size=s.queries)
    key_limits = functools.partial(limits, n_blocks=s.blocks, size=s.tokens)

    some = np.ones((1, s.blocks), bool)
    whole = np.arange(s.blocks)[None] < (s.keys // s.tokens)
    if s.ids:
        (q_low, q_top), (k_low, k_top) = query_limits(mask.q_ids_BT, but=0), key_limits(mask.k_ids_BS, but=0)
        some = some & (q_low <= k_top) & (k_low <= q_top)
        (q_low, q_top), (k_low, k_top) = query_limits(mask.q_ids_BT), key_limits(mask.k_ids_BS)
        whole = whole & (q_low == q_top) & (q_low != 0) & (q_low == k_low) & (k_low == k_top)
    if s.positions:
        q_low, q_top = query_limits(mask.q_position_BT)
        if s.positions == "given":
            k_low, k_top = key_limits(mask.k_position_BS)
        else:
            k_low = np.arange(s.blocks, dtype=np.int32)[None] * s.tokens
            k_top = np.minimum(k_low + s.tokens, s.keys) - 1
        if s.causal:
            some, whole = some & (q_top >= k_low), whole & (q_low >= k_top)
        if s.window is not None:
            some, whole = some & (q_low - k_top < s.window), whole & (q_top - k_low < s.window)
    return some, whole


def _start(refs, part, s: Decode):
    shape = refs["top"].shape
    if s.sinks:  # the sink is counted once, by the first share
        own = jnp.full(shape, part, jnp.int32) == 0
        refs["top"][...] = jnp.where(own, jnp.maximum(refs["sinks"][...] * LOG2E, LOWEST), LOWEST)
        refs["total"][...] = jnp.where(own, 1.0, 0.0)
    else:
        refs["top"][...] = jnp.full(shape, LOWEST, F32)
        refs["total"][...] = jnp.zeros(shape, F32)
    refs["sum"][...] = jnp.zeros_like(refs["sum"])


def _visible(refs, tokens: slice, block, s: Decode):
    """Mask [all rows or 1, keys] of the scores of some tokens in a block that is not visible as a whole."""
    n = tokens.stop - tokens.start
    token = lax.broadcasted_iota(jnp.int32, (1, n), 1) + (tokens.start + block * s.tokens)
    q_id = widen(refs["q_ids"][0], n) if s.ids else None
    k_id = refs["k_ids"][0, :, tokens] if s.ids else None
    q_position = widen(refs["q_positions"][0], n) if s.positions else None
    k_position = refs["k_positions"][0, :, tokens] if s.positions == "given" else token
    visible = visible_pairs(q_id, k_id, q_position, k_position, s.causal, s.window)
    if s.ragged or visible is None:
        inside = token < s.keys
        visible = inside if visible is None else visible & inside
    if s.repeat == 1:
        return visible
    # one lane a token becomes one a key: a product with ones, exact
    marks = jnp.where(visible, 1.0, 0.0).astype(jnp.bfloat16)
    pieces = []
    for start in range(0, n, LANES):
        piece = marks[:, start : start + LANES]
        pieces.append(dot(piece, refs["spread"][: piece.shape[1], : piece.shape[1] * s.repeat], NN))
    return jnp.concatenate(pieces, axis=1) > 0.5


def _visit(refs, masked: bool, block, s: Decode):
    """Takes a block of the cache into the running softmax."""
    step = max(LANES, MOST_SCORES // (s.products * s.rows * s.repeat) // LANES * LANES)
    for start in range(0, s.tokens, step):
        _visit_tokens(refs, slice(start, min(start + step, s.tokens)), masked, block, s)


def _visit_tokens(refs, tokens: slice, masked: bool, block, s: Decode):
    lanes = slice(tokens.start * s.repeat, tokens.stop * s.repeat)
    n = lanes.stop - lanes.start
    dims = (NN, NT) if s.layout == "lanes" else (NT, NN)
    products = [dot(refs["q"][0, j], _cached(refs["k"], j, lanes, s), dims[0]) for j in range(s.products)]
    scores, _ = log2_scores(products[0] if s.products == 1 else jnp.concatenate(products, axis=0), s)
    if s.joint and s.kv_heads > 1:
        same = widen(refs["row_heads"][...], n) == refs["lane_heads"][:, lanes]
        scores = jnp.where(same, scores, HIDDEN)
    if masked:
        scores = jnp.where(_visible(refs, tokens, block, s), scores, HIDDEN)
    before = refs["top"][...]
    top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - widen(top, n))
    shrink = jnp.exp2(before - top)
    refs["top"][...] = top
    refs["total"][...] = refs["total"][...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    for j in range(s.products):
        rows = slice(j * s.rows, (j + 1) * s.rows)
        v = _cached(refs["v"], j, lanes, s)
        if masked and s.ragged:
            left = (s.keys - block * s.tokens - tokens.start) * s.repeat
            inside = lax.broadcasted_iota(jnp.int32, v.shape, 1 if s.layout == "lanes" else 0) < left
            v = jnp.where(inside, v, jnp.zeros_like(v))
        added = dot(weights[rows].astype(v.dtype), v, dims[1])
        refs["sum"][rows] = refs["sum"][rows] * widen(shrink[rows], s.v_width) + added


def _cached(ref, j: int, lanes: slice, s: Decode):
    """Part of a block of keys or values for product j: [lanes, width], or [width, lanes] of the layout "lanes"."""
    if s.layout == "lanes":
        return ref[0, j, :, lanes]
    if s.layout == "heads":
        return ref[0, j, lanes]
    if s.joint:
        return ref[0, lanes]
    n, first = lanes.stop - lanes.start, lanes.start * s.kv_heads
    if ref.dtype == F32:
        return ref[:, pl.ds(first + j, n, stride=s.kv_heads)][0]
    pairs = ref.bitcast(jnp.int32)[:, pl.ds((first + j) // 2, n, stride=s.kv_heads // 2)][0]
    wide = pairs & np.int32(-(1 << 16)) if j % 2 else pairs << 16
    return lax.bitcast_convert_type(wide, F32).astype(ref.dtype)


def _finish(refs, s: Decode):
    total = refs["total"][...]
    seen = total > 0.0
    total = jnp.where(seen, total, 1.0)
    out = refs["sum"][...] / widen(total, s.v_width)
    if s.parts > 1:
        refs["log_sum"][0, 0] = jnp.where(seen, refs["top"][...] + jnp.log2(total), LOWEST)
    elif s.gate:
        opened = jax.nn.sigmoid(refs["gate"][0].astype(F32))
        out *= opened if s.gate == "channel" else widen(opened, s.v_width)
    refs["out"][0, 0] = out.astype(refs["out"].dtype)


def _kernel(words, whole, first, *args, names: tuple, s: Decode):
    del first  # for index maps alone
    refs = dict(zip(names, args))
    part = pl.program_id(0)
    word = _word(words, part, pl.program_id(1), s)
    block = _block(word)
    seen = word & VISIBLE != 0
    all_seen = _is_whole(whole, _row(word), block, s)

    @pl.when(word & FIRST != 0)
    def _():
        _start(refs, part, s)

    @pl.when(seen & all_seen)
    def _():
        _visit(refs, False, block, s)

    @pl.when(seen & ~all_seen)
    def _():
        _visit(refs, True, block, s)

    @pl.when(word & LAST != 0)
    def _():
        _finish(refs, s)


def _word(words, part, n, s: Decode):
    return words[part * (words.shape[0] // s.parts) + n]


def _is_whole(whole, row, block, s: Decode):
    return whole[(row * s.blocks if whole.shape[0] > s.blocks else 0) + block] != 0


def _row(word):
    return word >> ROW_SHIFT


def _block(word):
    return (word >> BLOCK_SHIFT) & (MOST_BLOCKS - 1)


def _specs(arrays: dict, s: Decode) -> dict:
    """Block specs by name; grid (parts, visits), scalars words, whole and the cache's first row."""

    def spec(shape, where, row_of=lambda row, first: row):
        def index(p, n, words, whole, first):
            word = _word(words, p, n, s)
            return where(row_of(_row(word), first), _block(word), whole)

        return pl.BlockSpec(shape, index)

    def by_row(array):
        many = array.shape[0] > 1
        zeros = (0,) * (array.ndim - 1)
        return spec((1, *array.shape[1:]), lambda row, block, whole: (row if many else 0, *zeros))

    def keys(array):
        """Ids and positions, fetched with the blocks that need them."""
        many = array.shape[0] > 1

        def where(row, block, whole):
            return row if many else 0, 0, jnp.where(_is_whole(whole, row, block, s), 0, block)

        return spec((1, 1, s.tokens), where)

    def cache(width):
        spec_of = functools.partial(spec, row_of=lambda row, first: first[0] + row)
        if s.layout == "rows":
            return spec_of((1, s.tokens * s.kv_heads, width), lambda row, block, whole: (row, block, 0))
        if s.layout == "heads":
            return spec_of((1, s.kv_heads, s.tokens, width), lambda row, block, whole: (row, 0, block, 0))
        return spec_of((1, s.kv_heads, width, s.tokens), lambda row, block, whole: (row, 0, 0, block))

    specs = {"k": cache(s.width), "v": cache(s.v_width)}
    for name in ("q", "gate", "q_ids", "q_positions"):
        if name in arrays:
            specs[name] = by_row(arrays[name])
    for name in ("k_ids", "k_positions"):
        if name in arrays:
            specs[name] = keys(arrays[name])
    for name in ("sinks", "row_heads", "lane_heads", "spread"):
        if name in arrays:
            zeros = (0,) * arrays[name].ndim
            specs[name] = spec(arrays[name].shape, lambda row, block, whole, zeros=zeros: zeros)
    return specs


def run_kernel(arrays: dict, visits: Visits, first, s: Decode) -> dict:
    """Runs the kernel on arrays laid out by `lay_out`: {"out": [parts, B, all rows, V], "log_sum"}.

    first: int32 [1], the row of k and v that belongs to the first of q.
    """
    n_batch, n_rows = arrays["q"].shape[0], s.products * s.rows
    dtype = F32 if s.parts > 1 else arrays["q"].dtype

    def output(width, dtype):
        index = lambda p, n, words, *_: (p, _row(_word(words, p, n, s)), 0, 0)
        shape = jax.ShapeDtypeStruct((s.parts, n_batch, n_rows, width), dtype)
        return shape, pl.BlockSpec((1, 1, n_rows, width), index)

    outputs = {"out": output(s.v_width, dtype)}
    if s.parts > 1:
        outputs["log_sum"] = output(LANES, F32)
    scratch = {"top": LANES, "total": LANES, "sum": s.v_width}
    specs = _specs(arrays, s)
    call = pl.pallas_call(
        functools.partial(_kernel, names=(*arrays, *outputs, *scratch), s=s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(s.parts, visits.count),
            in_specs=[specs[name] for name in arrays],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=[pltpu.VMEM((n_rows, width), F32) for width in scratch.values()],
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=s.interpret,
        name="attention_decode",
    )
    return dict(zip(outputs, call_varying(call, visits.words, visits.whole, first, *arrays.values())))


def _to_rows(array_BTHx, s: Decode):
    """[B, T, H, ...] as [B, all rows, ...]."""
    n_batch, rest = array_BTHx.shape[0], array_BTHx.shape[3:]
    if s.joint:
        return array_BTHx.reshape(n_batch, s.rows, *rest)
    array = array_BTHx.reshape(n_batch, s.queries, s.kv_heads, s.group, *rest)
    array = jnp.moveaxis(array, 2, 1).reshape(n_batch, s.kv_heads, s.queries * s.group, *rest)
    array = jnp.pad(array, ((0, 0), (0, 0), (0, s.rows - s.queries * s.group)) + ((0, 0),) * len(rest))
    return array.reshape(n_batch, s.products * s.rows, *rest)


def _from_rows(array, s: Decode):
    """Undoes `_to_rows` of [B, all rows, V]."""
    n_batch, _, width = array.shape
    if not s.joint:
        array = array.reshape(n_batch, s.kv_heads, s.rows, width)[:, :, : s.queries * s.group]
        array = array.reshape(n_batch, s.kv_heads, s.queries, s.group, width)
        array = jnp.moveaxis(array, 1, 2)
    return array.reshape(n_batch, s.queries, s.heads, width)


def _columns(array):
    """[..., rows] as [..., rows, 128]."""
    return jnp.broadcast_to(array[..., None], (*array.shape, LANES))


def lay_out(q, k, v, gate, sinks, mask: Mask, s: Decode) -> dict:
    """The kernel's inputs by name; k and v, [(L) B, S, K, P], as they lie in memory."""
    n_batch = q.shape[0]
    views = {
        "rows": lambda array: array.reshape(array.shape[0], s.keys * s.kv_heads, array.shape[3]),
        "heads": lambda array: array.transpose(0, 2, 1, 3),
        "lanes": lambda array: array.transpose(0, 2, 3, 1),
    }
    q = _to_rows(q, s).reshape(n_batch, s.products, s.rows, s.width)
    arrays = {"q": q, "k": views[s.layout](k), "v": views[s.layout](v)}
    if gate is not None and s.parts == 1:
        gate = _to_rows(gate, s)
        arrays["gate"] = gate if s.gate == "channel" else _columns(gate.astype(F32))
    if sinks is not None:
        rows = jnp.broadcast_to(sinks.astype(F32), (1, s.queries, s.heads))
        arrays["sinks"] = _columns(_to_rows(rows, s)[0])
    for name, array in (("q_ids", mask.q_ids_BT), ("q_positions", mask.q_position_BT)):
        if array is not None:
            array = jnp.asarray(array, jnp.int32)[:, :, None]
            arrays[name] = _columns(_to_rows(jnp.broadcast_to(array, (*array.shape[:2], s.heads)), s))
    for name, array in (("k_ids", mask.k_ids_BS), ("k_positions", mask.k_position_BS)):
        if array is not None:
            array = jnp.asarray(array, jnp.int32)
            arrays[name] = array[:, None]
    if s.repeat > 1:
        head = np.arange(s.rows, dtype=np.int32) % s.heads // s.group
        arrays["row_heads"] = _columns(jnp.asarray(head))
        arrays["lane_heads"] = jnp.arange(s.tokens * s.repeat, dtype=jnp.int32)[None] % s.repeat
        lane = jnp.arange(LANES * s.repeat, dtype=jnp.int32) // s.repeat
        arrays["spread"] = (jnp.arange(LANES)[:, None] == lane[None]).astype(jnp.bfloat16)
    return arrays


def _combine(found: dict, gate, s: Decode):
    """The shares of the cache by their log-sums, gated."""
    log_sum = found["log_sum"][..., :1]
    share = jnp.exp2(log_sum - log_sum.max(0)[None])
    out = _from_rows((found["out"] * share).sum(0) / share.sum(0), s)
    if gate is not None:
        opened = jax.nn.sigmoid(gate.astype(F32))
        out *= opened if s.gate == "channel" else opened[..., None]
    return out


def cores() -> int:
    """Cores of the chip that share a grid."""
    chip = platform.tpu_chip()
    return 1 if chip is None else chip.cores


def decode(s: Decode, q, k, v, gate, sinks, mask: Mask, layer=None):
    """out_BTHP of a call that `serves` takes; with a layer, k and v are [L, B, S, K, P].

    mask: without ids or positions that s does not ask for, with those of the queries.
    """
    visits = list_visits(mask, q.shape[0], s)
    visits = Visits(jnp.asarray(visits.words), jnp.asarray(visits.whole), visits.count)
    first = jnp.zeros(1, jnp.int32)
    if layer is not None:
        first += jnp.asarray(layer, jnp.int32) * q.shape[0]
        k, v = (array.reshape(-1, *array.shape[2:]) for array in (k, v))
    found = run_kernel(lay_out(q, k, v, gate, sinks, mask, s), visits, first, s)
    out = _from_rows(found["out"][0], s) if s.parts == 1 else _combine(found, gate, s)
    return out.astype(q.dtype)
