"""FLUX.1's architecture with random weights, without a download.

Speed and memory do not depend on the values of the weights, so these models replace the gated 34 GB checkpoints in
measurements of speed and memory. Their pictures are noise. The configs below are copied from the `config.json` files of
black-forest-labs/FLUX.1-schnell, -dev, -Kontext-dev, -Fill-dev, -Depth-dev and -Canny-dev. The tiny configs are the
same classes in a size for a laptop.
"""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from utils.common import RecipeError
from utils.tasks import BY_CLASS, CONTROL, EDITING, FILLING, FROM_TEXT, INPUT_CHANNELS, Task

FLUX_TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56))
FLUX_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
    sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
FLUX_T5 = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
               feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
FLUX_CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 vocab_size=49408, max_position_embeddings=77, projection_dim=768)

TINY_TRANSFORMER = FLUX_TRANSFORMER | dict(
    num_layers=2, num_single_layers=6, attention_head_dim=64, num_attention_heads=4, joint_attention_dim=256,
    pooled_projection_dim=128, axes_dims_rope=(8, 28, 28))
TINY_VAE = FLUX_VAE | dict(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=8, sample_size=128)
TINY_T5 = FLUX_T5 | dict(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=512)
TINY_CLIP = FLUX_CLIP | dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
                             vocab_size=512, projection_dim=128)
# {width of T5's embeddings: SigLIP's config}
SIGLIP = {FLUX_T5["d_model"]: dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                                   num_attention_heads=16, image_size=384, patch_size=14),
          TINY_T5["d_model"]: dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=56, patch_size=14)}

FIXED_SHIFT = dict(shift=1.0, use_dynamic_shifting=False)
DYNAMIC_SHIFT = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                     max_image_seq_len=4096)


def _architecture(task: Task, guidance: bool, small: bool) -> dict:
    transformer, vae, t5, clip = ((TINY_TRANSFORMER, TINY_VAE, TINY_T5, TINY_CLIP) if small else
                                  (FLUX_TRANSFORMER, FLUX_VAE, FLUX_T5, FLUX_CLIP))
    transformer = transformer | dict(guidance_embeds=guidance)
    if task in INPUT_CHANNELS:
        transformer |= dict(in_channels=INPUT_CHANNELS[task], out_channels=64)
    return {"pipeline_class": task.pipeline.__name__, "transformer": transformer, "vae": vae, "text_encoder": clip,
            "text_encoder_2": t5, "tokenizer_2": {"model_max_length": 64 if small else 512},
            "scheduler": DYNAMIC_SHIFT if guidance else FIXED_SHIFT}


# {last part of a checkpoint's name: its component configs}
ARCHITECTURES = {
    "FLUX.1-schnell": _architecture(FROM_TEXT, guidance=False, small=False),
    "FLUX.1-dev": _architecture(FROM_TEXT, guidance=True, small=False),
    "FLUX.1-Krea-dev": _architecture(FROM_TEXT, guidance=True, small=False),
    "FLUX.1-Kontext-dev": _architecture(EDITING, guidance=True, small=False),
    "FLUX.1-Fill-dev": _architecture(FILLING, guidance=True, small=False),
    "FLUX.1-Depth-dev": _architecture(CONTROL, guidance=True, small=False),
    "FLUX.1-Canny-dev": _architecture(CONTROL, guidance=True, small=False),
    "tiny-flux": _architecture(FROM_TEXT, guidance=False, small=True),
    "tiny-flux-dev": _architecture(FROM_TEXT, guidance=True, small=True),
    "tiny-kontext": _architecture(EDITING, guidance=True, small=True),
    "tiny-fill": _architecture(FILLING, guidance=True, small=True),
    "tiny-depth": _architecture(CONTROL, guidance=True, small=True),
    "tiny-canny": _architecture(CONTROL, guidance=True, small=True),
}


def architecture(ckpt: str, layers: str = "full") -> dict:
    """The component configs of a known checkpoint.

    Args:
        ckpt: a checkpoint name or path that ends in a key of `ARCHITECTURES`.
        layers: "full", or the number of double and single blocks, such as "2+4".

    Raises:
        RecipeError: `ARCHITECTURES` does not have the name, or `layers` is not two positive numbers.
    """
    name = ckpt.rstrip("/").rsplit("/", 1)[-1]
    if name not in ARCHITECTURES:
        raise RecipeError(f"--random_weights has no architecture for --ckpt '{name}': choose a --ckpt that ends in "
                          f"{', '.join(ARCHITECTURES)}.")
    configs = dict(ARCHITECTURES[name])
    if layers != "full":
        double, plus, single = layers.partition("+")
        if not (plus and double.isdigit() and single.isdigit() and int(double) and int(single)):
            raise RecipeError(f"--random_weights {layers}: give the numbers of blocks as DOUBLE+SINGLE, such as 2+4.")
        configs["transformer"] = configs["transformer"] | dict(num_layers=int(double), num_single_layers=int(single))
    return configs


def build(configs: dict, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
    """Builds a pipeline of the configs' class with weights drawn from `seed`, on `device`.

    One seed always gives the same weights on the same kind of device. CPU and GPU generators differ.

    Args:
        configs: the component configs, from `architecture`.
    """
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**configs["transformer"])
        vae = AutoencoderKL(**configs["vae"])
        t5 = T5EncoderModel(T5Config(**configs["text_encoder_2"]))
    # CLIP's constructor computes a buffer of position ids, and a meta tensor would lose the values.
    clip = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"], bos_token_id=256, eos_token_id=257,
                                        pad_token_id=257))
    # A GPU, if there is one, draws the random numbers even for weights on the CPU: 12 billion numbers take a second on
    # a GPU and minutes on a CPU.
    source = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    for module in (transformer, vae, t5):
        module.to(dtype).to_empty(device=device)
    t5.tie_weights()
    for module in (transformer, vae, t5, clip.to(dtype=dtype, device=device)):
        _randomize(module.eval().requires_grad_(False), source)
    return BY_CLASS[configs["pipeline_class"]].pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **configs["scheduler"]),
        transformer=transformer, vae=vae, text_encoder=clip, text_encoder_2=t5, tokenizer=byte_tokenizer(77),
        tokenizer_2=byte_tokenizer(configs["tokenizer_2"]["model_max_length"]))


def redux_tokens(width: int) -> int:
    """The number of tokens that `build_redux` makes of a picture: 729 at the real size."""
    return (SIGLIP[width]["image_size"] // SIGLIP[width]["patch_size"]) ** 2


def build_redux(width: int, dtype: torch.dtype, seed: int = 1) -> FluxPriorReduxPipeline:
    """FLUX.1-Redux-dev's architecture on the CPU, for text embeddings of `width`, with weights drawn from `seed`."""
    config = SIGLIP[width]
    encoder = SiglipVisionModel(SiglipVisionConfig(**config))
    embedder = ReduxImageEncoder(redux_dim=config["hidden_size"], txt_in_features=width)
    source = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    for module in (encoder, embedder):
        _randomize(module.to(dtype).eval().requires_grad_(False), source)
    side = config["image_size"]
    return FluxPriorReduxPipeline(image_encoder=encoder, image_embedder=embedder,
                                  feature_extractor=SiglipImageProcessor(size={"height": side, "width": side}))


@torch.no_grad()
def _randomize(module: torch.nn.Module, source: torch.Generator) -> None:
    """Fills a module in place: weights of variance 1 / (3 fan_in), as PyTorch initializes Linears, and small biases.

    Norm weights are 1, and embeddings have variance 1.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() > 1:
                std = 1.0 if isinstance(part, torch.nn.Embedding) else (3 * parameter[0].numel()) ** -0.5
            elif name == "weight":
                parameter.fill_(1.0)
                continue
            else:
                std = 0.02
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=source.device)
            parameter.copy_(values.normal_(0.0, std, generator=source))


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: one token per byte (ids 0-255), start 256, end and padding 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, bos_token="<s>",
                                   eos_token="</s>", pad_token="</s>", unk_token="</s>")
