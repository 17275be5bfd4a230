"""Groups: by name, by expert, rules, and everything that must be said before anything is computed."""

import pytest
import torch

from hf_vlmerge.merging import MergeError, Recipe, merge_tensors, open_source
from hf_vlmerge.merging.groups import Ref, merged_name
from hf_vlmerge.merging.planning import open_sources, plan
from hf_vlmerge.merging.recipe import ExpertLayout

LAYOUT = ExpertLayout({"vision": "vision", "language": "language", "vision_language": "vision_language"})


def groups(recipe, sources):
    recipe = Recipe.load(recipe)
    with open_sources(recipe, sources) as opened:
        return {g.output: g for g in plan(recipe, opened)}


def ones(*names, shape=(2, 2)):
    return {name: torch.ones(shape) for name in names}


def experts(*names, **more):
    return {"merge_method": "interpolation", "experts_of": "msa", "experts": LAYOUT.to_dict(), **more}


def test_an_expert_is_a_path_component():
    assert merged_name("layers.3.attention.vision.qkv.weight", LAYOUT) == (
        "vision",
        "layers.3.attention.shared.qkv.weight",
    )
    assert merged_name("vision_tower.weight", LAYOUT) == (None, "vision_tower.weight")
    dropped = ExpertLayout({"v": "v", "l": "l"}, "")
    assert merged_name("blocks.0.attn.v.qkv.weight", dropped) == ("v", "blocks.0.attn.qkv.weight")
    with pytest.raises(MergeError, match="more than one path component names an expert"):
        merged_name("a.vision.b.language", LAYOUT)


def test_members_come_in_the_order_of_the_layout():
    keys = [f"0.ffn.{e}.w" for e in ("vision_language", "language", "vision")] + ["1.ffn.language.w", "1.ffn.vision.w"]
    found = groups(experts(), {"msa": ones(*keys, "norm")})
    assert found["0.ffn.shared.w"].members == ("vision", "language", "vision_language")
    assert found["1.ffn.shared.w"].inputs == (Ref("experts", "1.ffn.vision.w"), Ref("experts", "1.ffn.language.w"))
    assert found["norm"].method == "copy" and found["norm"].note == "no experts"


def test_the_first_rule_that_speaks_wins_for_each_setting():
    rules = [
        {"match": "*.bias", "parameters": {"ratio": 0.1}},
        {
            "has": "vision_language",
            "members": ["vision", "language"],
            "parameters": {"ratio": 0.2, "fusion_share": 0.9},
        },
        {"match": "1.*", "members": ["vision_language"], "method": "linear"},
    ]
    keys = [f"{i}.{e}.{p}" for i, es in ((0, 2), (1, 3)) for e in list(LAYOUT.experts)[:es] for p in ("weight", "bias")]
    found = groups(experts(parameters={"ratio": 0.5}, rules=rules), {"msa": ones(*keys)})
    plain, bias, fusion = (found[k] for k in ("0.shared.weight", "0.shared.bias", "1.shared.bias"))
    assert plain.parameters == {"ratio": 0.5, "fusion_share": 1 / 3} and plain.rules == ()
    assert bias.parameters["ratio"] == 0.1 and bias.rules == (1,)
    assert fusion.members == ("vision", "language") and fusion.method == "linear" and fusion.rules == (1, 2, 3)
    assert found["1.shared.weight"].parameters == {"normalize": True}


def test_keeping():
    sources = {"a": ones("x", "y", "z"), "b": ones("x", "y", "z"), "seed": ones("x", "y", "z")}
    rules = [{"match": "x", "keep": "base"}, {"match": "y", "keep": "b"}, {"match": "z", "keep": "first"}]
    found = groups({"merge_method": "linear", "models": ["a", "b"], "base_model": "seed", "rules": rules}, sources)
    assert [found[k].inputs[0].source for k in "xyz"] == ["base", "b", "a"]


def test_a_tensor_that_one_model_lacks_can_be_kept_from_another():
    sources = {"a": ones("w", "head"), "b": ones("w")}
    rules = [{"match": "head", "keep": "a"}]
    assert groups({**LINEAR, "rules": rules}, sources)["head"].inputs == (Ref("a", "head"),)
    rules = [{"match": "head", "members": ["a"]}]
    assert groups({**LINEAR, "rules": rules}, sources)["head"].members == ("a",)


def test_a_tensor_without_experts_can_be_kept_from_the_base():
    sources = {"msa": ones("0.vision.w", "0.language.w", "head"), "seed": {"head": torch.zeros(2, 2)}}
    merged = merge_tensors(experts(base_model="seed", rules=[{"match": "head", "keep": "base"}]), sources)
    assert merged["head"].sum() == 0


def test_a_gradient_runs_over_the_layers():
    keys = [f"layers.{i}.{e}.w" for i in range(3) for e in ("vision", "language")]
    found = groups(experts(parameters={"ratio": [1.0, 0.0]}), {"msa": ones(*keys)})
    assert [found[f"layers.{i}.shared.w"].parameters["ratio"] for i in range(3)] == [1.0, 0.5, 0.0]


def test_weights_by_alias_of_experts_that_are_not_in_every_layer():
    keys = [f"{i}.{e}.w" for i, es in ((0, 2), (1, 3)) for e in list(LAYOUT.experts)[:es]]
    by_alias = {"vision": 1, "language": 2, "vision_language": 3}
    for weights in (by_alias, [1, 2, 3]):
        recipe = experts(parameters={"weights": weights}) | {"merge_method": "linear"}
        found = groups(recipe, {"msa": ones(*keys)})
        assert found["0.shared.w"].weights == (1.0, 2.0) and found["1.shared.w"].weights == (1.0, 2.0, 3.0)


def test_an_expert_layout_comes_from_config_json_or_the_recipe():
    source = open_source(ones("0.vision.w", "0.language.w"))
    recipe = {"merge_method": "linear", "experts_of": "msa"}
    with pytest.raises(MergeError, match=r"memory has no expert_layout in its config[.]json"):
        merge_tensors(recipe, {"msa": source})
    source.config = {"expert_layout": {"experts": ["vision", "language"], "merged": "one"}}
    assert merge_tensors(recipe, {"msa": source}).keys() == {"0.one.w"}


LINEAR = {"merge_method": "linear", "models": ["a", "b"]}
ARITHMETIC = {"merge_method": "task_arithmetic", "models": ["a", "b"], "base_model": "seed"}
TWO = {"a": ones("w", "x"), "b": ones("w", "x")}


@pytest.mark.parametrize(
    ("recipe", "sources", "message"),
    [
        (
            LINEAR,
            {"a": ones("layer.weight"), "b": ones("layer.weigth")},
            "'b' lacks the tensor layer.weight, which others have (closest: layer.weigth)",
        ),
        (LINEAR, {"a": ones("w"), "b": ones("w", shape=(2, 3))}, "w: shapes differ, (2, 2) in 'a' and (2, 3) in 'b'"),
        (
            LINEAR,
            {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(())}},
            "w: shapes differ, (1,) in 'a' and () in 'b'",
        ),
        (ARITHMETIC, {**TWO, "seed": ones("w")}, "x: task_arithmetic needs it in the base"),
        (ARITHMETIC, {**TWO, "seed": ones("w", "x", shape=(1,))}, "w: shapes differ, (2, 2) in 'a' and (1,) in 'base'"),
        ({**LINEAR, "rules": [{"match": "x", "keep": "base"}]}, TWO, "x: a rule keeps the base, but the recipe has no"),
        (
            {**LINEAR, "rules": [{"match": "x", "keep": "b"}]},
            {"a": ones("x"), "b": ones("w")},
            "x: a rule keeps 'b', which",
        ),
        ({"models": ["a", "b"], "rules": [{"match": "w", "method": "linear"}]}, TWO, "x: no rule gives a method"),
        (
            {**LINEAR, "models": ["a", "b", "c"], "merge_method": "slerp"},
            {**TWO, "c": ones("w", "x")},
            "w: slerp takes exactly 2",
        ),
        ({**LINEAR, "parameters": {"weights": {"a": 1, "c": 2}}}, TWO, "weights: no member is called 'c'"),
        (LINEAR, {n: {"w": torch.ones(2, dtype=torch.complex64)} for n in "ab"}, "w: complex64 cannot be averaged"),
        (
            experts(),
            {"msa": ones("w")},
            "memory has no experts: no key has a component vision, language, vision_language",
        ),
        (
            experts(),
            {"msa": ones("0.ffn.vision.w", "0.ffn.language.w", "0.ffn.vision.b")},
            "the expert 'language' lacks the counterpart of 0.ffn.vision.b",
        ),
        (
            experts(),
            {"msa": ones("0.vision.w", "1.vision.w", "1.language.w")},
            "0.shared.w: only the expert 'vision' has it",
        ),
        (experts(), {"msa": ones("0.vision.w", "0.shared.w")}, "another tensor merges into the same name 0.shared.w"),
        (
            experts(rules=[{"members": ["vision_language"]}]),
            {"msa": ones("0.vision.w", "0.language.w")},
            "0.shared.w: a rule chooses vision_language, of which the group has none",
        ),
        (experts(rules=[{"has": "visual"}]), {"msa": ones("0.vision.w")}, "rule 1 says what it matches but not"),
        (
            experts(rules=[{"has": "visoin", "keep": "first"}]),
            {"msa": ones("0.vision.w")},
            "a rule names the member 'visoin'; did you mean 'vision'?",
        ),
        (
            experts(rules=[{"keep": "text"}]),
            {"msa": ones("0.vision.w")},
            "keep: 'text' is no member; valid are: base, first, language, vision, vision_language",
        ),
    ],
)
def test_what_cannot_be_grouped(recipe, sources, message):
    with pytest.raises(MergeError) as error:
        groups(recipe, sources)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_statistics_are_found_before_anything_is_computed():
    sources = {"a": ones("fc.w", "embed.w"), "b": ones("fc.w", "embed.w"), "grams": {"gram.fc.w": torch.eye(2)}}
    recipe = {**LINEAR, "merge_method": "regmean", "statistics": "grams"}
    with pytest.raises(
        MergeError, match=r"embed.w: no gram of member 'a' in the statistics; collect it, or give the tensor"
    ):
        groups(recipe, sources)
    found = groups({**recipe, "rules": [{"match": "embed*", "method": "linear"}]}, sources)
    assert found["fc.w"].statistics == (Ref("statistics", "gram.fc.w"),) * 2 and found["embed.w"].statistics == (
        None,
        None,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_unless_allowed(value):
    sources = {"a": ones("w"), "b": {"w": torch.tensor([[1.0, 1.0], [value, 1.0]])}}
    with pytest.raises(MergeError, match=r"w of memory \(b\) contains (NaN|Inf); allow it or mend it"):
        merge_tensors(LINEAR, sources)
    merged = merge_tensors(LINEAR, sources, allow_nonfinite=True)["w"]
    assert merged[0, 0] == 1 and not merged[1, 0].isfinite()
    with pytest.raises(MergeError, match="contains"):  # of copied tensors as well
        merge_tensors({**LINEAR, "rules": [{"keep": "b"}]}, sources)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float8_e4m3fn, 1.5)])
def test_values_that_float32_does_not_hold_are_copied_as_they_are(dtype, value):
    w = torch.tensor([value], dtype=dtype)
    merged = merge_tensors({"merge_method": "linear", "models": ["a", "b"]}, {"a": {"w": w}, "b": {"w": w.clone()}})
    assert merged["w"].dtype == dtype and merged["w"].view(torch.uint8).equal(w.view(torch.uint8))


def test_a_chunk_size_must_be_positive():
    with pytest.raises(MergeError, match="chunk_size must be positive, not 0"):
        merge_tensors(LINEAR, TWO, chunk_size=0)
