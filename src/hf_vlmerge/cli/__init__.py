"""The `hf-vlmerge` command."""

import gc


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 wrong usage."""
    from hf_vlmerge.cli.app import run

    try:
        return run(arguments)
    finally:
        gc.freeze()  # a million objects of torch need not be looked through once more at the end
