"""`python -m tests.soak`: the long form of the proof; see `make soak`.

Exit codes:
    0: Nothing was wrong, and every fault happened. With a defect: it was caught.
    1: Something was wrong. With a defect: it was not caught.
    2: It cannot be run here.
"""

import argparse
import random
import signal
import sys
from pathlib import Path

from tests.soak.conductor import Conductor
from tests.soak.controls import CONTROLS, run_control
from tests.soak.table import FAULTS
from tests.support.etcd_process import find_etcds


def main() -> int:
    """Run what the command line says."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # everything is taken down
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--duration", type=float, default=1200.0, help="seconds")
    parser.add_argument("--etcd", default="all", help="all, or versions: 3.4,3.7.3")
    parser.add_argument("--defect", default="", help=f"one of {', '.join(CONTROLS)}, or all")
    parser.add_argument("--fault", default="", help="only faults whose titles contain one of these")
    parser.add_argument("--arena", default="", help="only faults of this arena")
    parser.add_argument("--options", default="", help="further options of the mounts")
    arguments = parser.parse_args()
    found = find_etcds()
    wanted = [""] if arguments.etcd == "all" else arguments.etcd.split(",")
    releases: dict[str, Path] = {
        version: binary
        for version, binary in found.items()
        if any(version.startswith(part) for part in wanted)
    }
    if not releases or not all(any(v.startswith(part) for v in releases) for part in wanted):
        print(f"etcd {arguments.etcd} is not here, only {', '.join(found)}", file=sys.stderr)  # noqa: T201
        return 2
    if arguments.defect:
        names = list(CONTROLS) if arguments.defect == "all" else arguments.defect.split(",")
        caught = [run_control(CONTROLS[name], releases, arguments.seed) for name in names]
        return 0 if all(caught) else 1
    wanted = arguments.fault.split(",")
    faults = [
        fault
        for fault in FAULTS
        if any(part in fault.title for part in wanted) and arguments.arena in fault.arena
    ]
    conductor = Conductor(seed=arguments.seed)
    options = tuple(arguments.options.split())
    conductor.run(releases, faults, duration_s=arguments.duration, options=options)
    conductor.report(faults)
    return 1 if conductor.failures else 0


if __name__ == "__main__":
    sys.exit(main())
