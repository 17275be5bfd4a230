"""A pre-training step without reuse: the reference for equality and for the count of multiply-adds."""

import torch


def separate_passes(model, batch) -> dict[str, torch.Tensor]:
    """The losses of a pre-training step as six passes: three for matching, a masked one, two single ones."""
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    vlmo, itc, cross_entropy = model.vlmo, model.itc, torch.nn.functional.cross_entropy
    wrong_image, wrong_text = batch["negative_image_index"], batch["negative_text_index"]
    passes = [(ids, mask, pixels), (ids, mask, pixels[wrong_image]), (ids[wrong_text], mask[wrong_text], pixels)]
    itm_logits = torch.cat([model.itm_head(vlmo(*one).pooler_output) for one in passes])
    matches = torch.tensor([1] * len(ids) + [0] * 2 * len(ids), device=ids.device)

    def embed(projection, states):
        return torch.nn.functional.normalize(projection(states[:, 0]), dim=-1)

    def contrast(image, text, scale):
        logits = scale.exp() * image @ text.t()
        target = torch.arange(len(ids), device=ids.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.t(), target)) / 2

    # two single-modality passes, each with its short second branch through the `vision_language` experts
    image_lower, text_lower = vlmo.lower(vlmo.image_stream(pixels)), vlmo.lower(vlmo.text_stream(ids, mask))
    image, text = vlmo.upper(image_lower, "vision"), vlmo.upper(text_lower, "language")
    itc_loss = contrast(embed(itc.image_projection, image), embed(itc.text_projection, text), itc.logit_scale)
    image, text = vlmo.upper(image_lower, "vision_language"), vlmo.upper(text_lower, "vision_language")
    itc_vl = contrast(embed(itc.image_vl_projection, image), embed(itc.text_vl_projection, text), itc.logit_vl_scale)
    mlm_logits = model.mlm_head(vlmo(batch["mlm_input_ids"], mask, pixels).last_hidden_state[:, : ids.shape[1]])
    mlm_loss = cross_entropy(mlm_logits.flatten(0, 1), batch["labels"].flatten())
    return {
        "itc_loss": (itc_loss + itc_vl) / 2,
        "itm_loss": cross_entropy(itm_logits, matches),
        "mlm_loss": model.config.mlm_loss_weight * mlm_loss,
    }
