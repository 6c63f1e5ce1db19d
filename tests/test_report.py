"""Tables and pictures from made-up records, and some properties of the tables of the committed ones."""

import io
import json
import re
import xml.etree.ElementTree

import PIL.Image
import pytest

from bench.report import charts, records, tables


def cells_of(table: str) -> list[list[str]]:
    """The cells of a markdown table, without its two lines of head."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def speed(seconds: float, error: float) -> dict:
    on = {"on": True, "how": "bf16"}
    return {
        "model": "black-forest-labs/FLUX.1-schnell", "random_weights": "full", "cached_steps": None,
        "settings": {"height": 1024, "width": 1024, "num_inference_steps": 4, "max_sequence_length": 256,
                     "num_images_per_prompt": 1},
        "techniques": {"bf16": on, "quantization": on | {"on": False}, "attention": on},
        "seconds": {"median": seconds, "min": seconds - 0.01, "max": seconds + 0.01},
        "stages_ms": {"prompt_encoding": 10.0, "denoising_step": 200 * seconds, "decoding": 40.0},
        "step_relative_error": error, "cold_start_s": {}, "peak_memory": {"image": {"reserved_gib": 26.6}},
        "environment": {"packages": {"torch": "2.11.0"}, "gpu": "Made-up <GPU>", "gpu_memory_gib": 79.2,
                        "power_limit": "700 W", "driver": "1.2"}}


def pictures(psnr: float) -> dict:
    part = {"psnr_mean": psnr, "psnr_min": psnr - 9, "ssim": 0.9, "identical": float(psnr == 100)}
    return {"argv": ["--num_inference_steps", "2"], "given": part, "open": part, "judge": {"top5": 1.0},
            "shown": [part | {"prompt": f"3d {name}"} for name in ("cat", "dog")]}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of records in place of results/made-up."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    folder = tmp_path / "made-up"
    for name, record in {"1_eager": speed(0.8, 0.014), "2_compile": speed(0.5, 0.013), "6_float8": speed(0.4, 0.017),
                         "6_float8.2": speed(0.32, 0.017), "7_flags": {"error": "timeout", "output_end": []},
                         "memory_8gib": speed(2.0, None)}.items():
        write(folder / "schnell" / f"{name}.json", record)
    return folder


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_ladder_table_shows_the_newest_finished_records(results):
    rows = {cells[0]: cells[1:] for cells in cells_of(tables.table("made-up/schnell"))}
    assert len(rows) == 4
    found = rows["[+ float8, per-row scales](results/made-up/schnell/6_float8.2.json)"]
    assert found == ["**0.320** (0.310–0.330)", "2.50", "10.0", "64.0", "40.0", "1.70 %", "26.6"]
    assert [row[5] for name, row in rows.items() if "memory_8gib" in name] == ["–"]


def test_ladder_table_has_joules_if_a_record_has_them(results):
    write(results / "schnell" / "6_float8.2.json", speed(0.32, 0.017) | {"energy_j": {"image": 181.6, "step": 40.0}})
    table = tables.table("made-up/schnell")
    assert table.splitlines()[0].endswith("| GiB | J |") and table.splitlines()[1].count("---") == 9
    assert {cells[-1] for cells in cells_of(table)} == {"182", "–"}


def test_ladder_chart_has_a_bar_a_row_without_those_of_small_memory(results):
    picture = xml.etree.ElementTree.fromstring(charts.ladder("made-up/schnell"))
    names = [element.tag.rpartition("}")[2] for element in picture]
    widths = [float(element.get("width")) for element in picture if element.tag.endswith("rect")]
    texts = [" ".join(element.text.split()) for element in picture if element.tag.endswith("text")]
    assert names.count("rect") == 3 and widths == pytest.approx([330, 330 * 5 / 8, 330 * 2 / 5], abs=0.1)
    assert texts[1::2] == ["0.800 s ×1.00", "0.500 s ×1.60", "0.320 s ×2.50"]


def test_contact_sheet_leaves_out_strips_of_other_prompts(results):
    def size():
        return PIL.Image.open(io.BytesIO(charts.contact_sheet(results / "tiny", ("eager", "compile", "int8")))).size

    for row, psnr in (("eager", 100), ("compile", 52), ("int8", 42)):
        write(results / "tiny" / f"{row}.json", pictures(psnr))
        PIL.Image.new("RGB", (160, 80), "teal").save(results / "tiny" / f"{row}.webp")
    three = size()
    record = pictures(30)
    write(results / "tiny" / "int8.json", record | {"shown": record["shown"][:1]})
    two = size()
    assert two[0] == three[0] > 2 * 160 and three[1] == 2 * two[1] > 2 * 80


def test_quality_table_counts_computed_blocks_in_steps(results):
    write(results / "tiny" / "int8.json", pictures(42))
    write(results / "tiny" / "cache.json", pictures(100) | {"computed_steps": 1.56, "cached_steps": 0.5})
    rows = {cells[0].split("/")[-1]: cells[1:] for cells in cells_of(tables.quality_table("made-up"))}
    assert rows["int8.json)"] == ["2", "42.0 (33.0)", "42.0 (33.0)", "0.900", "100 %"]
    assert rows["cache.json)"][:2] == ["1.6", "the same"]
    assert tables.computed_steps({"argv": [], "cached_steps": 8.0}) == "–"
    assert tables.computed_steps({"argv": [], "cached_steps": None}) == "28"


@pytest.mark.parametrize("page, links", [("README.md", "results/"), ("docs/results.md", "../results/"),
                                         ("docs/more/deep.md", "../../results/")])
def test_tables_of_a_page_in_a_folder_link_from_there(results, page, links):
    text = "# Title\n<!-- results:made-up/schnell -->\nold\n<!-- end -->\nafter\n"
    made = tables.with_tables(tables.ROOT / page, text)
    assert made.startswith("# Title\n<!-- results:made-up/schnell -->\n|") and made.endswith("|\n<!-- end -->\nafter\n")
    found = re.findall(r"\]\((.*?)made-up", made)
    assert set(found) == {links} and len(found) == 4


def test_starts_table_of_a_start_that_was_not_timed_has_dashes(results):
    for row, spent in (("start_compile", {"imports": 9.0, "load": 3.0, "compile": 40.0, "record": 2.0,
                                          "process start to first image": 61.5}), ("start_export", None)):
        (results / "schnell" / f"{row}.json").write_text(json.dumps(speed(0.5, None) | {"cold_start_s": spent}))
    cells = [row[1:7] for row in cells_of(tables.starts_table("made-up/schnell"))]
    assert cells == [["9.0", "3.0", "–", "–", "42.0", "**61.5**"], ["–"] * 6]


def test_images_a_minute_tells_what_did_not_fit_from_what_was_not_measured(results):

    def batch(count, seconds):
        record = speed(seconds, None)
        return record | {"settings": record["settings"] | {"num_images_per_prompt": count}}

    failure = {"error": "out of memory", "output_end": []}
    for name, record in {"8_fused": speed(0.25, 0.02), "eager_batch_2": batch(2, 1.5), "batch_2": failure,
                         "batch_2.2": batch(2, 0.5), "eager_batch_4": failure | {"error": "timeout"},
                         "eager_batch_4.2": failure, "batch_4": batch(4, 1.0),
                         "batch_8": failure | {"error": "crash"}}.items():
        (results / "schnell" / f"{name}.json").write_text(json.dumps(record))
    link = "](results/made-up/schnell/"
    assert cells_of(tables.images_a_minute_table("made-up/schnell")) == [
        ["1", f"[75.0{link}1_eager.json)", "26.6", f"[240.0{link}8_fused.json)", "26.6", "3.20"],
        ["2", f"[80.0{link}eager_batch_2.json)", "26.6", f"[240.0{link}batch_2.2.json)", "26.6", "3.00"],
        ["4", f"[out of memory{link}eager_batch_4.2.json)", "–", f"[240.0{link}batch_4.json)", "26.6", "–"],
        ["8", "–", "–", "–", "–", "–"]]


def test_beside_table_compares_with_the_default_measured_beside_each_row(results):
    """Of three cards, the last of which measured the default alone."""
    for name, seconds, hour in (("8_fused", 0.5, 9), ("without_compile", 0.6, 10), ("without_fa3", 0.8, 10),
                                ("8_fused.2", 0.4, 20), ("without_quant", 0.6, 19), ("8_fused.3", 0.3, 23)):
        record = speed(seconds, None)
        record["environment"]["date"] = f"2026-11-24T{hour:02}:00:00Z"
        (results / "schnell" / f"{name}.json").write_text(json.dumps(record))
    cells = cells_of(tables.beside_table("made-up/schnell/without"))
    assert [row[0].split("/")[-1] for row in cells] == [
        "8_fused.json)", "without_compile.json)", "without_fa3.json)", "without_quant.json)"]
    assert [row[3] for row in cells] == ["1.00", "0.83", "0.62", "0.67"]

    def of_card(name, **environment):
        path = results / "schnell" / f"{name}.json"
        record = json.loads(path.read_text())
        record["environment"] |= environment
        path.write_text(json.dumps(record))

    # A card that is known counts for more than the hour; a default without a date is no neighbour.
    of_card("without_quant", gpu_uuid="a")
    of_card("8_fused", gpu_uuid="a")
    of_card("8_fused.3", date=None)
    cells = cells_of(tables.beside_table("made-up/schnell/without"))
    assert [row[3] for row in cells] == ["1.00", "0.83", "0.62", "0.83"]
    for path in (results / "schnell").glob("8_fused*"):
        path.unlink()
    head, _, *rows = tables.beside_table("made-up/schnell/without").splitlines()
    assert "first row" not in head and len(rows) == 3


def test_ladder_table_ends_with_the_default_of_its_eager_rows_card(results, monkeypatch):
    """A faster card's default would be a speed-up of cards. What several GPUs take stays what was measured last."""
    for name, seconds, card in (("1_eager.2", 1.2, "a"), ("8_fused", 0.4, "a"), ("8_fused.2", 0.3, "b"),
                                ("gpus_2_ulysses", 0.2, "b")):
        record = speed(seconds, None)
        record["environment"] |= {"date": "2026-11-24T09:00:00Z", "gpu_uuid": card}
        for suite in ("schnell", "dev"):
            (results / suite).mkdir(exist_ok=True)
            (results / suite / f"{name}.json").write_text(json.dumps(record))
    rows = {cells[0].split("/")[-1]: cells[1:3] for cells in cells_of(tables.table("made-up/schnell"))}
    assert rows["8_fused.json)"] == ["**0.400** (0.390–0.410)", "3.00"] and "8_fused.2.json)" not in rows
    monkeypatch.setattr(tables, "GLANCE", {"dev": tables.GLANCE["dev"]})
    cells = [line.split(" | ")[-2:] for line in tables.glance_table("made-up").splitlines()[2:]]
    found = [(cell.split("**")[1], ratio.strip(" |")) for cell, ratio in cells]
    assert found[:2] == [("0.400", "3.00"), ("0.200", "6.00")]


def test_kernel_table_adds_up():
    """Of the committed results: each part adds up to the whole, and the fused step has no other kinds of kernel."""
    cells = [line.split(" | ") for line in tables.kernel_table(records.current("h100/schnell")).splitlines()[2:]]
    for column in (1, 2):
        shown = [float(line[column].split()[0]) for line in cells]
        assert abs(sum(shown[:-1]) - shown[-1]) < 0.2 and min(shown) > 1
    assert tables._kind("void cutlass::device_kernel<flash::x>") == "attention"
    assert tables._kind("_adaln_kernel") == "everything else"
    assert tables._kind("_gemm_kernel") == tables._kind("_product_kernel") == "GEMMs"


def test_roofline_table_has_cublas_beside_each_gemm():
    """Of the committed results: every product of the fused blocks has cuBLAS' times beside it, nothing else has."""
    cells = cells_of(tables.roofline_table(records.current("h100/schnell")))
    assert cells
    for name, _, ms, flops, *_, loaded, _, cublas, cublas_loaded in cells:
        assert ("product" in name or "gemm" in name) == (cublas != "–") == (cublas_loaded != "–"), name
        assert (flops != "–") == (loaded != "–"), name
        assert cublas == "–" or all(0.5 < float(ms) / float(other) < 2 for other in cublas.split(", "))


@pytest.mark.parametrize("suite", ["dev", "kontext"])
def test_expected_table_is_below_what_was_measured(suite):
    """Of the committed results: from the step of the default measured nearest to them, each number of GPUs takes more
    than its share of it, by what is exchanged, and what was measured is above what is expected."""
    where = records.current(f"h100/{suite}")
    cells = cells_of(tables.expected_table(where))
    _, two = records.newest(records.RESULTS / where, "gpus_2_ulysses")
    _, one = records.beside(records.RESULTS / where, "8_fused", [two])
    assert float(cells[0][3].split()[0]) == pytest.approx(one["stages_ms"]["denoising_step"], abs=0.05)
    assert [row[0] for row in cells] == ["1", "2", "4", "8"]
    exchanged = [float(row[2].split()[0]) - one["stages_ms"]["denoising_step"] / int(row[0]) for row in cells[1:]]
    assert all(0.5 < ms < 5 for ms in exchanged) and exchanged == sorted(exchanged, reverse=True)
    for row in cells[1:3]:  # two and four
        assert float(row[2].split()[0]) < float(row[3].split()[0])
