"""Recognizes a file's kind by its first bytes, for errors about files of a kind that a flag does not accept."""

import re

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_BEGINNINGS = {
    b"%PDF": "a PDF file", b"PK\x03\x04": "a zip archive, such as an Office document", b"\x1f\x8b": "a gzip archive",
    b"\xd0\xcf\x11\xe0": "an old Office document", b"{\\rtf": "an RTF document", b"PAR1": "a Parquet file",
    b"SQLite format 3": "an SQLite database", b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF checkpoint",
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture",
    b"\xff\x0a": "a JPEG XL picture", b"\x00\x00\x00\x0cJXL ": "a JPEG XL picture", b"8BPS": "a Photoshop file",
    b"%!PS": "a PostScript file", b"version https://git-lfs": "a Git LFS pointer instead of the file",
}


def kind_of(data: bytes) -> str | None:
    """The kind of file that `data` begins, with an article such as "a PDF file", or None if it is unknown."""
    for beginning, kind in _BEGINNINGS.items():
        if data.startswith(beginning):
            return kind
    if data[4:8] == b"ftyp":
        brand, others = data[8:12], "an AVIF picture" if data[8:11] == b"avi" else "a video"
        return "a HEIC photo" if brand in HEIC_BRANDS else others
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP picture"
    if re.match(rb"\x80[\x02-\x05]", data):
        return "a pickle"
    start = data[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in start:
        return "an SVG drawing"
    return "an XML file" if start.startswith(b"<?xml") else None
