"""Decoding: the original's hypotheses, scores and answers (../shared/goldens/unival), and laws that need none."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, pipeline
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hf_vlmerge.models.unival.generation_unival import (
    GENERATION_SETTINGS,
    AnswerTrie,
    rank_images,
)
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from tests.models.unival.test_parity import Reference
from tests.models.unival.tiny import mixed_batch, single_row, tiny_batch, tiny_media, tiny_model
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


# Answers from a list

ANSWERS = [[10], [10, 11], [12, 13, 14], [20, 21], [33], [12, 13]]
PROMPTS = [[0, 38, 32, 16, 37], [0, 43], [0, 11, 47], [0, 44, 8, 33, 17]]


@torch.no_grad()
def test_probabilities_of_candidates_sum_to_one():
    model, batch = model_of(), inputs_of(mixed_batch((0, 1, 2, -1)))
    scores = model.score_candidates(batch, AnswerTrie(ANSWERS))
    assert scores.shape == (4, 6)
    assert scores.exp().sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize("prompts", [None, PROMPTS])
@torch.no_grad()
def test_as_many_beams_as_answers_find_the_best_candidate(prompts):
    """Beam search and scoring of all candidates are two ways to one number."""
    model, batch, trie = model_of(), inputs_of(mixed_batch((0, 1, 2, -1))), AnswerTrie(ANSWERS)
    if prompts is not None:
        batch["decoder_input_ids"] = right_padded(prompts)
    scores = model.score_candidates(batch, trie)
    found = model.generate(
        **batch, answer_trie=trie, num_beams=6, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    start = 1 if prompts is None else 5
    for row, place in enumerate(scores.argmax(1).tolist()):
        said = [*ANSWERS[place], 2]
        assert found.sequences[row, start : start + len(said)].tolist() == said
    assert (found.sequences_scores - scores.max(1).values).abs().max() < 1e-4


@torch.no_grad()
def test_candidates_of_a_batch_equal_those_of_its_rows_and_of_single_steps():
    model, batch, trie = model_of(), inputs_of(mixed_batch((0, -1, 2, 1))), AnswerTrie(ANSWERS)
    batch["decoder_input_ids"] = right_padded(PROMPTS)
    together = model.score_candidates(batch, trie)
    assert (model.score_candidates(batch, trie, rows_per_step=1) - together).abs().max() < 1e-5
    for row, prompt in enumerate(PROMPTS):
        alone = inputs_of(single_row(batch | {"labels": batch["input_ids"]}, row))
        alone["decoder_input_ids"] = torch.tensor([prompt])
        assert (model.score_candidates(alone, trie)[0] - together[row]).abs().max() < 1e-5


@torch.no_grad()
def test_equal_candidates_are_equal_and_the_first_one_wins():
    model, batch = model_of(), inputs_of(tiny_batch(3))
    trie = AnswerTrie([[10], [20, 21], [10], [20, 21], [10]])
    scores = model.score_candidates(batch, trie)
    assert torch.equal(scores[:, 0], scores[:, 2]) and torch.equal(scores[:, 1], scores[:, 3])
    assert (scores.argmax(1) < 2).all()
    assert scores[:, :2].exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@torch.no_grad()
def test_candidates_are_scored_with_one_run_of_the_encoder():
    model, batch = model_of(), inputs_of(tiny_batch(2))
    encoded, lengths = [], []
    model.model.encoder.layers[0].register_forward_hook(lambda *_: encoded.append(1))
    model.model.decoder.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[:2]))
    model.score_candidates(batch, AnswerTrie(ANSWERS), rows_per_step=6)
    assert len(encoded) == 1
    assert lengths == [(2, 1), (6, 2), (6, 3)]  # the start, then three candidates a row and step, short ones first


@torch.no_grad()
def test_a_trie_leaves_nothing_but_answers_and_ends_with_them():
    model, batch, trie = model_of(), inputs_of(mixed_batch((0, 1, 2, -1))), AnswerTrie(ANSWERS)
    steps = []
    model.model.decoder.register_forward_hook(lambda *_: steps.append(1))
    found = model.generate(**batch, answer_trie=trie, num_beams=5, max_new_tokens=50)
    assert len(steps) <= trie.max_new_tokens
    assert {tuple(t for t in row if t > 2) for row in found.tolist()} <= set(map(tuple, ANSWERS))
    sampled = model.generate(**batch, answer_trie=trie, do_sample=True, num_return_sequences=20)
    said = {tuple(t for t in row if t > 2) for row in sampled.tolist()}
    assert said <= set(map(tuple, ANSWERS)) and len(said) > 3


def test_prefixes_of_a_trie():
    trie = AnswerTrie([[5, 6], [5], [7]])
    assert trie.allowed(()) == [5, 7]
    assert trie.allowed((5,)) == [6, 2]
    assert trie.allowed((5, 6)) == trie.allowed((9, 9)) == [2]
    assert (trie.max_new_tokens, trie.tokens) == (3, [2, 5, 6, 7])


# Prompts, ranges, ends


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_prompts_of_unequal_lengths_equal_each_alone(beams):
    """Padded on the right, as the processor gives them."""
    model, batch = model_of(), mixed_batch((0, 1, 2, -1))
    options = {"num_beams": beams, "max_new_tokens": 6}
    together = model.generate(**inputs_of(batch), decoder_input_ids=right_padded(PROMPTS), **options)
    for row, prompt in enumerate(PROMPTS):
        alone = inputs_of(single_row(batch, row)) | {"decoder_input_ids": torch.tensor([prompt])}
        said = model.generate(**alone, **options)[0, len(prompt) :]
        assert together[row, 5 - len(prompt) : 5].tolist() == prompt
        assert torch.equal(together[row, 5 : 5 + len(said)], said)
        assert (together[row, 5 + len(said) :] == 1).all()


@torch.no_grad()
def test_either_side_of_padding_and_an_absent_start_token_give_the_same():
    model, batch, trie = model_of(), inputs_of(mixed_batch((0, 1, 2, -1))), AnswerTrie(ANSWERS)
    right = right_padded(PROMPTS)
    left = torch.tensor([[*[1] * (5 - len(prompt)), *prompt] for prompt in PROMPTS])
    bare = right_padded([prompt[1:] for prompt in PROMPTS])
    bare_left = torch.tensor([[*[1] * (5 - len(prompt)), *prompt[1:]] for prompt in PROMPTS])
    options = [{"decoder_input_ids": ids} for ids in (right, left, bare, bare_left)]
    options.append({"decoder_input_ids": right, "decoder_attention_mask": (right != 1).long()})
    said = [model.generate(**batch, **each, answer_trie=trie) for each in options]
    scores = [model.score_candidates(batch | each, trie) for each in options]
    starts = torch.tensor([[*[0] * (5 - len(prompt)), *prompt] for prompt in PROMPTS])
    assert all(torch.equal(each, said[0]) for each in said) and (said[0][:, :5] == starts).all()
    assert all(torch.equal(each, scores[0]) for each in scores)


@pytest.mark.parametrize("rows", [[1], [1, 2]])
@torch.no_grad()
def test_rows_cut_from_a_padded_batch_say_the_same(rows):
    """Then no prompt is as long as its row."""
    model, batch, trie = model_of(), mixed_batch((0, 1, 2, -1)), AnswerTrie(ANSWERS)
    ids = right_padded(PROMPTS)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    for row in rows:
        alone = inputs_of(single_row(batch, row)) | {"decoder_input_ids": torch.tensor([PROMPTS[row]])}
        cut = inputs_of(single_row(batch, row)) | {"decoder_input_ids": ids[[row] * len(rows)]}
        cut = {name: value.expand(len(rows), *value.shape[1:]) for name, value in cut.items()}
        exact, found = model.generate(**alone, **options), model.generate(**cut, **options)
        for ours, theirs in zip(found.scores, exact.scores, strict=True):
            torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=0, atol=1e-5)
        said, expected = model.generate(**cut, answer_trie=trie), model.generate(**alone, answer_trie=trie)
        assert said[0, ids.shape[1] :].tolist() == expected[0, len(PROMPTS[row]) :].tolist()


def test_candidates_are_not_scored_after_the_answer():
    model, batch = model_of(), inputs_of(tiny_batch(2))
    with pytest.raises(ValueError, match="the batch has labels, so its prompts end with the answers"):
        model.score_candidates(batch | {"labels": torch.tensor([[5, 2]] * 2)}, AnswerTrie(ANSWERS))


@torch.no_grad()
def test_prompts_of_one_length_need_no_mask():
    """Their biases are then those of all rows."""
    model, batch, shapes = model_of(), inputs_of(tiny_batch(3)), []
    model.model.decoder.layers[0].register_forward_hook(lambda _, inputs, __: shapes.append(len(inputs[1])))
    model.generate(**batch, decoder_input_ids=torch.tensor([[0, 9]] * 3), max_new_tokens=3)
    assert shapes == [1, 1, 1]


@torch.no_grad()
def test_the_end_at_the_limit_keeps_its_score():
    model, batch = model_of(), inputs_of(tiny_batch(2))
    found = model.generate(
        **batch, num_beams=3, max_new_tokens=4, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    assert (found.sequences[:, 1:] == 2).sum(1).tolist() == [1, 1]
    for row, sequence in enumerate(found.sequences.tolist()):
        tokens = sequence[1 : sequence.index(2) + 1]
        assert found.sequences_scores[row].item() == pytest.approx(log_probability(model, batch, tokens, row), abs=1e-4)


@torch.no_grad()
def test_a_minimum_at_the_limit_leaves_the_target_open_and_padding_is_never_said():
    model, batch = model_of(), inputs_of(tiny_batch(2))
    with torch.no_grad():
        model.model.shared.weight[1] = 10 * model.model.shared.weight[9]  # the most likely token of all, often
    found = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)
    assert found.shape == (2, 6) and not ((found == 1) | (found == 2)).any()


@torch.no_grad()
def test_a_range_leaves_its_tokens_and_the_end():
    model, batch = model_of(), inputs_of(mixed_batch((0, -1)))
    options = {"do_sample": True, "num_return_sequences": 10, "max_new_tokens": 9, "top_k": 0}
    torch.manual_seed(0)
    found = model.generate(**batch, token_range=(68, 70), **options)[:, 1:]
    assert set(found.flatten().tolist()) <= {0, 1, 2, 3, 68, 69} and {68, 69} <= set(found.flatten().tolist())


@torch.no_grad()
def test_beams_build_biases_of_the_encoder_once(monkeypatch):
    model, batch, calls = model_of(), inputs_of(tiny_batch(2)), []
    build = model.model.encoder.position_biases
    monkeypatch.setattr(model.model.encoder, "position_biases", lambda *a: calls.append(1) or build(*a))
    model.generate(**batch, num_beams=5, max_new_tokens=6, min_new_tokens=5)
    assert len(calls) == 1


# Beams, samples and candidates share the rows of the encoder


def cache_of(model) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


@pytest.mark.parametrize("codes", [None, [True] * 6, [True, False, True, True, False, False]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_targets_that_share_a_row_of_the_encoder_equal_copies_of_it(codes, padded, implementation):
    """Three targets a row, in one pass and in steps with the cache; the masks differ within a row."""
    model, batch = model_of(attn_implementation=implementation), inputs_of(mixed_batch((0, -1)))
    ids = torch.randint(4, 68, (6, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = mask[2, :1] = mask[5, :3] = 0
    options = {"decoder_code_mask": None if codes is None else torch.tensor(codes)}
    encoded = model.get_encoder()(**batch)
    copied = type(encoded)(**{name: encoded[name].repeat_interleave(3, dim=0) for name in encoded})
    masks = {"decoder_attention_mask": mask} if padded else {}
    expected = model(encoder_outputs=copied, decoder_input_ids=ids, **masks, **options).logits
    shared = model(encoder_outputs=encoded, decoder_input_ids=ids, **masks, **options).logits
    assert (shared - expected)[mask.bool()].abs().max() < 1e-5
    cache, steps = cache_of(model), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        masks = {"decoder_attention_mask": mask[:, :end]} if padded else {}
        step = {"encoder_outputs": encoded, "decoder_input_ids": ids[:, start:end], "past_key_values": cache}
        steps.append(model(**step, **masks, **options).logits)
    assert (torch.cat(steps, dim=1) - expected)[mask.bool()].abs().max() < 1e-5
    keys = [layer.keys for part in (cache.self_attention_cache, cache.cross_attention_cache) for layer in part.layers]
    assert [len(key) for key in keys] == [6, 6, 2, 2]


@torch.no_grad()
def test_beams_leave_the_output_of_the_encoder_as_it_is():
    model, batch = model_of(), inputs_of(tiny_batch(2))
    encoded = model.get_encoder()(**batch)
    found = model.generate(encoder_outputs=encoded, num_beams=3, max_new_tokens=4)
    assert len(encoded.last_hidden_state) == len(encoded.positions) == 2
    assert torch.equal(found, model.generate(**batch, num_beams=3, max_new_tokens=4))


def test_targets_without_a_row_of_the_encoder():
    model = model_of(towers=[])
    with pytest.raises(ValueError, match="the target has 3 rows; expected a multiple of the encoder's 2"):
        model(**inputs_of(tiny_batch(2, None)), decoder_input_ids=torch.zeros(3, 2, dtype=torch.long))


# Image codes


@torch.no_grad()
def test_sampled_codes_are_whole_images():
    model, batch = model_of(), inputs_of(tiny_batch(3, None))
    batch["decoder_code_mask"] = torch.tensor([True] * 3)
    options = {"do_sample": True, "top_k": 8, "token_range": CODES, "num_return_sequences": 4}
    torch.manual_seed(0)
    found = model.generate(**batch, **options)
    assert found.shape == (12, 18) and (found[:, 0] == 0).all() and (found[:, -1] == 2).all()
    codes = found[:, 1:-1]
    assert (codes >= CODES[0]).all() and (codes < CODES[1]).all()
    assert len({tuple(row) for row in codes.tolist()}) == 12
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(**batch, **options))


@torch.no_grad()
def test_samples_of_codes_follow_the_best_k_of_the_model():
    """The first code of many samples, against the softmax over the k most likely codes."""
    model, batch = model_of(), inputs_of(tiny_batch(1, None))
    rows = torch.tensor([True])
    batch["decoder_code_mask"] = rows
    logits = model(**batch).logits[0, -1, CODES[0] : CODES[1]]
    best = logits.topk(4)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 4, "num_return_sequences": 2000, "max_new_tokens": 2}
    said = model.generate(**batch, token_range=CODES, **options)[:, 1] - CODES[0]
    counts = torch.bincount(said, minlength=16)[best.indices]
    assert counts.sum() == 2000
    assert (counts / 2000 - best.values.softmax(0)).abs().max() < 0.04  # 3.5 standard errors


@torch.no_grad()
def test_rows_of_codes_and_of_text_in_one_call():
    model, batch = model_of(), mixed_batch((0, 1, 2, -1))
    codes = torch.tensor([True, False, True, False])
    together = model.generate(**inputs_of(batch), decoder_code_mask=codes, num_beams=2, max_new_tokens=7)
    for row in range(4):
        alone = inputs_of(single_row(batch, row)) | {"decoder_code_mask": codes[row : row + 1]}
        said = model.generate(**alone, num_beams=2, max_new_tokens=7)[0]
        assert torch.equal(together[row, : len(said)], said)
        assert not codes[row] or (said[1:-1] > 3).all()


def clip_and_processor() -> tuple[CLIPModel, CLIPProcessor]:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    size = {"height": 32, "width": 32}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=12
    )
    return CLIPModel(config).eval(), processor


def test_samples_are_ranked_by_clip():
    clip, processor = clip_and_processor()
    images = list(torch.randint(0, 256, (6, 3, 40, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    texts = ["a b b", "b " * 30]
    scores = rank_images(clip, processor, texts, images)
    assert scores.shape == (2, 3)
    for row, text in enumerate(texts):
        inputs = processor(text=[text], images=images[3 * row : 3 * row + 3], return_tensors="pt", truncation=True)
        with torch.no_grad():
            cosines = clip(**inputs).logits_per_image[:, 0] / clip.logit_scale.exp()
        assert (cosines - scores[row]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="expected as many images for every text; got 5 images for 2 texts"):
        rank_images(clip, processor, texts, images[:5])


# With the processor


@pytest.fixture(scope="module")
def pair():
    """A processor, and a model of its vocabulary."""
    processor = tiny_processor()
    return processor, model_of(vocab_size=len(processor.tokenizer), max_position_embeddings=256)


@pytest.mark.parametrize("task", GENERATION_SETTINGS)
@torch.no_grad()
def test_settings_of_every_task(pair, task):
    processor, model = pair
    settings = processor.generation_settings(task)
    pixels = torch.zeros(3, 32, 32)
    media = {"video": {"videos": [pixels] * 4}, "audio": {"audio": torch.zeros(100)}}.get(task.split("_")[0])
    text = {"question_answering": "what is it", "visual_grounding": "thing", "text_to_image": "a cat"}.get(task)
    media = {} if task == "text_to_image" else media or {"images": pixels}
    inputs = processor(**media, text=text, task=task.removesuffix("_ratatouille"))
    if task == "audio_captioning":
        inputs["input_values"] = tiny_media("audio", 1)  # as long as this tower needs
    if task == "question_answering":
        settings["answer_trie"] = processor.answer_trie(["yes", "no"])
    found = model.generate(**inputs, **settings)
    assert len(found) == settings.get("num_return_sequences", 1)
    if task == "question_answering":
        assert processor.batch_decode(found, skip_special_tokens=True)[0] in (" yes", " no")
    elif task == "text_to_image":
        assert processor.post_process_image_codes(found).shape == (16, 4, 4)
    elif task == "visual_grounding":
        assert found.shape == (1, 6) and found[0, -1] == 2  # four tokens and the end
    else:
        assert found.shape[1] <= settings["max_new_tokens"] + 1


def test_settings_of_another_task(pair):
    with pytest.raises(ValueError, match="there are no settings for 'visual_entailment'; there are for image_cap"):
        pair[0].generation_settings("visual_entailment")


@torch.no_grad()
def test_questions_in_the_decoder(pair):
    """From texts to answers: the prompts of a batch have different lengths."""
    processor, model = pair
    questions, answers = ["is it red?", "what colour has the thing on the left?"], ["yes", "no", "dark red"]
    trie = processor.answer_trie(answers)
    images = [torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]
    inputs = processor(images, questions, task="question_answering", prompt_type="prev_output")
    found = model.generate(**inputs, **processor.generation_settings("question_answering"), answer_trie=trie)
    said = processor.batch_decode(found[:, inputs["decoder_input_ids"].shape[1] :], skip_special_tokens=True)
    best = model.score_candidates(inputs, trie).argmax(1).tolist()
    assert said == [f" {answers[i]}" for i in best]


@torch.no_grad()
def test_the_pipeline_takes_our_arguments(pair):
    processor, model = pair
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"answer_trie": processor.answer_trie(["yes", "no"]), "num_beams": 2}
    found = ask(
        images=Image.new("RGB", (40, 30), "red"), text=" is it red?", generate_kwargs=options, return_full_text=False
    )
    assert found[0]["generated_text"] in (" yes", " no")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 65}, "a target of up to 66 tokens is asked for, with start, prompt and end; .* most 65"),
        ({"max_new_tokens": 60, "decoder_input_ids": torch.zeros(2, 6).long()}, "a target of up to 66 tokens"),
        ({"max_new_tokens": 18, "decoder_code_mask": torch.tensor([True] * 2)}, "19 tokens .* 4 x 4 codes and an end"),
        (
            {"token_range": (70, 70), "max_new_tokens": 3},
            r"expected token_range .* with 4 <= first < last; got \(70, 70\)",
        ),
        ({"token_range": (70, 93), "max_new_tokens": 3}, "token_range ends at 93; the vocabulary has 92 tokens"),
        (
            {"answer_trie": AnswerTrie([[5, 6], [7]]), "min_new_tokens": 2},
            "min_new_tokens is 2, but there is an answer of 1",
        ),
        ({"answer_trie": AnswerTrie([[5, 92]])}, "an answer has token 92; this model has 92 tokens"),
    ],
)
def test_what_cannot_be_said(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(towers=[]).generate(**inputs_of(tiny_batch(2, None)), **options)


def test_candidates_that_the_model_cannot_say():
    with pytest.raises(ValueError, match="an answer has token 92; this model has 92 tokens"):
        model_of(towers=[]).score_candidates(inputs_of(tiny_batch(2, None)), AnswerTrie([[5], [92]]))


def test_an_image_where_there_is_no_tower_for_it():
    model, message = model_of(towers=["audio"]), r"pixel_values were given, but this model has no image tower .*audio"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs_of(tiny_batch(2)))
    with pytest.raises(ValueError, match=message):
        model.score_candidates(inputs_of(tiny_batch(2)), AnswerTrie([[5]]))


def test_lists_without_answers(pair):
    with pytest.raises(ValueError, match="expected at least one answer; the list is empty"):
        pair[0].answer_trie([])
    with pytest.raises(ValueError, match="answer 1 is empty; expected at least one token in every answer"):
        pair[0].answer_trie(["yes", ""])
    with pytest.raises(ValueError, match="expected a string for every row; row 0 has list"):
        pair[0].answer_trie([[3]])
    assert len(pair[0].answer_trie("yes").answers) == 1
