"""Exported packages against eager, and every way to misuse one."""

import copy
import gc
import inspect
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import relative, skip_without_float8_products
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from utils import random_weights
from utils.aoti import __main__, export, inductor, store
from utils.aoti.export import PackagedModule
from utils.cache import dbcache
from utils.common import RecipeError
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.quantization import quantize_transformer
from utils.text_encoding import set_static_attention_mask

O0 = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # half the time to compile the code around the kernels


@pytest.fixture
def quick_compiler(compiler):
    with torch._inductor.config.patch(O0):
        yield


# --- without a compiler ---

@torch.no_grad()
def test_write_package_traces_convolutions_with_cudnn_on(tmp_path, monkeypatch):
    """torch.export turns cuDNN off, and without it results have another layout. Afterwards all is as it was."""
    seen, set_flags = [], torch.backends.cudnn.set_flags

    class Convolution(torch.nn.Conv2d):
        def forward(self, input):
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(input)

    module, x = Convolution(4, 4, 3), torch.randn(1, 4, 8, 8)
    torch.export.export(module, (x,), strict=False)
    assert False in seen, "torch.export leaves cuDNN on by itself: `_cudnn_left_on` is not needed any more"
    seen.clear()
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    inductor.write_package(module, {"input": x}, tmp_path / "x.pt2", {}, {})
    assert set(seen) == {True} and torch.backends.cudnn.set_flags is set_flags
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inductor.write_package(module, {"input": x}, tmp_path / "x.pt2", {}, {})
    assert torch.backends.cudnn.enabled and torch.backends.cudnn.set_flags is set_flags


def test_no_vector_instructions_hides_the_cpus_simd():
    with inductor.no_vector_instructions(True):
        assert not pick_vec_isa()


@pytest.mark.slow
def test_no_vector_instructions_restores_the_cpus_simd():
    before = pick_vec_isa()
    with inductor.no_vector_instructions(True):
        assert not pick_vec_isa()
    assert pick_vec_isa() == before
    with inductor.no_vector_instructions(False):
        assert pick_vec_isa() == before


def test_empty_while_something_is_traced_releases_the_weights():
    weight, nothing = torch.randn(8), torch.empty(0)
    lent, memory = weight.detach(), StorageWeakRef(weight.untyped_storage())
    with FakeTensorMode():
        export._empty([lent], nothing)
    assert weight.shape == (8,) and not memory.expired()
    del weight
    assert memory.expired()


def test_capture_of_t5_sets_the_first_block_apart(build):
    """The first block makes the position bias, the others are given it: two graphs."""
    t5 = build("tiny-flux").text_encoder_2
    with torch.no_grad():
        units = export.capture({"t5": list(t5.encoder.block)}, lambda: t5(torch.randint(0, 255, (2, 32))))
    assert [(unit.name, len(unit.modules)) for unit in units] == [("t5", 1), ("t5-2", len(t5.encoder.block) - 1)]


def stand_in(module, call):
    """`module` behind the checks of a package whose code is the module itself, and the arguments of its first call."""
    [unit] = export.capture({"unit": [module]}, call)
    return PackagedModule(module, unit, module), unit.arguments


@torch.no_grad()
def test_packaged_module_refuses_other_inputs(build):
    block = build("tiny-flux", layers="1+1").transformer.single_transformer_blocks[0]
    rotation = torch.randn(24, 64), torch.randn(24, 64)
    packaged, good = stand_in(block, lambda: block(torch.randn(1, 16, 256), torch.randn(1, 8, 256), torch.randn(1, 256),
                                                   image_rotary_emb=rotation, joint_attention_kwargs={"scale": 1.0}))
    assert inspect.signature(packaged.forward) == inspect.signature(block.forward)
    with pytest.raises(TypeError):
        packaged(good["hidden_states"], surprise=1)
    for name, change, said in (
            ("hidden_states", lambda x: x[:, :-1], r"'hidden_states'.*\(1, 15, 256\).*\(1, 16, 256\)"),
            ("hidden_states", lambda x: x.repeat(2, 1, 1), r"\(2, 16, 256\)"),
            ("hidden_states", torch.Tensor.bfloat16, "bfloat16.*float32"),
            ("temb", torch.Tensor.double, "'temb'.*float64"),
            ("encoder_hidden_states", lambda x: None, "'encoder_hidden_states'.*None"),
            ("joint_attention_kwargs", lambda x: {"scale": 0.5}, "scale.*0.5")):
        with pytest.raises(RecipeError, match=said):
            packaged(**good | {name: change(good[name])})


@torch.no_grad()
def test_packaged_module_runs_other_inputs_uncompiled_where_that_is_said():
    module, given = torch.nn.Linear(4, 3), []
    [unit] = export.capture({"unit": [module]}, lambda: module(torch.randn(2, 4)))
    packaged = PackagedModule(module, unit, lambda **arguments: given.append(arguments))
    other = torch.randn(5, 4)
    with export.other_inputs_run_uncompiled():
        assert torch.equal(packaged(other), module(other)) and not given
        packaged(torch.randn(2, 4))
        assert len(given) == 1, "inputs of the package's own shape run its code"
    with pytest.raises(RecipeError, match=r"\(5, 4\)"):
        packaged(other)


@torch.no_grad()
def test_packaged_module_gives_its_code_contiguous_arguments_by_name():
    given = []

    class Sum(torch.nn.Module):
        def forward(self, x, *, y=None, **kwargs):
            given.append((x.stride(), y.stride(), kwargs))
            return x + y

    x, y = torch.randn(4, 3).t(), torch.randn(3, 1).expand(3, 4)
    module = Sum()
    packaged, _ = stand_in(module, lambda: module(x, y=y, scale=2.0))
    given.clear()
    assert torch.equal(packaged(x, y=y, scale=2.0), x + y) and given == [((4, 1), (4, 1), {"scale": 2.0})]


def test_put_in_place_keeps_weights_and_works_under_the_step_cache(build, make_args):
    """cache-dit reads the signature of each block, and diffusers the dtype of the VAE."""
    args = make_args("--ckpt", "tiny-flux-dev", "--height", "64", "--width", "64", "--num_inference_steps", "4")
    options, found = dbcache.CacheOptions(1, 0, 2, residual_diff_threshold=100.0), []
    for packaged in (False, True):
        pipeline = build("tiny-flux-dev", layers="1+2")
        models = pipeline.transformer, pipeline.vae
        weights = [sum(p.numel() for p in model.parameters()) for model in models]
        if packaged:
            units = export.capture(export.packaged(pipeline, True, True, True, False),
                                 lambda pipeline=pipeline: pipeline(**call_kwargs(pipeline, args)))
            assert [(unit.name, len(unit.modules)) for unit in units] == [("double", 1), ("single", 2), ("decoder", 1)]
            export.put_in_place(pipeline, {module: PackagedModule(module, unit, module)
                                         for unit in units for module in unit.modules})
            kinds = export.packaged(pipeline, True, True, False, False)
            assert all(isinstance(module, PackagedModule) for modules in kinds.values() for module in modules)
        assert weights == [sum(p.numel() for p in model.parameters()) for model in models]
        assert pipeline.vae.dtype == torch.float32
        dbcache.enable(pipeline, options, separate_cfg=False)
        found.append(np.asarray(pipeline(**call_kwargs(pipeline, args)).images[0]))
        assert dbcache.cached_steps(pipeline)
    assert np.array_equal(*found)


@torch.no_grad()
def test_export_holds_the_vaes_roundings_against_float32(build, tmp_path, monkeypatch):
    """Where they are more than `export.BOUND`: another memory format passes, any other function does not."""
    monkeypatch.setattr(export, "BOUND", 1e-4)
    monkeypatch.setattr(export, "write_package", lambda module, arguments, path, *_: path.write_bytes(b""))
    decoder = build("tiny-flux", torch.bfloat16).vae.decoder
    unit = export.Unit("decoder", [decoder], {"sample": torch.randn(1, 16, 8, 8).bfloat16()})

    def exported(change):
        other = copy.deepcopy(decoder)
        change(other)
        monkeypatch.setattr(export, "load_code", lambda *_: other)
        export.export([unit], tmp_path, "k")

    exported(lambda other: other.to(memory_format=torch.channels_last))
    for wrong in (lambda other: other.conv_out.bias.data.add_(0.1),
                  lambda other: other.mid_block.resnets[0].conv1.weight.data.zero_(),
                  lambda other: other.conv_norm_out.weight.data.fill_(float("nan"))):
        with pytest.raises(RecipeError, match="decoder differs from eager"):
            exported(wrong)
    unit.name = "double"
    with pytest.raises(RecipeError, match="double differs from eager"):
        exported(lambda other: other.to(memory_format=torch.channels_last))


# --- one real package: a Linear of two blocks, which compiles in seconds ---

def linears(pipeline):
    return [block.proj_mlp for block in pipeline.transformer.single_transformer_blocks]


def use_package(pipeline, cache_dir, use_cached=True, re_export=False, source=None):
    """`use_packages` for the Linears. As for a GPU's packages, nothing probes the CPU's SIMD, which takes seconds."""
    x = torch.randn(1, 4, 256)
    with torch.no_grad(), inductor.no_vector_instructions(True), torch._inductor.config.patch(O0):
        units = export.capture({"linear": linears(pipeline)}, lambda: [linear(x) for linear in linears(pipeline)])
        return export.use_packages(pipeline, units, {}, str(cache_dir), use_cached, re_export, source, lambda _: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(cache folder, key) of the package."""
    folder = tmp_path_factory.mktemp("exported")
    pipeline = random_weights.build(random_weights.architecture("tiny-flux", "1+2"), "cpu", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        # Precompiling the headers pays from the second package on.
        with torch._inductor.config.patch({"aot_inductor.precompile_headers": False}):
            done = use_package(pipeline, folder, use_cached=False)
    assert done.startswith("exported ")
    return folder, done.split()[1].removesuffix(",")


@pytest.fixture
def cache(exported, tmp_path):
    """A copy of the cache folder, and its package in there."""
    folder, key = exported
    shutil.copytree(folder, tmp_path / "cache")
    return tmp_path / "cache", tmp_path / "cache" / "packages" / key


@pytest.fixture
def pipeline(build):
    return build("tiny-flux", layers="1+2")


@torch.no_grad()
def test_use_packages_second_start_loads_the_modules_own_weights(cache, pipeline):
    eager, x = linears(pipeline), torch.randn(1, 4, 256)
    assert use_package(pipeline, cache[0]) == f"loaded {cache[1].name}"
    for linear, packaged in zip(eager, linears(pipeline), strict=True):
        assert isinstance(packaged, PackagedModule) and packaged.module is linear
        before = packaged(x)
        linear.bias += 1.0
        assert relative(packaged(x), linear(x)) < 1e-5 < relative(before, linear(x))


def test_use_packages_damaged_package_is_an_error_and_changes_nothing(cache, pipeline):
    """Also of a start that may export: the cure is named, and the damaged file stays to be looked at."""
    (cache[1] / "linear.pt2").write_bytes(b"x")
    for use_cached in (True, False):
        with pytest.raises(RecipeError, match=rf"{cache[1].name}.*linear\.pt2 is damaged.*--re-export"):
            use_package(pipeline, cache[0], use_cached)
    assert (cache[1] / "linear.pt2").read_bytes() == b"x"
    assert not any(isinstance(module, PackagedModule) for module in pipeline.transformer.modules())


def test_use_packages_missing_package_is_an_error(pipeline, tmp_path):
    with pytest.raises(RecipeError, match=r"--use-cached-model.*no package"):
        use_package(pipeline, tmp_path)


def test_use_packages_re_export_replaces_a_damaged_package(cache, pipeline, monkeypatch):
    good = (cache[1] / "linear.pt2").read_bytes()
    (cache[1] / "linear.pt2").write_bytes(b"x")
    (cache[1] / "old.pt2").write_bytes(b"x")
    monkeypatch.setattr(export, "write_package", lambda module, arguments, path, *_: path.write_bytes(good))
    assert use_package(pipeline, cache[0], use_cached=False, re_export=True).startswith("exported")
    assert set(store.verify(cache[1])["files"]) == {"linear.pt2"} and not (cache[1] / "old.pt2").exists()


def test_use_packages_fetches_a_zip_where_asked(cache, pipeline, tmp_path, monkeypatch):
    archive = tmp_path / f"{cache[1].name}.zip"
    zipfile.main(["-c", str(archive), *map(str, cache[1].iterdir())])
    shutil.rmtree(cache[1])
    monkeypatch.setattr(store, "hf_hub_download", lambda repo, name, revision: str(tmp_path / name))
    source = f"me/packages@v1:{store._sha256(archive)}"
    assert use_package(pipeline, cache[0], source=source).startswith("fetched")
    assert store.verify(cache[1]) and isinstance(linears(pipeline)[0], PackagedModule)


def test_load_code_of_something_else_is_refused(cache, pipeline, tmp_path):
    path, key, linear = cache[1] / "linear.pt2", cache[1].name, linears(pipeline)[0]
    (tmp_path / "junk.pt2").write_bytes(b"no archive")
    for name, module, file, asked, said in (
            ("double", linear, path, key, "made for linear"), ("linear", linear, path, "0" * 20, "made for linear"),
            ("linear", linear, tmp_path / "junk.pt2", key, "cannot be opened"),
            ("linear", torch.nn.Identity(), path, key, "asks for weights")):
        with inductor.no_vector_instructions(True), pytest.raises(RecipeError, match=said):
            export.load_code(export.Unit(name, [module], {}), module, file, asked)


def test_fields_of_other_inputs_switches_or_models_have_other_keys(build, pipeline, monkeypatch):
    monkeypatch.setattr(export, "machine", lambda device: {"cpu": ""})
    unit, batch = (export.Unit("linear", linears(pipeline), {"input": torch.randn(size, 4, 256)}) for size in (1, 2))
    cases = [(pipeline, unit, {}), (pipeline, batch, {}), (pipeline, unit, {"quantization": "int8"}),
             (build("tiny-flux-dev", layers="1+2"), unit, {})]
    keys = [store.key_of(export.fields_of(model, [unit], switches)) for model, unit, switches in cases * 2]
    assert len(set(keys)) == 4 and keys[:4] == keys[4:]


def test_command_line_lists_verifies_and_cleans_packages_alone(cache, monkeypatch, capsys):
    folder, package = cache
    for name in ("mine", ".mine"):
        (package.with_name(name)).mkdir()

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["aoti", *argv, "--cache-dir", str(folder)])
        with inductor.no_vector_instructions(True):
            __main__.main()
        return capsys.readouterr().out

    assert "fits this machine" in run("list") and "fits this machine" in run("verify")
    other = store.verify(package)["fields"] | {"machine": {"gpu": "H100"}}
    other = store.publish(package.parent, other, lambda temporary: None)
    assert "H100" in run("verify") and run("clean").count("removed") == 1 and package.exists() and not other.exists()
    (package / "linear.pt2").write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        run("verify")
    assert "linear.pt2 is damaged" in capsys.readouterr().out
    assert "removed" in run("clean") and not package.exists() and run("list") == ""
    assert package.with_name("mine").exists() and package.with_name(".mine").exists()


# --- whole pipelines, and graphs that have faults of their own ---

CACHE = "Fn_compute_blocks: 1\nBn_compute_blocks: 0\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n"
CASES = {
    "dev, float32, cache": ["--ckpt", "tiny-flux-dev", "--disable_bf16", "--disable_quant", "--height", "64", "--width",
                            "96", "--num_inference_steps", "6", "--cache_dit_config", "cache.yaml", "--vae_tiling"],
    "dev, int8, batch 2, cache": [
        "--ckpt", "tiny-flux-dev", "--quant_dtype", "int8", "--num_images_per_prompt", "2", "--height", "96", "--width",
        "160",
        "--num_inference_steps", "6", "--cache_dit_config", "cache.yaml", "--vae_tiling"],
    "dev, float32 and int8, batch 2": ["--ckpt", "tiny-flux-dev", "--disable_bf16", "--quant_dtype", "int8",
                                       "--num_images_per_prompt", "2", "--height", "64", "--width", "64",
                                       "--num_inference_steps", "2", "--vae_tiling"],
    "kontext, bf16, VAE": ["--ckpt", "tiny-kontext", "--image", "reference.png", "--disable_quant", "--height", "64",
                           "--width", "96", "--num_inference_steps", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_packages_equal_eager_and_are_found_again(make_args, quick_compiler, tmp_path, monkeypatch, case):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "reference.png")
    (tmp_path / "cache.yaml").write_text(CACHE)
    argv = [str(tmp_path / a) if a.endswith((".png", ".yaml")) else a for a in CASES[case]]
    args = make_args(*argv, "--random_weights", "1+2", "--compile_export_mode", "export_aoti",
                     "--disable_inductor_tuning_flags", "--cache-dir", str(tmp_path))

    def draw(pipeline):
        return (pipeline(**call_kwargs(pipeline, args), output_type="latent").images,
                np.asarray(pipeline(**call_kwargs(pipeline, args)).images[0]).astype(int))

    eager = copy.copy(args)
    eager.compile_export_mode = "compile"
    with monkeypatch.context() as patch:  # quantized, cached, not compiled
        patch.setattr("utils.pipeline_utils.compile_pipeline", lambda *_: None)
        expected = draw(optimize(load_pipeline(eager), eager))
    bound = 1e-4 if args.disable_bf16 and args.disable_quant else 0.02

    first = optimize(load_pipeline(args), args)
    args.use_cached_model = True
    second = optimize(load_pipeline(args), args)
    assert "exported" in first.plan.compile.note and "loaded" in second.plan.compile.note
    for pipeline in (first, second):
        assert isinstance(pipeline.transformer.single_transformer_blocks[-1], PackagedModule)
        assert isinstance(pipeline.vae.decoder, PackagedModule) != args.vae_tiling
        latents, pixels = draw(pipeline)
        assert relative(latents, expected[0]) < bound
        assert np.abs(pixels - expected[1]).mean() < 2
    memory = [StorageWeakRef(x.untyped_storage()) for one in (first, second) for module in (one.transformer, one.vae)
              for x in export.constants_of(module).values()]
    del first, second, pipeline
    gc.collect()
    assert all(one.expired() for one in memory), "the pipeline's weights are still there"


@pytest.mark.slow
@torch.no_grad()
def test_packages_of_t5_equal_eager(build, quick_compiler, tmp_path):
    pipeline = build("tiny-flux")
    t5, ids = pipeline.text_encoder_2, torch.randint(0, 255, (2, 32))
    set_static_attention_mask(t5)
    expected = t5(ids)[0]
    units = export.capture({"t5": list(t5.encoder.block)}, lambda: t5(ids))
    export.export(units, tmp_path, "k")
    export.put_in_place(pipeline, export.load(units, tmp_path, "k"))
    assert all(isinstance(block, PackagedModule) for block in t5.encoder.block)
    torch.testing.assert_close(t5(ids)[0], expected)


def assert_one_package_serves(modules, arguments, folder, bound):
    """Exports `modules` as one unit and compares each module's package with eager."""
    unit = export.Unit("unit", modules, arguments)
    export.export([unit], folder, "k")
    packaged = export.load([unit], folder, "k")
    with torch.no_grad():
        for module in modules:
            assert relative(packaged[module](**arguments), module(**arguments)) < bound


class Layer(torch.nn.Module):
    """Named as a block's, so that it is quantized."""

    def __init__(self, size):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(64, 32)])
        with torch.no_grad():
            self.transformer_blocks[0].weight *= size

    def forward(self, x):
        return self.transformer_blocks[0](x)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_one_package_serves_float8_weights_of_other_scales(float8_on_cpu, quick_compiler, tmp_path, granularity):
    """A folded scale would be the first layer's in every other."""
    skip_without_float8_products()
    layers = [Layer(size).bfloat16() for size in (1.0, 50.0)]
    for layer in layers:
        quantize_transformer(layer, "float8", granularity, torch.device("cpu"))
    assert_one_package_serves(layers, {"x": torch.randn(8, 64).bfloat16()}, tmp_path, 0.02)


class Small(torch.nn.Module):
    """Weights that inductor would write into the code: without a dimension, or of up to eight elements."""

    def __init__(self):
        super().__init__()
        self.colours = torch.nn.Conv2d(4, 3, 1)  # as the VAE's last
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("scales", torch.rand(1))

    def forward(self, x):
        return self.colours(x) * self.scale + self.scales


@pytest.mark.slow
def test_one_package_serves_small_weights(quick_compiler, tmp_path):
    assert_one_package_serves([Small(), Small()], {"x": torch.rand(1, 4, 8, 8)}, tmp_path, 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_package_of_the_fused_decoder_equals_eager(build, quick_compiler, tmp_path):
    """Its norms, attention and upsamplers, which on a CPU are never fused, by their references."""
    fused_vae = pytest.importorskip("utils.kernels.fused_vae", reason="Triton is not installed: pip install triton")
    vae = build("tiny-flux").vae.to(memory_format=torch.channels_last)
    assert min(fused_vae.fuse_vae(vae)) > 0
    unit = export.Unit("decoder", [vae.decoder], {"sample": torch.randn(1, 16, 8, 12)})
    expected = vae.decoder(**unit.arguments)
    export.export([unit], tmp_path, "k")
    found = export.load([unit], tmp_path, "k")[vae.decoder](**unit.arguments)
    assert relative(found, expected) < 1e-5 and found.is_contiguous(memory_format=torch.channels_last)
