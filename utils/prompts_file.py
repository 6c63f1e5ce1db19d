"""--prompts-file: lines of text, lines of JSON, a JSON list or a table, recognised by content."""

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

CURE = ('Give a text file of one prompt a line, in UTF-8, or JSON: lines or a list of {"prompt": "a cat", "seed": 42}, '
        "the seed optional.")
FORM = 'not of the form {"prompt": "a cat", "seed": 42}, the seed optional'
# The mark of UTF-16 begins that of UTF-32.
BYTE_ORDER_MARKS = {b"\xff\xfe\x00\x00": "utf-32-le", b"\x00\x00\xfe\xff": "utf-32-be", b"\xef\xbb\xbf": "utf-8",
                    b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and line breaks, which JSON may hold


class Prompt(NamedTuple):
    line: int  # from 1; in a JSON list, the item
    index: int  # among the lines that are not blank, bad ones included: mending one renumbers no other
    text: str
    seed: int | None = None  # of its first image, if the file says so


class Records(NamedTuple):
    """What a file holds, before each record is looked at."""
    unit: str  # what `numbered` counts: lines or items
    numbered: list[tuple[int, object]]  # from 1; blank lines are left out
    parse: Callable[[object], tuple[str, int | None]]  # a record's (prompt, seed); ValueError says what is wrong


def read_prompts(path: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, and what is wrong with the lines that were left out.

    A line is a prompt, or {"prompt": ..., "seed": ...}, the seed optional. The whole may be a JSON list of strings or
    of such objects, {"prompts": [...]}, or a .csv or .tsv table with a column "prompt". UTF-8, UTF-16 or UTF-32. Blank
    lines are nothing.

    Raises:
        RecipeError: there is no prompt in it, or it is something else.
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
        raise RecipeError(f"{what}: it is a binary file, with bytes of 0. {CURE}")
    if not prompts:
        unusable = f" {len(complaints)} {records.unit}s are unusable; {complaints[0]}." if complaints else ""
        raise RecipeError(f"{what} holds no prompt: write one a line.{unusable}")
    return prompts, complaints


def _decoded(data: bytes) -> str:
    """The text, its line ends \\n. A byte that is not UTF-8 becomes a surrogate, which spoils its line alone."""
    codec = "utf-8"
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            data, codec = data[len(mark):], name
            break
    else:
        for half, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            # Of ASCII every other byte is 0; text in UTF-8 has none.
            if data[half::2].count(0) > len(data[half::2]) / 2 and not data[1 - half::2].count(0):
                codec = name
    text = data.decode(codec, "surrogateescape" if codec == "utf-8" else "strict")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(text: str, suffix: str) -> Records:
    """The records of a file's text. ValueError: it is of a form that holds no prompts."""
    if suffix in (".yaml", ".yml"):
        raise ValueError("yaml is not read")
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
            # What looks like JSON and is not is no prompt.
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
    """The rows of a table of .csv or .tsv, or with the header prompt and seed; None: it is something else."""
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
    """(prompt, seed) of a row of a table."""
    if len(row) > len(header):
        raise ValueError(f"{len(row)} fields below a header of {len(header)}: put the prompt in quotes")
    fields = dict(zip(header, row, strict=False))
    seed = fields.get("seed", "").strip()
    return _from_record({"prompt": fields.get("prompt"),
                         "seed": int(seed) if re.fullmatch("[0-9]{1,19}", seed) else seed or None})


def _is_comment(line: str) -> bool:
    return line == "#" or line.startswith("# ")


def _from_text(line: str) -> tuple[str, None]:
    if _is_comment(line):
        raise ValueError("a comment")
    if re.match(r'\{\s*"prompt"\s*:', line):
        raise ValueError("JSON among lines of text: begin with it, or call the file .jsonl")
    return line, None


def _from_json(line: str) -> tuple[str, int | None]:
    """(prompt, seed) of a line of JSON."""
    try:
        return _from_record(json.loads(line, object_pairs_hook=_once))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error


def _from_item(item) -> tuple[str, int | None]:
    """(prompt, seed) of an item of a JSON list."""
    return _from_record({"prompt": item} if isinstance(item, str) else item)


def _from_record(record) -> tuple[str, int | None]:
    """(prompt, seed) of {"prompt": ..., "seed": ...}; other keys are of no concern. ValueError says what is wrong."""
    prompt, seed = (record.get("prompt"), record.get("seed")) if isinstance(record, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(FORM)
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise ValueError(f"its seed is {json.dumps(seed)[:50]}, not a whole number from 0 to 2^63 - 1")
    return prompt, seed


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, whose prompt and seed are there once: json itself takes the last."""
    names = [name for name, _ in pairs]
    for name in ("prompt", "seed", "prompts"):
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice in one object")
    return dict(pairs)


def _of_utf_8(record):
    """The record. UnicodeError: its text holds bytes that are not UTF-8."""
    if isinstance(record, str):
        record.encode("utf-8", "surrogateescape").decode()
    return record


def _checked(prompt: str) -> str:
    """The prompt without blanks around it. ValueError: it is not text."""
    prompt = prompt.strip()
    prompt.encode("utf-8", "surrogateescape").decode()
    prompt.encode()  # half a surrogate pair is valid JSON and no text
    if found := CONTROL.search(prompt):
        raise ValueError(f"it holds the control character U+{ord(found[0]):04X}")
    return prompt
