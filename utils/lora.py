"""Merges LoRAs into the weights before the other techniques. A merged LoRA costs no time per step and works with fused
projections and float8.

If a tensor of the file has no place in the model, an error names it. diffusers' loader drops unknown tensors silently.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open

from utils.common import RecipeError, reading
from utils.lora_files import CONFIG, contents, locate, split
from utils.lora_names import Rows, find, looks_like, spellings
from utils.safetensors_header import Tensor, read_header

_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"  # peft's name of the LoRA, "default" or any other
SUFFIXES = {kind: re.compile(rf"(?P<name>.+?)\.{suffix}") for kind, suffix in {
    "down": rf"(?:lora_A{_ADAPTER}|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight",
    "up": rf"(?:lora_B{_ADAPTER}|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight",
    "up_bias": rf"lora_B{_ADAPTER}\.bias",
    "alpha": r"alpha",
    "magnitude": r"(?:dora_scale|lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?)",
    **{kind: kind for kind in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                               "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "diff": r"(?:diff|w_norm)",
    "diff_b": r"(?:diff_b|b_norm)",
    "convolution": r"(?:lora_mid\.weight|lokr_t2|hada_t1|hada_t2)",
    "full": r"(?:weight|scale|bias)",
}.items()}
METHODS = {"LoRA": {"down", "up"}, "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
           "LoKr": {kind for kind in SUFFIXES if kind.startswith("lokr")}, "difference": {"diff"}, "norm": {"norm"}}
Q_K_NORMS = re.compile(r".*\.attn\.norm_(added_)?[qk]")
CURE = "Download it again, or give another file."
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass
class Change:
    """A LoRA's change of the weight and the bias of one module, or of several modules that the trainer stacks."""
    component: str
    rows: tuple[Rows, ...]
    name: str  # the module's name in the file, without the component
    keys: dict[str, str] = field(default_factory=dict)  # the file's keys by kind, see SUFFIXES
    adapters: set[str] = field(default_factory=set)
    method: str | None = None  # of METHODS
    rank: int | None = None
    alpha: float | None = None  # from the file's metadata or adapter_config.json
    rank_stabilised: bool = False


@dataclass
class Lora:
    """A LoRA and its changes of the model; see `read_lora`."""
    name: str  # the --lora argument without the scale
    scale: float
    path: Path
    changes: list[Change]
    left_out: str  # one sentence on the tensors that --lora_partial leaves out; "" without such tensors
    sha256: str | None = None  # see `digest`; None before its first call
    changed: bool | None = None  # whether the merge changed any weight; None before the merge

    def digest(self) -> str:
        """The SHA-256 of the contents (`utils.lora_files.contents`). The files are hashed at the first call alone."""
        self.sha256 = self.sha256 or contents(self.path)
        return self.sha256

    def without(self, component: str) -> "Lora":
        """This LoRA without its changes of one component, such as "transformer"."""
        return replace(self, changes=[change for change in self.changes if change.component != component])


def read_loras(specs: list[str] | None, shapes: dict[str, dict[str, tuple]], partial: bool) -> list[Lora]:
    """Calls `read_lora` for each PATH[:SCALE]. Prints the tensors that --lora_partial leaves out to stderr."""
    loras = [read_lora(spec, shapes, partial) for spec in specs or ()]
    for lora in loras:
        if lora.left_out:
            print(f"--lora {lora.name}: {lora.left_out}", file=sys.stderr, flush=True)
    return loras


def merge_loras(pipeline, loras: list[Lora], device: torch.device, quiet: bool) -> None:
    """Calls `merge_lora` for each LoRA and prints its summary to stderr.

    With `quiet` it prints only LoRAs that changed no weight.
    """
    for lora in loras:
        line = merge_lora(pipeline, lora, device)
        if not quiet or not lora.changed:
            print(f"--lora {lora.name}: {line}", file=sys.stderr, flush=True)


def read_lora(spec: str, shapes: dict[str, dict[str, tuple]], partial: bool = False) -> Lora:
    """Reads from a LoRA's header which weights it changes, before any weights load.

    Args:
        spec: PATH[:SCALE] of --lora.
        shapes: the shape of each parameter by name, for "transformer", "text_encoder" and "text_encoder_2".
        partial: whether to leave out tensors that do not fit, instead of an error.

    Raises:
        RecipeError: the file is unavailable, damaged, ambiguous or of another model, or (unless `partial`) some of its
            tensors do not fit.
    """
    given, scale = split(spec)
    path = locate(given)
    here = f"--lora {given}"
    with reading(here, CURE):
        header, metadata = read_header(path)
        changes, unused = _sort(here, header, shapes)
        configs = _configs(path, metadata)
        for change in changes:
            unused |= _check(change, header, shapes[change.component], configs.get(change.component, {}))
    if not header:
        raise RecipeError(f"{here} holds no tensors.")
    _refuse_control(here, changes, header, shapes)
    changes = [change for change in changes if not unused.keys() & set(change.keys.values())]
    _refuse_overlap(here, changes)
    names = list(unused)
    listed = ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
    reason = next((f" ({why})" for why in unused.values() if why), "")
    if not changes:
        raise RecipeError(f"{here}: none of its {len(header)} tensors belongs to this model"
                          f"{looks_like(names, metadata)}; not used: {listed}{reason}. Give a LoRA for FLUX.1.")
    left_out = f"{len(header) - len(names)} of {len(header)} tensors fit; not used: {listed}{reason}." if names else ""
    if left_out and not partial:
        raise RecipeError(f"{here}: {left_out} Add --lora_partial to merge only the tensors that fit.")
    return Lora(given, scale, path, changes, left_out)


def merge_lora(pipeline, lora: Lora, device: torch.device) -> str:
    """Adds a LoRA to the weights, in float32 on `device`, rounded once. Sets `lora.sha256` and `lora.changed`.

    The weights may be on another device. They come out the same wherever they are.

    Returns:
        A summary in one line.

    Raises:
        RecipeError: a tensor of the LoRA or a changed weight is not finite. The weights are unchanged then.
    """
    strengths, modules, differs = set(), 0, []
    with reading(f"--lora {lora.name}", CURE), torch.no_grad(), safe_open(lora.path, framework="pt") as file:
        lora.digest()
        for write in (False, True):  # check every weight, then write: a copy of the old weights would not fit in memory
            flags = []
            for change in lora.changes:
                parameter = getattr(pipeline, change.component).get_parameter
                factors, strength = factors_of(change, file, device)
                if not write:
                    flags += not_finite(lora, change, factors)
                    modules += len({rows.module for rows in change.rows})
                    strengths |= {strength} if change.rank else set()
                for parts, new in merged(change, factors, strength, lora.scale, parameter):
                    if write:
                        differs.append((new != torch.cat(parts).to(device)).any())
                        write_rows(parts, new)
                    else:
                        flags.append(overflow(lora, change, new))
            refuse_first(flags)
    text = f"{modules} module{'s' * (modules != 1)} at scale {lora.scale:g}"
    if strengths:
        low, high = min(strengths), max(strengths)
        text += f", alpha / rank {low:g}" + (f" to {high:g}" if high > low else "")
    lora.changed = bool(torch.stack(differs).any())
    return text if lora.changed else f"{text}; no weight has changed: every difference is zero or rounds to zero"


# --- keys and shapes ---

def _sort(here: str, header: dict[str, Tensor], shapes: dict) -> tuple[list[Change], dict[str, str]]:
    """Returns the changes of a file, one for each module, and {unknown key: reason}, where the reason may be ""."""
    known = {component: spellings(component, of) for component, of in shapes.items()}
    changes, unused = {}, {}
    for key in header:
        kind, match, found = next(
            ((kind, match, found) for kind, pattern in SUFFIXES.items() if (match := pattern.fullmatch(key))
             and (found := find(match["name"], known))), (None, None, None))
        if not found:
            unused[key] = ""
            continue
        component, name, rows = found
        if kind == "full" and Q_K_NORMS.fullmatch(rows[0].module) and not key.endswith(".bias"):
            kind = "norm"
        change = changes.setdefault((component, rows), Change(component, rows, name))
        if kind in change.keys:
            raise RecipeError(f"{here}: {change.keys[kind]} and {key} change the same weight. Keep only one of the two "
                              "in the file.")
        change.keys[kind] = key
        if kind in ("down", "up", "up_bias") or match.groupdict().get("adapter"):
            change.adapters.add(match.groupdict().get("adapter") or "")
    return list(changes.values()), unused


def _check(change: Change, header: dict[str, Tensor], shapes: dict[str, tuple], config: dict) -> dict[str, str]:
    """Sets the method, rank and alpha of a change. Returns {key: reason} if the change does not fit, else {}."""
    keys, has = change.keys, set(change.keys)
    shape = {kind: _squeezed_shape(header[key].shape) for kind, key in keys.items()}
    weight = [shapes[f"{rows.module}.weight"] for rows in change.rows]
    height = sum(rows.stop - rows.start for rows in change.rows)

    def refused(why: str, but: set = frozenset()) -> dict[str, str]:
        return dict.fromkeys([key for kind, key in keys.items() if kind not in but], why)

    if "convolution" in has:
        return refused(f"{keys['convolution']} changes a convolution; FLUX.1's transformer and encoders have none")
    if "full" in has:
        return refused(f"{keys['full']} is a full weight, as in a fine-tuned checkpoint (--ckpt), not a change")
    if len(change.adapters) > 1:
        return refused(f"{change.name} has tensors of several LoRAs: {sorted(change.adapters)}")
    if any(header[key].dtype not in FLOATS and kind != "alpha" for kind, key in keys.items()):
        key = next(key for kind, key in keys.items() if header[key].dtype not in FLOATS and kind != "alpha")
        return refused(f"{key} holds {header[key].dtype}, not floating-point numbers")
    methods = [method for method, kinds in METHODS.items() if has & kinds]
    if len(methods) > 1:
        return refused(f"{change.name} mixes {' and '.join(methods)}")
    change.method = methods[0] if methods else None
    missing = _missing(change.method, keys)
    if missing:
        return refused(f"{change.name} lacks {missing}")
    # An alpha or a magnitude scales a product of factors, so that it needs one.
    factored = change.method in ("LoRA", "LoHa", "LoKr")
    alone = {"alpha", "magnitude"} if not factored else set()
    alone |= {"up_bias"} if change.method != "LoRA" else set()
    if has & alone:
        return refused(f"{keys[min(has & alone)]} has no LoRA factors that it would scale")

    if change.method:
        try:
            change.rank, found = _product(change.method, shape)
        except ValueError as error:
            return refused(f"{change.name}: {error}")
        expected = (height, *weight[0][1:])
        if found != expected or any(one[1:] != weight[0][1:] for one in weight):
            return refused(f"{change.name} is {list(expected)} in the model and {list(found)} in the file")
    if "magnitude" in has and shape["magnitude"] not in ((height,), (height, 1), (1, weight[0][-1])):
        return refused(f"{keys['magnitude']} is {list(shape['magnitude'])}, which does not fit a weight of "
                       f"{list(expected)}")
    if math.prod(shape.get("alpha", ())) != 1:
        return refused(f"{keys['alpha']} is {list(shape['alpha'])}, not a single number")
    for kind in {"up_bias", "diff_b"} & has:
        if any(f"{rows.module}.bias" not in shapes for rows in change.rows) or shape[kind] != (height,):
            return refused(f"{keys[kind]} does not fit the bias of {change.name}, or {change.name} has no bias")
    if {"up_bias", "diff_b"} <= has:
        return refused(f"{change.name} has two changes of one bias")
    if config and change.method == "LoRA":
        if config.get("use_dora") and "magnitude" not in has:
            return refused(f"{change.name} lacks the magnitudes of a DoRA")
        if "alpha" not in has:
            change.alpha, rank = _of_module(config, "lora_alpha", change.name), _of_module(config, "r", change.name)
            change.rank_stabilised = bool(config.get("use_rslora"))
            if rank != change.rank:
                return refused(f"{change.name} has rank {change.rank}, and rank {rank} in the adapter config")
    return {}


def _missing(method: str | None, keys: dict[str, str]) -> str:
    """Names the keys that a method needs and the file lacks; "" if it has all."""
    if method == "LoRA" and not METHODS[method] <= keys.keys():
        other = {"lora_A": "lora_B", "lora_B": "lora_A", "down": "up", "up": "down"}
        return re.sub(r"(?<=[._])(lora_[AB]|down|up)(?=(\.[^.]+)?\.weight$)", lambda half: other[half[0]],
                      keys["down" if "down" in keys else "up"])
    if method == "LoHa":
        return ", ".join(sorted(METHODS[method] - keys.keys()))
    if method == "LoKr":
        for factor in ("lokr_w1", "lokr_w2"):
            halves = {f"{factor}_a", f"{factor}_b"} & keys.keys()
            if len(halves) + 2 * (factor in keys) != 2:
                return f"{factor}, or both {factor}_a and {factor}_b"
    return ""


def _product(method: str, shape: dict[str, tuple]) -> tuple[int | None, tuple]:
    """Returns the rank, and the shape of the change, from the shapes of its factors.

    Args:
        method: of METHODS.
        shape: the shape of each tensor, by kind.

    Raises:
        ValueError: the factors cannot be multiplied.
    """
    def times(a: str, b: str) -> tuple[int, tuple]:
        if len(shape[a]) != 2 or len(shape[b]) != 2 or shape[a][1] != shape[b][0] or not shape[b][0]:
            raise ValueError(f"{list(shape[a])} times {list(shape[b])} is not a matrix product")
        return shape[b][0], (shape[a][0], shape[b][1])

    if method == "LoRA":
        return times("up", "down")
    if method == "LoHa":
        one, other = times("hada_w1_a", "hada_w1_b"), times("hada_w2_a", "hada_w2_b")
        if one != other:
            raise ValueError(f"its factors multiply to {list(one[1])} with rank {one[0]} and to {list(other[1])} with "
                             f"rank {other[0]}")
        return one
    if method == "LoKr":
        one, other = ((None, shape[w]) if w in shape else times(f"{w}_a", f"{w}_b") for w in ("lokr_w1", "lokr_w2"))
        if len(one[1]) != 2 or len(other[1]) != 2 or (one[0] and other[0] and one[0] != other[0]):
            raise ValueError(f"its factors are {list(one[1])} with rank {one[0]} and {list(other[1])} with rank "
                             f"{other[0]}")
        return one[0] or other[0], (one[1][0] * other[1][0], one[1][1] * other[1][1])
    return None, shape["diff" if method == "difference" else "norm"]


def _configs(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Returns peft's config for each component, or {} without a config.

    The config is in the file's metadata (diffusers writes it there), or in adapter_config.json in the same folder.

    Raises:
        ValueError: the config is damaged, or it describes an unsupported adapter.
    """
    components = ("transformer", "text_encoder", "text_encoder_2")
    if "lora_adapter_metadata" in metadata:
        config = _object("its metadata", metadata["lora_adapter_metadata"])
        configs = {component: {name.removeprefix(f"{component}."): value for name, value in config.items()
                               if name.startswith(f"{component}.")} for component in components}
    elif (path.parent / CONFIG).is_file():
        configs = dict.fromkeys(components, _object(CONFIG, (path.parent / CONFIG).read_text(encoding="utf-8")))
    else:
        return {}
    for config in configs.values():
        if config.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"its adapter config has the peft_type {config['peft_type']}, which is not supported")
        if config.get("fan_in_fan_out"):
            raise ValueError("its adapter config sets fan_in_fan_out, which no layer of FLUX.1 has")
        if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq")):
            raise ValueError(f"its training started from weights that {config['init_lora_weights']} had changed: "
                             "convert it to a plain LoRA with peft first")
    return configs


def _object(where: str, text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object")
    return found


def _of_module(config: dict, name: str, module: str) -> float:
    """Returns lora_alpha or r of a module, as peft resolves them.

    The first pattern of alpha_pattern or rank_pattern that matches the end of the module's name wins.

    Args:
        config: peft's, of the module's component.
        name: "lora_alpha" or "r".
        module: the module's name.

    Raises:
        ValueError: the value is absent or not a finite number.
    """
    patterns = config.get({"lora_alpha": "alpha_pattern", "r": "rank_pattern"}[name]) or {}
    value = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
                 config.get(name))
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"its adapter config has {name} {value!r} for {module}")
    return value


def _refuse_control(here: str, changes: list[Change], header: dict[str, Tensor], shapes: dict) -> None:
    for change in changes:
        if change.component == "transformer" and change.rows[0].module == "x_embedder" and "down" in change.keys:
            width = header[change.keys["down"]].shape[1:2]
            if width != shapes["transformer"]["x_embedder.weight"][1:]:
                raise RecipeError(f"{here} needs a control image: its {change.name} reads {width and width[0]} "
                                  "channels. Such LoRAs are for FluxControlPipeline, which this recipe does not "
                                  "support. Give a LoRA for FluxPipeline or FluxKontextPipeline.")


def _refuse_overlap(here: str, changes: list[Change]) -> None:
    taken = {}
    for change in changes:
        for rows in change.rows:
            for other, start, stop in taken.setdefault((change.component, rows.module), []):
                if rows.start < stop and start < rows.stop:
                    raise RecipeError(f"{here}: {other} and {change.name} name the same weight. Keep only one of the "
                                      "two in the file.")
            taken[change.component, rows.module].append((change.name, rows.start, rows.stop))


# --- merging ---

def factors_of(change: Change, file, device: torch.device) -> tuple[dict[str, torch.Tensor], float]:
    """A change's tensors by kind, in the file's dtype on `device`, and its strength.

    Args:
        file: the LoRA's, from `safe_open`.
    """
    factors = {kind: _squeezed(file.get_tensor(key)) for kind, key in change.keys.items()}
    strength = _strength(change, factors)  # from the CPU's alpha: a GPU's would have to be waited for
    return {kind: tensor.to(device) for kind, tensor in factors.items()}, strength


def merged(change: Change, factors: dict, strength: float, scale: float, parameter: Callable[[str], torch.Tensor]
           ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Computes a change's weight and bias, each if it changes, on the factors' device.

    Args:
        factors, strength: from `factors_of`.
        scale: of --lora PATH:SCALE.
        parameter: returns a parameter of the change's component by its name.

    Yields:
        The rows of the parameters that change, as views, and the merged values of all rows in the parameters' dtype.
    """
    factors = {kind: tensor.float() for kind, tensor in factors.items()}
    device = next(iter(factors.values())).device
    for kind, merge in (("weight", _weight), ("bias", _bias)):
        if _changes(change, kind):
            parts = [parameter(f"{rows.module}.{kind}").data[rows.start:rows.stop] for rows in change.rows]
            old = torch.cat(parts).to(device).float()
            yield parts, merge(old, change, factors, strength, scale).to(parts[0].dtype)


def write_rows(parts: list[torch.Tensor], new: torch.Tensor) -> None:
    """Writes the values that `merged` yields into their rows."""
    for part, rows in zip(parts, new.split([len(part) for part in parts]), strict=True):
        part.copy_(rows)


def not_finite(lora: Lora, change: Change, factors: dict) -> list[tuple[str, torch.Tensor]]:
    """For `refuse_first`: whether the tensors of a change are finite."""
    return [(f"--lora {lora.name}: {change.keys[kind]} holds NaN or infinity: the training of this LoRA failed, or the "
             "file is damaged. Give another file.", tensor.float().isfinite().all())
            for kind, tensor in factors.items()]


def overflow(lora: Lora, change: Change, new: torch.Tensor) -> tuple[str, torch.Tensor]:
    """For `refuse_first`: whether a merged weight is finite."""
    return (f"--lora {lora.name}: the merged weight {change.name} is not finite in {new.dtype}. Give a smaller :SCALE, "
            "or another file.", new.isfinite().all())


def refuse_first(flags: list[tuple[str, torch.Tensor]]) -> None:
    """Raises the error of the first flag that is False. All flags, of one device, are waited for once.

    Raises:
        RecipeError: a flag is False.
    """
    found = torch.stack([flag for _, flag in flags]).tolist() if flags else []
    for (error, _), is_finite in zip(flags, found, strict=True):
        if not is_finite:
            raise RecipeError(error)


def _changes(change: Change, kind: str) -> bool:
    return bool(change.method) if kind == "weight" else bool({"up_bias", "diff_b"} & change.keys.keys())


def _squeezed_shape(shape: tuple) -> tuple:
    """Drops the last two dimensions of a Linear that was trained as a 1x1 convolution."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _squeezed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(_squeezed_shape(tuple(tensor.shape)))


def _strength(change: Change, factors: dict[str, torch.Tensor]) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) if rank-stabilised. Without an alpha it is 1.

    LyCORIS ignores alpha for a LoKr with two full factors, which has no rank: its strength is 1 as well.
    """
    if change.rank is None:
        return 1.0
    alpha = factors["alpha"].float().item() if "alpha" in factors else change.alpha
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(change.rank) if change.rank_stabilised else change.rank)


def _weight(old: torch.Tensor, change: Change, factors: dict, strength: float, scale: float) -> torch.Tensor:
    """Returns the merged weight (rows, columns) in float32, or (channels,) for a norm.

    LoRA: W + s B A (arXiv 2106.09685). LoHa: W + s (A1 B1) * (A2 B2) (2108.06098). LoKr: W + s W1 (x) W2 (2309.14859).
    DoRA has magnitudes m: m V / ||V|| with V = W + s B A (2402.09353). The norm runs over the inputs if m is a column,
    and over the outputs if m is a row. A norm's weight in the file replaces the model's at scale 1.

    Args:
        old: the model's weight, float32.
        factors: the LoRA's tensors by kind, float32.
        strength: s, from `_strength`.
        scale: of --lora PATH:SCALE.
    """
    if change.method == "norm":
        return torch.lerp(old, factors["norm"], scale)
    if change.method == "difference":
        delta = factors["diff"]
    elif change.method == "LoRA":
        delta = strength * (factors["up"] @ factors["down"])
    elif change.method == "LoHa":
        delta = strength * (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    else:
        one, other = (factors[w] if w in factors else factors[f"{w}_a"] @ factors[f"{w}_b"]
                      for w in ("lokr_w1", "lokr_w2"))
        delta = strength * torch.kron(one, other)
    if "magnitude" in factors:
        magnitude = factors["magnitude"]
        magnitude = magnitude[:, None] if magnitude.dim() == 1 else magnitude
        whole = old + delta
        axis = 1 if magnitude.shape[0] == len(whole) else 0
        norm = torch.linalg.vector_norm(whole, dim=axis, keepdim=True, dtype=torch.float64).float()  # squares overflow
        delta = magnitude * (whole / norm.clamp_min(torch.finfo(norm.dtype).tiny)) - old
    return old + scale * delta


def _bias(old: torch.Tensor, change: Change, factors: dict, strength: float, scale: float) -> torch.Tensor:
    delta = strength * factors["up_bias"] if "up_bias" in factors else factors["diff_b"]
    return old + scale * delta
