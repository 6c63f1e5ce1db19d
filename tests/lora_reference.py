"""A slow reference for LoRAs: every name that a file could hold, float64 throughout, and no tensor may be left over."""

import functools
import itertools

import torch

ENDINGS = {
    **{f"{before}{half}.weight": half for before in ("", "lora_", "lora.", "lora_linear_layer.")
       for half in ("down", "up")},
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "up_bias", "alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b", "weight": "set", "scale": "set",
    **{name: name for n in (1, 2) for name in (f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"hada_w{n}_a",
                                               f"hada_w{n}_b")}}


class Refused(Exception):
    """The file has to be refused."""


def need(condition):
    if not condition:
        raise Refused


def reference(tensors, base, scale=1.0) -> dict[str, torch.Tensor] | None:
    """The weights that a LoRA leads to, by component/parameter, in float64; None if the file has to be refused."""
    try:
        return _merged(tensors, base, scale)
    except (Refused, RuntimeError, KeyError, IndexError):  # shapes that do not multiply, factors that are not there
        return None


def _merged(tensors, base, scale):
    result = {name: value.double() for name, value in base.items()}
    for place, parts in _by_place(tensors, base).items():
        weight = torch.cat([result[f"{module}.weight"][a:b] for module, a, b in place])
        biases = [result[f"{module}.bias"][a:b] for module, a, b in place if f"{module}.bias" in result]
        m, alpha, up_bias, diff_b = (parts.pop(kind, None) for kind in ("magnitude", "alpha", "up_bias", "diff_b"))
        need(parts or diff_b is not None)
        delta, rank = _delta(parts, weight) if parts else (torch.zeros_like(weight), None)
        need(delta.shape == weight.shape and rank != 0 and (alpha is None or alpha.numel() == 1))
        need(parts.keys() & {"down", "hada_w1_a", "lokr_w1", "lokr_w1_a"} or (alpha is None and m is None))
        need(up_bias is None or ("down" in parts and diff_b is None))
        strength = alpha.item() / rank if alpha is not None and rank else 1.0
        target = weight + strength * delta
        if m is not None:
            need(m.shape in ((len(weight),), (len(weight), 1), (1, weight.shape[1])))
            axis = 0 if m.shape == (1, weight.shape[1]) else 1
            target = (m[:, None] if m.dim() == 1 else m) * target / (target**2).sum(axis, keepdim=True).sqrt()
        changed = {"weight": weight + scale * (target - weight)}
        if up_bias is not None or diff_b is not None:
            change = up_bias * strength if up_bias is not None else diff_b
            need(change.shape == (sum(map(len, biases)),) and biases)
            changed["bias"] = torch.cat(biases) + scale * change
        for kind, new in changed.items():
            for module, a, b in place:
                result[f"{module}.{kind}"][a:b], new = new[:b - a], new[b - a:]
    need(all(value.float().isfinite().all() for value in result.values()))
    return result


def _by_place(tensors, base) -> dict[tuple, dict[str, torch.Tensor]]:
    """The tensors of a file by the rows that they change and by kind."""
    names = every_name(tuple((name.removesuffix(".weight"), len(value)) for name, value in base.items()
                             if name.endswith(".weight")))
    places, adapters = {}, {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        found = next(((names[name], *kind) for n in range(len(parts) - 1, 0, -1)
                      if (name := ".".join(parts[:n])) in names and (kind := _kind_of(parts[n:]))), None)
        need(found)
        place, kind, adapter = found
        need(kind != "set" or place[0][0].rpartition(".")[2].startswith("norm_"))
        need(kind not in places.setdefault(place, {}))
        need((tensor.is_floating_point() or kind == "alpha") and tensor.double().isfinite().all())
        places[place][kind] = (tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor).double()
        if adapter or kind in ("down", "up", "up_bias"):
            adapters.setdefault(place, set()).add(adapter)
    rows = [(module, row) for place in places for module, a, b in place for row in range(a, b)]
    need(places and len(rows) == len(set(rows)) and all(len(several) == 1 for several in adapters.values()))
    return places


def _kind_of(ending: list[str]) -> tuple[str, str] | None:
    """The kind of a tensor by the end of its key, and peft's name of the LoRA, "" if it has none."""
    adapter = ""
    if ".".join(ending) not in ENDINGS and ending[0] in ("lora_A", "lora_B", "lora_magnitude_vector"):
        adapter, ending = ending[1] if len(ending) > 1 else "", ending[:1] + ending[2:]
    kind = ENDINGS.get(".".join(ending))
    return kind and (kind, adapter)


def _delta(parts, weight) -> tuple[torch.Tensor, int | None]:
    """The change of a weight before alpha, and its rank."""
    kinds = set(parts)
    if kinds == {"down", "up"}:
        return torch.mm(parts["up"], parts["down"]), len(parts["down"])
    if kinds == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        one, other = (torch.mm(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        need(one.shape == other.shape and len(parts["hada_w1_b"]) == len(parts["hada_w2_b"]))
        return one * other, len(parts["hada_w1_b"])
    if all(kind.startswith("lokr_w") for kind in kinds):
        factors, ranks = [], set()
        for w in ("lokr_w1", "lokr_w2"):
            if w in kinds:
                need(not {f"{w}_a", f"{w}_b"} & kinds)
                factors.append(parts[w])
            else:
                factors.append(torch.mm(parts[f"{w}_a"], parts[f"{w}_b"]))
                ranks.add(len(parts[f"{w}_b"]))
        need(len(ranks) < 2)
        return torch.einsum("ab,cd->acbd", *factors).flatten(2).flatten(0, 1), max(ranks, default=None)
    need(kinds in ({"diff"}, {"set"}))
    new = parts.get("diff", parts.get("set"))
    return (new - weight if kinds == {"set"} and new.shape == weight.shape else new), None


@functools.cache
def every_name(rows: tuple[tuple[str, int], ...]) -> dict[str, tuple]:
    """Every prefix and name of a module -> the rows it stands for, (component/module, from, to)."""
    rows, found = dict(rows), {}
    for component, prefixes in (
            ("transformer", ["", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "lora_unet_",
                             "lora_transformer_", "lycoris_"]),
            ("text_encoder", ["text_encoder.", "text_encoders.clip_l.transformer.", "lora_te_", "lora_te1_"]),
            ("text_encoder_2", ["text_encoder_2.", "text_encoders.t5xxl.transformer.", "lora_te2_", "lora_te3_"])):
        inside = {module: [(module, 0, 1)] for module in (
            name.partition("/")[2] for name in rows if name.startswith(f"{component}/"))}
        if component == "text_encoder":
            inside |= {f"text_model.{name}": where for name, where in inside.items()}
        if component == "transformer":
            for name in list(inside):
                block, attn, leaf = name.partition(".attn.")
                if attn:
                    inside[f"{block}.attn.processor.{leaf.removesuffix('.0')}_lora"] = [(name, 0, 1)]
            inside |= bfl_names(2, 2)
        for name, where in inside.items():
            where = tuple((f"{component}/{module}", *(int(share * rows[f"{component}/{module}"]) for share in shares))
                          for module, *shares in where)
            for prefix, spelled in itertools.product(prefixes, {name, name.replace(".", "_")}):
                found[prefix + spelled] = found["base_model.model." + prefix + spelled] = where
    return found


def bfl_names(n_double, n_single) -> dict[str, list]:
    """Black Forest Labs' name -> [(diffusers' module, share of its rows before, after)]."""
    def whole(*modules):
        return [(module, 0, 1) for module in modules]

    names = {"img_in": whole("x_embedder"), "txt_in": whole("context_embedder"),
             "final_layer.linear": whole("proj_out"),
             "final_layer.adaLN_modulation.1": [("norm_out.linear", 0.5, 1), ("norm_out.linear", 0, 0.5)]}
    for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        names[f"{ours}.in_layer"] = whole(f"time_text_embed.{theirs}_embedder.linear_1")
        names[f"{ours}.out_layer"] = whole(f"time_text_embed.{theirs}_embedder.linear_2")
    for i in range(n_double):
        t, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for kind, qkv, out, ff, norm, added, n in (
                ("img", [f"to_{x}" for x in "qkv"], "to_out.0", "ff", "norm1", "", 1),
                ("txt", [f"add_{x}_proj" for x in "qkv"], "to_add_out", "ff_context", "norm1_context", "added_", 2)):
            for name in (f"{b}.{kind}_attn.qkv", f"{b}.processor.qkv_lora{n}"):
                names[name] = whole(*(f"{t}.attn.{x}" for x in qkv))
            for name in (f"{b}.{kind}_attn.proj", f"{b}.processor.proj_lora{n}"):
                names[name] = whole(f"{t}.attn.{out}")
            names |= {f"{b}.{kind}_mlp.0": whole(f"{t}.{ff}.net.0.proj"),
                      f"{b}.{kind}_mlp.2": whole(f"{t}.{ff}.net.2"),
                      f"{b}.{kind}_mod.lin": whole(f"{t}.{norm}.linear"),
                      f"{b}.{kind}_attn.norm.query_norm": whole(f"{t}.attn.norm_{added}q"),
                      f"{b}.{kind}_attn.norm.key_norm": whole(f"{t}.attn.norm_{added}k")}
    for i in range(n_single):
        b, t = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        qkv = [f"{t}.attn.to_{x}" for x in "qkv"]
        names |= {f"{b}.linear1": whole(*qkv, f"{t}.proj_mlp"), f"{b}.processor.qkv_lora": whole(*qkv),
                  f"{b}.linear2": whole(f"{t}.proj_out"), f"{b}.processor.proj_lora": whole(f"{t}.proj_out"),
                  f"{b}.modulation.lin": whole(f"{t}.norm.linear"), f"{b}.norm.query_norm": whole(f"{t}.attn.norm_q"),
                  f"{b}.norm.key_norm": whole(f"{t}.attn.norm_k")}
    return names
