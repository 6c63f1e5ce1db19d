"""What only a GPU can show: FlashAttention's fp8 numbers, CUDA graphs, the whole recipe. `pytest -m gpu -n 0`."""

import gc
import json
import shutil
import struct
import time

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from safetensors.torch import save_file

from bench.quality import capture_step, float32_step
from utils import attention, machine, memory, random_weights, tiny_presets, weight_files
from utils.aoti.export import other_inputs_run_uncompiled
from utils.attention import measured_scale, quantize_per_head
from utils.benchmark_utils import create_parser
from utils.cache import dbcache
from utils.checkpoint import model_shapes, read_configs
from utils.common import RecipeError
from utils.cuda_graph import CUDAGraphModule, GraphPool, recording_is_an_error
from utils.fp8_check import relative_error
from utils.pipeline_utils import call_kwargs, load_checkpoint, load_pipeline, optimize
from utils.postprocess import GPUImageProcessor
from utils.prompts_file import args_with

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: PyTorch sees none here")]


slow = pytest.mark.slow


@slow
def test_checkpoint_of_full_size_loads_equal_and_is_refused_with_one_tensor_less(tmp_path):
    """34 GB of dev's shapes. The files' names and shapes are compared before anything loads."""
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of disk")
    saved = random_weights.build(random_weights.architecture("FLUX.1-dev"), "cuda", torch.bfloat16)
    saved.save_pretrained(tmp_path)

    def found():
        return weight_files.find_checkpoint(str(tmp_path), tmp_path, None, read_configs(str(tmp_path)))

    pipeline = load_checkpoint(found(), torch.bfloat16)
    for name in weight_files.STEMS:
        loaded = dict(getattr(pipeline, name).named_parameters())
        assert all(torch.equal(loaded.pop(key).cuda(), value) for key, value in getattr(saved, name).named_parameters())
        assert not loaded
    del pipeline, saved
    for name in weight_files.STEMS:
        path = sorted((tmp_path / name).glob("*.safetensors"))[-1]
        with open(path, "r+b") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entries = json.loads(file.read(length))
            last = max(entries.keys() - {"__metadata__"}, key=lambda key: entries[key]["data_offsets"][1])
            end = entries.pop(last)["data_offsets"][0]
            file.seek(8)
            file.write(json.dumps(entries, separators=(",", ":")).encode().ljust(length))
            file.truncate(8 + length + end)
        start = time.perf_counter()
        with pytest.raises(RecipeError, match=name):
            found()
        print(f"{name} without {last}: refused in {time.perf_counter() - start:.3f} s")
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tiny_presets.CHECKPOINT / name, tmp_path / name)  # whole again


def skip_without_a_linker_for(argv):
    """Exported packages need a C++ compiler that finds a shared libstdc++."""
    obstacle = machine.libstdcxx_obstacle() if "export_aoti" in argv else None
    if obstacle:
        pytest.skip(obstacle)


@pytest.fixture
def fa3():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention-3 needs a Hopper GPU")
    function, where = attention.find_library("fa3")
    if function is None:
        pytest.skip(where)
    attention.register_library("fa3", function)


@pytest.mark.parametrize("batch, tokens, heads, dim", [(1, 4352, 24, 128), (2, 333, 24, 128), (3, 96, 4, 64)])
@pytest.mark.parametrize("size", [1.0, 0.001, 1000.0])
def test_attention_fp8_is_close_to_float32(fa3, batch, tokens, heads, dim, size):
    """Values of any size: unscaled, those over 448 and under 2^-9 would be lost. The bound is 1.5 times the 5.3e-2 that
    FlashAttention-3's fp8 kernel shows on normal inputs; its bf16 kernel shows 2.3e-3."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    v = v * size
    scales = [measured_scale(x) for x in (q, k, v)]
    found = attention.attention(*(quantize_per_head(x, s) for x, s in zip((q, k, v), scales, strict=True)), *scales,
                                "fa3")
    reference = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert found.dtype == torch.bfloat16 and relative(found, reference) < 0.08
    high = attention.attention(q, k, v, None, None, None, "fa3")
    assert relative(high, reference) < 0.006


def test_attention_op_passes_opcheck(fa3):
    q, k, v = (torch.randn(2, 64, 4, 64, device="cuda").to(torch.float8_e4m3fn) for _ in range(3))
    scales = [torch.rand(2, 4, device="cuda") + 0.5 for _ in range(3)]
    torch.library.opcheck(attention.attention, (q, k, v, *scales, "fa3"), test_utils=("test_faketensor",))


@pytest.mark.parametrize("library, dtype, bound", [("fa3", torch.float8_e4m3fn, 0.08), ("fa3", torch.bfloat16, 0.006),
                                                   ("sdpa", torch.bfloat16, 0.006), ("sdpa", torch.float32, 1e-3)])
def test_attention_with_lse_is_close_to_float32(fa3, library, dtype, bound):
    """A ring of GPUs merges by them. 333 keys: no whole tile. In fp8, scales other than 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 6, 128, device="cuda") for tokens in (200, 333, 333))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 128**-0.5
    scales = [None] * 3
    given = [x.to(dtype) for x in (q, k, v)]
    if dtype == torch.float8_e4m3fn:
        scales = [measured_scale(x) for x in (q, k, v)]
        given = [quantize_per_head(x, s) for x, s in zip((q, k, v), scales, strict=True)]
    out, lse = attention.attention_with_lse(*given, *scales, library)
    assert lse.shape == (2, 6, 200) and lse.dtype == torch.float32
    assert relative(lse, scores.logsumexp(-1)) < bound
    assert relative(out, torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)) < bound


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, device="cuda"))
        self.calls = 0

    def forward(self, x, *, y=None, scale=1.0):
        self.calls += 1
        return {"sum": x * self.weight * scale + (0 if y is None else y), "shape": tuple(x.shape)}


@torch.no_grad()
def test_cuda_graphs_of_every_kind_of_input_equal_the_module():
    module = Sum()
    graphed = CUDAGraphModule(module)

    def inputs():
        for shape in ((2, 4), (3, 4), (1, 5, 4)):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(shape, device="cuda").to(dtype)
                yield (x,), {}
                yield (x.transpose(0, -1).contiguous().transpose(0, -1),), {"y": torch.randn_like(x), "scale": 2.0}

    kept = []
    for _ in range(3):
        for args, kwargs in inputs():
            found, expected = graphed(*args, **kwargs), module(*args, **kwargs)
            assert torch.equal(found["sum"], expected["sum"]) and found["shape"] == expected["shape"]
            kept.append((found["sum"], expected["sum"]))
    assert len(graphed.signatures) == 12
    for found, expected in kept:
        assert torch.equal(found, expected), "a later replay overwrote an output"


def scratch(rows):
    """A module that needs 8 MiB a row beside its inputs and outputs."""
    class Scratch(torch.nn.Linear):
        def forward(self, x):
            wide = x.repeat_interleave(2**19, 1)
            return super().forward(wide.view(len(x), 4, -1)[..., 0] + wide.amax())
    return Scratch(4, 4, device="cuda"), torch.randn(rows, 4, device="cuda")


@torch.no_grad()
def test_graph_pool_smaller_sizes_and_other_modules_reuse_its_memory():
    pool = GraphPool()
    (first, large), (second, _), small = scratch(64), scratch(1), torch.randn(40, 4, device="cuda")
    graphed = [CUDAGraphModule(module, pool) for module in (first, second)]
    graphed[0](large)
    held = pool.held_bytes()
    assert held >= 512 * 2**20
    for x in (small, large):
        for module, plain in zip(graphed, (first, second), strict=True):
            assert torch.equal(module(x), plain(x))
    assert len(pool.recordings) == 4 and pool.held_bytes() < held + 2**24


@torch.no_grad()
def test_graph_pool_beyond_its_limit_frees_its_memory_and_goes_on(capfd):
    """A limit of 6 GiB for the process. Ascending sizes leave the pool in pieces that the next size cannot use."""
    gc.collect()
    torch.cuda.empty_cache()
    total, held = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 6 * 2**30) / total)
    try:
        pool = GraphPool()
        module, _ = scratch(1)
        graphed = CUDAGraphModule(module, pool)
        for rows in (32, 64, 96, 128, 160, 32, 224, 32):
            x = torch.randn(rows, 4, device="cuda")
            assert torch.equal(graphed(x), module(x))
        assert pool.held_bytes() < 2.2 * 2**30  # all sizes, each by itself: 5.5 GiB
        assert "CUDA graphs: " in capfd.readouterr().err
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                graphed(torch.randn(900, 4, device="cuda"))
            assert torch.equal(graphed(x), module(x))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pool.recordings.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held + 2**28


def test_gpu_postprocess_equals_the_cpu():
    image = torch.randn(2, 3, 64, 48, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    ours = GPUImageProcessor().postprocess(image)
    theirs = super(GPUImageProcessor, GPUImageProcessor()).postprocess(image)
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in theirs]


@pytest.mark.parametrize("argv", [
    [],
    ["--num_images_per_prompt", "2"],
    ["--quality", "high"],
    pytest.param(["--quality", "high", "--num_images_per_prompt", "2"], marks=slow),
    ["--quality", "exact"],
    ["--disable_fused_kernels", "--disable_fused_vae"],
    ["--attention_backend", "native", "--quant_granularity", "tensor"],
    ["--quant_dtype", "int8", "--attention_backend", "_native_cudnn", "--text_encoder_quant"],
    pytest.param(["--disable_bf16", "--num_images_per_prompt", "2"], marks=slow),
], ids=" ".join)
def test_recipe_is_close_to_eager_and_compiles_once(argv, tmp_path):
    """On 1 + 2 blocks of full width: the step against float32, the image against the eager pipeline's."""
    torch._dynamo.reset()
    argv = ["--ckpt", "FLUX.1-schnell", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
            "--disable_inductor_tuning_flags", "--compile_export_mode", "compile", "--cache-dir", str(tmp_path), *argv]
    args = create_parser(measure=True).parse_args(argv)
    pipeline = load_pipeline(args)
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    reference = float32_step(pipeline.transformer, inputs)
    eager = pipeline(**call_kwargs(pipeline, args), output_type="latent").images
    pipeline = optimize(pipeline, args)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        assert relative_error(pipeline.transformer(**inputs)[0], reference) < 0.03
        found = [pipeline(**call_kwargs(pipeline, args), output_type="latent").images for _ in range(2)]
        assert relative(found[0], eager) < 0.03 and torch.equal(*found)
        assert pipeline(**call_kwargs(pipeline, args)).images[0].size == (384, 256)


@pytest.mark.parametrize("argv", [
    ["--compile_export_mode", "compile"],
    ["--compile_export_mode", "export_aoti"],
    ["--compile_export_mode", "compile", "--cache_preset", "fast", "--force_cache", "--num_inference_steps", "12"],
    pytest.param(["--compile_export_mode", "compile", "--disable_fused_kernels", "--disable_fused_vae",
                  "--disable_inductor_tuning_flags"], marks=slow),
], ids=" ".join)
def test_ten_sizes_in_one_process_draw_what_a_start_of_their_own_draws(argv, tmp_path):
    """On 1 + 2 blocks of full width. More sizes than torch recompiles, then all once more without a recording."""
    skip_without_a_linker_for(argv)
    torch._dynamo.reset()
    sizes = [(256, 384), (384, 256), (256, 256), (512, 512), (768, 512), (1024, 512), (1024, 768), (1024, 1024),
             (1280, 1024), (1536, 1024)]
    given = ["--ckpt", "FLUX.1-dev", "--random_weights", "1+2", "--num_inference_steps", "2", "--quiet",
             "--cache-dir", str(tmp_path), *argv]

    def start(height, width):
        args = create_parser(measure=True).parse_args([*given, "--height", str(height), "--width", str(width)])
        return optimize(load_pipeline(args), args), args

    def draw(pipeline, args, height, width):
        own = args_with(args, {"height": height, "width": width})
        image = pipeline(**call_kwargs(pipeline, own)).images[0]
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()

    pipeline, args = start(*sizes[0])
    with other_inputs_run_uncompiled():
        found = {size: draw(pipeline, args, *size) for size in sizes}
        with recording_is_an_error():
            assert all(torch.equal(draw(pipeline, args, *size), picture) for size, picture in found.items())
    del pipeline
    gc.collect()
    for size in (sizes[3], sizes[8]):
        pipeline, args = start(*size)
        assert relative(found[size], draw(pipeline, args, *size)) < 0.03
        del pipeline
        gc.collect()


@pytest.mark.parametrize("argv", [
    ["--cache_preset", "fast"],
    ["--cache_preset", "fast", "--force_cache"],
    pytest.param(["--cache_preset", "fast", "--force_cache", "--disable_fused_kernels"], marks=slow),
    ["--cache_preset", "fast", "--force_cache", "--num_images_per_prompt", "2", "--negative_prompt", "x",
     "--true_cfg_scale", "2"],
    ["--enable_cache_dit", "--force_cache"],
    ["--cache_preset", "fast", "--quality", "high"],
    pytest.param(["--cache_preset", "fast", "--force_cache", "--ckpt", "FLUX.1-Kontext-dev"], marks=slow),
], ids=" ".join)
def test_step_cache_over_graphs_equals_the_cache_without_them(argv, tmp_path):
    """On 1 + 2 blocks of full width: the same images, one graph a segment, none of them recorded after the warm-up."""
    argv = ["--ckpt", "FLUX.1-dev", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
            "--num_inference_steps", "12", "--disable_inductor_tuning_flags", "--compile_export_mode", "compile",
            "--cache-dir", str(tmp_path), *argv]
    if "FLUX.1-Kontext-dev" in argv:
        PIL.Image.effect_noise((384, 256), 64).convert("RGB").save(tmp_path / "x.png")
        argv += ["--image", str(tmp_path / "x.png")]
    found, cached, diffs = [], [], []
    for more in ([], ["--disable_cudagraphs"]):
        torch._dynamo.reset()
        args = create_parser(measure=True).parse_args(argv + more)
        pipeline = optimize(load_pipeline(args), args)
        if "--force_cache" in argv:  # which asks the GPU for nothing
            pipeline.transformer.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
            pipeline.transformer.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"),
                                                       always_call=True)
        with torch._dynamo.config.patch(error_on_recompile=True), recording_is_an_error():
            repeats = [pipeline(**call_kwargs(pipeline, args), output_type="latent").images for _ in range(2)]
        assert torch.equal(*repeats)
        found.append(repeats[0])
        cached.append(dbcache.cached_steps(pipeline))
        diffs.append(dbcache.residual_diffs(pipeline))
        if not more:
            parts = pipeline.transformer
            parts = [parts.before, *(segment.blocks for segment in parts.segments), parts.after]
            assert [len(part.signatures) for part in parts] == [1] * (5 if "--enable_cache_dit" in argv else 4)
        del pipeline
    assert cached[0] == cached[1] and relative(*found) < 0.01
    if "--force_cache" in argv:
        assert cached[0] and diffs == [{}, {}]
    else:
        assert diffs[0].keys() == diffs[1].keys() and diffs[0]


def test_taylorseer_over_one_graph_equals_taylorseer_without_it(tmp_path):
    """On 1 + 2 blocks of full width: the same images with and without the graph, and no step waits for the GPU."""
    argv = ["--ckpt", "FLUX.1-dev", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
            "--num_inference_steps", "12", "--step_cache", "taylorseer", "--compile_export_mode", "compile",
            "--cache-dir", str(tmp_path)]
    found = []
    for more in ([], ["--disable_cudagraphs"]):
        args = create_parser(measure=True).parse_args(argv + more)
        pipeline = optimize(load_pipeline(args), args)
        pipeline.transformer.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
        pipeline.transformer.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"),
                                                   always_call=True)
        with recording_is_an_error():
            repeats = [pipeline(**call_kwargs(pipeline, args), output_type="latent").images for _ in range(2)]
        assert torch.equal(*repeats) and dbcache.cached_steps(pipeline) == [6, 8, 9]
        found.append(repeats[0])
        if not more:
            assert len(pipeline.transformer.module.signatures) == 1
    assert relative(*found) < 0.01


@pytest.mark.parametrize("offload, argv", [
    ("text", []),
    pytest.param("text", ["--quality", "high"], marks=slow),
    ("text", ["--text_encoder_quant", "--vae_tiling", "--cache_preset", "fast", "--num_inference_steps", "12"]),
    ("model", ["--disable_fused_kernels"]),
    ("group", ["--disable_fused_kernels"]),
    pytest.param("group", ["--disable_fused_kernels", "--text_encoder_quant", "--vae_tiling"], marks=slow),
    pytest.param("group", ["--disable_fused_kernels", "--cache_preset", "fast", "--num_inference_steps", "12"],
                 marks=slow),
    pytest.param("text", ["--compile_export_mode", "compile"], marks=slow),
    ("text", ["--compile_export_mode", "export_aoti"]),
], ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_offload_draws_the_picture_of_weights_on_the_gpu(offload, argv, tmp_path):
    """On 1 + 2 blocks of full width, weights where they are against weights that travel, image after image. Bit by bit,
    but where a T5 that stays is compiled: then within the bound of one GPU against eager bf16."""
    argv = ["--ckpt", "FLUX.1-dev", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
            "--num_inference_steps", "2", "--compile_export_mode", "disabled", "--cache-dir", str(tmp_path), *argv]
    skip_without_a_linker_for(argv)
    found, held = [], []
    for more in ([], ["--offload", offload]):
        args = create_parser(measure=True).parse_args(argv + more)
        pipeline = optimize(load_pipeline(args), args)
        held.append(torch.cuda.memory_allocated() / 2**30)
        found += [pipeline(**call_kwargs(pipeline, args, prompt), output_type="latent").images.cpu()
                  for prompt in ("a frog", "a key", "a frog")]
        held.append(torch.cuda.memory_allocated() / 2**30)
        del pipeline
        gc.collect()
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    bound = 0.03 if offload == "text" and argv[-1] in ("compile", "export_aoti") else 0
    assert all(relative(*pair) <= bound for pair in zip(found[3:], found[:3], strict=True))
    # T5: 9.5 GB in bf16, 4.9 in int8.
    assert max(held[2:]) < held[0] - (4 if "--text_encoder_quant" in argv else 8), held


@torch.no_grad()
def test_cuda_graphs_in_one_pool_do_not_overwrite_each_other():
    """What a segment gave is still there after the others ran, in whatever order they run."""
    pool = GraphPool()
    modules = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).cuda()
               for _ in range(3)]
    graphed = [CUDAGraphModule(module, pool) for module in modules]
    for order in ((0, 1, 2), (0, 2), (2, 1, 0, 1), (0, 1, 2)):
        x, kept = torch.randn(128, 64, device="cuda"), []
        for i in order:
            kept.append((i, x, graphed[i](x)))
            x = x + kept[-1][2]
        assert all(torch.equal(modules[i](given), y) for i, given, y in kept)


@pytest.mark.parametrize("room", [1e9, 0], ids=["copies on the GPU", "copies in pinned memory"])
@pytest.mark.parametrize("quality", ["fast", "high", "exact"])
def test_swapped_lora_draws_what_a_start_with_it_draws(quality, room, tmp_path, monkeypatch):
    """Bit by bit, through CUDA graphs that were recorded before; and back."""
    monkeypatch.setattr(memory, "room_for_copies", lambda *_: room)
    shapes, tensors = model_shapes(read_configs("tiny-flux"))["transformer"], {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            module = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(8, shape[1])
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(shape[0], 8)
    save_file(tensors, tmp_path / "lora.safetensors")
    spec = str(tmp_path / "lora.safetensors")

    def start(*argv):
        args = create_parser().parse_args(
            ["--ckpt", "tiny-flux", "--interactive", "--quiet", "--height", "256", "--width", "256",
             "--num_inference_steps", "2", "--compile_export_mode", "disabled", "--quality", quality, *argv])
        pipeline = optimize(load_pipeline(args), args)
        return pipeline, lambda: pipeline(**call_kwargs(pipeline, args), output_type="latent").images

    pipeline, latents = start()
    before = latents()
    found = []
    for specs in ([spec], [], [f"{spec}:0.5"], [spec]):
        pipeline.lora_swap.use(specs, {})
        found.append(latents())
    expected = start("--lora", spec)[1]()
    assert torch.equal(found[0], expected) and torch.equal(found[3], expected) and torch.equal(found[1], before)
    assert relative(expected, before) > 0.01


@slow
@pytest.mark.parametrize("quality", ["fast", "high"])
def test_kept_weights_draw_what_the_start_drew_that_quantized_them(quality, tmp_path):
    """On 1 + 2 blocks of full width, and the whole T5."""
    if shutil.disk_usage(tmp_path).free < 25e9:
        pytest.skip("needs 25 GB of disk")
    whole = random_weights.build(random_weights.architecture("FLUX.1-dev", "1+2"), "cuda", torch.bfloat16)
    whole.save_pretrained(tmp_path / "checkpoint")
    del whole
    args = create_parser().parse_args(
        ["--ckpt", str(tmp_path / "checkpoint"), "--keep_quantized", "--cache-dir", str(tmp_path / "cache"), "--quiet",
         "--height", "256", "--width", "384", "--num_inference_steps", "2", "--compile_export_mode", "disabled",
         "--quality", quality])
    found = []
    for loaded in (False, True):
        pipeline = optimize(load_pipeline(args), args)
        assert pipeline.plan.kept_weights.loaded == loaded
        found.append(pipeline(**call_kwargs(pipeline, args), output_type="latent").images)
        del pipeline
    assert torch.equal(*found)


@pytest.mark.parametrize("argv", [[], pytest.param(["--quality", "high"], marks=slow), pytest.param(
    ["--quant_granularity", "tensor", "--attention_backend", "native"], marks=slow)], ids=" ".join)
def test_packages_in_a_cuda_graph_are_close_to_eager(argv, tmp_path):
    """Exported and loaded again, on 1 + 2 blocks of full width: the step against float32, no second copy of weights."""
    argv = ["--ckpt", "FLUX.1-schnell", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
            "--disable_inductor_tuning_flags", "--compile_export_mode", "export_aoti", "--cache-dir", str(tmp_path),
            *argv]
    skip_without_a_linker_for(argv)
    args, found = create_parser(measure=True).parse_args(argv), []
    for use_cached in (False, True):
        args.use_cached_model = use_cached
        pipeline = load_pipeline(args)
        inputs = capture_step(pipeline, call_kwargs(pipeline, args))
        reference = float32_step(pipeline.transformer, inputs)
        pipeline = optimize(pipeline, args)
        allocated = torch.cuda.memory_allocated()
        with torch.no_grad():
            assert relative_error(pipeline.transformer(**inputs)[0], reference) < 0.03
        assert torch.cuda.memory_allocated() - allocated < 2**26
        found.append(pipeline(**call_kwargs(pipeline, args), output_type="latent").images)
        del pipeline
    assert torch.equal(*found)
