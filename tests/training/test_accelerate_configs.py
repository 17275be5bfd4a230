"""The launch configurations beside the training scripts, read as `accelerate launch` reads them."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).resolve().parents[2] / "training_scripts" / "accelerate_configs"
KINDS = {
    "cpu_2proc": ("MULTI_GPU", 2),  # see the file
    "single_gpu": ("NO", 1),
    "multi_gpu": ("MULTI_GPU", 8),
    "fsdp2": ("FSDP", 8),
    "deepspeed_zero1": ("DEEPSPEED", 8),
    "deepspeed_zero2": ("DEEPSPEED", 8),
    "deepspeed_zero3": ("DEEPSPEED", 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_launch_configuration_says_what_accelerate_understands(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    settings = yaml.safe_load(path.read_text())
    assert (config.distributed_type, config.num_processes) == KINDS[name]
    assert config.use_cpu is (name == "cpu_2proc") and config.mixed_precision == settings["mixed_precision"]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    assert f"accelerate_configs/{name}.yaml" in path.read_text().split("compute_environment")[0]


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)
