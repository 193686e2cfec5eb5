# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What transformers' own model and generation tests ask of any model: one answer whatever the cache, the padding, the
attention kernel, the precision, the device map, the checkpointing; outputs, gradients and embeddings as documented.
"""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from deem_fixtures import BOS, IMAGE, PAD, STRUCTURE, VOCABULARY, positions_of, rows_of, tiny_batch, tiny_model
from transformers import StaticCache

from modeling_deem import DeemForConditionalGeneration, DeemModel

RAGGED = ("bttitit", "btttt", "bitbtit", "bti")  # 2, 0, 2 and 1 images; two documents in the third row
NEW = 6
DECODING = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
}


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def write(model: torch.nn.Module, batch: dict, seed: int = 0, **options) -> list[list[int]]:
    """The new tokens of each sequence."""
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": STRUCTURE, "do_sample": False}
    return model.generate(**batch, **{**defaults, **options})[:, -NEW:].tolist()


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("variant", ["no cache", "static cache", "singles"])
def test_generation_does_not_depend_on_how_it_is_run(model, how: str, variant: str) -> None:
    batch, options = tiny_batch(*RAGGED, padding_side="left", targets=False), DECODING[how]
    expected = write(model, batch, **options)
    assert len({tuple(tokens) for tokens in expected}) > len(RAGGED) // 2
    if variant == "no cache":
        assert write(model, batch, **options, use_cache=False) == expected
    elif variant == "static cache":
        assert write(model, batch, **options, cache_implementation="static") == expected
    elif how == "sampling":  # rows share one random state: the first row, alone, draws the first numbers of each step
        alone = rows_of(batch)[0]
        repeated = write(model, alone, **options)
        assert repeated == write(model, alone, **options, use_cache=False)
    else:
        assert [tokens for row in rows_of(batch) for tokens in write(model, row, **options)] == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_bos_that_the_model_writes_begins_no_document(num_beams: int) -> None:
    """With and without a cache, and as released: the images of the prompt stay in sight."""
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.lm_head.bias[BOS] += 4.0
    batch = tiny_batch("btitt", "bittttt", padding_side="left", targets=False)
    options = {"suppress_tokens": [PAD, IMAGE], "num_beams": num_beams}
    cached = write(model, batch, **options)
    assert any(BOS in tokens[:-1] for tokens in cached)
    assert write(model, batch, **options, use_cache=False) == cached


def test_generation_goes_on_behind_a_cache(model) -> None:
    (row,) = rows_of(tiny_batch("btitit", targets=False))
    expected = write(model, row)[0]
    options = {"suppress_tokens": STRUCTURE, "do_sample": False}
    first = model.generate(**row, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, **options)
    row = {**row, "input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    rest = model.generate(
        **row, past_key_values=first.past_key_values, max_new_tokens=NEW - 3, min_new_tokens=3, **options
    )
    assert rest[0, -NEW:].tolist() == expected


def test_generation_with_a_new_image_behind_a_cache(model) -> None:
    """A second turn of a conversation, with a picture of its own."""
    (row,) = rows_of(tiny_batch("btittit", targets=False))
    expected = write(model, row)[0]
    cut = int((row["input_ids"][0] == IMAGE).nonzero()[3]) + 2  # behind the first image
    with torch.no_grad():
        head = {"input_ids": row["input_ids"][:, :cut], "pixel_values": row["pixel_values"][:1]}
        cache = model(**head, use_cache=True).past_key_values
    assert write(model, row, past_key_values=cache)[0] == expected


def test_prompt_lookup_decoding_writes_the_same(model) -> None:
    (row,) = rows_of(tiny_batch("btitttttt", targets=False))
    assert write(model, row, prompt_lookup_num_tokens=2) == write(model, row)


def test_absent_images_may_be_given_as_none(model) -> None:
    batch = tiny_batch("btt", "btttt", padding_side="left", targets=False)
    assert write(model, {**batch, "pixel_values": None, "region_masks": None}) == write(model, batch)


def test_a_prompt_with_images_is_not_read_in_pieces(model) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        write(model, tiny_batch("btit", targets=False), prefill_chunk_size=4)


def test_embeddings_in_place_of_ids(model) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeddings = {key: value for key, value in batch.items() if key != "input_ids"} | {"inputs_embeds": embeds}
    with torch.no_grad():
        assert torch.equal(model(**by_embeddings).logits, model(**batch).logits)
    assert write(model, by_embeddings) == write(model, batch)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert write(model, by_embeddings, **options) == write(model, batch, **options)


def test_values_of_the_image_attention_are_projected_once_per_prompt(model, monkeypatch) -> None:
    calls = []
    for key, block in model.model.image_attention.items():
        project = block.synchronizer.project_values

        def counted(*given, project=project, key=key) -> torch.Tensor:
            calls.append(key)
            return project(*given)

        monkeypatch.setattr(block.synchronizer, "project_values", counted)
    write(model, tiny_batch("btit", targets=False), cache_implementation="static")
    assert sorted(calls) == sorted(model.model.image_attention)


def test_threads_share_a_model(model) -> None:
    """Each writes what it writes alone."""
    batches = [tiny_batch("bttit", targets=False, seed=1), tiny_batch("btitittt", targets=False, seed=2)]
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    expected = [write(model, batch, **options) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda _: [write(model, batch, **options) for batch in batches], range(2))
        found = list(threads.map(lambda batch: [write(model, batch, **options) for _ in range(6)], batches)) + [*found]
    assert found == [[expected[0]] * 6, [expected[1]] * 6, expected, expected]


def test_nothing_is_held_after_a_forward_that_failed(model) -> None:
    held, batch = weakref.WeakSet(), tiny_batch("bttit", targets=False)

    def fail(module, args, kwargs):
        held.add(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise RuntimeError("in the middle of a layer")

    layer = model.model.language_model.layers[2]
    hook = layer.register_forward_pre_hook(lambda module, args: held.add(args[0]))
    fault = layer.self_attn.o_proj.register_forward_pre_hook(fail, with_kwargs=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="in the middle"):
        model(**batch)
    hook.remove()
    fault.remove()
    gc.collect()
    assert not held


# ---- outputs and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DeemModel, DeemForConditionalGeneration])
def test_outputs_as_documented(model, kind: type) -> None:
    module = model.model if kind is DeemModel else model
    batch = tiny_batch(*RAGGED, targets=False)
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = eager(**batch, output_hidden_states=True, output_attentions=True)
        as_tuple = module(**batch, return_dict=False)
        as_output = module(**batch)
    rows, length = batch["input_ids"].shape
    layers, heads = 4, 4
    assert len(outputs.hidden_states) == layers + 1 and outputs.hidden_states[0].shape == (rows, length, 32)
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(rows, heads, length, length)] * layers
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_output[0])
    assert outputs.image_hidden_states.shape == (5, 4, 32)


def test_image_features_as_documented(model) -> None:
    pixels = tiny_batch("bii", targets=False)["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels)
        whole = model.get_image_features(pixels, output_hidden_states=True)
        assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)
    assert features.pooler_output.shape == (2, 4, 32) and features.hidden_states is None
    assert len(whole.hidden_states) == 5 and torch.equal(whole.pooler_output, features.pooler_output)
    assert model.get_image_features(None) is None


def test_gradients_are_kept_for_inputs_and_hidden_states(model) -> None:
    batch = tiny_batch("btitt", targets=False)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, **batch, output_hidden_states=True)
    outputs.hidden_states[1].retain_grad()
    outputs.logits.square().sum().backward()
    assert embeds.grad.abs().sum() > 0 and outputs.hidden_states[1].grad.abs().sum() > 0


def test_targets_already_shifted_take_the_place_of_labels(model) -> None:
    batch = tiny_batch("btttit", "btt")
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for key in ("target_pixel_values",):
        batch.pop(key)
    with torch.no_grad():
        expected = model(**batch).loss
        batch["labels"] = torch.full_like(batch["labels"], 5)
        assert torch.equal(model(**batch, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_leaves_every_gradient_as_it_is(reentrant: bool | None) -> None:
    """Through the image attention as well, and with two forwards before a backward."""
    model = tiny_model(seed=5).train()
    batches = [tiny_batch("btitit", "bti", seed=seed) for seed in (0, 1)]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = [model(**batch, generator=torch.Generator().manual_seed(3)).loss for batch in batches]
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    options = None if reentrant is None else {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    found = gradients()
    assert found.keys() == expected.keys() and any("image_attention" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    layer = model.model.language_model.layers[0]
    assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_sdpa_equals_eager(model) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert model.config.text_config._attn_implementation == "sdpa"
    assert eager.model.language_model.config._attn_implementation == "eager"
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(eager(**batch).logits[real], model(**batch).logits[real], rtol=0, atol=1e-5)


def test_flags() -> None:
    for kind in (DeemModel, DeemForConditionalGeneration):
        assert kind._supports_sdpa and kind._supports_flash_attn and kind._supports_flex_attn
        assert kind._supports_attention_backend and kind.supports_gradient_checkpointing
    assert DeemForConditionalGeneration.can_generate() and not DeemModel.can_generate()
    assert DeemForConditionalGeneration.output_modalities == ("text", "image")


def test_compiled_text_path(model) -> None:
    """One graph without a break; the back end that only traces, so that the test is quick."""
    batch = tiny_batch("btttt", "bttttttt", targets=False)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    torch._dynamo.reset()


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_embeddings(tmp_path, tied: bool) -> None:
    model = tiny_model(seed=5, text_config={"tie_word_embeddings": tied})
    batch = tiny_batch("btitt", targets=False)
    with torch.no_grad():
        before = model(**batch).logits
    model.resize_token_embeddings(VOCABULARY + 10)
    assert model.config.text_config.vocab_size == VOCABULARY + 10 == model.lm_head.out_features
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 10
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[..., :VOCABULARY], before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = DeemForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    """The model in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return str(folder)


DEVICE_MAPS = {
    "auto": ("auto", {"max_memory": {"cpu": "400KB", "disk": "1GB"}}),
    "decoder on disk": ({"model": "cpu", "lm_head": "cpu", "image_decoder": "disk"}, {}),
    "language on disk": (
        {
            **dict.fromkeys(
                ("model.vision_tower", "model.perceiver", "model.projector", "model.start_of_image"), "cpu"
            ),
            **dict.fromkeys(("model.language_model", "model.image_attention"), "disk"),
            **dict.fromkeys(("lm_head", "image_decoder"), "cpu"),
        },
        {},
    ),
}


@pytest.mark.parametrize("placement", DEVICE_MAPS)
def test_parts_on_disk_write_and_draw_the_same(model, checkpoint, tmp_path, placement: str) -> None:
    device_map, options = DEVICE_MAPS[placement]
    loaded = DeemForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=str(tmp_path), **options
    )
    assert "disk" in loaded.hf_device_map.values()
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    assert write(loaded, batch) == write(model, batch)
    drawn, expected = (
        one.generate_images(**batch, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        for one in (loaded, model)
    )
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_shards_hold_every_tensor(model, checkpoint) -> None:
    loaded = DeemForConditionalGeneration.from_pretrained(checkpoint, device_map="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_half_precision(model, checkpoint) -> None:
    """Everything in bfloat16 but the VAE, whose activations overflow there; writes, draws and learns."""
    half = DeemForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    kinds = {name.startswith("image_decoder.vae"): p.dtype for name, p in half.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    batch = tiny_batch("btiti", "bti")
    outputs = half(**batch, generator=torch.Generator().manual_seed(0))
    expected = model(**batch, generator=torch.Generator().manual_seed(0))
    for name in ("text_loss", "image_loss", "consistency_loss"):
        torch.testing.assert_close(outputs[name].float(), expected[name], rtol=0.1, atol=0.05)
    outputs.loss.backward()
    batch = tiny_batch("btiti", "bti", padding_side="left", targets=False)
    assert len(write(half, batch)) == 2
    assert half.generate_images(**batch, num_inference_steps=2).isfinite().all()


def test_missing_parts_are_started_and_the_others_kept(model) -> None:
    """A checkpoint without the image decoder, and one that has never seen a region token."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("image_decoder")}
    config = copy.deepcopy(model.config)
    config.use_region_tokens = True
    loaded, report = DeemForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"image_decoder", "model"}
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all() and tensor.abs().max() < 100, name
        if name in state:
            assert torch.equal(tensor, state[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.image_decoder.vae.parameters())
    assert loaded(**tiny_batch("btiti")).loss.isfinite()


def test_static_cache_given_by_the_caller(model) -> None:
    batch = tiny_batch("btit", "bti", padding_side="left", targets=False)
    mask = batch["attention_mask"]
    cache = StaticCache(config=model.config.text_config, max_cache_len=mask.shape[1] + 4)
    with torch.no_grad():
        cached = model(**batch, position_ids=positions_of(mask), past_key_values=cache, use_cache=True)
        plain = model(**batch, position_ids=positions_of(mask), use_cache=False)
    real = mask.bool()
    torch.testing.assert_close(cached.logits[real], plain.logits[real], rtol=0, atol=1e-5)
