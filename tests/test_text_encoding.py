"""Embeddings: kept ones, compiled T5, and encoding that makes the CPU wait for nothing."""

import pytest
import torch

from bench.profiling import annotate
from utils.pipeline_utils import call_kwargs
from utils.text_encoding import (
    MAX_EMBEDDINGS,
    compile_text_encoder,
    overlap_text_encoders,
    warn_of_cut_prompts,
    with_embeddings,
)


@pytest.fixture
def few_steps(make_args):
    return lambda name, *argv: make_args("--ckpt", name, "--num_inference_steps", "2", *argv)


def latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


@pytest.mark.parametrize("argv", [pytest.param([], marks=pytest.mark.slow), ["--num_images_per_prompt", "2"],
                                  ["--negative_prompt", "blue", "--true_cfg_scale", "3"]])
def test_with_embeddings_twice_encodes_once_and_draws_the_same(build, few_steps, monkeypatch, argv):
    pipeline, args, cache = build("tiny-flux-dev"), few_steps("tiny-flux-dev", *argv), {}
    expected = latents(pipeline, args)
    for _ in range(2):
        kwargs = with_embeddings(pipeline, call_kwargs(pipeline, args), cache)
        found = pipeline(**kwargs, output_type="latent").images
        assert torch.equal(found, expected)
        monkeypatch.setattr(pipeline.text_encoder_2, "forward", lambda *_: pytest.fail("encoded again"))


def test_warn_of_cut_prompts_quotes_the_words_beyond_the_limit(build, few_steps, capsys):
    pipeline, words = build("tiny-flux"), [f"frog {i}" for i in range(60)]
    ids = pipeline.tokenizer_2(" ".join(words)).input_ids
    for limit in (len(ids), len(ids) + 1, 512):
        warn_of_cut_prompts(pipeline, [("--prompt", " ".join(words)), ("--negative_prompt", None)], limit)
    assert capsys.readouterr().err == ""
    for limit in (len(ids) - 1, 64, 20):
        warn_of_cut_prompts(pipeline, [("--negative_prompt", " ".join(words)), ("--prompt", "a cat")], limit)
        shown = capsys.readouterr().err
        read = pipeline.tokenizer_2(" ".join(words), truncation=True, max_length=limit).input_ids[:-1]
        rest = pipeline.tokenizer_2.decode(ids[len(read):-1]).split()
        assert shown.count("\n") == 1 and "--negative_prompt" in shown
        assert f" {len(ids)} " in shown and f" {limit} " in shown
        assert f'"{" ".join(rest[:8])}"' in shown and rest


def test_with_embeddings_of_many_prompts_keeps_the_last(build, few_steps):
    pipeline, args, cache = build("tiny-flux"), few_steps("tiny-flux"), {}
    for i in range(40):
        with_embeddings(pipeline, call_kwargs(pipeline, args, prompt="first" if i % 5 == 0 else f"prompt {i}"), cache)
    assert len(cache) == MAX_EMBEDDINGS and "first" in cache and "prompt 39" in cache


def test_compile_text_encoder_keeps_the_function(build):
    """Its mask of zeros must change nothing, and no call may look different from another."""
    pipeline = build("tiny-flux")
    t5 = pipeline.text_encoder_2
    ids = torch.randint(0, 255, (2, 32))
    with torch.no_grad():
        expected = t5(ids)[0]
        for block in t5.encoder.block:
            block.compile = lambda **_: None
        compile_text_encoder(t5, None)
        seen, biases = [], []
        t5.encoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
        t5.encoder.block[0].register_forward_hook(lambda m, a, output: biases.append(output[1]))
        torch.testing.assert_close(t5(ids, output_hidden_states=False)[0], expected)
    assert seen[0].shape == (2, 1, 1, 32)
    assert (biases[0] + seen[0]).is_contiguous()  # what fused attention kernels ask of a mask


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch sees no GPU here")])])
@pytest.mark.parametrize("argv", [
    *(pytest.param(argv, marks=pytest.mark.slow) for argv in ([], ["--num_images_per_prompt", "2"])),
    ["--negative_prompt", "blue", "--true_cfg_scale", "3"]], ids=" ".join)
def test_encode_without_waiting_equals_diffusers(build, few_steps, argv, device):
    """The same embeddings, so the same images; of strings and lists, T5's prompt apart from CLIP's or not."""
    pipeline, args = build("tiny-flux-dev").to(device), few_steps("tiny-flux-dev", *argv)
    calls = [dict(prompt="a cat"), dict(prompt=["a", "b"], num_images_per_prompt=2, max_sequence_length=64),
             dict(prompt="a cat", prompt_2="a dog", device=torch.device(device)), dict(prompt="é" * 200)]
    with torch.no_grad():
        before = [pipeline.encode_prompt(**call) for call in calls], latents(pipeline, args)
        overlap_text_encoders(pipeline)
        after = [pipeline.encode_prompt(**call) for call in calls], latents(pipeline, args)
    for expected, found in zip(before[0], after[0], strict=True):
        assert [(x.dtype, x.device) for x in found] == [(x.dtype, x.device) for x in expected]
        assert all(map(torch.equal, found, expected))
    assert torch.equal(before[1], after[1])
    embeds, pooled, _ = after[0][0]
    given = pipeline.encode_prompt(None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert given[0] is embeds and given[1] is pooled and torch.equal(given[2], before[0][0][2])


def test_encode_without_waiting_runs_t5_first_and_survives_regions(build):
    """T5 takes longest: CLIP is launched while it runs. Timing an image must not bring diffusers' way back."""
    pipeline, order = build("tiny-flux"), []
    overlap_text_encoders(pipeline)
    own = pipeline.encode_prompt
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipeline, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with annotate(pipeline, torch.profiler.record_function):
        assert pipeline.encode_prompt is not own
        pipeline.encode_prompt("a cat")
    assert pipeline.encode_prompt is own and order == ["text_encoder_2", "text_encoder"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
@torch.no_grad()
def test_encode_without_waiting_returns_while_the_gpu_encodes(build):
    """A GPU that is still busy with T5 when the call has returned."""
    pipeline = build("tiny-flux").to("cuda")
    overlap_text_encoders(pipeline)
    pipeline.encode_prompt("a cat")
    t5 = pipeline.text_encoder_2
    t5.register_forward_hook(lambda *_: torch.cuda._sleep(2_000_000_000))  # about a second of T5
    pipeline.encode_prompt("a cat")
    assert not torch.cuda.current_stream().query(), "the CPU waited for T5"
