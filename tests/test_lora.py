"""LoRAs in the weights: every trainer's spelling, by value, and whatever may be wrong with a file of one."""

import copy
import hashlib
import io
import json
import math
import random
import struct
import types

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lora_formats import FORMATS, D, K, Q, R, drawn, pair
from lora_reference import reference
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from utils import lora as lora_module
from utils import lora_files, pipeline_utils, safetensors_header
from utils.checkpoint import configs_of, model_shapes
from utils.common import RecipeError
from utils.lora import merge_lora, merge_loras, read_lora

CPU = torch.device("cpu")
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
Q_WEIGHT, K_WEIGHT = (f"transformer/transformer_blocks.0.attn.to_{name}.weight" for name in "qk")


@pytest.fixture(scope="module")
def _models():
    torch.manual_seed(0)
    return types.SimpleNamespace(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), guidance_embeds=True),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=20, intermediate_size=40, num_hidden_layers=1,
                                                  num_attention_heads=2, vocab_size=30)),
        text_encoder_2=T5EncoderModel(T5Config(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30,
                                               feed_forward_proj="gated-gelu")))


@pytest.fixture
def models(_models):
    return copy.deepcopy(_models)


@pytest.fixture
def base(models):
    """The weights before a LoRA, by component/parameter."""
    return weights(models)


@pytest.fixture
def save(tmp_path):
    """Writes tensors to the one LoRA file of a folder, with peft's config beside it if there is one."""
    def write(tensors, metadata=None, config=None):
        path = tmp_path / "lora.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        if config is not None:
            (tmp_path / lora_files.CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
        return path
    return write


def weights(models) -> dict[str, torch.Tensor]:
    """Copies of all parameters, by component/parameter."""
    return {f"{component}/{name}": parameter.detach().clone() for component in COMPONENTS
            for name, parameter in getattr(models, component).named_parameters()}


def lora(key=K, *sides, **more):
    """The tensors of a LoRA, and the change it stands for where nothing says an alpha."""
    tensors = drawn(pair(key, *sides, **more))
    return tensors, tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]


def shapes(models) -> dict:
    return {component: {name: tuple(parameter.shape) for name, parameter in
                        getattr(models, component).named_parameters()} for component in COMPONENTS}


def merge(models, path, scale=1.0, partial=False) -> str:
    return merge_lora(models, read_lora(f"{path}:{scale}", shapes(models), partial), CPU)


def restore(models, base):
    for component in COMPONENTS:
        getattr(models, component).load_state_dict(
            {name.partition("/")[2]: value for name, value in base.items() if name.startswith(f"{component}/")},
            strict=False)


def agree(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.allclose(value.double(), expected[key].double(), rtol=1e-4, atol=1e-5), key


# --- values ---

@pytest.mark.parametrize("name", FORMATS)
def test_merge_lora_of_every_format_gives_the_weights_of_the_reference(models, base, save, name):
    tensors, scale = drawn(FORMATS[name]), 0.7 if len(name) % 2 else 1.0
    expected = reference(tensors, base, scale)
    line = merge(models, save(tensors), scale)
    changed = {key for key, value in expected.items() if not torch.equal(value, base[key].double())}
    assert line.split()[0] == str(len({key.rpartition(".")[0] for key in changed}))
    for key, found in weights(models).items():
        tolerance = dict(rtol=1e-4, atol=1e-6) if key in changed else dict(rtol=0, atol=0)
        torch.testing.assert_close(found, expected[key].float(), **tolerance, msg=key)


def test_merge_lora_lokr_loha_and_swapped_halves_are_their_definitions(models, base, save):
    """LoKr is a Kronecker product, LoHa one element by element, and BFL's last modulation has its halves swapped."""
    kron, hada = ("transformer.transformer_blocks.1.attn.to_" + name for name in ("k", "add_out"))
    last = "final_layer.adaLN_modulation.1"
    tensors = {f"{kron}.lokr_w1": torch.tensor([[1.0, 2.0]]), f"{kron}.lokr_w2": torch.arange(512.0).view(32, 16),
               **{f"{hada}.hada_w{n}_a": torch.full((D, 1), float(n)) for n in (1, 2)},
               **{f"{hada}.hada_w{n}_b": torch.full((1, D), 5.0) for n in (1, 2)}, f"{hada}.alpha": torch.tensor(3.0),
               f"{last}.diff": torch.arange(2.0 * D)[:, None].expand(2 * D, D)}
    merge(models, save(tensors))
    w2, half = tensors[f"{kron}.lokr_w2"], torch.arange(D)
    for name, change in ((f"{kron}.weight", torch.cat([w2, 2 * w2], 1)), (f"{hada}.weight", 3.0 * 5 * 10),
                         ("transformer.norm_out.linear.weight", torch.cat([half + D, half])[:, None])):
        name = name.replace("transformer.", "transformer/", 1)
        torch.testing.assert_close(weights(models)[name], base[name] + change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.float64])
def test_merge_lora_of_every_dtype_multiplies_in_float32(models, base, save, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in drawn(pair(K, alpha=1.0)).items()}
    merge(models, save(tensors))
    a, b = (tensors[f"{K}.lora_{half}.weight"].float() for half in "AB")
    torch.testing.assert_close(weights(models)[K_WEIGHT], base[K_WEIGHT] + b @ a / R)


def test_merge_lora_into_bf16_weights_rounds_once(models, save):
    models.transformer.bfloat16()
    before = weights(models)[K_WEIGHT]
    tensors, delta = lora()
    merge(models, save(tensors), 0.3)
    assert torch.equal(weights(models)[K_WEIGHT], (before.float() + 0.3 * delta).bfloat16())


@pytest.mark.parametrize("where", ["metadata", "config"])
@pytest.mark.parametrize("more, q, k", [
    ({}, 1 / R, 1 / R), ({"use_rslora": True}, 1 / math.sqrt(R), 1 / math.sqrt(R)),
    ({"alpha_pattern": {"attn.to_q": 6}}, 3, 1 / R),
    ({"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_k": 6}}, 1 / R, 3),
    ({"alpha_pattern": {"o_q": 6}}, 1 / R, 1 / R), ({"r": 99, "rank_pattern": {"to_q": R, "to_k": R}}, 1 / R, 1 / R)])
def test_merge_lora_alpha_of_peft_scales_as_peft_does(models, base, save, where, more, q, k):
    config = {"r": R, "lora_alpha": 1, "peft_type": "LORA"} | more
    files = [lora(name) for name in (Q, K)]
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    path = save(files[0][0] | files[1][0], *((metadata, {"r": R, "lora_alpha": 64}) if where == "metadata" else
                                             (None, config)))
    merge(models, path.parent)
    for key, (_, delta), strength in zip((Q_WEIGHT, K_WEIGHT), files, (q, k), strict=True):
        torch.testing.assert_close(weights(models)[key], base[key] + strength * delta)


def test_merge_lora_alpha_tensor_wins_over_the_config(models, base, save):
    tensors, delta = lora(alpha=1.0)
    merge(models, save(tensors, config={"r": 7, "lora_alpha": 64, "use_rslora": True}))
    torch.testing.assert_close(weights(models)[K_WEIGHT], base[K_WEIGHT] + delta / R)


@pytest.mark.parametrize("name", ["prefix 'transformer.'", "kohya, double", "x-flux", "bias", "DoRA, peft ",
                                  "alpha in the header"])
def test_merge_lora_equals_diffusers_with_peft(models, save, name):
    pytest.importorskip("peft")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(
        {"transformer.r": R, "transformer.lora_alpha": 3, "transformer.target_modules": ["to_k"]})}
    path = save(drawn(FORMATS.get(name, pair(K))), metadata if name == "alpha in the header" else None)
    mine, scale = copy.deepcopy(models), 1.0 if "DoRA" in name else 0.6
    merge(mine, path, scale)
    pipeline = FluxPipeline(None, None, models.text_encoder, None, None, None, models.transformer)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(components=["transformer", "text_encoder"], lora_scale=scale)
    pipeline.unload_lora_weights()
    found, expected = weights(mine), weights(models)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)


# --- tensors that do not fit ---

@pytest.mark.parametrize("config", [
    "[]", "{", '{"r": 2}', '{"lora_alpha": 1, "r": 8}', '{"lora_alpha": NaN, "r": 2}', '{"lora_alpha": "x", "r": 2}',
    '{"lora_alpha": 1, "r": 2, "alpha_pattern": {"(": 1}}', '{"lora_alpha": 1, "r": 2, "alpha_pattern": [1]}',
    '{"lora_alpha": 1, "r": 2, "fan_in_fan_out": true}', '{"lora_alpha": 1, "r": 2, "peft_type": "LOKR"}',
    '{"lora_alpha": 1, "r": 2, "use_dora": true}', '{"lora_alpha": 1, "r": 2, "init_lora_weights": "pissa_niter_4"}'])
def test_read_lora_config_that_cannot_be_followed_is_refused(models, save, config):
    with pytest.raises(RecipeError):
        read_lora(str(save(lora()[0], config=config).parent), shapes(models))


def test_read_lora_leftovers_are_counted_and_named(models, base, save):
    tensors, delta = lora()
    for n in range(3):
        tensors |= lora(f"transformer.transformer_blocks.{n + 2}.attn.to_k")[0]
    path = save(tensors)
    with pytest.raises(RecipeError, match=r"(?s)2 of 8 .*transformer_blocks\.2\.attn.* 3 .*--lora_partial"):
        read_lora(str(path), shapes(models))
    found = read_lora(str(path), shapes(models), partial=True)
    assert "2 of 8" in found.left_out
    merge_lora(models, found, CPU)
    agree(weights(models), base | {K_WEIGHT: base[K_WEIGHT] + delta})


PAIR = pair(Q)


@pytest.mark.parametrize("extra, named", [
    ({f"{Q}.lora_A.weight": (R, D)}, "to_q.lora_B.weight"), ({f"{Q}.lora_up.weight": (D, R)}, "to_q.lora_down.weight"),
    ({f"{Q}.alpha": ()}, "alpha"), ({f"{Q}.dora_scale": (D, 1)}, "dora_scale"), ({f"{Q}.lora_B.bias": (D,)}, "bias"),
    (PAIR | {f"{Q}.lora_B.weight": (D, R + 1)}, "to_q"),
    ({f"{Q}.lora_A.weight": (0, D), f"{Q}.lora_B.weight": (D, 0)}, "to_q"),
    (PAIR | {f"{Q}.dora_scale": (1, R)}, "dora_scale"), (PAIR | {f"{Q}.alpha": (2,)}, "alpha"),
    (PAIR | {f"{Q}.lora_mid.weight": (R, R, 3, 3)}, "lora_mid"),
    ({f"{Q}.lora_A.a.weight": (R, D), f"{Q}.lora_B.b.weight": (D, R)}, "'a', 'b'"),
    (PAIR | {f"{Q}.diff": (D, D)}, "LoRA.*difference"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w1_a": (4, 2), f"{Q}.lokr_w2": (8, 8)}, "lokr_w1"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2_a": (8, 2)}, "lokr_w2"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2": (8, 9)}, "to_q"),
    ({f"{Q}.lokr_t2": (2, 2, 3, 3)}, "lokr_t2"), ({f"{Q}.hada_t1": (2, 2, 3, 3)}, "hada_t1"),
    ({f"{Q}.hada_w1_a": (D, R), f"{Q}.hada_w1_b": (R, D), f"{Q}.hada_w2_a": (D, R)}, "hada_w2_b"),
    ({f"{Q}.weight": (D, D)}, r"to_q\.weight"), ({f"{Q}.bias": (D,)}, r"to_q\.bias"),
    ({f"{Q}.oft_blocks": (2, 2)}, "oft_blocks"),
    ({"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.diff_b": (16,)}, "diff_b"),
    ({"transformer.transformer_blocks.0.attn.norm_q.weight": (8,)}, "norm_q")])
def test_read_lora_tensors_that_do_not_fit_are_named_and_can_be_left_out(models, base, save, extra, named):
    tensors, delta = lora()
    path = save(tensors | drawn(extra))
    with pytest.raises(RecipeError, match=named):
        read_lora(str(path), shapes(models))
    merge(models, path, partial=True)
    agree(weights(models), base | {K_WEIGHT: base[K_WEIGHT] + delta})


@pytest.mark.parametrize("keys, named", [
    ([f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight", f"{Q}.lora_A.default_0.weight"], "default_0"),
    ([*PAIR, "double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.lora_B.weight"],
     "double_blocks.0.img_attn.qkv"),
    ([*PAIR, "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"], "lora_unet"),
    (["x_embedder.lora_A.weight", "x_embedder.lora_B.weight"], "x_embedder")])
def test_read_lora_ambiguous_or_control_lora_is_refused_even_in_part(models, save, keys, named):
    file = {key: (3 * D if "qkv" in key else D, R) if "_B" in key else (R, D) for key in keys}
    with pytest.raises(RecipeError, match=named):
        read_lora(str(save(drawn(file))), shapes(models), partial=True)


@pytest.mark.parametrize("key, model", [
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion"),
    ("diffusion_model.blocks.0.self_attn.q", "Wan"), ("transformer.double_blocks.0.img_attn_qkv", "HunyuanVideo"),
    ("lora_unet_joint_blocks_0_context_block_attn_qkv", "Stable Diffusion 3"), ("nobody.knows", "nobody.knows")])
@pytest.mark.parametrize("partial", [False, True])
def test_read_lora_of_another_model_is_refused_by_its_name(models, save, key, model, partial):
    with pytest.raises(RecipeError, match=model):
        read_lora(str(save(drawn(pair(key)))), shapes(models), partial)


@pytest.mark.parametrize("bad", [
    {f"{Q}.lora_A.weight": torch.full((R, D), math.nan), f"{Q}.lora_B.weight": torch.ones(D, R)},
    {f"{Q}.lora_A.weight": torch.ones(R, D), f"{Q}.lora_B.weight": torch.ones(D, R),
     f"{Q}.alpha": torch.tensor(math.inf)},
    {f"{Q}.diff": torch.full((D, D), 3e38)}], ids=["nan", "infinite alpha", "overflow"])
def test_merge_lora_not_finite_is_named_and_changes_nothing(models, base, save, bad):
    found = read_lora(f"{save(lora()[0] | bad)}:2", shapes(models))
    with pytest.raises(RecipeError, match="to_q"):
        merge_lora(models, found, CPU)
    agree(weights(models), base)


def test_merge_loras_that_change_nothing_are_reported_although_quiet(models, save, capsys):
    tensors = lora()[0]
    merge_loras(models, [read_lora(str(save(tensors)), shapes(models))], CPU, quiet=True)
    assert capsys.readouterr().err == ""
    path = save({name: 0 * tensor for name, tensor in tensors.items()})
    merge_loras(models, [read_lora(str(path), shapes(models))], CPU, quiet=True)
    assert f"--lora {path}" in capsys.readouterr().err


def test_read_lora_reads_only_the_header(models, save, monkeypatch):
    path, taken = save(lora()[0]), []

    class Counted(io.FileIO):
        def read(self, size=-1):
            taken.append(super().read(size))
            return taken[-1]

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_header, "open", Counted, raising=False)
        for name in ("open", "safe_open"):
            patched.setattr(lora_module, name, None, raising=False)
        found = read_lora(f"{path}:0.5", shapes(models))
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert 0 < sum(map(len, taken)) <= 32 + header < path.stat().st_size
    assert (found.name, found.scale, found.sha256) == (str(path), 0.5, None)
    merge_lora(models, found, CPU)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / lora_files.CONFIG).write_text('{"r": 2, "lora_alpha": 1}')  # alpha changes the picture as well
    assert lora_files.contents(path) != found.sha256


# --- hundreds of damaged files against the slow reference ---

FUZZED = ["alpha", "kohya, double", "BFL, single", "BFL, swapped halves", "x-flux", "DoRA, peft .default",
          "DoRA, LyCORIS", "LoHa", "LoKr, both", "LoKr, one factored", "LoKr of stacked rows", "norms", "differences",
          "bias of stacked rows", "CLIP lora_te1_text_model_encoder_layers_0_mlp_fc1", "suffix lora_A.default"]
RENAMED = [("blocks.0", "blocks.1"), ("blocks_0", "blocks_7"), ("to_k", "to_q"), ("qkv", "proj"),
           ("lora_A", "lora_down"), ("lora_B", "lora_A"), ("weight", "bias"), ("lora_", "lore_"),
           ("transformer.", "unet."), ("img", "txt"), (".default", ".other"),
           ("diffusion_model", "model.diffusion_model"), ("_w1", "_w2"), ("alpha", "alpha2"),
           ("lora_unet_", "lora_transformer_"), ("dora_scale", "lora_magnitude_vector"), ("", "base_model.model."),
           ("", " ")]
RESHAPED = [lambda t: t.mT if t.dim() > 1 else t[:, None], lambda t: t.flatten(), lambda t: t[:-1],
            lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t[:0], lambda t: t.reshape(-1, 1),
            lambda t: t[..., None, None]]


def mutated(tensors: dict, rng: random.Random) -> dict:
    """One thing changed in a LoRA's tensors."""
    tensors, name = dict(tensors), rng.choice(list(tensors))
    tensor, kind = tensors[name], rng.randrange(12)
    if kind == 0:
        del tensors[name]
    elif kind <= 3:
        del tensors[name]
        old, new = rng.choice([swap for swap in RENAMED if swap[0] in name])
        tensors[name.replace(old, new, 1)] = tensor
    elif kind <= 5:
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64,
                                              torch.int32]))
    elif kind <= 8 and tensor.dim():
        tensors[name] = rng.choice(RESHAPED)(tensor if tensor.dim() < 3 else tensor.flatten())
    elif kind == 9 and tensor.numel():
        tensors[name] = tensor.clone().float()
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, 1e30, 0.0])
    else:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return tensors


def outcome(models, base, path):
    """The merged weights, or None where a RecipeError says why not; nothing else may come. The models are as before."""
    try:
        merge(models, path)
        found = weights(models)
        restore(models, base)
        return found
    except RecipeError as error:
        assert str(error).startswith("--lora ") and "\n" not in str(error)
        agree(weights(models), base)
        return None


@pytest.mark.parametrize("name", FUZZED)
def test_merge_lora_damaged_tensors_end_as_in_the_reference_or_in_a_paragraph(models, base, save, name):
    rng, tensors = random.Random(name), drawn(FORMATS[name])
    for _ in range(12):
        damaged = mutated(tensors, rng)
        expected, found = reference(damaged, base), outcome(models, base, save(damaged))
        assert (found is None) == (expected is None), damaged.keys() ^ tensors.keys()
        if found is not None:
            agree(found, expected)


@pytest.mark.parametrize("name", FUZZED)
def test_merge_lora_damaged_bytes_end_as_in_the_reference_or_in_a_paragraph(models, base, save, name):
    rng, path = random.Random(name), save(drawn(FORMATS[name]))
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(8):
        damaged = bytearray(content)
        kind = rng.randrange(4)
        if kind == 0:
            damaged = damaged[:rng.randrange(len(damaged))]
        for _ in range(rng.choice([1, 1, 2]) if kind else 0):
            damaged[rng.randrange(8 if kind == 1 else header)] = rng.randrange(256)
        path.write_bytes(damaged)
        found = outcome(models, base, path)
        if found is not None:
            agree(found, reference(load_file(path), base))


# --- in the recipe ---

def test_load_pipeline_several_loras_are_their_sum(make_args, tmp_path, save, capsys):
    argv, total = ["--ckpt", "tiny-flux", "--disable_bf16"], 0
    base = weights(pipeline_utils.load_pipeline(make_args(*argv)))
    width = len(base[K_WEIGHT])
    for n, scale in enumerate((0.5, -1.0)):
        tensors, delta = lora(K, width, width)
        extra = lora("transformer.transformer_blocks.99.attn.to_k")[0] if n else {}
        argv += ["--lora", f"{save(tensors | extra).rename(tmp_path / f'{n}.safetensors')}:{scale}"]
        total = total + scale * delta
    with pytest.raises(RecipeError, match="--lora_partial"):
        pipeline_utils.load_pipeline(make_args(*argv))
    pipeline = pipeline_utils.load_pipeline(make_args(*argv, "--lora_partial"))
    agree(weights(pipeline), base | {K_WEIGHT: base[K_WEIGHT] + total})
    assert "2 of 4" in capsys.readouterr().err  # although --quiet


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-flux-dev", "tiny-kontext"])
def test_model_shapes_of_configs_are_those_of_the_weights(build, name):
    pipeline = build(name)
    found = model_shapes(configs_of(pipeline))
    assert {component: found[component] for component in COMPONENTS} == shapes(pipeline)
