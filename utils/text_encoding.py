"""Text encoding: T5 and CLIP run concurrently without CPU waits, and the embeddings of recent prompts are kept.

T5 can be compiled, or streamed from CPU memory.
"""

import sys

import torch
from diffusers.hooks import apply_group_offloading

MAX_EMBEDDINGS = 16


@torch.no_grad()
def with_embeddings(pipeline, kwargs: dict, cache: dict) -> dict:
    """Replaces the prompts in a pipeline call's `kwargs` by their embeddings.

    `cache` keeps the embeddings of the last `MAX_EMBEDDINGS` prompts, which are not encoded again. It is bounded,
    because a dev prompt's embeddings take 4 MiB of GPU memory and a file may hold thousands of prompts. The prompts of
    a batch are encoded one by one, so the encoders always see one shape.

    Args:
        cache: {prompt: embeddings}, kept between calls.

    Returns:
        New kwargs.
    """
    kwargs = dict(kwargs)
    images = kwargs.pop("num_images_per_prompt")
    for prefix in ("", "negative_"):
        if (prompts := kwargs.pop(f"{prefix}prompt", None)) is None:
            continue
        encoded = [_encode(pipeline, prompt, images, kwargs["max_sequence_length"], cache)
                   for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        for name, parts in zip(("prompt_embeds", "pooled_prompt_embeds"), zip(*encoded, strict=True), strict=True):
            kwargs[prefix + name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return kwargs


def _encode(pipeline, prompt: str, images: int, max_sequence_length: int, cache: dict) -> tuple:
    """Encodes a prompt, or takes it from `cache`, which drops its least recently used prompt.

    Returns:
        The T5 embeddings (images, tokens, D) and the pooled CLIP embedding (images, P).
    """
    if prompt in cache:
        cache[prompt] = cache.pop(prompt)
    else:
        if len(cache) >= MAX_EMBEDDINGS:
            cache.pop(next(iter(cache)))
        embeds, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None, num_images_per_prompt=images,
                                                   max_sequence_length=max_sequence_length)
        cache[prompt] = embeds, pooled
    return cache[prompt]


def warn_of_cut_prompts(pipeline, prompts: list[tuple[str, str | None]], max_sequence_length: int) -> None:
    """Warns on stderr of each prompt with more tokens than T5 reads. The tokenizer truncates it silently.

    Args:
        prompts: (name, such as "--prompt"; text or None) of each prompt.
        max_sequence_length: the number of tokens that T5 reads, with the end token.
    """
    for name, text in prompts:
        ids = pipeline.tokenizer_2(text).input_ids if text else []
        if len(ids) > max_sequence_length:
            print(f"{name} has {len(ids)} tokens, and T5 reads the first {max_sequence_length} of them. The rest has "
                  f"no effect. It begins with \"{unread_text(pipeline, ids, max_sequence_length)}\".", file=sys.stderr)


def unread_text(pipeline, ids: list[int], max_sequence_length: int) -> str:
    """The first words of a prompt's end that T5 does not read.

    Args:
        ids: the prompt's tokens, more than `max_sequence_length`.
    """
    # The last token that T5 reads is the end token.
    cut = pipeline.tokenizer_2.decode(ids[max_sequence_length - 1:], skip_special_tokens=True).split()
    return " ".join(cut[:8])[:100]


def overlap_text_encoders(pipeline) -> None:
    """Replaces `pipeline.encode_prompt` by an equivalent function that does not block the CPU.

    diffusers encodes with CLIP, then with T5, and then copies zeros to the GPU. The CPU waits for this copy until both
    encoders are done. It then draws the noise for about as long again, while the GPU is idle. The new function starts
    T5 first, runs CLIP concurrently on a second stream and creates the zeros on the GPU. So the CPU draws the noise
    while T5 runs. Encoders that move between CPU and GPU are not supported.
    """
    own_device = pipeline.text_encoder_2.device
    beside = torch.cuda.Stream(own_device) if own_device.type == "cuda" else None

    def encode_prompt(prompt, prompt_2=None, device=None, num_images_per_prompt=1, prompt_embeds=None,
                      pooled_prompt_embeds=None, max_sequence_length=512, lora_scale=None):
        """FluxPipeline.encode_prompt of diffusers 0.42. It ignores `lora_scale`, because all LoRAs are fused."""
        device = device or own_device
        if prompt_embeds is None:
            prompt_embeds = pipeline._get_t5_prompt_embeds(prompt_2 or prompt, num_images_per_prompt,
                                                           max_sequence_length, device)
            with torch.cuda.stream(beside):
                pooled_prompt_embeds = pipeline._get_clip_prompt_embeds(prompt, num_images_per_prompt, device)
            if beside:
                torch.cuda.current_stream().wait_stream(beside)
                # CLIP's stream owns this memory and must not reuse it before the current stream has read it.
                pooled_prompt_embeds.record_stream(torch.cuda.current_stream())
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=pipeline.text_encoder.dtype)
        return prompt_embeds, pooled_prompt_embeds, text_ids

    pipeline.encode_prompt = encode_prompt


def stream_text_encoder(t5: torch.nn.Module, device: torch.device) -> None:
    """Keeps T5's weights in pinned CPU memory and copies each layer to the GPU while the previous layer computes.

    After a layer the GPU's copy is dropped, not copied back. T5 runs once per prompt, and the copy over PCIe determines
    its time. On an H100 an int8 T5 takes 0.13 s (results/h100/2026-11/schnell/memory_16gib.2.json) and saves 4.6 GiB of
    GPU memory. In bf16 T5 takes and saves twice as much.
    """
    apply_group_offloading(t5, device, torch.device("cpu"), "leaf_level", use_stream=True, record_stream=True)


def compile_text_encoder(t5: torch.nn.Module, dynamic: bool | None) -> None:
    """Marks T5's blocks for compilation: one graph for the first block, with the position bias, one for the others."""
    set_static_attention_mask(t5)
    for block in t5.encoder.block:
        block.compile(fullgraph=True, dynamic=dynamic)


def set_static_attention_mask(t5: torch.nn.Module) -> None:
    """Gives T5 a mask of zeros in every call, and stores its position bias with the keys contiguous.

    The mask: without one, transformers creates a mask during the recording of a CUDA graph and at no other time. This
    would compile the blocks again in the middle of the recording. With zeros every call is the same, and they do not
    change the result, because the FLUX pipelines attend to padding.

    The bias: transformers looks it up as (query, key, head) and permutes it. PyTorch's fused attention kernels need
    contiguous keys; without these kernels all 24 blocks attend in float32 through separate GEMMs. On an H100 the
    contiguous bias shortens the encoding of a dev prompt from 18.3 to 12.1 ms (results/h100/2026-11/dev/8_fused.json
    and 8_fused.3.json).
    """
    def with_mask(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        mask = torch.zeros(ids.shape[0], 1, 1, ids.shape[1], device=ids.device, dtype=module.dtype)
        return args, kwargs | {"attention_mask": mask}

    def heads_first(module, args, bias):
        return bias.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    t5.register_forward_pre_hook(with_mask, with_kwargs=True)
    t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.register_forward_hook(heads_first)
