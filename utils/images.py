"""Images in and out: the reference image, 8-bit pixels made on the GPU, and files that say how they were made."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.utils import load_image
from PIL.PngImagePlugin import PngInfo

from utils.benchmark_utils import RecipeError, replacing

EXIF_IMAGE_DESCRIPTION = 0x010E
MEGAPIXEL = 1024 * 1024


class GPUImageProcessor(VaeImageProcessor):
    """diffusers' image processor, with pixels as 8 bits whenever they are copied between CPU and GPU.

    diffusers copies float32 pixels and rounds them with NumPy: 23.2 ms for 1024x1024, and 2.8 this way (H100,
    results/h100/schnell). Kontext's reference it makes float32 with NumPy, then copies it, while the GPU waits. The
    results are the same, bit by bit.
    """

    device = torch.device("cpu")  # where a reference goes

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
        image = self._denormalize_conditionally(image, do_denormalize)
        pixels = (image.float() * 255).round().to(torch.uint8)
        return self.numpy_to_pil(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
        """images: (B, H, W, 3), uint8 pixels or floats in [0, 1]."""
        if images.dtype != np.uint8:
            return VaeImageProcessor.numpy_to_pil(images)
        return [PIL.Image.fromarray(image) for image in images]


@functools.lru_cache(maxsize=8)
def load_reference(path_or_url: str) -> PIL.Image.Image:
    """The RGB image of --image. Read once, however often it is used.

    Raises:
        RecipeError: it cannot be fetched, or is no image.
    """
    try:
        if path_or_url.startswith(("http://", "https://")):
            return load_image(path_or_url)
        return load_image(str(Path(path_or_url).expanduser()))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--image {path_or_url}: cannot be read as an image ({error}).") from error


def reference_size(image: PIL.Image.Image, area: int) -> tuple[int, int]:
    """(width, height) of `image`'s aspect ratio with about `area` pixels, multiples of 16."""
    scale = (area / (image.width * image.height)) ** 0.5
    return tuple(max(16, round(side * scale / 16) * 16) for side in image.size)


def reference_tokens(image: PIL.Image.Image, area: int) -> int:
    """How many tokens Kontext makes of a reference `image` for an output of `area` pixels: as `call_kwargs` has it,
    at a megapixel in the one of Kontext's own sizes whose aspect ratio is nearest."""
    width, height = reference_size(image, area)
    if area == MEGAPIXEL:
        aspect = image.width / image.height
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return (width // 16) * (height // 16)


def numbered_path(path: str, *numbers: int) -> Path:
    """output.png, 3, 42 -> output_003_42.png: the first number is padded, so that files sort."""
    path = Path(path).expanduser()
    name = "_".join([path.stem, *(f"{n:03d}" if i == 0 else str(n) for i, n in enumerate(numbers))])
    return path.with_name(name + path.suffix)


def image_parameters(args, kwargs: dict, techniques: dict, prompt: str, seed: int) -> dict:
    """What an image file says of how it was made.

    Args:
        kwargs: of the pipeline call (`call_kwargs`).
        techniques: name to (on, how), as `optimize` leaves them on the pipeline.
    """
    names = ("height", "width", "num_inference_steps", "guidance_scale")
    parameters = {"prompt": prompt, "seed": seed, "model": args.ckpt, "revision": args.revision, "lora": args.lora,
                  "image": args.image, "random_weights": args.random_weights is not None,
                  "techniques": {name: how for name, (on, how) in techniques.items() if on},
                  **{name: kwargs[name] for name in names}}
    if "negative_prompt" in kwargs:
        parameters |= {"negative_prompt": args.negative_prompt, "true_cfg_scale": args.true_cfg_scale}
    if "image" in kwargs:
        parameters["image_sha256"] = hashlib.sha256(kwargs["image"].tobytes()).hexdigest()
    return parameters


def save_image(image: PIL.Image.Image, path: str | Path, parameters: dict) -> None:
    """Writes the image whole or not at all, with `parameters` as JSON in its metadata.

    PNG: the text chunk "parameters". JPEG and WebP: EXIF's image description.
    """
    text = json.dumps(parameters)
    with replacing(path) as temporary:
        if temporary.suffix.lower() == ".png":
            info = PngInfo()
            info.add_text("parameters", text)
            image.save(temporary, pnginfo=info)
        else:
            exif = PIL.Image.Exif()
            exif[EXIF_IMAGE_DESCRIPTION] = text
            image.save(temporary, exif=exif, quality=95)


def read_parameters(path: str | Path) -> dict:
    """What `save_image` wrote beside the pixels."""
    with PIL.Image.open(path) as image:
        return json.loads(image.info.get("parameters") or image.getexif()[EXIF_IMAGE_DESCRIPTION])
