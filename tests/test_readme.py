"""The pages say what is there: flags, commands, links, and figures that stand in results/."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.report import charts, tables

ROOT = Path(__file__).parent.parent
PAGES = tables.pages()
SOURCES = [path for folder in (".", "bench", "report", "results", "tiny_flux", "utils")
           for path in sorted((ROOT / folder).glob("**/*.py" if folder != "." else "*.py"))]
OF_OTHERS = {"--multi_gpu", "--num_processes", "--cpu", "--nproc_per_node", "--index-url"}  # accelerate, torchrun, pip

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@each_page
def test_page_names_only_flags_that_exist(page):
    declared = [found for path in SOURCES for found in re.findall(r"add_argument\(([^)]*)", path.read_text())]
    known = {flag for text in declared for flag in re.findall(r'"(--[\w-]+)"', text)} | OF_OTHERS
    known |= {flag.replace("_", "-") for flag in known} | {"--help"}
    named = re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())
    assert sorted({flag for flag in named if flag not in known and flag.replace("_", "-") not in known}) == []


@each_page
def test_page_starts_only_programs_that_exist(page):
    text = page.read_text()
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    modules = [module for module in re.findall(r"(?:python3?|nproc_per_node=\d) -m ([\w.]+)", text)
               if module.partition(".")[0] in ours]
    scripts = re.findall(r"(?:python3?|launch|nproc_per_node=\d) ([\w/]+\.py)", text)
    paths = [module.replace(".", "/") for module in modules]
    files = [*scripts, *(f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py" for path in paths)]
    assert [name for name in files if not (ROOT / name).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(page: Path) -> Iterator[tuple[str, str, str]]:
    """Label, path and anchor of each link into the repository."""
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            yield label, *target.partition("#")[::2]


@each_page
def test_page_links_into_the_repository_lead_somewhere(page):
    broken = []
    for _, path, anchor in links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert broken == []


@each_page
def test_page_tables_are_what_the_results_say(page):
    assert tables.with_tables(page) == page.read_text()


@each_page
def test_page_figure_that_links_to_a_record_stands_in_it(page):
    """Outside of the tables, which are made: the rounded figure is a value of the record, or a percentage."""
    wrong = []
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)#]+\.json)\)", tables.MARKERS.sub("", page.read_text())):
        values = list(numbers(json.loads((page.parent / target).read_text())))
        for figure in re.findall(r"\d+\.\d+", label):
            half = 0.500001 * 10.0 ** -len(figure.partition(".")[2])
            if not any(abs(value * scale - float(figure)) <= half for value in values for scale in (1, 100)):
                wrong.append((label, target))
    assert wrong == []


def numbers(value) -> Iterator[float]:
    """All numbers of a JSON document."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)


def test_tables_replace_a_figure_typed_by_hand():
    page = ROOT / "README.md"
    row = next(line for line in page.read_text().splitlines() if "results/" in line and "**" in line)
    figure = re.search(r"\*\*(\d\.\d+)\*\*", row)[1]
    changed = page.read_text().replace(row, row.replace(figure, "0.001"))
    assert changed != page.read_text() and tables.with_tables(page, changed) == page.read_text()


def test_images_are_what_the_results_say_and_small():
    assert charts.stale() == {}
    shown = {path.resolve() for page in PAGES for path in (page.parent / target for _, target, _ in links(page))}
    images = list(charts.IMAGES.iterdir())
    assert images and max(path.stat().st_size for path in images) < 60_000
    assert [path.name for path in images if path.resolve() not in shown] == []


def test_ci_runs_the_tests_as_the_pages_say():
    script = (ROOT / ".ci" / "run").read_text()
    command = re.compile(r"python -m pytest(?: -m 'slow and not gpu')?(?=[`\n])")
    said = {found for page in PAGES for found in command.findall(page.read_text())}
    assert said and [found for found in said if f"{found}\n" not in script] == []
    assert "requirements-dev.txt" in script


def test_repository_is_small():
    names = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True).stdout.split("\0")
    sizes = [(ROOT / name).stat().st_size for name in names if name and (ROOT / name).exists()]
    if not sizes:
        pytest.skip("not a git clone")
    assert sum(sizes) < 24 * 2**20
