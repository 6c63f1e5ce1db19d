"""Prompt files as other programs leave them: recognised by content, or refused; a bad line costs no other."""

import csv
import io
import json
import os
import pickle
import random
import re
import zipfile

import pytest

from utils.benchmark_utils import create_parser
from utils.common import RecipeError
from utils.images import numbered_path
from utils.prompts_file import read_prompts, references_of, requests_of, texts_of

TEXTS = ["3d frog on a navy background", 'a "café", 猫 and 🐸', "# is a hash", "flat avocado"]


def read(tmp_path, data, name="p.txt", argv=()):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_prompts(str(path), create_parser().parse_args(["--prompts-file", str(path), *argv]))


def texts(tmp_path, data, name="p.txt") -> list[str]:
    prompts, complaints = read(tmp_path, data, name)
    assert complaints == []
    return [prompt.text for prompt in prompts]


def about(number: int, complaint: str) -> bool:
    """Whether a complaint names the line, or the item, of this number."""
    return bool(re.search(rf"\b{number}\b", complaint))


@pytest.mark.parametrize("line, named", [
    ('["a cat"]', ""), ('{"text": "a cat"}', ""), ('{"prompt": " "}', ""), ('{"prompt": "a cat", "seed": -1}', "-1"),
    ('{"prompt": "a cat", "seed": true}', "true"), ('{"prompt": "a cat", "seed": 1e3}', "1000.0"),
    ('{"prompt": "\\ud800"}', "UTF-8"), ("[" * 100_000, ""), ('{"prompt": "a cat", "seed": null}', None),
    ('{"prompt": "a cat", "seed": NaN}', "seed"), ('{"prompt": "a cat", "seed": Infinity}', "seed"),
    ('{"prompt": "a cat", "seed": 9223372036854775808}', "seed"), ('{"prompt": "a cat", "seed": "7"}', "seed"),
    ('{"prompt": "a cat", "seed": 1' + "0" * 5000 + "}", ""), ('{"prompt": "a\\u0000cat"}', "U+0000"),
    ('{"prompt": "a dog", "prompt": "a cat"}', ""), ('{"prompt": ["a cat"]}', ""), ("# a comment", "JSON"),
    ('{"prompt": "a cat"', "JSON"),
])
def test_read_prompts_bad_line_of_json_is_left_out_by_its_number(tmp_path, line, named):
    prompts, complaints = read(tmp_path, f'{{"prompt": "first"}}\n{line}\n', "p.jsonl")
    assert [prompt.text for prompt in prompts] == (["first", "a cat"] if named is None else ["first"])
    assert [named in complaint and about(2, complaint) for complaint in complaints] == [True] * (named is not None)


def test_read_prompts_lines_of_text_keep_their_numbers(tmp_path):
    """So that mending a bad line renames no other image."""
    prompts, complaints = read(tmp_path, "\ufeffa café\u2028au\tlait\r\n\u3000\n".encode() + b"caf\xe9\na dog")
    assert [(prompt.line, prompt.index, prompt.text) for prompt in prompts] == [
        (1, 0, "a café\u2028au\tlait"), (4, 2, "a dog")]
    assert len(complaints) == 1 and about(3, complaints[0]) and "UTF-8" in complaints[0]


@pytest.mark.parametrize("bad", [b"# a comment", b"#", b"a\0cat", b"a\x0bcat", b"a\x1bcat", "a\x85cat".encode(),
                                 b"\xff", b'{"prompt": "a cat"}'])
def test_read_prompts_line_that_is_no_prompt_is_left_out_and_counted(tmp_path, bad):
    prompts, complaints = read(tmp_path, b"first\n" + bad + b"\n" + b"\n".join(b"more %d" % i for i in range(20)))
    assert [(prompt.line, prompt.index) for prompt in prompts] == [(1, 0), *((i + 3, i + 2) for i in range(20))]
    assert len(complaints) == 1 and about(2, complaints[0])


@pytest.mark.parametrize("codec, mark", [
    ("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"),
    ("utf-32-le", b"\xff\xfe\0\0"), ("utf-32-be", b"\0\0\xfe\xff"),
])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_read_prompts_of_every_encoding_and_line_end_are_the_same(tmp_path, codec, mark, end):
    for texts_in in (TEXTS, TEXTS[1:2]):
        if texts_in[0] != TEXTS[0] and not mark and codec != "utf-8":
            continue
        lines = [text for text in texts_in if not text.startswith("#")]
        assert texts(tmp_path, mark + end.join(lines).encode(codec)) == lines
        assert texts(tmp_path, mark + json.dumps(texts_in, indent=1).replace("\n", end).encode(codec)) == texts_in


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_read_prompts_utf_16_without_a_mark_is_recognised(tmp_path, codec):
    assert texts(tmp_path, "a cat\r\na dog at the café\r\n".encode(codec)) == ["a cat", "a dog at the café"]


@pytest.mark.parametrize("name", ["p.json", "p.txt", "p.jsonl", "p"])
@pytest.mark.parametrize("indent", [None, 1])
def test_read_prompts_one_json_document_by_any_name_is_recognised(tmp_path, name, indent):
    records = [{"prompt": text, "seed": i, "width": 16} for i, text in enumerate(TEXTS)]
    for whole in (records, {"prompts": records, "version": 1}):
        prompts, complaints = read(tmp_path, json.dumps(whole, indent=indent), name)
        assert [prompt[:5] for prompt in prompts] == [
            (i + 1, i, text, i, (("width", 16),)) for i, text in enumerate(TEXTS)]
        assert {prompt.unit for prompt in prompts} == {"item"}
        assert ["version" in complaint for complaint in complaints] == [True] * (whole is not records)
    for whole in (TEXTS, {"prompts": TEXTS}):
        assert texts(tmp_path, json.dumps(whole, indent=indent, ensure_ascii=False), name) == TEXTS
    for lines, place in (("", (1, "line" if indent is None else "item")), ("\n", (2, "line"))):
        if indent is None or not lines:
            [prompt], _ = read(tmp_path, lines + json.dumps({"prompt": "a cat"}, indent=indent), name)
            assert (prompt.text, (prompt.line, prompt.unit)) == ("a cat", place)


def test_read_prompts_bad_item_of_a_list_is_left_out_and_counted(tmp_path):
    prompts, complaints = read(tmp_path, json.dumps(["a", 3, {"prompt": "b", "seed": -1}, None, "", {"prompt": "c"}]))
    assert [(prompt.line, prompt.index, prompt.text) for prompt in prompts] == [(1, 0, "a"), (6, 5, "c")]
    assert len(complaints) == 4 and all(about(i, one) for i, one in enumerate(complaints, 2))


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "lines.jsonl.txt", "p.json", "p"])
def test_read_prompts_json_lines_by_any_name_are_recognised(tmp_path, name):
    lines = "\n".join(json.dumps({"height": 64, "prompt": text, "seed": 5}) for text in TEXTS)
    prompts, complaints = read(tmp_path, "\n" + lines, name)
    assert [prompt[:4] for prompt in prompts] == [(i + 2, i, text, 5) for i, text in enumerate(TEXTS)]
    assert complaints == []


SETTINGS = {"negative_prompt": "blue", "height": 64, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.0,
            "image": "http://127.0.0.1/a.png"}


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv"])
def test_read_prompts_line_sets_flags_and_the_number_of_images(tmp_path, name):
    record = {"prompt": "a cat", **SETTINGS, "num_images": 2}
    if name == "p.jsonl":
        data = '{"prompt": "first"}\n' + json.dumps(record | {"seed": None})
    elif name == "p.json":
        data = json.dumps(["first", record])
    else:
        delimiter = "," if name == "p.csv" else "\t"
        data = "\n".join(delimiter.join(row) for row in (record, ["first"] + [" "] * 7, map(str, record.values())))
    prompts, complaints = read(tmp_path, data, name, ["--true_cfg_scale", "2", "--negative_prompt", "red"])
    assert complaints == [] and [prompt.text for prompt in prompts] == ["first", "a cat"]
    assert prompts[0].settings == () and prompts[0].num_images is None
    assert dict(prompts[1].settings) == SETTINGS and prompts[1].num_images == 2
    for key, value in prompts[1].settings:
        assert type(value) is type(SETTINGS[key])


@pytest.mark.parametrize("field, named", [
    ({"heigth": 64}, "heigth.*height"), ({"num_images_per_prompt": 2}, "num_images_per_prompt.*num_images"),
    ({"": 1, "a\nb": 2}, r'"", "a\\nb"'), ({"lora": 7}, "lora is 7"),
    ({"lora": ["x", 7]}, "lora is"), ({"lora": {"x": 1}}, "lora is"), ({"lora": ["a\0b"]}, r"U\+0000"),
    ({"height": 100}, "--height 100.*16.*96"), ({"height": 0}, "--height 0"), ({"width": -16}, "--width -16"),
    ({"width": 65552}, "--width.*65552.*png"), ({"height": "64"}, 'height is "64"'), ({"height": 64.0}, "height.*64.0"),
    ({"height": True}, "height is true"), ({"height": 10**400}, "--height"), ({"width": [64]}, r"width is \[64\]"),
    ({"num_inference_steps": 0}, "--num_inference_steps 0"), ({"num_inference_steps": "4"}, "num_inference_steps"),
    ({"guidance_scale": float("nan")}, "guidance_scale is NaN"), ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"guidance_scale": float("-inf")}, "guidance_scale.*finite"), ({"guidance_scale": "3"}, "guidance_scale"),
    ({"negative_prompt": "blue"}, "--negative_prompt.*--true_cfg_scale"), ({"negative_prompt": 3}, "negative_prompt"),
    ({"negative_prompt": "a\0b"}, r"U\+0000"), ({"negative_prompt": "\ud800"}, "UTF-8"),
    ({"image": "nowhere.png"}, "--image nowhere.png"), ({"image": ""}, None), ({"image": "x" * 5000}, "no such file"),
    ({"image": 7}, "image is 7"), ({"num_images": 0}, "num_images_per_prompt 0"), ({"num_images": 1.5}, "num_images"),
], ids=lambda x: (json.dumps(x) if isinstance(x, dict) else x or "taken")[:30])
def test_read_prompts_setting_that_its_flag_refuses_is_named_with_its_line(tmp_path, field, named):
    for name, data in (("p.jsonl", '{"prompt": "first"}\n' + json.dumps({"prompt": "a cat"} | field)),
                       ("p.json", json.dumps(["first", {"prompt": "a cat"} | field]))):
        prompts, complaints = read(tmp_path, data, name, ["--output-file", "x.jpg"])
        assert [prompt.text for prompt in prompts] == ["first", "a cat"][:1 if named else 2]
        assert [bool(re.search(named, complaint)) and about(2, complaint) for complaint in complaints] == (
            [True] if named else [])
        assert all(len(complaint) < 6000 and "\n" not in complaint for complaint in complaints)


def test_read_prompts_field_of_a_table_that_its_flag_refuses_is_named_with_its_line(tmp_path):
    rows = ["prompt,height,guidance_scale,num_images,note", "a,64,3.5,2,x", "b,100,,,", "c,64.0,,,", "d,,nan,,",
            "e,,,-1,", "f,0064,1e1,,", "g,,,0,"]
    prompts, complaints = read(tmp_path, "\n".join(rows), "p.txt")
    assert [(prompt.text, dict(prompt.settings), prompt.num_images) for prompt in prompts] == [
        ("a", {"height": 64, "guidance_scale": 3.5}, 2), ("f", {"height": 64, "guidance_scale": 10.0}, None)]
    assert '"note"' in complaints[0] and "is left out" not in complaints[0]
    assert [about(line, one) for line, one in zip((3, 4, 5, 6, 8), complaints[1:], strict=True)] == [True] * 5


def test_read_prompts_without_a_command_line_takes_seeds_alone(tmp_path):
    """bench.fidelity draws all prompts with the same settings."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 3}\n{"prompt": "b", "width": 64}')
    prompts, [complaint] = read_prompts(str(tmp_path / "p.jsonl"))
    assert [(prompt.text, prompt.seed) for prompt in prompts] == [("a", 3)]
    assert "width" in complaint and about(2, complaint)


def test_requests_of_lines_with_numbers_of_images_keep_the_seeds_of_the_others(tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "num_images": 4}, {"prompt": "c", "num_images": 1, "seed": 7},
             {"prompt": "d", "height": 64}]
    argv = ["--num_images_per_prompt", "2", "--output-file", "x.png", "--seed", "10"]
    prompts, _ = read(tmp_path, "\n".join(map(json.dumps, lines)), "p.jsonl", argv)
    requests = requests_of(prompts, create_parser().parse_args(argv))
    seeds = [("a", 0, [10, 11]), ("b", 1, [12, 13, 14, 15]), ("c", 2, [7]), ("d", 3, [16, 17])]
    assert [(one.prompt, one.seed, one.path) for one in requests] == [
        (text, seed, numbered_path("x.png", index, seed)) for text, index, each in seeds for seed in each]
    assert [one.settings for one in requests[-3:]] == [(), (("height", 64),), (("height", 64),)]


@pytest.mark.parametrize("value, expected", [
    ("a b.safetensors:0.8", ("a b.safetensors:0.8",)), (["x", "y:2"], ("x", "y:2")), ("", ()), ([], ()), (None, None)])
def test_read_prompts_lora_is_one_or_a_list_or_none(tmp_path, value, expected):
    prompts, complaints = read(tmp_path, json.dumps({"prompt": "a", "lora": value}), "p.jsonl", [])
    assert complaints == [] and dict(prompts[0].settings).get("lora") == expected


def test_read_prompts_lora_in_a_table(tmp_path):
    prompts, _ = read(tmp_path, "prompt,lora\na,x.safetensors:0.5\nb,\n", "p.csv", [])
    assert [dict(prompt.settings).get("lora") for prompt in prompts] == [("x.safetensors:0.5",), None]
    assert "x.safetensors" in texts_of(prompts)[0]


def test_references_and_texts_of_lines(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    lines = [{"prompt": "a"}, {"prompt": "b", "image": "https://a/b.png"},
             {"prompt": "c", "image": str(tmp_path / "a.png"), "negative_prompt": "blue"}]
    prompts, _ = read(tmp_path, "\n".join(map(json.dumps, lines)), "p.jsonl",
                      ["--true_cfg_scale", "2", "--negative_prompt", ""])
    [(name, path)] = references_of(prompts)
    assert about(3, name) and path == tmp_path / "a.png"
    assert texts_of(prompts)[0] == "a" and {"c", "blue"} <= set(re.split(r"(?<=^c)|/", texts_of(prompts)[2]))


def test_read_prompts_brackets_and_braces_are_text(tmp_path):
    lines = ["{red|blue} cat", "[photo] a dog, [blurry:0.5]", "(a cat:1.2)", '"in quotes"', "prompt", "seed, a prompt"]
    for first in range(len(lines)):
        turned = lines[first:] + lines[:first]
        assert texts(tmp_path, "\n".join(turned)) == turned


@pytest.mark.parametrize("name, delimiter", [("p.csv", ","), ("p.csv", ";"), ("p.tsv", "\t"), ("p.txt", ",")])
def test_read_prompts_table_has_prompts_and_seeds(tmp_path, name, delimiter):
    file = io.StringIO()
    table = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
    table.writerows([["id", " Prompt", "seed"], [7, TEXTS[0], 3], [8, TEXTS[1], ""], [], [9, "of\ntwo lines", 0],
                     [10, "bad seed", "1.5"], [11, "", 1], [12, "unquoted", 1, 2], [13, "last", 2**63 - 1]])
    prompts, complaints = read(tmp_path, "\ufeff\n" + file.getvalue(), name)
    assert [prompt[:4] for prompt in prompts] == [
        (3, 0, TEXTS[0], 3), (4, 1, TEXTS[1], None), (6, 2, "of\ntwo lines", 0), (11, 6, "last", 2**63 - 1)]
    assert '"id"' in complaints[0]
    assert all(about(line, one) for line, one in zip((8, 9, 10), complaints[1:], strict=True))


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("xl/workbook.xml", "a cat")
    return file.getvalue()


@pytest.mark.parametrize("name, data, word", [
    ("p.txt", b"", ""), ("p.txt", b" \n\t\r\n", ""), ("p.json", b"[]", ""),
    ("p.csv", b"prompt,seed\n", ""), ("p.csv", b"prompt", ""),
    ("p.txt", b"# only\n# comments", ""),
    ("p.jsonl", b'{"text": "a"}\n{"text": "b"}', ""), ("p.txt", b'{"text": "a"}\n{"text": "b"}', ""),
    ("p.csv", b"text,seed\na cat,1", "prompt"), ("p.csv", b"", "prompt"),
    ("p.csv", b"prompt,seed,prompt\na,1,b", ""), ("p.csv", b"prompt,width,Width\na,16,32", "twice"),
    ("p.csv", b'prompt,seed\n"a cat,1\n', ""),
    ("p.json", b'{"images": [1]}', ""), ("p.json", b"3", "JSON"),
    ("p.json", b"a cat", "JSON"), ("p.json", b'"a cat"', "JSON"), ("p.json", b"", "JSON"), ("p.json", b'["a",', "JSON"),
    ("p.txt", b'["a cat",\n "a dog",\n]', "JSON"), ("p.txt", b"['a cat', 'a dog']", "JSON"),
    ("p.txt", b"[\n'a'\n]", "JSON"),
    ("p.json", b"[" * 100_000, "JSON"), ("p.json", b'{"prompts": ["a"], "prompts": ["b"]}', ""),
    ("p.yaml", b"- a cat", "yaml"), ("p.yml", b"prompts: [a]", "yaml"),
    ("p.xlsx", archive(), "zip"), ("p.pkl", pickle.dumps(TEXTS), "pickle"), ("p.pkl", pickle.dumps(TEXTS, 2), "pickle"),
    ("p.parquet", b"PAR1\x15\0", "Parquet"), ("p.pdf", b"%PDF-1.5", "PDF"), ("p.rtf", b"{\\rtf1 a cat}", "RTF"),
    ("p.txt", b"<!DOCTYPE html>\n<p>a cat", "HTML"), ("p.txt", b"version https://git-lfs.github.com/spec/v1", "LFS"),
    ("p.bin", random.Random(0).randbytes(5000), ""), ("p.txt", b"3d frog\0 on navy", ""),
    ("p.txt", b"\xff\xfea\0b", ""), ("p.npy", b"\x93NUMPY\x01\0", "NumPy"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_read_prompts_file_without_prompts_is_refused(tmp_path, name, data, word):
    with pytest.raises(RecipeError, match=rf"{name}[\s\S]*{word}") as refused:
        read(tmp_path, data, name)
    assert len(str(refused.value)) < 700


def test_read_prompts_path_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt", tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match=path.name):
            read_prompts(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_read_prompts_without_permission_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "p.txt").chmod(0)
    with pytest.raises(RecipeError, match=r"p\.txt"):
        read_prompts(str(tmp_path / "p.txt"))


def test_read_prompts_of_mutated_files_are_text_of_theirs_or_refused(tmp_path):
    """Each prompt is text of the file, read with one of the encodings, or with JSON's escapes undone."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    plain = ["3d frog on a navy background", "a café", "猫 on a mat", "a key, of gold"]
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "seed"], *([text, i] for i, text in enumerate(plain))])
    originals = {"txt": "\n".join(plain), "json": json.dumps(plain, ensure_ascii=False), "csv": table.getvalue(),
                 "jsonl": "\n".join(json.dumps({"prompt": text, "seed": 3}, ensure_ascii=False) for text in plain)}
    for number in range(120):
        suffix = rng.choice(list(originals))
        data = bytearray(originals[suffix].encode(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])))
        kind = rng.choice(["flip", "cut", "insert", "rename", "doubled"])
        if kind == "flip":
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[rng.randrange(len(data)):]
        elif kind == "insert":
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 5))
        elif kind == "doubled":
            data += bytes(data)
        else:
            suffix = rng.choice(["txt", "json", "jsonl", "csv", "tsv", "yaml", "md"])
        name = f"{number}.{suffix}"
        try:
            prompts, complaints = read(tmp_path, bytes(data), name)
        except RecipeError as error:
            assert name in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        decoded = [bytes(data).decode(codec, "replace") for codec in
                   ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32")]
        for prompt in prompts:
            forms = (prompt.text, json.dumps(prompt.text, ensure_ascii=False)[1:-1])
            assert any(form in text for text in decoded for form in forms), (name, prompt)
        assert len({prompt.index for prompt in prompts}) == len(prompts)
        assert all(name in complaint for complaint in complaints)
        outcomes["read"] += 1
    assert min(outcomes.values()) >= 20
