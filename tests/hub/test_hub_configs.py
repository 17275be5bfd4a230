"""The configurations that ship: they load, and have the parameters that their README says."""

import re
from pathlib import Path

import pytest
import torch

from hf_vlmerge import VlmoConfig, VlmoForPreTraining

FOLDER = Path(__file__).resolve().parents[2] / "hub_configs"
ROWS = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| ([\d,]+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "expert_modules", "parameters"), ROWS)
def test_a_base_size_configuration_has_the_listed_parameters(name, expert_modules, parameters):
    config = VlmoConfig.from_pretrained(FOLDER / "vlmo" / name)
    assert config.expert_modules == ([] if expert_modules == "none" else expert_modules.split(", "))
    with torch.device("meta"):
        model = VlmoForPreTraining(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == int(parameters.replace(",", ""))


def test_the_table_lists_every_configuration():
    assert {name for name, *_ in ROWS} == {path.parent.name for path in FOLDER.glob("vlmo/*/config.json")}
    assert len(ROWS) == 5
