"""`hf-vlmerge convert`: checkpoints of other tools, BEiT weights and seeds become folders for `from_pretrained`."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Convert checkpoints to and from this package's layout.", no_args_is_help=True, rich_markup_mode=None
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Hub id or folder of a BERT WordPiece tokenizer to put beside the model.")
]
BartTokenizer = Annotated[
    str | None, typer.Option(help="Hub id or folder of a BART tokenizer: the processor is put beside the model.")
]
ImageSize = Annotated[int, typer.Option(help="Side in pixels of the images that the processor gives.")]
ConfigFile = Annotated[Path | None, typer.Option(help="JSON with fields of the configuration that override others.")]
FusionLayers = Annotated[int | None, typer.Option(help="M, where the source cannot tell (no cross-modal experts).")]


@app.command()
def vlmo(
    source: Annotated[str, typer.Argument(help="Checkpoint file (with --to-original: a folder or Hub id of ours).")],
    out: Annotated[Path, typer.Argument(help="Folder to write (with --to-original: a .ckpt file).")],
    to_original: Annotated[bool, typer.Option("--to-original", help="From our layout to the original's.")] = False,
    naming: Annotated[str, typer.Option(help="With --to-original: research or microsoft.")] = "research",
    head: Annotated[
        str, typer.Option(help="auto, pretraining, retrieval, vqa, nlvr2 or base: which head to keep.")
    ] = "auto",
    num_fusion_layers: FusionLayers = None,
    num_text_positions: Annotated[
        int | None, typer.Option(help="S of the position table, where the source has no index tensors.")
    ] = None,
    joint_attention_in_lower_layers: Annotated[
        bool | None,
        typer.Option(help="Lower layers attend over both modalities (Microsoft; custom layer norm as released)."),
    ] = None,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """A checkpoint of the released research code or of Microsoft's VLMo, and the way back.

    \b
    Example: hf-vlmerge convert vlmo vlmo_base.ckpt vlmo-base --tokenizer bert-base-uncased
    """
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.conversion import convert_vlmo_to_hf as conversion

    if to_original:
        report = conversion.convert_to_original(source, out, naming=naming, overwrite=overwrite)
    else:
        report = conversion.convert_to_hf(
            source,
            out,
            head=head,
            num_fusion_layers=num_fusion_layers,
            num_text_positions=num_text_positions,
            joint_attention_in_lower_layers=joint_attention_in_lower_layers,
            tokenizer=tokenizer,
            overwrite=overwrite,
            finish=add_remote_code,
        )
    show(report, as_json)


@app.command()
def unival(
    source: Annotated[str, typer.Argument(help="Checkpoint file (with --to-original: a folder or Hub id of ours).")],
    out: Annotated[Path, typer.Argument(help="Folder to write (with --to-original: a .pt file).")],
    to_original: Annotated[bool, typer.Option("--to-original", help="From our layout to the original's.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of the file.")] = False,
    image_size: ImageSize = 480,
    audio_hop: Annotated[int | None, typer.Option(help="Samples between frames (200 if not given).")] = None,
    audio_sample_rate: Annotated[int | None, typer.Option(help="Samples a second (48000 if not given).")] = None,
    audio_min_frequency: Annotated[float | None, typer.Option(help="Hz of the lowest mel bin (50).")] = None,
    audio_max_frequency: Annotated[float | None, typer.Option(help="Hz of the highest mel bin (14000).")] = None,
    code_image_size: Annotated[int | None, typer.Option(help="Side of generated images in pixels (256).")] = None,
    config: ConfigFile = None,
    tokenizer: BartTokenizer = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """A UnIVAL checkpoint of the original code (fairseq), and the way back.

    \b
    Example: hf-vlmerge convert unival unival_vqa.pt unival-vqa --ema --tokenizer facebook/bart-base
    """
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.conversion import convert_unival_to_hf as conversion

    if to_original:
        report = conversion.convert_to_original(source, out, overwrite=overwrite)
    else:
        given = {
            "audio_hop": audio_hop,
            "audio_sample_rate": audio_sample_rate,
            "audio_min_frequency": audio_min_frequency,
            "audio_max_frequency": audio_max_frequency,
            "code_image_size": code_image_size,
        }
        report = conversion.convert_to_hf(
            source,
            out,
            ema=ema,
            settings=read_fields(config) | {name: value for name, value in given.items() if value is not None},
            image_size=image_size,
            tokenizer=tokenizer,
            overwrite=overwrite,
            finish=add_remote_code,
        )
    show(report, as_json)


@app.command("unival-init")
def unival_init(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    bart: Annotated[str, typer.Option(help="BART: Hub id, folder or file.")] = "facebook/bart-base",
    image: Annotated[str | None, typer.Option(help="ResNet (timm, torchvision or transformers names).")] = None,
    video: Annotated[str | None, typer.Option(help="3-D ResNeXt trained on Kinetics.")] = None,
    audio: Annotated[str | None, typer.Option(help="Cnn14 of PANN.")] = None,
    image_size: ImageSize = 480,
    config: ConfigFile = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that has no source.")] = 0,
    tokenizer: BartTokenizer = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """Initial weights of a UnIVAL model from BART and trained towers; a tower without a source is not built.

    \b
    Example: hf-vlmerge convert unival-init unival-init --image timm/resnet101.a1h_in1k --tokenizer facebook/bart-base
    """
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.conversion.unival_init import convert_initial

    report = convert_initial(
        out,
        bart=bart,
        image=image,
        video=video,
        audio=audio,
        settings=read_fields(config),
        image_size=image_size,
        seed=seed,
        tokenizer=tokenizer,
        overwrite=overwrite,
        finish=add_remote_code,
    )
    show(report, as_json)


@app.command("image-codes")
def image_codes(
    source: Annotated[str, typer.Argument(help="Checkpoint file of a VQ-GAN with a Gumbel code book.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """The VQ-GAN that turns image codes into images (taming-transformers, GumbelVQ).

    \b
    Example: hf-vlmerge convert image-codes vqgan_gumbel_f8.ckpt image-codes
    """
    from hf_vlmerge.conversion.image_codes import convert_image_codes

    show(convert_image_codes(source, out, overwrite=overwrite), as_json)


@app.command()
def beit(
    source: Annotated[str, typer.Argument(help="BEiT weights: an original file, or a folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    expert_modules: Annotated[str, typer.Option(help="Comma-separated: attention, ffn, layer_norm; none: ''.")] = "",
    num_fusion_layers: FusionLayers = 2,
    image_size: Annotated[int | None, typer.Option(help="Pixels; the position table is resized if need be.")] = None,
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Leave the other modalities' experts at random values.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that BEiT does not have.")] = 0,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """BEiT weights as initial weights for pre-training.

    \b
    Example: hf-vlmerge convert beit microsoft/beit-base-patch16-224-pt22k-ft22k seed-init
    """
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.conversion.beit import convert_beit

    report = convert_beit(
        source,
        out,
        expert_modules=split(expert_modules),
        num_fusion_layers=num_fusion_layers,
        image_size=image_size,
        vision_weights_for_all=not vision_only,
        seed=seed,
        tokenizer=tokenizer,
        overwrite=overwrite,
        finish=add_remote_code,
    )
    show(report, as_json)


@app.command()
def seed(
    source: Annotated[str, typer.Argument(help="Modality-agnostic checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    expert_modules: Annotated[
        str, typer.Option(help="Comma-separated: attention, ffn, layer_norm.")
    ] = "attention,ffn,layer_norm",
    overwrite: Overwrite = False,
):
    """A seed as a modality-specific model: every expert starts as a copy of the shared module.

    \b
    Example: hf-vlmerge convert seed vlmo-seed vlmo-specific --expert-modules attention,ffn,layer_norm
    """
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.conversion.seed import specialise_folder

    print(specialise_folder(source, out, split(expert_modules), overwrite=overwrite, finish=add_remote_code))


def read_fields(path: Path | None) -> dict:
    """The fields in a JSON file; none without a file."""
    if path is None:
        return {}
    try:
        fields = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} is no JSON object of fields and values.")
    return fields


def split(names: str) -> list[str]:
    """`"attention, ffn"` -> `["attention", "ffn"]`"""
    return [name.strip() for name in names.split(",") if name.strip()]


def show(report, as_json: bool) -> None:
    """A conversion's report: what was written, and everything that was left out or is new, by name."""
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    print(report.text())
