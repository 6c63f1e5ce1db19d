"""Every task of the FLUX.1 family against diffusers' own pipeline of it, with the same random weights and seeds."""


import json
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import pretend_hopper, relative
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor

import gen_image
from utils import checkpoint, pipeline_utils, random_weights, tasks
from utils.benchmark_utils import check_args, computed_steps
from utils.cache import dbcache
from utils.checkpoint import configs_of, identify, image_settings, read_configs
from utils.common import RecipeError
from utils.hardware import Hardware
from utils.images import image_parameters
from utils.memory import _memory_needed
from utils.pipeline_utils import call_kwargs, check_pictures, load_pipeline, optimize
from utils.plan import make_plan
from utils.postprocess import GPUImageProcessor
from utils.reference_image import fitted_mask, load_mask
from utils.tasks import as_task, current_step, current_timestep

# {case: (model, diffusers' class, --strength, picture flags)}
CASES = {
    "schnell, image": ("tiny-flux", FluxImg2ImgPipeline, 0.6, ["image"]),
    "dev, image": ("tiny-flux-dev", FluxImg2ImgPipeline, 0.3, ["image"]),
    "dev, inpainting": ("tiny-flux-dev", FluxInpaintPipeline, 0.7, ["image", "mask_image"]),
    "Kontext, inpainting": ("tiny-kontext", FluxKontextInpaintPipeline, 0.8, ["image", "mask_image"]),
    "Fill": ("tiny-fill", FluxFillPipeline, 1.0, ["image", "mask_image"]),
    "Depth": ("tiny-depth", FluxControlPipeline, None, ["control_image"]),
    "Canny": ("tiny-canny", FluxControlPipeline, None, ["control_image"]),
}
STEPS, WIDTH, HEIGHT = 5, 96, 64
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def pictures(tmp_path):
    """{flag: path} of pictures that are larger than the output and have its shape."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels).resize((240, 160), PIL.Image.Resampling.BICUBIC)
    mask = PIL.Image.new("L", picture.size)
    mask.paste(255, (90, 40, 200, 130))
    files = {"image": picture, "mask_image": mask, "control_image": picture.convert("L")}
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in files}


@pytest.fixture
def arguments(make_args, pictures):
    """The command line of a case, with random weights in float32 unless `argv` has flags against it."""
    def make(case, *argv, exact=True):
        model, _, strength, names = CASES[case]
        given = [part for name in names for part in (f"--{name}", pictures[name])]
        given += ["--strength", str(strength)] if strength else []
        return make_args("--ckpt", model, "--random_weights", "--num_inference_steps", str(STEPS), "--width",
                         str(WIDTH), "--height", str(HEIGHT), *given, *(["--disable_bf16"] if exact else []), *argv)
    return make


def latents(pipeline, args, **kwargs):
    return pipeline(**call_kwargs(pipeline, args, **kwargs), output_type="latent").images


def of_diffusers(build, case, args, pictures, count=1, dtype=torch.float32):
    """The latents of diffusers' own pipeline, called as its documentation does, with pictures as they are in files."""
    model, pipeline_class, strength, names = CASES[case]
    base = build(model, dtype)
    pipeline = pipeline_class(**{name: part for name, part in base.components.items() if part is not None})
    pipeline.set_progress_bar_config(disable=True)
    given = {name: PIL.Image.open(pictures[name]) for name in names}
    if pipeline_class is FluxKontextInpaintPipeline:  # it takes the size of its image, whatever height and width
        given = {name: image.resize((WIDTH, HEIGHT), PIL.Image.Resampling.LANCZOS) for name, image in given.items()}
        given["_auto_resize"] = False
    if pipeline_class is FluxControlPipeline:
        given["control_image"] = given["control_image"].convert("RGB")
    elif count > 1 and pipeline_class is not FluxKontextInpaintPipeline:
        given = {name: [image] * count for name, image in given.items()}
    guidance = {"tiny-flux": 0.0, "tiny-flux-dev": 3.5, "tiny-kontext": 2.5, "tiny-fill": 30.0, "tiny-depth": 10.0,
                "tiny-canny": 30.0}[model]
    return pipeline(prompt=args.prompt, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, max_sequence_length=64,
                    guidance_scale=guidance, num_images_per_prompt=count, output_type="latent",
                    generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
                    **given, **(dict(strength=strength) if strength else {})).images


@each_case
def test_loaded_pipeline_draws_as_diffusers(build, arguments, pictures, case):
    args = arguments(case)
    pipeline = load_pipeline(args)
    assert type(pipeline) is CASES[case][1]
    assert torch.equal(latents(pipeline, args), of_diffusers(build, case, args, pictures))


@each_case
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_optimized_pipeline_draws_as_diffusers(build, arguments, pictures, case, count):
    args = arguments(case, "--num_images_per_prompt", str(count))
    pipeline = optimize(load_pipeline(args), args)
    expected = of_diffusers(build, case, args, pictures, count)
    assert expected.shape[0] == count and relative(latents(pipeline, args), expected) < 1e-5  # 3e-7 measured


@each_case
def test_image_of_a_batch_is_that_of_its_own_call(arguments, case):
    """Each image is encoded with its own generator; its seed decides it, not its place in a batch."""
    args = arguments(case)
    pipeline = load_pipeline(args)
    both = latents(pipeline, args, prompt=[args.prompt, "a dog"], seed=[7, 42])
    for found, prompt, seed in zip(both, (args.prompt, "a dog"), (7, 42), strict=True):
        assert relative(found[None], latents(pipeline, args, prompt=prompt, seed=seed)) < 1e-5


@each_case
def test_steps_are_those_that_strength_leaves(arguments, case):
    args, ran = arguments(case), []
    pipeline = optimize(load_pipeline(args), args)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, given, kwargs: ran.append((current_step(pipeline.scheduler), current_timestep(pipeline),
                                                  kwargs["timestep"])), with_kwargs=True)
    for _ in range(2):  # the second image starts from the first one's counter
        ran.clear()
        kwargs = call_kwargs(pipeline, args)
        pipeline(**kwargs, output_type="latent")
        steps = {"schnell, image": 3, "dev, image": 2, "dev, inpainting": 4, "Kontext, inpainting": 4}.get(case, STEPS)
        assert [step for step, _, _ in ran] == list(range(steps))
        assert pipeline.plan.settings.steps == steps == image_settings(args, configs_of(pipeline)).steps
        schedule = pipeline.scheduler.timesteps
        for i, (_, now, given) in enumerate(ran):
            assert now.data_ptr() == schedule[STEPS - steps + i].data_ptr()  # a view, as the modulations need
            assert torch.allclose(given, now / 1000)
        assert current_timestep(pipeline) is None
    found = image_parameters(args, pipeline, kwargs, args.prompt, args.seed)
    if CASES[case][2]:
        assert (found["strength"], found["steps"]) == (CASES[case][2], steps)
    names = [name for name in tasks.PICTURES if f"{name}_sha256" in found]
    assert names == CASES[case][3] and len({found[f"{name}_sha256"] for name in names}) == len(names)


def test_current_timestep_before_the_first_image_is_none(build):
    assert current_timestep(as_task(build("tiny-flux-dev"), tasks.FROM_IMAGE)) is None
    assert current_timestep(build("tiny-flux-dev")) is None


@pytest.mark.parametrize("steps, strength", [(4, 0.6), (28, 0.6), (28, 0.01), (28, 1.0), (50, 0.3), (7, 0.5), (1, 0.1)])
def test_computed_steps_are_diffusers(build, steps, strength):
    pipeline = as_task(build("tiny-flux-dev", layers="1+1"), tasks.FROM_IMAGE)
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.0)
    assert computed_steps(steps, strength) == len(pipeline.get_timesteps(steps, strength, "cpu")[0])


# --- what exists works with them ---

@each_case
@pytest.mark.parametrize("quality", ["fast", pytest.param("high", marks=pytest.mark.slow)])
def test_fused_pipeline_is_near_diffusers_and_prepares_all_steps_at_once(build, arguments, pictures, monkeypatch, case,
                                                                         quality):
    """The kernels' references. One GEMM makes the modulations of all steps, and the last block its own tokens alone."""
    pytest.importorskip("triton")
    from utils.kernels.modulation import Modulations

    prepared, made, table = [], [], Modulations.table
    monkeypatch.setattr(Modulations, "table", lambda self, timesteps, *rest: (
        prepared.append(len(timesteps)), table(self, timesteps, *rest))[1])
    pretend_hopper(monkeypatch)
    args = arguments(case, "--skip_fp8_check", "--quality", quality, exact=False)
    pipeline = optimize(load_pipeline(args), args)
    pipeline.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda module, given, found: made.append(found[1].shape[1]))
    found = latents(pipeline, args)
    assert prepared == [STEPS]
    assert set(made) == {WIDTH * HEIGHT // 256} and len(made) == pipeline.plan.settings.steps
    expected = of_diffusers(build, case, args, pictures, dtype=torch.bfloat16)
    assert relative(found, expected) < 0.03, relative(found, expected)


@pytest.mark.parametrize("case", ["dev, image", "Fill", "Kontext, inpainting"])
def test_fp8_check_measures_two_different_steps_and_the_finished_recipe(arguments, monkeypatch, case):
    """The warm-up's first step has the timestep of the check's first step, though `strength` skips others."""
    pytest.importorskip("triton")
    pretend_hopper(monkeypatch, ["attention", "quantization", "fused_kernels", "cuda_graphs"])
    args = arguments(case, exact=False)
    pipeline = optimize(load_pipeline(args), args)
    errors = pipeline.fp8_check["errors"]
    assert errors["first"] != errors["middle"] and 0 < pipeline.fp8_check["difference"] < 0.1
    assert errors["finished"] == pytest.approx(errors["first"], rel=0.2)


@pytest.mark.parametrize("cache", ["taylorseer", "fast"])
@pytest.mark.parametrize("case", ["dev, image", "dev, inpainting", "Fill", "Depth"])
def test_step_cache_knows_the_computed_steps(arguments, case, cache):
    if cache == "fast":
        pytest.importorskip("cache_dit")
    args = arguments(case, "--step_cache", cache, "--force_cache" if cache == "fast" else "--quiet",
                     "--num_inference_steps", "30", "--strength" if CASES[case][2] else "--seed",
                     "0.4" if CASES[case][2] else "1")
    steps = 12 if CASES[case][2] else 30
    pipeline = optimize(load_pipeline(args), args)
    chosen = pipeline.plan.step_cache
    mask = chosen.mask or chosen.dbcache.steps_computation_mask
    assert len(mask) == steps
    for _ in range(2):
        latents(pipeline, args)
        assert dbcache.cached_steps(pipeline) == [step for step in range(steps) if mask[step] == "0"] != []


def test_step_cache_of_too_few_computed_steps_is_refused(arguments):
    args = arguments("dev, image", "--step_cache", "taylorseer", "--num_inference_steps", "28", "--strength", "0.2")
    with pytest.raises(RecipeError, match=r"taylorseer.* 6 steps"):
        load_pipeline(args)


@pytest.mark.parametrize("case", ["dev, inpainting", "Kontext, inpainting", "Fill", "Depth"])
def test_batch_draws_as_diffusers_and_encodes_one_picture_at_a_time(build, arguments, pictures, case):
    """Compiled code and packages of the encoder see one shape, so that a batch needs no second graph of it."""
    args = arguments(case, "--num_images_per_prompt", "2")
    pipeline, shapes = load_pipeline(args), set()
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, given: shapes.add(tuple(given[0].shape)))
    pipeline = optimize(pipeline, args)
    assert relative(latents(pipeline, args), of_diffusers(build, case, args, pictures, 2)) < 1e-4
    assert shapes == {(1, 3, HEIGHT, WIDTH)}


def test_memory_of_a_task_that_encodes_counts_the_encoder(make_args, pictures):
    def working(*argv):
        args = make_args("--ckpt", "FLUX.1-dev", "--height", "1024", "--width", "1024", *argv)
        configs = random_weights.architecture("FLUX.1-dev", "1+1")
        return _memory_needed(args, configs, make_plan(args, configs, Hardware("cpu")))[2]

    assert working("--image", pictures["image"]) - working() == pytest.approx(1.7 * 2**30, rel=1e-3)


def test_preprocessing_on_the_gpu_is_diffusers(pictures):
    """Of one picture, a list, a mask; all of them on one device."""
    image = PIL.Image.open(pictures["image"]).resize((WIDTH, HEIGHT))
    mask = PIL.Image.open(pictures["mask_image"]).resize((WIDTH, HEIGHT))
    options = dict(crops_coords=None, resize_mode="default")
    for given, settings in ((image, {}), ([image, image.rotate(180)], {}), (mask, dict(
            do_normalize=False, do_binarize=True, do_convert_grayscale=True))):
        for more in ({}, options):
            found, expected = (kind(vae_scale_factor=16, **settings).preprocess(given, HEIGHT, WIDTH, **more)
                               for kind in (GPUImageProcessor, VaeImageProcessor))
            assert torch.equal(found, expected)


# --- which model, which task ---

@pytest.mark.parametrize("name, model, steps, guidance", [
    ("FLUX.1-Fill-dev", "fill", 50, 30.0), ("FLUX.1-Depth-dev", "depth", 30, 10.0),
    ("FLUX.1-Canny-dev", "canny", 50, 30.0), ("FLUX.1-Krea-dev", "krea", 28, 4.5), ("FLUX.1-dev", "dev", 28, 3.5)])
def test_image_settings_are_those_of_the_model_card(make_args, name, model, steps, guidance):
    args, configs = make_args("--ckpt", f"black-forest-labs/{name}"), random_weights.architecture(name)
    settings = image_settings(args, configs)
    assert (settings.model.name, settings.num_inference_steps, settings.guidance_scale, settings.max_sequence_length
            ) == (model, steps, guidance, 512)
    channels = {"fill": 384, "depth": 128, "canny": 128}.get(model, 64)
    assert checkpoint.model_shapes(configs)["transformer"]["x_embedder.weight"][1] == channels
    assert checkpoint.model_shapes(configs)["transformer"]["proj_out.weight"][0] == 64


@pytest.mark.parametrize("name", ["tiny-fill", "tiny-depth", "tiny-flux-dev"])
def test_load_pipeline_of_a_folder_is_the_task(build, tmp_path, make_args, pictures, name):
    build(name).save_pretrained(tmp_path / name)
    assert identify(read_configs(str(tmp_path / name))).name == identify(random_weights.architecture(name)).name
    flags = ["--control_image"] if name == "tiny-depth" else ["--image", "--mask_image"]
    given = [part for flag in flags for part in (flag, pictures[flag[2:]])]
    args = make_args("--ckpt", str(tmp_path / name), *given)
    pipeline = load_pipeline(args)
    assert type(pipeline) is image_settings(args, configs_of(pipeline)).task.pipeline


def test_read_configs_of_fill_with_the_channels_of_dev_is_refused(build, tmp_path):
    pipeline = build("tiny-flux-dev", layers="1+1")
    as_task(pipeline, tasks.FILLING).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"in_channels 64 .*FluxFillPipeline has 384"):
        read_configs(str(tmp_path))


def test_as_task_shares_weights_and_keeps_the_scheduler(build):
    pipeline = build("tiny-flux-dev", layers="1+1")
    other = as_task(pipeline, tasks.INPAINTING)
    assert other.transformer is pipeline.transformer and other.vae is pipeline.vae
    assert isinstance(other.scheduler, FlowMatchEulerDiscreteScheduler) and as_task(other, tasks.INPAINTING) is other


@pytest.mark.parametrize("ckpt, flags, text", [
    ("tiny-flux-dev", ["control_image"], "--control_image is for black-forest-labs/FLUX.1-Depth-dev"),
    ("tiny-flux-dev", ["image", "control_image"], "gives --image and --control_image"),
    ("tiny-fill", ["image"], "--image PATH_OR_URL and --mask_image PATH_OR_URL.*gives --image\\."),
    ("tiny-fill", [], "gives none"), ("tiny-depth", ["image"], "--control_image PATH_OR_URL"),
    ("tiny-flux-dev", ["--strength", "0.5"], "--strength 0.5 .*--image"),
    ("tiny-kontext", ["image", "--strength", "0.5"], "--strength 0.5 .*editing"),
    ("tiny-fill", ["image", "mask_image", "--negative_prompt", "red", "--true_cfg_scale", "2"], "--true_cfg_scale 2"),
])
def test_load_pipeline_pictures_that_do_not_fit_the_model_are_refused(make_args, pictures, monkeypatch, ckpt, flags,
                                                                      text):
    monkeypatch.setattr(random_weights, "build", lambda *_: pytest.fail("weights were built first"))
    argv = [part for flag in flags for part in ([f"--{flag}", pictures[flag]] if flag in pictures else [flag])]
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        load_pipeline(make_args("--ckpt", ckpt, "--random_weights", *argv))


# --- pictures as people have them ---

def settings_for(make_args, pictures, *argv, ckpt="FLUX.1-dev"):
    args = make_args("--ckpt", ckpt, "--image", pictures["image"], "--mask_image", pictures["mask_image"], *argv)
    return args, image_settings(args, random_weights.architecture(ckpt))


@pytest.mark.parametrize("ckpt, size, argv, expected", [
    ("FLUX.1-dev", (900, 600), [], (1248, 832)), ("FLUX.1-dev", (300, 400), ["--width", "480"], (480, 640)),
    ("FLUX.1-dev", (300, 400), ["--height", "640"], (480, 640)), ("FLUX.1-Fill-dev", (64, 64), [], (1024, 1024)),
    ("FLUX.1-dev", (900, 600), ["--width", "512", "--height", "512"], (512, 512)),
    ("FLUX.1-Kontext-dev", (900, 600), [], (1248, 832)), ("tiny-flux-dev", (900, 600), [], (160, 112)),
])
def test_output_has_the_shape_of_the_picture(make_args, pictures, tmp_path, ckpt, size, argv, expected):
    for name in ("image", "mask_image"):
        PIL.Image.open(pictures[name]).resize(size).save(tmp_path / f"{name}_of_{size[0]}.png")
        pictures[name] = str(tmp_path / f"{name}_of_{size[0]}.png")
    _, settings = settings_for(make_args, pictures, *argv, ckpt=ckpt)
    assert (settings.width, settings.height) == expected


def mask_files(path):
    """{name: picture} of one mask as people save it; white in the left half."""
    bits = np.zeros((64, 96), dtype=np.uint8)
    bits[:, :48] = 255
    gray = PIL.Image.fromarray(bits)
    deep = PIL.Image.fromarray(bits.astype(np.uint16) * 257)
    return {"gray.png": gray, "rgb.jpg": gray.convert("RGB"), "palette.png": gray.convert("P"),
            "bits.png": gray.convert("1"), "deep.png": deep, "cmyk.tif": gray.convert("RGB").convert("CMYK"),
            "opaque.png": gray.convert("RGBA"), "large.png": gray.resize((960, 640)),
            "soft.png": PIL.Image.fromarray((bits * 0.6 + 40).astype(np.uint8)), "animated.gif": gray}


@pytest.mark.parametrize("name", list(mask_files("")))
def test_mask_of_each_kind_of_file_is_the_same(tmp_path, name):
    picture = mask_files("")[name]
    more = dict(save_all=True, append_images=[picture.rotate(180)]) if name == "animated.gif" else {}
    picture.save(tmp_path / name, **more)
    found = np.asarray(fitted_mask(load_mask(str(tmp_path / name)), (96, 64), (96, 64)))
    assert found.shape == (64, 96) and (found[:, :48] == 255).all() and (found[:, 48:] == 0).all()


def test_mask_with_exif_rotation_is_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    mask_files("")["rgb.jpg"].save(tmp_path / "turned.jpg", exif=exif)
    found = np.asarray(fitted_mask(load_mask(str(tmp_path / "turned.jpg")), (96, 64), (96, 64)))
    assert (found[:, :40] == 0).all() and (found[:, 56:] == 255).all()


def test_mask_is_cropped_like_its_image(make_args, pictures, capsys):
    """A picture of 3:2 in a square loses its sides, not its proportions."""
    args, settings = settings_for(make_args, pictures, "--width", "160", "--height", "160", ckpt="tiny-flux-dev")
    check_pictures(settings, args)
    assert "cropped" in capsys.readouterr().err
    mask = np.asarray(fitted_mask(load_mask(pictures["mask_image"]), (240, 160), (160, 160)))
    expected = np.zeros((160, 160))
    expected[40:130, 50:] = 255  # 40 pixels are cut off at the left and at the right
    assert (mask == expected).all()


@pytest.mark.parametrize("draw, text", [
    (lambda mask: PIL.Image.new("L", mask.size), "black.*White marks"),
    (lambda mask: PIL.Image.new("L", (100, 400), 255), "100x400 pixels.*240x160"),
    (lambda mask: PIL.Image.merge("LA", (mask, mask)), "transparent.*white where"),
    (lambda mask: PIL.Image.fromarray(np.asarray(mask) / np.float32(255)), "floats"),
])
def test_load_pipeline_mask_that_cannot_be_meant_is_refused(make_args, pictures, tmp_path, monkeypatch, draw, text):
    monkeypatch.setattr(random_weights, "build", lambda *_: pytest.fail("weights were built first"))
    path = tmp_path / "bad.tif"
    draw(PIL.Image.open(pictures["mask_image"])).save(path)
    args, _ = settings_for(make_args, pictures | {"mask_image": str(path)}, "--random_weights", ckpt="tiny-flux-dev")
    with pytest.raises(RecipeError, match=f"(?s)--mask_image .*{text}"):
        load_pipeline(args)


def test_white_mask_repaints_everything_and_says_so(make_args, pictures, tmp_path, capsys):
    """Inpainting of the whole picture is image to image."""
    PIL.Image.new("L", (240, 160), 255).save(tmp_path / "white.png")
    white = pictures | {"mask_image": str(tmp_path / "white.png")}
    common = ["--random_weights", "--disable_bf16", "--width", "96", "--height", "64", "--num_inference_steps", "3"]
    args, _ = settings_for(make_args, white, *common, ckpt="tiny-flux-dev")
    found = latents(load_pipeline(args), args)
    assert "white everywhere" in capsys.readouterr().err
    args.mask_image = None
    assert relative(found, latents(load_pipeline(args), args)) < 1e-6


def test_inpainting_with_trained_weights_keeps_what_the_mask_leaves(make_args, tmp_path):
    """Pixels outside of the mask are the VAE's copy of the picture; the others change."""
    drawer = make_args("--ckpt", "tiny-flux", "--prompt", "3d frog on a teal background")
    pipeline = load_pipeline(drawer)
    source = pipeline(**call_kwargs(pipeline, drawer)).images[0]
    mask = PIL.Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    source.save(tmp_path / "x.png")
    mask.save(tmp_path / "mask.png")
    args = make_args("--ckpt", "tiny-flux-dev", "--image", str(tmp_path / "x.png"), "--mask_image",
                     str(tmp_path / "mask.png"), "--strength", "0.9", "--num_inference_steps", "8", "--prompt",
                     "3d frog on a purple background")
    pipeline = load_pipeline(args)
    found = pipeline(**call_kwargs(pipeline, args)).images[0]
    change = np.abs(np.asarray(found).astype(int) - np.asarray(source)).mean(axis=2)
    assert change[:, :48].mean() < 5 and change[:, 80:].mean() > 30, (change[:, :48].mean(), change[:, 80:].mean())


# --- Redux ---

def test_redux_joins_prompt_and_picture_as_diffusers(make_args, build, pictures):
    args = make_args("--ckpt", "tiny-flux-dev", "--random_weights", "--disable_bf16", "--redux", pictures["image"])
    pipeline = load_pipeline(args)
    found, pooled, ids = pipeline.encode_prompt(args.prompt, max_sequence_length=512)
    prior, base = random_weights.build_redux(256, torch.float32), build("tiny-flux-dev")
    prior = type(prior)(**{name: part for name, part in prior.components.items() if part is not None} | {
        name: getattr(base, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")})
    expected = prior(PIL.Image.open(pictures["image"]), args.prompt)
    assert torch.equal(found, expected.prompt_embeds) and torch.equal(pooled, expected.pooled_prompt_embeds)
    assert ids.shape == (512 + 16, 3) and not ids.any()


@pytest.mark.parametrize("count", [1, 2])
def test_redux_changes_the_picture_by_its_weight(make_args, pictures, count):
    common = ["--ckpt", "tiny-flux", "--random_weights", "--disable_bf16", "--width", "64", "--height", "64",
              "--num_images_per_prompt", str(count)]
    found = {}
    for weight in ("", ":0.5", ":1"):
        args = make_args(*common, "--redux", pictures["image"] + weight)
        pipeline, texts = optimize(load_pipeline(args), args), []
        pipeline.transformer.register_forward_pre_hook(
            lambda module, given, kwargs, texts=texts: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
        latents(pipeline, args)
        found[weight] = texts[0]
        metadata = image_parameters(args, pipeline, call_kwargs(pipeline, args), "", 0)
        assert metadata["redux_weight"] == (0.5 if weight == ":0.5" else 1.0) and len(metadata["redux_sha256"]) == 64
    assert torch.equal(found[""], found[":1"]) and found[""].shape == (count, 64 + 16, 256)
    assert torch.allclose(found[":0.5"][:, 64:], found[""][:, 64:] / 2)
    assert torch.equal(found[":0.5"][:, :64], found[""][:, :64])


def test_redux_of_a_folder_equals_its_pipeline(make_args, build, pictures, tmp_path):
    build("tiny-flux-dev").save_pretrained(tmp_path / "model")
    random_weights.build_redux(256, torch.float32).save_pretrained(tmp_path / "redux")
    common = ["--disable_bf16", "--redux", pictures["image"]]
    of_files = make_args("--ckpt", str(tmp_path / "model"), *common, "--redux_ckpt", str(tmp_path / "redux"))
    at_random = make_args("--ckpt", "tiny-flux-dev", "--random_weights", *common)
    embeds = [load_pipeline(args).encode_prompt("a cat", max_sequence_length=64)[0] for args in (of_files, at_random)]
    assert torch.equal(*(each[:, 64:] for each in embeds)) and relative(*embeds) < 1e-5


@pytest.mark.parametrize("argv, text", [
    (["--ckpt", "tiny-flux-dev", "--redux", "PICTURE", "--redux_ckpt", "REDUX"], "tokens of 512 .*reads tokens of"),
    (["--ckpt", "tiny-flux-dev", "--redux", "PICTURE", "--negative_prompt", "x", "--true_cfg_scale", "2"], "negative"),
    (["--ckpt", "tiny-flux-dev", "--redux", "PICTURE", "--redux_ckpt", "/nowhere"], "--redux_ckpt /nowhere"),
    (["--ckpt", "tiny-flux-dev", "--redux", "PICTURE:3"], "--redux .*:3"),
    (["--ckpt", "tiny-flux-dev", "--redux", "nowhere.png:0.5"], "--redux nowhere.png: there is no such file"),
])
def test_redux_that_cannot_work_is_refused(make_args, pictures, tmp_path, monkeypatch, argv, text):
    random_weights.build_redux(256, torch.float32).save_pretrained(tmp_path / "redux")
    config = tmp_path / "redux" / "image_embedder" / "config.json"
    config.write_text(config.read_text().replace("256", "512"))
    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "from_pretrained",
                        lambda *_, **__: pytest.fail("weights were loaded first"))
    files = {"PICTURE": pictures["image"], "REDUX": str(tmp_path / "redux"), "PICTURE:3": pictures["image"] + ":3"}
    args = make_args(*(files.get(one, one) for one in argv))
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        check_args(args)
        load_pipeline(args)


# --- files of prompts ---

def test_prompts_file_line_with_pictures_equals_its_flags(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": "a cat", "image": pictures["image"], "strength": 0.5},
             {"prompt": "a dog", "image": pictures["image"], "mask_image": pictures["mask_image"]},
             {"prompt": "a cow"}, {"prompt": "a cat", "image": pictures["image"], "width": 112}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--ckpt", "tiny-flux-dev", "--random_weights", "--device", "cpu", "--quiet", "--num_inference_steps", "4",
              "--height", "64"]

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["gen_image.py", *common, *argv])
        gen_image.main()

    run("--prompts-file", "p.jsonl", "--output-file", "x.png")
    assert re.findall(r"line (\d) is left out: it is ([a-z ]+) by", capsys.readouterr().err) == [
        ("2", "inpainting"), ("3", "text to image")]
    assert sorted(path.name for path in tmp_path.glob("x*.png")) == ["x_000_42.png", "x_003_45.png"]
    run("--prompt", "a cat", "--image", pictures["image"], "--strength", "0.5", "--output-file", "y.png")
    with PIL.Image.open("x_000_42.png") as found, PIL.Image.open("y.png") as expected:
        assert found.size == expected.size == (96, 64)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 0.3
