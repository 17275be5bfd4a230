"""A processor that needs no files: every byte is a piece of its vocabulary."""

from tokenizers.pre_tokenizers import ByteLevel

from hf_vlmerge.models.unival.feature_extraction_unival import UnivalFeatureExtractor
from hf_vlmerge.models.unival.image_processing_unival import UnivalImageProcessor
from hf_vlmerge.models.unival.processing_unival import UnivalProcessor
from hf_vlmerge.models.unival.tokenization_unival import SPECIAL_TOKENS, build_tokenizer


def tiny_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The four special tokens, 256 bytes, three merged pieces and the mask: 264 tokens."""
    merges = [("h", "e"), ("t", "he"), ("Ġ", "the")]
    pieces = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<mask>"]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def tiny_processor(num_codes: int = 16, num_bins: int = 1000, max_length: int = 96, **options) -> UnivalProcessor:
    """Images of 32 pixels (64 with boxes), 4 frames of 16 pixels, 100 samples at 1 kHz."""
    vocab, merges = tiny_vocabulary()
    tokenizer = build_tokenizer(vocab, merges, num_codes=num_codes, num_bins=num_bins, max_length=max_length)
    settings = {"num_frames": 4, "frame_size": 16, "grounding_size": 64} | options
    return UnivalProcessor(
        UnivalImageProcessor(size={"height": 32, "width": 32}),
        UnivalFeatureExtractor(sampling_rate=1000, num_samples=100),
        tokenizer,
        **settings,
    )
