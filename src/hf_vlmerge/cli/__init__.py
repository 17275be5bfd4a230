"""The `hf-vlmerge` command."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 wrong usage."""
    from hf_vlmerge.cli.app import run

    return run(arguments)
