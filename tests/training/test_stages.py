import torch

from hf_vlmerge.data.collators import VlmoPreTrainingCollator
from hf_vlmerge.data.tokenizer import train_wordpiece
from hf_vlmerge.models.vlmo.modeling_vlmo import VlmoForPreTraining
from hf_vlmerge.training.stages import Stage
from tests.models.vlmo.tiny import tiny_model


def run(seed: int, bf16: bool = False) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    words = ["a red circle", "a blue square", "one green cross", "two gray things"]
    tokenizer = train_wordpiece(words, 90)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    examples = [{"pixel_values": image, "text": words[i % 4]} for i, image in enumerate(images)]
    model = tiny_model(VlmoForPreTraining)
    collator = VlmoPreTrainingCollator(tokenizer, mask_probability=0.4)
    losses = Stage(steps=4, batch_size=8, learning_rate=1e-3, warmup_steps=1, bf16=bf16, seed=seed).train(
        model, examples, collator, "a tiny stage"
    )
    return losses, model.state_dict()


def test_a_stage_trains_in_place_and_its_seed_fixes_everything():
    losses, trained = run(seed=0)
    assert {"loss", "itc_loss", "itm_loss", "mlm_loss"} <= losses.keys()
    before = tiny_model(VlmoForPreTraining).state_dict()
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    again, other = run(seed=0), run(seed=1)
    assert again[0] == losses and all(torch.equal(again[1][name], trained[name]) for name in trained)
    assert any(not torch.equal(other[1][name], trained[name]) for name in trained)


def test_bfloat16_is_for_products_alone():
    losses, trained = run(seed=0, bf16=True)
    assert all(tensor.dtype != torch.bfloat16 for tensor in trained.values())
    exact = run(seed=0)[0]
    assert losses != exact and abs(losses["loss"] - exact["loss"]) < 0.1
