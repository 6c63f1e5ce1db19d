"""LoRAs swapped in a running process: bit by bit the weights and pictures of a process that started with them."""

import io
import json
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import pretend_hopper
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import gen_image
from utils import lora_swap, pipeline_utils, random_weights, weight_files
from utils.checkpoint import model_shapes, read_configs
from utils.common import RecipeError, StageLog
from utils.images import read_parameters
from utils.interactive import Session
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.prompts_file import args_with

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

WIDTH, RANK = 192, 4
DOUBLE, SINGLE = "transformer.transformer_blocks", "transformer.single_transformer_blocks"
ATTENTION = [f"{DOUBLE}.0.attn.to_k", f"{DOUBLE}.1.attn.add_q_proj", f"{SINGLE}.2.attn.to_v"]
EVERYTHING = [
    *ATTENTION, f"{DOUBLE}.0.norm1.linear", f"{DOUBLE}.1.norm1_context.linear", f"{DOUBLE}.0.ff.net.0.proj",
    f"{DOUBLE}.0.ff_context.net.2", f"{SINGLE}.0.norm.linear", f"{SINGLE}.0.proj_mlp", f"{SINGLE}.3.proj_out",
    "transformer.x_embedder", "transformer.context_embedder", "transformer.proj_out", "transformer.norm_out.linear",
    "transformer.time_text_embed.text_embedder.linear_2"]
TEXT = ["text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q"]
MLP = [f"{SINGLE}.0.proj_mlp"]
NORM = {f"{SINGLE}.1.attn.norm_q.weight": torch.full((64,), 1.5)}
HOPPER = ("attention", "quantization", "fused_kernels")
# {name: (techniques on as on a Hopper GPU, flags)}
FORMS = {"bf16": ((), []), "e4m3": (HOPPER, []), "int8": (HOPPER, ["--quality", "high"]),
         "torchao": (("quantization",), []), "torchao int8": (("quantization",), ["--quality", "high"]),
         "unfused, int8 T5": ((), ["--disable_fused_projections", "--text_encoder_quant"])}
PROMPT = "3d frog on a blue background"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_lora(name: str, modules: list[str], *, dora=False, alpha=None, seed=0, random_layers=None,
               **more) -> str:
    """A LoRA of tiny-flux's modules in the current folder, or of random weights' modules. Returns its name."""
    shapes = model_shapes(read_configs("tiny-flux", None, random_layers))
    draw, tensors = torch.Generator().manual_seed(seed), dict(more)
    for module in modules:
        component, _, inside = module.partition(".")
        rows, columns = shapes[component][f"{inside}.weight"]
        tensors[f"{module}.lora_A.weight"] = 0.2 * torch.randn(RANK, columns, generator=draw)
        tensors[f"{module}.lora_B.weight"] = 0.2 * torch.randn(rows, RANK, generator=draw)
        if alpha:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{module}.dora_scale"] = 1 + torch.rand(rows, 1, generator=draw)
    save_file(tensors, name)
    return name


@pytest.fixture
def start(make_args, monkeypatch, float8_on_cpu):
    """start(form, *flags): an optimized tiny-flux that can swap, and its arguments."""
    def call(form="bf16", *argv, ckpt="tiny-flux"):
        techniques, flags = FORMS[form]
        args = make_args("--ckpt", ckpt, "--interactive", "--height", "64", "--width", "64",
                         "--num_inference_steps", "1", "--skip_fp8_check", "--compile_export_mode", "disabled", *flags,
                         *argv)
        with monkeypatch.context() as patch:
            pretend_hopper(patch, techniques)
            return optimize(load_pipeline(args), args, StageLog(True)), args
    return call


def live(pipeline) -> dict[str, torch.Tensor]:
    """All tensors of the models that LoRAs change; a quantized weight by its parts."""
    found = {}
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, component)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            parts = tensor.data.__tensor_flatten__()[0] if hasattr(tensor.data, "__tensor_flatten__") else [None]
            found |= {f"{component}.{name}.{part}": getattr(tensor.data, part) if part else tensor.data
                      for part in parts}
    return found


def differences(pipeline, other) -> list[str]:
    """The names of the tensors whose bits differ."""
    a, b = live(pipeline), live(other)
    assert a.keys() == b.keys() and len(a) > 100
    return [name for name, tensor in a.items() if tensor.dtype != b[name].dtype or
            not torch.equal(tensor.flatten().view(torch.uint8), b[name].flatten().view(torch.uint8))]


def flags_of(specs) -> list[str]:
    return [text for spec in specs for text in ("--lora", spec)]


@pytest.mark.parametrize("form", FORMS)
def test_swapped_weights_are_those_of_a_fresh_start(start, form):
    """A, two at once, none, A again, DoRA: always in the same memory."""
    attention = write_lora("a.safetensors", ATTENTION)
    everything = write_lora("b.safetensors", EVERYTHING + TEXT, seed=1, **NORM)
    dora = write_lora("d.safetensors", [f"{SINGLE}.2.attn.to_q", f"{DOUBLE}.0.norm1.linear"], dora=True)
    pipeline, _ = start(form, "--lora", everything)
    without, _ = start(form)
    memory = {name: tensor.data_ptr() for name, tensor in live(pipeline).items()}
    for specs in ([attention], [f"{everything}:0.7", attention], [], [f"{attention}:-0.5"], [dora], [everything]):
        pipeline.lora_swap.use(specs, {})
        fresh, _ = start(form, *flags_of(specs))
        assert differences(pipeline, fresh) == [], specs
        assert bool(differences(pipeline, without)) == bool(specs)
    assert {name: tensor.data_ptr() for name, tensor in live(pipeline).items()} == memory


@pytest.mark.parametrize("form", ["e4m3", "int8"])
def test_swapped_pictures_are_those_of_a_fresh_start(start, form):
    """Nothing of the old weights is left in tables of modulations or embeddings of prompts."""
    spec = write_lora("b.safetensors", EVERYTHING + TEXT)
    pipeline, args = start(form)

    def latents(pipeline):
        return pipeline(**call_kwargs(pipeline, args), output_type="latent").images

    before = latents(pipeline)
    pipeline.lora_swap.use([spec], {})
    swapped = latents(pipeline)
    assert torch.equal(swapped, latents(start(form, "--lora", spec)[0])) and not torch.equal(swapped, before)
    pipeline.lora_swap.use(None, {})
    assert torch.equal(latents(pipeline), before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["export_aoti", "compile"])
def test_swaps_reach_compiled_code(start, compiler, without_vae, mode):
    spec = write_lora("b.safetensors", EVERYTHING)
    flags = ["--compile_export_mode", mode, "--cache-dir", "cache", "--vae_tiling"]
    pipeline, args = start("bf16", *flags)

    def latents(pipeline):
        return pipeline(**call_kwargs(pipeline, args), output_type="latent").images

    before = latents(pipeline)
    pipeline.lora_swap.use([spec], {})
    swapped = latents(pipeline)
    assert torch.equal(swapped, latents(start("bf16", *flags, "--lora", spec)[0])) and not torch.equal(swapped, before)


def test_swap_empties_embeddings_only_if_a_text_encoder_changes(start):
    pipeline, _ = start()
    attention, text = write_lora("a.safetensors", ATTENTION), write_lora("t.safetensors", TEXT)
    for specs, empty in (([attention], False), ([text], True), ([text], False), ([], True), ([attention], False)):
        embeddings = {"a prompt": None}
        pipeline.lora_swap.use(specs, embeddings)
        assert (not embeddings) == empty, specs


@pytest.mark.parametrize("later", [False, True], ids=["a line's", "typed later"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept weights"])
def test_swaps_read_the_base_of_a_checkpoint_of_ones_own(make_args, monkeypatch, tmp_path, kept, later):
    """From its files, by key, where no unquantized transformer is in memory or the LoRA was not known."""
    random_weights.build(random_weights.architecture("tiny-flux"), "cpu", torch.bfloat16).save_pretrained("own")
    pretend_hopper(monkeypatch, HOPPER + ("kept_weights",) * kept)
    spec = write_lora("b.safetensors", EVERYTHING + TEXT, random_layers="full")

    def begin(*argv, **private):
        args = make_args("--ckpt", "own", "--interactive", "--height", "64", "--width", "64", "--skip_fp8_check",
                         "--num_inference_steps", "1", "--compile_export_mode", "disabled", "--cache-dir", "cache",
                         *argv)
        vars(args).update(private)
        return optimize(load_pipeline(args), args, StageLog(True))

    if kept:
        begin()
    read, asked = weight_files.read_tensors, []
    monkeypatch.setattr(weight_files, "read_tensors", lambda files, component, names: (
        asked.append(component), read(files, component, names))[1])
    pipeline = begin(**({} if later else {"line_loras": [(spec,)]}))
    assert pipeline.plan.kept_weights.loaded == kept and not asked
    pipeline.lora_swap.use([spec], {})
    assert set(asked) == ({"transformer", "text_encoder", "text_encoder_2"} if later else {"transformer"} if kept
                          else set())
    count = len(asked)
    fresh = begin("--lora", spec)
    assert differences(pipeline, fresh) == []
    pipeline.lora_swap.use(None, {})
    pipeline.lora_swap.use([spec], {})
    assert differences(pipeline, fresh) == [] and len(asked) == count
    if kept:  # what the swaps wrote is not in the files
        again = begin()
        assert again.plan.kept_weights.loaded and differences(again, fresh)


@pytest.mark.parametrize("ckpt", ["tiny-flux-dev", "own"])
def test_swaps_read_the_base_of_a_single_file(make_args, ckpt):
    """A LoRA that is named later: the transformer's base is in --transformer, the text encoder's in --ckpt."""
    own = random_weights.build(random_weights.architecture("tiny-flux-dev"), "cpu", torch.bfloat16)
    own.save_pretrained("own")
    preset = load_pipeline(make_args("--ckpt", "tiny-flux-dev")).transformer.state_dict()
    state = preset if ckpt == "tiny-flux-dev" else own.transformer.state_dict()
    save_file({name: (tensor * 1.5).contiguous() for name, tensor in state.items()}, "single.safetensors")
    pipeline = load_pipeline(make_args("--ckpt", ckpt, "--transformer", "single.safetensors", "--interactive"))
    read = pipeline.lora_swap.base.source()
    for component in ("transformer", "text_encoder"):
        parameters = dict(getattr(pipeline, component).named_parameters())
        found = read(component, list(parameters))
        assert all(torch.equal(found[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize("ckpt, argv", [("tiny-flux-dev", []), ("tiny-flux", ["--random_weights", "1+1"])])
def test_swaps_of_presets_and_random_weights_restore_the_base(start, ckpt, argv):
    """A LoRA that is named later: its base is built again."""
    modules = [name for name in EVERYTHING if not re.search(r"blocks\.[1-9]", name)]
    spec = write_lora("b.safetensors", modules, random_layers="1+1" if argv else None)
    pipeline, without = (start("e4m3", *argv, ckpt=ckpt)[0] for _ in range(2))
    pipeline.lora_swap.use([spec], {})
    assert differences(pipeline, without)
    pipeline.lora_swap.use([], {})
    assert differences(pipeline, without) == []


def test_swap_back_reads_no_file(start):
    pipeline, _ = start()
    specs = [write_lora("a.safetensors", ATTENTION), write_lora("b.safetensors", EVERYTHING)]
    for spec in specs:
        pipeline.lora_swap.use([spec], {})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("safe_open", "read_lora", "read_loras"):
            patch.setattr(lora_swap, name, None)
        for spec in specs:
            pipeline.lora_swap.use([f"{spec}:0.5"], {})
    assert differences(pipeline, start("bf16", "--lora", f"{specs[1]}:0.5")[0]) == []


@pytest.mark.parametrize("form", ["e4m3", "int8"])
def test_swap_waits_for_no_single_value(start, form):
    """On a GPU each of them would end the overlap of the CPU's launches with the GPU's work."""
    class Counted(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.waits += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
            return function(*args, **(kwargs or {}))

    spec = write_lora("b.safetensors", EVERYTHING, alpha=1.0)
    pipeline, _ = start(form)
    pipeline.lora_swap.use([spec], {})
    with Counted() as counted:
        pipeline.lora_swap.use([f"{spec}:0.5"], {})
        assert counted.waits == 0
        torch.ones(()).item()
    assert counted.waits == 1


def test_no_more_than_some_loras_stay_in_memory(start, monkeypatch):
    monkeypatch.setattr(lora_swap, "MOST", 2)
    pipeline, _ = start()
    specs = [write_lora(f"{i}.safetensors", ATTENTION, seed=i) for i in range(4)]
    for spec in [*specs, specs[0]]:
        pipeline.lora_swap.use([spec], {})
        assert spec in pipeline.lora_swap.factors and len(pipeline.lora_swap.factors) <= 3
    assert differences(pipeline, start("bf16", "--lora", specs[0])[0]) == []


# --- what fails ---

BAD = {"nan": {f"{DOUBLE}.0.attn.to_q.diff": torch.full((WIDTH, WIDTH), torch.nan)},
       "too large": {f"{DOUBLE}.0.attn.to_q.diff": torch.full((WIDTH, WIDTH), 3e38)}}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_swap_that_is_not_finite_leaves_the_weights_as_they_were(start, form, bad):
    good = write_lora("a.safetensors", EVERYTHING)
    wrong = write_lora("w.safetensors", MLP, **BAD[bad])
    for specs in ([], [good]):
        pipeline, _ = start(form, *flags_of(specs))
        with pytest.raises(RecipeError, match="to_q"):
            pipeline.lora_swap.use([f"{wrong}:2"], {})
        assert differences(pipeline, start(form, *flags_of(specs))[0]) == []
        assert pipeline.lora_swap.current == tuple(specs)


def test_interrupted_swap_is_made_good_by_the_next(start, monkeypatch):
    spec = write_lora("a.safetensors", EVERYTHING)
    pipeline, _ = start("e4m3")
    write_module = lora_swap.LoraSwap.write_module

    def interrupted(self, part, weights):
        if part.module == "proj_out":
            raise KeyboardInterrupt
        write_module(self, part, weights)

    monkeypatch.setattr(lora_swap.LoraSwap, "write_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.lora_swap.use([spec], {})
    monkeypatch.setattr(lora_swap.LoraSwap, "write_module", write_module)
    without, _ = start("e4m3")
    assert differences(pipeline, without)
    pipeline.lora_swap.use([], {})
    assert differences(pipeline, without) == []


def test_swap_that_cpu_memory_cannot_hold_is_refused(start, monkeypatch):
    spec = write_lora("a.safetensors", ATTENTION)
    pipeline, _ = start()
    monkeypatch.setattr("utils.base_weights.available_memory", lambda: 1000)
    with pytest.raises(RecipeError, match="CPU memory"):
        pipeline.lora_swap.use([spec], {})
    assert differences(pipeline, start()[0]) == [] and pipeline.lora_swap.current == ()


@pytest.mark.parametrize("offload, modules, refused", [
    ("model", ATTENTION, True), ("group", ATTENTION, True), ("text", TEXT, True), ("text", ATTENTION, False)])
def test_check_loras_refuses_weights_that_move(make_args, offload, modules, refused):
    args = make_args("--offload", offload)
    shapes = model_shapes(read_configs("tiny-flux"))
    spec = write_lora("x.safetensors", modules)
    if refused:
        with pytest.raises(RecipeError, match=f"--offload {offload}"):
            lora_swap.check_loras(args, (spec,), shapes)
    else:
        lora_swap.check_loras(args, (spec,), shapes)


# --- lines of a file, and typed prompts ---

def pixels(path):
    return np.asarray(PIL.Image.open(path))


@pytest.fixture
def run(monkeypatch):
    """gen_image.py with these flags; returns how often LoRAs were swapped, and the steps."""
    def call(*argv, techniques=()):
        count, use, optimized = [], lora_swap.LoraSwap.use, pipeline_utils.optimize

        def used(self, specs, embeddings):
            before = self.current
            use(self, specs, embeddings)
            count.extend(["swap"] * (self.current != before))

        def watched(pipeline, *args):
            pipeline = optimized(pipeline, *args)
            pipeline.transformer.register_forward_pre_hook(lambda *_: count.append("step"))
            return pipeline

        with monkeypatch.context() as patch:
            pretend_hopper(patch, techniques)
            patch.setattr(lora_swap.LoraSwap, "use", used)
            patch.setattr(pipeline_utils, "optimize", watched)
            patch.setattr(sys, "argv", ["gen_image.py", "--ckpt", "tiny-flux", "--device", "cpu", "--height", "64",
                                        "--width", "64", "--num_inference_steps", "1", "--skip_fp8_check",
                                        "--compile_export_mode", "disabled", *argv])
            gen_image.main()
        return count.count("swap"), count.count("step")
    return call


@pytest.mark.parametrize("techniques", [(), HOPPER], ids=["bf16", "e4m3"])
def test_lines_with_loras_equal_runs_with_these_flags_and_resume(run, tmp_path, capsys, techniques):
    style = write_lora("style.safetensors", ATTENTION + TEXT)
    look = write_lora("look.safetensors", MLP, seed=2)
    sets = [[style], None, [], [look], [f"{style}:0.5", look], [style], []]
    lines = [{"prompt": PROMPT, "seed": 7} | ({} if specs is None else {"lora": specs}) for specs in sets]
    lines[0]["lora"], lines[2]["lora"] = style, ""
    lines[5] |= {"width": 96}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--lora", look, "--output-file", "x.png", "--prompts-file", "p.jsonl"]
    assert run(*argv, "--batch_size", "2", techniques=techniques) == (3, 5), "each set is made once"
    shown = capsys.readouterr().err
    assert len(re.findall(r"LoRA .* swapped in \d+\.\d\d s", shown)) == 3
    assert run(*argv, techniques=techniques) == (0, 0), "nothing is drawn again"
    for path in sorted(tmp_path.glob("x_*.png")):
        path.unlink()
    run(*argv, techniques=techniques)
    for index, specs in enumerate(sets):
        run(*flags_of([look] if specs is None else specs), "--prompt", PROMPT, "--seed", "7", "--output-file",
            "alone.png", *["--width", "96"] * (index == 5), techniques=techniques)
        name = f"x_{index:03d}_7.png"
        assert np.array_equal(pixels(name), pixels("alone.png")), specs
        assert read_parameters(name) == read_parameters("alone.png")
    assert not np.array_equal(pixels("x_000_7.png"), pixels("x_002_7.png"))
    lines[3]["lora"] = f"{look}:0.9"
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(*argv, techniques=techniques) == (1, 1), "another scale is another picture"


def test_lines_whose_loras_cannot_be_used_are_left_out_before_weights_load(run, tmp_path, monkeypatch, capsys):
    style = write_lora("style.safetensors", ATTENTION)
    save_file({"nobody.knows.lora_A.weight": torch.ones(2, 2)}, "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    write_lora("part.safetensors", ATTENTION, **{f"{DOUBLE}.9.attn.to_q.diff": torch.ones(2, 2)})
    specs = ["nowhere.safetensors", style, "other.safetensors", "broken.safetensors", "part.safetensors",
             [style, f"{style}:nan"]]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": "a", "lora": spec}) for spec in specs))
    loaded, load = [], pipeline_utils.load_pipeline

    def watched(args):
        loaded.append(re.findall(r"line (\d) is left out: --lora", capsys.readouterr().err))
        return load(args)

    monkeypatch.setattr(pipeline_utils, "load_pipeline", watched)
    assert run("--prompts-file", "p.jsonl", "--output-file", "x.png") == (1, 1)
    assert loaded == [["1", "3", "4", "5", "6"]]
    run("--prompts-file", "p.jsonl", "--output-file", "y.png", "--lora_partial")
    assert sorted(path.name for path in tmp_path.glob("y_*.png")) == ["y_001_43.png", "y_004_46.png"]


def test_line_whose_lora_cannot_be_merged_stops_no_other_line(run, tmp_path):
    bad = write_lora("w.safetensors", [], **BAD["nan"])
    style = write_lora("style.safetensors", ATTENTION)
    lines = [{"prompt": "a", "lora": bad}, {"prompt": PROMPT}, {"prompt": PROMPT, "lora": style}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RecipeError, match=r"w\.safetensors.*NaN"):
        run("--prompts-file", "p.jsonl", "--output-file", "x.png")
    assert sorted(path.name for path in tmp_path.glob("x_*.png")) == ["x_001_43.png", "x_002_44.png"]


def test_session_lora_draws_what_the_flag_draws(start, monkeypatch, capsys):
    style, look = write_lora("my style.safetensors", ATTENTION + TEXT), write_lora("look.safetensors", EVERYTHING)
    pipeline, args = start("bf16", "--lora", look)
    typed = [f':lora "{style}":0.5 {look}', PROMPT, ":lora nowhere.safetensors", PROMPT, ":lora", PROMPT,
             ":lora 'a", ":size 96x64", PROMPT, f":lora {look}", ":size 64x64", PROMPT]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    Session(pipeline, args, StageLog(True)).run()
    printed = capsys.readouterr()
    assert re.findall(r"error: (.*?safetensors|:lora)", printed.err) == ["--lora nowhere.safetensors", ":lora"]
    sets = [[f"{style}:0.5", look]] * 2 + [[], [], [look]]
    for index, specs in enumerate(sets):
        fresh, own = start("bf16", *flags_of(specs))
        own = args_with(own, {"width": 96} if index == 3 else {})
        expected = fresh(**call_kwargs(fresh, own, PROMPT)).images[0]
        name = f"output_{index:03d}_42.png"
        assert np.array_equal(pixels(name), np.asarray(expected)), specs
        found = read_parameters(name)
        assert found["lora"] == (specs or None) and found["contents"] == fresh.contents


def test_metadata_of_swapped_pictures_say_that_the_fp8_check_did_not_measure_them(start):
    spec = write_lora("a.safetensors", ATTENTION)
    pipeline, _ = start()
    measured = {"techniques": {"fp8 check": {"difference": 0.1}, "bf16": {}}, "contents": {"weights": "w", "lora": []}}
    assert pipeline.lora_swap.parameters_with(measured, None) == measured
    found = pipeline.lora_swap.parameters_with(measured, [spec])
    assert found["techniques"] == {"fp8 check": {"difference": None}, "bf16": {}}
    [[digest, scale]] = found["contents"]["lora"]
    assert len(digest) == 64 and scale == 1.0
