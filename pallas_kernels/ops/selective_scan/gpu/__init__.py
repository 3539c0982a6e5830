# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of `selective_scan`."""
