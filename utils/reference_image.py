"""Reads the pictures of --image, --mask_image and --control_image from files or the web: 8-bit sRGB, or a mask."""

import functools
import io
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import PIL.Image
import requests
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import ImageChops, ImageCms, ImageOps

from utils import context_parallel
from utils.benchmark_utils import scheme_of
from utils.common import RecipeError, reading, reason_of
from utils.file_kinds import kind_of

MEGAPIXEL = 1024 * 1024
CONNECT_SECONDS, DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 10, 60, 100_000_000
# The largest aspect ratio of a reference. At one megapixel diffusers scales a reference to the nearest of Kontext's
# training sizes. The longest of these sizes is 7:3, which squeezes a 4:1 picture by a factor of 1.7. At small areas,
# rounding both sides to multiples of 16 distorts longer pictures.
LONGEST = 4
SAME_SHAPE = 0.05  # the relative difference of two aspect ratios up to which a picture is resized and not cropped
TRANSPARENT = "its transparent areas are drawn on white"
# PIL reads more formats, and runs Ghostscript for one of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI", "PSD")
CURE = "Give a picture, saved again as an 8-bit PNG, JPEG or WebP file."
DNG_VERSION, NEW_SUBFILE_TYPE = 50706, 254  # TIFF tags


@functools.lru_cache(maxsize=8)
def load_reference(path_or_url: str, flag: str = "--image") -> PIL.Image.Image:
    """Loads a picture as an 8-bit RGB image. The result is cached. Notes about changes to the picture go to stderr.

    Raises:
        RecipeError: the picture cannot be fetched, is no image, or cannot be converted correctly.
    """
    image, notes, what = _load(path_or_url, flag)
    _say(what, notes)
    return image


@functools.lru_cache(maxsize=8)
def load_mask(path_or_url: str) -> PIL.Image.Image:
    """Loads --mask_image as an 8-bit gray image (mode L), white where a picture is repainted. The result is cached.

    Raises:
        RecipeError: as `load_reference`; or the mask is transparent: some programs mean the transparent areas, others
            the strokes on a transparent ground.
    """
    image, notes, what = _load(path_or_url, "--mask_image")
    if TRANSPARENT in notes:
        raise RecipeError(f"{what}: it has transparent areas, and programs differ in what they mean. Save it without "
                          "transparency: white where the picture is repainted, black where it stays.")
    _say(what, notes)
    return image.convert("L")


def _load(path_or_url: str, flag: str) -> tuple[PIL.Image.Image, list[str], str]:
    """The picture, the notes of `decode`, and the beginning of messages about it.

    Raises:
        RecipeError: see `load_reference`.
    """
    scheme, served = scheme_of(path_or_url), ""
    what = f"{flag} {path_or_url if len(path_or_url) < 500 else path_or_url[:100] + '...'}"
    if scheme == "file":
        raise RecipeError(f"{what}: give the path alone, {path_or_url[len('file://'):]}.")
    if scheme not in ("", "http", "https"):
        raise RecipeError(f"{what}: {scheme} URLs are not supported. Give a path, or an http or https URL.")
    with reading(what, CURE):
        if scheme:
            data, served = download(path_or_url, what)
        else:
            data = Path(path_or_url).expanduser().read_bytes()
        try:
            image, notes = decode(data)
        except PIL.UnidentifiedImageError:
            kind = kind_of(data) or ("not a picture of a known format" if data else "an empty file")
            kind += " that is damaged or cannot be decoded here" * kind.endswith("picture")
            raise ValueError(f"it is {kind}" + f" (served as {served})" * bool(served)) from None
        except PIL.Image.DecompressionBombError as error:
            raise RecipeError(f"{what}: it has more than {2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6} "
                              "megapixels. Make it smaller: FLUX.1 uses about one megapixel.") from error
    if max(image.size) > LONGEST * min(image.size):
        raise RecipeError(f"{what}: it has {image.width}x{image.height} pixels, and the model would see a picture "
                          f"longer than {LONGEST}:1 distorted. Crop the picture.")
    return image, notes, what


def _say(what: str, notes: list[str]) -> None:
    if context_parallel.is_main_process():
        for note in notes:
            _say_once(f"{what}: {note}.")


@functools.cache
def _say_once(line: str) -> None:
    """Prints a line to stderr, but not for a picture that is loaded again."""
    print(line, file=sys.stderr)


@functools.cache
def original_size(path_or_url: str, flag: str = "--image") -> tuple[int, int]:
    """The (width, height) of a picture. Unlike the images, the sizes of all of them are cached.

    Raises:
        RecipeError: as `load_reference`.
    """
    return load_reference(path_or_url, flag).size


def download(url: str, what: str) -> tuple[bytes, str]:
    """Downloads a picture from the web.

    The time limit covers the whole download. An HTTP client's timeout covers a single read, so a server that sends a
    byte now and then could exceed it.

    Args:
        what: the beginning of the error messages.

    Returns:
        (body, content type).

    Raises:
        RecipeError: the status is not 200, or the download exceeds `DOWNLOAD_BYTES` or `DOWNLOAD_SECONDS`.
    """
    cure = "Download the picture yourself and give its path."
    deadline = time.monotonic() + DOWNLOAD_SECONDS

    def fetch() -> tuple[bytes, str]:
        limits = min(CONNECT_SECONDS, DOWNLOAD_SECONDS), DOWNLOAD_SECONDS
        with requests.get(url, stream=True, timeout=limits, headers={"User-Agent": "flux-faster"}) as response:
            if response.status_code != 200:
                status = f"{response.status_code} {response.reason}".strip()
                raise RecipeError(f"{what}: the server answered {status}. {cure}")
            body = bytearray()
            for part in response.iter_content(2**16):
                body += part
                if len(body) > DOWNLOAD_BYTES:
                    raise RecipeError(f"{what}: it has more than {DOWNLOAD_BYTES // 10**6} MB. Give a smaller file.")
                if time.monotonic() > deadline:
                    break  # the caller no longer waits
            return bytes(body), response.headers.get("content-type", "")

    def work() -> None:
        try:
            done.set_result(fetch())
        except requests.RequestException as error:
            cause = error  # the innermost exception names the reason without the HTTP client's layers
            while cause.__context__:
                cause = cause.__context__
            done.set_exception(RecipeError(f"{what}: {reason_of(cause)}. {cure}"))
        except Exception as error:
            done.set_exception(error)

    done = Future()
    # A daemon thread lets the program end while the server still blocks the download.
    threading.Thread(target=work, daemon=True).start()
    try:
        with reading(what, cure):
            return done.result(DOWNLOAD_SECONDS)
    except RecipeError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise RecipeError(f"{what}: the download took longer than {DOWNLOAD_SECONDS:g} seconds. {cure}") from error
        raise


def decode(data: bytes) -> tuple[PIL.Image.Image, list[str]]:
    """Decodes an image file to an upright 8-bit sRGB image on a white background.

    Args:
        data: the content of the file.

    Returns:
        (image, notes). A note is a clause about a change, such as "its color profile cannot be used and is ignored".

    Raises:
        ValueError: PIL's result would not be the picture.
        Exception: any exception of PIL.
    """
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of large files and harmless damage, and raises otherwise
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "TIFF" and (DNG_VERSION in image.tag_v2 or image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1):
            raise ValueError("it is a camera's raw file, whose first picture is a thumbnail")
        # The other pictures of an MPO file are previews, and those of a PSD file are layers.
        if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
            notes.append("it holds several pictures, and only the first is used")
        stored = " ".join(str(tile.args) for tile in image.tile)  # PIL's name of the pixel layout, which `load` drops
        image.load()
        profile = image.info.get("icc_profile")
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # PIL raises many types for broken metadata; the picture does not need them
            notes.append("its EXIF data cannot be read, so it is not rotated")
        image, alpha = _with_8_bits(image, stored)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
        image, ignored = _to_srgb(image, profile)
    if ignored:
        notes.append("its color profile cannot be used and is ignored")
    if alpha is not None and alpha.getextrema()[0] < 255:
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
        notes.append(TRANSPARENT)
    return image, notes


def _with_8_bits(image: PIL.Image.Image, stored: str) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Converts gray images of 12 or 16 bits to 8 bits. Other images keep their pixels.

    PNG may name a transparent color (tRNS). PIL leaves it in the file's units, and this function converts it to the
    pixels' units.

    Args:
        stored: PIL's name of the pixel layout in the file.

    Returns:
        (image, alpha). Alpha is an 8-bit mask, or None unless a gray of 12 or 16 bits is transparent.

    Raises:
        ValueError: the file does not tell how its values map to 8 bits, or a 16-bit RGB color is transparent.
    """
    key, white = image.info.get("transparency"), 4095 if "I;12" in stored else 65535
    if image.mode == "F":
        raise ValueError("its pixels are floats, and the file does not tell which value is white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Values up to 255 in 32 bits may be 8-bit gray or nearly black 16-bit gray.
        if image.mode == "I" and not (values.min() >= 0 and 255 < values.max() <= white):
            raise ValueError(f"its pixels range from {values.min()} to {values.max()}, but 16-bit gray ranges "
                             f"from 0 to {white}")
        alpha = None if key is None else PIL.Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return PIL.Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)), alpha
    if key is not None and "RGB;16" in stored:
        raise ValueError("one of its 16-bit colors means transparency, which is not supported")
    for bits in (2, 4):
        if key is not None and f"L;{bits}" in stored:
            image.info["transparency"] = key * 255 // (2**bits - 1)
    return image, None


def _to_srgb(image: PIL.Image.Image, profile: bytes | None) -> tuple[PIL.Image.Image, bool]:
    """Converts an image with the ICC profile `profile` to sRGB.

    Returns:
        (RGB image, whether the profile was unusable and ignored).
    """
    rgb = image.convert("RGB")
    if not profile:
        return rgb, False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        pixels = image if image.mode == mode else rgb.convert(mode)
        if "CMYK" in (mode, image.mode) and mode != image.mode:
            raise ValueError("the profile has other channels")
        if mode == "L" and pixels.convert("RGB").tobytes() != rgb.tobytes():  # gray RGB is common
            raise ValueError("the profile is gray, but the picture has colors")
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # PIL raises many types for a broken profile; the picture does not need it
        return rgb, True
    # If the source is sRGB as well, the difference is only rounding.
    differences = ImageChops.difference(converted, rgb).getextrema()
    return (rgb if max(highest for _, highest in differences) <= 2 else converted), False


def reference_size(image: PIL.Image.Image, area: int) -> tuple[int, int]:
    """The (width, height) with the aspect ratio of `image` and about `area` pixels. Both are multiples of 16."""
    return _scaled(image.size, area)


def _scaled(size: tuple[int, int], area: int) -> tuple[int, int]:
    scale = (area / (size[0] * size[1])) ** 0.5
    return tuple(max(16, round(side * scale / 16) * 16) for side in size)


def encoded_size(size: tuple[int, int], area: int, of_kontext: bool = True) -> tuple[int, int]:
    """The (width, height) that the VAE sees of a picture of `size` for an output of `area` pixels.

    At one megapixel Kontext uses the nearest aspect ratio among its own sizes, as in `call_kwargs`.
    """
    if area != MEGAPIXEL or not of_kontext:
        return _scaled(size, area)
    aspect = size[0] / size[1]
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return width, height


def reference_tokens(image: PIL.Image.Image, area: int) -> int:
    """The number of tokens, of 16x16 pixels each, of a reference `image` for an output of `area` pixels."""
    width, height = encoded_size(image.size, area)
    return (width // 16) * (height // 16)


def sized_like(size: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    """The (width, height) with the aspect ratio of `size`, of which one side is given. Both are multiples of 16."""
    along, across = (size[0], size[1]) if width else (size[1], size[0])
    other = max(16, round((width or height) * across / along / 16) * 16)
    return (width, other) if width else (other, height)


def has_shape(image_size: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether two (width, height) have about the same aspect ratio."""
    ratio = (image_size[0] * size[1]) / (image_size[1] * size[0])
    return max(ratio, 1 / ratio) <= 1 + SAME_SHAPE


def fitted(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """The picture at (width, height) `size`: resized as diffusers does, its edges cropped first if the shapes differ.

    diffusers would squeeze it.
    """
    if image.size == size:
        return image
    resize = image.resize if has_shape(image.size, size) else functools.partial(ImageOps.fit, image)
    return resize(size, PIL.Image.Resampling.LANCZOS)


def fitted_mask(mask: PIL.Image.Image, image_size: tuple[int, int], size: tuple[int, int]) -> PIL.Image.Image:
    """The mask of an image of `image_size`, at (width, height) `size` like `fitted` of the image; 255 or 0, mode L.

    diffusers' pipelines cut masks at the same half.
    """
    if mask.size != image_size and not has_shape(image_size, size):  # the same edges are cropped
        mask = mask.resize(image_size, PIL.Image.Resampling.LANCZOS)
    return fitted(mask, size).point(lambda value: 255 if value >= 128 else 0)


def check_mask(path: str, image_path: str, size: tuple[int, int], stride: int) -> None:
    """Refuses a mask of another shape than its image, or without anything to repaint. Tells of one all white.

    Args:
        size: (width, height) of the output.
        stride: the pipeline reads every `stride`-th pixel of a row and of a column.

    Raises:
        RecipeError: names the sizes, or what white means.
    """
    mask, what = load_mask(path), f"--mask_image {path}"
    image_size = original_size(image_path)
    if not has_shape(mask.size, image_size):
        raise RecipeError(f"{what}: it has {mask.width}x{mask.height} pixels, and --image has "
                          f"{image_size[0]}x{image_size[1]}, another shape. Give a mask of the image's size.")
    used = np.asarray(fitted_mask(mask, image_size, size))[::stride, ::stride]
    if not used.any():
        raise RecipeError(f"{what}: it is black, or white in fewer than {stride}x{stride} pixels of the output, so "
                          "nothing would be repainted. White marks the part to repaint.")
    if used.all():
        _say(what, ["it is white everywhere, so the whole picture is repainted"])


def check_crop(path: str, flag: str, size: tuple[int, int]) -> None:
    """Tells of a picture whose edges `fitted` crops. Raises RecipeError as `load_reference`."""
    image = load_reference(path, flag)
    if not has_shape(image.size, size):
        _say(f"{flag} {path}", [f"its {image.width}x{image.height} pixels are cropped to the shape of {size[0]}x"
                                f"{size[1]}; without --height and --width the output has its shape"])
