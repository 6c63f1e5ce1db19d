"""Reads --prompts-file: lines of text, lines of JSON, a JSON list or a table. The content decides the format. Names the
images of its prompts.

A line of JSON or of a table may replace flags for its own images. It is checked as the command line with these flags.
"""

import argparse
import csv
import functools
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from utils.benchmark_utils import check_image, scheme_of
from utils.common import RecipeError, finite_float, reading
from utils.file_kinds import kind_of
from utils.images import numbered_path
from utils.output_checks import check_sides
from utils.outputs import as_path

# The flags that a line may replace, and the types of their values.
SETTINGS = {"negative_prompt": str, "height": int, "width": int, "num_inference_steps": int, "guidance_scale": float,
            "image": str, "mask_image": str, "control_image": str, "strength": float, "lora": tuple}
KEYS = {"prompt": str, "seed": int, "num_images": int} | SETTINGS
MEANINGS = {str: "text", int: "a whole number", float: "a finite number",
            tuple: "a text or a list of texts"}
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
    settings: tuple[tuple[str, object], ...] = ()  # (flag of `SETTINGS`, value) of what the file sets
    num_images: int | None = None  # if the file sets it; otherwise --num_images_per_prompt
    unit: str = "line"  # "line" or "item"


class Request(NamedTuple):
    """An image to make."""
    prompt: str
    seed: int
    path: Path
    settings: tuple[tuple[str, object], ...] = ()


class Records(NamedTuple):
    """The records of a file before they are parsed."""
    unit: str  # "line" or "item"
    numbered: list[tuple[int, object]]  # (number from 1, record), without blank lines
    parse: Callable[[object], object]  # returns a record's {key: value}, unchecked; raises ValueError
    ignored: tuple[str, ...] = ()  # unknown names that belong to no record: a table's columns, a document's keys


def read_prompts(path: str, args: argparse.Namespace | None = None) -> tuple[list[Prompt], list[str]]:
    """Reads the prompts of a file.

    A line is a prompt, or {"prompt": ..., "seed": ..., ...}, where all of `KEYS` but the prompt are optional. The file
    may also be a JSON list of strings or of such objects, {"prompts": [...]}, or a .csv or .tsv table with a column
    "prompt". The encoding is UTF-8, UTF-16 or UTF-32. Blank lines are ignored.

    Args:
        args: the parsed command line, whose flags a line may replace. None: a line may set its seed alone.

    Returns:
        (prompts, complaints). A complaint is a line of text that says why a bad line of the file is left out, or what
        of the file is ignored.

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
            fields = _checked(records.parse(_of_utf_8(record)), args)
            settings = tuple((name, fields[name]) for name in SETTINGS if name in fields)
            prompts.append(Prompt(number, index, fields["prompt"], fields.get("seed"), settings,
                                  fields.get("num_images"), records.unit))
        except (ValueError, RecursionError, RecipeError) as error:
            complaints.append(left_out(path, records.unit, number, error))
    if "\0" in text and len(complaints) * 10 >= len(records.numbered):
        raise RecipeError(f"{what}: it is a binary file that contains zero bytes. {CURE}")
    if not prompts:
        unusable = f" {len(complaints)} {records.unit}s are unusable; {complaints[0]}." if complaints else ""
        raise RecipeError(f"{what} holds no prompt. Write one prompt per line.{unusable}")
    if records.ignored:
        complaints.insert(0, f"{what}: {', '.join(map(_short, records.ignored))}: unknown and ignored. Known are "
                             f"{', '.join(KEYS)}")
    return prompts, complaints


def left_out(path: str, unit: str, number: int, error: Exception) -> str:
    """The complaint about a line, or an item, that is left out because of `error`."""
    why = f"not UTF-8 text ({error.reason})" if isinstance(error, UnicodeError) else str(error).rstrip(".")
    return f"--prompts-file {path}, {unit} {number} is left out: {why}"


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
    ignored = ()
    if isinstance(whole, dict) and isinstance(whole.get("prompts"), list):
        ignored, whole = tuple(name for name in whole if name != "prompts"), whole["prompts"]
    elif isinstance(whole, dict) and len(lines) > 1:
        whole = [whole]
    if isinstance(whole, list):
        return Records("item", list(enumerate(whole, 1)), _from_item, ignored)
    if whole is not None and not isinstance(whole, dict):
        raise ValueError(f"its JSON is neither a list nor an object, but {_short(whole)}")
    return Records("line", lines, _from_json if of_lines or whole is not None else _from_text)


def _table(text: str, lines: list[tuple[int, str]], suffix: str) -> Records | None:
    """The rows of a table, or None if the text is not a table.

    A table is a .csv or .tsv file, or has "prompt" and another of `KEYS` in its header.

    Raises:
        ValueError: the header lacks the column "prompt", or names a column twice.
    """
    start, first = lines[0] if lines else (1, "")
    for delimiter in ("\t",) if suffix == ".tsv" else (",", ";", "\t"):
        header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        known = [name for name in header if name in KEYS]
        if "prompt" not in known or not (suffix in (".csv", ".tsv") or len(set(known)) > 1):
            continue
        if len(set(known)) < len(known):
            raise ValueError("its header names a column twice")
        numbered, number, below = [], start + 1, "\n".join(text.split("\n")[start:])
        rows = csv.reader(io.StringIO(below, newline=""), delimiter=delimiter, strict=True)
        for row in rows:
            if any(field.strip() for field in row):
                numbered.append((number, row))
            number = start + 1 + rows.line_num
        unknown = tuple(name for name in header if name and name not in KEYS)
        return Records("line", numbered, functools.partial(_from_row, header), unknown)
    if suffix in (".csv", ".tsv"):
        raise ValueError('its first line names no column "prompt"')
    return None


def _from_row(header: list[str], row: list[str]) -> dict:
    """The known fields of a table's row that are not empty."""
    if len(row) > len(header):
        raise ValueError(f"{len(row)} fields, but the header has {len(header)}: put the prompt in quotes")
    fields = {name: field.strip() for name, field in zip(header, row, strict=False) if name in KEYS}
    return {name: _number(field, KEYS[name]) for name, field in fields.items() if field}


def _number(field: str, kind: type) -> str | int | float:
    """A table's field as the number that it stands for, or as it is."""
    if kind is int and re.fullmatch("[0-9]{1,19}", field):
        return int(field)
    if kind is float:
        with suppress(argparse.ArgumentTypeError):
            return finite_float(field)
    return field


def _is_comment(line: str) -> bool:
    return line == "#" or line.startswith("# ")


def _from_text(line: str) -> dict:
    if _is_comment(line):
        raise ValueError("it is a comment")
    if re.match(r'\{\s*"prompt"\s*:', line):
        raise ValueError("it is JSON among lines of text: begin the file with JSON, or name it .jsonl")
    return {"prompt": line}


def _from_json(line: str):
    """A line of JSON."""
    try:
        return json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error


def _from_item(item):
    """A JSON list's item: a string or an object."""
    return {"prompt": item} if isinstance(item, str) else item


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object that has each known name at most once. `json` itself would keep the last of them.

    Raises:
        ValueError: a name is repeated.
    """
    names = [name for name, _ in pairs]
    for name in (*KEYS, "prompts"):
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


def _checked(record, args: argparse.Namespace | None) -> dict:
    """The fields that a record sets, checked as far as no checkpoint is needed.

    Args:
        record: what should be {"prompt": ..., ...}. null stands for a missing value.
        args: see `read_prompts`.

    Raises:
        ValueError: the record has another form, an unknown key, or a value of another type.
        RecipeError: a flag would not take the value.
    """
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(FORM)
    known = KEYS if args else ("prompt", "seed")
    if unknown := [_short(key) for key in record if key not in known]:
        raise ValueError(f"unknown key {', '.join(unknown)} (known are {', '.join(known)})")
    fields = {key: _value(key, value) for key, value in record.items() if value is not None}
    if not 0 <= fields.get("seed", 0) < 2**63:
        raise ValueError(f"its seed is {_short(fields['seed'])}, not from 0 to 2^63 - 1")
    own = {name: fields[name] for name in SETTINGS if name in fields}
    if "num_images" in fields:
        own["num_images_per_prompt"] = fields["num_images"]
    if own:
        line = args_with(args, own)
        check_image(line)
        check_sides(line)
    return fields


def _value(key: str, value):
    """The value of a known key in its type.

    Raises:
        ValueError: it has another type, is not finite, or is text that `_text` refuses.
    """
    kind = KEYS[key]
    if kind is tuple and isinstance(value, (str, list)):
        texts = [value] if isinstance(value, str) else value
        if all(isinstance(text, str) for text in texts):
            return tuple(filter(None, map(_text, texts)))
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"its {key} is {_short(value)}, not {MEANINGS[kind]}")
    if kind is not float:
        return _text(value) if kind is str else value
    try:
        return finite_float(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"its {key} is {_short(value)}, not {MEANINGS[kind]}") from error


def _text(text: str) -> str:
    """The text without surrounding whitespace.

    Raises:
        ValueError: the text is not valid, or holds a control character.
    """
    text = text.strip()
    text.encode("utf-8", "surrogateescape").decode()
    text.encode()  # half a surrogate pair is valid JSON, but not valid text
    if match := CONTROL.search(text):
        raise ValueError(f"it holds the control character U+{ord(match[0]):04X}")
    return text


def _short(value) -> str:
    """A value of the file for a message."""
    return json.dumps(value)[:50]


def args_with(args: argparse.Namespace, settings) -> argparse.Namespace:
    """The command line with a line's settings in place of its flags.

    Args:
        settings: `Prompt.settings`, or a dictionary.
    """
    settings = dict(settings)
    if "lora" in settings:  # as the flag gives them
        settings["lora"] = list(settings["lora"]) or None
    return argparse.Namespace(**vars(args) | settings)


def settings_of(args: argparse.Namespace) -> tuple[tuple[str, object], ...]:
    """The values of the flags that a line may replace, as `Prompt.settings`."""
    values = {name: getattr(args, name) for name in SETTINGS} | {"lora": tuple(args.lora or ())}
    return tuple((name, value) for name, value in values.items() if value is not None)


def requests_of(prompts: list[Prompt], args) -> list[Request]:
    """The images to make.

    Image i of the prompt with index k has the seed --seed + k * --num_images_per_prompt + i. If the file sets the
    prompt's seed, image i has that seed + i. So batches, processes and other lines change neither seeds nor names.
    """
    requests = []
    for prompt in prompts:
        first = args.seed + prompt.index * args.num_images_per_prompt if prompt.seed is None else prompt.seed
        requests += [Request(prompt.text, seed, numbered_path(args.output_file, prompt.index, seed), prompt.settings)
                     for seed in range(first, first + (prompt.num_images or args.num_images_per_prompt))]
    return requests


def texts_of(prompts: list[Prompt]) -> list[str]:
    """All text of each prompt: what the metadata of its images holds in addition to the command line's."""
    return ["".join([prompt.text, *("".join(value) for _, value in prompt.settings if isinstance(value, (str, tuple)))])
            for prompt in prompts]


def references_of(prompts: list[Prompt]) -> list[tuple[str, Path]]:
    """(name, path) of each picture that a line sets."""
    return [(f"the {name} in {prompt.unit} {prompt.line}", as_path(path)) for prompt in prompts
            for name in ("image", "mask_image", "control_image")
            if (path := dict(prompt.settings).get(name)) and not scheme_of(path)]


def image_paths(args, prompts: list[Prompt] | None) -> list[Path]:
    """Every file that gen_image.py saves an image to. `prompts` is None without --prompts-file."""
    if prompts:
        return [request.path for request in requests_of(prompts, args)]
    if args.num_images_per_prompt == 1:
        return [as_path(args.output_file)]
    return [numbered_path(args.output_file, i, args.seed + i) for i in range(args.num_images_per_prompt)]
