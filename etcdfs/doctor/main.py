"""Runs the checklist and prints it; a process of its own, which `etcdfs doctor` becomes.

Knows: the order of the checks, and the exit code. Does not know: what is checked.

Run as `python -m etcdfs.doctor.main MOUNTPOINT --options-fd N [--fix]`.

Concurrency: one trio loop.
"""

import argparse
import os
import sys

import trio

from etcdfs.doctor.cluster import check_cluster
from etcdfs.doctor.machine import FUSE_CONF, Finding, Level, check_machine
from etcdfs.errors import ProblemsFoundError
from etcdfs.options import MountOptions
from etcdfs.process.printable import printable
from etcdfs.process.startup_protocol import read_options


async def examine(options: MountOptions, *, fix: bool) -> list[Finding]:
    """Return all that is found, in order; each is printed as soon as it is known."""
    found: list[Finding] = []

    def say(finding: Finding) -> None:
        found.append(finding)
        message = printable(" ".join(finding.message.split()))
        sys.stdout.write(f"{finding.level.value:8} {finding.check:12} {message}\n")
        sys.stdout.flush()

    for finding in check_machine(options, kernel=os.uname().release, fuse_conf=FUSE_CONF):
        say(finding)
    async for finding in check_cluster(options, fix=fix):
        say(finding)
    return found


def main() -> int:
    """Run the checklist; return the exit code."""
    parser = argparse.ArgumentParser(prog="etcdfs.doctor", description=__doc__)
    parser.add_argument("mountpoint", help="for the list of processes; see --options-fd")
    parser.add_argument("--options-fd", type=int, required=True)
    parser.add_argument("--fix", action="store_true")
    arguments = parser.parse_args()
    handover = read_options(arguments.options_fd)
    assert handover is not None, "whoever became this process has told it its options"
    found = trio.run(lambda: examine(handover.options, fix=arguments.fix))
    problems = sum(finding.level is Level.PROBLEM for finding in found)
    if not problems:
        return 0
    sys.stderr.write(f"etcdfs: {problems} problem(s) found\n")
    return ProblemsFoundError.exit_code


if __name__ == "__main__":
    sys.exit(main())
