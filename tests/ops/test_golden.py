# SPDX-License-Identifier: Apache-2.0
"""The recurrences and the convolution against numbers of published float64 reference runs (in each file's `meta`)."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import published, vectors
from pallas_kernels.ops import OPS
from tests.ops.support import QUICK
from tests.tolerances import check_close

FOLDER = Path(__file__).parent.parent / "golden_ops"
FILES = sorted(FOLDER.glob("*.npz"))
COUNTS = {
    "based": 2, "causal_conv1d": 5, "delta_rule": 3, "gated_delta_product": 2, "gated_delta_rule": 7, "gla": 5,
    "hgrn": 4, "hgrn2": 2, "hyena": 3, "kda": 8, "mamba3_block": 3, "mamba3_mimo": 5, "mamba3_siso": 6, "mingru": 3,
    "minlstm": 3, "mlstm": 4, "retention": 2, "rg_lru": 4, "rwkv6": 3, "rwkv7": 4, "selective_scan": 5,
    "simple_gla": 3, "slstm": 3, "ssd": 6, "titans": 4,
}  # fmt: skip
"""Files of each op."""

BY_DEFAULT = (
    "based-t17-norm", "causal_conv1d-", "gated_delta_product-n2-t17", "gated_delta_rule-t17-l2norm-gva",
    "gla-t17-packed", "hgrn-t17-packed", "hgrn2-t17", "hyena-t17", "kda-t17-rawgates-lowerbound",
    "mamba3_block-siso-heavytail", "mamba3_mimo-r2-t17-fusednorm-half", "mamba3_siso-t17-packed",
    "mingru-t17-plain", "minlstm-t17-plain", "mlstm-t17-state", "retention-t17", "rg_lru-t70-resets", "rwkv6-t17",
    "rwkv7-t17-packed", "selective_scan-", "slstm-t17-state", "ssd-",
    "titans-chunk2-batch4-t17",
)  # fmt: skip
"""How the names of files begin that are compared each time; the others are slow."""


REFERENCES = ("causal_conv1d-t17-segments", "hgrn-t17-packed", "kda-t17", "selective_scan-t17-packed", "ssd-t17-packed")
"""Of these, those that the reference is compared with as well."""


def runs(path: Path) -> list:
    """Of a file by both implementations; slow ones marked. Of recurrences the contract has xla equal reference."""
    both = (("xla", "float32"), ("reference", "float64"))
    here = path.stem.startswith(BY_DEFAULT)
    each_time = {"xla": here, "reference": here and path.stem.startswith(REFERENCES)}
    return [
        pytest.param(path, *how, marks=[pytest.mark.quick if each_time[how[0]] else pytest.mark.slow],
                     id=f"{path.stem}-{how[0]}")
        for how in both
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "implementation", "dtype"), [run for path in FILES for run in runs(path)])
def test_golden(path, implementation, dtype):
    name, out, grads, parts = vectors.evaluate(path, implementation, dtype, QUICK)
    if name in published.LOOSE and dtype == "float32":
        found = vectors.errors(out, grads, parts)
        for kind, limit in zip(found, vectors.tolerances(name, dtype), strict=True):
            assert max(found[kind].values()) <= limit, found[kind]
        return
    for key, expected in parts["out_"].items():
        check_close(out[key], expected, dtype="float32", what=f"{path.stem} {key}")
    for key, expected in parts["grad_"].items():
        check_close(grads[key], expected, dtype="float32", what=f"{path.stem} d{key}")


def test_every_golden_file_is_here():
    names = [path.stem.partition("-")[0] for path in FILES]
    assert {name: names.count(name) for name in COUNTS} == COUNTS
    assert published.FUNCTIONS.keys() == COUNTS.keys()
    assert all(any(path.stem.startswith(start) for path in FILES) for start in BY_DEFAULT)


def drawn(*shapes: tuple) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_hyena_of_two_documents_is_that_of_each():
    """The short convolution stops at documents as the long one does."""
    u, short_w, short_b, h, h_bias = drawn((1, 12, 9), (9, 3), (9,), (12, 3), (3,))
    weights = {"short_w": short_w, "short_b": short_b, "h_bias": h_bias}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(u, h, **more):
        return published.hyena({"u": u, "h": h, **weights, **more}, {"order": 2}, "xla")["y"]

    ids = np.repeat([[1, 2]], (5, 7), axis=1).astype(np.int32)
    apart = np.concatenate([run(u[:, :5], h[:5]), run(u[:, 5:], h[:7])], axis=1)
    check_close(run(u, h, segment_ids=ids), apart, dtype="float32", what="y")


@pytest.mark.parametrize("n_tokens", [2, 9])
def test_a_state_in_front_of_packed_rows_is_of_none_of_them(n_tokens):
    """Of the convolution: no output reads it, the new state is the last inputs of the row, it among them."""
    x, weight, before = drawn((2, n_tokens, 4), (4, 4), (2, 3, 4))
    ids = np.repeat([[1, 2]], (1, n_tokens - 1), axis=1).repeat(2, axis=0).astype(np.int32)
    given = {"x": x, "weight": weight, "initial_state": before, "segment_ids": ids}
    run = lambda given: published.causal_conv1d(given, {"activation": None}, "xla")
    found = jax.jit(run, compiler_options=QUICK)(given)
    inputs = np.concatenate([before, x], axis=1)
    expected = np.zeros_like(x)
    for t in range(n_tokens):
        for s in range(max(0, t - 3), t + 1):
            expected[:, t] += (ids[0, s] == ids[0, t]) * weight[:, 3 - t + s] * x[:, s]
    check_close(found["y"], expected, dtype="float32", what="y")
    np.testing.assert_array_equal(found["final_state"], inputs[:, n_tokens:])


# The command.


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hgrn-t17.npz").symlink_to(FOLDER / "hgrn-t17.npz")
    return tmp_path


def rewrite(path: Path, **changes) -> None:
    """Replaces arrays of a file."""
    with np.load(FOLDER / "hgrn-t17.npz") as file:
        data = {key: file[key] for key in file.files}
    np.savez(path, **{**data, **changes})


def test_the_command_passes_and_says_what_it_does_not_know(folder, capsys):
    meta = json.dumps({"op": "hgrn9", "options": {}})
    np.savez(folder / "hgrn9-new.npz", meta=np.array(meta))
    assert vectors.main([str(folder)]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert first.startswith("hgrn-t17 ") and " ok " in first and "outputs" in first and "gradients" in first
    assert second.split(maxsplit=1)[1] == "not compared: op ('hgrn9') is not one of pallas_kernels.published"
    assert total == "1 of 2 files within tolerance, 0 not, 1 not compared"


@pytest.mark.parametrize("tensor", ["out_o", "out_final_state", "grad_x", "grad_g", "grad_initial_state"])
def test_the_command_fails_for_one_wrong_number(folder, tensor, capsys):
    with np.load(FOLDER / "hgrn-t17.npz") as file:
        wrong = file[tensor].copy()
    wrong.flat[np.argmax(np.abs(wrong))] *= 1.001
    rewrite(folder / "hgrn-wrong.npz", **{tensor: wrong})
    assert vectors.main([str(folder), "--implementation", "reference", "--only", "hgrn-wrong"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hgrn-wrong "))
    name = tensor.removeprefix("out_").replace("grad_", "d")
    assert "FAIL" in line and f"({name})" in line


def test_the_command_goes_on_after_files_that_cannot_be_read(folder, capsys):
    (folder / "broken.npz").write_bytes(b"no archive")
    rewrite(folder / "shape.npz", in_g=np.zeros((2, 3, 16), np.float32))
    rewrite(folder / "other.npz", out_more=np.zeros(3, np.float32))
    assert vectors.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["broken", "FAIL"], ["hgrn-t17", "ok"], ["other", "FAIL"], ["shape", "FAIL"],
    ]  # fmt: skip
    assert "outputs (more) of the file are not of the op" in lines[2] and "g_BTD has shape [2, 3, 16]" in lines[3]
    assert lines[4] == "1 of 4 files within tolerance, 3 not, 0 not compared"


def test_a_folder_without_files_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        vectors.main([str(tmp_path)])
    assert "has no files *.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        vectors.main([str(tmp_path / "nowhere")])


def test_published_functions_call_ops_that_are_here():
    """Every recurrence is compared with published numbers under one name at least."""
    source = Path(published.__file__).read_text()
    recurrences = {name for name, op in OPS.items() if op.states} - {"rwkv4"}  # of which there are no vectors
    assert recurrences <= {name for name in OPS if f"ops.{name}(" in source}
