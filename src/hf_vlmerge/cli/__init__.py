"""The `hf-vlmerge` command."""

import atexit
import os
import sys
from typing import NoReturn


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 wrong usage."""
    from hf_vlmerge.cli.app import run

    return run(arguments)


def command() -> NoReturn:
    """What the shell starts: it leaves without taking apart what the end of a process frees at once.

    What is called last at the end is what was registered first: all that others want done then has been done.
    """
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    code = main()
    sys.exit(code)
