"""The README says what is there: flags, commands, and figures that stand in results/."""

import json
import re
from pathlib import Path

from report import tables
from utils.benchmark_utils import create_parser

ROOT = Path(__file__).parent.parent
README, KERNELS = ((ROOT / name).read_text() for name in ("README.md", "KERNELS.md"))

def test_every_flag_exists():
    known = set(create_parser()._option_string_actions) | {"--strict", "--suite", "--rows", "--dry-run", "--resume"}
    known |= {"--jobs"} | {"--multi_gpu", "--num_processes", "--cpu", "--nproc_per_node"}  # of launchers
    known |= {"--output-dir", "--download-metrics", "--recipes"}  # of bench/
    assert sorted(set(re.findall(r"(?<!-)--[a-z][\w-]+", README)) - known) == []


def test_no_code_block_is_longer_than_six_lines():
    blocks = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
    assert blocks and max(block.count("\n") for block in blocks) <= 6


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -r requirements-dev.txt" in script and "python -m pytest\n" in script
    assert "pip install -r requirements-dev.txt && python -m pytest" in README


def test_every_link_into_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README + KERNELS) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_tables_are_what_the_results_say():
    assert README.count("<!-- results:") == 4
    for page in tables.PAGES:
        assert tables.with_tables(page.read_text()) == page.read_text(), page


def test_a_figure_typed_by_hand_would_be_replaced():
    row = next(line for line in README.splitlines() if "results/" in line and "**" in line)
    figure = re.search(r"\*\*(\d\.\d+)\*\*", row)[1]
    assert tables.with_tables(README.replace(row, row.replace(figure, "0.001"))) == README


def test_the_errors_in_the_text_are_those_of_the_files():
    for name in ("attention_scaled", "attention_unscaled"):
        record = json.loads((ROOT / "results" / "h100" / "schnell" / f"{name}.json").read_text())
        assert f"{record['step_relative_error'] * 100:.3f} %\n([{name.removeprefix('attention_')}]" in KERNELS
