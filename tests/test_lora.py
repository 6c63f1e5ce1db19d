"""LoRAs in the weights: every trainer's spelling, by value, and whatever may be wrong with a file of one."""

import copy
import functools
import hashlib
import io
import itertools
import json
import math
import random
import struct
import types

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from utils import lora as lora_module
from utils import lora_files, pipeline_utils, safetensors_header
from utils.benchmark_utils import RecipeError
from utils.checkpoint import configs_of, model_shapes
from utils.lora import merge_lora, read_lora
from utils.safetensors_header import read_header

COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
D, R = 32, 2  # width of the transformer, rank of the LoRAs
QKV = ("to_q", "to_k", "to_v")


@pytest.fixture(scope="module")
def _models():
    torch.manual_seed(0)
    models = types.SimpleNamespace(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), guidance_embeds=True),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=20, intermediate_size=40, num_hidden_layers=1,
                                                  num_attention_heads=2, vocab_size=30)),
        text_encoder_2=T5EncoderModel(T5Config(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30,
                                               feed_forward_proj="gated-gelu")))
    return models


@pytest.fixture
def models(_models):
    return copy.deepcopy(_models)


def weights(models) -> dict[str, torch.Tensor]:
    """Copies, by component/parameter."""
    return {f"{component}/{name}": parameter.detach().clone() for component in COMPONENTS
            for name, parameter in getattr(models, component).named_parameters()}


def shapes(models) -> dict:
    return {component: {name: tuple(parameter.shape) for name, parameter in
                        getattr(models, component).named_parameters()} for component in COMPONENTS}


def save(folder, tensors, metadata=None, config=None):
    path = folder / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def merge(models, path, scale=1.0, partial=False) -> str:
    return merge_lora(models, read_lora(f"{path}:{scale}", shapes(models), partial))


# --- every format, with what it leads to at scale 1 ---

def rnd(*shape):
    return 0.3 * torch.randn(shape)


def pair(name, out=D, into=D, down="lora_A", up="lora_B", alpha=None):
    """The tensors of one LoRA, and the change it stands for."""
    a, b = rnd(R, into), rnd(out, R)
    tensors = {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, (1 if alpha is None else alpha / R) * b @ a


def one(key, parameter, *shape, **spelling):
    """A format of one pair a file."""
    def make(base):
        tensors, delta = pair(key, *shape, **spelling)
        return tensors, {parameter: base[parameter] + delta}
    return make


def stacked(key, parameters, sizes=None, width=D, **spelling):
    """A format whose trainer stacks the rows of several Linears."""
    def make(base):
        rows = sizes or [D] * len(parameters)
        tensors, delta = pair(key, sum(rows), width, **spelling)
        return tensors, {name: base[name] + part for name, part in zip(parameters, delta.split(rows), strict=True)}
    return make


def swapped(base):
    tensors, delta = pair("diffusion_model.final_layer.adaLN_modulation.1", 2 * D)
    shift, scale = delta.chunk(2)
    name = "transformer/norm_out.linear.weight"
    return tensors, {name: base[name] + torch.cat([scale, shift])}


def with_bias(base):
    tensors, delta = pair("transformer.proj_out", 16, alpha=1.0)
    bias = rnd(16)
    return tensors | {"transformer.proj_out.lora_B.bias": bias}, {
        "transformer/proj_out.weight": base["transformer/proj_out.weight"] + delta,
        "transformer/proj_out.bias": base["transformer/proj_out.bias"] + bias / R}


def bfl_bias(base):
    tensors, delta = pair("single_blocks.1.linear1", 7 * D)
    bias, names = rnd(7 * D), [*(f"attn.{name}" for name in QKV), "proj_mlp"]
    found = {}
    for kind, change in (("weight", delta), ("bias", bias)):
        for name, part in zip(names, change.split([D, D, D, 4 * D]), strict=True):
            key = f"transformer/single_transformer_blocks.1.{name}.{kind}"
            found[key] = base[key] + part
    return tensors | {"single_blocks.1.linear1.lora_B.bias": bias}, found


def dora(key, magnitude_key, shape, parameter="transformer/transformer_blocks.0.attn.to_q.weight", **spelling):
    def make(base):
        tensors, delta = pair(key, **spelling)
        magnitude = rnd(*shape).abs() + 0.5
        whole = (base[parameter] + delta).double()
        rows = len(shape) == 1 or shape[0] > 1
        norms = torch.stack([row.norm() for row in (whole if rows else whole.T)])
        m = magnitude.double().flatten()
        target = torch.diag(m / norms) @ whole if rows else whole @ torch.diag(m / norms)
        return tensors | {magnitude_key: magnitude}, {parameter: target.float()}
    return make


def dora_of_stacked_rows(base):
    names = [f"transformer/transformer_blocks.1.attn.{name}.weight" for name in QKV]
    tensors, delta = pair("lora_unet_double_blocks_1_img_attn_qkv", 3 * D, down="lora_down", up="lora_up", alpha=1.0)
    magnitude = rnd(1, D).abs() + 0.5
    whole = torch.cat([base[name] for name in names]) + delta
    target = magnitude * whole / (whole**2).sum(0, keepdim=True).sqrt()
    return tensors | {"lora_unet_double_blocks_1_img_attn_qkv.dora_scale": magnitude}, dict(
        zip(names, target.split(D), strict=True))


def kron(one, other):
    return torch.cat([torch.cat([value * other for value in row], 1) for row in one])


def lokr(kinds, alpha, strength):
    def make(base):
        w1, w1_a, w1_b, w2, w2_a, w2_b = rnd(4, 2), rnd(4, R), rnd(R, 2), rnd(8, 16), rnd(8, R), rnd(R, 16)
        values = dict(w1=w1, w1_a=w1_a, w1_b=w1_b, w2=w2, w2_a=w2_a, w2_b=w2_b)
        delta = strength * kron(w1 if "w1" in kinds else w1_a @ w1_b, w2 if "w2" in kinds else w2_a @ w2_b)
        key, name = "lycoris_single_transformer_blocks_0_attn_to_k", "single_transformer_blocks.0.attn.to_k.weight"
        return ({f"{key}.lokr_{kind}": values[kind] for kind in kinds} | {f"{key}.alpha": torch.tensor(alpha)},
                {f"transformer/{name}": base[f"transformer/{name}"] + delta})
    return make


def lokr_of_stacked_rows(base):
    w1, w2 = rnd(2, 4), rnd(48, 8)
    names = [f"transformer/transformer_blocks.0.attn.add_{name}_proj.weight" for name in "qkv"]
    return ({f"diffusion_model.double_blocks.0.txt_attn.qkv.lokr_{n}": w for n, w in (("w1", w1), ("w2", w2))},
            {name: base[name] + part for name, part in zip(names, kron(w1, w2).split(D), strict=True)})


def loha(base):
    parts = {"w1_a": rnd(D, R), "w1_b": rnd(R, D), "w2_a": rnd(D, R), "w2_b": rnd(R, D)}
    name = "transformer/transformer_blocks.1.attn.to_add_out.weight"
    delta = 0.25 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    return ({f"lycoris_transformer_blocks_1_attn_to_add_out.hada_{n}": w for n, w in parts.items()}
            | {"lycoris_transformer_blocks_1_attn_to_add_out.alpha": torch.tensor(0.5)}, {name: base[name] + delta})


def differences(base):
    tensors = {"diffusion_model.img_in.diff": rnd(D, 16), "diffusion_model.img_in.diff_b": rnd(D),
               "diffusion_model.single_blocks.0.norm.query_norm.diff": rnd(16),
               "lora_te1_text_model_final_layer_norm.w_norm": rnd(20),
               "lora_te1_text_model_final_layer_norm.b_norm": rnd(20)}
    names = ("transformer/x_embedder.weight", "transformer/x_embedder.bias",
             "transformer/single_transformer_blocks.0.attn.norm_q.weight",
             "text_encoder/final_layer_norm.weight", "text_encoder/final_layer_norm.bias")
    return tensors, {name: base[name] + change for name, change in zip(names, tensors.values(), strict=True)}


def norms(base):
    tensors, delta = pair("transformer.transformer_blocks.0.attn.to_q")
    values = [rnd(16) for _ in range(4)]
    keys = ("transformer.transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.txt_attn.norm.query_norm.scale",
            "double_blocks.0.txt_attn.norm.key_norm.scale", "single_blocks.1.norm.key_norm.scale")
    names = ("transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.norm_added_q",
             "transformer_blocks.0.attn.norm_added_k", "single_transformer_blocks.1.attn.norm_k")
    q = "transformer/transformer_blocks.0.attn.to_q.weight"
    return tensors | dict(zip(keys, values, strict=True)), {q: base[q] + delta} | {
        f"transformer/{name}.weight": value for name, value in zip(names, values, strict=True)}


def together(*formats):
    """Several formats in one file."""
    def make(base):
        tensors, found = {}, {}
        for format_ in formats:
            more, changed = format_(base)
            tensors, found = tensors | more, found | changed
        return tensors, found
    return make


def as_convolution(base):
    tensors, found = one("transformer.transformer_blocks.0.attn.to_k",
                         "transformer/transformer_blocks.0.attn.to_k.weight")(base)
    return {name: tensor[..., None, None] for name, tensor in tensors.items()}, found


K0 = "transformer/transformer_blocks.0.attn.to_k.weight"
KOHYA = dict(down="lora_down", up="lora_up", alpha=1.0)
double0 = "transformer/transformer_blocks.0."
single0 = "transformer/single_transformer_blocks.0."
FORMATS = {
    **{f"prefix {prefix!r}": one(f"{prefix}transformer_blocks.0.attn.to_k", K0) for prefix in (
        "", "transformer.", "unet.", "base_model.model.", "base_model.model.transformer.", "diffusion_model.",
        "model.diffusion_model.")},
    **{f"prefix {prefix!r}": one(f"{prefix}transformer_blocks_0_attn_to_k", K0, **KOHYA) for prefix in (
        "lora_unet_", "lora_transformer_", "lycoris_")},
    **{f"suffix {down}": one("transformer.transformer_blocks.0.attn.to_k", K0, down=down, up=up) for down, up in (
        ("lora_A.default", "lora_B.default"), ("lora_A.default_0", "lora_B.default_0"),
        ("lora_A.my-style", "lora_B.my-style"),
        ("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up"))},
    "oldest": together(one("transformer_blocks.0.attn.processor.to_k_lora", K0, down="down", up="up"),
                       one("transformer_blocks.0.attn.processor.to_out_lora", f"{double0}attn.to_out.0.weight",
                           down="down", up="up")),
    "alpha": one("transformer.transformer_blocks.0.attn.to_k", K0, alpha=0.7),
    "integer alpha": one("transformer.transformer_blocks.0.attn.to_k", K0, alpha=1),
    "convolution of one pixel": as_convolution,
    "mixed prefixes": together(*(one(f"{prefix}.{n}.attn.to_k", f"transformer/transformer_blocks.{n}.attn.to_k.weight")
                                 for n, prefix in enumerate(("transformer.transformer_blocks", "transformer_blocks")))),
    "kohya, double": together(
        stacked("lora_unet_double_blocks_0_img_attn_qkv", [f"{double0}attn.{n}.weight" for n in QKV], **KOHYA),
        stacked("lora_unet_double_blocks_0_txt_attn_qkv", [f"{double0}attn.add_{n}_proj.weight" for n in "qkv"],
                **KOHYA),
        one("lora_unet_double_blocks_0_img_attn_proj", f"{double0}attn.to_out.0.weight", **KOHYA),
        one("lora_unet_double_blocks_0_txt_attn_proj", f"{double0}attn.to_add_out.weight", **KOHYA),
        one("lora_unet_double_blocks_0_img_mlp_0", f"{double0}ff.net.0.proj.weight", 4 * D, **KOHYA),
        one("lora_unet_double_blocks_0_img_mlp_2", f"{double0}ff.net.2.weight", D, 4 * D, **KOHYA),
        one("lora_unet_double_blocks_0_txt_mlp_0", f"{double0}ff_context.net.0.proj.weight", 4 * D, **KOHYA),
        one("lora_unet_double_blocks_0_txt_mlp_2", f"{double0}ff_context.net.2.weight", D, 4 * D, **KOHYA),
        one("lora_unet_double_blocks_0_img_mod_lin", f"{double0}norm1.linear.weight", 6 * D, **KOHYA),
        one("lora_unet_double_blocks_0_txt_mod_lin", f"{double0}norm1_context.linear.weight", 6 * D, **KOHYA)),
    "BFL, single": together(
        stacked("diffusion_model.single_blocks.0.linear1",
                [*(f"{single0}attn.{n}.weight" for n in QKV), f"{single0}proj_mlp.weight"], [D, D, D, 4 * D]),
        one("diffusion_model.single_blocks.0.linear2", f"{single0}proj_out.weight", D, 5 * D),
        one("diffusion_model.single_blocks.0.modulation.lin", f"{single0}norm.linear.weight", 3 * D)),
    "BFL, outside": together(
        one("img_in", "transformer/x_embedder.weight", D, 16),
        one("txt_in", "transformer/context_embedder.weight", D, 24),
        *(one(f"{ours}.{layer}_layer", f"transformer/time_text_embed.{theirs}.linear_{n}.weight", D, into)
          for ours, theirs, width in (("time_in", "timestep_embedder", 256), ("vector_in", "text_embedder", 20),
                                      ("guidance_in", "guidance_embedder", 256))
          for n, (layer, into) in enumerate((("in", width), ("out", D)), 1)),
        one("final_layer.linear", "transformer/proj_out.weight", 16)),
    "BFL, swapped halves": swapped,
    "x-flux": together(
        stacked("double_blocks.0.processor.qkv_lora1", [f"{double0}attn.{n}.weight" for n in QKV], down="down",
                up="up"),
        stacked("double_blocks.0.processor.qkv_lora2", [f"{double0}attn.add_{n}_proj.weight" for n in "qkv"],
                down="down", up="up"),
        one("double_blocks.0.processor.proj_lora1", f"{double0}attn.to_out.0.weight", down="down", up="up"),
        one("double_blocks.0.processor.proj_lora2", f"{double0}attn.to_add_out.weight", down="down", up="up"),
        stacked("single_blocks.0.processor.qkv_lora", [f"{single0}attn.{n}.weight" for n in QKV], down="down", up="up"),
        one("single_blocks.0.processor.proj_lora", f"{single0}proj_out.weight", D, 5 * D, down="down", up="up")),
    **{f"CLIP {key}": one(key, "text_encoder/encoder.layers.0.mlp.fc1.weight", 40, 20, **spelling)
       for key, spelling in (
           ("text_encoder.encoder.layers.0.mlp.fc1", {}), ("text_encoder.text_model.encoder.layers.0.mlp.fc1", {}),
           ("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA),
           ("lora_te_text_model_encoder_layers_0_mlp_fc1", KOHYA),
           ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", KOHYA))},
    **{f"T5 {key}": one(key, "text_encoder_2/encoder.block.0.layer.0.SelfAttention.q.weight", 16, 24, **spelling)
       for key, spelling in (
           ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", {}),
           ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", KOHYA),
           ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", KOHYA),
           ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", KOHYA))},
    "bias": with_bias,
    "bias of stacked rows": bfl_bias,
    "DoRA, kohya": dora("lora_unet_transformer_blocks_0_attn_to_q",
                        "lora_unet_transformer_blocks_0_attn_to_q.dora_scale",
                        (D, 1), **KOHYA),
    "DoRA, LyCORIS": dora("transformer.transformer_blocks.0.attn.to_q",
                          "transformer.transformer_blocks.0.attn.to_q.dora_scale", (1, D)),
    **{f"DoRA, peft {name}": dora("transformer.transformer_blocks.0.attn.to_q",
                                  f"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector{name}", (D,),
                                  **more)
       for name, more in (("", {}), (".weight", {}), (".default", dict(down="lora_A.default", up="lora_B.default")),
                          (".default.weight", dict(down="lora_A.default", up="lora_B.default")))},
    "DoRA of stacked rows": dora_of_stacked_rows,
    "LoKr": lokr(("w1", "w2"), 1e10, 1.0),
    "LoKr, one factored": lokr(("w1", "w2_a", "w2_b"), 1.0, 1 / R),
    "LoKr, the other": lokr(("w1_a", "w1_b", "w2"), 3.0, 3 / R),
    "LoKr, both": lokr(("w1_a", "w1_b", "w2_a", "w2_b"), 1.0, 1 / R),
    "LoKr of stacked rows": lokr_of_stacked_rows,
    "LoHa": loha,
    "differences": differences,
    "norms": norms,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_by_value(models, tmp_path, name):
    base = weights(models)
    tensors, targets = FORMATS[name](base)
    path = save(tmp_path, tensors)
    scale = 0.7 if len(name) % 2 else 1.0
    line = merge(models, path, scale)
    assert str(len({key.rpartition(".")[0] for key in targets})) == line.split()[0]
    for key, found in weights(models).items():
        if key in targets:
            torch.testing.assert_close(found, base[key] + scale * (targets[key] - base[key]), rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(found, base[key]), key
    agree(weights(models), reference(tensors, base, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.float64])
def test_every_dtype(models, tmp_path, dtype):
    base = weights(models)
    tensors = {name: tensor.to(dtype) for name, tensor in
               pair("transformer.transformer_blocks.0.attn.to_k", alpha=1.0)[0].items()}
    merge(models, save(tmp_path, tensors))
    a, b = (tensors[f"transformer.transformer_blocks.0.attn.to_k.lora_{half}.weight"].float() for half in "AB")
    torch.testing.assert_close(weights(models)[K0], base[K0] + b @ a / R)


def test_bf16_weights_are_rounded_once(models, tmp_path):
    models.transformer.bfloat16()
    base = weights(models)
    tensors, delta = pair("transformer.transformer_blocks.0.attn.to_k")
    merge(models, save(tmp_path, tensors), 0.3)
    assert torch.equal(weights(models)[K0], (base[K0].float() + 0.3 * delta).bfloat16())


# --- alpha outside the tensors ---

@pytest.mark.parametrize("where", ["metadata", "config"])
@pytest.mark.parametrize("more, q, k", [
    ({}, 1 / R, 1 / R), ({"use_rslora": True}, 1 / math.sqrt(R), 1 / math.sqrt(R)),
    ({"alpha_pattern": {"attn.to_q": 6}}, 3, 1 / R),
    ({"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_k": 6}}, 1 / R, 3),
    ({"alpha_pattern": {"o_q": 6}}, 1 / R, 1 / R), ({"r": 99, "rank_pattern": {"to_q": R, "to_k": R}}, 1 / R, 1 / R)])
def test_alpha_as_peft_saves_it(models, tmp_path, where, more, q, k):
    base = weights(models)
    config = {"r": R, "lora_alpha": 1, "peft_type": "LORA"} | more
    files = [pair(f"transformer.transformer_blocks.0.attn.to_{n}") for n in "qk"]
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    save(tmp_path, files[0][0] | files[1][0], *((metadata, {"r": R, "lora_alpha": 64}) if where == "metadata" else
                                                (None, config)))
    merge(models, tmp_path)
    for n, (_, delta), strength in zip("qk", files, (q, k), strict=True):
        key = f"{double0}attn.to_{n}.weight"
        torch.testing.assert_close(weights(models)[key], base[key] + strength * delta)


def test_alpha_tensors_win(models, tmp_path):
    base = weights(models)
    tensors, delta = pair("transformer.transformer_blocks.0.attn.to_k", alpha=1.0)
    merge(models, save(tmp_path, tensors, config={"r": 7, "lora_alpha": 64, "use_rslora": True}))
    torch.testing.assert_close(weights(models)[K0], base[K0] + delta)


@pytest.mark.parametrize("config", [
    "[]", "{", '{"r": 2}', '{"lora_alpha": 1, "r": 8}', '{"lora_alpha": NaN, "r": 2}', '{"lora_alpha": "x", "r": 2}',
    '{"lora_alpha": 1, "r": 2, "alpha_pattern": {"(": 1}}', '{"lora_alpha": 1, "r": 2, "alpha_pattern": [1]}',
    '{"lora_alpha": 1, "r": 2, "fan_in_fan_out": true}', '{"lora_alpha": 1, "r": 2, "peft_type": "LOKR"}',
    '{"lora_alpha": 1, "r": 2, "use_dora": true}', '{"lora_alpha": 1, "r": 2, "init_lora_weights": "pissa_niter_4"}'])
def test_a_config_that_cannot_be_followed_is_refused(models, tmp_path, config):
    save(tmp_path, pair("transformer.transformer_blocks.0.attn.to_k")[0])
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(RecipeError):
        read_lora(str(tmp_path), shapes(models))


# --- diffusers and peft, where they are right ---

@pytest.mark.parametrize("name", ["prefix 'transformer.'", "kohya, double", "x-flux", "bias", "DoRA, peft ",
                                  "alpha in the header"])
def test_as_diffusers_and_peft_merge_it(models, tmp_path, name):
    pytest.importorskip("peft")
    pipeline = FluxPipeline(None, None, models.text_encoder, None, None, None, models.transformer)
    metadata = None
    if name == "alpha in the header":
        tensors = FORMATS["prefix 'transformer.'"](weights(models))[0]
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(
            {"transformer.r": R, "transformer.lora_alpha": 3, "transformer.target_modules": ["to_k"]})}
    else:
        tensors = FORMATS[name](weights(models))[0]
    path = save(tmp_path, tensors, metadata)
    mine = copy.deepcopy(models)
    merge(mine, path, 0.6 if "DoRA" not in name else 1.0)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipeline.fuse_lora(components=["transformer", "text_encoder"], lora_scale=0.6 if "DoRA" not in name else 1.0)
    pipeline.unload_lora_weights()
    found, expected = weights(mine), weights(models)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)


# --- what does not fit ---

def test_leftovers_are_counted_and_named(models, tmp_path, capsys):
    base = weights(models)
    tensors, delta = pair("transformer.transformer_blocks.0.attn.to_k")
    for n in range(3):
        tensors |= pair(f"transformer.transformer_blocks.{n + 2}.attn.to_k")[0]
    path = save(tmp_path, tensors)
    with pytest.raises(RecipeError, match=r"(?s)2 of 8 tensors.*transformer_blocks\.2\.attn.*3 more.*--lora_partial"):
        read_lora(str(path), shapes(models))
    lora = read_lora(str(path), shapes(models), partial=True)
    assert "2 of 8" in lora.left_out
    merge_lora(models, lora)
    agree(weights(models), base | {K0: base[K0] + delta})


Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("extra, text", [
    ({f"{Q}.lora_A.weight": (R, D)}, "to_q.lora_B.weight"), ({f"{Q}.lora_up.weight": (D, R)}, "to_q.lora_down.weight"),
    ({f"{Q}.alpha": ()}, "alpha"), ({f"{Q}.dora_scale": (D, 1)}, "dora_scale"), ({f"{Q}.lora_B.bias": (D,)}, "bias"),
    ({f"{Q}.lora_A.weight": (R, D), f"{Q}.lora_B.weight": (D, R + 1)}, "to_q"),
    ({f"{Q}.lora_A.weight": (0, D), f"{Q}.lora_B.weight": (D, 0)}, "to_q"),
    ({f"{Q}.lora_A.weight": (R, D), f"{Q}.lora_B.weight": (D, R), f"{Q}.dora_scale": (1, R)}, "dora_scale"),
    ({f"{Q}.lora_A.weight": (R, D), f"{Q}.lora_B.weight": (D, R), f"{Q}.alpha": (2,)}, "alpha"),
    ({f"{Q}.lora_A.weight": (R, D), f"{Q}.lora_B.weight": (D, R), f"{Q}.lora_mid.weight": (R, R, 3, 3)}, "lora_mid"),
    ({f"{Q}.lora_A.a.weight": (R, D), f"{Q}.lora_B.b.weight": (D, R)}, "'a', 'b'"),
    ({f"{Q}.lora_A.weight": (R, D), f"{Q}.lora_B.weight": (D, R), f"{Q}.diff": (D, D)}, "LoRA and difference"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w1_a": (4, 2), f"{Q}.lokr_w2": (8, 8)}, "lokr_w1"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2_a": (8, 2)}, "lokr_w2"),
    ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2": (8, 9)}, "to_q"),
    ({f"{Q}.lokr_t2": (2, 2, 3, 3)}, "lokr_t2"), ({f"{Q}.hada_t1": (2, 2, 3, 3)}, "hada_t1"),
    ({f"{Q}.hada_w1_a": (D, R), f"{Q}.hada_w1_b": (R, D), f"{Q}.hada_w2_a": (D, R)}, "hada_w2_b"),
    ({f"{Q}.weight": (D, D)}, "full weight"), ({f"{Q}.bias": (D,)}, "full weight"),
    ({f"{Q}.oft_blocks": (2, 2)}, "oft_blocks"),
    ({"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.diff_b": (16,)}, "diff_b"),
    ({"transformer.transformer_blocks.0.attn.norm_q.weight": (8,)}, "norm_q")])
def test_what_does_not_fit_is_named_and_can_be_left_out(models, tmp_path, extra, text):
    base = weights(models)
    tensors, delta = pair("transformer.transformer_blocks.0.attn.to_k")
    path = save(tmp_path, tensors | {name: rnd(*shape) for name, shape in extra.items()})
    with pytest.raises(RecipeError, match=text):
        read_lora(str(path), shapes(models))
    merge(models, path, partial=True)
    agree(weights(models), base | {K0: base[K0] + delta})


@pytest.mark.parametrize("keys, text", [
    ([f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight", f"{Q}.lora_A.default_0.weight"], "default_0"),
    ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "double_blocks.0.img_attn.qkv.lora_A.weight",
      "double_blocks.0.img_attn.qkv.lora_B.weight"], "two spellings"),
    ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"],
     "lora_unet"),
    (["x_embedder.lora_A.weight", "x_embedder.lora_B.weight"], "control image")])
def test_ambiguous_and_control_loras_are_refused_even_in_part(models, tmp_path, keys, text):
    tensors = {key: rnd(3 * D if "qkv" in key else D, R) if "_B" in key else rnd(R, D) for key in keys}
    with pytest.raises(RecipeError, match=text):
        read_lora(str(save(tmp_path, tensors)), shapes(models), partial=True)


@pytest.mark.parametrize("key, text", [
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion"),
    ("diffusion_model.blocks.0.self_attn.q", "Wan"), ("transformer.double_blocks.0.img_attn_qkv", "HunyuanVideo"),
    ("lora_unet_joint_blocks_0_context_block_attn_qkv", "Stable Diffusion 3"),
    ("nobody.knows", "none of its 2 tensors")])
def test_loras_of_other_models_are_named(models, tmp_path, key, text):
    path = save(tmp_path, pair(key)[0])
    for partial in (False, True):
        with pytest.raises(RecipeError, match=text):
            read_lora(str(path), shapes(models), partial)


def test_nothing_changes_on_an_error(models, tmp_path):
    base = weights(models)
    good = pair("transformer.transformer_blocks.0.attn.to_k")[0]
    for bad in ({f"{Q}.lora_A.weight": torch.full((R, D), math.nan), f"{Q}.lora_B.weight": rnd(D, R)},
                {f"{Q}.lora_A.weight": rnd(R, D), f"{Q}.lora_B.weight": rnd(D, R),
                 f"{Q}.alpha": torch.tensor(math.inf)},
                {f"{Q}.diff": torch.full((D, D), 3e38)}):
        lora = read_lora(f"{save(tmp_path, good | bad)}:2", shapes(models))
        with pytest.raises(RecipeError, match="finite"):
            merge_lora(models, lora)
        agree(weights(models), base)


def test_a_lora_that_changes_nothing_says_so(models, tmp_path):
    tensors = {name: 0 * tensor for name, tensor in pair("transformer.transformer_blocks.0.attn.to_k")[0].items()}
    assert "no weight has changed" in merge(models, save(tmp_path, tensors))


# --- files ---

def test_only_the_header_is_read_before_the_merge(models, tmp_path, monkeypatch):
    path, taken = save(tmp_path, pair("transformer.transformer_blocks.0.attn.to_k")[0]), []

    class Counted(io.FileIO):
        def read(self, size=-1):
            taken.append(super().read(size))
            return taken[-1]

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_header, "open", Counted, raising=False)
        for name in ("open", "safe_open"):
            patched.setattr(lora_module, name, None, raising=False)
        lora = read_lora(f"{path}:0.5", shapes(models))
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert 0 < sum(map(len, taken)) <= 32 + header < path.stat().st_size
    assert (lora.name, lora.scale, lora.sha256) == (str(path), 0.5, None)
    merge_lora(models, lora)
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / lora_files.CONFIG).write_text('{"r": 2, "lora_alpha": 1}')  # alpha changes the picture as well
    assert lora_files.contents(path) != lora.sha256


@pytest.mark.parametrize("spec, expected", [
    ("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5)),
    ("a/b:-1e-1", ("a/b", -0.1)),
    (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0)), (r"C:\x:2", (r"C:\x", 2.0)), ("a:b:0", ("a:b", 0.0)),
    ("a:", ("a:", 1.0)), (":1", (":1", 1.0)), ("a:nan", None), ("a:-inf", None), ("a:1e400", None)])
def test_path_and_scale(spec, expected):
    if expected:
        assert lora_files.split(spec) == expected
    else:
        with pytest.raises(RecipeError, match="finite"):
            lora_files.split(spec)


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
TWO = b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, ' \
      b'"b": {"dtype": "U8", "shape": [4], "data_offsets": [%s]}}'


@pytest.mark.parametrize("content, text", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>no</html>", "web page"), (b"PK\x03\x04" + bytes(40), "zip"),
    (b"GGUF" + bytes(40), "GGUF"),
    (b"\x80\x02}q\x00." + bytes(40), "pickle"), (bytes(100), "not a safetensors"), (b"junk", "not a safetensors"),
    (safetensors(ENTRY)[:20], "truncated.*20 of"), (safetensors(ENTRY, bytes(7)), "truncated.*76 of 77"),
    (safetensors(ENTRY, bytes(9)), "damaged"), (safetensors(b"{" * 300_000), "header"),
    (safetensors(b"{}"), "no tensors"),
    (safetensors(b'{"a": 1}'), "header"), (safetensors(ENTRY.replace(b"F32", b"F99"), bytes(8)), "F99"),
    (safetensors(ENTRY.replace(b"[2]", b"[3]"), bytes(8)), "header"),
    (safetensors(ENTRY.replace(b"[2]", b"[-2]"), bytes(8)), "header"),
    (safetensors(ENTRY.replace(b"[0, 8]", b"[8, 16]"), bytes(16)), "header"),
    (safetensors(TWO % b"2, 6", bytes(6)), "header"),
    (safetensors(ENTRY[:-1] + b"," + ENTRY[1:], bytes(8)), "twice"),
    (safetensors(b'{"__metadata__": {"a": 1}}'), "header"),
    (struct.pack("<Q", 1 << 60) + b"{}" * 40, "not a safetensors"), (safetensors(b'{"\xff": 1}'), "header")])
def test_a_file_that_is_no_lora_is_named(tmp_path, content, text):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"(?s)lora.safetensors.*{text}"):
        read_lora(str(path), {})


def test_a_header_is_what_the_library_reads(tmp_path):
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(0, 5),
               "c": torch.zeros((), dtype=torch.int64)}
    path = save(tmp_path, tensors, {"x": "y"})
    header, metadata = read_header(path)
    assert metadata == {"x": "y"}
    assert header == {"a": ("F32", (0, 5)), "b": ("BF16", (2, 3)), "c": ("I64", ())}


def place(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("names, found", [
    (["style.safetensors"], "style.safetensors"), (["x.safetensors", "y/z.safetensors", "c.json"], "x.safetensors"),
    (["b.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
    (["b.safetensors", "adapter_model.safetensors", "b.bin"], "adapter_model.safetensors"),
    (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"), ([], "no safetensors"),
    (["adapter_model.safetensors", "pytorch_lora_weights.safetensors"], "several"),
    (["step-1/a.safetensors", "step-2/a.safetensors"], "step-1/a.safetensors, step-2/a.safetensors"),
    (["pytorch_lora_weights.bin", "README.md"], "pickled.*weights_only=True")])
@pytest.mark.parametrize("where", ["folder", "Hub", "cache"])
def test_the_one_file_of_a_folder_or_repository(tmp_path, monkeypatch, names, found, where):
    folder = tmp_path / "hub" / "models--me--style" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    place(folder, *names)
    if where == "Hub":
        monkeypatch.setattr(lora_files, "HfApi", lambda: types.SimpleNamespace(list_repo_files=lambda repo: names))
        monkeypatch.setattr(lora_files, "hf_hub_download", lambda repo, name: folder / name)
    elif where == "cache":
        monkeypatch.setattr(lora_files, "HfApi", unreachable)
        monkeypatch.setattr(lora_files, "snapshot_download", lambda repo, local_files_only: folder)
        monkeypatch.setattr(lora_files, "hf_hub_download", lambda repo, name: folder / name)
    path = str(folder) if where == "folder" else "me/style"
    if found in names:
        assert lora_files.locate(path) == folder / found
        if where != "folder":
            assert lora_files.locate(f"me/style/{names[-1]}" if names[-1].endswith("s") else path).parent == folder
    else:
        with pytest.raises(RecipeError, match=f"(?s){found}"):
            lora_files.locate(path)


def unreachable():
    raise ConnectionError("no network")


def test_the_config_is_fetched_with_the_weights(tmp_path, monkeypatch):
    fetched = []
    names = ["a/adapter_config.json", "a/adapter_model.safetensors", "adapter_config.json", "x.safetensors"]
    monkeypatch.setattr(lora_files, "HfApi", lambda: types.SimpleNamespace(list_repo_files=lambda repo: names))
    monkeypatch.setattr(lora_files, "hf_hub_download",
                        lambda repo, name: fetched.append((repo, name)) or tmp_path / name)
    assert lora_files.locate("me/style/a/adapter_model.safetensors") == tmp_path / "a/adapter_model.safetensors"
    assert fetched == [("me/style", "a/adapter_config.json"), ("me/style", "a/adapter_model.safetensors")]
    with pytest.raises(RecipeError, match=r"(?s)has no y\.safetensors.*x\.safetensors"):
        lora_files.locate("me/style/y.safetensors")


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors", "./a/b", "../a/b", "/a/b", "~/a/b",
                                  "a/b.safetensors",
                                  r"C:\a", "a//b", "a/b/c", "a/b/c/d.txt", "lora.bin", "a/b/c.bin", "",
                                  "~nobody-of-that-name/x"])
def test_a_file_that_is_not_here_is_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(lora_files, "HfApi", None)
    with pytest.raises(RecipeError, match=r"such file|pickled|home"):
        lora_files.locate(path)


# --- a slow reference: every key that could stand in a file, tried one by one ---

def bfl_names(n_double, n_single):
    """Black Forest Labs' name -> [(diffusers' module, share of its rows before, after)]."""
    whole = lambda *modules: [(module, 0, 1) for module in modules]  # noqa: E731
    names = {"img_in": whole("x_embedder"), "txt_in": whole("context_embedder"),
             "final_layer.linear": whole("proj_out"),
             "final_layer.adaLN_modulation.1": [("norm_out.linear", 0.5, 1), ("norm_out.linear", 0, 0.5)]}
    for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        names[f"{ours}.in_layer"] = whole(f"time_text_embed.{theirs}_embedder.linear_1")
        names[f"{ours}.out_layer"] = whole(f"time_text_embed.{theirs}_embedder.linear_2")
    for i in range(n_double):
        t = f"transformer_blocks.{i}"
        for kind, qkv, out, ff, norm, added, n in (
                ("img", [f"to_{x}" for x in "qkv"], "to_out.0", "ff", "norm1", "", 1),
                ("txt", [f"add_{x}_proj" for x in "qkv"], "to_add_out", "ff_context", "norm1_context", "added_", 2)):
            b = f"double_blocks.{i}.{kind}"
            for name in (f"{b}_attn.qkv", f"double_blocks.{i}.processor.qkv_lora{n}"):
                names[name] = whole(*(f"{t}.attn.{x}" for x in qkv))
            for name in (f"{b}_attn.proj", f"double_blocks.{i}.processor.proj_lora{n}"):
                names[name] = whole(f"{t}.attn.{out}")
            names |= {f"{b}_mlp.0": whole(f"{t}.{ff}.net.0.proj"), f"{b}_mlp.2": whole(f"{t}.{ff}.net.2"),
                      f"{b}_mod.lin": whole(f"{t}.{norm}.linear"),
                      f"{b}_attn.norm.query_norm": whole(f"{t}.attn.norm_{added}q"),
                      f"{b}_attn.norm.key_norm": whole(f"{t}.attn.norm_{added}k")}
    for i in range(n_single):
        b, t = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        qkv = [f"{t}.attn.to_{x}" for x in "qkv"]
        names |= {f"{b}.linear1": whole(*qkv, f"{t}.proj_mlp"), f"{b}.processor.qkv_lora": whole(*qkv),
                  f"{b}.linear2": whole(f"{t}.proj_out"), f"{b}.processor.proj_lora": whole(f"{t}.proj_out"),
                  f"{b}.modulation.lin": whole(f"{t}.norm.linear"), f"{b}.norm.query_norm": whole(f"{t}.attn.norm_q"),
                  f"{b}.norm.key_norm": whole(f"{t}.attn.norm_k")}
    return names


@functools.cache
def every_name(names: tuple[tuple[str, int], ...]) -> dict[str, tuple]:
    """Every prefix and name of a module -> the rows it stands for, (component/module, from, to)."""
    rows = dict(names)
    found = {}
    for component, prefixes in (
            ("transformer", ["", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "lora_unet_",
                             "lora_transformer_", "lycoris_"]),
            ("text_encoder", ["text_encoder.", "text_encoders.clip_l.transformer.", "lora_te_", "lora_te1_"]),
            ("text_encoder_2", ["text_encoder_2.", "text_encoders.t5xxl.transformer.", "lora_te2_", "lora_te3_"])):
        inside = [name.partition("/")[2] for name in rows if name.startswith(f"{component}/")]
        inside = {name: [(name, 0, 1)] for name in inside}
        if component == "text_encoder":
            inside |= {f"text_model.{name}": where for name, where in inside.items()}
        if component == "transformer":
            for name in list(inside):
                if ".attn." in name:
                    block, leaf = name.split(".attn.")
                    leaf = "to_out" if leaf == "to_out.0" else leaf
                    inside[f"{block}.attn.processor.{leaf}_lora"] = [(name, 0, 1)]
            inside |= bfl_names(2, 2)
        for name, where in inside.items():
            where = tuple((f"{component}/{module}", int(a * rows[f"{component}/{module}"]),
                           int(b * rows[f"{component}/{module}"]))
                          for module, a, b in where)
            for prefix, spelled in itertools.product(prefixes, {name, name.replace(".", "_")}):
                found[prefix + spelled] = found["base_model.model." + prefix + spelled] = where
    return found


def reference(tensors, base, scale=1.0):
    """The weights that a LoRA leads to, float64 throughout; None if it has to be refused."""
    names = every_name(tuple((name.removesuffix(".weight"), len(value)) for name, value in base.items()
                             if name.endswith(".weight")))
    modules, adapters = {}, {}
    for key, tensor in tensors.items():
        place = None
        for n in range(len(parts := key.split(".")) - 1, 0, -1):
            name, suffix = ".".join(parts[:n]), parts[n:]
            adapter, kind = "", None
            if suffix[0] in ("lora_A", "lora_B", "lora_magnitude_vector") and suffix[-1:] != ["bias"]:
                kind = {"lora_A": "down", "lora_B": "up"}.get(suffix[0], "m")
                middle = suffix[1:-1] if suffix[-1] == "weight" else suffix[1:]
                kind = kind if len(middle) < 2 and (suffix[-1] == "weight" or kind == "m") else None
                adapter = middle[0] if middle else ("" if kind != "m" else None)
            elif suffix[0] == "lora_B" and len(suffix) in (2, 3):
                kind, adapter = "up_bias", suffix[1] if len(suffix) == 3 else ""
            elif (text := ".".join(suffix)) in ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight",
                                                "down.weight"):
                kind = "down"
            elif text in ("lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"):
                kind = "up"
            elif text in ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "weight", "scale") or (
                    text.startswith(("lokr_w", "hada_w"))):
                kind = {"dora_scale": "m", "w_norm": "diff", "b_norm": "diff_b", "scale": "set",
                        "weight": "set"}.get(text, text)
                adapter = None
            if kind and name in names:
                place = names[name]
                break
        if place is None or (kind == "set" and not place[0][0].rpartition(".")[2].startswith("norm_")):
            return None
        if kind in modules.setdefault(place, {}):
            return None
        tensor = tensor if tensor.dim() != 4 or tensor.shape[2:] != (1, 1) else tensor[:, :, 0, 0]
        if (not tensor.is_floating_point() and kind != "alpha") or not tensor.double().isfinite().all():
            return None
        modules[place][kind] = tensor.double()
        if adapter is not None:
            adapters.setdefault(place, set()).add(adapter)
    touched = [row for place in modules for module, a, b in place for row in ((module, n) for n in range(a, b))]
    if not modules or len(touched) != len(set(touched)) or any(len(found) > 1 for found in adapters.values()):
        return None
    result = {name: value.double() for name, value in base.items()}
    for place, parts in modules.items():
        weight = torch.cat([result[f"{module}.weight"][a:b] for module, a, b in place])
        bias = [result[f"{module}.bias"][a:b] for module, a, b in place if f"{module}.bias" in result]
        m, alpha, up_bias, diff_b = (parts.pop(kind, None) for kind in ("m", "alpha", "up_bias", "diff_b"))
        if alpha is not None and alpha.numel() != 1:
            return None
        kinds, rank, target = set(parts), None, None
        try:
            if kinds == {"down", "up"}:
                delta, rank = torch.mm(parts["up"], parts["down"]), len(parts["down"])
            elif kinds == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
                one, other = (torch.mm(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
                delta, rank = one * other, len(parts["hada_w1_b"])
                if one.shape != other.shape or rank != len(parts["hada_w2_b"]):
                    return None
            elif kinds and all(kind.startswith("lokr_w") for kind in kinds):
                factors, ranks = [], set()
                for n in (1, 2):
                    if {kind for kind in kinds if f"w{n}" in kind} == {f"lokr_w{n}"}:
                        factors.append(parts[f"lokr_w{n}"])
                    else:
                        factors.append(torch.mm(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"]))
                        ranks.add(len(parts[f"lokr_w{n}_b"]))
                        if f"lokr_w{n}" in kinds:
                            return None
                if len(ranks) > 1:
                    return None
                delta, rank = torch.einsum("ab,cd->acbd", *factors).flatten(2).flatten(0, 1), max(ranks, default=None)
            elif kinds == {"diff"}:
                delta = parts["diff"]
            elif kinds == {"set"}:
                delta = parts["set"] - weight if parts["set"].shape == weight.shape else parts["set"]
            elif kinds or diff_b is None:
                return None
            else:
                delta = torch.zeros_like(weight)
        except (RuntimeError, KeyError, IndexError):
            return None
        if delta.shape != weight.shape or rank == 0:
            return None
        factored = kinds & {"down", "hada_w1_a"} or any(kind.startswith("lokr") for kind in kinds)
        if (not factored and (alpha is not None or m is not None)) or (up_bias is not None and "down" not in kinds) or (
                up_bias is not None and diff_b is not None):
            return None
        strength = alpha.item() / rank if alpha is not None and rank else 1.0
        target = weight + strength * delta
        if m is not None:
            if m.shape not in ((len(weight),), (len(weight), 1), (1, weight.shape[1])):
                return None
            axis = 0 if m.shape == (1, weight.shape[1]) else 1
            target = (m[:, None] if m.dim() == 1 else m) * target / (target**2).sum(axis, keepdim=True).sqrt()
        for kind, new in (("weight", weight + scale * (target - weight)),
                          ("bias", up_bias * strength if up_bias is not None else diff_b)):
            if new is None:
                continue
            if kind == "bias":
                if not bias or new.shape != (sum(map(len, bias)),):
                    return None
                new = torch.cat(bias) + scale * new
            for module, a, b in place:
                result[f"{module}.{kind}"][a:b], new = new[:b - a], new[b - a:]
    return result if all(value.float().isfinite().all() for value in result.values()) else None


def agree(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        other = expected[key].double()
        assert torch.allclose(value.double(), other, rtol=1e-4, atol=1e-5), key


# --- and hundreds of damaged files against it ---

FUZZED = ["alpha", "kohya, double", "BFL, single", "BFL, swapped halves", "x-flux", "DoRA, peft .default",
          "DoRA, LyCORIS", "LoHa",
          "LoKr, both", "LoKr, one factored", "LoKr of stacked rows", "norms", "differences", "bias of stacked rows",
          "CLIP lora_te1_text_model_encoder_layers_0_mlp_fc1", "suffix lora_A.default"]


def mutated(tensors: dict, rng: random.Random) -> dict:
    """One thing changed in a LoRA's tensors."""
    tensors, name = dict(tensors), rng.choice(list(tensors))
    tensor, kind = tensors[name], rng.randrange(12)
    if kind == 0:
        del tensors[name]
    elif kind <= 3:
        del tensors[name]
        swaps = [("blocks.0", "blocks.1"), ("blocks_0", "blocks_7"), ("to_k", "to_q"), ("qkv", "proj"),
                 ("lora_A", "lora_down"),
                 ("lora_B", "lora_A"), ("weight", "bias"), ("lora_", "lore_"), ("transformer.", "unet."),
                 ("img", "txt"),
                 (".default", ".other"), ("diffusion_model", "model.diffusion_model"), ("_w1", "_w2"),
                 ("alpha", "alpha2"),
                 ("lora_unet_", "lora_transformer_"), ("dora_scale", "lora_magnitude_vector"),
                 ("", "base_model.model."), ("", " ")]
        rng.shuffle(swaps)
        old, new = next(swap for swap in swaps if swap[0] in name)
        tensors[name.replace(old, new, 1)] = tensor
    elif kind <= 5:
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64,
                                              torch.int32]))
    elif kind <= 8 and tensor.dim():
        tensors[name] = rng.choice([lambda t: t.mT if t.dim() > 1 else t[:, None], lambda t: t.flatten(),
                                    lambda t: t[:-1], lambda t: torch.cat([t, t]),
                                    lambda t: t[None], lambda t: t[:0], lambda t: t.reshape(-1, 1),
                                    lambda t: t[..., None, None]])(tensor if tensor.dim() < 3 else tensor.flatten())
    elif kind == 9 and tensor.numel():
        tensors[name] = tensor.clone().float()
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, 1e30, 0.0])
    else:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return tensors


def outcome(models, path):
    """The merged weights, or None where a RecipeError says why not; nothing else may come."""
    base = weights(models)
    try:
        merge(models, path)
        return weights(models)
    except RecipeError as error:
        assert str(error).startswith("--lora ") and "\n" not in str(error)
        agree(weights(models), base)
        return None


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_tensors_end_right_or_in_a_paragraph(models, tmp_path, name):
    rng, base, fits = random.Random(name), weights(models), 0
    tensors = FORMATS[name](base)[0]
    for _ in range(12):
        damaged = mutated(tensors, rng)
        expected = reference(damaged, base)
        found = outcome(models, save(tmp_path, damaged))
        assert (found is None) == (expected is None), damaged.keys() ^ tensors.keys()
        if found is not None:
            agree(found, expected)
            fits += 1
        restore(models, base)


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_bytes_end_right_or_in_a_paragraph(models, tmp_path, name):
    rng, base = random.Random(name), weights(models)
    path = save(tmp_path, FORMATS[name](base)[0])
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
        found = outcome(models, path)
        if found is not None:
            agree(found, reference(load_file(path), base))
            restore(models, base)


def restore(models, base):
    for component in COMPONENTS:
        getattr(models, component).load_state_dict(
            {name.partition("/")[2]: value for name, value in base.items() if name.startswith(f"{component}/")},
            strict=False)


# --- in the recipe ---

@pytest.fixture
def plain(make_args):
    """tiny-flux without a LoRA, loaded anew."""
    return lambda: pipeline_utils.load_pipeline(make_args("--ckpt", "tiny-flux", "--disable_bf16"))


def test_several_loras_are_their_sum(make_args, tmp_path, plain, capsys):
    base = weights(plain())
    width = len(base[K0])
    paths, total = [], 0
    for n, scale in enumerate((0.5, -1.0)):
        tensors, delta = pair("transformer.transformer_blocks.0.attn.to_k", width, width)
        (tmp_path / str(n)).mkdir()
        extra = pair("transformer.transformer_blocks.99.attn.to_k")[0] if n else {}
        paths += ["--lora", f"{save(tmp_path / str(n), tensors | extra)}:{scale}"]
        total = total + scale * delta
    with pytest.raises(RecipeError, match="--lora_partial"):
        pipeline_utils.load_pipeline(make_args("--ckpt", "tiny-flux", "--disable_bf16", *paths))
    pipeline = pipeline_utils.load_pipeline(make_args("--ckpt", "tiny-flux", "--disable_bf16", *paths,
                                                      "--lora_partial"))
    agree(weights(pipeline), base | {K0: base[K0] + total})
    assert "2 of 4 tensors" in capsys.readouterr().err  # although --quiet


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-flux-dev", "tiny-kontext"])
def test_shapes_from_configs_are_those_of_the_weights(build, name):
    pipeline = build(name)
    found = model_shapes(configs_of(pipeline))
    assert {component: found[component] for component in COMPONENTS} == shapes(pipeline)
