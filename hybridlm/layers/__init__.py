# SPDX-License-Identifier: Apache-2.0
"""One mixer or sublayer a file: its frozen sub-config, its module, its one-token form."""
