"""Draws the pages' pictures from the records in results/: docs/images/<gpu>_<suite>_ladder.svg and
docs/images/<gpu>_pictures.webp.
"""

import html
import io
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from bench.report import records, tables

IMAGES = records.ROOT / "docs" / "images"
LADDERS = ("h100/schnell", "h100/dev")
SHEETS = {"h100": ("eager", "compile", "fa3_fp8", "float8_row", "unfused", "fused",
                   "cache_safe", "cache_balanced", "cache_fast", "cache_extreme", "taylorseer_3", "other_seed")}

ROW_HEIGHT, BAR_TOP, BAR_HEIGHT, BAR_WIDTH, WIDTH = 42, 18, 14, 330, 460  # pixels
STYLE = ("text{font:12px sans-serif;fill:#1c1e21}.figure{font-weight:bold}rect{fill:#3b82c4}"
         "@media(prefers-color-scheme:dark){text{fill:#e4e6ea}}")


def ladder(where: str) -> str:
    """Returns the SVG of one ladder: a bar for each row, with its median seconds per image and its speed-up over eager.

    Rows with a memory cap are left out.

    Args:
        where: <gpu>/<suite>, without results/.
    """
    names = {row: name for row, name in tables.NAMES.items() if not row.startswith("memory_")}
    folder = records.RESULTS / records.current(where)
    rows = [(names[row], record) for row, (_, record) in tables.finished(folder, names).items()]
    eager = records.newest(folder, "1_eager")
    seconds = [record["seconds"]["median"] for _, record in rows]
    height = ROW_HEIGHT * len(rows)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
             f'height="{height}">', f"<style>{STYLE}</style>"]
    for i, ((name, record), median) in enumerate(zip(rows, seconds, strict=True)):
        top, width = i * ROW_HEIGHT, BAR_WIDTH * median / max(seconds)
        figure = f"{median:.3f} s" + (f"  ×{tables.speed_up(eager[1], record):.2f}" if eager else "")
        lines += [f'<text x="0" y="{top + 13}">{html.escape(name)}</text>',
                  f'<rect x="0" y="{top + BAR_TOP}" width="{width:.1f}" height="{BAR_HEIGHT}"/>',
                  f'<text class="figure" x="{width + 6:.1f}" y="{top + BAR_TOP + 11}">{figure}</text>']
    return "\n".join([*lines, "</svg>", ""])


def stale() -> dict[Path, bytes]:
    """Returns the ladders whose files differ from results/, with their correct content."""
    ladders = {IMAGES / f"{where.replace('/', '_')}_ladder.svg": ladder(where).encode() for where in LADDERS}
    return {path: content for path, content in ladders.items() if not path.exists() or path.read_bytes() != content}


def contact_sheets() -> dict[Path, bytes]:
    """Returns the WebP of each GPU in `SHEETS`. Its bytes depend on the versions of Pillow and libwebp."""
    return {IMAGES / f"{gpu}_pictures.webp": contact_sheet(records.RESULTS / records.current(gpu) / "tiny", rows)
            for gpu, rows in SHEETS.items()}


GAP, LABEL, FIGURE = 8, 16, 14  # pixels


def contact_sheet(folder: Path, rows: tuple[str, ...]) -> bytes:
    """Returns a WebP with the rows' strips of pictures in two columns on white.

    The row's name is above each strip, and the PSNR against eager is below each picture. A strip whose prompts differ
    from the first strip's is left out.

    Args:
        folder: of the records, with a strip <row>.webp beside each record.
        rows: of `tables.QUALITY`, or "eager".
    """
    names = {"eager": "eager bf16: the reference"} | tables.QUALITY
    found = [(names[row], record["shown"], path.with_suffix(".webp")) for row in rows
             if (newest := records.newest(folder, row)) for path, record in [newest]
             if path.with_suffix(".webp").exists()]
    prompts = [shown["prompt"] for shown in found[0][1]]
    found = [row for row in found if [shown["prompt"] for shown in row[1]] == prompts]
    strips = [PIL.Image.open(path).convert("RGB") for *_, path in found]
    width, side = strips[0].size
    height = LABEL + side + FIGURE + GAP
    lines = -(-len(found) // 2)
    sheet = PIL.Image.new("RGB", (2 * width + GAP, height * lines), "white")
    draw, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(10)
    for i, ((name, shown, _), strip) in enumerate(zip(found, strips, strict=True)):
        left, top = (width + GAP) * (i // lines), height * (i % lines)
        draw.text((left, top), name, "black", bold)
        sheet.paste(strip, (left, top + LABEL))
        for column, one in enumerate(shown):
            text = "the same" if one["identical"] == 1 else f"{one['psnr_mean']:.1f} dB"
            draw.text((left + column * side + side // 2, top + LABEL + side), text, "black", small, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "webp", quality=70, method=6)
    return buffer.getvalue()
