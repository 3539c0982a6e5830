# SPDX-License-Identifier: Apache-2.0
"""The model in plain PyTorch, as it is copied beside an export in our own format; nothing here is imported by us.

The files import torch, transformers and each other, and read nothing but config.json; `hybridlm.hf.families.own` has
the names of the tensors. A class of MIXERS has the name of our block, and its fields under our names.
"""
