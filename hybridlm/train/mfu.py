# SPDX-License-Identifier: Apache-2.0
"""The share of an accelerator's peak matrix throughput that a run uses (MFU)."""

from pallas_kernels import platform


def peak_flops(device: str) -> float | None:
    """bfloat16 FLOP/s of a kind of device; None where it is not in the table of `pallas_kernels.platform`."""
    peaks = platform.peaks(device)
    return None if peaks is None else peaks.tflops * 1e12


def mfu(tokens_per_second: float, flops_per_token: float, device: str, n_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of training in bfloat16 (Chowdhery et al. 2022, PaLM, appendix B)."""
    peak = peak_flops(device)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)
