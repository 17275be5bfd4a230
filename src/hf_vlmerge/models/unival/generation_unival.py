# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
How UnIVAL says things: what its `generate()` adds, answers from a list, image codes, and the settings of the tasks.

B = batch, V = vocabulary, S = target tokens so far, C = candidates, A = tokens of the longest, K = samples a row.
"""

import copy
import functools
from abc import abstractmethod
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.generation import LogitsProcessor
from transformers.generation import LogitsProcessorList

from .losses_unival import IGNORED

SPECIAL_IDS = 4  # <s>, <pad>, </s>, <unk>
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_code_mask", "labels")

_BEAMS = {"num_beams": 5, "min_new_tokens": 1, "early_stopping": True}
_SUM = {"length_penalty": 0.0}  # hypotheses are ranked by the sum of their log-probabilities
_MEAN = {"length_penalty": 1.0}  # by the mean
# Task -> arguments of `generate()`. A limit counts the end token. Text to image takes its lengths from the model.
GENERATION_SETTINGS: dict[str, dict[str, Any]] = {
    "image_captioning": {**_BEAMS, **_SUM, "max_new_tokens": 23, "no_repeat_ngram_size": 3},
    "image_captioning_ratatouille": {**_BEAMS, **_MEAN, "max_new_tokens": 17, "no_repeat_ngram_size": 3},
    "video_captioning": {**_BEAMS, **_MEAN, "max_new_tokens": 23, "no_repeat_ngram_size": 3},
    "audio_captioning": {**_BEAMS, **_MEAN, "max_new_tokens": 23, "no_repeat_ngram_size": 3},
    "question_answering": {**_BEAMS, **_SUM, "max_new_tokens": 201},
    "visual_grounding": {**_BEAMS, **_MEAN, "max_new_tokens": 5, "min_new_tokens": 4, "no_repeat_ngram_size": 3},
    "text_to_image": {"do_sample": True, "top_k": 256, "temperature": 1.0, "num_return_sequences": 16},
}


class AnswerTrie:
    """
    The prefixes of a list of answers, and what may follow each of them. `UnivalProcessor.answer_trie` makes one.

    Args:
        answers: token ids of each answer, without start and end token; their order is that of `score_candidates`.
        end_token_id: what follows a whole answer.

    Raises:
        ValueError: there is no answer, or one of them is empty.
    """

    def __init__(self, answers: Iterable[Sequence[int]], end_token_id: int = 2):
        self.answers = [tuple(answer) for answer in answers]
        self.end_token_id = end_token_id
        if not self.answers:
            raise ValueError("expected at least one answer; the list is empty.")
        if () in self.answers:
            raise ValueError(f"answer {self.answers.index(())} is empty; expected at least one token in every answer.")
        self._next: dict[tuple[int, ...], dict[int, None]] = {}
        for answer in self.answers:
            for place, token in enumerate((*answer, end_token_id)):
                self._next.setdefault(answer[:place], {})[token] = None

    def allowed(self, prefix: tuple[int, ...]) -> list[int]:
        """Tokens that continue a prefix; only the end follows what begins no answer."""
        return list(self._next.get(prefix, (self.end_token_id,)))

    def allowed_tokens(self, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """
        What may be said at each place of some answers: `allowed_tokens` of the model's loss, for training among them.

        Args:
            labels: answers with their end token, -100 elsewhere, as the processor gives them.
            vocab_size: of the model.

        Shapes:
            labels (B, Q) -> (B, Q, vocab_size) bool; all True where no loss is wanted

        Raises:
            ValueError: a row is none of the answers.
        """
        mask = torch.ones(*labels.shape, vocab_size, dtype=torch.bool)
        for row, tokens in enumerate(labels.tolist()):
            prefix: tuple[int, ...] = ()
            for place, token in enumerate(tokens):
                if token == IGNORED:
                    continue
                allowed = self.allowed(prefix)
                if token not in allowed:
                    raise ValueError(f"the label of row {row} is none of the answers: {[t for t in tokens if t >= 0]}.")
                mask[row, place] = False
                mask[row, place, allowed] = True
                prefix += (token,)
        return mask.to(labels.device)

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest answer and the end."""
        return max(map(len, self.answers)) + 1

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Every token that occurs, in ascending order."""
        return sorted({self.end_token_id}.union(*self.answers))


class RenormalisedMask(LogitsProcessor):
    """Leaves some tokens, whose probabilities sum to one again. Comes before rules that only take tokens away."""

    @abstractmethod
    def forbidden(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.BoolTensor:
        """True for tokens that may not follow: (B, S), (B, V) -> (B, V) or (V,)"""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.masked_fill(self.forbidden(input_ids, scores), -torch.inf).log_softmax(dim=-1)


class TrieMask(RenormalisedMask):
    """Only answers of a trie, after the first `start` tokens of the target."""

    def __init__(self, trie: AnswerTrie, start: int = 1):
        self.trie = trie
        self.start = start
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    def forbidden(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.BoolTensor:
        mask = torch.ones_like(scores, dtype=torch.bool)
        for row, prefix in enumerate(map(tuple, input_ids[:, self.start :].tolist())):
            if prefix not in self._indices:
                self._indices[prefix] = torch.tensor(self.trie.allowed(prefix), device=scores.device)
            mask[row, self._indices[prefix]] = False
        return mask


def range_mask(token_range: tuple[int, int], vocab_size: int, device: torch.device | None = None) -> torch.BoolTensor:
    """
    True for tokens from the first to before the last, and for the special ones: `allowed_tokens` of the model's loss.

    Shapes:
        -> (1, 1, vocab_size)

    Raises:
        ValueError: there are no such tokens.
    """
    first, last = token_range
    if not SPECIAL_IDS <= first < last:
        raise ValueError(f"expected token_range (first, last) with {SPECIAL_IDS} <= first < last; got {first, last}.")
    if last > vocab_size:
        raise ValueError(f"token_range ends at {last}; the vocabulary has {vocab_size} tokens.")
    ids = torch.arange(vocab_size, device=device)
    return ((ids < SPECIAL_IDS) | ((ids >= first) & (ids < last)))[None, None]


class RangeMask(RenormalisedMask):
    """Only tokens from `first` to `last` - 1, and the special ones."""

    def __init__(self, first: int, last: int):
        self.token_range = (first, last)

    def forbidden(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.BoolTensor:
        return ~range_mask(self.token_range, scores.shape[-1], scores.device)[0]


class EndOfTarget(LogitsProcessor):
    """
    The last token is an end token and counts with its own log-probability; padding is never said. Where another rule
    forbids the end, as a minimum length that equals the limit, the target stays open.

    Args:
        limit: length of the longest target with start and end token.
        code_rows: rows that say image codes, (B,); before the limit they take no special token.
    """

    def __init__(self, limit: int, end_token_ids: list[int], pad_token_id: int, code_rows: torch.Tensor | None = None):
        self.limit = limit
        self.end_token_ids = end_token_ids
        self.pad_token_id = pad_token_id
        self.code_rows = code_rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.index_fill(1, torch.tensor([self.pad_token_id], device=scores.device), -torch.inf)
        if input_ids.shape[1] < self.limit - 1:
            if self.code_rows is not None:
                rows = self.code_rows.repeat_interleave(len(scores) // len(self.code_rows))
                scores[:, :SPECIAL_IDS].masked_fill_(rows[:, None], -torch.inf)
            return scores
        ends = scores[:, self.end_token_ids]
        closed = torch.full_like(scores, -torch.inf)
        closed[:, self.end_token_ids] = ends
        return torch.where(ends.isfinite().any(dim=1, keepdim=True), closed, scores)


class UnivalGenerationMixin(GenerationMixin):
    """`generate()` and `score_candidates()` of a model that has an encoder and image codes."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        answer_trie: AnswerTrie | None = None,
        token_range: tuple[int, int] | None = None,
        **kwargs,
    ):
        """
        As `GenerationMixin.generate`. The last token that fits is an end token, scored by its own log-probability.

        Args:
            answer_trie: only these answers are said, with probabilities among them. The limit is that of the longest
                one unless another is given.
            token_range: only tokens from the first to before the last are said, with probabilities among them.
            decoder_input_ids: what every target starts with, such as the question of `prompt_type="prev_output"`: it
                counts as said. A start token is put before them where none has it. Prompts of unequal lengths may be
                padded on either side. The sequences that are returned are padded on the left then: what was said begins
                at the width of `decoder_input_ids`.
            decoder_code_mask: True for the rows that say image codes, which are never special tokens. Where all rows
                do, the length is that of a whole image unless another is given.

        Raises:
            ValueError: a target of this length has more tokens than the model has positions, an answer is shorter than
                the least length, or the model has not its tokens.
        """
        kwargs |= self._prompts(kwargs)
        start = kwargs["decoder_input_ids"].shape[1] if "decoder_input_ids" in kwargs else 1
        masks = [] if answer_trie is None else [TrieMask(answer_trie, start)]
        masks += [] if token_range is None else [RangeMask(*token_range)]
        if generation_config is None and not {"max_length", "max_new_tokens"} & kwargs.keys():
            kwargs |= self._default_lengths(answer_trie, kwargs.get("decoder_code_mask"))
        processors = LogitsProcessorList([*masks, *(logits_processor or ())])
        return super().generate(inputs, generation_config, processors, **kwargs)

    def _default_lengths(self, trie: AnswerTrie | None, code_rows: torch.Tensor | None) -> dict[str, int]:
        if trie is not None:
            return {"max_new_tokens": trie.max_new_tokens}
        if code_rows is None or not code_rows.all():
            return {}
        codes = self.config.code_grid_size**2
        return {"min_new_tokens": codes, "max_new_tokens": codes + 1}

    def _prompts(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """
        What targets start with, padded on the left, and the mask that says so where lengths differ: a cache then ends
        with the last token of every prompt, and positions count tokens from the first one that is no padding. The
        padding is of start tokens, since `generate` begins rows without one anew.
        """
        ids, mask = inputs.get("decoder_input_ids"), inputs.get("decoder_attention_mask")
        if ids is None:
            return {}
        if mask is None:
            mask = ids != self.config.pad_token_id
        first, start = ids.gather(1, mask.long().argmax(dim=1, keepdim=True)), self.config.decoder_start_token_id
        if (first != start).all():
            ids = torch.nn.functional.pad(ids, (1, 0), value=start)
            mask = torch.nn.functional.pad(mask.long(), (1, 0), value=1)
        ids = torch.where(mask.bool(), ids, start)
        order = mask.long().sort(dim=1, stable=True).indices
        ids, mask = ids.gather(1, order), mask.long().gather(1, order)
        return {"decoder_input_ids": ids} if mask.all() else {"decoder_input_ids": ids, "decoder_attention_mask": mask}

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs) -> LogitsProcessorList:
        code_rows = (kwargs.get("model_kwargs") or {}).get("decoder_code_mask")
        self._check_length(generation_config.max_length, code_rows)
        ends = generation_config.eos_token_id
        rules = [*(logits_processor or ())]
        for rule in rules:
            if isinstance(rule, TrieMask):
                self._check_answers(rule.trie, generation_config.min_new_tokens or 0)
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            rules.append(EndOfTarget(generation_config.max_length, ends, self.config.pad_token_id, code_rows))
        rules = super()._get_logits_processor(
            generation_config, *args, logits_processor=LogitsProcessorList(rules), **kwargs
        )
        # masks renormalise what the model says, not what minimum lengths and repeated n-grams have left of it
        rules.sort(key=lambda rule: not isinstance(rule, RenormalisedMask))
        return rules

    def _check_answers(self, trie: AnswerTrie, least: int = 0) -> None:
        """At a place where a rule forbids the end and the trie all else, any token might be said."""
        shortest = min(map(len, trie.answers))
        if least > shortest:
            raise ValueError(f"min_new_tokens is {least}, but there is an answer of {shortest}; expected at most that.")
        if trie.tokens[-1] >= self.config.vocab_size:
            raise ValueError(f"an answer has token {trie.tokens[-1]}; this model has {self.config.vocab_size} tokens.")

    def _check_length(self, length: int, code_rows: torch.Tensor | None) -> None:
        """The last token of a target needs no position: it is not read again."""
        if code_rows is not None and code_rows.any() and length - 1 > self.config.code_grid_size**2 + 1:
            side = self.config.code_grid_size
            raise ValueError(
                f"a target of up to {length} tokens is asked for; an image has a start token, {side} x {side} codes "
                "and an end token."
            )
        if (code_rows is None or not code_rows.all()) and length - 1 > self.config.max_position_embeddings:
            raise ValueError(
                f"a target of up to {length} tokens is asked for, with start, prompt and end; this model takes at most "
                f"{self.config.max_position_embeddings + 1}."
            )

    @torch.no_grad()
    def score_candidates(
        self, inputs: Mapping[str, Any], candidates: AnswerTrie, *, rows_per_step: int = 64
    ) -> torch.Tensor:
        """
        The log-probability of every candidate among the candidates: the sum over its tokens and the end, each relative
        to what the trie allows there. `argmax(dim=1)` is the answer (the first one among equals).

        Encoder and decoder prompts run once; candidates run in steps of up to `rows_per_step` rows, which share them.

        Args:
            inputs: of the model; `decoder_input_ids` are what every answer follows, as in `generate`.
            candidates: what `UnivalProcessor.answer_trie` makes.

        Shapes:
            -> (B, C), float32

        Raises:
            ValueError: the inputs have labels, or a candidate has tokens that the model lacks.
        """
        if inputs.get("labels") is not None:
            raise ValueError("the batch has labels, so its prompts end with the answers; expected one without targets.")
        self._check_answers(candidates)
        encoder_inputs = {name: value for name, value in inputs.items() if name not in DECODER_INPUTS}
        encoded = self.get_encoder()(**encoder_inputs, return_dict=True)
        rows = len(encoded.last_hidden_state)
        prompts = self._prompts(inputs)
        if not prompts:
            start = torch.full((rows, 1), self.config.decoder_start_token_id, device=encoded.last_hidden_state.device)
            prompts = {"decoder_input_ids": start}
        cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        prompted = self.model(**prompts, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
        last = prompted.last_hidden_state[:, -1:]

        # each once, so that equal candidates get equal scores to the last bit; in order of length, for little padding
        unique = sorted(dict.fromkeys(candidates.answers), key=len)
        count = max(1, rows_per_step // rows)
        scores = torch.cat(
            [
                self._score_chunk(candidates, unique[i : i + count], last, prompts, encoded, cache)
                for i in range(0, len(unique), count)
            ],
            dim=1,
        )
        place = {answer: i for i, answer in enumerate(unique)}
        return scores[:, [place[answer] for answer in candidates.answers]]

    def _score_chunk(self, trie: AnswerTrie, answers: list, last, prompts, encoded, cache) -> torch.Tensor:
        """
        Scores of some candidates, which continue a copy of the cache.

        Shapes:
            last (B, 1, D), states at the ends of the prompts -> (B, C)
        """
        rows, count, device = len(last), len(answers), last.device
        length = max(map(len, answers))
        padded = [[*answer, *[self.config.pad_token_id] * (length - len(answer))] for answer in answers]
        ids = torch.tensor(padded, device=device).repeat(rows, 1)  # (B · C, A)
        mask = prompts.get("decoder_attention_mask")
        if mask is not None:
            mask = torch.cat([mask.repeat_interleave(count, dim=0), torch.ones_like(ids)], dim=1)
        said_so_far = copy.deepcopy(cache.self_attention_cache)
        said_so_far.batch_repeat_interleave(count)
        states = self.model(
            encoder_outputs=encoded,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            past_key_values=EncoderDecoderCache(said_so_far, cache.cross_attention_cache),
            use_cache=True,
        ).last_hidden_state
        states = torch.cat([last.repeat_interleave(count, dim=0), states], dim=1)

        tokens = trie.tokens
        logits = (states @ self.lm_head.weight[tokens].T).float().view(rows, count, length + 1, len(tokens))
        allowed, chosen, said = (each.to(device) for each in _paths(trie, answers, length + 1))
        scores = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
        scores = scores.gather(3, chosen.expand(rows, -1, -1)[..., None])[..., 0]
        return scores.masked_fill(~said, 0.0).sum(dim=-1)


def _paths(trie: AnswerTrie, answers: list, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    For each place of each answer, as places in `trie.tokens`: what is allowed, what is said, and whether anything is.

    Shapes:
        -> allowed (C, length, tokens), chosen (C, length), said (C, length); nothing is forbidden after the end
    """
    place = {token: i for i, token in enumerate(trie.tokens)}
    allowed = torch.ones(len(answers), length, len(place), dtype=torch.bool)
    chosen = torch.zeros(len(answers), length, dtype=torch.long)
    said = torch.zeros(len(answers), length, dtype=torch.bool)
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for row, answer in enumerate(answers):
        for i, token in enumerate((*answer, trie.end_token_id)):
            prefix = answer[:i]
            if prefix not in known:
                known[prefix] = torch.zeros(len(place), dtype=torch.bool)
                known[prefix][[place[each] for each in trie.allowed(prefix)]] = True
            allowed[row, i], chosen[row, i], said[row, i] = known[prefix], place[token], True
    return allowed, chosen, said


@torch.no_grad()
def rank_images(clip: Any, processor: Any, texts: Sequence[str], images: Sequence[Any]) -> torch.Tensor:
    """
    How well sampled images fit their texts by a CLIP model; `argmax(dim=1)` is the best sample of each text.

    Args:
        clip, processor: any model of the library that gives `image_embeds` and `text_embeds`, and its processor.
        texts: what each row's images should show, cut to what the model takes.
        images: K samples for each text, those of a text together, as `generate(num_return_sequences=K)` orders them.

    Shapes:
        B texts, B · K images -> (B, K) cosines
    """
    if not texts or not images or len(images) % len(texts):
        raise ValueError(f"expected as many images for every text; got {len(images)} images for {len(texts)} texts.")
    inputs = processor(
        text=list(texts), images=list(images), return_tensors="pt", padding="max_length", truncation=True
    )
    output = clip(**inputs.to(clip.device))
    image, text = (
        torch.nn.functional.normalize(each.float(), dim=-1) for each in (output.image_embeds, output.text_embeds)
    )
    return (image.view(len(texts), -1, image.shape[-1]) * text[:, None]).sum(dim=-1)


__all__ = ["GENERATION_SETTINGS", "AnswerTrie", "UnivalGenerationMixin", "range_mask", "rank_images"]
