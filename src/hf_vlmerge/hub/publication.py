"""Publications: a YAML file that says what is published where, from which inputs, with which metadata.

```yaml
repo_id: org/unival-average
recipe: ../recipes/average.yaml              # merged first; or `folder:`, a model that is finished
parents: {org/unival-base: main}             # revisions to pin; of a folder, what training began from
private: true
card: {license: apache-2.0, language: [en], pipeline_tag: image-text-to-text}
```
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_vlmerge.auto import add_remote_code
from hf_vlmerge.merging import MergeReport, Recipe, merge
from hf_vlmerge.merging.errors import nearest
from hf_vlmerge.merging.planning import references
from hf_vlmerge.merging.reading import mapping, text

from .card import write_merge_card
from .checks import PublishError, check_repo_id, strings
from .publish import Published, publish

METADATA = ("license", "datasets", "language", "pipeline_tag", "tags")


@dataclass(frozen=True)
class Publication:
    """
    A model to publish: either a finished ``folder``, or the ``recipe`` of a merge: written out, or a path from where
    the publication's file is. Folders are meant from where the command runs, as they are in recipes.
    """

    repo_id: str
    folder: str | None = None
    recipe: Any = None
    parents: Mapping[str, str] = field(default_factory=dict)
    private: bool | None = None
    revision: str | None = None
    message: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str) -> "Publication":
        """Read a YAML file; an unknown key or a wrong value is an error that names it."""
        path = Path(path)
        if not path.is_file():
            raise PublishError(f"there is no publication {str(path)!r}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise PublishError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
        known = [each.name for each in fields(cls)]
        values = dict(mapping(content, path.name, known))
        check_repo_id(text(values.get("repo_id"), f"{path.name}: repo_id"))
        if bool(values.get("folder")) == bool(values.get("recipe")):
            raise PublishError(f"{path.name} needs either 'folder' (a finished model) or 'recipe' (a merge to make)")
        for name in ("folder", "revision", "message"):
            if values.get(name) is not None:
                text(values[name], f"{path.name}: {name}")
        if values.get("private") not in (None, True, False):
            raise PublishError(f"{path.name}: private can be true or false, not {values['private']!r}")
        parents = mapping(values.get("parents") or {}, f"{path.name}: parents")
        values["parents"] = {name: text(revision, f"{path.name}: {name}") for name, revision in parents.items()}
        if isinstance(values.get("recipe"), str):
            values["recipe"] = path.parent / values["recipe"]
        values["card"] = dict(mapping(values.get("card") or {}, f"{path.name}: card", METADATA))
        for key, value in values["card"].items():
            strings(value, f"{path.name}: {key} of card")
        return cls(**values)

    def pinned_recipe(self) -> Recipe:
        """The recipe with the revisions of ``parents``."""
        recipe = Recipe.load(self.recipe)
        inputs = set(references(recipe).values())
        for name in self.parents:
            if name not in inputs:
                raise PublishError(f"parents names {name!r}, which is no input of the recipe{nearest(name, inputs)}")
        return recipe.map_sources(lambda ref: f"{ref}@{self.parents[ref]}" if ref in self.parents else ref)

    def publish(self, *, dry_run: bool = False) -> Published:
        """Make the merge in a temporary folder where there is a recipe, and publish. A dry run plans it only."""
        options = {"private": self.private, "revision": self.revision, "message": self.message, "metadata": self.card}
        if self.recipe is None:
            return publish(self.folder, self.repo_id, parents=self.parents, dry_run=dry_run, **options)
        if dry_run:
            report = merge(self.pinned_recipe(), None, dry_run=True)
            return Published(self.repo_id, {}, (*report.notes, f"{len(report.tensors)} tensors would be merged"))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / self.repo_id.partition("/")[2]
            merge(self.pinned_recipe(), folder, finish=finish, hash_inputs=True, fsync=False, progress=False)
            return publish(folder, self.repo_id, **options)


def finish(folder: Path, report: MergeReport) -> None:
    write_merge_card(folder, report)
    add_remote_code(folder)
