"""The layout of the house: which folders there are, and who may import whom. Imports are read, not run."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hf_vlmerge"
TOP_FOLDERS = {"hub_configs", "src", "tests", "training_scripts"}
ROOMS = {
    "cli", "conversion", "data", "evaluation", "hub", "merging", "metrics", "models", "tasks", "training",
}  # fmt: skip

# Room -> our rooms that it may import from. The rooms of level 0 are parts of `merging` and `metrics`.
MAY_IMPORT = {
    "merging/methods": {"merging._compiled", "merging._matrix", "merging._ops", "merging._order", "merging.registry"},
    "merging/distances": {"merging._ops", "merging._order", "merging.registry"},
    "metrics": {"metrics"},
    "merging": {"merging"},
    "conversion": {"conversion", "merging.tensors", "models"},
    "tasks": {"tasks", "metrics"},
    "data": {"data", "tasks", "models.unival.media_unival"},  # decoding travels with the model that needs it
    "training": {"training", "data", "tasks", "conversion"},
    "evaluation": {"evaluation", "tasks", "metrics", "data", "merging"},
    "hub": {"hub", "tasks", "metrics", "data", "merging", "auto", ""},  # "": the table of public names
}
# Room -> third-party packages that it may import when it is imported.
THIRD_PARTY = {
    "merging/methods": {"torch", "numpy"},
    "merging/distances": {"torch", "numpy"},
    "metrics": {"numpy"},
    "merging": {"torch", "numpy", "safetensors", "huggingface_hub", "yaml", "tqdm"},
    "models": {"torch", "transformers"},
    "auto": set(),
    "": set(),
    "cli": {"typer"},
}
LAZY_EVERYWHERE = {"datasets", "matplotlib"}  # slow, and absent on some machines
COMPILED = {"merging/_kernels.py": {"numba"}}  # only imported where it is installed, and worth it
CONFIGURATION_MAY_IMPORT = {"transformers.configuration_utils", "huggingface_hub"}


class Import(NamedTuple):
    """One imported module: its absolute name, whether it is imported when the file is, and how it is written."""

    name: str
    line: int
    at_top: bool
    in_try: bool
    dots: int
    names: int


def imports(text: str, package: str) -> list[Import]:
    """All imports of a source text; those in a function or under `if TYPE_CHECKING` do not happen at import time."""
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool, in_try: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_top, in_try, 0, len(node.names)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # `from package import module` imports the module as well
                full = f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module
                found.append(Import(full, node.lineno, at_top, in_try, node.level, len(node.names)))
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not (is_function or is_typing_only), in_try or isinstance(node, ast.Try))

    visit(ast.parse(text), True, False)
    return found


def imports_of(path: Path) -> list[Import]:
    package = ".".join(["hf_vlmerge", *path.relative_to(PACKAGE).parts[:-1]])
    return imports(path.read_text(encoding="utf-8"), package)


def is_module(name: str) -> bool:
    if not name.startswith("hf_vlmerge."):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return path.stem if path.stem != "__init__" else ""
    if parts[0] == "merging" and parts[1] in ("methods", "distances"):
        return "/".join(parts[:2])
    return parts[0]


FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_imports_only_what_its_room_may(path):
    room = room_of(path)
    for each in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{each.line} imports {each.name}"
        top = each.name.split(".")[0]
        if top == "hf_vlmerge":
            if room in MAY_IMPORT:
                inside = each.name.removeprefix("hf_vlmerge").lstrip(".")
                own = room.replace("/", ".")
                allowed = MAY_IMPORT[room] | ({own} if path.stem == "__init__" else set())
                ok = any(inside == name or inside.startswith(name + ".") for name in allowed)
                assert ok, f"{where}; {room} may import {sorted(allowed)}"
            elif room in ("cli", "auto", ""):
                light = each.name.startswith(("hf_vlmerge.cli", "hf_vlmerge.auto")) or each.name == "hf_vlmerge"
                assert light or not each.at_top, f"{where} at the top: only inside functions, so that --help stays fast"
        elif each.at_top and top not in sys.stdlib_module_names:
            assert top not in LAZY_EVERYWHERE or each.in_try, f"{where} at the top: import it where it is used"
            if room in THIRD_PARTY and not (room == "models" and each.in_try):
                allowed = THIRD_PARTY[room] | COMPILED.get(str(path.relative_to(PACKAGE)), set())
                assert top in allowed or configuration_exception(path, each), f"{where} at import time"


def configuration_exception(path: Path, each: Import) -> bool:
    return path.name.startswith("configuration_") and each.name.split(".")[0] in CONFIGURATION_MAY_IMPORT


MODEL_FILES = [path for path in FILES if room_of(path) == "models" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODEL_FILES, ids=[path.name for path in MODEL_FILES])
def test_a_model_folder_is_flat_and_closed(path):
    """What travels to the Hub as remote code: siblings only, with one dot, one import a line."""
    folder = path.parent
    assert folder.parent == PACKAGE / "models", f"{path} lies deeper than models/<name>/"
    assert path.stem.endswith(f"_{folder.name}")
    for each in imports_of(path):
        where = f"{path.name}:{each.line}"
        if each.name.split(".")[0] == "hf_vlmerge":
            assert each.dots == 1, f"{where}: {each.name} must be imported as a sibling, with one dot"
            assert each.name.startswith(f"hf_vlmerge.models.{folder.name}."), f"{where} leaves its folder: {each.name}"
            assert each.names == 1, f"{where}: one import a line"
        if path.name.startswith("configuration_") and each.name.split(".")[0] in ("transformers", "huggingface_hub"):
            allowed = tuple(CONFIGURATION_MAY_IMPORT)
            assert each.name.startswith(allowed), f"{where}: a configuration may import {allowed}, not {each.name}"


def test_there_are_no_other_folders():
    ignored = (".", "build", "dist", "demo_out", "runs")
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(ignored)}
    assert folders <= TOP_FOLDERS, folders - TOP_FOLDERS
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= ROOMS, rooms - ROOMS


@pytest.mark.parametrize(
    "room", sorted(path for path in PACKAGE.iterdir() if path.is_dir()), ids=lambda path: path.name
)
def test_a_room_with_more_than_three_files_says_what_it_is(room):
    files = [path for path in room.rglob("*.py") if path.name != "__init__.py"]
    if len(files) > 3:
        readme = room / "README.md"
        assert readme.is_file(), f"{room.relative_to(ROOT)} has {len(files)} files and no README.md"
        assert len(readme.read_text(encoding="utf-8")) > 300


def test_imports_are_read_whatever_their_form():
    text = """
import torch
from ..merging import tensors
from . import report as r
try:
    import av
except ImportError:
    av = None
def later():
    from datasets import load_dataset
"""
    found = [(each.name, each.at_top, each.in_try) for each in imports(text, "hf_vlmerge.conversion")]
    assert found == [
        ("torch", True, False),
        ("hf_vlmerge.merging.tensors", True, False),
        ("hf_vlmerge.conversion.report", True, False),
        ("av", True, True),
        ("datasets", False, False),
    ]
