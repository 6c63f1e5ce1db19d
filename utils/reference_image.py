"""--image: the reference picture, from a file or the web, as 8-bit sRGB."""

import functools
import io
import re
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
from utils.common import RecipeError, reading, reason_of
from utils.file_kinds import kind_of

MEGAPIXEL = 1024 * 1024
CONNECT_SECONDS, DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 10, 60, 100_000_000
# At a megapixel diffusers scales a reference to the nearest size that Kontext was trained on, the longest 7:3, which
# squeezes a picture of 4:1 by 1.7. At small areas it is the sides, multiples of 16, that distort a longer one.
LONGEST = 4
# PIL reads more, and runs Ghostscript for one of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI", "PSD")
CURE = "Give the picture itself, saved anew as an 8-bit PNG, JPEG or WebP file."
DNG_VERSION, NEW_SUBFILE_TYPE = 50706, 254  # TIFF tags


def scheme_of(image: str) -> str:
    """The scheme of a URL in lower case, such as "https"; "" for a path."""
    found = re.match(r"(data):|([a-z][a-z0-9+.-]*)://", image, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


@functools.lru_cache(maxsize=8)
def load_reference(path_or_url: str) -> PIL.Image.Image:
    """The RGB image of --image. Read once, however often it is used. What was changed on the way is said on stderr.

    Raises:
        RecipeError: it cannot be fetched, is no image, or is one that cannot be shown right.
    """
    scheme, served = scheme_of(path_or_url), ""
    what = f"--image {path_or_url if len(path_or_url) < 500 else path_or_url[:100] + '...'}"
    if scheme == "file":
        raise RecipeError(f"{what}: give the path alone, {path_or_url[len('file://'):]}.")
    if scheme not in ("", "http", "https"):
        raise RecipeError(f"{what}: {scheme} URLs are not read. Give a path, or a URL of http or https.")
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
            raise RecipeError(f"{what}: more than {2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6} megapixels. "
                              "Make it smaller: Kontext reads about one megapixel.") from error
    if max(image.size) > LONGEST * min(image.size):
        raise RecipeError(f"{what}: {image.width}x{image.height} pixels, and a reference longer than {LONGEST}:1 would "
                          "reach the model distorted. Crop it.")
    if context_parallel.is_main_process():
        for note in notes:
            print(f"{what}: {note}.", file=sys.stderr)
    return image


def download(url: str, what: str) -> tuple[bytes, str]:
    """(body, content type) of a picture on the web.

    The limit holds for the whole, against servers that send a byte now and then: an HTTP client's limit is for each.

    Raises:
        RecipeError: another status than 200, more than `DOWNLOAD_BYTES`, or `DOWNLOAD_SECONDS` are over.
    """
    cure = "Download it yourself and give the path."
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
                    raise RecipeError(f"{what}: more than {DOWNLOAD_BYTES // 10**6} MB. Give a smaller picture.")
                if time.monotonic() > deadline:
                    break  # nobody waits any more
            return bytes(body), response.headers.get("content-type", "")

    def work() -> None:
        try:
            done.set_result(fetch())
        except requests.RequestException as error:
            cause = error  # the innermost is the reason, without the layers of the client
            while cause.__context__:
                cause = cause.__context__
            done.set_exception(RecipeError(f"{what}: {reason_of(cause)}. {cure}"))
        except Exception as error:
            done.set_exception(error)

    done = Future()
    # A daemon: the program can end while a server holds it.
    threading.Thread(target=work, daemon=True).start()
    try:
        with reading(what, cure):
            return done.result(DOWNLOAD_SECONDS)
    except RecipeError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise RecipeError(f"{what}: not there after {DOWNLOAD_SECONDS:g} seconds. {cure}") from error
        raise


def decode(data: bytes) -> tuple[PIL.Image.Image, list[str]]:
    """An image file as 8-bit sRGB on white, upright, and what is to be said about it.

    Raises:
        Exception: whatever PIL raises; ValueError where what PIL gives would not be the picture.
    """
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that are large or damaged at no pixel; the others are errors
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "TIFF" and (DNG_VERSION in image.tag_v2 or image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1):
            raise ValueError("a camera's raw file, whose first picture is a thumbnail")
        # In MPO the others are previews, in PSD layers.
        if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
            notes.append("it holds several pictures, and the first is used")
        stored = " ".join(str(tile.args) for tile in image.tile)  # PIL's name of the layout, forgotten by `load`
        image.load()
        profile = image.info.get("icc_profile")
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # whatever PIL raises over broken metadata: the picture is there without it
            notes.append("its EXIF data cannot be read, so it is taken as it lies")
        image, alpha = _with_8_bits(image, stored)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
        image, ignored = _to_srgb(image, profile)
    if ignored:
        notes.append("its colour profile cannot be used and is ignored")
    if alpha is not None and alpha.getextrema()[0] < 255:
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
        notes.append("it is transparent in places, which are drawn on white")
    return image, notes


def _with_8_bits(image: PIL.Image.Image, stored: str) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """(image, alpha): greys of 12 or 16 bits as 8 bits, and the alpha of their transparent grey; others as they are,
    their transparent colour (PNG's tRNS) in the units of the pixels, as which PIL leaves it in the file's."""
    key, white = image.info.get("transparency"), 4095 if "I;12" in stored else 65535
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose white is not said")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Up to 255, 32 bits a pixel are either 8-bit grey or 16-bit black.
        if image.mode == "I" and not (values.min() >= 0 and 255 < values.max() <= white):
            raise ValueError(f"its pixels go from {values.min()} to {values.max()}, and 16-bit grey from 0 to {white}")
        alpha = None if key is None else PIL.Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return PIL.Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)), alpha
    if key is not None and "RGB;16" in stored:
        raise ValueError("one of its 16-bit colours stands for transparency, which is not read")
    for bits in (2, 4):
        if key is not None and f"L;{bits}" in stored:
            image.info["transparency"] = key * 255 // (2**bits - 1)
    return image, None


def _to_srgb(image: PIL.Image.Image, profile: bytes | None) -> tuple[PIL.Image.Image, bool]:
    """(RGB image, whether the ICC profile was of no use): the colours that `profile` means, in sRGB's numbers."""
    rgb = image.convert("RGB")
    if not profile:
        return rgb, False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        pixels = image if image.mode == mode else rgb.convert(mode)
        if "CMYK" in (mode, image.mode) and mode != image.mode:
            raise ValueError("a profile of other channels")
        if mode == "L" and pixels.convert("RGB").tobytes() != rgb.tobytes():  # RGB for a grey picture is common
            raise ValueError("a grey profile of a coloured picture")
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # whatever PIL raises over a broken profile: the picture is there without it
        return rgb, True
    # Between two profiles of sRGB there is rounding alone.
    differences = ImageChops.difference(converted, rgb).getextrema()
    return (rgb if max(highest for _, highest in differences) <= 2 else converted), False


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
