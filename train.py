# SPDX-License-Identifier: Apache-2.0
"""The main job: `python train.py --config NAME [--section.key=value ...]`; `--help` lists configs and keys.

Trains the config, or goes on with its run. In hybridlm/train, step.py is what is jitted, loop.py the loop around it.
"""

import signal
import sys

interrupts = signal.getsignal(signal.SIGINT)
if interrupts is signal.default_int_handler:  # Ctrl-C in the seconds of imports ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from hybridlm.cli import train_main  # noqa: E402

signal.signal(signal.SIGINT, interrupts)

if __name__ == "__main__":
    sys.exit(train_main())
