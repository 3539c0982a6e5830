# SPDX-License-Identifier: Apache-2.0
"""What is no array, or of a wrong width, rank or type, is one line that names the argument: ops, mixers, models."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm.layers import Attention, AttentionMixer, Mamba2, Mamba2Mixer, MoE, MoEFeedForward
from hybridlm.model.init import abstract
from pallas_kernels import ops
from pallas_kernels.ops import OPS
from tests.model.model_support import small

FREE_WIDTHS = {
    ("attention", "v_BSKP"), ("grouped_dot", "w_GKN"), ("relative_attention", "v_BSKP"),
    ("relative_attention", "profiles_RE"), ("selected_attention", "v_BSKP"), ("selected_attention", "chosen_BTC"),
}  # fmt: skip
"""Arrays of ops whose last axis has any width, beside what a state or a gate of that width says."""


def arguments(name: str) -> tuple[dict, dict]:
    """(arrays by the names of the op's arguments, the other arguments), of its smallest case."""
    cases = OPS[name].cases_module()
    case = cases.CONTRACT["xla"]
    arrays = {key: array for key, array in cases.make_inputs(case, "float32").items() if array is not None}
    positional = dict(zip(OPS[name].positional, inspect.signature(ops.function(name)).parameters))
    return {positional.get(key, key): array for key, array in arrays.items()}, cases.make_settings(case)


def message(function, kinds=(TypeError, ValueError)) -> str:
    """What the call says; it says it in one line, before anything is computed."""
    with pytest.raises(kinds) as error:
        jax.eval_shape(function)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300, text
    return text


def spoilt(array: np.ndarray) -> dict:
    """The array as no caller should give it, and the errors that it is met with."""
    wrong = {
        "a list": (array.tolist(), TypeError),
        "a text": ("x", TypeError),
        "a rank more": (array[None], ValueError),
        "a type of no use": (array.astype(complex), TypeError),
    }
    if array.ndim:
        wrong["a rank less"] = (array[0], ValueError)
        wrong["a width more"] = (np.concatenate([array, array[..., :1]], axis=-1), ValueError)
    return wrong


@pytest.mark.parametrize("name", OPS)
def test_ops_name_the_argument(name):
    arrays, settings = arguments(name)
    op = ops.function(name)
    jax.eval_shape(partial(op, **arrays, **settings))  # NumPy's arrays are served
    told = {}
    for key, array in arrays.items():
        for what, (wrong, kinds) in spoilt(array).items():
            if what == "a width more" and (name, key) in FREE_WIDTHS:
                continue
            try:
                text = message(partial(op, **{**arrays, key: wrong}, **settings), kinds)
                if key not in text and "width" not in what:
                    told[key, what] = text
            except BaseException as error:
                told[key, what] = repr(error)[:300]
    assert told == {}


MIXERS = {
    "Mamba2Mixer": lambda: Mamba2Mixer(Mamba2(d_state=4, d_head=4), 16, rngs=nnx.Rngs(0)),
    "AttentionMixer": lambda: AttentionMixer(Attention(n_heads=2, d_head=8), 16, rngs=nnx.Rngs(0)),
    "MoEFeedForward": lambda: MoEFeedForward(MoE(n_experts=2, d_ff=8), 16, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_name_the_argument(name):
    make, x_BTD, ids_BT = MIXERS[name], np.ones((2, 6, 16), np.float32), np.ones((2, 6), np.int64)
    call = lambda *args: message(lambda: make()(*args))
    assert jax.eval_shape(lambda: jax.tree.leaves(make()(x_BTD, ids_BT, positions=ids_BT))[0]).shape == (2, 6, 16)
    assert call(x_BTD.tolist()) == "x_BTD is a list, expected an array: use jnp.asarray"
    width = "expected [any, any, 16] (batch, tokens, d_model of the mixer)"
    assert call(x_BTD[..., :5]) == f"x_BTD has shape [2, 6, 5], {width}"
    assert call(x_BTD[0]).startswith("x_BTD has shape [6, 16], expected [any, any, 16]")
    assert call(x_BTD.astype(int)) == "x_BTD has dtype int64, expected bfloat16, float16, float32 or float64"
    assert call(x_BTD, ids_BT.tolist()) == "segment_ids is a list, expected an array: use jnp.asarray"
    assert call(x_BTD, ids_BT[0]) == "segment_ids has shape [6], expected [2, 6] (batch, tokens of x_BTD)"
    assert call(x_BTD, ids_BT.astype(float)) == "segment_ids has dtype float64, expected int32"
    assert call(x_BTD, ids_BT, ids_BT[:, :3]) == "positions has shape [2, 3], expected [2, 6] (batch, tokens of x_BTD)"


def test_models_name_the_argument():
    model = abstract(small("M*")).model()
    tokens_BT = np.zeros((2, 4), np.int32)
    for call in (model, model.hidden, lambda tokens, ids=None: model.extend(tokens, model.init_cache(2, 8), ids)):
        assert "tokens_BT is a list" in message(lambda call=call: call(tokens_BT.tolist()))
        assert "tokens_BT" in message(lambda call=call: call(tokens_BT[0]))
        assert "tokens_BT (float32)" in message(lambda call=call: call(tokens_BT.astype(np.float32)))
        assert "segment_ids is a list" in message(lambda call=call: call(tokens_BT, tokens_BT.tolist()))
        assert "segment_ids (2, 3) must have the shape" in message(lambda call=call: call(tokens_BT, tokens_BT[:, :3]))
    assert "positions is a list" in message(lambda: model(tokens_BT, None, tokens_BT.tolist()))
    with pytest.raises(TypeError, match="x_BTD is a list"):
        model.logits([[1.0]])
    with pytest.raises(ValueError, match=r"x_BTD has shape \[1, 5\]"):
        model.logits(jnp.ones((1, 5)))


@pytest.mark.parametrize(
    ("tokens", "more", "text"),
    [
        ([[1, 2], [[3]]], {}, "tokens_BT"),
        ([1, 2], {}, "tokens_BT"),
        (np.ones((1, 2)), {}, r"tokens_BT \(float64\)"),
        ("abc", {}, "tokens_BT"),
        ([[1, 2]], {"lengths": [1, 2]}, "lengths"),
        ([[1, 2]], {"lengths": [1.5]}, "lengths"),
        ([[1, 2]], {"max_new_tokens": 1.5}, "max_new_tokens"),
        ([[1, 2]], {"max_new_tokens": "3"}, "max_new_tokens"),
        ([[1, 2]], {"top_k": 1.5}, "top_k"),
        ([[1, 2]], {"temperature": "warm"}, "temperature"),
        ([[1, 2]], {"eos_id": "end"}, "eos_id"),
    ],
)  # fmt: skip
def test_generate_names_the_argument(tokens, more, text):
    model = abstract(small("M*")).model()
    with pytest.raises((TypeError, ValueError), match=f"^[^\n]*{text}[^\n]*$"):
        hybridlm.generate(model, tokens, **{"max_new_tokens": 2, **more})
