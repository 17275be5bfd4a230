"""Decoding: the original's hypotheses, scores and answers (../shared/goldens/unival), and what must hold without them."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from hf_vlmerge.models.unival.generation_unival import (
    GENERATION_SETTINGS,
    AnswerTrie,
    rank_images,
)
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from tests.models.unival.test_parity import Reference
from tests.models.unival.tiny import mixed_batch, single_row, tiny_batch, tiny_model
from tests.models.unival.tiny_processor import tiny_processor

CODES = (52, 68)  # of the tiny vocabulary, with 16 codes an image
ENTRIES = {  # recorded hypotheses -> the case whose inputs they have
    "greedy_text": "text",
    "greedy_image": "image_text",
    "beam5_text": "text",
    "beam5_image_norepeat3": "image_text",
    "beam3_video": "video_text",
    "beam3_audio": "audio_text",
    "beam5_box": "image_text",
    "greedy_code": "text",
    "trie_beam5": "image_text",
    "trie_beam5_prefix": "image_text",
}


@pytest.fixture(scope="module")
def reference(shared):
    return Reference(shared)


def model_of(**changes) -> UnivalForConditionalGeneration:
    return tiny_model(UnivalForConditionalGeneration, **changes)


def inputs_of(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def right_padded(rows: list[list[int]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[1] * (length - len(row))] for row in rows])


# Equal to the original


def arguments(generation: dict, name: str) -> dict:
    """The recorded settings as arguments of `generate`."""
    settings = generation[name]["settings"]
    beams = settings["beam_size"]
    found = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "max_new_tokens": settings["max_len_b"] + 1,
        "min_new_tokens": settings["min_len"],
        "no_repeat_ngram_size": settings.get("no_repeat_ngram_size", 0),
    }
    if beams > 1:
        found |= {"early_stopping": True, "length_penalty": float(settings.get("normalize_scores", True))}
    if "constraint_range" in settings:
        found["token_range"] = tuple(map(int, settings["constraint_range"].split(",")))
    if name.startswith("trie"):
        found["answer_trie"] = AnswerTrie(generation["trie_answers"])
    if settings.get("gen_code"):
        found["decoder_code_mask"] = torch.tensor([True, True])
    prompts = generation[name]["prefix_tokens"]
    if prompts is not None:
        found["decoder_input_ids"] = right_padded([[0, *(t for t in row if t != 1)] for row in prompts])
    return found


def log_probability(model, inputs: dict, tokens: list[int], row: int) -> float:
    """Of tokens that were forced upon a row."""
    ids = torch.tensor([[0, *tokens[:-1]]]).expand(2, -1)
    scores = model(**inputs, decoder_input_ids=ids).logits[row].log_softmax(-1)
    return scores.gather(1, torch.tensor(tokens)[:, None]).sum().item()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_recorded_hypotheses(reference, name, use_cache):
    entry, model, inputs = reference.generation[name], reference.model(), reference.inputs(ENTRIES[name])
    options = arguments(reference.generation, name)
    found = model.generate(
        **inputs, **options, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    beams, start = options["num_beams"], options.get("decoder_input_ids", torch.zeros(1, 1)).shape[1]
    for row, hypotheses in enumerate(entry["hypotheses"]):
        forced = [t for t in (entry["prefix_tokens"] or [[], []])[row] if t != 1]
        best, tokens = hypotheses[0], found.sequences[row * beams, start:].tolist()
        tokens = tokens[: tokens.index(2) + 1]
        assert forced + tokens == best["tokens"]
        if beams > 1:
            score = found.sequences_scores[row * beams].item()
        else:  # what the model says; with a range, what its mask leaves of that
            steps = found.scores if "token_range" in options else [each.log_softmax(-1) for each in found.logits]
            score = sum(steps[i][row, token].item() for i, token in enumerate(tokens)) / len(tokens)
        if forced:
            score += log_probability(model, inputs, forced, row)
        assert score == pytest.approx(best["score"], abs=1e-4)


@pytest.mark.parametrize("rows_per_step", [1, 4, 64])
@torch.no_grad()
def test_recorded_scores_of_all_candidates(reference, rows_per_step):
    trie = AnswerTrie(reference.generation["trie_answers"])
    recorded = reference.generation["allcand_prompt_none"]
    scores = reference.model().score_candidates(reference.inputs("image_text"), trie, rows_per_step=rows_per_step)
    assert (scores - torch.tensor(recorded["scores"])).abs().max() < 1e-4
    assert scores.argmax(1).tolist() == recorded["argmax"]
