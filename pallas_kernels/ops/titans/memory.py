# SPDX-License-Identifier: Apache-2.0
"""The memory of `titans`: a small network, its weights as one vector, and what a state of it is made of.

Axis letters: M numbers of a memory, of g [P], W1 [P, F] and W2 [F, P] one behind the other.
"""

import typing

import jax
import jax.numpy as jnp


class Sizes(typing.NamedTuple):
    width: int  # P
    hidden: int  # F

    @property
    def memory(self) -> int:
        return self.width + 2 * self.width * self.hidden

    @property
    def state(self) -> int:
        return 4 * self.memory + 3


class State(typing.NamedTuple):
    """Of one row and head; all zeros is a document's start. Weights are what they have over the learned ones."""

    weights: jax.Array  # [..., M]: what tokens read
    base: jax.Array  # [..., M]: where gradients are taken
    momentum: jax.Array  # [..., M]
    gradient: jax.Array  # [..., M]: of the tokens that are not stored yet
    eta: jax.Array  # [..., 1]: sums of theirs
    alpha: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tokens since gradients are taken there (since the last store, where
    # that never changes); a tuple's method has the name


def join(g, W1, W2):
    """Weights of a memory as one vector [..., M]."""
    flat = lambda array: array.reshape(*array.shape[:-2], -1)
    return jnp.concatenate([g, flat(W1), flat(W2)], axis=-1)


def split(vector, sizes: Sizes) -> tuple:
    """The inverse of `join`."""
    width, hidden = sizes
    g, W1, W2 = jnp.split(vector, [width, width + width * hidden], axis=-1)
    lead = vector.shape[:-1]
    return g, W1.reshape(*lead, width, hidden), W2.reshape(*lead, hidden, width)


def unpack(array, sizes: Sizes) -> State:
    """A state [..., 4 M + 3]."""
    n = sizes.memory
    return State(*jnp.split(array, [n, 2 * n, 3 * n, 4 * n, 4 * n + 1, 4 * n + 2], axis=-1))


def pack(state: State):
    """The inverse of `unpack`."""
    return jnp.concatenate(state, axis=-1)


def read(vector, x, sizes: Sizes):
    """What the memory [M] answers to x [..., P]: x + (g + 1) o norm(gelu(x W1) W2)."""
    g, W1, W2 = split(vector, sizes)
    h = jax.nn.gelu(x @ W1, approximate=False) @ W2
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-5)
    return x + h * jnp.expand_dims(g + 1, range(x.ndim - 1))


def surprise(vector, k, v, rate, sizes: Sizes):
    """Gradient [M] at a memory of the sum over tokens of rate times the mean over channels of (answer to k - v)^2."""

    def loss(vector):
        return jnp.sum(rate * jnp.mean((read(vector, k, sizes) - v) ** 2, axis=-1))

    return jax.grad(loss)(vector)


def store(state: State, learned, n_tokens: int, has_momentum: bool) -> tuple:
    """(weights, momentum) behind a chunk of `n_tokens` whose gradient and sums the state has."""
    momentum = -state.gradient
    if has_momentum:
        momentum += jax.nn.sigmoid(state.eta / n_tokens) * state.momentum
    forget = jax.nn.sigmoid(state.alpha / n_tokens)
    return (1 - forget) * state.weights - forget * learned + momentum, momentum
