"""`finetune_unival_no_trainer.py`: what its card on the Hub loads, where it goes on, and wrong files of settings."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hf_vlmerge.training.script_arguments import ModelArguments, flags, parse_arguments
from tests.conftest import ROOT
from tests.hub_server import TOKEN, HubServer
from tests.training.test_finetune_unival import checkpoint, data, settings  # noqa: F401 - fixtures

SCRIPTS = ROOT / "training_scripts"


def run(hub, settings, home):  # noqa: F811
    command = [sys.executable, str(SCRIPTS / "finetune_unival_no_trainer.py"), *flags(settings)]
    environment = os.environ | hub.environment(home, TOKEN) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("given", "name"), [({}, "out"), ({"hub_model_id": "tuned"}, "tuned")])
def test_the_pushed_card_loads_the_repository_with_its_owner(settings, tmp_path, given, name):  # noqa: F811
    settings |= {"max_steps": 1, "push_to_hub": True, "validation_split": "validation"} | given
    with HubServer() as hub:
        run(hub, settings, tmp_path / "home")
        assert set(hub.repos) == {f"org/{name}"}
        card = hub.files(f"org/{name}")["README.md"].decode()
    assert f'UnivalForConditionalGeneration.from_pretrained("org/{name}")' in card


def test_nothing_is_created_unless_it_is_pushed(settings, tmp_path):  # noqa: F811
    with HubServer() as hub:
        run(hub, settings | {"max_steps": 1, "hub_model_id": "tuned"}, tmp_path / "home")
        assert not hub.repos
    assert 'from_pretrained("out")' in Path(settings["output_dir"], "README.md").read_text()


def test_a_run_that_is_further_than_it_is_to_go_does_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loop = importlib.import_module("finetune_unival_no_trainer").Loop
    accelerator = SimpleNamespace(is_main_process=False)
    loop.run(SimpleNamespace(arguments=None, accelerator=accelerator, steps=3, done=4, groups=lambda: iter([1])))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "settings.yaml: expected a mapping of names to values; got None."),
        (yaml.safe_dump(["a"]), "settings.yaml: expected a mapping of names to values; got ['a']."),
        ("a: [", "settings.yaml is not valid YAML: "),
    ],
)
def test_a_settings_file_that_is_wrong_ends_with_one_sentence(text, sentence, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse_arguments(ModelArguments, arguments=[str(file)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("error: ") == 1
