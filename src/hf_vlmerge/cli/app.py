"""The commands, put together, and what becomes of an error.

Nothing here or at the top of a command's file may import torch or transformers: `hf-vlmerge --help` answers at once.
"""

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_vlmerge.cli.convert import app as convert
from hf_vlmerge.cli.distance import distance
from hf_vlmerge.cli.merge import merge
from hf_vlmerge.cli.methods import methods
from hf_vlmerge.cli.publish import card, publish
from hf_vlmerge.cli.statistics import statistics
from hf_vlmerge.cli.sweep import sweep

UsageError = typer.BadParameter.__base__  # click's class; newer versions of typer carry a click of their own

app = typer.Typer(
    help="Merge multimodal transformers and publish the result.",
    epilog="Add --debug anywhere to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the merged model, the table and the plot.")] = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under three minutes in place of eight.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of a run; give it again for more runs.")] = None,
):
    """Train, merge, fine-tune and reload small models on embedded data, on the CPU.

    \b
    Example: hf-vlmerge demo --out demo_out
    """
    from hf_vlmerge.cli.demo import run as run_demo

    run_demo(out=out, quick=quick, seeds=seed or [0])


app.command()(merge)
app.command()(distance)
app.command()(sweep)
app.command()(statistics)
app.command()(publish)
app.command()(card)
app.command()(methods)
app.add_typer(convert, name="convert")


def _print_version(wanted: bool) -> None:
    if wanted:
        from hf_vlmerge import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
):
    pass


def run(arguments: list[str] | None = None) -> int:
    """Parse and run; one sentence on stderr for an error, the traceback only with `--debug`."""
    gc.set_threshold(50_000, 20, 100)  # torch alone loads half a million objects that stay: no need to look so often
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return app(arguments, prog_name="hf-vlmerge", standalone_mode=False) or 0
    except UsageError as error:
        error.show()
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("hf-vlmerge: stopped.", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"hf-vlmerge: {sentence(error)}", file=sys.stderr)
        return 1


def sentence(error: Exception) -> str:
    """What the user reads of an error: its message; the kind of error too where it is none that we foresaw."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))  # no codes for the terminal
    foreseen = isinstance(error, (ValueError, OSError, KeyError, ImportError))
    return message if foreseen and message else f"{type(error).__name__}: {message} (--debug shows where)"
