"""Publishing: what is refused before any request, what the card gets, and one commit on a Hub of our own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load

from hf_vlmerge import UnivalForConditionalGeneration, VlmoForPreTraining, publish
from hf_vlmerge.cli import main
from hf_vlmerge.hub.card import write_model_card
from hf_vlmerge.hub.checks import LARGEST_TEXT, LOCAL_PATH, PublishError, check_texts
from hf_vlmerge.hub.provenance import section, weight_files, with_section
from hf_vlmerge.hub.publication import Publication
from hf_vlmerge.hub.publish import with_metadata, with_name
from hf_vlmerge.merging import MergeError, merge_tensors
from tests.conftest import ROOT
from tests.hub.test_push import THEIR_WARNING
from tests.hub.test_push import run as run_code
from tests.hub_server import TOKEN, HubServer
from tests.models.unival.tiny import tiny_model
from tests.models.unival.tiny_processor import tiny_processor
from tests.models.vlmo.tiny import tiny_model as vlmo_model

EXAMPLES = sorted((ROOT / "hub_configs" / "publish").glob("*.yaml"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with runs/caption, runs/vqa and runs/grounding: tiny UnIVAL models with processor and card."""
    root = tmp_path_factory.mktemp("models")
    processor = tiny_processor()
    for seed, name in enumerate(("caption", "vqa", "grounding")):
        folder = root / "runs" / name
        model = tiny_model(UnivalForConditionalGeneration, seed, vocab_size=len(processor.tokenizer), towers=["image"])
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_model_card(folder, data=["shapes"], name="finished")
    return root


@pytest.fixture
def finished(models, tmp_path) -> Path:
    """A folder of its own that could be published."""
    return shutil.copytree(models / "runs" / "caption", tmp_path / "finished")


# What is refused, before any request


@pytest.mark.parametrize("repo_id", ["unival", "org/a/b", "org/", "org/a b", "-org/a", "org/a--b", ""])
def test_a_name_that_the_hub_does_not_take(repo_id, finished):
    with pytest.raises(ValueError, match="no name of a repository: expected owner/name"):
        publish(finished, repo_id, dry_run=True)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def add(name: str, text: str):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "there is no folder 'finished'"),
        (remove("model.safetensors"), "finished holds no weights: expected model.safetensors"),
        (remove("README.md"), "finished has no README.md: expected a card"),
        (add("pytorch_model.bin", "x"), "finished holds pytorch_model.bin, which is pickled"),
        (add("training_args.bin", "x"), "training_args.bin, which is pickled"),
        (add("optimizer.pt", "x"), "optimizer.pt, which is pickled"),
        (add("README.md", "see /home/ann/runs/vqa"), "README.md names a path of this machine, '/home/ann/runs/vqa'"),
        (add("recipe.yaml", "model: /Users/ann/vqa"), "recipe.yaml names a path of this machine, '/Users/ann/vqa'"),
        (
            add("notes.json", '{"_name_or_path": "/mnt/disk/vqa"}'),
            "notes.json names a path of this machine, '/mnt/disk/",
        ),
        (add("README.md", r"C:\Users\ann\vqa"), r"README.md names a path of this machine, 'C:\\\\Users"),
        (add("provenance.json", '{"inputs": [1]}'), "provenance.json is not as it was written: expected"),
        (add("README.md", "hf_" + "a1B2" * 8), "README.md holds what looks like an access token"),
        (add("train.log", "hf_" + "a1B2" * 8), "train.log holds what looks like an access token"),
        (add("run.sh", "cd /workspace/runs"), "run.sh names a path of this machine, '/workspace/runs'"),
        (add("page.html", "<a href='/scratch2/ann/x'>"), "page.html names a path of this machine, '/scratch2/ann/x'"),
        (
            add("lines.jsonl", r'{"text": "see\n/data/vqa/x"}'),
            "lines.jsonl names a path of this machine, '/data/vqa/x'",
        ),
        (add("look.ipynb", '{"source": ["/content/drive/x"]}'), "look.ipynb names a path of this machine, '/content/"),
        (add("scaler.pkl", "x"), "scaler.pkl, which is pickled"),
        (add("scaler.PICKLE", "x"), "scaler.PICKLE, which is pickled"),
        (add("scaler.joblib", "x"), "scaler.joblib, which is pickled"),
    ],
)
def test_a_folder_that_must_not_be_published(change, message, finished):
    change(finished)
    with pytest.raises(ValueError, match=message) as caught:
        publish(finished, "org/model")  # there is no Hub to ask in this process
    assert "\n" not in str(caught.value) and "a1B2" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["data", "work", "workspace", "fsx", "gpfs", "lustre", "nfs", "scratch", "scratch1", "content", "kaggle"]
)
def test_where_clusters_keep_files(place):
    assert LOCAL_PATH.search(f"from /{place}/ann/run")[0] == f"/{place}/ann/run"
    assert not LOCAL_PATH.search(f"https://host.org/{place}/x, org/{place}/x, ./{place}/x and /{place}s")


def test_what_is_no_text_is_not_read(finished):
    (finished / "sound.raw").write_bytes(b"\xff /home/ann/x")
    (finished / "vocab.txt").write_text("/home/ann/x")
    add("long.log", "/home/ann/x\n" * (LARGEST_TEXT // 10))(finished)
    assert {"sound.raw", "vocab.txt", "long.log"} <= publish(finished, "org/model", dry_run=True).files.keys()


def test_the_cards_and_source_files_of_this_repository_could_be_published():
    paths = [*ROOT.glob("*.md"), *ROOT.glob("src/hf_vlmerge/models/*/*.py"), *ROOT.glob("hub_configs/**/*.*")]
    assert len(paths) > 10
    check_texts(ROOT, [str(path.relative_to(ROOT)) for path in paths], {})


def test_a_path_of_the_working_folder_is_found_wherever_it_is(finished):
    add("README.md", f"trained in {finished.resolve().parent}/x")(finished)
    with pytest.raises(ValueError, match=r"README\.md names a path of this machine"):
        publish(finished, "org/model", dry_run=True)


def test_a_link_out_of_the_folder(finished, tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (finished / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"notes\.txt is a link out of the folder"):
        publish(finished, "org/model", dry_run=True)


def test_addresses_are_no_paths_and_states_of_training_stay_here(finished):
    add("README.md", "https://host.org/home/ann and ../runs/vqa and src/home/x")(finished)
    (finished / "checkpoint-10").mkdir()
    add("checkpoint-10/optimizer.pt", "x")(finished)
    add(".secret", "x")(finished)
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    done = publish(finished, "org/model", dry_run=True)
    assert {"README.md", "model.safetensors", "config.json", "modeling_unival.py"} <= done.files.keys()
    assert not {"checkpoint-10/optimizer.pt", ".secret"} & done.files.keys() and done.commit is None
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


# Publications


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_understood_and_say_what_they_cost(path):
    publication = Publication.load(path)
    assert publication.private and publication.card["license"]
    if publication.recipe is not None:
        assert publication.pinned_recipe().merge_method
    assert [line.split(":")[0] for line in path.read_text().splitlines() if line[:3] in ("# G", "# C", "# R")] == [
        "# Gives",
        "# Costs",
        "# Run",
    ]


def test_parents_pin_the_inputs_of_a_recipe():
    recipe = Publication.load(ROOT / "hub_configs/publish/vlmo_interpolation.yaml").pinned_recipe()
    assert recipe.experts_of == "org/vlmo-base-specific@main"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"repo": "org/a"}, "unknown key 'repo'; did you mean 'repo_id'"),
        ({"repo_id": "org/a"}, "needs either 'folder'"),
        ({"repo_id": "org/a", "folder": "x", "recipe": "y.yaml"}, "needs either 'folder'"),
        ({"repo_id": "a", "folder": "x"}, "no name of a repository"),
        ({"repo_id": "org/a", "folder": "x", "private": "yes"}, "private can be true or false, not 'yes'"),
        ({"repo_id": "org/a", "folder": "x", "card": {"licence": "mit"}}, "'licence'; did you mean 'license'"),
        ({"repo_id": "org/a", "folder": "x", "parents": ["org/b"]}, "parents must be a mapping"),
        ({"repo_id": "org/a", "folder": 5}, "publication.yaml: folder must be a name, not 5"),
        ({"repo_id": "org/a", "folder": "x", "revision": 1.0}, "publication.yaml: revision must be a name, not 1.0"),
        ({"repo_id": "org/a", "folder": "x", "message": 3}, "publication.yaml: message must be a name, not 3"),
        (
            {"repo_id": "org/a", "folder": "x", "card": {"language": [False]}},
            r"language of card must be a string or a list of strings, not \[False\]; in YAML, quote",
        ),
        ({"repo_id": "org/a", "folder": "x", "card": {"tags": {"a": 1}}}, "tags of card must be a string or a list"),
    ],
)
def test_a_publication_with_a_mistake(content, message, tmp_path):
    path = tmp_path / "publication.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        Publication.load(path)


def test_a_parent_that_is_no_input(tmp_path):
    path = tmp_path / "publication.yaml"
    recipe = {"merge_method": "linear", "models": ["org/one", "org/two"]}
    path.write_text(yaml.safe_dump({"repo_id": "org/a", "recipe": recipe, "parents": {"org/onee": "v1"}}))
    with pytest.raises(ValueError, match="'org/onee', which is no input of the recipe; did you mean 'org/one'"):
        Publication.load(path).publish(dry_run=True)


# The card


def test_the_section_of_files_is_replaced_and_nothing_else():
    weights = [{"name": "model.safetensors", "size": 9, "sha256": "0" * 64}]
    card = "# A\n\ntext\n\n## Files\n\nold\n\n## Citation\n\nnone\n"
    new = with_section(card, section(weights, []))
    assert new.startswith("# A\n\ntext\n\n## Files\n\n| file") and new.endswith("|\n\n## Citation\n\nnone\n")
    assert with_section(new, section(weights, [])) == new and "old" not in new
    without = with_section("# A\n\ntext\n", section(weights, []))
    assert without.startswith("# A\n\ntext\n\n## Files\n") and with_section(without, section(weights, [])) == without


def test_metadata_are_merged_into_the_block():
    card = with_metadata("---\ntags: [merge]\n---\n\n# A\n", {"license": "mit", "language": None})
    assert card == "---\ntags:\n- merge\nlicense: mit\n---\n\n# A\n"
    assert with_metadata(card, {"license": "mit", "tags": ["merge"]}) is card
    assert "tags:\n- merge\n- small\n" in with_metadata(card, {"tags": ["small"]})
    assert with_metadata("# A\n", {"license": "mit"}) == "---\nlicense: mit\n---\n\n# A\n"


def test_tags_may_be_one_string_or_none():
    card = with_metadata("---\ntags: merge\n---\n\n# A\n", {"tags": "small"})
    assert card == "---\ntags:\n- merge\n- small\n---\n\n# A\n"
    assert with_metadata("---\ntags:\n---\n\n# A\n", {"tags": ["a"]}) == "---\ntags:\n- a\n---\n\n# A\n"
    assert with_metadata(none := "---\ntags:\n---\n\n# A\n", {}) is none


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("- a", r"the metadata of README.md must be a mapping, not \['a'\]"),
        ("a: [", "the metadata of README.md are not valid YAML: "),
        ("tags: [5]", r"tags of the card must be a string or a list of strings, not \[5\]"),
    ],
)
def test_metadata_that_are_wrong_are_one_sentence(block, message, finished):
    (finished / "README.md").write_text(f"---\n{block}\n---\n\n# A\n")
    with pytest.raises(PublishError, match=message) as caught:
        publish(finished, "org/model", metadata={"license": "mit"}, dry_run=True)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_model_index_is_that_of_the_repository(models, tmp_path):
    folder = shutil.copytree(models / "runs" / "caption", tmp_path / "runs7")
    write_model_card(folder, scores={"shapes": {"accuracy": 0.75}})
    card = with_name((folder / "README.md").read_text(), "runs7", "org/model")
    read = ModelCard(card).data
    assert read.model_name == "model" and read.eval_results[0].metric_value == 0.75 and "runs7" not in card
    assert with_name(card, "runs7", "org/model") is card


def test_weights_of_subfolders_are_listed_and_states_of_training_are_not(finished):
    for name in ("vision/model.safetensors", "checkpoint-1/model.safetensors"):
        (finished / name).parent.mkdir()
        shutil.copyfile(finished / "model.safetensors", finished / name)
    assert [each["name"] for each in weight_files(finished)] == ["model.safetensors", "vision/model.safetensors"]
    (finished / "model.safetensors").unlink()
    (nested,) = weight_files(finished)
    assert nested["sha256"] == sha256((finished / "vision/model.safetensors").read_bytes())


def test_the_example_loads_what_was_published():
    card = '\n# runs7\n\n"runs7"\n```python\nload("runs7")\n```\n'
    there = '\n# model\n\n"runs7"\n```python\nload("org/model")\n```\n'
    assert with_name(card, "runs7", "org/model") == with_name(card, "moved", "org/model") == there
    assert with_name(there, "moved", "org/model") == there
    named = card.replace("# runs7", "# A model of mine")
    assert with_name(named, "runs7", "org/model") == there.replace("# model", "# A model of mine")


# On the Hub


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub, cwd, *commands, token=TOKEN, fails=False):
    """Run commands of `hf-vlmerge` in one process that knows this Hub only; what each printed."""
    code = """
import contextlib, io, json, sys
from hf_vlmerge.cli import main
said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(command)
    said.append([status, out.getvalue()])
print(json.dumps(said))
"""
    environment = {**os.environ, **hub.environment(cwd / "home", token), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", THEIR_WARNING, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=250)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert all((status != 0) == fails for status, _ in said), done.stderr
    return [text for _, text in said], done.stderr


def test_the_example_of_an_average_is_merged_and_published_once(hub, models):
    path = str(ROOT / "hub_configs" / "publish" / "unival_average.yaml")
    (plan, first, second, text), _ = run(
        hub, models, ["publish", path, "--dry-run"], *[["publish", path, "--json"]] * 2, ["publish", path]
    )
    assert "nothing was uploaded (dry run)" in plan
    first, second = json.loads(first), json.loads(second)
    assert first["changed"] and not second["changed"] and first["commit"] == second["commit"]
    assert "org/unival-average: everything is there already" in text
    assert hub.commits["org/unival-average"] == ["Publish unival-average with hf_vlmerge"]
    assert hub.private == {"org/unival-average"}
    files = hub.files("org/unival-average")
    assert {"config.json", "recipe.yaml", "provenance.json", "processor_config.json", "modeling_unival.py"} <= set(
        files
    )
    card = files["README.md"].decode()
    inputs = [(models / "runs" / name / "model.safetensors").read_bytes() for name in ("caption", "vqa", "grounding")]
    for data in (*inputs, files["model.safetensors"]):
        assert sha256(data) in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "image-text-to-text")
    assert 'UnivalForConditionalGeneration.from_pretrained("org/unival-average")' in card
    assert str(models) not in card and "not recorded" not in card
    recipe = yaml.safe_load(files["recipe.yaml"])
    expected = merge_tensors(recipe, {m["model"]: models / "runs" / m["model"] for m in recipe["models"]})
    published = load(files["model.safetensors"])
    assert expected.keys() == published.keys() and all(expected[name].equal(published[name]) for name in expected)


def test_inputs_on_the_hub_are_pinned_and_have_the_hashes_of_the_hub(finished, tmp_path):
    vlmo_model(VlmoForPreTraining).save_pretrained(tmp_path / "specific")
    start = {path.name: path.read_bytes() for path in (tmp_path / "specific").iterdir()}
    commit = "c" * 40
    publication = {"repo_id": "org/trained", "folder": "finished", "parents": {"org/vlmo-base-specific": "main"}}
    (tmp_path / "trained.yaml").write_text(yaml.safe_dump(publication))
    example = str(ROOT / "hub_configs" / "publish" / "vlmo_interpolation.yaml")
    repo = "org/vlmo-base-specific"
    with HubServer({repo: {commit: start}}, {repo: {"main": commit}}) as hub:
        run(hub, tmp_path, ["publish", example], *[["publish", "trained.yaml"]] * 2)
        merged, trained = hub.files("org/vlmo-base-merged"), hub.files("org/trained")
        assert len(hub.commits["org/trained"]) == 1
    assert yaml.safe_load(merged["recipe.yaml"])["experts_of"] == f"{repo}@{commit}"
    for files, relation in ((merged, "merge"), (trained, None)):
        card = files["README.md"].decode()
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert (metadata["base_model"], metadata.get("base_model_relation")) == ([repo], relation)
        assert f"https://huggingface.co/{repo}/tree/{commit}" in card and sha256(start["model.safetensors"]) in card


def test_a_folder_a_branch_a_changed_card_and_stale_weights(hub, finished, tmp_path):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    (first,), _ = run(hub, tmp_path, ["publish", "finished", "org/model", "--revision", "v1", "--json"])
    assert json.loads(first)["changed"] and set(hub.heads["org/model"]) == {"main", "v1"}
    assert hub.files("org/model") == {} and "config.json" in hub.files("org/model", "v1")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before  # hashes, names: on the Hub only
    card = hub.files("org/model", "v1")["README.md"].decode()
    assert "# model\n" in card and '"org/model", trust_remote_code=True' in card
    hub.files("org/model", "v1")["model-00001-of-00002.safetensors"] = b"of an earlier publication"
    add("README.md", "\nMore to say.\n")(finished)
    (again,), _ = run(
        hub, tmp_path, ["publish", "finished", "org/model", "--revision", "v1", "--message", "more", "--json"]
    )
    assert json.loads(again)["changed"] and hub.commits["org/model"][1:] == ["more"]
    files = hub.files("org/model", "v1")
    assert "model-00001-of-00002.safetensors" not in files and "model.safetensors" in files
    assert b"More to say." in files["README.md"]
    _, error = run(hub, tmp_path, ["publish", "finished", "org/model", "--private"], fails=True)
    assert error == "hf-vlmerge: org/model exists and is public, not private; change that on its page first\n"


def test_local_inputs_are_hashed_from_the_recipe_that_was_run(hub, models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    names = [str(models / "runs" / name) for name in ("caption", "vqa")]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": names}))
    (_, plain, hashed), _ = run(
        hub,
        tmp_path,
        ["merge", "recipe.yaml", "out", "--no-fsync"],
        ["publish", "out", "org/model"],
        ["publish", "out", "org/model", "--recipe", "recipe.yaml"],
    )
    assert "the sha256 of model.safetensors of caption (caption) is not known; give the recipe that was run" in plain
    assert "note:" not in hashed
    assert sha256((Path(names[0]) / "model.safetensors").read_bytes()) in hub.files("org/model")["README.md"].decode()
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": names[:1]}))
    _, error = run(hub, tmp_path, ["publish", "out", "org/model", "--recipe", "recipe.yaml"], fails=True)
    assert error.startswith("hf-vlmerge: out is not a merge of this recipe")


@pytest.mark.parametrize("token", [None, "hf_" + "wrong" * 6])
def test_a_login_that_does_not_do_is_one_sentence_without_the_token(token, hub, finished, tmp_path):
    _, error = run(hub, tmp_path, ["publish", "finished", "org/model"], token=token, fails=True)
    assert error.startswith("hf-vlmerge: the Hub ") and "hf auth login" in error and error.count("\n") == 1
    assert "wrong" not in error and not hub.repos


def test_a_repository_that_has_moved_on_and_one_that_others_own(hub, tmp_path):
    code = """
import json
from huggingface_hub import CommitOperationAdd, HfApi
from hf_vlmerge.hub.publish import one_sentence
api, said = HfApi(), []
api.create_repo("org/model")
file = CommitOperationAdd("README.md", b"# A model")
for repo, parent in (("org/model", "0" * 40), ("org/other", None)):
    try:
        with one_sentence(repo):
            api.create_commit(repo, [file], commit_message="x", parent_commit=parent)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    moved, missing = run_code(hub, tmp_path, "-c", code)
    assert moved == "org/model has got another commit meanwhile; look at it and publish again"
    assert missing.startswith("org/other could not be published: 404") and "\n" not in missing


@pytest.mark.parametrize("revision", ["main", "v9"])
def test_a_parent_that_is_not_on_the_hub_is_named(revision, finished, tmp_path):
    parent = "org/nobody" if revision == "main" else "org/start"
    publication = {"repo_id": "org/trained", "folder": "finished", "parents": {parent: revision}}
    (tmp_path / "trained.yaml").write_text(yaml.safe_dump(publication))
    with HubServer({"org/start": {"c" * 40: {}}}, {"org/start": {"main": "c" * 40}}) as hub:
        _, error = run(hub, tmp_path, ["publish", "trained.yaml"], fails=True)
        assert set(hub.repos) == {"org/start"}
    expected = f"the parent {parent!r} is not on the Hub with revision {revision!r}, or not for this login"
    assert error == f"hf-vlmerge: {expected}\n"


def test_the_commands_say_what_is_missing(finished, capsys):
    assert main(["publish", str(finished)]) == 2
    assert "a repository is missing" in capsys.readouterr().err
    assert main(["publish", str(EXAMPLES[0]), "org/a"]) == 2
    assert "names repository and recipe itself" in capsys.readouterr().err
    assert main(["card", str(finished)]) == 1
    assert "finished has a README.md; say --overwrite" in capsys.readouterr().err
    scores = finished.parent / "scores.json"
    scores.write_text('{"shapes": {"accuracy": 0.75}}')
    command = ["card", str(finished), "--data", "shapes", "--license", "mit", "--scores", str(scores), "--overwrite"]
    assert main(command) == 0
    card = (finished / "README.md").read_text()
    assert "license: mit" in card and "model-index" in card and "| shapes | 0.75 |" in card
    scores.write_text('{"shapes": 0.75}')
    assert main(command) == 1 and (finished / "README.md").read_text() == card
    assert "expected {name: {name: value}}; 'shapes' is 0.75." in capsys.readouterr().err
    capsys.readouterr()
    assert main(["publish", str(finished), "org/a", "--dry-run", "--json"]) == 0
    assert "model.safetensors" in json.loads(capsys.readouterr().out)["files"]


def test_errors_of_the_recipe_are_those_of_merging(tmp_path):
    path = tmp_path / "publication.yaml"
    path.write_text(yaml.safe_dump({"repo_id": "org/a", "recipe": "missing.yaml"}))
    with pytest.raises(MergeError, match="there is no recipe file"):
        Publication.load(path).publish(dry_run=True)
