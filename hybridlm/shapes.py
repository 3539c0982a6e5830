# SPDX-License-Identifier: Apache-2.0
"""The one legend of axis letters: suffixes of array names, letters of einsums and annotations.

| letter | axis | letter | axis |
| --- | --- | --- | --- |
| B | batch (rows) | N | state size |
| T | tokens of a row (queries) | F | feed-forward width |
| S | keys | E | experts |
| C | chunks of a row | V | vocabulary |
| Q | position in a chunk | L | layers (scanned repeats) |
| D | model width | W | convolution window |
| H | heads (query heads) | R | low rank |
| K | key/value heads | P | head width |
| G | state groups | | |

`x_BTHP` is an array of shape [batch, tokens, heads, head width]. Counts are `n_...`, widths are `d_...`; `axis` is a
mesh axis and `dim` a tensor dimension. Mesh axes: `data`, `fsdp`, `expert`, `context`,
`tensor`.
"""
