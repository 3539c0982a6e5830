# SPDX-License-Identifier: Apache-2.0
"""Peak matrix throughput of known accelerators, and the share of it that a run uses (MFU)."""

PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "TPU v7x": 1153.5,
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "GH200": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""bfloat16 TFLOP/s of one JAX device, dense, from the vendors' data sheets, by part of `device_kind`.

A TPU7x chip shows as two devices, each with half of its 2,307. GPU figures are those of the SXM part unless named.
"""


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device; None where the kind is not in the table. The longest name that fits is taken."""
    words = f" {device_kind.replace('-', ' ')} "
    fitting = [name for name in PEAK_TFLOPS if f" {name} " in words]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str, n_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of training in bfloat16 (Chowdhery et al. 2022, PaLM, appendix B)."""
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)
