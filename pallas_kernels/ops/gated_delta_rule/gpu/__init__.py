# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_rule` on Hopper GPUs."""
