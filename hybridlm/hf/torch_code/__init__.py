# SPDX-License-Identifier: Apache-2.0
"""The model in plain PyTorch, as it is copied beside an export in our own format; nothing here is imported by us.

`code_of` in `hybridlm.hf.families.own` says which of these files a model needs. They import torch, transformers and
each other, and read nothing but config.json.
"""
