"""Prompts to embeddings: T5 and CLIP side by side, without making the CPU wait; embeddings kept; T5 compiled, or
streamed from CPU memory."""

import sys

import torch
from diffusers.hooks import apply_group_offloading

MAX_EMBEDDINGS = 16


@torch.no_grad()
def with_embeddings(pipeline, kwargs: dict, cache: dict) -> dict:
    """`kwargs` with the prompts replaced by their embeddings; the last few of them stay in `cache` and are not encoded
    again. (A dev prompt's take 4 MiB of GPU memory, and a file may hold thousands.)

    A batch's prompts are encoded one by one: however many of them are in `cache`, the encoders see one shape.
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
    """(embeddings (images, tokens, D), pooled (images, P)) of a prompt; `cache` forgets what was used longest ago."""
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
    """Says on stderr which prompts T5 does not read to their ends: tokenizers cut in silence.

    Args:
        prompts: (what it is called, such as "--prompt", its text or None) of each.
    """
    for name, text in prompts:
        ids = pipeline.tokenizer_2(text).input_ids if text else []
        if len(ids) > max_sequence_length:
            # The last token that is read is the end's own.
            cut = pipeline.tokenizer_2.decode(ids[max_sequence_length - 1:], skip_special_tokens=True).split()
            print(f"{name} has {len(ids)} tokens, and {max_sequence_length} are read: the end has no effect, from "
                  f"\"{' '.join(cut[:8])[:100]}\" on.", file=sys.stderr)


def overlap_text_encoders(pipeline) -> None:
    """Puts a function of the same arguments and results in the place of `pipeline.encode_prompt`, behind which the CPU
    goes on while the GPU encodes.

    diffusers encodes with CLIP, then with T5, and then copies zeros to the GPU, for which the CPU waits until both are
    done. What follows is drawing the noise, on the CPU, for about as long again, during which the GPU waits in turn.
    Here T5 comes first, CLIP runs beside it on a stream of its own, and the zeros are made where they are needed, so
    that the noise is drawn while T5 runs. Not for encoders that move between CPU and GPU.
    """
    own_device = pipeline.text_encoder_2.device
    beside = torch.cuda.Stream(own_device) if own_device.type == "cuda" else None

    def encode_prompt(prompt, prompt_2=None, device=None, num_images_per_prompt=1, prompt_embeds=None,
                      pooled_prompt_embeds=None, max_sequence_length=512, lora_scale=None):
        """As FluxPipeline's, of diffusers 0.42. `lora_scale` is for LoRAs that are not fused; here all are."""
        device = device or own_device
        if prompt_embeds is None:
            prompt_embeds = pipeline._get_t5_prompt_embeds(prompt_2 or prompt, num_images_per_prompt,
                                                           max_sequence_length, device)
            with torch.cuda.stream(beside):
                pooled_prompt_embeds = pipeline._get_clip_prompt_embeds(prompt, num_images_per_prompt, device)
            if beside:
                torch.cuda.current_stream().wait_stream(beside)
                # Its memory belongs to the other stream, which must not use it again before this one has read it.
                pooled_prompt_embeds.record_stream(torch.cuda.current_stream())
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=pipeline.text_encoder.dtype)
        return prompt_embeds, pooled_prompt_embeds, text_ids

    pipeline.encode_prompt = encode_prompt


def stream_text_encoder(t5: torch.nn.Module, device: torch.device) -> None:
    """Leaves T5's weights in pinned CPU memory. While a layer works, the next one's come over PCIe; then its own are
    dropped, not copied back. T5 works once a prompt, and what that takes is the copy: on an H100 0.13 s of int8
    (results/h100/2026-11/schnell/memory_16gib.2.json), for 4.6 GiB of the GPU's memory, or twice as much of bf16."""
    apply_group_offloading(t5, device, torch.device("cpu"), "leaf_level", use_stream=True, record_stream=True)


def compile_text_encoder(t5: torch.nn.Module, dynamic: bool | None) -> None:
    """Marks T5's blocks for compilation: two graphs, of the block that makes the position bias and of the others."""
    set_static_attention_mask(t5)
    for block in t5.encoder.block:
        block.compile(fullgraph=True, dynamic=dynamic)


def set_static_attention_mask(t5: torch.nn.Module) -> None:
    """Gives T5 a mask of zeros in every call, and its position bias in the order of memory in which it is read.

    Without a mask transformers makes one of its own during a CUDA graph's recording and none otherwise, which would
    compile the blocks again in the middle of the recording. A mask of zeros keeps every call the same; the pipelines
    attend to padding, so zeros are what they mean.

    The bias is looked up as (query, key, head) and permuted; PyTorch's fused attention kernels want neighbouring keys
    next to each other, and without them all 24 blocks attend in float32 by separate products. On an H100 a dev
    prompt's encoding took 18.3 ms so, and takes 12.1 (results/h100/2026-11/dev/8_fused.json and 8_fused.3.json).
    """
    def with_mask(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        mask = torch.zeros(ids.shape[0], 1, 1, ids.shape[1], device=ids.device, dtype=module.dtype)
        return args, kwargs | {"attention_mask": mask}

    def heads_first(module, args, bias):
        return bias.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    t5.register_forward_pre_hook(with_mask, with_kwargs=True)
    t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.register_forward_hook(heads_first)
