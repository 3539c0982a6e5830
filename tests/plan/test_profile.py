# SPDX-License-Identifier: Apache-2.0
"""`hybridlm profile`: what is read from a trace, how it is sorted, and the page.

The trace is written here, byte by byte, and read by jax.profiler too, which knows the format.
"""

import dataclasses

import pytest

from hybridlm.cli import main
from hybridlm.config.find import read_config
from hybridlm.config.stored import save_config
from hybridlm.model.flops import train_flops
from hybridlm.plan import profile, xplane
from hybridlm.plan.costs import floors

GEMM = "jit(train_step)/gradients/while/body/transpose(jvp(jvp()))/checkpoint/jit(call)/M.Mamba2/project/dot_general"
AGAIN = "jit(train_step)/gradients/checkpoint/rematted_computation/jit(call)/-.MLP/mlp_hidden/mul"
KERNELS = [  # kernel, instruction ("": the kernel's own name), where that comes from, microseconds, times
    ("nvjet_sm90_tst_128x256", "cublas-gemm.3", GEMM, 400, 4),
    ("loop_multiply_fusion_7", "", AGAIN, 100, 2),
    ("ssd_walk_mosaic_gpu_kernel", "command_buffer", "", 60, 2),
    ("loop_select_fusion", "loop_select_fusion", "jit(train_step)/optimizer/jit(_where)/select_n", 40, 2),
]


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(*fields) -> bytes:
    """The wire format of (number, int, str or bytes)."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def named(number: int, names: dict[int, str], *more) -> list:
    """Map entries from ids to messages that hold the id and a name."""
    return [(number, message((1, i), (2, message((1, i), (2, name), *more)))) for i, name in names.items()]


def write_trace(folder, kernels=KERNELS) -> None:
    """A trace of one GPU on which the kernels run one after the other."""
    stats = {1: "hlo_op", 2: "hlo_module", 3: "program_id", 4: "gpu_device_name"}
    events, at = [], 0
    for i, (_, instruction, _, micros, times) in enumerate(kernels, 1):
        for _ in range(times):
            of_event = [message((1, 2), (5, "jit_train_step")), message((1, 3), (3, 7))]
            of_event += [message((1, 1), (5, instruction))] if instruction else []
            events.append((4, message((1, i), (2, at * 10**6), (3, micros * 10**6), *((4, s) for s in of_event))))
            at += micros
    names = {i: kernel for i, (kernel, *_) in enumerate(kernels, 1)}
    line = message((1, 1), (2, "Stream #14(Compute)"), (3, 1000), *events)
    device = message(
        (2, "/device:GPU:0"), (3, line), *named(4, names), *named(5, stats),
        (6, message((1, 4), (5, "NVIDIA H100 80GB HBM3"))),
    )  # fmt: skip
    instructions = [
        (2, message((1, instruction or kernel.replace("_7", ".7")), (7, message((2, op_name)))))
        for kernel, instruction, op_name, *_ in kernels
        if op_name
    ]
    hlo = message((1, message((1, "jit_train_step"), (3, message(*instructions)))))
    programs = named(4, {1: "jit_train_step(7)"}, (5, message((1, 9), (6, hlo))))
    metadata = message((2, xplane.METADATA_PLANE), *programs, *named(5, {9: xplane.HLO}))
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(message((1, metadata), (1, device)))


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose steps 3 and 4 were traced."""
    config = read_config("hybrid_1b")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, profile_steps=(3, 4), dir=str(tmp_path)))
    save_config(config, tmp_path / "config.json")
    write_trace(tmp_path / "profile")
    return tmp_path


def test_what_is_read(run):
    events, kind = xplane.read(xplane.find(run / "profile"))
    assert kind == "NVIDIA H100 80GB HBM3"
    assert [(e.name, e.op_name, e.duration) for e in events] == [
        (name, op_name, 1e3 * micros) for name, _, op_name, micros, times in KERNELS for _ in range(times)
    ]


def test_tables(run, capsys):
    """Milliseconds of each of the two steps, and the parts of a step."""
    assert main(["profile", str(run)]) == 0
    text = capsys.readouterr().out
    assert "1.0 ms a step, busy 100.0%" in text
    cells = {line.split("  ")[0]: line.split("  ")[:1] + line.split("  ", 1)[-1].split() for line in text.splitlines()}
    assert cells["matrix products"][1:4] == ["0.80", "80.0%", "2"]
    assert cells["kernels"][1:4] == ["0.06", "6.0%", "1"]
    assert cells["M.Mamba2/project"][1:] == ["0.80", "80.0%", "0.00", "0.00", "0.80"]
    assert cells["-.MLP/mlp_hidden"][1:] == ["0.10", "10.0%", "0.00", "0.10", "0.00"]
    assert cells["optimizer"][1:6] == ["0.04", "4.0%", "0.04", "0.00", "0.00"]
    assert cells["not known"][1] == "0.06" and profile.COMMAND_BUFFERS not in text
    page = (run / "profile.html").read_text()
    assert "<td>M.Mamba2/project</td><td>0.80</td>" in page


def test_exchanges_beside_other_work_and_with_nothing_beside_them():
    """Two devices: on the first 30 of an exchange's 40 us have a product beside them, on the second all 20 stand alone,
    and two kernels that run at once are counted once."""

    def event(device, name, start, micros):
        return xplane.Event(device, name, "", 1e3 * start, 1e3 * micros)

    events = [
        event(0, "nvjet_sm90", 0, 100), event(0, "ncclDevKernel_ReduceScatter", 70, 40), event(0, "loop_add", 110, 90),
        event(1, "ncclDevKernel_AllGather", 100, 20), event(1, "nvjet_sm90", 0, 50), event(1, "loop_add", 20, 40),
    ]  # fmt: skip
    found = profile.tables(events, None, read_config("hybrid_1b"), n_steps=1, title="")
    assert (found.step_ms, found.busy_ms, found.exposed_ms) == pytest.approx((0.2, (0.2 + 0.08) / 2, (0.01 + 0.02) / 2))
    assert found.work_ms == pytest.approx(0.34 / 2) and found.by_class[profile.EXCHANGES].ms == pytest.approx(0.03)
    assert "exchanges between devices: 0.0 ms a step, 0.0 of them (7.5% of the step) with" in profile.as_text(found)


def test_unknown_places_are_said(run, capsys):
    write_trace(run / "profile" / "later", [("nvjet_sm90", "command_buffer", "", 500, 2)])
    (run / "profile" / "host.xplane.pb").unlink()
    assert main(["profile", str(run)]) == 0
    assert f"100% of the time is of kernels without a place: trace with {profile.COMMAND_BUFFERS}" in (
        capsys.readouterr().out
    )


def test_floors():
    config = read_config("hybrid_1b")
    found = floors(config, "NVIDIA H100 80GB HBM3")
    tokens = config.data.batch_size * config.data.seq_len
    assert found["arithmetic"] == pytest.approx(train_flops(config.model, config.data.seq_len) * tokens / 989.4e12)
    assert floors(config, "NVIDIA H100 80GB HBM3", 2)["arithmetic"] == pytest.approx(found["arithmetic"] / 2)
    # AdamW: gradient, parameter and two moments read, parameter and moments written, 4 bytes each
    assert found["optimizer"] == pytest.approx(7 * 4 * 1.3e9 / 3.35e12, rel=0.05)
    assert floors(config, "an abacus") == {}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_sm90_tst_128x160", "matrix products"), ("gemm_fusion_dot_83", "matrix products"),
        ("ssd_gradients_mosaic_gpu_kernel", "kernels"), ("MemcpyD2D", "copies"), ("memcpy128", "copies"),
        ("Memset 0", "fills"), ("loop_dynamic_update_slice_fusion_97", "slices and updates"),
        ("input_convert_reduce_fusion_9", "reductions"), ("loop_convert_fusion", "conversions"),
        ("loop_add_fusion_9", "element-wise"), ("ncclDevKernel_AllGather_RING_LL", "exchanges"),
        ("MemcpyP2P", "exchanges"),
    ],
)  # fmt: skip
def test_classes(kernel, expected):
    assert profile.class_of(kernel) == expected


def test_places():
    assert profile.place_of(GEMM) == "M.Mamba2/project"
    assert profile.place_of("jit(train_step)/jit(call)/-.MLP/shard_map/mlp_in/dot_general") == "-.MLP/mlp_in"
    assert profile.place_of("jit(train_step)/jit(call)/-.MLP/shard_map/ppermute") == "-.MLP/ppermute"
    assert profile.place_of("jit(train_step)/optimizer/add") == "optimizer"


def test_mistakes_are_one_line(tmp_path, run, capsys):
    assert main(["profile", str(tmp_path / "nowhere")]) == 2
    (run / "profile" / "host.xplane.pb").unlink()
    assert main(["profile", str(run)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "holds no run" in told[0] and "--run.profile_steps" in told[1]
