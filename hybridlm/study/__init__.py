# SPDX-License-Identifier: Apache-2.0
"""Runs as they are found in folders and buckets: read, set beside each other, drawn, and made into pages."""
