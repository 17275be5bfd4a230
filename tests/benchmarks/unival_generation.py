"""UnIVAL against BART-base with a ResNet-101 in transformers, both at base size with random weights.

    python tests/benchmarks/unival_generation.py [--device cpu] [--dtype float32] [--threads 1] [--repeats 5]

* forward: 4 images of 384 px, 8 prompt tokens, a target of 20 tokens, through encoder and decoder;
* generation: captions of the same images with 5 beams, 20 tokens each.

The peer is what a user would build: the features of transformers' ResNet, projected, before the embedded prompt as
`inputs_embeds` of BartForConditionalGeneration. Both have SDPA attention, 144 + 8 encoder tokens, a vocabulary of
59 457, the same dtype, threads and generation settings. They run in turns; a ratio is that of the medians of the turns.
"""

import argparse
import time

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, ResNetConfig, ResNetModel
from transformers.utils import ModelOutput

from hf_vlmerge import UnivalConfig, UnivalForConditionalGeneration

IMAGES, SIDE, PROMPT, TARGET, VOCABULARY = 4, 384, 8, 20, 59457


class Peer(nn.Module):
    """BART-base over the tokens of a ResNet-101 and of the prompt."""

    def __init__(self):
        super().__init__()
        self.tower = ResNetModel(ResNetConfig(depths=[3, 4, 23, 3], hidden_sizes=[256, 512, 1024, 2048]))
        self.connector = nn.Linear(2048, 768)
        sizes = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
        sizes |= {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in
                  (("attention_heads", 12), ("ffn_dim", 3072))}  # fmt: skip
        self.bart = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes))
        assert self.bart.config._attn_implementation == "sdpa"

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.tower(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return torch.cat([self.connector(features), self.bart.get_input_embeddings()(input_ids)], dim=1)

    def forward(self, input_ids, pixel_values, decoder_input_ids):
        return self.bart(inputs_embeds=self.embed(input_ids, pixel_values), decoder_input_ids=decoder_input_ids)

    def generate(self, input_ids, pixel_values, **options):
        return self.bart.generate(inputs_embeds=self.embed(input_ids, pixel_values), **options)


def settings() -> GenerationConfig:
    """A caption of exactly 20 tokens, so that both take the same steps."""
    return GenerationConfig(
        num_beams=5, max_new_tokens=TARGET, min_new_tokens=TARGET, no_repeat_ngram_size=3, length_penalty=0.0,
        early_stopping=True, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip


def seconds(step, device: str) -> tuple[float, float]:
    """Of the clock, and of this process's processors: the latter does not see what else the machine does."""
    start, busy = time.perf_counter(), time.process_time()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def compare(name: str, ours, peer, repeats: int, device: str, limit: float) -> None:
    ours(), peer()  # warm up
    turns = torch.tensor([(seconds(ours, device), seconds(peer, device)) for _ in range(repeats)])  # (turns, 2, 2)
    (our_time, our_busy), (peer_time, peer_busy) = turns.median(dim=0).values.tolist()
    print(
        f"{name}: ours {our_time * 1e3:.0f} ms, peer {peer_time * 1e3:.0f} ms, ratio {our_time / peer_time:.3f}; "
        f"processor time {our_busy * 1e3:.0f} ms, {peer_busy * 1e3:.0f} ms, ratio {our_busy / peer_busy:.3f} "
        f"(aim at most {limit})",
        flush=True,
    )


def again(output: ModelOutput) -> ModelOutput:
    """A copy: `generate` writes the rows of all beams into what it is given."""
    return type(output)(**output)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    model = UnivalForConditionalGeneration(UnivalConfig(towers=["image"])).eval().to(device, dtype)
    peer = Peer().eval().to(device, dtype)
    ids = torch.randint(4, 50000, (IMAGES, PROMPT), device=device)
    pixels = torch.randn(IMAGES, 3, SIDE, SIDE, device=device, dtype=dtype)
    target = torch.randint(4, 50000, (IMAGES, TARGET), device=device)
    print(f"{device}, {options.dtype}, threads {options.threads}, {options.repeats} turns each")

    encoder = model.model.encoder
    encoded = encoder(input_ids=ids, pixel_values=pixels)
    embedded = peer.embed(ids, pixels)
    states = peer.bart.model.encoder(inputs_embeds=embedded)
    assert encoded.last_hidden_state.shape == states.last_hidden_state.shape
    both = (options.repeats, device)
    compare(
        "forward",
        lambda: model(input_ids=ids, pixel_values=pixels, decoder_input_ids=target),
        lambda: peer(ids, pixels, target),
        *both,
        1.15,
    )
    compare("  of this, tower", lambda: encoder.image_tower(pixels), lambda: peer.tower(pixels), *both, 1.15)
    compare(
        "generation with the encoder",
        lambda: model.generate(input_ids=ids, pixel_values=pixels, generation_config=settings()),
        lambda: peer.generate(ids, pixels, generation_config=settings()),
        *both,
        1.2,
    )
    compare(
        f"generation alone ({TARGET} tokens)",
        lambda: model.generate(input_ids=ids, encoder_outputs=again(encoded), generation_config=settings()),
        lambda: peer.bart.generate(inputs_embeds=embedded, encoder_outputs=again(states), generation_config=settings()),
        *both,
        1.2,
    )


if __name__ == "__main__":
    main()
