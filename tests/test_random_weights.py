"""Models of random weights: reproducible, nothing at zero, FLUX.1's architecture."""

import torch

from utils import random_weights
from utils.random_weights import byte_tokenizer


def test_build_twice_gives_the_same_model(build):
    a, b = build("tiny-flux"), build("tiny-flux")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for (name, x), (_, y) in zip(getattr(a, part).state_dict().items(), getattr(b, part).state_dict().items(),
                                     strict=True):
            assert torch.equal(x, y), (part, name)


def test_build_leaves_no_weight_at_zero_or_uninitialised(build):
    """Zeros hide unwritten outputs and run faster than real data."""
    pipeline = build("tiny-flux-dev")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for name, parameter in getattr(pipeline, part).named_parameters():
            assert parameter.isfinite().all() and parameter.abs().max() < 10, (part, name)
            assert (parameter != 0).float().mean() > 0.99, (part, name)


def test_build_encoders_tell_prompts_apart(build):
    pipeline = build("tiny-flux")
    with torch.no_grad():
        (a, pooled_a, _), (b, pooled_b, _) = (pipeline.encode_prompt(p, max_sequence_length=64) for p in ("cat", "dog"))
    assert not torch.equal(a, b) and not torch.equal(pooled_a, pooled_b)


def test_byte_tokenizer_gives_bytes_between_start_and_end():
    tokenizer = byte_tokenizer(16)
    ids = tokenizer("ab", padding="max_length", max_length=8).input_ids
    assert ids[0] == 256 and ids[3:] == [257] * 5 and tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert len(tokenizer("x" * 50, truncation=True, max_length=16).input_ids) == 16


def test_build_with_fewer_layers_has_them(build):
    transformer = build("tiny-flux", layers="1+3").transformer
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (1, 3)


def test_architecture_of_dev_and_schnell_differ_as_flux_does():
    dev, schnell = (random_weights.architecture(f"black-forest-labs/FLUX.1-{name}") for name in ("dev", "schnell"))
    assert dev["transformer"]["guidance_embeds"] and not schnell["transformer"]["guidance_embeds"]
    assert dev["scheduler"]["use_dynamic_shifting"] and not schnell["scheduler"]["use_dynamic_shifting"]
