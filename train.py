# SPDX-License-Identifier: Apache-2.0
"""The main job: `python train.py --config NAME [--section.key=value ...]`; `--help` lists configs and keys.

Trains the config, or goes on with its run. In hybridlm/train, step.py is what is jitted, loop.py the loop around it.
"""

import sys

from hybridlm.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
