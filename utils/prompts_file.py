"""Reads --prompts-file: lines of text, lines of JSON, a JSON list or a table. The content decides the format. Names the
images of its prompts."""

import csv
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.common import RecipeError, reading
from utils.file_kinds import kind_of
from utils.images import numbered_path
from utils.outputs import as_path

CURE = ('Give a UTF-8 text file with one prompt per line, or JSON: lines or a list of {"prompt": "a cat", "seed": 42}. '
        "The seed is optional.")
FORM = 'not of the form {"prompt": "a cat", "seed": 42} (the seed is optional)'
# UTF-32 comes first, because its little-endian mark begins with the mark of UTF-16.
BYTE_ORDER_MARKS = {b"\xff\xfe\x00\x00": "utf-32-le", b"\x00\x00\xfe\xff": "utf-32-be", b"\xef\xbb\xbf": "utf-8",
                    b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # without tabs and line breaks, which JSON may hold


class Prompt(NamedTuple):
    """One prompt of a file."""
    line: int  # the line's number, from 1, or the item's number in a JSON list
    index: int  # the number, from 0, among all lines but blank ones; a corrected line renumbers no other line
    text: str
    seed: int | None = None  # the seed of the prompt's first image, if the file sets it


class Request(NamedTuple):
    """An image to make."""
    prompt: str
    seed: int
    path: Path


class Records(NamedTuple):
    """The records of a file before they are parsed."""
    unit: str  # "line" or "item"
    numbered: list[tuple[int, object]]  # (number from 1, record), without blank lines
    parse: Callable[[object], tuple[str, int | None]]  # returns a record's (prompt, seed); raises ValueError


def read_prompts(path: str) -> tuple[list[Prompt], list[str]]:
    """Reads the prompts of a file.

    A line is a prompt, or {"prompt": ..., "seed": ...} with an optional seed. The file may also be a JSON list of
    strings or of such objects, {"prompts": [...]}, or a .csv or .tsv table with a column "prompt". The encoding is
    UTF-8, UTF-16 or UTF-32. Blank lines are ignored.

    Returns:
        (prompts, complaints). A complaint is a line of text that says why a bad line of the file is left out.

    Raises:
        RecipeError: the file holds no prompt, or has another format.
    """
    what = f"--prompts-file {path}"
    with reading(what, CURE):
        file = Path(path).expanduser()
        data = file.read_bytes()
        if kind := kind_of(data):
            raise ValueError(f"it is {kind}")
        text = _decoded(data)
        records = _records(text, file.suffix.lower())
    prompts, complaints = [], []
    for index, (number, record) in enumerate(records.numbered):
        try:
            prompt, seed = records.parse(_of_utf_8(record))
            prompts.append(Prompt(number, index, _checked(prompt), seed))
        except (ValueError, RecursionError) as error:
            why = f"not UTF-8 text ({error.reason})" if isinstance(error, UnicodeError) else error
            complaints.append(f"{what}, {records.unit} {number} is left out: {why}")
    if "\0" in text and len(complaints) * 10 >= len(records.numbered):
        raise RecipeError(f"{what}: it is a binary file that contains zero bytes. {CURE}")
    if not prompts:
        unusable = f" {len(complaints)} {records.unit}s are unusable; {complaints[0]}." if complaints else ""
        raise RecipeError(f"{what} holds no prompt. Write one prompt per line.{unusable}")
    return prompts, complaints


def _decoded(data: bytes) -> str:
    """Decodes the text and turns its line ends into \\n.

    A byte that is not UTF-8 becomes a surrogate, so that only its own line is refused later.
    """
    codec = "utf-8"
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            data, codec = data[len(mark):], name
            break
    else:
        for half, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            # ASCII text in UTF-16 has a zero in every other byte; UTF-8 text has no zero bytes.
            if data[half::2].count(0) > len(data[half::2]) / 2 and not data[1 - half::2].count(0):
                codec = name
    text = data.decode(codec, "surrogateescape" if codec == "utf-8" else "strict")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(text: str, suffix: str) -> Records:
    """The records of a file's text.

    Raises:
        ValueError: the text has a format that holds no prompts.
    """
    if suffix in (".yaml", ".yml"):
        raise ValueError("yaml files are not supported")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = next((line for _, line in lines if not _is_comment(line)), "")
    if table := _table(text, lines, suffix):
        return table
    of_lines = suffix in (".jsonl", ".ndjson") or re.match(r'\{\s*"', first)
    whole = None
    if suffix == ".json" or first[:1] in ("[", "{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            # Text that looks like JSON but is invalid is not taken for prompts.
            if not of_lines and (suffix == ".json" or re.match(r"\[\s*[\"'{]|[\[{]$", first)):
                raise ValueError(f"not JSON ({error})") from error
        else:
            json.loads(text, object_pairs_hook=_once)
    if isinstance(whole, dict):
        whole = whole["prompts"] if isinstance(whole.get("prompts"), list) else [whole]
    if isinstance(whole, list):
        return Records("item", list(enumerate(whole, 1)), _from_item)
    if whole is not None:
        raise ValueError(f"its JSON is neither a list nor an object, but {json.dumps(whole)[:50]}")
    return Records("line", lines, _from_json if of_lines else _from_text)


def _table(text: str, lines: list[tuple[int, str]], suffix: str) -> Records | None:
    """The rows of a table, or None if the text is not a table.

    A table is a .csv or .tsv file, or has "prompt" and "seed" in its header.

    Raises:
        ValueError: the header lacks the column "prompt", or names a column twice.
    """
    start, first = lines[0] if lines else (1, "")
    for delimiter in ("\t",) if suffix == ".tsv" else (",", ";", "\t"):
        header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if "prompt" not in header or not (suffix in (".csv", ".tsv") or "seed" in header):
            continue
        if header.count("prompt") + header.count("seed") > 1 + ("seed" in header):
            raise ValueError("its header names a column twice")
        numbered, number, below = [], start + 1, "\n".join(text.split("\n")[start:])
        rows = csv.reader(io.StringIO(below, newline=""), delimiter=delimiter, strict=True)
        for row in rows:
            if any(field.strip() for field in row):
                numbered.append((number, row))
            number = start + 1 + rows.line_num
        return Records("line", numbered, functools.partial(_from_row, header))
    if suffix in (".csv", ".tsv"):
        raise ValueError('its first line names no column "prompt"')
    return None


def _from_row(header: list[str], row: list[str]) -> tuple[str, int | None]:
    """The (prompt, seed) of a table's row."""
    if len(row) > len(header):
        raise ValueError(f"{len(row)} fields, but the header has {len(header)}: put the prompt in quotes")
    fields = dict(zip(header, row, strict=False))
    seed = fields.get("seed", "").strip()
    return _from_record({"prompt": fields.get("prompt"),
                         "seed": int(seed) if re.fullmatch("[0-9]{1,19}", seed) else seed or None})


def _is_comment(line: str) -> bool:
    return line == "#" or line.startswith("# ")


def _from_text(line: str) -> tuple[str, None]:
    if _is_comment(line):
        raise ValueError("it is a comment")
    if re.match(r'\{\s*"prompt"\s*:', line):
        raise ValueError("it is JSON among lines of text: begin the file with JSON, or name it .jsonl")
    return line, None


def _from_json(line: str) -> tuple[str, int | None]:
    """The (prompt, seed) of a line of JSON."""
    try:
        return _from_record(json.loads(line, object_pairs_hook=_once))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error


def _from_item(item) -> tuple[str, int | None]:
    """The (prompt, seed) of a JSON list's item: a string or an object."""
    return _from_record({"prompt": item} if isinstance(item, str) else item)


def _from_record(record) -> tuple[str, int | None]:
    """The (prompt, seed) of {"prompt": ..., "seed": ...}. Other keys are ignored.

    Raises:
        ValueError: the record has another form, or its seed is not a valid seed.
    """
    prompt, seed = (record.get("prompt"), record.get("seed")) if isinstance(record, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(FORM)
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise ValueError(f"its seed is {json.dumps(seed)[:50]}, not a whole number from 0 to 2^63 - 1")
    return prompt, seed


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object that names its prompt and its seed at most once. `json` itself would keep the last of them.

    Raises:
        ValueError: a name is repeated.
    """
    names = [name for name, _ in pairs]
    for name in ("prompt", "seed", "prompts"):
        if names.count(name) > 1:
            raise ValueError(f"one object names {name} twice")
    return dict(pairs)


def _of_utf_8(record):
    """Returns the record.

    Raises:
        UnicodeError: the record's text holds bytes that are not UTF-8.
    """
    if isinstance(record, str):
        record.encode("utf-8", "surrogateescape").decode()
    return record


def _checked(prompt: str) -> str:
    """The prompt without surrounding whitespace.

    Raises:
        ValueError: the prompt is not valid text, or holds a control character.
    """
    prompt = prompt.strip()
    prompt.encode("utf-8", "surrogateescape").decode()
    prompt.encode()  # half a surrogate pair is valid JSON, but not valid text
    if match := CONTROL.search(prompt):
        raise ValueError(f"it holds the control character U+{ord(match[0]):04X}")
    return prompt


def requests_of(prompts: list[Prompt], args) -> list[Request]:
    """The images to make.

    Image i of the prompt with index k has the seed --seed + k * --num_images_per_prompt + i. If the file sets the
    prompt's seed, image i has that seed + i. So batches and processes change neither seeds nor names.
    """
    count, requests = args.num_images_per_prompt, []
    for prompt in prompts:
        first = args.seed + prompt.index * count if prompt.seed is None else prompt.seed
        requests += [Request(prompt.text, seed, numbered_path(args.output_file, prompt.index, seed))
                     for seed in range(first, first + count)]
    return requests


def image_paths(args, prompts: list[Prompt] | None) -> list[Path]:
    """Every file that gen_image.py saves an image to. `prompts` is None without --prompts-file."""
    if prompts:
        return [request.path for request in requests_of(prompts, args)]
    if args.num_images_per_prompt == 1:
        return [as_path(args.output_file)]
    return [numbered_path(args.output_file, i, args.seed + i) for i in range(args.num_images_per_prompt)]
