"""Reads the header of a safetensors file: names, dtypes and shapes, without the weights."""

import json
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

# https://huggingface.co/docs/safetensors: the header's length in eight bytes, the header in JSON, then the tensors
# without gaps.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
        "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
OTHER_FILES = {b"version https://git-lfs": "it is a git-lfs pointer, not the file itself: run `git lfs pull`",
               b"PK\x03\x04": "it is a zip archive (torch.save writes such files), not safetensors",
               b"\x80": "it is a pickled file, not safetensors", b"GGUF": "it is a GGUF file, not safetensors",
               b"<": "it is a web page, not safetensors: download the file itself"}


class Tensor(NamedTuple):
    """The dtype and shape of one tensor, as the header has them."""
    dtype: str  # in the format's spelling: "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the header of a safetensors file and checks it against the file's size.

    Returns:
        The tensors by name, in the file's order, and the file's metadata.

    Raises:
        ValueError: the file is not a complete safetensors file; the message says why.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(32)
        if not start:
            raise ValueError("it is empty")
        length = struct.unpack("<Q", start[:8].ljust(8, b"\0"))[0]
        begins_json = size >= 10 and start[8:9] == b"{"
        for magic, text in {} if begins_json else OTHER_FILES.items():
            if start.lstrip().startswith(magic) or start.startswith(magic):
                raise ValueError(text)
        if size < 8 or length > MAX_HEADER or (size > 8 and not begins_json):
            raise ValueError("it is not a safetensors file")
        if 8 + length > size:
            raise ValueError(f"it is truncated: it has {size:,} of at least {8 + length:,} bytes")
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    metadata = entries.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is damaged (metadata is not text)")
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"its header is damaged (a tensor starts at byte {begin:,} instead of {end:,})")
        end = stop
    if 8 + length + end != size:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise ValueError(f"it is {kind}: it has {size:,} of {8 + length + end:,} bytes")
    return tensors, metadata


def _without_duplicates(pairs: list) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _tensor(name: str, entry) -> tuple[Tensor, tuple[int, int]]:
    """Checks one entry of the header. Returns the tensor, its first byte and the byte after its last one."""
    def whole(values) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")) or (
            len(entry["data_offsets"]) != 2):
        raise ValueError(f"its header is damaged ({name} has no valid shape or data_offsets)")
    dtype, shape, (begin, end) = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"its header is damaged ({name} has the unknown dtype {dtype!r})")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"its header is damaged ({name}, {dtype} of {list(shape)}, has the wrong size: "
                         f"{end - begin:,} bytes)")
    return Tensor(dtype, shape), (begin, end)
