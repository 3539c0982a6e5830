# SPDX-License-Identifier: Apache-2.0
"""Searches and changes that make a plan fit: which are tried, in which order, and what is kept of them. Compilers are
stood in for by a function of the config, so that what is best is known."""

import errno
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.cli.plan import stoppable
from hybridlm.config import MLP, Attention, Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, RunConfig
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.plan.change import activations, current, exchanged, guesses, smaller
from hybridlm.plan.compiled import DoesNotFit, compile
from hybridlm.plan.counted import count
from hybridlm.plan.kept import kept, recomputed
from hybridlm.plan.search import Book, fitting, key_of, order, search
from hybridlm.plan.slices import read_devices

ROOT = Path(__file__).parents[2]
DEVICES = read_devices("v5e:2x4")
CONFIG = Config(
    name="narrow",
    model=ModelConfig(
        vocab_size=1024, d_model=256, pattern="*-",
        blocks={"*": Attention(n_heads=4, n_kv_heads=4), "-": MLP(d_ff=512)},
        remat="none",
    ),
    data=DataConfig(seq_len=512, batch_size=64),
    mesh=MeshConfig(data=1, fsdp=8),
    run=RunConfig(sample_tokens=0),
)  # fmt: skip
GIB = 2**30


class Compiler:
    """Of memory that falls with recomputation and microbatches, and times that rise with them."""

    def __init__(self, gib: float):
        self.gib, self.asked = gib, []

    def __call__(self, config):
        self.asked.append(config)
        strength = {"none": 1.0, "kernels": 0.9, "mixer": 0.8, "full": 0.5}[config.model.remat]
        peak = int(self.gib * GIB * strength / config.optim.accumulate)
        time = 1 / strength + config.mesh.tensor
        return SimpleNamespace(
            compiled=SimpleNamespace(memory=SimpleNamespace(peak=peak), seconds=2.0), fits=peak <= 16 * GIB, refused="",
            bounds=SimpleNamespace(lower=time, upper=2 * time),
        )  # fmt: skip


def test_guesses():
    found, cannot = guesses(CONFIG, DEVICES)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert len({one.change for one in found}) == len(found) > 20
    for one in found:
        assert math.prod(vars(one.change.mesh).values()) == 8
        assert one.bytes <= 16 * GIB
        one.change.set_in(CONFIG)
    assert any("n_heads (4) not divisible by mesh.tensor (8)" in line for line in cannot)


def test_exchanges_by_hand():
    """On `fsdp` alone: parameters in bfloat16 gathered twice, or where they are used again three times, and scattered
    once, by each microbatch."""
    for remat, times in (("none", 3), ("full", 4)):
        config = replace(current(CONFIG), remat=remat, accumulate=2).set_in(CONFIG)
        counted = count(config, DEVICES)
        assert exchanged(config, counted) == pytest.approx(2 * times * 2 * counted.parameters * 7 / 8)


def test_a_search_goes_on_where_it_stopped(tmp_path):
    path, compiler = tmp_path / "results.jsonl", Compiler(10)
    found = [result for _, _, result in search(CONFIG, DEVICES, 3, Book(path), compiler)]
    assert found[0].words == "" and len(found) == len(compiler.asked) == 4
    assert len({result.words for result in found}) == 4
    lines = path.read_text().splitlines()
    assert [json.loads(line)["words"] for line in lines] == [result.words for result in found]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # killed while it wrote
    again = Compiler(10)
    assert [result for _, _, result in search(CONFIG, DEVICES, 3, Book(path), again)] == found
    assert len(again.asked) == 2
    best = order(found)
    assert [sum(one.seconds) for one in best] == sorted(sum(one.seconds) for one in found)
    assert key_of(CONFIG, DEVICES) != key_of(CONFIG, read_devices("v6e:2x4"))
    assert key_of(CONFIG, DEVICES) != key_of(replace(CONFIG, lora=LoraConfig(rank=2)), DEVICES)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """What was kept before it is kept still, and is not compiled again."""
    book, compiler = Book(tmp_path / "results.jsonl"), Compiler(10)
    first = book.of(current(CONFIG), CONFIG, DEVICES, compiler)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as there:
        there.setattr(Path, "open", full)
        with pytest.raises(ConfigError, match=r"^--search \(.*results.jsonl\): No space left on device$"):
            book.of(replace(current(CONFIG), remat="full"), CONFIG, DEVICES, compiler)
    again = Compiler(10)
    assert Book(book.path).of(current(CONFIG), CONFIG, DEVICES, again) == first and not again.asked


class ByShapes:
    """A compiler that needs what shapes say: the state, gradients, and what lives from the forward to the backward."""

    def __init__(self):
        self.asked = []

    def __call__(self, config):
        self.asked.append(config)
        counted = count(config, DEVICES)
        peak = counted.least - counted.inputs + activations(config, counted, DEVICES, config.model.remat)
        return SimpleNamespace(
            compiled=SimpleNamespace(memory=SimpleNamespace(peak=peak), seconds=2.0), fits=peak <= 16 * GIB, refused="",
            bounds=SimpleNamespace(lower=1.0, upper=2.0), needed=peak, counted=counted, config=config, devices=DEVICES,
        )  # fmt: skip


LONG = 2**18
"""Tokens of a row of which a few fill a device."""


def with_rows(rows: int) -> Config:
    """rows: of a device."""
    return replace(CONFIG, data=replace(CONFIG.data, seq_len=LONG, batch_size=8 * rows))


def test_changes_are_ordered_by_what_they_keep():
    """Of a transformer `mixer` keeps all of its MLPs, more than `kernels`, and makes attention's products again, which
    that does not: so it is left out. What frees nothing is no change."""
    counted = count(CONFIG, DEVICES)
    sizes = [activations(CONFIG, counted, DEVICES, remat) for remat in ("none", "mixer", "kernels", "full")]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == counted.inputs
    assert [change.remat for change in smaller(CONFIG, counted, DEVICES)][:3] == ["kernels", "full", "none"]
    config = replace(CONFIG, model=replace(CONFIG.model, remat="mixer"))
    assert [change.remat for change in smaller(config, counted, DEVICES)][:3] == ["kernels", "full", "mixer"]
    config = replace(CONFIG, model=replace(CONFIG.model, remat="full"))
    assert all(change.remat == "full" for change in smaller(config, counted, DEVICES))
    changes, here = list(smaller(CONFIG, counted, DEVICES)), current(CONFIG)
    kinds = [(c.remat != here.remat) + (c.accumulate != here.accumulate) + (c.mesh != here.mesh) for c in changes]
    assert kinds[0] == 1 and max(kinds) == 2 and here not in changes


def test_the_smallest_change_that_fits():
    """Recomputation first, then microbatches, then both; what cannot be enough is not compiled."""
    one, counted = with_rows(1), count(with_rows(1), DEVICES)
    of_rows = {remat: activations(one, counted, DEVICES, remat) for remat in ("kernels", "full")}
    room = 16 * GIB - sum(counted.state.values()) - 2 * counted.gradients
    for config, words in [
        *((with_rows(int(room / size)), f"--model.remat={remat}") for remat, size in of_rows.items()),
        (with_rows(64 * int(room / of_rows["full"] / 16)), "--optim.accumulate="),
    ]:
        compiler = ByShapes()
        plan = compiler(config)
        assert not plan.fits
        tried = list(fitting(plan, 12, Book(), compiler))
        assert tried[-1].fits and tried[-1].words.startswith(words), tried
        assert not any(result.fits for result in tried[:-1]) and len(tried) <= 2
    plan = ByShapes()(with_rows(64 * int(room / of_rows["full"])))
    assert [result.words for result in fitting(plan, 12, Book(), ByShapes())][-1].startswith("--model.remat=full --opt")


@pytest.mark.parametrize(("names", "numbers"), {
    "mlp_in": 2 * 512, "mlp_hidden": 512, "attention_q,attention_v": 2 * 256, "sublayer_norm": 2 * 256, "full": 0,
}.items())  # fmt: skip
def test_what_is_kept_by_name(names, numbers):
    """By hand: numbers a token, two bytes each, of an attention and a gated MLP sublayer, four times the depth."""
    model = replace(CONFIG.model, pattern="*-" * 4, remat=names)
    assert kept(model, 512, "v5e") == 4 * 512 * 2 * numbers


def test_what_is_computed_again():
    """Of a forward and a backward twice as long: a third where all sublayers are, less where only mixers are."""
    share = {
        remat: recomputed(replace(CONFIG.model, remat=remat), 512) for remat in ("none", "kernels", "mixer", "full")
    }
    assert 0 == share["none"] < share["kernels"] < share["mixer"] < share["full"] < 0.35
    model = replace(CONFIG.model, vocab_size=8, remat="full")
    assert recomputed(model, 512) == pytest.approx(1 / 3, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid_tiny", "zamba2:1.2b", "zaya1:8b", "caduceus:ps-1k", "granite4_h:tiny"])
@pytest.mark.parametrize("chip", ["cpu", "v5p"])
def test_every_kind_of_block_has_shapes(name, chip):
    """Blocks that share weights, hand something on, have experts or read both ways: nothing but inputs is kept under
    `full`, and the most under `none`."""
    config = load_config(name, ["--data.seq_len=512"])
    found = [kept(replace(config.model, remat=remat), 512, chip) for remat in ("none", "kernels", "full")]
    stream = len(config.model.pattern) * 512 * config.model.d_model * 4
    assert found[0] > found[1] >= found[2] and found[0] > stream and found[2] <= stream


def test_what_cannot_be_ranked_is_one_line():
    with pytest.raises(ConfigError, match="no peaks are known of cpu:8"):
        list(search(CONFIG, read_devices("cpu:8"), 1, Book(), Compiler(1)))


def test_what_a_compiler_says_of_memory():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded by 7.75G."
    assert DoesNotFit(said).needed == 23.5 * GIB
    assert str(DoesNotFit(said)) == "the compiler gives up, for want of memory: it needs 23.50 GiB of 15.75 GiB"
    of_core = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 70.00M of 63.94M vmem. Exceeded by 6.06M."
        '\n\n  1. Size: 32.00M\n     Operator: op_name="jit(f)/transpose(jvp(attention_backward))/pallas_call"\n'
    )
    assert DoesNotFit(of_core).needed is None
    assert str(DoesNotFit(of_core)) == (
        "the compiler gives up, for want of memory of a core (vmem): "
        "transpose(jvp(attention_backward))/pallas_call needs 70.00 MiB of 63.94 MiB"
    )
    said = "the total memory required for HLO temporaries (16.00G) exceeds available HBM (15.75G)."
    assert DoesNotFit(said).needed == 16 * GIB
    assert DoesNotFit("other words").needed is None


@pytest.mark.libtpu
def test_a_compiler_that_gives_up():
    """What libtpu says of a program that is too large becomes one line with what it needs."""
    from hybridlm.plan.slices import slice_devices

    mesh = jax.sharding.Mesh(np.array(slice_devices("v5e:2x2")), ("x",))
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def too_large(x):
        pairs = x[:, None] * x[None]
        return pairs.sum(0) @ jnp.sort(pairs, axis=0)

    x = jax.ShapeDtypeStruct((65536,), "float32", sharding=at)
    with pytest.raises(DoesNotFit, match=r"^the compiler gives up, [^\n]*: it needs 16.00 GiB of 15.75 GiB$"):
        compile(jax.jit(too_large).lower(x), "tpu")


def test_what_cannot_be_compiled_without_a_card_is_one_line():
    """As XLA says it of a product for a described GPU."""

    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("NOT_FOUND: No supported config found for HLO: %dot.56 = f32[8,64]{1,0} x")

    with pytest.raises(ConfigError, match=r"^topology: [^\n]* %dot.56 \(f32\[8,64\]\{1,0\}\) without a card; [^\n]*$"):
        compile(Refused(), "gpu")


def test_ctrl_c_waits_for_no_compiler():
    """Work that hears no signal, as that of a compiler, is left: one line, 130, within seconds."""
    work = "lambda: print('compiling', flush=True) or ctypes.CDLL(None).sleep(120)"
    code = (
        "import ctypes, signal, sys; from hybridlm.cli.ending import exit_code; "
        "from hybridlm.cli.plan import stoppable; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background ignores it
        f"sys.exit(exit_code(lambda: stoppable({work})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "error: interrupted\n")


def test_ctrl_c_while_a_command_imports():
    """One line and 130, not KeyboardInterrupt, which what is imported may swallow; Ctrl-C is as usual behind it."""
    code = (
        "import runpy, signal, os; importing = runpy.run_path('hybridlm/errors.py')['importing']\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with importing(): pass\n"
        "try: os.kill(os.getpid(), signal.SIGINT); print('ignored')\n"
        "except KeyboardInterrupt: print('as usual', flush=True)\n"
        "with importing():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); print('ignored')\n"
        "    except BaseException: print('swallowed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "as usual\n", "error: interrupted\n")


def test_what_work_gives_and_raises():
    assert stoppable(lambda: 3) == 3
    with pytest.raises(ConfigError, match=r"^no$"):
        stoppable(lambda: (_ for _ in ()).throw(ConfigError("no")))
