"""The command `etcdfs`: starts the daemon, if one will be wanted, and then reads the command line.

A mount takes two Pythons, and both have more to load than to do: this one to understand its
options, the daemon to carry them out. They load at the same time, the daemon first, because it
has more to load.

Knows: the order. Does not know: anything else; all that it imports before the daemon is started
makes every mount take longer.

Concurrency: none.
"""

import os
import sys

from etcdfs.cli.argv import HELPER, helper_form, likely_mountpoint
from etcdfs.process.spawn import fill_standard_descriptors, spawn


def main() -> None:
    """Run the command line of this process, and exit with a documented status."""
    fill_standard_descriptors()
    arguments = sys.argv[1:]
    if sys.argv[0].rpartition("/")[2] == HELPER:
        asked = helper_form(arguments)
        if asked is None:
            os._exit(0)
        arguments = asked
    mountpoint = likely_mountpoint(arguments)
    try:
        early = None if mountpoint is None else spawn(mountpoint)
    except OSError:  # the command line will find out, and say, what is wrong here
        early = None
    from etcdfs.cli.main import run  # noqa: PLC0415 -- takes a tenth of a second

    status = run(arguments, early)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or a reader that is gone
            status = status or 1
    os._exit(status)  # there is nothing to take down, and Python needs its time for that


if __name__ == "__main__":
    main()
