"""Times FLUX.1's blocks with and without what the pipeline does not read of the last one: results/NAME/last_block.json.

    python results/last_block.py h100    # on a Hopper GPU, less than a minute

One double and one single block of full width, which is the last one, in a CUDA graph under load, as results/kernels.py
loads its products. The difference is what `drop_unread` of utils/fused_blocks.py saves of a step.
"""

import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kernels import TOKENS, folder_of_arguments, under_load  # noqa: E402

from experiments import CKPTS  # noqa: E402
from utils.benchmark_utils import environment  # noqa: E402
from utils.fused_blocks import READ, fuse_blocks, leave_sums  # noqa: E402
from utils.outputs import write_json  # noqa: E402
from utils.pipeline_utils import fuse_projections  # noqa: E402
from utils.quality import relative_error  # noqa: E402
from utils.random_weights import architecture  # noqa: E402

READ_TOKENS = TOKENS["dev"][1]  # the picture's; Kontext's others are the reference's


def two_blocks(config: dict, text: int, image: int, read: int, device: str) -> dict:
    """{"all", "read"}: calls of a fused transformer of 1 + 1 blocks with random weights, which give the outputs
    (1, image, C) and (1, read, C).

    Args:
        config: of the transformer; text, image: tokens; read: how many of the image's the pipeline reads.
    """
    torch.manual_seed(0)
    with torch.device(device):
        transformer = FluxTransformer2DModel(**config | {"num_layers": 1, "num_single_layers": 1}).bfloat16().eval()
        inputs = {"hidden_states": torch.randn(1, image, config["in_channels"]).bfloat16(),
                  "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"]).bfloat16(),
                  "pooled_projections": torch.randn(1, config["pooled_projection_dim"]).bfloat16(),
                  "timestep": torch.full((1,), 0.5).bfloat16(),
                  "guidance": torch.full((1,), 3.5) if config["guidance_embeds"] else None,
                  "img_ids": torch.randint(64, (image, 3)).float(), "txt_ids": torch.zeros(text, 3)}
    fuse_projections(transformer)
    fuse_blocks(transformer, torch.device(device))
    leave_sums(transformer)
    transformer.single_transformer_blocks[-1].drops_unread = True
    transformer.time_text_embed.prepare(inputs["timestep"], inputs["guidance"], inputs["pooled_projections"])
    return {name: lambda kwargs=kwargs: transformer(**inputs, joint_attention_kwargs=kwargs, return_dict=False)[0]
            for name, kwargs in (("all", None), ("read", {READ: read}))}


@torch.no_grad()
def main():
    folder, models = folder_of_arguments(__doc__), {}
    for model, (text, image) in TOKENS.items():
        calls = two_blocks(architecture(CKPTS[model])["transformer"], text, image, READ_TOKENS, "cuda")
        error = relative_error(calls["read"]().float(), calls["all"]()[:, :READ_TOKENS].float())
        loaded = [under_load(calls[name]) for name in ("all", "read", "read", "all")]
        models[model] = {"error": error, "all": [loaded[0], loaded[3]], "read": loaded[1:3]}
        print(model, models[model], flush=True)
    write_json(str(folder / "last_block.json"),
               {"tokens": TOKENS, "models": models, "environment": environment("cuda")})


if __name__ == "__main__":
    main()
