"""Key table of the Gumbel VQ-GAN: paths of the original beside ours. A path stands for everything below it."""

OURS = {
    "encoder": "encoder",
    "quant_conv": "to_code",
    "quantize.proj": "code_scores",
    "quantize.embed": "code_book",
    "post_quant_conv": "from_code",
    "decoder": "decoder",
}
DROPPED = {"loss": "discriminator and perceptual network, for its training only"}


def our_key(original: str) -> str | None:
    """Our name of an original tensor; None where it is dropped. Unknown: KeyError."""
    for theirs, ours in OURS.items():
        if original.startswith(f"{theirs}."):
            return ours + original.removeprefix(theirs)
    if original.partition(".")[0] in DROPPED:
        return None
    raise KeyError(original)
