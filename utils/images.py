"""Images out: 8-bit pixels made on the GPU, and files that say how they were made."""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.PngImagePlugin import PngInfo

from utils.common import BrokenResult, RecipeError
from utils.flaws import flaw_of, raise_errors
from utils.outputs import as_path, atomic_write, free_name, write_or_rescue

EXIF_IMAGE_DESCRIPTION = 0x010E


class CheckedImageProcessor(VaeImageProcessor):
    """diffusers' image processor, which also notes whether the images of a call are finite: 8 bits do not tell."""

    device = torch.device("cpu")  # where a reference goes
    finite: torch.Tensor | None = None  # (B,) of the last call, on its device: who reads it waits for the GPU

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """image: (B, 3, H, W) in [-1, 1]. NaN becomes black."""
        if output_type == "pil":
            self.note_finite(image)
            image = image.nan_to_num(nan=-1.0)  # NumPy warns of NaN
        return super().postprocess(image, output_type, do_denormalize)

    def note_finite(self, image: torch.Tensor) -> None:
        self.finite = image.isfinite().all(dim=tuple(range(1, image.ndim)))


class GPUImageProcessor(CheckedImageProcessor):
    """diffusers' image processor, with pixels as 8 bits whenever they are copied between CPU and GPU.

    diffusers copies float32 pixels and rounds them with NumPy: 23.2 ms for 1024x1024, and 2.8 this way (H100,
    results/h100/2026-11/schnell). Kontext's reference it makes float32 with NumPy, then copies it, while the GPU waits.
    The results are the same, bit by bit.
    """

    def preprocess(self, image, height: int | None = None, width: int | None = None, **options) -> torch.Tensor:
        """A PIL image to (1, 3, height, width) in [-1, 1], if it has that size, which Kontext's pipeline has given it.
        Anything else is left to diffusers."""
        if not isinstance(image, PIL.Image.Image) or image.mode != "RGB" or image.size != (width, height) or options:
            return super().preprocess(image, height, width, **options)
        pixels = torch.from_numpy(np.array(image)[None]).to(self.device)
        # A tensor: by a number CUDA does not divide, it multiplies by what 1 / 255 is rounded to.
        whole = torch.full((), 255.0, device=self.device)
        return self.normalize(pixels.permute(0, 3, 1, 2).float() / whole)

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """image: (B, 3, H, W) in [-1, 1]. Anything but "pil" is left to diffusers."""
        if output_type != "pil":
            return super().postprocess(image, output_type, do_denormalize)
        self.note_finite(image)
        image = self._denormalize_conditionally(image, do_denormalize)
        pixels = (image.float() * 255).round().to(torch.uint8)
        return self.numpy_to_pil(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
        """images: (B, H, W, 3), uint8 pixels or floats in [0, 1]."""
        if images.dtype != np.uint8:
            return VaeImageProcessor.numpy_to_pil(images)
        return [PIL.Image.fromarray(image) for image in images]


def numbered_path(path: str | Path, *numbers: int) -> Path:
    """output.png, 3, 42 -> output_003_42.png: the first number is padded, so that files sort."""
    path = as_path(path)
    name = "_".join([path.stem, *(f"{n:03d}" if i == 0 else str(n) for i, n in enumerate(numbers))])
    return path.with_name(name + path.suffix)


def image_parameters(args, pipeline, kwargs: dict, prompt: str, seed: int) -> dict:
    """What an image file says of how it was made. Names are for people; "contents" and "image_sha256" say which files
    bore them.

    Args:
        pipeline: as `optimize` leaves it, with its techniques, and with its contents from `load_pipeline`.
        kwargs: of the pipeline call (`call_kwargs`).
    """
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    parameters = {"prompt": prompt, "seed": seed, "model": args.ckpt, "revision": args.revision, "lora": args.lora,
                  "image": args.image, "random_weights": args.random_weights is not None,
                  "contents": getattr(pipeline, "contents", {}),
                  "techniques": {name: how for name, (on, how) in pipeline.techniques.items() if on},
                  **{name: kwargs[name] for name in names}}
    if "negative_prompt" in kwargs:
        parameters |= {"negative_prompt": args.negative_prompt, "true_cfg_scale": args.true_cfg_scale}
    if "image" in kwargs:
        image = kwargs["image"]
        parameters["image_sha256"] = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
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
    """Writes an image with its parameters whole or not at all.

    Raises:
        OSError: among others, for a file that is there and not an image of this program.
    """
    with atomic_write(path, is_our_image) as temporary:
        write_picture(image, temporary, parameters)


def keep_image(image: PIL.Image.Image, path: Path, parameters: dict, is_finite: bool) -> RecipeError | None:
    """Saves an image; a broken one, or one that cannot be saved there, under another name.

    Args:
        is_finite: as `CheckedImageProcessor.finite` has it.

    Returns:
        None, or an error, not raised, that says why and where the image is now.
    """
    flaw = flaw_of(image, is_finite)
    target = free_name(path, "broken") if flaw else path
    error = write_or_rescue(lambda file: save_image(image, file, parameters), target, "picture")
    if flaw:
        return BrokenResult(f"{path}: {flaw}. " + (str(error) if error else f"It is kept as {target}"))
    return error


def keep_images(pipeline, images: list, paths: list[Path], parameters: list[dict], log) -> None:
    """Saves what a call of the pipeline has made, and looks at it before.

    Raises:
        RecipeError: as `raise_errors` has it, once all images are kept.
    """
    errors = []
    for image, path, own, is_finite in zip(images, paths, parameters, pipeline.image_processor.finite.tolist(),
                                           strict=True):
        error = keep_image(image, path, own, is_finite)
        if error:
            errors.append(error)
        else:
            log.line(f"wrote {path}")
    raise_errors(errors, pipeline)


def read_parameters(path: str | Path) -> dict:
    """What `write_picture` wrote beside the pixels."""
    with PIL.Image.open(path) as image:
        return json.loads(image.info.get("parameters") or image.getexif()[EXIF_IMAGE_DESCRIPTION])


def is_our_image(path: Path) -> bool:
    """Whether the file is an image of this program. Raises, or is False, where it is not."""
    return "techniques" in dict(read_parameters(path))


def decode(path: Path) -> None:
    """Reads an image file to its end. Raises where something is missing or damaged."""
    with PIL.Image.open(path) as image:
        if image.format == "PNG":
            image.verify()  # checksums, and the end
    with PIL.Image.open(path) as image:
        image.load()
