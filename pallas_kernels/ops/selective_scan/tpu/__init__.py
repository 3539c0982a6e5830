# SPDX-License-Identifier: Apache-2.0
"""Mosaic TPU kernels of `selective_scan`."""
