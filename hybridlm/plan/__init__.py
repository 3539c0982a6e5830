# SPDX-License-Identifier: Apache-2.0
"""What a run would be on devices that are not there: its programs, lowered and compiled for a described slice."""
