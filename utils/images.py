"""Image files whose metadata has the generation parameters."""

import hashlib
import json
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from utils.benchmark_utils import computed_steps
from utils.common import BrokenResult, RecipeError
from utils.flaws import flaw_of, raise_errors
from utils.outputs import as_path, atomic_write, free_name, write_or_rescue

EXIF_IMAGE_DESCRIPTION = 0x010E


def numbered_path(path: str | Path, *numbers: int) -> Path:
    """output.png, 3, 42 -> output_003_42.png. The first number is padded with zeros, so that the files sort."""
    path = as_path(path)
    name = "_".join([path.stem, *(f"{n:03d}" if i == 0 else str(n) for i, n in enumerate(numbers))])
    return path.with_name(name + path.suffix)


def image_parameters(args, pipeline, kwargs: dict, prompt: str, seed: int) -> dict:
    """The generation parameters for an image file's metadata.

    "model", "transformer", "lora", "image", "mask_image" and "control_image" are names as the user gave them. The
    digests in "contents" and "image_sha256" (of the picture as the pipeline gets it) identify the files. "steps" is the
    number of computed steps if "strength" skips others.

    Args:
        pipeline: the pipeline after `load_pipeline`, which sets `contents`, and `optimize`.
        kwargs: the arguments of the pipeline call (`call_kwargs`).
    """
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    parameters = {"prompt": prompt, "seed": seed, "model": args.ckpt, "revision": args.revision,
                  "transformer": args.transformer, "lora": args.lora,
                  "image": args.image, "random_weights": args.random_weights is not None,
                  "contents": getattr(pipeline, "contents", {}),
                  "vae_tiling": args.vae_tiling, "quality": args.quality, "techniques": pipeline.plan.parameters(),
                  **{name: kwargs[name] for name in names}}
    if args.max_sequence_length:
        parameters["max_sequence_length"] = kwargs["max_sequence_length"]
    if "negative_prompt" in kwargs:
        parameters |= {"negative_prompt": args.negative_prompt, "true_cfg_scale": args.true_cfg_scale}
    if args.redux:
        parameters |= {"redux": args.redux} | pipeline.redux
    if "strength" in kwargs:
        parameters |= {"strength": kwargs["strength"],
                       "steps": computed_steps(kwargs["num_inference_steps"], kwargs["strength"])}
    for name in ("image", "mask_image", "control_image"):
        if name in kwargs:
            image = kwargs[name][0] if isinstance(kwargs[name], list) else kwargs[name]
            pixels = f"{image.mode} {image.size}".encode() + image.tobytes()
            parameters |= {name: getattr(args, name), f"{name}_sha256": hashlib.sha256(pixels).hexdigest()}
    return parameters


def write_picture(image: PIL.Image.Image, path: Path, parameters: dict) -> None:
    """Writes an image file with `parameters` as JSON in its metadata.

    PNG: the text chunk "parameters". JPEG and WebP: EXIF's image description.
    """
    text = json.dumps(parameters)
    if path.suffix.lower() == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        image.save(path, pnginfo=info)
    else:
        exif = PIL.Image.Exif()
        exif[EXIF_IMAGE_DESCRIPTION] = text
        image.save(path, exif=exif, quality=95)


def save_image(image: PIL.Image.Image, path: str | Path, parameters: dict) -> None:
    """Writes an image with its parameters atomically.

    Raises:
        OSError: the write failed, or `path` exists and is not an image of this program.
    """
    with atomic_write(path, is_our_image) as temporary:
        write_picture(image, temporary, parameters)


def keep_image(image: PIL.Image.Image, path: Path, parameters: dict, is_finite: bool) -> RecipeError | None:
    """Saves an image as `path`. A broken image, or an image that cannot be saved there, gets another name.

    Args:
        is_finite: the image's element of `utils.postprocess.CheckedImageProcessor.finite`.

    Returns:
        None; or an error, not raised, with the reason and the path of the saved image.
    """
    flaw = flaw_of(image, is_finite)
    target = free_name(path, "broken") if flaw else path
    error = write_or_rescue(lambda file: save_image(image, file, parameters), target, "picture")
    if flaw:
        return BrokenResult(f"{path}: {flaw}. " + (str(error) if error else f"It is kept as {target}"))
    return error


def keep_images(pipeline, images: list, paths: list[Path], parameters: list[dict], log) -> None:
    """Checks and saves the images of a pipeline call.

    Raises:
        RecipeError: an image is broken or was not saved as its path (see `raise_errors`). All images are kept before.
    """
    errors = []
    for image, path, image_params, is_finite in zip(images, paths, parameters,
                                                    pipeline.image_processor.finite.tolist(), strict=True):
        error = keep_image(image, path, image_params, is_finite)
        if error:
            errors.append(error)
        else:
            log.line(f"wrote {path}")
    raise_errors(errors, pipeline)


def read_parameters(path: str | Path) -> dict:
    """Reads the parameters that `write_picture` wrote into the file's metadata."""
    with PIL.Image.open(path) as image:
        return json.loads(image.info.get("parameters") or image.getexif()[EXIF_IMAGE_DESCRIPTION])


def is_our_image(path: Path) -> bool:
    """Whether the file is an image of this program. If not, it returns False or raises any exception."""
    return "techniques" in dict(read_parameters(path))


def decode(path: Path) -> None:
    """Decodes a whole image file. Raises any of PIL's exceptions if the file is truncated or damaged."""
    with PIL.Image.open(path) as image:
        if image.format == "PNG":
            image.verify()  # the checksums and the end chunk
    with PIL.Image.open(path) as image:
        image.load()
