"""Fixtures that every test may use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers beside the repository; without it the tests that need it are skipped, visibly."""
    folder = ROOT.parent / "shared"
    if not (folder / "goldens").is_dir():
        pytest.skip("the folder of reference numbers (../shared) is not here")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped, visibly, where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU here")


@pytest.fixture(scope="session")
def auto_image_processor() -> None:
    """Old versions of transformers have AutoImageProcessor only beside torchvision: tests that use it are skipped."""
    from transformers import AutoImageProcessor

    try:
        _ = AutoImageProcessor.register
    except ImportError:
        pytest.skip("this version of transformers has AutoImageProcessor only beside torchvision")
