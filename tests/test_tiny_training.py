"""tiny-flux's training on a made-up data folder: what it draws from, what it optimizes, and that it goes on."""

import io
import json
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from transformers import T5TokenizerFast

from tiny_flux.training import batches, data, loop, train
from utils import tiny_presets

NAMES = ["red heart", "avocado", "cat face", "dog", "egg", "fish", "goat", "house"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What data.py writes, without the network: discs of two shades, and a T5 tokenizer of single letters."""
    path = tmp_path_factory.mktemp("data")
    emoji = [{"slug": name.replace(" ", "-"), "name": name, "keywords": [f"k{i}"] * (i % 2), "category": "x"}
             for i, name in enumerate(NAMES)]
    held_out = data.held_out([one["slug"] for one in emoji])
    (path / "captions.json").write_text(json.dumps({"emoji": emoji, "held_out": held_out}))
    inside = np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 50
    with zipfile.ZipFile(path / "pictures.zip", "w") as archive:
        for s, style in enumerate(data.STYLES):
            for i, one in enumerate(emoji):
                pixels = inside[..., None] * np.array([30 * i, 100 + 100 * s, 50, 255])
                packed = io.BytesIO()
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(packed, "webp", lossless=True)
                archive.writestr(f"{style}/{one['slug']}.webp", packed.getvalue())
    data.train_clip_tokenizer(data.corpus(emoji), path / "tokenizer")
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789"]
    T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters],
                    extra_ids=0).save_pretrained(path / "tokenizer_2")
    (path / "NOTICE").write_text("notice\n")
    return path


@pytest.fixture
def emoji(folder):
    return batches.Data(folder, "cpu")


@pytest.fixture
def captions(emoji):
    return batches.Captions(emoji)


@pytest.fixture
def seeded():
    return torch.Generator().manual_seed(0)


def drawn(captions, what):
    return [captions.texts[row] for row in what.rows.tolist()]


# --- captions and what they are of ---

def test_caption_and_instruction_follow_the_grammar():
    assert data.caption("red heart") == "red heart"
    assert data.caption("red heart", "3d", "blue") == "3d red heart on a blue background"
    assert data.caption("egg", None, "orange") == "egg on an orange background"
    assert data.instruction(None, "green") == "make the background green"
    assert (data.instruction("flat"), data.instruction("3d")) == ("as a flat icon", "in 3d")
    assert data.instruction("flat", "red") == "as a flat icon on a red background"
    assert len(data.COLOURS) >= 14 and len(data.COLOURS) == len(set(data.COLOURS.values()))


def test_draw_batch_captions_are_true_of_their_pictures(emoji, captions, seeded):
    what = batches.draw_batch(emoji, captions, 4000, False, seeded)
    texts = drawn(captions, what)
    for text, e, s, c in zip(texts, what.emoji.tolist(), what.style.tolist(), what.colour.tolist(), strict=True):
        names = [emoji.emoji[e]["name"], *emoji.emoji[e]["keywords"]]
        style, colour = data.STYLES[s], data.COLOUR_NAMES[c]
        assert text in {"", *(data.caption(n, st, co) for n in names for st in (None, style) for co in (None, colour))}
    share = [np.mean(hit) for hit in ([not t for t in texts], ["background" in t for t in texts],
                                      [t.startswith(("flat", "3d")) for t in texts])]
    assert share == pytest.approx([0.1, 0.9 * 0.7, 0.9 * 0.7], abs=0.03)


def test_draw_batch_instructions_are_the_difference_from_the_reference(emoji, captions, seeded):
    what = batches.draw_batch(emoji, captions, 2000, True, seeded)
    seen = set()
    columns = (what.style, what.colour, *what.reference)
    for text, s, c, rs, rc in zip(drawn(captions, what), *(column.tolist() for column in columns), strict=True):
        style, colour = data.STYLES[s] if s != rs else None, data.COLOUR_NAMES[c] if c != rc else None
        assert style or colour
        assert text in ("", data.instruction(style, colour))
        seen.add((style is None, colour is None))
    assert seen == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("edit", [False, True])
def test_draw_batch_never_has_held_out_combinations(emoji, captions, seeded, edit):
    assert ("red-heart", "blue") in data.held_out([one["slug"] for one in emoji.emoji])
    what = batches.draw_batch(emoji, captions, 20_000, edit, seeded)
    for colour in (what.colour, *([what.reference[1]] if edit else [])):
        counts = torch.zeros(emoji.allowed.shape).index_put_((what.emoji, colour), torch.ones(()), accumulate=True)
        assert (counts[~emoji.allowed] == 0).all() and (counts[emoji.allowed] > 0).all()


def test_captions_tokens_are_as_the_pipelines_tokenise(emoji, captions):
    rows = torch.tensor([0, 1, 40, captions.first_instruction + 5, 333])
    texts = [captions.texts[row] for row in rows]
    clip, t5 = captions.tokens(rows)
    # Captions of more than 32 tokens, which single letters make, end there.
    wanted = emoji.tokenizer_2(texts, padding="max_length", max_length=32, truncation=True)
    assert t5[:, :32].tolist() == wanted["input_ids"] and (t5[:, 32:] == emoji.tokenizer_2.pad_token_id).all()
    assert t5.shape == (5, 64)
    whole = emoji.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    clip_model = train.build_flow(emoji, arguments())["text_encoder"].eval()
    torch.testing.assert_close(clip_model(clip).pooler_output, clip_model(whole).pooler_output)


# --- latents as the pipelines lay them out ---

def test_sequence_ids_and_packing_are_those_of_the_kontext_pipeline(build):
    pipeline = build("tiny-kontext")
    image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise, reference, ids, reference_ids = pipeline.prepare_latents(
        image, 2, 16, 128, 128, torch.float32, "cpu", torch.Generator().manual_seed(0))
    assert isinstance(pipeline, FluxKontextPipeline)
    torch.testing.assert_close(train.sequence_ids(128, True, "cpu"), torch.cat([ids, reference_ids]))
    torch.testing.assert_close(train.sequence_ids(128, False, "cpu"), ids)
    latents = pipeline.vae.encode(image).latent_dist.mean
    config = pipeline.vae.config
    torch.testing.assert_close(batches.pack((latents - config.shift_factor) * config.scaling_factor), reference)
    batch = {"latents": torch.zeros_like(noise), "noise": noise, "reference": reference, "t": torch.ones(2)}
    torch.testing.assert_close(train.noised(batch)[0], torch.cat([noise, reference], dim=1))


def test_compose_places_a_picture_on_its_background(emoji):
    whole = torch.tensor([[1.0, 0.0, 0.0]])
    image = batches.compose(emoji.pictures[1, 2:3], emoji.palette[3:4], whole, 128)
    picture = (image[0] + 1) * 127.5
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(data.COLOURS["red"]).float(), atol=0.6, rtol=0)
    torch.testing.assert_close(picture[:, 64, 64], torch.tensor([60.0, 200.0, 50.0]), atol=0.6, rtol=0)
    smaller = batches.compose(emoji.pictures[1, 2:3], emoji.palette[3:4], torch.tensor([[0.8, 0.2, 0.0]]), 256)
    disc = (smaller[0, 1] > 0.2).nonzero().float()
    assert disc.mean(0).tolist() == pytest.approx([127.5, 127.5 + 0.2 * 128], abs=0.6)
    assert len(disc) == pytest.approx(np.pi * (50 * 2 * 0.8) ** 2, rel=0.01)


# --- optimization against slow references ---

def test_muon_steps_equal_those_of_torch(seeded):
    shapes = [(12, 8), (8, 12), (8, 8), (12, 8)]
    start = [torch.randn(shape, generator=seeded) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    pairs = (loop.Muon(ours, lr=0.02), ours), (torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), theirs)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=seeded) for shape in shapes]
        for optimizer, parameters in pairs:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for a, b, c in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a - c, b - c, atol=1e-6, rtol=1e-5)


def test_ema_and_learning_rate_equal_their_definitions():
    values = [[1.0, 2.0], [4.0, 0.0], [2.0, 2.0]]
    averages, slow = [torch.zeros(2)], np.zeros(2)
    for step, value in enumerate(values):
        loop.ema_update(averages, [torch.tensor(value)], torch.tensor(loop.ema_weight(step)))
        decay = min(0.999, (1 + step) / (10 + step))
        slow = decay * slow + (1 - decay) * np.array(value)
    np.testing.assert_allclose(averages[0].numpy(), slow, rtol=1e-6)
    found = [loop.lr_factor(step, progress) for step, progress in ((0, 0), (49, 0.1), (99, 0.1), (500, 0.6),
                                                                  (500, 0.8), (900, 1.0))]
    assert found == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.02])


# --- the fold, the phases ---

def test_fold_guidance_gives_the_model_at_that_guidance(seeded):
    torch.manual_seed(0)
    whole = FluxTransformer2DModel(**train.TRANSFORMER | dict(num_layers=1, num_single_layers=1)).eval()
    folded = tiny_presets.fold_guidance(whole, 3.5)
    inputs = dict(hidden_states=torch.randn(2, 64, 64), encoder_hidden_states=torch.randn(2, 16, 128),
                  pooled_projections=torch.randn(2, 128), timestep=torch.tensor([0.7, 0.1]), return_dict=False,
                  img_ids=train.sequence_ids(128, False, "cpu"), txt_ids=torch.zeros(16, 3))
    with torch.no_grad():
        wanted = whole(guidance=torch.full((2,), 3.5), **inputs)[0]
        torch.testing.assert_close(folded(guidance=None, **inputs)[0], wanted, atol=1e-5, rtol=1e-5)
        assert (whole(guidance=torch.full((2,), 1.0), **inputs)[0] - wanted).abs().max() > 1e-3
    assert not folded.config.guidance_embeds


def arguments(seed=0):
    return train.argparse.Namespace(seed=seed, device="cpu")


@pytest.fixture
def small(monkeypatch):
    """Two blocks, two emoji, batches of a few pictures."""
    for name, value in dict(num_layers=1, num_single_layers=1).items():
        monkeypatch.setitem(train.TRANSFORMER, name, value)
    monkeypatch.setattr(train, "BATCHES", {(128, False): 0.5, (128, True): 0.5})
    monkeypatch.setattr(train, "SIZES", {128: 1.0})
    settings = loop.Settings(emoji=2, poses={128: 1}, pictures=2, tokens=200, log_every=2)
    monkeypatch.setattr(train, "SMOKE", settings)


def call(folder, run, *phases, steps, stop_after=None):
    argv = [*phases, "--smoke", "--data", folder, "--run", run, "--out", run / "out", "--steps", steps,
            "--device", "cpu", *(["--stop_after", stop_after] if stop_after is not None else [])]
    train.main([str(item) for item in argv])


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_train_phases_resume_and_end_in_a_checkpoint(folder, tmp_path, monkeypatch):
    # The schedule reads the clock; here progress is to be that of steps alone.
    monkeypatch.setattr(loop, "lr_factor", lambda step, progress: 1.0)
    monkeypatch.setattr(train, "draw_sheet", lambda *_: PIL.Image.new("RGB", (8, 8)))
    call(folder, tmp_path / "whole", "vae", "flow", "guidance", steps=2)
    cut = tmp_path / "cut"
    for phase in ("vae", "flow", "guidance"):
        for step in (1, 2):  # a call of no minutes ends after each step
            with pytest.raises(SystemExit) as stop:
                call(folder, cut, phase, steps=2, stop_after=0)
            assert stop.value.code == 75 and loop.load_state(cut, phase)["step"] == step
        call(folder, cut, phase, steps=2)
        once, again = (loop.load_state(run, phase, done=True) for run in (tmp_path / "whole", cut))
        for key in ("parameters", "averages"):
            for a, b in zip(once[key], again[key], strict=True):
                assert torch.equal(a, b), (phase, key)
    with pytest.raises(SystemExit, match="flow"):
        loop.load_averages(tmp_path / "nothing", "flow", torch.nn.Linear(1, 1))

    lines = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("vae", 2), ("flow", 2), ("guidance", 2)]
    call(folder, cut, "vae", "assemble", steps=2)
    out = cut / "out"
    assert all(key.startswith("text_model.") for key in load_file(out / "text_encoder" / "model.safetensors"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["tokenizer_2"][1] == "T5TokenizerFast" and (out / "NOTICE").exists()
    pipeline = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    state = loop.load_state(cut, "guidance")["averages"]
    for saved, average in zip(pipeline.transformer.parameters(), state, strict=True):
        assert torch.equal(saved, average.bfloat16().float())
    models = train.build_flow(batches.Data(folder, "cpu", 2), arguments())
    loop.load_averages(cut, "flow", models)
    for name in ("text_encoder", "text_encoder_2"):
        for saved, trained in zip(getattr(pipeline, name).parameters(), models[name].parameters(), strict=True):
            assert torch.equal(saved, trained.bfloat16().float()), name
    image = pipeline("egg", height=128, width=128, num_inference_steps=1, max_sequence_length=16).images[0]
    assert image.size == (128, 128)
    shutil.copytree(out, tmp_path / "first")
    call(folder, cut, "assemble", "--vae", tmp_path / "first" / "vae", steps=2)  # what it read is what it writes
    for path in (tmp_path / "first").rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "first")).read_bytes(), path


@pytest.mark.usefixtures("small")
def test_build_flow_guidance_is_zero_and_not_trained_before_its_phase(folder, emoji):
    transformer = train.build_flow(emoji, arguments())["transformer"]
    embed = transformer.time_text_embed
    assert not embed.guidance_embedder(embed.time_proj(torch.tensor([3500.0]))).any()
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert "time_text_embed.guidance_embedder.linear_2.weight" not in trained


def test_normalization_rules_are_those_of_nfkc_and_case_folding():
    rules = dict(line.split("\t") for line in data.normalization_rules().splitlines())
    read = {"".join(chr(int(one, 16)) for one in text.split()): "".join(chr(int(one, 16)) for one in to.split())
            for text, to in rules.items()}
    for text, to in {"A": "a", "É": "é", "e\u0301": "é", "E\u0301": "é", "ß": "ss", "ﬁ": "fi", "①": "1", "\t": " ",
                     "\u00a0": " ", "\x07": "", "Ａ": "a", "½": "1⁄2"}.items():
        assert read[text] == to
    assert not {"a", "é", "1", " "} & read.keys()
