# SPDX-License-Identifier: Apache-2.0
"""Module names of before that still import, see `pallas_kernels.moved`."""

MOVED = {
    "hybridlm.checkpoint": ("hybridlm.train.checkpoint",),
    "hybridlm.commands": ("hybridlm.train.commands",),
    "hybridlm.config_io": (
        "hybridlm.config.find", "hybridlm.config.overrides", "hybridlm.config.stored", "hybridlm.config.tree",
        "hybridlm.config.keys", "hybridlm.config.help",
    ),
    "hybridlm.convert": ("hybridlm.cli.convert", "hybridlm.train.published"),
    "hybridlm.data.sources": ("hybridlm.data.formats",),
    "hybridlm.evaluate": ("hybridlm.train.evaluate", "hybridlm.train.metrics"),
    "hybridlm.flops": ("hybridlm.model.flops", "hybridlm.layers.attention", "hybridlm.layers.mamba2"),
    "hybridlm.generation": ("hybridlm.model.generation",),
    "hybridlm.hf.published": ("hybridlm.config.published",),
    "hybridlm.layers.blocks": ("hybridlm.layers", "hybridlm.layers.block"),
    "hybridlm.loop": ("hybridlm.train.loop",),
    "hybridlm.loss": ("hybridlm.train.loss",),
    "hybridlm.meter": ("hybridlm.train.meter",),
    "hybridlm.metrics": ("hybridlm.train.mfu",),
    "hybridlm.pattern": ("hybridlm.model.pattern",),
    "hybridlm.plot": ("hybridlm.train.plot",),
    "hybridlm.progress": ("hybridlm.train.progress",),
    "hybridlm.remat": ("hybridlm.model.remat",),
    "hybridlm.run_folder": ("hybridlm.train.run_folder", "hybridlm.train.metrics_log"),
    "hybridlm.sample": ("hybridlm.train.sample",),
    "hybridlm.schedule": ("hybridlm.optim.schedule",),
    "hybridlm.step": ("hybridlm.train.step",),
    "hybridlm.stop": ("hybridlm.train.stop",),
}  # fmt: skip
"""Old module -> the modules that have its names now, asked in this order."""
