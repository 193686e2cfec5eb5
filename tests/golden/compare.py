# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Does this package compute what the original computed? Compares every stored tensor, loss and gradient.

    python tests/golden/compare.py DIR [--weights DIR2] [--json OUT]

DIR holds `case_*.json` and `case_*.safetensors` (a case may take its inputs from another, `inputs_of`, and store no
gradients); `config.json` and `state_dict*.safetensors` lie there too, or in DIR2.
A case is recognized by what it holds:

    training step         `scalars` and text                 losses, hidden states, both diffusion passes, gradients
    visual tokenizer      `out.vt.*` without text            trunk, pyramid, grid tokens, image tokens
    text generation       `out.<variant>.text_ids`           token ids, logits of each step
    synchronizer          `kwargs` in the JSON               output and all gradients of the module alone
    picture generation    `rng.init_latents`                 latents of each step, pictures
    interleaved loop      initial latents by iteration       token ids and pictures of each iteration

Nothing is computed here: inputs go into the package's public methods, whose arguments and results are watched. Stored
values of the double normalization (`out.decoder.*` beside `fixed.decoder.*`) are not reproduced, on purpose.

Accepted: forward 1e-4 and gradients 1e-3 of the tensor's largest magnitude, losses 1e-5 relative, token ids equal,
8-bit pictures within one level. Exit status 0 only if all pass.
"""

import argparse
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from given_noise import GivenNoiseScheduler
from safetensors.torch import load_file
from torch import nn

from modeling_deem import DeemForConditionalGeneration, DeemImageProcessorPil
from modeling_deem.attention_deem import DeemFeatureSynchronizer
from modeling_deem.image_states_deem import DeemImageStates, is_supervised
from processing.collating_deem import make_labels
from recipes.original.conversion import convert
from recipes.original.names import HEAD_NEW, OFFICIAL, convert_value, rename
from recipes.original.sizes import config_of_weights

TOLERANCE = {"forward": 1e-4, "gradient": 1e-3, "loss": 1e-5, "ids": 0.0, "8 bit": 1.0}
# Spec section 11, quirk 7: the sets whose text without an image the released code does not train on.
DATASETS_TO_IGNORE = ("laion_en", "laion_coco")


@dataclass
class Row:
    """One comparison; `error` is relative to the largest magnitude (ids: places that differ; 8 bit: levels)."""

    case: str
    name: str
    kind: str
    error: float
    passed: bool
    note: str = ""


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def add(self, case: str, name: str, kind: str, error: float, note: str = "") -> None:
        error = math.inf if math.isnan(error) else float(error)
        self.rows.append(Row(case, name, kind, error, error <= TOLERANCE[kind], note))

    def worst(self, kinds: Iterable[str]) -> float:
        return max((row.error for row in self.rows if row.kind in kinds), default=0.0)

    def table(self) -> str:
        """One line per comparison; gradient norms that pass share one line per case."""
        lines, norms = [f"{'case':<26} {'tensor':<88} {'error':>9}  pass"], {}
        for row in self.rows:
            if row.name.startswith("grad_norm ") and row.passed:
                norms.setdefault(row.case, []).append(row)
                continue
            verdict = "yes" if row.passed else "NO"
            lines.append(f"{row.case:<26} {row.name:<88} {row.error:9.2e}  {verdict} {row.note}".rstrip())
        for case, rows in norms.items():
            worst = max(rows, key=lambda row: row.error)
            lines.append(
                f"{case:<26} {f'{len(rows)} gradient norms, worst {worst.name[10:]}':<88} {worst.error:9.2e}  yes"
            )
        return "\n".join(lines)

    def last_line(self) -> str:
        failed = sum(not row.passed for row in self.rows)
        return (
            f"golden: {len(self.rows)} tensors, worst forward {self.worst(('forward', 'loss')):.2e}, "
            f"worst gradient {self.worst(('gradient',)):.2e}, {failed} failed"
        )


class Case:
    """The files of a case; remembers which stored values were looked at."""

    def __init__(self, path: Path, report: Report, folders: list[Path] | None = None):
        self.name, self.report = path.stem.removeprefix("case_"), report
        self.json: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        stored = path.with_suffix(".safetensors")
        self.tensors = load_file(stored) if stored.exists() else {}
        if (other := self.json.get("inputs_of")) is not None:
            self.tensors = self.inputs_of(other, folders or [path.parent]) | self.tensors
        self.seen: set[str] = set()

    @staticmethod
    def inputs_of(name: str, folders: list[Path]) -> dict[str, torch.Tensor]:
        """Inputs, random draws and latents of another case."""
        file = f"case_{name.removeprefix('case_')}.safetensors"
        found = next((folder / file for folder in folders if (folder / file).exists()), None)
        if found is None:
            raise FileNotFoundError(
                f"{file}, whose inputs a case shares, is in none of {', '.join(map(str, folders))}."
            )
        shared = re.compile(r"(in|rng)\..+|(out|fixed)\.(sniffer|decoder)\.latents")
        return {key: tensor for key, tensor in load_file(found).items() if shared.fullmatch(key)}

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def __getitem__(self, key: str) -> torch.Tensor:
        self.seen.add(key)
        return self.tensors[key]

    def get(self, key: str) -> torch.Tensor | None:
        return self[key] if key in self.tensors else None

    def option(self, *names: str, default: Any = None) -> Any:
        """A value of the JSON, wherever it is nested."""
        todo = [self.json]
        while todo:
            level = todo.pop(0)
            for name in names:
                if name in level:
                    return level[name]
            todo += [value for value in level.values() if isinstance(value, dict)]
        return default

    def image(self, key: str) -> torch.Tensor:
        """A stored 8-bit picture as the original's input, [0, 1]."""
        return self[key].float() / 255

    # ---- comparisons ----

    def compare(self, key: str, ours: torch.Tensor | None, kind: str = "forward", rows: torch.Tensor | None = None):
        """Compares with a stored tensor if it exists; `rows` selects positions that count in both."""
        if key not in self.tensors:
            return
        theirs = self[key]
        if ours is None:
            return self.report.add(self.name, key, kind, math.inf, "not computed")
        ours = ours.detach()
        if rows is not None:
            ours, theirs = ours[rows], theirs[rows]
        self.compare_tensors(key, ours, theirs, kind)

    def compare_tensors(self, name: str, ours: torch.Tensor, theirs: torch.Tensor, kind: str = "forward") -> None:
        if ours.shape != theirs.shape and ours.squeeze().shape == theirs.squeeze().shape:
            ours = ours.reshape(theirs.shape)
        if ours.shape != theirs.shape:
            note = f"shape {tuple(ours.shape)}, stored {tuple(theirs.shape)}"
            return self.report.add(self.name, name, kind, math.inf, note)
        if kind == "ids" or not (theirs.is_floating_point() or kind == "8 bit"):
            return self.report.add(self.name, name, "ids", int((ours.long() != theirs.long()).sum()))
        ours, theirs = ours.double(), theirs.double()
        difference = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        scale = 1.0 if kind == "8 bit" or largest == 0 else largest
        self.report.add(self.name, name, kind, difference / scale)

    def compare_loss(self, name: str, ours: torch.Tensor, theirs: float) -> None:
        difference = abs(float(ours.detach()) - theirs)
        self.report.add(self.name, name, "loss", difference / abs(theirs) if theirs else difference)

    def finish(self) -> None:
        """Notes stored outputs that nothing was compared with."""
        stored = [key for key in self.tensors if re.search(r"(^|\.)(out|grad|fixed)\.", key)]
        self.report.unmatched += [f"{self.name}: {key}" for key in stored if key not in self.seen]


# ---- watching the package at work ---------------------------------------------------------------------------------------


@dataclass
class Call:
    arguments: dict[str, Any]
    result: Any


@contextmanager
def watch(owner: nn.Module, *names: str) -> Iterator[dict[str, list[Call]]]:
    """Keeps arguments and results of an object's methods while they are called by others."""
    calls: dict[str, list[Call]] = {name: [] for name in names}

    def keeper(name: str, method: Callable) -> Callable:
        signature = inspect.signature(method)

        def kept(*args, **kwargs):
            result = method(*args, **kwargs)
            calls[name].append(Call(signature.bind(*args, **kwargs).arguments, result))
            return result

        return kept

    for name in names:
        setattr(owner, name, keeper(name, getattr(owner, name)))
    try:
        yield calls
    finally:
        for name in names:
            delattr(owner, name)


@contextmanager
def watch_vision(model: DeemForConditionalGeneration) -> Iterator[dict[str, torch.Tensor]]:
    """Everything of the visual tokenizer by its stored name, from hooks on the parts."""
    seen: dict[str, torch.Tensor] = {}
    tower, handles = model.model.vision_tower, []

    def on(module: nn.Module, keep: Callable[[tuple, Any], dict[str, torch.Tensor]]) -> None:
        handles.append(module.register_forward_hook(lambda _, args, output: seen.update(keep(args, output))))

    for level, projection in enumerate(tower.level_projections):
        on(projection, lambda args, out, level=level: {f"vt.multiscale_raw.{level}": out.permute(0, 3, 1, 2)})
    on(tower.pooled_projection, lambda args, out: {"vt.pooler_output": out})
    on(tower.position_projection, lambda args, out: {"vt.last_hidden_state": args[0]})
    on(tower.output_norm, lambda args, out: {"vt.qformer_inputs_masked": args[0]})
    if tower.region_tokens is not None:
        on(tower.region_tokens, lambda args, out: {"vt.mask_embed": out})
    on(tower, lambda args, out: {"vt.perceiver_inputs": out.grid_tokens})
    on(tower, lambda args, out: {f"vt.multiscale.{i}": level for i, level in enumerate(out.image_features)})
    on(tower, lambda args, out: {"image_embeds": out.image_features[2].flatten(2).transpose(1, 2)})
    on(model.model.perceiver, lambda args, out: {"vt.vis_embed_preproj": out})
    on(model.model.projector, lambda args, out: {"vt.vis_embed": out})
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_all(case: Case, ours: dict[str, torch.Tensor], prefix: str = "out.") -> None:
    for name, tensor in ours.items():
        case.compare(f"{prefix}{name}", tensor)


# ---- the model --------------------------------------------------------------------------------------------------------


class Models:
    """The golden model in the variants that cases need; the latest is kept."""

    def __init__(self, folders: list[Path]):
        def find(name: str, needed: bool = True) -> Path | None:
            found = next((folder / name for folder in folders if (folder / name).exists()), None)
            if found is None and needed:
                raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}.")
            return found

        self.source = json.loads(find("config.json").read_text())
        self.weights = load_file(find("state_dict.safetensors"))
        extra = find("state_dict_maskalign_extra.safetensors", needed=False)
        self.extra = load_file(extra) if extra else {}
        self.key, self.model = None, None

    @property
    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights["visual_tokenizer.clip_mean"], self.weights["visual_tokenizer.clip_std"]

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """[0, 1] -> what our processor gives: normalized with the encoder's mean and std."""
        mean, std = self.mean_std
        return (images - mean) / std

    def get(self, case: Case, side: int | None = None) -> DeemForConditionalGeneration:
        """The model for a case and its input pictures' side."""
        region = bool(case.option("mask_align")) or "mask_align" in case.name or "out.vt.mask_embed" in case
        side = side or self.source["image_size"]
        shrink = [self.source["image_size"] // level for level in self.source["spatial_shapes"]]
        sides = case.option("spatial_shapes", default=[side // factor for factor in shrink])
        key = (region, side, tuple(sides))
        if key != self.key:
            source = {**self.source, "image_size": side, "spatial_shapes": list(sides)}
            weights = self.weights | (self.extra if region else {})
            config = config_of_weights(source, weights, image_decoder_config={"image_loss_reduction": "all"})
            self.model = DeemForConditionalGeneration(config)
            state = convert(weights, {name: tensor.shape for name, tensor in self.model.state_dict().items()}).state
            self.model.load_state_dict(state)
            self.key = key
        self.model.zero_grad(set_to_none=True)
        return self.model


# ---- training step ----------------------------------------------------------------------------------------------------


def per_image(values: torch.Tensor | list | None, counts: torch.Tensor) -> torch.Tensor | None:
    """One value per image: stored flat, or as (B, most images) padded."""
    if values is None:
        return None
    values = torch.as_tensor(values)
    if values.numel() == counts.sum():
        return values.flatten()
    return torch.cat([row.flatten()[:count] for row, count in zip(values, counts.tolist(), strict=True)])


def labels_of(case: Case, source: dict[str, Any]) -> torch.Tensor:
    tokens = source["special_token_dict"]
    ignored = case.option("dataset_to_ignore_noimage_cond_loss", default=DATASETS_TO_IGNORE)
    return make_labels(
        case["in.text_ids"],
        case["in.attention_mask"],
        bos_token_id=tokens["bos_token_id"],
        image_token_id=tokens["image_token_id"],
        start_of_image_token_id=tokens["soi_token_id"],
        pad_token_id=tokens["pad_token_id"],
        prompt_lengths=torch.as_tensor(case.option("ignore_prompt_token_offset", default=0)),
        ignore_text_without_image=case.option("dataset_name") in ignored,
    )


def freeze_as_stored(model: nn.Module, case: Case, source: dict[str, Any]) -> None:
    trained = {rename(name, OFFICIAL) for name in case.option("requires_grad", default=source["requires_grad"])}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


LOSS_PARTS = {"text_loss": "txt", "image_loss": "img", "consistency_loss": "sniffer"}  # ours -> the original's


def loss_weight(case: Case, source: dict[str, Any], part: str) -> float:
    """Weight of a loss: of the case's own `loss_weights`, by any of its names, else of the configuration."""
    names = (f"loss_{part}_weight", f"loss_{part}", part)
    given = case.json.get("loss_weights") or {}
    own = next((given[name] for name in names if name in given), None)
    return case.option(names[0], default=source[names[0]]) if own is None else own


def run_training_step(case: Case, models: Models) -> None:
    model = models.get(case, case["in.image_u8"].shape[-1]).train()
    decoder, source = model.image_decoder, models.source
    freeze_as_stored(model, case, source)
    valid = case["in.attention_mask"].bool()
    targets = case.image("in.image_dec_u8") * 2 - 1
    fixed = "fixed.decoder.latents" in case and "fixed_scalars" in case.json
    image_pass = "fixed.decoder." if fixed else "out.decoder."
    scalars = case.json["fixed_scalars" if fixed else "scalars"]
    weights = {name: loss_weight(case, source, part) for name, part in LOSS_PARTS.items()}

    # 1. Pictures -> latents, where the posterior is stored.
    for stored, noise in (("out.sniffer.", "rng.sniffer.vae_eps"), (image_pass, "rng.decoder.vae_eps")):
        if f"{stored}vae_mean" not in case:
            continue
        with watch(decoder.vae, "encode") as calls:
            latents = decoder.encode(targets, noise=case[noise])
        posterior = calls["encode"][0].result.latent_dist
        case.compare(f"{stored}vae_mean", posterior.mean)
        case.compare(f"{stored}vae_std", posterior.std)
        case.compare_tensors(f"{stored}latents", latents, case[f"{stored}latents"])
    scaled = torch.stack([targets.min(), targets.max()])
    for stored in ("out.sniffer.", "fixed.decoder."):
        case.compare(f"{stored}image_in_minmax", (scaled + 1) / 2)
        case.compare(f"{stored}image_normalized_minmax", scaled)

    # 2. One step. A loss of weight 0 is asked for all the same, since it is stored; it stays out of the total.
    labels = labels_of(case, source)
    case.compare("out.gt_text_ids_shifted", labels[:, 1:], "ids")
    timesteps = decoder.squeeze_timesteps(
        case["rng.sniffer.timesteps_raw"], *decoder.config.consistency_timestep_range
    )
    dropped = case["rng.decoder.uncond_u"].flatten() < decoder.config.condition_dropout
    counts = case["in.num_image_per_seq"]
    masks, starts = case.get("in.image_tensors_mask"), case.get("in.nearest_bos_idxs")
    supervised = case.get("in.image_loss_mask")
    supervised = per_image(case.option("image_loss_mask") if supervised is None else supervised, counts)
    with (
        watch(decoder, "denoise", "error_map") as calls,
        watch(decoder.perceiver, "forward") as perceiver_calls,
        watch(model.model, "get_image_states") as language_calls,
        watch_vision(model) as vision,
    ):
        outputs = model(
            input_ids=case["in.text_ids"],
            attention_mask=case["in.attention_mask"],
            pixel_values=models.pixels(case.image("in.image_u8")),
            region_masks=None if masks is None else masks.float(),
            labels=labels,
            document_starts=per_image(starts if starts is not None else case.option("nearest_bos_idxs"), counts),
            image_loss_mask=None if supervised is None else supervised.bool(),
            target_latents=case["out.sniffer.latents"],
            consistency_draws={"noise": case["rng.sniffer.noise"], "timesteps": timesteps},
            image_draws={
                "latents": case[f"{image_pass}latents"],
                "noise": case["rng.decoder.noise"],
                "timesteps": case["rng.decoder.timesteps_raw"],
                "drop_condition": dropped,
            },
            output_hidden_states=True,
            use_cache=False,
            **{f"{name}_weight": weight or 1.0 for name, weight in weights.items()},
        )
    losses = {name: outputs[name] for name in weights}
    total = outputs.loss if all(weights.values()) else sum(weights[name] * loss for name, loss in losses.items())

    # 3. Forward.
    compare_all(case, vision)
    case.compare("out.cross_attention_mask", language_calls["get_image_states"][0].result.visible.float())
    case.compare("out.mm_embeds", outputs.hidden_states[0], rows=valid)
    for layer, hidden_states in enumerate(outputs.hidden_states):
        case.compare(f"out.mm_hidden.{layer}", hidden_states, rows=valid)
    case.compare("out.text_logits", outputs.logits, rows=valid)
    context = perceiver_calls["forward"][0]
    compare_context(case, context)
    for index, stored in enumerate(("out.sniffer.", image_pass)):
        call = calls["denoise"][index]
        ours = {"noisy_latents": call.arguments["latents"], "model_pred": call.result}
        compare_all(case, {**ours, "sd_loss_map": calls["error_map"][index].result}, stored)
        inputs = {"text_embeds": call.arguments["condition"], "timesteps": call.arguments["timesteps"]}
        for prefix in dict.fromkeys((stored, stored.replace("fixed", "out"))):
            compare_all(case, inputs, prefix)
    case.compare("out.decoder.mmfs_mask", calls["denoise"][1].arguments["states"].visible)
    case.compare("out.decoder.uncond_mask", dropped)
    case.compare("out.decoder.is_cond_image", is_supervised(context.arguments["mask"]))
    ours = {"loss": total} | {f"loss_{part}": losses[name] for name, part in LOSS_PARTS.items()}
    for name in ours.keys() & scalars.keys():
        case.compare_loss(name, ours[name], scalars[name])

    # 4. Gradients, where they are stored.
    which = "fixed_" if fixed else ""
    if f"{which}grad_norms" in case.json:
        total.backward()
        compare_gradients(case, model, models, which)
    superseded = [key for key in case.tensors if re.match(r"out\.decoder\.(image_(in|normalized)_minmax)$", key)]
    if fixed:
        superseded += [key for key in case.tensors if f"fixed.{key.removeprefix('out.')}" in case]
    case.seen.update(superseded)


def compare_context(case: Case, call: Call) -> None:
    """What the decoder's perceiver reads (projected, with positions) and gives."""
    memory, mask = call.arguments["memory"], call.arguments["mask"]
    case.compare("out.context_features", memory, rows=mask)
    case.compare("out.context_attention_mask", mask, "ids")
    case.compare("out.decoder.perceiver_out", call.result)


def compare_gradients(case: Case, model: nn.Module, models: Models, which: str) -> None:
    """Full gradients of the stored names, and the norm of every trainable parameter."""
    parameters = dict(model.named_parameters())

    def gradient(name: str) -> torch.Tensor | None:
        """Ours of an original name; zeros where the loss of weight 0 was not followed, None without counterpart."""
        parameter = parameters.get(rename(name, OFFICIAL))
        if parameter is None:
            return None
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return value[-len(models.weights[name]) :] if HEAD_NEW.match(name) else value

    prefix = f"{which.replace('_', '.')}grad."
    for key in case.tensors:
        if key.startswith(prefix):
            name, ours = key.removeprefix(prefix), gradient(key.removeprefix(prefix))
            theirs = case[key] if ours is None else convert_value(name, case[key], ours.shape)
            if ours is None:
                case.report.add(case.name, key, "gradient", math.inf, "no such parameter")
            else:
                case.compare_tensors(key, ours, theirs, "gradient")

    norms = case.json[f"{which}grad_norms"]
    largest = max(norm for norm in norms.values() if norm)
    for name, theirs in norms.items():
        ours = gradient(name)
        ours = 0.0 if ours is None else ours.norm().item()
        theirs = theirs or 0.0
        # Some are zero but for rounding (biases of keys): these must stay below 1e-6 of the largest.
        scale = theirs if theirs > 1e-6 * largest else 1e-6 * largest / TOLERANCE["gradient"]
        error = abs(ours - theirs) / scale
        case.report.add(case.name, f"grad_norm {name}", "gradient", error)


# ---- the other forms ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_visual_tokenizer(case: Case, models: Models) -> None:
    model = models.get(case, case["in.image_u8"].shape[-1]).eval()
    masks = case.get("in.image_tensors_mask")
    with watch_vision(model) as vision:
        model.get_image_features(
            models.pixels(case.image("in.image_u8")), region_masks=None if masks is None else masks.float()
        )
    compare_all(case, vision)


def text_options(case: Case, variant: str = "") -> dict[str, Any]:
    """Options of `generate` from the JSON, or from a variant's name such as min8 or beam5_min8."""

    def of_variant(word: str) -> int | None:
        found = re.search(rf"{word}(\d+)", variant)
        return int(found[1]) if found else None

    beams, least = of_variant("beam"), of_variant("min")
    released = {"max_new_tokens": 30, "num_beams": 5, "min_length": 8}  # where nothing is stored
    longest = case.option("max_new_tokens", "max_length")
    default = released if longest is None else {"max_new_tokens": longest, "num_beams": 1}
    options = {
        "max_new_tokens": default["max_new_tokens"],
        "num_beams": beams or case.option("num_beams", default=default["num_beams"]),
        "min_new_tokens": least if least is not None else case.option("min_new_tokens"),
        "length_penalty": case.option("length_penalty", default=1.0),
    }
    length = case.option("min_length", default=default.get("min_length"))
    if options["min_new_tokens"] is None and length is not None:
        options["min_new_tokens"] = max(0, length - 1)  # the original counts its synthetic bos
    return {"do_sample": False, **{name: value for name, value in options.items() if value is not None}}


@torch.no_grad()
def run_text_generation(case: Case, models: Models) -> None:
    model, tokens = models.get(case, case["in.image_u8"].shape[-1]).eval(), models.source["special_token_dict"]
    for variant in [m[1] for m in map(re.compile(r"out\.(.+)\.text_ids$").match, case.tensors) if m]:
        outputs = model.generate(
            input_ids=case["in.text_ids"],
            attention_mask=case["in.attention_mask"],
            pixel_values=models.pixels(case.image("in.image_u8")),
            eos_token_id=case.option("eos", default=[tokens["eos_token_id"], tokens["soi_token_id"]]),
            pad_token_id=tokens["pad_token_id"],
            output_logits=True,
            return_dict_in_generate=True,
            **text_options(case, variant),
        )
        theirs = case[f"out.{variant}.text_ids"][:, 1:]  # after the synthetic bos
        ours = outputs.sequences[:, case["in.text_ids"].shape[1] :]
        ours = F.pad(ours, (0, theirs.shape[1] - ours.shape[1]), value=tokens["pad_token_id"])
        case.compare_tensors(f"out.{variant}.text_ids", ours, theirs, "ids")
        if f"out.{variant}.step_logits" in case:
            case.compare(f"out.{variant}.step_logits", torch.stack(outputs.logits, dim=1))


def run_synchronizer(case: Case, models: Models) -> None:
    for name, entry in case.json.items():
        options = entry["kwargs"]
        module = DeemFeatureSynchronizer(
            query_size=options["d_query"],
            feature_size=options["d_value"],
            value_size=int(options["d_model"] * options["ratio"]),
            output_size=options["d_out"],
            level_sides=options["spatial_shapes"],
            base_side=options["base_spatial_shape"],
            num_heads=options["n_heads"],
            num_points=options["n_points"],
            max_images=options["max_num_image_per_seq"],
        )
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        start = f"{name}.param."
        names = {
            key.removeprefix(start): rename(key.removeprefix(start), OFFICIAL)
            for key in case.tensors
            if key.startswith(start)
        }
        module.load_state_dict(
            {ours: convert_value(key, case[start + key], shapes[ours]) for key, ours in names.items()}
        )

        queries, memory = case[f"{name}.in.query"].requires_grad_(), case[f"{name}.in.input_flatten"].requires_grad_()
        groups, images = memory.shape[:2]
        visible = case[f"{name}.in.attention_mask"].bool()
        if visible.dim() == 3 and visible.shape[1] != queries.shape[1]:
            visible = visible[:, -1:]  # cached decoding: new tokens see what the last one saw
        sides = [(side, side) for side in options["spatial_shapes"]]
        index = torch.arange(groups * images).view(groups, images)
        states = DeemImageStates(features=memory.flatten(0, 1), sides=sides, visible=visible, index=index)
        output = module(queries, states, case[f"{name}.in.reference_points"][..., 0, :])
        output.backward(case[f"{name}.in.grad_output"])
        case.compare(f"{name}.out.output", output)
        case.compare(f"{name}.buffer.scale_ratios", torch.tensor(module.level_sides) / module.base_side)
        case.compare(f"{name}.grad.query", queries.grad, "gradient")
        case.compare(f"{name}.grad.input_flatten", memory.grad, "gradient")
        for key, ours in names.items():
            gradient = module.get_parameter(ours).grad
            theirs = convert_value(key, case[f"{name}.grad.param.{key}"], gradient.shape)
            case.compare_tensors(f"{name}.grad.param.{key}", gradient, theirs, "gradient")


def given_pictures(case: Case, models: Models, count: int) -> torch.Tensor:
    """Input pictures in [0, 1]: stored whole, or by row with 0.5 for the others (those to be drawn)."""
    if "in.image_u8" in case:
        return case.image("in.image_u8")
    rows = {
        int(m[1]): case.image(m[0]) for m in map(re.compile(r"in\.image_f32_row(\d+)_u8$").match, case.tensors) if m
    }
    side = next(iter(rows.values())).shape[-1] if rows else models.source["image_size"]
    pictures = torch.full((count, 3, side, side), 0.5)
    for row, given in rows.items():
        given = given.view(-1, 3, side, side)
        pictures[row : row + len(given)] = given
    return pictures


def compare_sampling(case: Case, prefix: str, calls: dict[str, list[Call]], pictures: torch.Tensor) -> None:
    """Latents and pictures of one sampling run."""
    count = len(pictures)
    before = [call.arguments["latents"][-count:] for call in calls["denoise"]]
    final = calls["decode"][-1].arguments["latents"]
    after = torch.stack([*before[1:], final])
    stored = case.tensors.get(f"{prefix}latents_per_step")
    if stored is not None:  # after each step, or also before the first; steps or pictures first
        if stored.shape[:2] == (count, len(after)) and count != len(after):
            after = after.transpose(0, 1)
        elif len(stored) == len(after) + 1:
            after = torch.stack([*before, final])
        case.compare(f"{prefix}latents_per_step", after)
    case.compare(f"{prefix}final_latents", final)
    for name, ours in (("image", pictures), ("image_avgpool4", F.avg_pool2d(pictures, 4))):
        compare_picture(case, f"{prefix}{name}", ours)


def compare_picture(case: Case, key: str, ours: torch.Tensor) -> None:
    """Pictures (n, 3, h, w) in [0, 1] with stored ones: float, or 8-bit; all, or the first ones."""
    if key not in case:
        return
    theirs = case[key]
    if theirs.shape[-1] == 3 and theirs.shape[-3] != 3:
        theirs = theirs.movedim(-1, -3)
    ours = ours[0] if theirs.dim() == 3 else ours[: len(theirs)]
    if theirs.is_floating_point():
        case.compare_tensors(key, ours, theirs)
    else:
        case.compare_tensors(key, (ours * 255).round(), theirs, "8 bit")


@torch.no_grad()
def run_picture_generation(case: Case, models: Models) -> None:
    ids, mask = case["in.text_ids"], case.get("in.attention_mask")
    counts = case.get("in.num_image_per_seq")
    tokens = models.source["special_token_dict"]
    begins = (ids[:, :-1] == tokens["soi_token_id"]) & (ids[:, 1:] == tokens["image_token_id"])
    total = int(begins.sum() if counts is None else counts.sum())
    pictures = given_pictures(case, models, total)
    model = models.get(case, pictures.shape[-1]).eval()
    decoder = model.image_decoder
    targets = case.get("in.target_image_idxs")
    targets = torch.arange(total) if targets is None else targets.flatten().long()
    with (
        watch(decoder, "denoise", "decode") as calls,
        watch(decoder.perceiver, "forward") as perceiver_calls,
        watch(model.model, "get_image_states") as language_calls,
        watch_vision(model) as vision,
    ):
        drawn = model.generate_images(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=models.pixels(pictures),
            num_inference_steps=case.option("num_inference_steps"),
            guidance_scale=case.option("guidance_scale"),
            latents=case["rng.init_latents"],
            scheduler=GivenNoiseScheduler.of(decoder.scheduler, case["rng.step_noise"]),
            target_images=targets,
            document_starts=torch.zeros_like(targets),  # the original's context begins at column 0
        )
    if (theirs := case.option("timesteps")) is not None:
        ours = torch.stack([call.arguments["timesteps"][0] for call in calls["denoise"]])
        case.compare_tensors("timesteps", ours, torch.as_tensor(theirs), "ids")
    compare_sampling(case, "out.", calls, drawn)
    compare_all(case, vision)
    context = perceiver_calls["forward"][0]
    compare_context(case, context)
    case.compare("out.decoder.text_embeds", context.result)
    case.compare("out.text_embeds", context.result)
    case.compare("out.cross_attention_mask", language_calls["get_image_states"][0].result.visible.float())
    visible = calls["denoise"][0].arguments["states"].visible[-len(targets) :]
    case.compare("out.mmfs_mask", visible)
    case.compare("out.decoder.mmfs_mask", visible)


# ---- the interleaved loop -----------------------------------------------------------------------------------------------


# How a part of a name tells the iteration: "iter1" or "1", "iter1_text_ids", "text_ids_1" or "text_ids_iter1".
ITERATION = [
    re.compile(r"(?!u8|f32)[a-z]*_?(?P<number>\d+)"),
    re.compile(r"(?:iter|iteration|it|turn|loop|step)_?(?P<number>\d+)_(?P<rest>.+)"),
    re.compile(r"(?P<rest>.+)_(?:iter|it)?(?P<number>\d+)"),
]


def by_iteration(case: Case) -> dict[int, dict[str, torch.Tensor]]:
    """Stored values of each iteration, by the rest of their name: "out.iter1.text_ids" -> {1: {"out.text_ids": ...}}.

    Lists of numbers in the JSON's `iterations` count too.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in case.tensors.items():
        pieces = key.split(".")
        matches = [next((m for m in (p.fullmatch(piece) for p in ITERATION) if m), None) for piece in pieces]
        place = next((place for place, match in enumerate(matches) if match), None)
        if place is None or key.startswith("in."):
            continue
        rest = matches[place].groupdict().get("rest")
        name = ".".join([*pieces[:place], *([rest] if rest else []), *pieces[place + 1 :]])
        found.setdefault(int(matches[place]["number"]), {})[name] = tensor
        case.seen.add(key)
    listed = case.option("iterations", "iters", default=[])
    for number, entry in enumerate(listed if isinstance(listed, list) else [], start=min(found, default=0)):
        for name, value in entry.items():
            if isinstance(value, list) and value and isinstance(value[0], int | list):
                found.setdefault(number, {})[name] = torch.as_tensor(value)
    return dict(sorted(found.items()))


class StoredPictures:
    """Stands in for the image processor: keeps what ours makes of each drawn picture, passes on the stored one.

    So every iteration is compared from the stored state before it, and 8-bit rounding does not add up.
    """

    def __init__(self, models: Models, side: int, stored: list[torch.Tensor | None]):
        self.models, self.stored, self.made = models, stored, []
        self.processor = DeemImageProcessorPil(size=side, target_size=models.source["dec_image_size"])

    def __call__(self, images: list, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = self.processor(images=images, return_tensors=return_tensors)["pixel_values"]
        mean, std = self.models.mean_std
        self.made.append(pixels * std + mean)
        stored = self.stored[len(self.made) - 1]
        return {"pixel_values": pixels if stored is None else self.models.pixels(as_floats(stored))}


def as_floats(picture: torch.Tensor) -> torch.Tensor:
    """A stored picture, 8-bit or float, as (1, 3, h, w) in [0, 1]."""
    picture = picture.reshape(-1, *picture.shape[-3:])[-1:]
    picture = picture.movedim(-1, -3) if picture.shape[-1] == 3 else picture
    return picture if picture.is_floating_point() else picture.float() / 255


def role(name: str, tensor: torch.Tensor, input_side: int) -> str:
    """What a stored value of an iteration is; "" for what only describes it."""
    if name.startswith("in.") or re.search("before|mask|mode|num_|count|idx", name):
        return ""
    if "step_noise" in name:
        return "step noise"
    if "init" in name and "latent" in name:
        return "initial latents"
    if tensor.dim() >= 3 and 3 in (tensor.shape[-3], tensor.shape[-1]):
        return "picture read" if input_side in tensor.shape[-2:] else "picture drawn"
    if not tensor.is_floating_point() and tensor.dim() <= 2:
        return "prompt" if "prompt" in name or "after" in name else "ids"
    return "unknown"


@torch.no_grad()
def run_interleaved(case: Case, models: Models) -> None:
    tokens, slots = models.source["special_token_dict"], models.source["num_img_token"]
    mask = case.get("in.attention_mask")
    ids = case["in.text_ids"].reshape(1, -1)
    ids = ids if mask is None else ids[:, mask.reshape(-1).bool()]
    count = int((ids == tokens["image_token_id"]).sum()) // slots
    pictures = given_pictures(case, models, count) if count else None
    side = models.source["image_size"] if pictures is None else pictures.shape[-1]
    model = models.get(case, side).eval()
    stored = [
        [(role(name, tensor, side), f"{number}: {name}", tensor) for name, tensor in entry.items()]
        for number, entry in by_iteration(case).items()
    ]

    def of_role(which: str) -> list[torch.Tensor | None]:
        """One per iteration that draws."""
        drawing = [entry for entry in stored if any(kind == "initial latents" for kind, *_ in entry)]
        return [next((tensor for kind, _, tensor in entry if kind == which), None) for entry in drawing]

    processor = StoredPictures(models, side, of_role("picture read"))
    noise = [tensor.reshape(-1, 1, *tensor.shape[-3:]) for tensor in of_role("step noise")]
    with watch(model, "generate_images") as calls:
        output = model.generate_interleaved(
            ids,
            None if pictures is None else models.pixels(pictures),
            image_processor=processor,
            max_pieces=case.option("num_iter", default=len(stored)),
            draw_every_turn=bool(case.option("force_gen_image_next", "force_gen_image", default=False)),
            stop_at_eos=bool(case.option("auto_end", default=False)),
            num_inference_steps=case.option("num_inference_steps"),
            guidance_scale=case.option("guidance_scale"),
            latents=[[tensor.reshape(1, *tensor.shape[-3:]) for tensor in of_role("initial latents")]],
            scheduler=GivenNoiseScheduler.of(model.image_decoder.scheduler, *noise),
            **text_options(case),
        )

    case.compare_tensors("iterations", torch.tensor(len(output.pieces[0])), torch.tensor(len(stored)), "ids")
    prompt, drawn = ids[0], 0
    for entry, piece in zip(stored, output.pieces[0], strict=False):
        is_text = piece.dim() == 1
        if is_text:
            prompt = torch.cat([prompt, piece])
            if piece[-1:].tolist() == [tokens["soi_token_id"]]:
                prompt = F.pad(prompt, (0, slots), value=tokens["image_token_id"])
        for kind, label, theirs in entry:
            if kind == "ids":
                case.report.add(case.name, label, "ids", 0.0 if same_text(piece, theirs, tokens) else math.inf)
            elif kind == "prompt":  # some write the image tokens only with the picture
                ours = prompt[:-slots] if is_text and theirs.numel() == len(prompt) - slots else prompt
                case.compare_tensors(label, ours, theirs.flatten(), "ids")
            elif kind in ("picture drawn", "picture read"):
                ours = calls["generate_images"][drawn].result if kind == "picture drawn" else processor.made[drawn]
                compare_stored_picture(case, label, ours, theirs)
            elif kind == "unknown":
                case.report.unmatched.append(f"{case.name}: {label}")
        drawn += not is_text


def same_text(ours: torch.Tensor, theirs: torch.Tensor, tokens: dict[str, int]) -> bool:
    """Equal but for what frames a text: the synthetic bos, the final eos, padding, the start of the next picture."""
    if ours.dim() != 1:
        return False
    ours, theirs = ours.tolist(), theirs.flatten().tolist()
    frame = {tokens["eos_token_id"], tokens["pad_token_id"], tokens["soi_token_id"]}

    def core(ids: list[int]) -> list[int]:
        while ids and ids[-1] in frame:
            ids = ids[:-1]
        return ids

    return core(ours) in (core(theirs), core(theirs[1:] if theirs[:1] == [tokens["bos_token_id"]] else theirs))


def compare_stored_picture(case: Case, label: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A picture with a stored one, float or 8-bit (also as float), whole or pooled."""
    floats = as_floats(theirs)
    if ours.shape[-1] != floats.shape[-1]:
        ours = F.avg_pool2d(ours, ours.shape[-1] // floats.shape[-1])
    levels = floats * 255
    if not theirs.is_floating_point() or (levels - levels.round()).abs().max() < 1e-3:
        case.compare_tensors(label, (ours * 255).round(), levels.round(), "8 bit")
    else:
        case.compare_tensors(label, ours, floats)


# ---- all --------------------------------------------------------------------------------------------------------------


def runner_of(case: Case) -> Callable[[Case, Models], None]:
    """The form of a case, told by what it holds."""
    if case.json and all(isinstance(entry, dict) and "kwargs" in entry for entry in case.json.values()):
        return run_synchronizer
    if "rng.init_latents" in case:
        return run_picture_generation
    if any("init" in key and "latents" in key for key in case.tensors):
        return run_interleaved
    if any(re.match(r"out\..+\.text_ids$", key) for key in case.tensors):
        return run_text_generation
    if "in.text_ids" in case and "scalars" in case.json:
        return run_training_step
    if "in.image_u8" in case and any(key.startswith("out.vt.") for key in case.tensors):
        return run_visual_tokenizer
    raise ValueError(
        f"case_{case.name} has none of the known forms: its JSON holds {sorted(case.json)[:10]}, its tensors "
        f"{sorted(case.tensors)[:10]}."
    )


def compare_folder(folder: Path, weights: Path | None = None, say: Callable[[str], None] = print) -> Report:
    """Runs every case of a folder."""
    report = Report()
    paths = sorted(folder.glob("case_*.json"))
    if not paths:
        raise FileNotFoundError(f"No case_*.json in {folder}.")
    folders = [weights, folder] if weights else [folder]
    models = Models(folders)
    for path in paths:
        case, began = Case(path, report, folders), time.perf_counter()
        runner_of(case)(case, models)
        case.finish()
        say(f"{case.name}: {time.perf_counter() - began:.1f} s")
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR2", help="folder of config.json and state_dict.safetensors"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every comparison there")
    args = parser.parse_args(argv)
    report = compare_folder(args.folder, args.weights)
    print(report.table())
    if report.unmatched:
        print(f"stored, but without counterpart here: {', '.join(report.unmatched)}")
    if args.json:
        rows = [{**vars(row), "error": row.error if math.isfinite(row.error) else None} for row in report.rows]
        args.json.write_text(json.dumps({"rows": rows, "unmatched": report.unmatched}, indent=1))
    print(report.last_line())
    return int(any(not row.passed for row in report.rows))


if __name__ == "__main__":
    raise SystemExit(main())
