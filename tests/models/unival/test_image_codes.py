"""Image codes: the VQ-GAN against an independent one, its training, its conversion, and images out of `generate`."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.janus import modeling_janus
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from hf_vlmerge.cli import main
from hf_vlmerge.conversion.image_codes import convert_image_codes
from hf_vlmerge.conversion.image_codes_keys import OURS
from hf_vlmerge.data.shapes import ShapesDataset
from hf_vlmerge.data.shapes.render import RGB, centre_and_radius
from hf_vlmerge.models.unival.configuration_image_codes_unival import UnivalImageCodesConfig
from hf_vlmerge.models.unival.image_codes_unival import UnivalImageCodes
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from tests.models.unival.tiny import tiny_batch, tiny_model
from tests.test_auto import run

SMALL = {"num_codes": 16, "code_width": 12, "latent_channels": 10, "base_channels": 32, "blocks_per_level": 1}


def small(seed: int = 0, **changes) -> UnivalImageCodes:
    """A model with four levels whose norms and biases are away from their initial values."""
    torch.manual_seed(seed)
    model = UnivalImageCodes(UnivalImageCodesConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def original_state(model: UnivalImageCodes) -> dict[str, torch.Tensor]:
    """The tensors under the names of the original."""
    theirs = {ours: name for name, ours in OURS.items()}
    state = {}
    for key, tensor in model.state_dict().items():
        part = key.partition(".")[0]
        state[theirs[part] + key.removeprefix(part)] = tensor
    return state


def test_encoder_and_decoder_equal_an_independent_implementation():
    """Janus has the same two networks around another code book (its levels of the decoder count from the other end)."""
    model = small(blocks_per_level=2)
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1, 2, 4], num_res_blocks=2, latent_channels=10, double_latent=False
    )
    encoder, decoder = modeling_janus.JanusVQVAEEncoder(config), modeling_janus.JanusVQVAEDecoder(config)
    encoder.load_state_dict(model.encoder.state_dict())
    turned = {}
    for key, tensor in model.decoder.state_dict().items():
        if key.startswith("up."):
            _, level, rest = key.split(".", 2)
            key = f"up.{3 - int(level)}.{rest}"
        turned[key] = tensor
    decoder.load_state_dict(turned)
    pixels, latents = torch.randn(2, 3, 32, 48), torch.randn(2, 10, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(pixels), encoder(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decoder(latents), decoder(latents), atol=1e-5, rtol=1e-5)


def test_the_defaults_are_the_released_model():
    with torch.device("meta"):
        model = UnivalImageCodes(UnivalImageCodesConfig())
    state = {key: tuple(tensor.shape) for key, tensor in original_state(model).items()}
    assert state["quantize.proj.weight"] == (8192, 256, 1, 1) and state["quantize.embed.weight"] == (8192, 256)
    assert state["encoder.down.3.attn.1.q.weight"] == (512, 512, 1, 1)
    assert state["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert state["encoder.down.2.downsample.conv.weight"] == (256, 256, 3, 3)
    assert state["decoder.up.3.block.2.conv1.weight"] == (512, 512, 3, 3) and "decoder.up.3.attn.2.norm.bias" in state
    assert state["decoder.up.1.upsample.conv.weight"] == (128, 128, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in state and "encoder.down.3.downsample.conv.weight" not in state
    config = JanusVQVAEConfig(
        base_channels=128, channel_multiplier=[1, 1, 2, 4], num_res_blocks=2, latent_channels=256, double_latent=False
    )
    with torch.device("meta"):
        both = modeling_janus.JanusVQVAEEncoder(config), modeling_janus.JanusVQVAEDecoder(config)
    networks = sum(p.numel() for network in both for p in network.parameters())
    around = 2 * (256 * 256 + 256) + (8192 * 256 + 8192) + 8192 * 256  # two 1x1 convolutions, scores, code book
    assert model.config.factor == 8 and sum(p.numel() for p in model.parameters()) == networks + around == 68_995_971


@torch.no_grad()
def test_codes_and_images_have_the_shapes_of_their_grid():
    model = small()
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    codes = model.encode(pixels)
    assert codes.shape == (2, 24) and codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 16
    assert torch.equal(codes[1:], model.encode(pixels[1:])) and torch.equal(codes, model.encode(pixels))
    images = model.decode(codes.view(2, 4, 6))
    assert images.shape == pixels.shape and images.abs().max() <= 1
    assert torch.equal(model.decode(codes[:, :16]), model.decode(codes[:, :16].view(2, 4, 4)))
    out = model(pixels)
    assert torch.equal(out.reconstruction.clamp(-1, 1), images) and torch.equal(out.codes, codes)
    assert out.loss.item() == pytest.approx((out.reconstruction - pixels).square().mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 30, 32)), r"shape \(1, 3, 30, 32\); expected \(B, 3, H, W\) .* of 8"),
        (lambda m: m.encode(torch.zeros(3, 32, 32)), r"shape \(3, 32, 32\)"),
        (lambda m: m.decode(torch.zeros(1, 12, dtype=torch.long)), "12 codes are no square"),
        (lambda m: m.decode(torch.full((1, 4), 16)), "codes range from 16 to 16; expected 0 to 15"),
        (lambda m: m.decode(torch.full((1, 4), -1)), "codes range from -1 to -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"base_channels": 20}, "base_channels 20 is not a multiple of norm_groups 32"),
        ({"num_codes": "many"}, "num_codes"),
        ({"attention_levels": 3}, "attention_levels"),
    ],
)
def test_a_wrong_configuration_is_refused(sizes, message):
    with pytest.raises(StrictDataclassError, match=message):
        UnivalImageCodesConfig(**sizes)


def test_save_and_load(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    loaded, info = UnivalImageCodes.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    sizes = UnivalImageCodesConfig().to_dict().keys() - {
        "architectures",
        "dtype",
        "_name_or_path",
        "transformers_version",
    }
    assert {name: getattr(loaded.config, name) for name in sizes} == {n: getattr(model.config, n) for n in sizes}
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def save_taming(model: UnivalImageCodes, path) -> None:
    """The layout of a taming-transformers file: a Lightning checkpoint with the networks of its loss."""
    names = ("loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight")
    others = {name: torch.zeros(3) for name in names}
    state = {key: tensor.half() for key, tensor in original_state(model).items()} | others
    torch.save({"epoch": 3, "global_step": 9, "state_dict": state}, path)


REMOTE = """
import sys, torch
sys.modules["hf_vlmerge"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(type(model).__name__, model.decode(torch.zeros(1, 4, dtype=torch.long)).double().sum().item())
"""


def test_a_checkpoint_of_the_original_is_converted(tmp_path, capsys):
    model = small(attention_levels=[2, 3], blocks_per_level=2)
    save_taming(model, tmp_path / "x.ckpt")
    assert main(["convert", "image-codes", str(tmp_path / "x.ckpt"), str(tmp_path / "ours"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["dropped"]) == {"loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight"}
    loaded, info = UnivalImageCodes.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.half().float()), key
    sizes = {key: value for key, value in model.config.to_dict().items() if key in SMALL or "level" in key}
    assert {key: getattr(loaded.config, key) for key in sizes} == sizes
    remote = run(REMOTE, str(tmp_path / "ours"))  # without this package
    with torch.no_grad():
        images = loaded.eval().decode(torch.zeros(1, 4, dtype=torch.long))
    assert remote.split() == ["UnivalImageCodes", str(images.double().sum().item())]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"quantize.embedding.weight": torch.zeros(2, 2)}), "takes the nearest code"),
        (lambda s: s.pop("quantize.embed.weight"), "not a Gumbel VQ-GAN: 'quantize.embed.weight' is missing"),
        (lambda s: s.update({"colorize": torch.zeros(1)}), "'colorize' is not one of a Gumbel VQ-GAN"),
        (lambda s: s.pop("quant_conv.bias"), "the tensor for 'to_code.bias' is missing"),
        (lambda s: s.update({"encoder.foo": torch.zeros(1)}), "'encoder.foo' is not one of this model"),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(3)}), r"to_code.bias has shape \(3,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message, tmp_path):
    state = original_state(small())
    change(state)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_image_codes(tmp_path / "x.ckpt", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class OnlyCodes(LogitsProcessor):
    """Tokens `first` to `last` - 1."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.first : self.last] = scores[:, self.first : self.last]
        return masked


@torch.no_grad()
def test_generated_codes_become_images_of_the_right_size():
    """16 codes of a 32 x 32 image, 16 images in one call, as in text-to-image: sampled and within the codes' range."""
    model, codes = tiny_model(UnivalForConditionalGeneration), small()
    torch.manual_seed(0)
    batch = tiny_batch(2, None)
    side = model.config.code_grid_size
    first = 52  # the id of <code_0>
    sequences = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_code_mask=torch.ones(2, dtype=torch.bool),
        do_sample=True,
        top_k=8,
        num_return_sequences=3,
        min_new_tokens=side * side,
        max_new_tokens=side * side,
        logits_processor=LogitsProcessorList([OnlyCodes(first, first + 16)]),
    )
    assert sequences.shape == (6, 1 + side * side)
    images = codes.decode(sequences[:, 1:] - first)
    assert images.shape == (6, 3, 32, 32) == (6, 3, model.config.code_image_size, model.config.code_image_size)
    assert images.abs().max() <= 1 and not torch.equal(images[0], images[1])
    again = codes.encode(images)
    assert again.shape == (6, side * side)


def trainable(num_codes: int) -> UnivalImageCodes:
    """Narrow at full resolution and wide at the lowest one, where it costs little."""
    torch.manual_seed(0)
    config = UnivalImageCodesConfig(
        num_codes=num_codes, code_width=64, latent_channels=64, base_channels=8, channel_multipliers=[1, 2, 4, 8],
        blocks_per_level=1, norm_groups=4,
    )  # fmt: skip
    return UnivalImageCodes(config).train()


def as_pixels(images) -> torch.Tensor:
    """(B, H, W, 3) of 0..255 -> (B, 3, H, W) of -1..1"""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(model: UnivalImageCodes, pixels: torch.Tensor, loss_of, steps: int, rate: float) -> None:
    """AdamW on random batches of 16, with a warm-up and a linear descent."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 10) * (1 - s / steps))
    for _ in range(steps):
        loss_of(pixels[torch.randint(len(pixels), (16,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def start_code_book(model: UnivalImageCodes, pixels: torch.Tensor) -> None:
    """k-means of the encoder's places z; the nearest centre c has the highest 2 c z - c c, which is linear in z."""
    places = torch.cat([model.to_code(model.encoder(part)) for part in pixels.split(64)])
    places = places.permute(0, 2, 3, 1).flatten(0, 2)
    centres = places[torch.randperm(len(places))[: model.config.num_codes]].clone()
    for _ in range(10):
        nearest = (2 * places @ centres.T - centres.square().sum(1)).argmax(1)
        for code in nearest.unique():
            centres[code] = places[nearest == code].mean(0)
    model.code_book.weight.copy_(centres)
    model.code_scores.weight.copy_(2 * centres[:, :, None, None])
    model.code_scores.bias.copy_(-centres.square().sum(1))


def train(model: UnivalImageCodes, pixels: torch.Tensor, steps: int) -> None:
    """As a plain autoencoder, then with a code book started from its places, codes drawn at a low temperature."""

    def without_codes(batch):
        return torch.nn.functional.mse_loss(model.render(model.to_code(model.encoder(batch))), batch)

    fit(model, pixels, without_codes, steps, 3e-3)
    start_code_book(model, pixels)
    fit(model, pixels, lambda batch: model(batch, temperature=0.1).loss, steps // 10, 5e-4)
    model.eval()


def explained(found: torch.Tensor, pixels: torch.Tensor) -> float:
    """Share of the variance around each image's own mean colour."""
    around = pixels - pixels.mean((2, 3), keepdim=True)
    return 1 - ((found - pixels).square().sum() / around.square().sum()).item()


def test_all_parameters_learn_and_the_loss_falls():
    model = trainable(num_codes=32)
    pixels = as_pixels(ShapesDataset(4, image_size=24, noise=0.0).arrays()[0])
    first = model(pixels, temperature=1.0)
    first.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if ".k.bias" not in name)
    model.zero_grad()
    train(model, pixels, steps=40)
    with torch.no_grad():
        assert model(pixels).loss < 0.5 * first.loss
        assert model.encode(pixels).unique().numel() > 4


@pytest.mark.slow
def test_a_trained_tokenizer_reconstructs_recognisably(tmp_path):
    """Of scenes that it has not seen, most of the variance comes back, each image can be told from 127 others by its
    reconstruction, and the things have their colours more often than by chance (one in six)."""
    model = trainable(num_codes=1024)
    seen = as_pixels(ShapesDataset(2048, image_size=24, noise=0.0).arrays()[0])
    unseen = ShapesDataset(128, split="validation", image_size=24, noise=0.0)
    pixels = as_pixels(unseen.arrays()[0])
    train(model, seen, steps=1200)
    with torch.no_grad():
        codes = model.encode(pixels)
        found = model.decode(codes)
    share = explained(found, pixels)
    told = (torch.cdist(found.flatten(1), pixels.flatten(1)).argmin(1) == torch.arange(128)).float().mean().item()
    colours = right_colours(found, unseen)
    title = f"variance {share:.2f}, told from 127 others {told:.2f}, colours {colours:.2f}"
    draw(pixels, found, tmp_path / "reconstruction.png", title)
    print(f"{title}, {codes.unique().numel()} codes, plot in {tmp_path}")
    assert codes.shape == (128, 9) and codes.unique().numel() > 64
    assert share > 0.55
    assert told > 0.8
    assert colours > 0.35
    assert (tmp_path / "reconstruction.png").stat().st_size > 10_000


def right_colours(found: torch.Tensor, scenes: ShapesDataset) -> float:
    """How often the pixel in the middle of a thing is nearest to the thing's own colour among the six of this level."""
    right = []
    for i, image in enumerate((found + 1) * 127.5):
        for thing in scenes.scene(i):
            x, y, _ = centre_and_radius(thing, scenes.image_size)
            distance = (torch.tensor(RGB[:6]).float() - image[:, y, x]).square().sum(1)
            right.append(distance.argmin().item() == thing.colour)
    return sum(right) / len(right)


def draw(pixels: torch.Tensor, found: torch.Tensor, path, title: str) -> None:
    """Images above, their reconstructions below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3))
    figure.suptitle(title)
    axes = figure.subplots(2, 12)
    for row, images in zip(axes, (pixels, found), strict=True):
        for axis, image in zip(row, images[:12], strict=True):
            axis.imshow(((image + 1) / 2).permute(1, 2, 0).clamp(0, 1).numpy())
            axis.axis("off")
    figure.savefig(path)
