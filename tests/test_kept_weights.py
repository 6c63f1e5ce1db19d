"""Quantized weights kept on disk: the pictures of the start that quantized them, and nothing wrong after any damage."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from conftest import pretend_hopper
from safetensors.torch import save_file

from utils import memory, random_weights, single_file
from utils.aoti import store
from utils.common import RecipeError
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize

kept_weights = pytest.importorskip("utils.kept_weights", reason="Triton is not installed: pip install triton")

TECHNIQUES = ("attention", "quantization", "fused_kernels", "kept_weights")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of one's own with one block of each kind."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_weights.build(random_weights.architecture("tiny-flux", "1+1"), "cpu", torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def start(checkpoint, make_args, tmp_path, monkeypatch):
    """A start of the program as on a Hopper GPU. Returns the pipeline and its latents after two steps."""
    pretend_hopper(monkeypatch, TECHNIQUES)

    def call(*argv, ckpt=checkpoint):
        args = make_args("--ckpt", str(ckpt), "--cache-dir", str(tmp_path / "cache"), "--height", "64", "--width", "64",
                         "--num_inference_steps", "2", *argv)
        pipeline = optimize(load_pipeline(args), args)
        return pipeline, pipeline(**call_kwargs(pipeline, args), output_type="latent").images
    return call


@pytest.fixture
def weights(tmp_path):
    """The folder of kept weights."""
    return tmp_path / "cache" / "weights"


def only(folder: Path) -> Path:
    [found] = [path for path in folder.iterdir() if path.is_dir()]
    return found


@pytest.mark.parametrize("argv", [[], ["--quality", "high"]], ids=" ".join)
def test_second_start_loads_what_the_first_kept_and_draws_the_same_bits(start, weights, monkeypatch, argv):
    first, expected = start(*argv)
    assert not first.plan.kept_weights.loaded and first.fp8_check["holds"]
    files = sorted(path.name for path in only(weights).iterdir())
    assert files == ["00.safetensors", "manifest.json"]
    monkeypatch.setattr("utils.kernels.fused_blocks.quantize_rows", None, raising=False)
    second, found = start(*argv)
    assert second.plan.kept_weights.loaded and second.fp8_check == first.fp8_check
    assert torch.equal(found, expected)
    assert not [name for name, tensor in second.transformer.state_dict().items() if tensor.is_meta]


def test_kept_weights_of_a_single_file_are_of_its_contents_alone(start, checkpoint, tmp_path, monkeypatch):
    """The file has 1 + 2 blocks, and the checkpoint 1 + 1."""
    paths = []
    for seed in (1, 2):
        configs = random_weights.architecture("tiny-flux", "1+2")
        state = random_weights.build(configs, "cpu", torch.bfloat16, seed).transformer.state_dict()
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(state, paths[-1])
    first, expected = start("--transformer", paths[0])
    assert not first.plan.kept_weights.loaded and not start("--transformer", paths[1])[0].plan.kept_weights.loaded
    monkeypatch.setattr(single_file, "load", None)
    second, found = start("--transformer", paths[0])
    assert second.plan.kept_weights.loaded and torch.equal(found, expected)
    assert len(second.transformer.single_transformer_blocks) == 2


def test_kept_weights_load_where_the_checkpoint_exceeds_cpu_memory(start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: 1000)
        with pytest.raises(RecipeError, match="CPU memory"):
            start()
    _, expected = start()
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    pipeline, found = start()
    assert pipeline.plan.kept_weights.loaded and torch.equal(found, expected)


@pytest.mark.slow
def test_shards_split_and_come_back_whole(start, weights, monkeypatch):
    monkeypatch.setattr(kept_weights, "SHARD", 2**20)
    _, expected = start()
    assert len(list(only(weights).glob("*.safetensors"))) > 2
    pipeline, found = start()
    assert pipeline.plan.kept_weights.loaded and torch.equal(found, expected)


def flip(folder):
    path = folder / "00.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder):
    os.truncate(folder / "00.safetensors", 1000)


def lose(folder):
    (folder / "00.safetensors").unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")


def other_key(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fields"]["contents"]["weights"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link(folder):
    path = folder / "00.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def link_folder(folder):
    folder.rename(folder.parent / ".moved")
    folder.symlink_to(folder.parent / ".moved")


def writable_for_others(folder):
    os.chmod(folder / "00.safetensors", 0o666)


@pytest.mark.parametrize("damage", [flip, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (
    truncate, lose, link, empty_manifest, other_key, link_folder, writable_for_others))])
def test_damaged_weights_are_named_in_one_line_and_made_again(start, weights, capfd, damage):
    _, expected = start()
    folder = only(weights)
    damage(folder)
    capfd.readouterr()
    pipeline, found = start()
    lines = [line for line in capfd.readouterr().err.splitlines() if folder.name in line]
    assert not pipeline.plan.kept_weights.loaded and torch.equal(found, expected) and len(lines) == 1
    assert start()[0].plan.kept_weights.loaded


@pytest.mark.slow
def test_another_checkpoint_lora_or_modulation_is_another_key(start, weights, checkpoint, tmp_path, monkeypatch):
    start()
    key = only(weights).name
    plan = start()[0].plan
    contents = {"weights": "w", "lora": []}
    keys = {store.key_of(kept_weights.fields_of(plan, one)) for one in (
        contents, {"weights": "v", "lora": []}, {"weights": "w", "lora": [["l", 1.0]]},
        {"weights": "w", "lora": [["l", 0.5]]})}
    plan.fused_kernels.float8_modulations = True
    keys.add(store.key_of(kept_weights.fields_of(plan, contents)))
    plan.quantization.dtype = "int8"
    keys.add(store.key_of(kept_weights.fields_of(plan, contents)))
    assert len(keys | {key}) == 7


def test_disk_that_takes_no_more_keeps_nothing_and_draws(start, weights):
    """The system's own error, in the middle of a shard."""
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        pipeline, _ = start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pipeline.plan.kept_weights.on and not [path for path in weights.iterdir() if path.is_dir()]


def test_too_little_space_is_seen_before_writing(start, weights, monkeypatch):
    monkeypatch.setattr(kept_weights, "save_file", lambda *_: pytest.fail("wrote"))
    usage = store.shutil.disk_usage
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(path)._replace(free=2**20))
    start()
    assert not [path for path in weights.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_killed_while_writing_leaves_nothing_that_a_later_start_uses(start, weights):
    _, expected = start()
    folder = only(weights)
    left_over = weights / f".{folder.name}.123.tmp"
    folder.rename(left_over)  # as far as a killed process came
    pipeline, found = start()
    assert not pipeline.plan.kept_weights.loaded and torch.equal(found, expected)
    assert not left_over.exists() and folder.exists()


@pytest.mark.slow
def test_two_processes_wait_for_each_other(start, weights, capfd):
    _, expected = start()
    folder = only(weights)
    results = []
    with store.locked(weights, folder.name):
        thread = threading.Thread(target=lambda: results.append(start()))
        thread.start()
        thread.join(1.0)
        assert not results and thread.is_alive()
    thread.join(60)
    assert results[0][0].plan.kept_weights.loaded and torch.equal(results[0][1], expected)


def test_no_more_than_three_are_kept_and_the_least_recently_used_go_first(tmp_path):
    root = store.open_store(tmp_path, "weights")
    folders = []
    for number in range(5):
        folders.append(store.publish(root, {"number": number}, lambda folder: (folder / "x").write_text("x"), {}, 0))
        os.utime(folders[-1] / "manifest.json", (number, number))
    os.utime(folders[0] / "manifest.json", (9, 9))  # loaded again
    kept_weights.forget_oldest(root, folders[4])
    assert [folder.exists() for folder in folders] == [True, False, False, True, True]


def test_failed_fp8_check_keeps_nothing(start, weights, monkeypatch):
    monkeypatch.setattr("utils.fp8_check.BOUND", 0.0)
    start()
    assert not weights.exists() or not [path for path in weights.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_skipped_check_is_said_in_later_starts(start):
    start("--skip_fp8_check")
    pipeline, _ = start()
    assert pipeline.plan.kept_weights.loaded and pipeline.fp8_check is None and not pipeline.plan.fp8_check.on


def test_lora_is_in_the_kept_weights_and_merged_into_the_text_encoder_again(start, tmp_path):
    torch.manual_seed(0)
    plain_pipeline, plain = start()
    clip = dict(plain_pipeline.text_encoder.named_parameters())
    [in_clip] = [name for name in clip if name.endswith("layers.0.self_attn.q_proj.weight")]
    shapes = {"transformer.single_transformer_blocks.0.proj_mlp": (1024, 256),
              "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": clip[in_clip].shape}
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_{side}.weight": torch.randn(size) * 0.3 for name, (rows, columns) in shapes.items()
               for side, size in (("A", (4, columns)), ("B", (rows, 4)))}, file)
    first, expected = start("--lora", str(file))
    second, found = start("--lora", str(file))
    assert second.plan.kept_weights.loaded and not first.plan.kept_weights.loaded
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    merged = [pipeline.text_encoder.get_parameter(in_clip) for pipeline in (first, second)]
    assert torch.equal(*merged) and not torch.equal(merged[0], clip[in_clip])
