# SPDX-License-Identifier: Apache-2.0
"""Parameters as the train state and checkpoints hold them, and as the program of a step reads them.

Once a step, not in every microbatch, they are stacked over the depths of the program's sublayers and cast; the
gradients come back in the order and type of the state.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm import exchange
from hybridlm.config import Config
from hybridlm.exchange import TOKENS_APART
from hybridlm.layers.params import ParamInfo, in_type
from hybridlm.layers.quantized import Joined, Parts, cut_outputs
from hybridlm.model import quantize, stacks
from hybridlm.model.config import ModelConfig, QuantizeConfig
from hybridlm.model.init import Abstract, abstract, stacked
from hybridlm.model.pattern import groups
from hybridlm.sharding import is_split, param_shardings, split_axes, whole_shardings
from hybridlm.train.loss import LOGITS
from hybridlm.train.shares import REPLICAS, share_dim, share_shardings, splits_state
from hybridlm.train.tables import Tables, of_model
from pallas_kernels.platform import peaks_of, platform_of

SUMS = "gradient_sums"
"""Key, beside those of the parameters, of sums that the backward adds the gradients of `groups` to."""

WHOLE = ("groups", "norm", "embedding_norm")
"""Parameters that are put together once a step, where those of sublayers are: norms are too small to be waited for."""
ROOM = 16
"""Weights put together may take one part in so many of a device's memory, where `optim.gather_once` is None, and so may
what sums of gradients take more: less than fsdp has freed, so that they fit where a config fits one device."""
UNROLL = {"gpu": 64, "cpu": 1, "tpu": 1}
"""`model.unroll` in training where it is None."""
APART = {"gpu"}
"""Platforms for which `parts_apart`."""


def unrolled(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model with the loops written out that its config or else the platform wants so."""
    wanted = UNROLL["gpu"] if model.remat_span > 1 else UNROLL[platform_of(mesh.devices.flat[0])]
    unroll = wanted if model.unroll is None else model.unroll
    return replace(model, unroll=unroll)


def gathers_once(config: Config, mesh: Mesh) -> bool:
    """`optim.gather_once` as it is, or as the devices of the mesh have it where it is None."""
    if config.optim.gather_once is not None:
        return config.optim.gather_once
    return _fits(_of_sublayers(config, mesh) * jnp.dtype(config.model.compute_dtype).itemsize, mesh)


def scatters_once(config: Config, mesh: Mesh) -> bool:
    """`optim.scatter_once`, likewise; never where weights are not gathered once, or there is one microbatch."""
    if config.optim.accumulate == 1 or not gathers_once(config, mesh):
        return False
    if config.optim.scatter_once is not None:
        return config.optim.scatter_once
    return _fits(_of_sublayers(config, mesh) * jnp.dtype(jnp.float32).itemsize * _freed(mesh), mesh)


def tables_once(config: Config, mesh: Mesh) -> Tables:
    """Tables over the vocabulary that are put together once a step, and whose gradients each device sums by itself.

    Those of models whose loss forms its gradient in the forward and that have several microbatches, or several devices
    with tokens of their own, whose sums are exchanged in the type of the computation. Where fsdp splits them, what they
    take more must fit, as `ROOM` says: of one microbatch the tables themselves and one sum; of several, where gradients
    of matrices must be scattered once, too, the share that fsdp would save of all sums, less the gradient of one, which
    would be whole beside the loss.
    """
    model, n_micro, none = config.model, config.optim.accumulate, Tables()
    apart = any(mesh.shape.get(axis, 1) > 1 for axis in ("data", "fsdp", "expert", "context"))
    if (n_micro == 1 and not apart) or model.complement or not LOGITS.get(platform_of(mesh.devices.flat[0])):
        return none
    tables, freed = of_model(model, (config.data.batch_size // n_micro, config.data.seq_len)), _freed(mesh)
    if not freed:
        return tables
    of_one = model.vocab_size * model.d_model // mesh.shape.get("tensor", 1)
    if n_micro == 1:
        kept = len(tables.names) * jnp.dtype(model.compute_dtype).itemsize + jnp.dtype(jnp.float32).itemsize
        return tables if _fits(of_one * freed * kept, mesh) else none
    if not scatters_once(config, mesh):
        return none
    more = (_of_sublayers(config, mesh) + len(tables.names) * of_one) * freed - of_one
    fits = bool(config.optim.scatter_once) or _fits(more * jnp.dtype(jnp.float32).itemsize, mesh)
    return tables if fits else none


def _freed(mesh: Mesh) -> float:
    """The share of an array that a device does not have, as fsdp splits it."""
    return 1 - 1 / mesh.shape.get("fsdp", 1)


def _of_sublayers(config: Config, mesh: Mesh) -> int:
    """Numbers that a device has of the sublayers' weights, whole over what splits d_model, but for experts."""
    info = stacked(config.model).info["groups"]
    whole = zip(jax.tree.leaves(info), jax.tree.leaves(whole_shardings(info, mesh)), strict=True)
    return sum(math.prod(at.shard_shape(leaf.shape)) for leaf, at in whole if "experts" not in leaf.axes)


def _fits(n_bytes: float, mesh: Mesh) -> bool:
    """Whether the devices are GPUs, split over fsdp, and have the room: see `ROOM`."""
    device = mesh.devices.flat[0]
    peak = peaks_of(device) if platform_of(device) == "gpu" else None
    if mesh.shape.get("fsdp", 1) == 1 or peak is None or peak.gib is None:
        return False
    return n_bytes * ROOM <= peak.gib * 2**30


def parts_apart(config: Config, mesh: Mesh) -> bool:
    """Whether matrices that are stored together and used apart are arrays of their own: on GPUs, where each of several
    microbatches would copy them; not where products round their other side, or adapters are trained."""
    return config.optim.accumulate > 1 and _has_plain_products(config, mesh)


def joins(config: Config, mesh: Mesh) -> bool:
    """Whether matrices whose products are taken together are one array: on GPUs, where what splits tokens alone splits
    anything; not where products round their other side, or adapters are trained."""
    return _split_alone(TOKENS_APART, mesh) and _has_plain_products(config, mesh)


def _split_alone(axes: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether these are the only axes of the mesh that split anything."""
    return all(n == 1 or name in axes for name, n in mesh.shape.items())


def _has_plain_products(config: Config, mesh: Mesh) -> bool:
    """Whether this is a GPU's, where products round nothing and matrices themselves are trained."""
    rounds = config.quantize.activations or config.quantize.products
    return platform_of(mesh.devices.flat[0]) in APART and not rounds and not config.lora.on


def wide_over(config: Config, mesh: Mesh) -> int:
    """How many devices sum gradients of matrices over microbatches by themselves, added by the products; 0: none.

    On GPUs, where `tensor` and what splits tokens alone split anything: matrices are whole, but for what `tensor`
    splits, and so are their sums.
    """
    n_micro, n_rows = config.optim.accumulate, mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    if n_micro == 1 or not _split_alone((*TOKENS_APART, "tensor"), mesh) or not _has_plain_products(config, mesh):
        return 0
    if config.data.batch_size // n_micro % n_rows:
        return 0
    n_apart = math.prod(mesh.shape.get(axis, 1) for axis in TOKENS_APART)
    return n_apart if mesh.shape.get("fsdp", 1) == 1 or scatters_once(config, mesh) else 0


def _fused(leaf: ParamInfo) -> int:
    """The axis of a value that counts the matrices in it."""
    return leaf.fused_axes[0] + leaf.stacked


def _cut(leaf: ParamInfo, value: jax.Array):
    """The matrices as arrays of their own, where their products are taken apart."""
    return Parts(tuple(jnp.split(value, value.shape[_fused(leaf)], _fused(leaf)))) if leaf.apart else value


def _join(info, values):
    """Matrices of a layer whose products are taken together as one array, each a `Joined`."""
    if not isinstance(info, dict):
        return values
    made = {name: _join(leaf, values[name]) for name, leaf in info.items()}
    together = [name for name, leaf in info.items() if isinstance(leaf, ParamInfo) and leaf.joined]
    if len(together) > 1:
        arrays = [values[name] for name in together]  # [depths, *inputs, *outputs]
        n_in = 1 + info[together[0]].n_in
        flat = jnp.concatenate([a.reshape(*a.shape[:n_in], -1) for a in arrays], -1)
        one = flat.reshape(*flat.shape[:-1], *[1] * (arrays[0].ndim - flat.ndim), -1)
        shapes = tuple(a.shape[n_in:] for a in arrays)
        made |= {name: Joined(None if i else one, shapes, i) for i, name in enumerate(together)}
    return made


def _part(info, values):
    """The inverse of `_join`."""
    if not isinstance(info, dict):
        return values
    made = {name: _part(leaf, values[name]) for name, leaf in info.items()}
    together = [name for name, value in values.items() if isinstance(value, Joined)]
    if together:
        together.sort(key=lambda name: values[name].index)
        one, shapes = values[together[0]].value, values[together[0]].shapes
        made |= zip(together, cut_outputs(one, 1 + info[together[0]].n_in, shapes), strict=True)
    return made


class Layout(NamedTuple):
    """From the one to the other; all arguments are nested dicts like the parameters."""

    config: ModelConfig
    mesh: Mesh
    apart: bool = False
    """Each slice of the mesh sums its own gradients, which cross from slice to slice once a step; otherwise the
    compiler has them cross when it sees fit."""
    rounding: QuantizeConfig = QuantizeConfig()
    """What matrices are rounded to once a step. Gradients are of the rounded ones and change those of the state."""

    whole: bool = False
    """Weights of sublayers are put together once a step over what splits d_model: see `sharding.whole_weights`."""
    sums_whole: bool = False
    """Gradients of sublayers are summed over microbatches whole, likewise, and scattered once a step."""
    tables: Tables = Tables()
    """Tables of which the same holds."""
    wide: int = 0
    """Devices that sum gradients of matrices by themselves, added by the products (`layers.quantized.Wide`); 0: sums
    are the compiler's."""
    parts: bool = False
    """Matrices that are stored together and used apart are arrays of their own (`layers.quantized.Parts`): cut out of
    one they would be copied in each microbatch."""
    joined: bool = False
    """Matrices whose products are taken together are one array (`layers.quantized.Joined`)."""
    shared: bool = False
    """The train state is split over replicas: see `train.shares`."""

    def stack(self, params: dict) -> dict:
        """Parameters as the program reads them."""
        with jax.named_scope("round"):
            params = quantize.round_matrices(params, self.config, self.rounding)
        spots = dict(enumerate(stacks.stack(self.config.pattern, self.config.unroll, params["groups"])))
        spots = in_type(spots, stacked(self.config).info["groups"], self.config.compute_dtype)
        model = stacked(self.config)
        spots = jax.tree.map(_cut, model.info["groups"], spots) if self.parts else spots
        spots = _join(model.info["groups"], spots) if self.joined else spots
        at, weights = self._at(model), params | {"groups": spots}
        if self.whole:
            at = at | self._whole_at(model)
        if self.shared:  # cast before they are put together; tables are cast by whoever puts them together
            shares = share_shardings(model.info, self.mesh)
            weights = lax.with_sharding_constraint(weights, shares)
            at = at | {name: shares[name] for name in self.tables.names}
        return lax.with_sharding_constraint(weights, at)

    def stack_low(self, low: dict) -> dict:
        """Adapters (`model.lora`) as the program reads them."""
        stored = [[low.get("groups", {}).get(g, {}).get(i, {}) for i in range(n)] for g, n in enumerate(self._units)]
        spots = dict(enumerate(stacks.stack(self.config.pattern, self.config.unroll, stored)))
        return {"groups": spots} | ({"shared": low["shared"]} if "shared" in low else {})

    def zeros(self, weights: dict) -> dict:
        """Sums of nothing, float32."""
        rest = {name: value for name, value in weights.items() if name not in self.tables.names}
        zeros = lambda leaf, a: jnp.zeros(
            (len(a), self.wide, *a.shape[1:]) if self._wide(leaf) else a.shape, jnp.float32
        )
        groups = self._by_leaf(zeros, weights["groups"])
        rest = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), rest | {"groups": {}}) | {"groups": groups}
        return self.placed(rest | self.tables.zeros(weights))

    def placed(self, weights: dict) -> dict:
        """Stacked gradients laid out on the mesh like their parameters, within the slice where slices are apart."""
        model = stacked(self.config)
        at = self._at(model)
        if self.sums_whole or self.wide:
            at = at | self._whole_at(model)
        if self.wide:
            apart = lambda leaf, at: self._apart(at) if self._wide(leaf) else at
            at = at | {"groups": jax.tree.map(apart, model.info["groups"], at["groups"])}
        own = {name: self.tables.placed(weights[name]) for name in self.tables.names if name in weights}
        rest = {name: value for name, value in weights.items() if name not in own}
        return self._pinned(rest, at) | own

    def summed(self, sums: dict, weights: dict) -> dict:
        """The sums of all microbatches as the step goes on with them, laid out like the parameters.

        Sums of devices become those of all. Where the others were whole, compilers put off the sum over devices until
        here. It is in the type of the weights, as gradients are exchanged everywhere; named here, since XLA makes a
        scatter only of a sum that is cut as it is.
        """
        own = self.tables.all_summed({name: sums[name] for name in self.tables.names})
        sums = {name: value for name, value in sums.items() if name not in own}
        if self.wide:
            sums = self.placed(sums)  # or the loop would exchange and split those of vectors
            groups = self._by_leaf(lambda leaf, a: self._of_all(leaf, a) if self._wide(leaf) else a, sums["groups"])
            return self._pinned(sums | {"groups": groups}, self._kept_at(stacked(self.config))) | own
        if not self.sums_whole:
            return sums | own
        whole = self.placed(sums)  # or the loop would have them split
        cast = jax.tree.map(lambda total, weight: total.astype(weight.dtype), whole, {k: weights[k] for k in whole})
        cut = self._pinned(self.placed(cast), self._kept_at(stacked(self.config)))
        return jax.tree.map(lambda part, total: part.astype(total.dtype), cut, sums) | own

    def _wide(self, leaf: ParamInfo) -> bool:
        """Whether gradients of a parameter are summed by each device."""
        return self.wide > 0 and leaf.kind == "matrix" and not leaf.exact and "experts" not in leaf.axes

    def _apart(self, at: NamedSharding) -> NamedSharding:
        """Of sums of each device, from that of the parameter, whole but for what `tensor` splits."""
        entries = [*at.spec, *[None] * 9]
        return NamedSharding(self.mesh, P(entries[0], TOKENS_APART, *entries[1 : len(at.spec)]))

    def _of_all(self, leaf: ParamInfo, sums: jax.Array) -> jax.Array:
        """Sums over devices of [depths, N, ...], split like the parameter."""
        axes = ("layers", *leaf.axes)
        shape = (sums.shape[0], *sums.shape[2:])
        whole = tuple(None if name == "d_model" else name for name in leaf.axes)
        kept = [] if "d_model" not in axes else [("fsdp", axes.index("d_model"))]
        out: tuple = axes
        if self.shared and (dim := share_dim(leaf, param_shardings(leaf, self.mesh))) is not None:
            kept.append((REPLICAS, dim))
            out = (*axes[:dim], (*split_axes(axes[dim], shape[dim]), REPLICAS), *axes[dim + 1 :])

        def run(total):
            """What each device keeps of the sums over some axes, fewer numbers, is added over the others."""
            total = total[:, 0].astype(self.config.compute_dtype)
            for axis, dim in kept:
                total = exchange.scatter_weight(total, (axis,), dim)
            rest = tuple(axis for axis in TOKENS_APART if axis not in dict(kept))
            return exchange.add(total, rest).astype(jnp.float32)

        if not is_split():
            return sums[:, 0]
        return exchange.manual(run, [sums], [("layers", TOKENS_APART, *whole)], (out, shape))

    def _by_leaf(self, fn, groups: dict) -> dict:
        """fn(ParamInfo, array) of each array of the sublayers, of each part where a matrix is in parts."""
        each = lambda leaf, value: jax.tree.map(lambda a: fn(leaf, a), value)
        return jax.tree.map(each, stacked(self.config).info["groups"], groups)

    def _pinned(self, weights: dict, at: dict) -> dict:
        at = {name: at[name] for name in weights}
        return lax.with_sharding_constraint(weights, jax.tree.map(lambda a: a.spec, at) if self.apart else at)

    def spread(self, grads: dict) -> dict:
        """Gradients of stacked parameters as those of the state's, float32."""
        if self.shared:  # while they are sums: XLA makes a scatter only of a sum that is cut as it is
            grads = self._pinned(grads, self._kept_at(stacked(self.config)))
        info = stacked(self.config).info["groups"]
        whole = lambda leaf, x: jnp.concatenate(x.values, _fused(leaf)) if isinstance(x, Parts) else x
        spots = jax.tree.map(whole, info, _part(info, grads["groups"]))
        by_group = stacks.spread(self.config.pattern, self.config.unroll, spots)
        grads = grads | {"groups": {g: dict(enumerate(of_group)) for g, of_group in enumerate(by_group)}}
        grads = jax.tree.map(lambda a: a.astype(jnp.float32), grads)
        return lax.with_sharding_constraint(grads, self._kept_at(abstract(self.config)))

    @property
    def _units(self) -> list[int]:
        return [len(group.unit) for group in groups(self.config.pattern)]

    def _whole_at(self, model: Abstract) -> dict:
        """Of what each device has whole, beside tables."""
        return whole_shardings({name: model.info[name] for name in WHOLE if name in model.info}, self.mesh)

    def _at(self, model: Abstract) -> dict:
        return param_shardings(model.info, self.mesh)

    def _kept_at(self, model: Abstract) -> dict:
        """Of what the train state keeps."""
        return share_shardings(model.info, self.mesh) if self.shared else self._at(model)


def make_layout(config: Config, model: ModelConfig, mesh: Mesh, apart: bool) -> Layout:
    """The layout of a config's steps on a mesh. model: the config's, unrolled. apart: see `Layout`."""
    tables, shared = Tables() if apart or config.lora.on else tables_once(config, mesh), splits_state(config, mesh)
    return Layout(
        model, mesh, apart, config.quantize,
        whole=gathers_once(config, mesh),
        sums_whole=scatters_once(config, mesh),
        tables=tables._replace(shared=(REPLICAS,)) if shared else tables,
        wide=0 if apart else wide_over(config, mesh),
        parts=parts_apart(config, mesh),
        joined=joins(config, mesh),
        shared=shared,
    )  # fmt: skip
