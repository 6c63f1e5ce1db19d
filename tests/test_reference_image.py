"""References reach the model as they look, whatever file they come in; what has no right pixels is refused."""

import gzip
import io
import os
import random
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from utils import reference_image
from utils.common import RecipeError
from utils.reference_image import decode, load_reference, reference_size, scheme_of

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
RGB = PIL.Image.fromarray(COLOURS)


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, depth, colour_type, rows, transparent=b"") -> bytes:
    """A PNG of packed rows as the specification has it, for what PIL does not write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


def pixels(data) -> np.ndarray:
    image, _ = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey3(values) -> np.ndarray:
    return np.repeat(np.asarray(values, int)[..., None], 3, axis=-1)


def test_load_reference_is_rgb_and_read_once(tmp_path, capsys):
    path = tmp_path / "a.png"
    PIL.Image.new("RGBA", (30, 20), (1, 2, 3, 128)).save(path)
    image = load_reference(str(path))
    assert image.mode == "RGB" and load_reference(str(path)) is image
    assert capsys.readouterr().err.count("a.png") == 1


@pytest.mark.parametrize("size", [(100, 100), (1000, 250), (33, 900)])
def test_reference_size_keeps_area_and_aspect(size):
    width, height = reference_size(PIL.Image.new("RGB", size), 512 * 512)
    assert width % 16 == height % 16 == 0
    assert 0.8 < width * height / 512**2 < 1.25 and 0.75 < width / height * size[1] / size[0] < 1.33


@pytest.mark.parametrize("data", [
    encoded(PIL.Image.fromarray(GREY.astype(np.uint16) * 257)),
    encoded(PIL.Image.fromarray(GREY.astype(np.uint16) * 257 + 100)),
    encoded(PIL.Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    encoded(PIL.Image.frombytes("I;16B", (20, 12), (GREY.astype(">u2") * 257).tobytes()), "TIFF"),
    encoded(PIL.Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    b"P5 20 12 65535 " + (GREY.astype(">u2") * 257).tobytes(),
    png(20, 16, 0, [row.astype(">u2").tobytes() for row in GREY.astype(int) * 257]),
    encoded(PIL.Image.fromarray(GREY)), encoded(PIL.Image.fromarray(GREY).convert("LA")),
], ids=["png", "png_rounded", "tif", "tif_big_endian", "tif_32_bits", "pgm", "png_by_hand", "8_bits", "la"])
def test_decode_greys_of_any_depth_are_their_8_bits(data):
    assert np.array_equal(pixels(data), grey3(GREY)) and decode(data)[1] == []


def test_decode_16_bit_grey_rounds_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.abs(pixels(encoded(PIL.Image.fromarray(values))) * 257 - grey3(values)).max() <= 128


@pytest.mark.parametrize("data, white", [
    (png(4, 1, 0, [b"\xa0"]), [255, 0, 255, 0]), (png(4, 2, 0, [b"\x1b"]), [0, 85, 170, 255]),
    (png(2, 4, 0, [b"\x5a"]), [85, 170]),
], ids=["1", "2", "4"])
def test_decode_greys_of_few_bits_are_scaled_to_white(data, white):
    assert pixels(data)[0].tolist() == grey3(white).tolist()


@pytest.mark.parametrize("image", [
    PIL.Image.fromarray(GREY.astype(np.int32) * 1000), PIL.Image.fromarray(GREY.astype(np.int32) - 5),
    PIL.Image.fromarray(GREY.astype(np.int32)), PIL.Image.fromarray(GREY.astype(np.float32) / 255),
], ids=["above_16_bits", "negative", "8_bits_in_32", "float"])
def test_load_reference_pixels_of_unknown_white_are_refused(tmp_path, image):
    image.save(tmp_path / "x.tif")
    with pytest.raises(RecipeError, match=r"x\.tif"):
        load_reference(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("data, expected", [
    (encoded(RGB), COLOURS), (encoded(RGB.convert("P")), np.asarray(RGB.convert("P").convert("RGB"))),
    (encoded(RGB.convert("1")), np.asarray(RGB.convert("1").convert("RGB"))),
    (encoded(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
    (encoded(RGB, "GIF"), np.asarray(PIL.Image.open(io.BytesIO(encoded(RGB, "GIF"))).convert("RGB"))),
    (encoded(RGB, "BMP"), COLOURS), (encoded(RGB, "WEBP", lossless=True), COLOURS),
    (png(1, 16, 2, [b"\x12\x34\x56\x78\x9a\xbc"]), [[[0x12, 0x56, 0x9a]]]),
], ids=["rgb", "p", "1", "cmyk", "gif", "bmp", "webp", "rgb_16_bits"])
def test_decode_other_modes_are_as_pil_converts_them(data, expected):
    assert np.array_equal(pixels(data), expected) and decode(data)[1] == []


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["rgb", "grey16", "rgba"])
def test_decode_exif_orientation_turns_the_picture_upright(orientation, kind):
    """By EXIF's table of where row 0 and column 0 are."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = {"rgb": RGB, "grey16": PIL.Image.fromarray(GREY.astype(np.uint16) * 257),
             "rgba": RGB.convert("RGBA")}[kind]
    stored = grey3(GREY) if kind == "grey16" else COLOURS
    upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
               6: stored[::-1].swapaxes(0, 1), 7: stored[::-1, ::-1].swapaxes(0, 1),
               8: stored[:, ::-1].swapaxes(0, 1)}[orientation]
    assert np.array_equal(pixels(encoded(image, exif=exif)), upright)


def test_decode_broken_exif_is_ignored_with_a_note():
    data = encoded(RGB, exif=b"Exif\0\0garbage")
    assert np.array_equal(pixels(data), COLOURS) and len(decode(data)[1]) == 1


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_decode_transparent_pixels_are_blended_with_white(format, options):
    alpha = np.where(GREY < 100, 0, np.where(GREY < 200, 128, 255)).astype(np.uint8)
    found = []
    for hidden in (COLOURS, np.where(alpha[..., None] == 0, 255 - COLOURS, COLOURS)):
        data = encoded(PIL.Image.fromarray(np.dstack([hidden, alpha])), format, **options)
        found.append(pixels(data))
        assert len(decode(data)[1]) == 1
    share = alpha[..., None] / 255
    assert np.array_equal(found[0], found[1]) and (found[0][alpha == 0] == 255).all()
    assert np.abs(found[0] - (COLOURS * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("data, expected", [
    (encoded(PIL.Image.merge("LA", [PIL.Image.new("L", (1, 1), v) for v in (50, 0)])), [[255] * 3]),
    (encoded(PIL.Image.fromarray(np.uint8([[1, 2]])), transparency=1), [[255] * 3, [2] * 3]),
    (encoded(PIL.Image.fromarray(np.uint8([[[1, 2, 3], [3, 2, 1]]])), transparency=(1, 2, 3)), [[255] * 3, [3, 2, 1]]),
    (png(4, 1, 0, [b"\xa0"], b"\0\0"), grey3([255, 255, 255, 255])),
    (png(4, 2, 0, [b"\x1b"], b"\0\2"), grey3([0, 85, 255, 255])),
    (png(2, 4, 0, [b"\x5a"], b"\0\x0a"), grey3([85, 255])),
    (png(2, 16, 0, [b"\x12\x34\0\x0a"], b"\x12\x34"), grey3([255, 0])),
    (png(2, 16, 0, [b"\x12\x34\0\x0a"], b"\x12\x35"), grey3([0x12, 0])),
], ids=["la", "l_key", "rgb_key", "1_bit_key", "2_bit_key", "4_bit_key", "16_bit_key", "16_bits_other_key"])
def test_decode_transparent_greys_and_colours_are_white(data, expected):
    assert pixels(data)[0].tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize("key", [(1, bytes([0, 255])), (1, 1)], ids=["alpha_of_each", "one_entry"])
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_decode_transparent_palette_entries_are_white(format, key):
    if format == "GIF" and isinstance(key[1], bytes):
        pytest.skip("GIF has one transparent entry")
    image = PIL.Image.fromarray(np.uint8([[0, 1]]))
    image = image.convert("P")
    image.putpalette([200, 10, 10, 10, 200, 10])
    transparent = 0 if isinstance(key[1], bytes) else 1
    data = encoded(image, format, transparency=key[1])
    found = pixels(data)[0].tolist()
    assert found[transparent] == [255] * 3 and found[1 - transparent] == [[200, 10, 10], [10, 200, 10]][1 - transparent]


def test_decode_opaque_alpha_changes_nothing_without_a_note():
    image, notes = decode(encoded(RGB.convert("RGBA")))
    assert np.array_equal(np.asarray(image), COLOURS) and notes == []


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_decode_animation_gives_its_first_picture_with_a_note(format):
    others = [PIL.Image.new("RGB", RGB.size, colour) for colour in ("black", "red")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(RGB, format, save_all=True, append_images=others, **options)
    image, notes = decode(data)
    first = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.array_equal(np.asarray(image), first) and np.abs(first - COLOURS).mean() < 20 and len(notes) == 1


def other_profile(red_and_green_swapped=True) -> bytes:
    """An RGB profile whose red is sRGB's green and the other way round: sRGB's own tags under other names."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if red_and_green_swapped:
        swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
        for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12):
            profile[at:at + 4] = swap.get(bytes(profile[at:at + 4]), profile[at:at + 4])
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_decode_colours_of_other_profiles_become_srgb(mode, format):
    few = RGB.quantize(16).convert("RGB")
    data = encoded(few.convert(mode), format, icc_profile=other_profile())
    assert np.abs(pixels(data) - np.asarray(few.convert(mode).convert("RGB"))[..., [1, 0, 2]]).max() <= 2
    assert decode(data)[1] == []


def test_decode_srgb_profile_changes_no_pixel():
    assert np.array_equal(pixels(encoded(RGB, icc_profile=other_profile(False))), COLOURS)
    grey = encoded(PIL.Image.fromarray(GREY), icc_profile=other_profile(False))
    assert np.array_equal(pixels(grey), grey3(GREY)) and decode(grey)[1] == []


@pytest.mark.parametrize("image, profile", [
    (RGB, b"no profile"), (RGB, other_profile()[:200]),
    (RGB.convert("CMYK"), other_profile()),
], ids=["text", "cut", "of_other_channels"])
def test_decode_useless_profile_is_ignored_with_a_note(image, profile):
    data = encoded(image, "TIFF", icc_profile=profile)
    assert np.array_equal(pixels(data), np.asarray(image.convert("RGB"))) and len(decode(data)[1]) == 1


@pytest.mark.parametrize("data, word", [
    (b"", ""), (b"<!doctype html><html><body>404</body></html>", "HTML"), (b"%PDF-1.7 ...", "PDF"),
    (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"), (b'<?xml version="1.0"?><!-- x --><svg/>', "SVG"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\0\0\0\x18ftypavif\0\0\0\0mif1", "AVIF"),
    (b"version https://git-lfs.github.com/spec/v1", "LFS"), (b"PK\x03\x04....", "zip"), (b"text", ""),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"), (encoded(RGB)[:-60], ""),
    (encoded(RGB, "JPEG")[:-20], ""), (encoded(RGB)[:20], ""),
    (png(20000, 1, 0, [b"\0" * 2500] * 20000), ""), (png(1, 16, 2, [b"\0" * 6], b"\0\1" * 3), ""),
], ids=lambda x: x if isinstance(x, str) else "")
def test_load_reference_of_another_kind_of_file_is_refused_by_name(tmp_path, data, word):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(RecipeError, match=rf"x\.png.*{word}"):
        load_reference(str(tmp_path / "x.png"))


def test_load_reference_camera_raw_file_is_refused(tmp_path):
    RGB.save(tmp_path / "x.dng", "TIFF", tiffinfo={254: 1})
    with pytest.raises(RecipeError, match=r"x\.dng"):
        load_reference(str(tmp_path / "x.dng"))


def test_decode_picture_between_the_limits_of_pil_is_read(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200)  # a warning above it, an error above its double
    assert np.array_equal(pixels(encoded(RGB)), COLOURS)


@pytest.mark.parametrize("size, fits", [((1, 1), True), ((400, 100), True), ((401, 100), False), ((1, 50), False),
                                        ((5000, 3), False)])
def test_load_reference_of_extreme_aspect_is_refused(tmp_path, size, fits):
    PIL.Image.new("RGB", size).save(tmp_path / "x.png")
    if fits:
        assert load_reference(str(tmp_path / "x.png")).size == size
    else:
        with pytest.raises(RecipeError, match=r"x\.png"):
            load_reference(str(tmp_path / "x.png"))


def test_load_reference_path_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match=path.name):
            load_reference(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_load_reference_without_permission_is_refused(tmp_path):
    RGB.save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(RecipeError, match=r"x\.png"):
        load_reference(str(tmp_path / "x.png"))


@pytest.mark.parametrize("image, scheme", [
    ("a.png", ""), ("/a:b/c.png", ""), ("C:a.png", ""), ("HTTPS://a/b", "https"), ("http://a", "http"),
    ("file:///a", "file"), ("data:image/png;base64,AA", "data"), ("s3://a/b", "s3"),
])
def test_scheme_of_path_or_url_is_its_scheme(image, scheme):
    assert scheme_of(image) == scheme


@pytest.mark.parametrize("url, word", [("file:///tmp/a.png", " /tmp/a.png"), ("s3://a/b.png", "s3"),
                                       ("data:image/png;base64," + "A" * 10000, "data"), ("ftp://a/b.png", "ftp")])
def test_load_reference_of_other_schemes_is_refused(url, word):
    with pytest.raises(RecipeError, match=word) as refused:
        load_reference(url)
    assert len(str(refused.value)) < 300


@contextmanager
def server():
    """Serves one picture well and badly, by the path: its URL."""
    picture, stop = encoded(RGB), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body, length=None, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            name = self.path[1:]
            if name == "ok":
                self.answer(200, picture, Content_Type="image/png")
            elif name == "gz":
                self.answer(200, gzip.compress(picture), Content_Encoding="gzip")
            elif name == "moved":
                self.answer(302, b"", Location="/ok")
            elif name == "loop":
                self.answer(302, b"", Location="/loop")
            elif name in ("403", "404", "500"):
                self.answer(int(name), picture)
            elif name == "page":
                self.answer(200, b"<html>sign in</html>", Content_Type="text/html; charset=utf-8")
            elif name == "cut":
                self.answer(200, picture[:50], len(picture))
            elif name == "large":
                self.answer(200, picture + b"x" * 100_000)
            elif name == "slow":
                self.answer(200, b"", 10**8)
                self.trickle()
            elif name == "slow_header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                self.trickle()
            else:
                stop.wait()

        def trickle(self):
            try:
                while not stop.wait(0.05):
                    self.wfile.write(b"x")
            except OSError:
                pass

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}/"
        finally:
            stop.set()
            serving.shutdown()
            thread.join()


def test_load_reference_from_the_web_is_the_picture_or_refused(monkeypatch):
    monkeypatch.setattr(reference_image, "DOWNLOAD_SECONDS", 20.0)
    with server() as url:
        for name in ("ok", "gz", "moved"):
            assert np.array_equal(np.asarray(load_reference(url + name)), COLOURS), name
        for name, word in (("403", "403 Forbidden"), ("404", "404 Not Found"), ("500", "500"), ("cut", ""),
                           ("page", "text/html"), ("loop", "")):
            with pytest.raises(RecipeError, match=f"{url}{name}.*({word})"):
                load_reference(url + name)
        monkeypatch.setattr(reference_image, "DOWNLOAD_BYTES", 50_000)
        with pytest.raises(RecipeError, match=f"{url}large"):
            load_reference(url + "large")
    with pytest.raises(RecipeError, match=url):
        load_reference(url + "gone")


@pytest.mark.parametrize("name", ["slow", "slow_header", "silent"])
def test_load_reference_from_a_slow_server_ends_in_time(monkeypatch, name):
    monkeypatch.setattr(reference_image, "DOWNLOAD_SECONDS", 0.5)
    with server() as url:
        start = time.monotonic()
        with pytest.raises(RecipeError, match=url):
            load_reference(url + name)
        assert time.monotonic() - start < 3


def test_load_reference_of_mutated_pictures_is_as_pil_reads_them_or_refused(tmp_path):
    """An independent reading: PIL's, of pictures of 8-bit RGB, upright, opaque, without a profile."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    originals = [encoded(RGB), encoded(RGB, "JPEG"), encoded(RGB, "BMP"), encoded(RGB, "WEBP")]
    for number in range(80):
        data = bytearray(rng.choice(originals))
        kind = rng.choice(["flip", "flip", "cut", "insert", "retype"])
        if kind == "flip":
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[rng.randrange(len(data)):]
        elif kind == "insert":
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            data[:4] = rng.choice([b"\x89PNG", b"GIF8", b"RIFF", b"%PDF", b"II*\0", b"%!PS", rng.randbytes(4)])
        path = tmp_path / f"{number}.{rng.choice(['png', 'jpg', 'webp', 'txt'])}"
        path.write_bytes(data)
        try:
            found = load_reference(str(path))
        except RecipeError as error:
            assert path.name in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        theirs = PIL.Image.open(path)
        assert np.array_equal(np.asarray(found), np.asarray(theirs.convert("RGB"))) or theirs.mode != "RGB"
        outcomes["read"] += 1
    assert min(outcomes.values()) >= 10
