# SPDX-License-Identifier: Apache-2.0
"""`python -m hybridlm` is the command `hybridlm`."""

import sys

from hybridlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
