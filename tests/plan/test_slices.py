# SPDX-License-Identifier: Apache-2.0
"""Devices by words: described without a compiler as libtpu describes them; what there is not is one line."""

import pytest

from hybridlm.errors import ConfigError
from hybridlm.plan.slices import read_devices, slice_devices

WRONG = {
    "v5e:3x5": "slices of v5e are 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p:8x8x4": "slices of v5p are 2x2x1, .* as 4x4x8, up to 16x16x24",
    "v5p": "slices of v5p are",
    "v9:2x2": "no devices named 'v9': there are v5e, v5p, v6e, tpu7x .* h100, h200 and cpu",
    "h100": "must be h100 and a number of devices, as h100:8",
    "h100:12": "hosts have 8 GPUs",
    "cpu:0": "must be cpu and a number",
}


def test_words():
    several, cards = read_devices("2xv5e:4x8"), read_devices("h200:16")
    assert (several.count, several.hosts, several.chips, several.domain) == (64, 16, 64, 32)
    assert (cards.count, cards.hosts, cards.domain, cards.peaks.gbs) == (16, 2, 8, 4800.0)
    assert read_devices("tpu7x:4x4x8").count == 2 * read_devices("tpu7x:4x4x8").chips == 256
    assert read_devices("cpu:4").peaks is None
    for words in ("2xv5e:4x8", "h200:16", "tpu7x:2x2x2"):
        devices = read_devices(words)
        there = devices.described()
        assert (len(there), len({d.process_index for d in there})) == (devices.count, devices.hosts)


@pytest.mark.parametrize("words", WRONG)
def test_what_there_is_not_is_one_line(words):
    with pytest.raises(ConfigError, match=rf"^topology \('{words}'\)[^\n]*{WRONG[words]}[^\n]*$"):
        read_devices(words)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr("hybridlm.plan.slices.find_spec", lambda name: None)
    monkeypatch.setattr("hybridlm.plan.gpu.find_spec", lambda name: None)
    for words, package in (("v5p:2x2x1", "libtpu"), ("h100:8", r"jax\[cuda13\]")):
        with pytest.raises(ConfigError, match=rf"^[^\n]*pip install '?{package}[^\n]*--stage counted$"):
            read_devices(words).compilable()


@pytest.mark.libtpu
@pytest.mark.parametrize("words", ["v5e:4x8", "2xv5e:2x4", "v6e:8x8", "v5p:2x2x4", "3xtpu7x:2x2x1"])
def test_described_as_libtpu_does(words):
    def about(device):
        at_slice = getattr(device, "slice_index", 0)
        return (device.id, tuple(device.coords), device.process_index, device.core_on_chip, at_slice,
                device.device_kind, device.platform)  # fmt: skip

    assert [about(d) for d in read_devices(words).described()] == [about(d) for d in slice_devices(words)]
