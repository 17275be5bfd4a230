"""`python -m hf_vlmerge.cli`, for launchers that start modules."""

from hf_vlmerge.cli import command

command()
