"""Exported packages against eager, and every way to misuse one."""

import copy
import gc
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import relative, skip_without_float8_products
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from utils import aoti, aoti_compile, package_store
from utils.benchmark_utils import RecipeError, StageLog
from utils.package_store import key_of, open_store, publish
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.quantization import quantize_transformer
from utils.text_encoding import settle_masks

CACHE = "Fn_compute_blocks: 1\nBn_compute_blocks: 0\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "reference.png")
    (folder / "cache.yaml").write_text(CACHE)
    return folder


@pytest.fixture(autouse=True)
def quick_compiler(compiler):
    """The code around the kernels unoptimised: half the time to compile it."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


def arguments(make_args, folder, *argv):
    argv = [str(folder / a) if a.endswith((".png", ".yaml")) else a for a in argv]
    return make_args(*argv, "--random_weights", "1+2", "--compile_export_mode", "export_aoti",
                     "--disable_inductor_tuning_flags", "--cache-dir", str(folder))


def latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


def fail(*_):
    pytest.fail("exported again")


@torch.no_grad()
def test_convolutions_are_traced_as_they_will_run(tmp_path, monkeypatch):
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
    aoti_compile.write_package(module, {"input": x}, tmp_path / "x.pt2", {}, {})
    assert set(seen) == {True} and torch.backends.cudnn.set_flags is set_flags
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aoti_compile.write_package(module, {"input": x}, tmp_path / "x.pt2", {}, {})
    assert torch.backends.cudnn.enabled and torch.backends.cudnn.set_flags is set_flags


@pytest.mark.slow
def test_a_gpus_packages_leave_the_cpus_instructions_known():
    before = pick_vec_isa()
    with aoti_compile.no_vector_instructions(True):
        assert not pick_vec_isa()
    assert pick_vec_isa() == before
    with aoti_compile.no_vector_instructions(False):
        assert pick_vec_isa() == before


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpus_packages_are_made_and_loaded_without_asking_for_them(device, tmp_path, monkeypatch):
    """Loading asks as exporting does: half a minute of each start."""
    before, asked = pick_vec_isa(), []
    monkeypatch.setattr(aoti, "fields_of", lambda *_: {"made": "up"})
    monkeypatch.setattr(aoti, "export", lambda units, folder, *_: asked.append(pick_vec_isa())
                        or (folder / "u.pt2").write_bytes(b"code"))
    monkeypatch.setattr(aoti, "bind", lambda *_: asked.append(pick_vec_isa()))
    for said in ("exported", "loaded"):
        assert said in aoti.use_packages(SimpleNamespace(device=torch.device(device)), [aoti.Unit("u", [], {})], {},
                                         tmp_path, False, False, None, lambda line: None)
    assert len(asked) == 3 and [bool(found) for found in asked] == [device == "cpu"] * 3 and pick_vec_isa() == before


CASES = {
    "schnell, float32": ["--ckpt", "tiny-flux", "--disable_bf16", "--disable_quant", "--vae_tiling"],
    "dev, int8, batch 2, cache": [
        "--ckpt", "tiny-flux-dev", "--num_images_per_prompt", "2", "--height", "96", "--width", "160",
        "--num_inference_steps", "6", "--cache_dit_config", "cache.yaml", "--vae_tiling"],
    "schnell, int8, batch 2": ["--ckpt", "tiny-flux", "--num_images_per_prompt", "2", "--vae_tiling"],
    "dev, float32, cache": ["--ckpt", "tiny-flux-dev", "--disable_bf16", "--disable_quant", "--height", "64", "--width",
                            "96", "--num_inference_steps", "6", "--cache_dit_config", "cache.yaml", "--vae_tiling"],
    "kontext, int8, batch 2": ["--ckpt", "tiny-kontext", "--image", "reference.png", "--num_images_per_prompt", "2",
                               "--height", "96", "--width", "64", "--num_inference_steps", "2", "--vae_tiling"],
    "dev, bf16, cache": ["--ckpt", "tiny-flux-dev", "--disable_quant", "--height", "160", "--width", "96",
                         "--num_inference_steps", "6", "--cache_dit_config", "cache.yaml", "--vae_tiling"],
    "dev, float32 and int8, batch 2": ["--ckpt", "tiny-flux-dev", "--disable_bf16", "--quant_dtype", "int8",
                                       "--num_images_per_prompt", "2", "--height", "64", "--width", "64",
                                       "--num_inference_steps", "2", "--vae_tiling"],
    "kontext, bf16, VAE": ["--ckpt", "tiny-kontext", "--image", "reference.png", "--disable_quant", "--height", "64",
                           "--width", "96", "--num_inference_steps", "2"],
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (i > 0))
                                  for i, case in enumerate(CASES)])
def test_packages_equal_eager_and_are_found_again(make_args, folder, monkeypatch, case):
    args = arguments(make_args, folder, *CASES[case])
    eager = copy.copy(args)
    eager.compile_export_mode = "compile"
    monkeypatch.setattr("utils.pipeline_utils.compile_pipeline", lambda *_: None)  # quantised, cached, not compiled
    expected = optimize(load_pipeline(eager), eager)
    bound = 1e-4 if args.disable_bf16 and args.disable_quant else 0.02
    wanted = latents(expected, eager), np.asarray(expected(**call_kwargs(expected, eager)).images[0]).astype(int)

    made = optimize(load_pipeline(args), args)
    assert "exported" in made.techniques["compile"].how
    calls = []
    monkeypatch.setattr(aoti, "export", fail)
    args.use_cached_model = True
    for pipeline in (made, optimize(load_pipeline(args), args)):
        block = pipeline.transformer.single_transformer_blocks[-1]
        block.forward = (lambda inner: lambda *a, **k: calls.append(1) or inner(*a, **k))(block.forward)
        found = latents(pipeline, args)
        assert relative(found, wanted[0]) < bound
        pixels = np.asarray(pipeline(**call_kwargs(pipeline, args)).images[0]).astype(int)
        assert np.abs(pixels - wanted[1]).mean() < 2
    assert "loaded" in pipeline.techniques["compile"].how and calls
    memory = [StorageWeakRef(x.untyped_storage()) for one in (made, pipeline) for module in (one.transformer, one.vae)
              for x in aoti.constants_of(module).values()]
    del made, pipeline, block
    gc.collect()
    assert all(one.expired() for one in memory), "the pipeline's weights are still there"


def test_weights_are_let_go_while_something_is_traced():
    weight, nothing = torch.randn(8), torch.empty(0)
    lent, memory = weight.detach(), StorageWeakRef(weight.untyped_storage())
    with FakeTensorMode():
        aoti._empty([lent], nothing)
    assert weight.shape == (8,) and not memory.expired()
    del weight
    assert memory.expired()


@pytest.mark.slow
def test_packages_of_t5_equal_eager(build, tmp_path):
    """Two graphs: the first block makes the position bias, the others are given it."""
    t5 = build("tiny-flux").text_encoder_2
    settle_masks(t5)
    ids = torch.randint(0, 255, (2, 32))
    with torch.no_grad():
        expected = t5(ids)[0]
        units = aoti.capture({"t5": list(t5.encoder.block)}, lambda: t5(ids))
        assert [(unit.name, len(unit.modules)) for unit in units] == [("t5", 1), ("t5-2", len(t5.encoder.block) - 1)]
        aoti.export(units, tmp_path, "k")
        aoti.bind(units, tmp_path, "k")
        torch.testing.assert_close(t5(ids)[0], expected)


class Layer(torch.nn.Module):
    """Named as a block's, so that it is quantised."""

    def __init__(self, size):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(64, 32)])
        with torch.no_grad():
            self.transformer_blocks[0].weight *= size

    def forward(self, x):
        return self.transformer_blocks[0](x)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_one_package_serves_float8_weights_of_other_scales(float8_on_cpu, tmp_path, granularity, monkeypatch):
    """A folded scale would be the first layer's in every other; export compares the first and the last with eager."""
    skip_without_float8_products()
    layers = [Layer(size).bfloat16() for size in (1.0, 50.0)]
    for layer in layers:
        quantize_transformer(layer, "float8", granularity, torch.device("cpu"))
    unit = aoti.Unit("layer", layers, {"x": torch.randn(8, 64).bfloat16()})
    with monkeypatch.context() as patch:  # the comparison notices what it is for
        patch.setattr(aoti, "_load", lambda *_: lambda **kwargs: Layer.forward(layers[0], **kwargs))
        with pytest.raises(RecipeError, match="differs from eager"):
            aoti.export([unit], tmp_path, "k")
    said = []
    aoti.export([unit], tmp_path, "k", said.append)
    assert len(said) == 1 and re.fullmatch(r"exported layer: \d+ s, \d\.\d MB", said[0])
    aoti.bind([unit], tmp_path, "k")
    with torch.no_grad():
        for layer in layers:
            assert relative(layer(**unit.arguments), Layer.forward(layer, **unit.arguments)) < 0.02


@pytest.fixture
def bound(make_args, folder, monkeypatch):
    """The first case's pipeline on its package, which the test above has made."""
    def make(use_cached=True, **changes):
        args = arguments(make_args, folder, *CASES["schnell, float32"])
        args.use_cached_model = use_cached
        vars(args).update(changes)
        return optimize(load_pipeline(args), args, StageLog()), args
    return make


@pytest.fixture
def step(bound):
    """A single block on its package, and the arguments of one call."""
    pipeline, args = bound()
    block = pipeline.transformer.single_transformer_blocks[0]
    [unit] = aoti.capture({"single": [block]}, lambda: latents(pipeline, args))
    return block, unit.arguments


def test_wrong_inputs_are_named_and_never_computed(step):
    block, good = step
    with torch.no_grad():
        expected = block(**good)[1]
        for name, change, said in (
                ("hidden_states", lambda x: x[:, :-1], r"'hidden_states'.*\(1, 63, 256\).*\(1, 64, 256\)"),
                ("hidden_states", lambda x: x.repeat(2, 1, 1), r"\(2, 64, 256\)"),
                ("hidden_states", torch.Tensor.bfloat16, "bfloat16.*float32"),
                ("temb", torch.Tensor.double, "'temb'.*float64"),
                ("encoder_hidden_states", lambda x: None, "'encoder_hidden_states'.*None"),
                ("joint_attention_kwargs", lambda x: {"scale": 0.5}, "scale.*0.5")):
            with pytest.raises(RecipeError, match=said):
                block(**good | {name: change(good.get(name))})
        with pytest.raises(TypeError):
            block(good["hidden_states"], surprise=1)
        odd = good | {"hidden_states": good["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)}
        assert not odd["hidden_states"].is_contiguous() and torch.equal(block(**odd)[1], expected)
        positional = [good.pop(name) for name in ("hidden_states", "encoder_hidden_states", "temb")]
        assert torch.equal(block(*positional, **good)[1], expected)


def test_the_weights_are_the_modules_own(step):
    block, good = step
    with torch.no_grad():
        before = block(**good)[1]
        block.proj_out.bias += 1.0
        after = block(**good)[1]
        reference = type(block).forward(block, **good)[1]
    assert relative(after, reference) < 1e-4 < relative(before, reference)


def spoil(folder, name, change):
    change(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in folder.glob("*.pt2"):
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": package_store._sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copied(bound, folder, tmp_path, monkeypatch):
    """A cache of its own with the first case's package in it; exporting copies that again."""
    pipeline, _ = bound()
    key = pipeline.techniques["compile"].how.split("loaded ")[1]
    root = open_store(tmp_path)
    shutil.copytree(folder / "packages" / key, root / key)
    exports = []

    def export(units, temporary, key_, say):
        exports.append(key_)
        for path in (folder / "packages" / key).glob("*.pt2"):
            shutil.copy(path, temporary)

    monkeypatch.setattr(aoti, "export", export)
    return root / key, exports


@pytest.mark.parametrize("fault", ["flipped", "truncated", "swapped", "junk"])
def test_a_damaged_package_is_replaced_or_stops(bound, copied, capfd, fault):
    package, exports = copied
    if fault == "flipped":
        data = bytearray((package / "double.pt2").read_bytes())
        data[1000] ^= 255
        (package / "double.pt2").write_bytes(data)
    elif fault == "truncated":
        (package / "double.pt2").write_bytes((package / "double.pt2").read_bytes()[:5000])
    elif fault == "swapped":  # whole, hashed, and another block's code
        spoil(package, "double.pt2", lambda path: shutil.copy(package / "single.pt2", path))
    else:
        spoil(package, "double.pt2", lambda path: path.write_bytes(b"no archive"))
    kept = package.with_name("kept")
    shutil.copytree(package, kept)
    with pytest.raises(RecipeError, match=r"--use-cached-model.*double\.pt2.*Run once without"):
        bound(cache_dir=str(package.parent.parent))
    assert not exports and not package.exists()
    shutil.copytree(kept, package)
    pipeline, args = bound(use_cached=False, cache_dir=str(package.parent.parent), quiet=False)
    assert exports == [package.name] and "double.pt2" in capfd.readouterr().err
    assert torch.isfinite(latents(pipeline, args)).all() and package_store.verify(package)
    assert len(list(package.parent.glob("rejected-*"))) == 2


def test_a_package_of_another_machine_is_not_found(bound, copied):
    package, exports = copied
    fields = package_store.verify(package)["fields"]
    shutil.rmtree(package)
    with pytest.raises(RecipeError, match=r"there is no package.*which is empty"):
        bound(cache_dir=str(package.parent.parent))
    other = fields | {"versions": fields["versions"] | {"torch": "1.0"}, "machine": {"gpu": "H100"}}
    publish(package.parent, other, lambda temporary: (temporary / "double.pt2").write_bytes(b""))
    with pytest.raises(RecipeError, match=rf"nearest is {key_of(other)}.*machine\.gpu: there H100, here None.*torch: "):
        bound(cache_dir=str(package.parent.parent))
    assert not exports


def test_by_default_the_first_start_exports_and_the_next_loads(bound, copied, monkeypatch, capfd):
    package, exports = copied
    shutil.rmtree(package)
    packaged = aoti.packaged  # without the VAE, whose package this module does not make
    monkeypatch.setattr(aoti, "packaged", lambda pipeline, blocks, vae, *rest: packaged(pipeline, blocks, False, *rest))
    for said in ("exported", "loaded"):
        pipeline, args = bound(use_cached=False, compile_export_mode=None, vae_tiling=False, quiet=False,
                               cache_dir=str(package.parent.parent))
        assert pipeline.techniques["compile"].how.startswith(f"double, single: {said} {package.name}")
        assert ("exporting double, single; later starts load them" in capfd.readouterr().err) == (said == "exported")
    assert exports == [package.name] and torch.isfinite(latents(pipeline, args)).all()


class Small(torch.nn.Module):
    """Weights that inductor would write into the code: without a dimension, or of up to eight elements."""

    def __init__(self):
        super().__init__()
        self.colours = torch.nn.Conv2d(4, 3, 1)  # as the VAE's last
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("scales", torch.rand(1))

    def forward(self, x):
        return self.colours(x) * self.scale + self.scales


def test_no_weight_is_compiled_in(tmp_path):
    unit = aoti.Unit("small", [Small(), Small()], dict(x=torch.rand(1, 4, 8, 8)))
    aoti.export([unit], tmp_path, "k")
    fine_tune = aoti.Unit("small", [Small()], unit.arguments)
    aoti.bind([fine_tune], tmp_path, "k")
    module = fine_tune.modules[0]
    with torch.no_grad():
        assert relative(module(**unit.arguments), Small.forward(module, **unit.arguments)) < 1e-5


def test_the_vaes_roundings_are_held_against_float32(build, tmp_path, monkeypatch):
    """Where they are more than `aoti.BOUND`: another memory format passes, any other function does not."""
    monkeypatch.setattr(aoti, "BOUND", 1e-4)
    monkeypatch.setattr(aoti, "write_package", lambda module, arguments, path, *_: path.write_bytes(b""))
    decoder = build("tiny-flux", torch.bfloat16).vae.decoder
    unit = aoti.Unit("decoder", [decoder], {"sample": torch.randn(1, 16, 16, 16).bfloat16()})

    def export(change):
        other = copy.deepcopy(decoder)
        change(other)
        monkeypatch.setattr(aoti, "_load", lambda *_: other)
        aoti.export([unit], tmp_path, "k")

    export(lambda other: other.to(memory_format=torch.channels_last))
    for wrong in (lambda other: other.conv_out.bias.data.add_(0.1),
                  lambda other: other.mid_block.resnets[0].conv1.weight.data.zero_(),
                  lambda other: other.conv_norm_out.weight.data.fill_(float("nan"))):
        with pytest.raises(RecipeError, match="decoder differs from eager"):
            export(wrong)
    unit.name = "double"
    with pytest.raises(RecipeError, match="double differs from eager"):
        export(lambda other: other.to(memory_format=torch.channels_last))


@pytest.mark.slow
@torch.no_grad()
def test_a_package_of_the_fused_decoder(build, tmp_path):
    """Its norms, attention and upsamplers, which on a CPU are never fused, by their references."""
    fused_vae = pytest.importorskip("utils.fused_vae", reason="Triton is not installed: pip install triton")
    vae = build("tiny-flux").vae.to(memory_format=torch.channels_last)
    assert min(fused_vae.fuse_vae(vae)) > 0
    unit = aoti.Unit("decoder", [vae.decoder], {"sample": torch.randn(1, 16, 8, 12)})
    expected = vae.decoder(**unit.arguments)
    aoti.export([unit], tmp_path, "k")
    aoti.bind([unit], tmp_path, "k")
    found = vae.decoder(**unit.arguments)
    assert relative(found, expected) < 1e-5 and found.is_contiguous(memory_format=torch.channels_last)


def test_re_export_makes_it_anew(bound, copied):
    package, exports = copied
    bound(use_cached=False, re_export=True, cache_dir=str(package.parent.parent))
    assert exports == [package.name] and package_store.verify(package)


def test_missing_packages_are_fetched_where_asked(bound, copied, monkeypatch, tmp_path):
    package, exports = copied
    digest = package_store.pack(package, tmp_path / f"{package.name}.zip")
    shutil.rmtree(package)
    monkeypatch.setattr(package_store, "hf_hub_download", lambda repo, name, revision: str(tmp_path / name))
    pipeline, args = bound(cache_dir=str(package.parent.parent), package_from=f"me/packages@v1:{digest}")
    assert "fetched" in pipeline.techniques["compile"].how and not exports
    assert torch.isfinite(latents(pipeline, args)).all() and package_store.verify(package)


def test_other_switches_are_other_packages(bound, copied):
    _, exports = copied
    for changes in ({"height": 96}, {"num_images_per_prompt": 2}, {"disable_fused_projections": True}):
        before = len(exports)
        with pytest.raises(RecipeError, match=r"double\.pt2 was made for"):  # the copy is other code
            bound(use_cached=False, cache_dir=str(copied[0].parent.parent), **changes)
        assert len(exports) == before + 1 and exports[-1] not in exports[:-1]


def test_the_command_line(copied, monkeypatch, capsys):
    package, _ = copied

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["aoti", *argv, "--cache-dir", str(package.parent.parent)])
        aoti.main()
        return capsys.readouterr().out

    monkeypatch.chdir(package.parent.parent)
    digest, name = run("pack", package.name).split()
    assert len(digest) == 64 and (package.parent.parent / name).exists()
    assert package.name in run("list") and "fits this machine" in run("verify")
    shutil.copytree(package, package.with_name(f"rejected-{package.name}-0"))
    assert "set aside" in run("list")
    (package / "single.pt2").write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        run("verify")
    assert "single.pt2 is damaged" in capsys.readouterr().out
    assert "removed" in run("clean") and not package.exists() and run("list") == ""
