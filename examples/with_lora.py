"""A LoRA on the transformer, faces on top: the adapter adds to the blocks' outputs, so the two do not meet.

python examples/with_lora.py --lora style.safetensors --model MODEL --face ada.jpg
python examples/with_lora.py                         the miniature with a LoRA made up on the spot

LoRA needs peft: pip install -c constraints.txt peft
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from withanyone import WithAnyonePipeline
from withanyone.mini import PRETRAINED, gallery


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--lora", help="a LoRA for the model's transformer (default: a random one)")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--face", help="a photo (default: a drawn person)")
    parser.add_argument("--prompt", default="a smiling person in a city at night")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="with_lora.png")
    args = parser.parse_args(argv)

    pipe = WithAnyonePipeline.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        lora = args.lora or random_lora(pipe.transformer, Path(folder))
        pipe.load_lora_weights(lora, adapter_name="style")
    pipe.set_adapters("style", args.strength)
    out = pipe(
        prompt=args.prompt,
        faces=[args.face or gallery.draw_photo(1)],
        generator=torch.Generator().manual_seed(args.seed),
    )
    out.images[0].save(args.out)
    print(args.out)


def random_lora(transformer: FluxTransformer2DModel, folder: Path, rank: int = 4, seed: int = 0) -> Path:
    """A LoRA that means nothing, only to have one that fits: weak random weights in the attention."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
    )
    torch.manual_seed(seed)
    transformer.add_adapter(config, adapter_name="random")
    layers = {
        name: 0.2 * weight
        for name, weight in get_peft_model_state_dict(transformer, adapter_name="random").items()
    }
    transformer.delete_adapters("random")
    WithAnyonePipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


if __name__ == "__main__":
    main()
