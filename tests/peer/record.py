"""Records what mergekit makes of the recipes beside this file: `make peer-goldens`, or in its environment

    python tests/peer/record.py tests/golden

Writes `mergekit.safetensors`: tensors `<checkpoint>/<name>` of tiny Llama-like inputs and of every merge (named as its
recipe). The inputs are stored too, so the comparison does not depend on a random generator. a, b and base are unrelated
float32 checkpoints; tuned_a, tuned_b and tuned_c are bfloat16 and near their base, seed, as fine-tuned models are.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file

RECIPES = Path(__file__).parent / "recipes"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 16, "hidden_act": "silu",
}  # fmt: skip
TUNED = ("tuned_a", "tuned_b", "tuned_c")


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tiny model."""
    d, f, kv, vocab = 8, 12, 4, 10
    names = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,), "lm_head.weight": (vocab, d)}
    for i in range(CONFIG["num_hidden_layers"]):
        block = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        names |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return names


def checkpoints() -> dict[str, dict[str, torch.Tensor]]:
    """The inputs: three unrelated ones, and one with three that were tuned from it."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: {key: torch.randn(shape, generator=generator) for key, shape in shapes().items()}  # noqa: E731
    made = {name: noise() for name in ("a", "b", "base")}
    seed = {key: (0.02 * value).bfloat16() for key, value in noise().items()}
    for name in TUNED:
        made[name] = {key: (seed[key] + 0.002 * value).bfloat16() for key, value in noise().items()}
    return {**made, "seed": seed}


def main(output: Path) -> None:
    recorded: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for checkpoint, tensors in checkpoints().items():
            (folder / checkpoint).mkdir()
            save_file(tensors, folder / checkpoint / "model.safetensors", metadata={"format": "pt"})
            (folder / checkpoint / "config.json").write_text(json.dumps(CONFIG))
            recorded |= {f"{checkpoint}/{key}": tensor for key, tensor in tensors.items()}
        options = MergeOptions(copy_tokenizer=False, random_seed=0)
        for path in sorted(RECIPES.glob("*.yaml")):
            recipe = with_paths(yaml.safe_load(path.read_text()), folder)
            merged = folder / path.stem
            run_merge(MergeConfiguration.model_validate(recipe), str(merged), options)
            for shard in merged.glob("*.safetensors"):
                recorded |= {f"{path.stem}/{key}": tensor for key, tensor in load_file(shard).items()}
    output.mkdir(parents=True, exist_ok=True)
    file = output / "mergekit.safetensors"
    made_with = f"mergekit {version('mergekit')}, torch {torch.__version__}"  # one key: several have no fixed order
    save_file(recorded, file, metadata={"made_with": made_with})
    file.chmod(0o644)
    print(f"{file}: {len(recorded)} tensors")


def with_paths(recipe, folder: Path):
    """The recipe with the names of checkpoints replaced by their folders."""
    if isinstance(recipe, dict):
        models = ("model", "base_model")
        return {k: str(folder / v) if k in models else with_paths(v, folder) for k, v in recipe.items()}
    return [with_paths(each, folder) for each in recipe] if isinstance(recipe, list) else recipe


if __name__ == "__main__":
    main(Path(sys.argv[1]))
