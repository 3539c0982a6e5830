# SPDX-License-Identifier: Apache-2.0
"""A process of its own that checks the members of a sweep on the devices that a member sees, and lets go of them.

`python -m hybridlm.cli.sweep_check` reads {"config", "members"} as JSON and writes {"states"} or {"error"}.
"""

import json
import sys

from hybridlm.cli.ending import explained
from hybridlm.cli.start import start


def main() -> int:
    """Exit code 0 with an answer on standard output, whatever that is."""
    asked = json.load(sys.stdin)
    try:
        from hybridlm.probes.in_training import check as check_probes
        from hybridlm.study.sweep import Member, check_members

        start()
        members = [Member(*member) for member in asked["members"]]
        answer = {"states": check_members(asked["config"], members, also=check_probes)}
    except Exception as error:
        _, line = explained(error)
        if line is None:
            raise
        answer = {"error": line}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
