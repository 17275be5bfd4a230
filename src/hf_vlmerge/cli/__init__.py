"""The `hf-vlmerge` command."""

import gc


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 wrong usage."""
    from hf_vlmerge.cli.app import run

    # Importing torch makes a million objects that stay. Looking through them for garbage again and again, and once more
    # at the end, takes a third of a short command's time.
    gc.set_threshold(100_000)
    try:
        return run(arguments)
    finally:
        gc.freeze()
