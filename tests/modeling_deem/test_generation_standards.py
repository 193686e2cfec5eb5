# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What transformers' generation tests ask of every model, asked of DEEM with its gates open, so that images count.

Every way of decoding and every cache with every family of encoder and language model that the standard tests take, and
going on from a cache. What differs only in how generation is run is in test_standards_deem.py.
"""

import copy
import inspect

import pytest
import torch
from deem_fixtures import BOS, IMAGE, STRUCTURE, VOCABULARY, Q, positions_of, rows_of, tiny_batch, tiny_model
from family_fixtures import text_config, vision_config
from transformers import DynamicCache, StaticCache, logging
from transformers.generation import CompileConfig, GenerationMixin
from transformers.testing_utils import CaptureLogger

from modeling_deem import DeemForConditionalGeneration

COMBINATIONS = {
    "dinov2 qwen2": ("dinov2", "qwen2"),
    "clip qwen3": ("clip_vision_model", "qwen3"),
    "siglip llama": ("siglip_vision_model", "llama"),
    "convnextv2 llama": ("convnextv2", "llama"),
}
RAGGED = ("bttitit", "btttt", "bitbtit", "bti")  # 2, 0, 2 and 1 images; two documents in the third row
LAYERS, HEADS, KEY_HEADS, HEAD_SIZE, WIDTH = 2, 4, 2, 8, 32
NEW = 6


@pytest.fixture(scope="module", params=COMBINATIONS)
def model(request) -> DeemForConditionalGeneration:
    """Shared by tests that leave it as it is; eager attention, since only that shows its weights."""
    vision, text = COMBINATIONS[request.param]
    model = tiny_model(
        seed=5,
        vision_config=vision_config(vision),
        text_config=text_config(text, num_hidden_layers=LAYERS),
        image_decoder_config=None,
        image_attention_interval=1,
    )
    model.set_attn_implementation("eager")
    return model


def write(model, batch: dict, new: int = NEW, **options):
    """Exactly `new` tokens per sequence."""
    defaults = {"do_sample": False, "suppress_tokens": STRUCTURE}
    return model.generate(**batch, max_new_tokens=new, min_new_tokens=new, **{**defaults, **options})


def left(*words: str, **options) -> dict:
    return tiny_batch(*words, padding_side="left", targets=False, **options)


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


# ---- outputs ---------------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
    "beam search": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam sampling": {"num_beams": 2, "do_sample": True, "top_k": 10},
}


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("way", WAYS)
def test_everything_that_generate_returns_has_its_shape(model, way: str, cache: str | None) -> None:
    batch, options = left(*RAGGED), {"repetition_penalty": 1.2, "bad_words_ids": [[7, 8]], **WAYS[way]}
    shown = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    outputs = write(
        model, batch, **options, **dict.fromkeys(shown, True), use_cache=cache is not None, cache_implementation=cache
    )
    rows, length = batch["input_ids"].shape
    returned = rows * options.get("num_return_sequences", 1)
    running = rows * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert outputs.sequences.shape == (returned, length + NEW)
    for each in (outputs.scores, outputs.logits):
        assert [tuple(step.shape) for step in each] == [(running, VOCABULARY)] * NEW
    for step in range(NEW):
        read = 1 if cache and step else length + step
        keys = length + NEW - 1 if cache == "static" else length + step
        assert [tuple(layer.shape) for layer in outputs.attentions[step]] == [(running, HEADS, read, keys)] * LAYERS
        assert [tuple(layer.shape) for layer in outputs.hidden_states[step]] == [(running, read, WIDTH)] * (LAYERS + 1)
    if cache is None:
        assert outputs.past_key_values is None
        return
    assert isinstance(outputs.past_key_values, StaticCache if cache == "static" else DynamicCache)
    shape = (running, KEY_HEADS, length + NEW - 1, HEAD_SIZE)
    assert [tuple(layer.keys.shape) for layer in outputs.past_key_values.layers] == [shape] * LAYERS


def test_sampled_tokens_come_from_the_distribution_that_a_row_has_alone(model) -> None:
    """One random state serves a batch, so that rows alone draw otherwise; what they draw from is comparable."""
    batch = left(*RAGGED)
    torch.manual_seed(0)
    outputs = write(model, batch, do_sample=True, output_logits=True, return_dict_in_generate=True)
    drawn = torch.stack(outputs.logits, dim=1)  # [B, NEW, V]
    greedy = write(model, batch)
    assert not torch.equal(outputs.sequences, greedy)
    for row, single in enumerate(rows_of(batch)):
        ids = torch.cat([single["input_ids"], outputs.sequences[row : row + 1, -NEW:]], dim=1)
        single |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            alone = model(**single, logits_to_keep=NEW + 1).logits[0, :-1]
        torch.testing.assert_close(drawn[row], alone, rtol=0, atol=1e-5)


def test_generate_and_its_preparation_are_those_of_transformers(model) -> None:
    assert GenerationMixin in type(model).__bases__
    assert "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    given = {"position_ids": torch.arange(3).expand(2, 3), "output_attentions": True, "of_my_own": 42}
    prepared = model.prepare_inputs_for_generation(ids, **given)
    assert torch.equal(prepared["input_ids"], ids) and {key: prepared[key] for key in given} == given
    assert model.generate(max_new_tokens=3, min_new_tokens=3).shape == (1, 4)  # from bos alone


# ---- ways to give the prompt -----------------------------------------------------------------------------------------


def test_positions_may_be_given(model) -> None:
    batch = left(*RAGGED)
    expected = write(model, batch)
    assert torch.equal(write(model, batch, position_ids=positions_of(batch["attention_mask"])), expected)
    assert not torch.equal(write(model, batch, position_ids=positions_of(batch["attention_mask"]) * 3), expected)


def test_logits_of_the_last_tokens_only(model) -> None:
    batch = left(*RAGGED)
    with torch.no_grad():
        every = model(**batch, logits_to_keep=0).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, every[:, -2:], rtol=0, atol=1e-5)
        some = torch.tensor([0, 3])
        torch.testing.assert_close(model(**batch, logits_to_keep=some).logits, every[:, some], rtol=0, atol=1e-5)
    assert every.shape == (*batch["input_ids"].shape, VOCABULARY)
    assert torch.equal(write(model, batch, logits_to_keep=0), write(model, batch))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_in_place_of_ids(model, options: dict, with_ids: bool) -> None:
    """With images; with the ids beside them the prompt is returned as well."""
    batch = left(*RAGGED)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = batch if with_ids else without(batch, "input_ids")
    kept = write(model, {**given, "inputs_embeds": embeds}, **options)
    expected = write(model, batch, **options)
    assert torch.equal(kept, expected if with_ids else expected[:, -NEW:])
    words = batch["input_ids"] > 2
    words &= (batch["input_ids"] != IMAGE) & (batch["input_ids"] != STRUCTURE[2])
    other = torch.where(words[..., None], torch.rand_like(embeds), embeds)
    scores = {"output_scores": True, "return_dict_in_generate": True, **options}
    changed = write(model, {**given, "inputs_embeds": other}, **scores).scores
    for one, two in zip(changed, write(model, {**given, "inputs_embeds": embeds}, **scores).scores, strict=True):
        assert not torch.allclose(one, two, atol=1e-3)


def test_a_mask_of_ones_own(model) -> None:
    """Three continuations of one prefix in one row, each blind to the others (a 4-D mask)."""
    prefix, ends = [BOS, 10, 11], [13, 14, 15]
    ids = torch.tensor([[*prefix, end] for end in ends])
    shared = torch.tensor([[*prefix, *ends]])
    allowed = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    allowed[4, 3], allowed[5, 3], allowed[5, 4] = False, False, False
    mask = torch.zeros(6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        found = model(shared, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]])).logits[0, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- other models, other caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["itself", "a stranger"])
def test_assisted_decoding_writes_the_same(model, assistant: str) -> None:
    (row,) = rows_of(left("bttitit"))
    expected = write(model, row)
    helper = copy.deepcopy(model)
    if assistant == "a stranger":
        helper.model.language_model.layers[0].mlp.down_proj.weight.data.neg_()
        assert not torch.equal(write(helper, row), expected)
    helper.generation_config.num_assistant_tokens = 3
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    steps = []
    counter = model.register_forward_pre_hook(lambda *given: steps.append(1))
    assert torch.equal(write(model, row, assistant_model=helper), expected)
    counter.remove()
    if assistant == "itself":  # which sees the images too, and so guesses right: three tokens and the next per step
        assert len(steps) == 2
    torch.manual_seed(0)
    assert write(model, row, assistant_model=helper, do_sample=True).shape == expected.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(model, cache: str) -> None:
    on_gpu = copy.deepcopy(model).cuda()
    batch = {name: value.cuda() for name, value in left(*RAGGED).items()}
    assert torch.equal(write(on_gpu, batch, cache_implementation=cache), write(on_gpu, batch))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_given_cache_is_filled(model, options: dict) -> None:
    batch = left(*RAGGED)
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(write(model, batch, past_key_values=cache, **options), write(model, batch, **options))


def test_compiled_steps_are_one_graph_and_are_not_compiled_again(model) -> None:
    """The back end that only traces, so that the test is quick; other prompts of one size, then a shorter answer."""
    asked = [(left("bttitt", "bttitt", seed=seed), new) for seed, new in ((0, NEW), (1, NEW), (2, 3))]
    compiled = copy.deepcopy(model)
    expected = [write(compiled, batch, new) for batch, new in asked]
    assert compiled._can_compile_fullgraph and not hasattr(compiled, "_compiled_call")
    how = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    how._compile_all_devices = True
    torch.compiler.reset()
    torch._logging.set_logs(recompiles_verbose=True)
    try:
        with CaptureLogger(logging.get_logger("torch._dynamo.guards")) as log:
            found = [
                write(compiled, batch, new, cache_implementation="static", compile_config=how) for batch, new in asked
            ]
    finally:
        torch._logging.set_logs()
        torch.compiler.reset()
    assert hasattr(compiled, "_compiled_call")
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
    assert "Recompiling" not in log.out and "guard" not in log.out


def test_parts_of_generation_export(model) -> None:
    """As transformers takes a multimodal model apart: image encoder, language model, head, and a step of decoding."""
    exporting = pytest.importorskip("transformers.exporters.exporter_dynamo")
    from transformers.exporters.utils import decompose_for_generation, decompose_multimodal, get_leaf_tensors

    batch = left("bttitt", "bttitt")
    parts = {**decompose_multimodal(model, batch), **decompose_for_generation(model, batch)}
    assert set(parts) == {"image_encoder", "language_model", "lm_head", "decode"}
    # Sizes left open take long to export: one of the four models shows them.
    any_size = model.config.vision_config.model_type == "convnextv2"
    exporter, config = exporting.DynamoExporter(), exporting.DynamoConfig(dynamic=any_size)
    for name, (module, inputs) in parts.items():
        with torch.no_grad():
            expected = get_leaf_tensors(module(**copy.deepcopy(inputs)))
            exported = exporter.export(module, inputs, config=config)
            found = get_leaf_tensors(exported.program.module()(**copy.deepcopy(inputs)))
        assert found.keys() == expected.keys() and found, name
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
    states = parts["decode"][1]["image_states"]
    states.features.zero_()
    states.kept_values.clear()
    with torch.no_grad():  # and the images count in a step that was exported
        blind = get_leaf_tensors(module(**copy.deepcopy(parts["decode"][1])))
    assert not torch.allclose(blind["logits"], expected["logits"], atol=1e-3)


def test_parts_of_generation_run_in_onnxruntime(model) -> None:
    """The same parts, run by ONNX Runtime; by name, each input gets the tensor that is meant (docs/serving.md)."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is installed apart (docs/serving.md)")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation, decompose_multimodal, get_leaf_tensors

    batch = left("bttitt", "bttitt")
    exporter = OnnxExporter()
    for name, (module, inputs) in {
        **decompose_multimodal(model, batch),
        **decompose_for_generation(model, batch),
    }.items():
        with torch.no_grad():
            expected = get_leaf_tensors(module(**copy.deepcopy(inputs)))
            exported = exporter.export(module, copy.deepcopy(inputs), config=OnnxConfig())
        found = get_leaf_tensors(exported(**copy.deepcopy(inputs)))
        assert found.keys() == expected.keys() and found, name
        for key in found:
            torch.testing.assert_close(
                torch.as_tensor(found[key]),
                expected[key],
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text, key=f"{name} {key}": f"{key}: {text}",
            )


# ---- going on from a cache -------------------------------------------------------------------------------------------


def turn(batch: dict, outputs, *more: int) -> dict:
    """The whole sequence of an earlier call and further tokens, with all its images and the cache of what was read."""
    ids = torch.cat([outputs.sequences, torch.tensor(more, dtype=torch.long).expand(len(outputs.sequences), -1)], 1)
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, ids.shape[1] - batch["attention_mask"].shape[1]), value=1
    )
    return {**batch, "input_ids": ids, "attention_mask": mask, "past_key_values": outputs.past_key_values}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_going_on_equals_not_stopping(model, cache: str) -> None:
    batch = left(*RAGGED)
    kept = {"return_dict_in_generate": True, "output_scores": True}
    expected = write(model, batch, **kept)
    given = {"max_cache_len": batch["input_ids"].shape[1] + NEW, "config": model.config.text_config}
    cached = {"past_key_values": StaticCache(**given)} if cache == "static" else {}
    first = write(model, batch, 3, **kept, **cached)
    rest = write(model, turn(batch, first), NEW - 3, **kept)
    assert torch.equal(rest.sequences, expected.sequences)
    for one, two in zip(first.scores + rest.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    if cache == "dynamic":
        for one, two in zip(rest.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=1e-5)
    others = write(model, {**batch, "pixel_values": -batch["pixel_values"]}, **kept)
    assert not torch.allclose(others.scores[-1], expected.scores[-1], atol=1e-4)  # the images do count


def test_going_on_with_words_equals_reading_them_at_once(model) -> None:
    batch = left(*RAGGED)
    first = write(model, batch, 3, return_dict_in_generate=True)
    second = turn(batch, first, 11, 12, 13)
    expected = write(model, without(second, "past_key_values"), use_cache=False)
    assert torch.equal(write(model, second), expected)


def test_going_on_with_the_states_of_an_earlier_output(model) -> None:
    """In place of the images: in `generate`, for several answers to one prompt, and for a copy of the cache."""
    batch = left("bttititt", "btttt", "bitbtitt", "btit")
    positions = positions_of(batch["attention_mask"])
    expected = write(model, batch)
    with torch.no_grad():
        cut = {name: value[:, :-1] for name, value in without(batch, "pixel_values").items()}
        read = model(**cut, pixel_values=batch["pixel_values"], position_ids=positions[:, :-1], use_cache=True)
    for cache, times in ((read.past_key_values, 1), (copy.deepcopy(read.past_key_values), 2)):
        cache.batch_repeat_interleave(times)
        given = {"past_key_values": copy.deepcopy(cache), "image_states": read.image_states}
        found = write(model, {**without(batch, "pixel_values"), **given}, num_return_sequences=times, num_beams=times)
        if times == 1:
            assert torch.equal(found, expected)
        else:
            assert torch.equal(found, write(model, batch, num_return_sequences=times, num_beams=times))


@pytest.mark.parametrize("padded", ["by a mask", "by tokens"])
def test_padding_on_the_right_is_refused(model, padded: str) -> None:
    batch = tiny_batch("bttit", "btit", targets=False)
    given = batch if padded == "by a mask" else without(batch, "attention_mask")
    with pytest.raises(ValueError, match=r'pad on the left.*padding_side = "left"'):
        write(model, given)
    first = write(model, left("bttit", "btit"), 3, return_dict_in_generate=True)
    second = turn(left("bttit", "btit"), first, 11, 12)
    second["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        write(model, second)


def test_a_cache_without_its_images_is_refused(model) -> None:
    batch = left("bttit", "btttttit")
    first = write(model, batch, 3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="tokens: 8, features: 0"):  # image tokens in the sequence
        write(model, without(turn(batch, first), "pixel_values"))
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for given in (
            {},
            {"pixel_values": batch["pixel_values"]},
        ):  # words alone, which cannot be told from blind ones
            ids = torch.full((2, 1), 11) if not given else batch["input_ids"][:, -Q - 1 :]
            with pytest.raises(ValueError, match="image_states"):
                model(ids, past_key_values=cache, **given)


def test_step_by_step_without_generate(model) -> None:
    """Logits of a text that is read in pieces, the images with the first; also from a copy of the cache."""
    (row,) = rows_of(left("bttitittttttt"))
    with torch.no_grad():
        whole = model(**row).logits
        head = model(row["input_ids"][:, :-4], row["pixel_values"], use_cache=True)
        cache, states, end = copy.deepcopy(head.past_key_values), head.image_states, [head.logits]
        for column in range(-4, 0):
            ids = row["input_ids"][:, column : column + 1 or None]
            outputs = model(ids, past_key_values=cache, image_states=states, use_cache=True)
            states = outputs.image_states
            end.append(outputs.logits)
        behind = {"past_key_values": head.past_key_values, "image_states": head.image_states}
        at_once = model(row["input_ids"][:, -4:], **behind).logits
    torch.testing.assert_close(torch.cat(end, dim=1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(at_once, whole[:, -4:], rtol=0, atol=1e-5)


def test_a_turn_cut_from_the_cache(model) -> None:
    """Words, then an image, which is taken back; new words see what they see without a cache."""
    (head,), (tail,) = rows_of(left("btitt")), rows_of(left("btittttt"))
    (picture,) = rows_of(left("btittitt"))
    read, whole = head["input_ids"].shape[1], tail["input_ids"]
    with torch.no_grad():
        outputs = model(**head, use_cache=True)
        images = model.get_image_features(picture["pixel_values"])
        where = (model.model.find_token(kind, picture["input_ids"], None) for kind in (IMAGE, BOS))
        second = type(images)(pooler_output=images.pooler_output[1:])
        behind = {"past_key_values": outputs.past_key_values, "mm_encoder_outputs": {"image": second}}
        states = model.model.get_image_states(images, *where)
        model(picture["input_ids"][:, read:], image_states=states, **behind, use_cache=True)
        outputs.past_key_values.crop(read - picture["input_ids"].shape[1])
        again = {"past_key_values": outputs.past_key_values, "image_states": outputs.image_states}
        found = model(whole[:, read:], **again).logits
        ids = torch.cat([head["input_ids"], whole[:, read:]], dim=1)
        expected = model(ids, head["pixel_values"]).logits[:, read:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_cache_that_is_used_anew_remembers_no_image(model) -> None:
    (row,), (plain,) = rows_of(left("bttit")), rows_of(left("bttttttt"))
    cache = StaticCache(config=model.config.text_config, max_cache_len=24)
    write(model, row, past_key_values=cache)
    cache.reset()
    assert torch.equal(write(model, plain, past_key_values=cache), write(model, plain))


def test_going_on_with_embeddings(model) -> None:
    batch = left(*RAGGED)
    table, mask = model.get_input_embeddings(), batch["attention_mask"]
    embeds = table(batch["input_ids"])
    first = write(model, batch, 3, return_dict_in_generate=True)
    whole = {
        "inputs_embeds": torch.cat([embeds, table(first.sequences[:, -3:])], dim=1),
        "attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1),
        "pixel_values": batch["pixel_values"],
        "past_key_values": first.past_key_values,
    }
    expected = write(model, batch)
    assert torch.equal(write(model, whole, NEW - 3), expected[:, 3 - NEW :])


def test_one_prompt_many_answers(model) -> None:
    """The cache of a prompt, cut back and repeated for several texts."""
    batch = left("bttittt", "bttittt")
    batch["input_ids"][1, :-1] = batch["input_ids"][0, :-1]
    batch["pixel_values"] = batch["pixel_values"][:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        whole = model(**batch).logits
        read = model(batch["input_ids"][:1], batch["pixel_values"][:1], use_cache=True)
        read.past_key_values.crop(-1)
        read.past_key_values.batch_repeat_interleave(2)
        given = {"past_key_values": read.past_key_values, "image_states": read.image_states.repeat(2)}
        found = model(batch["input_ids"][:, -1:], **given).logits
    torch.testing.assert_close(found, whole[:, -1:], rtol=0, atol=1e-5)


def test_a_new_image_behind_a_cache(model) -> None:
    """A second turn with an image of its own, in a batch of which one row had one before."""
    batch = left("btittit", "btttttttti")
    cut = batch["input_ids"].shape[1] - Q - 2
    head = {name: batch[name][:, :cut] for name in ("input_ids", "attention_mask")}
    assert int((head["input_ids"] == IMAGE).sum()) == Q
    expected, mask = write(model, batch), batch["attention_mask"]
    with torch.no_grad():
        positions = positions_of(head["attention_mask"])
        outputs = model(**head, pixel_values=batch["pixel_values"][:1], position_ids=positions, use_cache=True)
        cache = outputs.past_key_values
    with pytest.raises(ValueError, match="image_states of the whole sequence"), torch.no_grad():
        model(
            batch["input_ids"][:, cut:],
            attention_mask=mask,
            past_key_values=copy.deepcopy(cache),
            pixel_values=batch["pixel_values"][1:],
            image_states=outputs.image_states,
        )
    assert torch.equal(write(model, batch, past_key_values=cache), expected)


def test_rows_must_fit_the_states(model) -> None:
    batch = left("btit", "btit")
    with torch.no_grad():
        outputs = model(**batch, use_cache=True)
    with pytest.raises(ValueError, match="3 sequences, but image_states of 2"):
        model(torch.full((3, 1), 7), past_key_values=outputs.past_key_values, image_states=outputs.image_states)


# ---- a bos that is written or proposed begins no document ----------------------------------------------------------


@pytest.fixture
def lover_of_bos(model) -> DeemForConditionalGeneration:
    """The model with a head that proposes bos again and again."""
    helper = copy.deepcopy(model)
    helper.lm_head.bias.data[BOS] = 100.0
    helper.generation_config.num_assistant_tokens = 2
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    return helper


def test_a_proposed_bos_blinds_nothing(model, lover_of_bos) -> None:
    (row,) = rows_of(left("bttitit"))
    options = {"suppress_tokens": None, "output_scores": True, "return_dict_in_generate": True}
    expected = write(model, row, **options)
    others = write(model, {**row, "pixel_values": -row["pixel_values"]}, **options)
    assert not torch.allclose(others.scores[0], expected.scores[0], atol=1e-4)  # the images do count
    found = write(model, row, **options, assistant_model=lover_of_bos)
    assert torch.equal(found.sequences, expected.sequences)
    for one, two in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_a_bos_that_a_lookup_proposes_blinds_nothing(model) -> None:
    """Two documents with one ending: behind the first ending comes a bos, which the lookup proposes for the second."""
    (row,) = rows_of(left("bittttbitttt"))
    ids = row["input_ids"]
    ids[:, -4:] = ids[:, ids.shape[1] // 2 - 4 : ids.shape[1] // 2]
    assert ids[0, ids.shape[1] // 2] == BOS
    assert torch.equal(write(model, row, prompt_lookup_num_tokens=3), write(model, row))


def test_a_written_bos_hides_no_image(model, lover_of_bos) -> None:
    """With and without a cache, what follows it sees what the prompt saw."""
    (row,) = rows_of(left("bttitit"))
    options = {"suppress_tokens": None, "output_scores": True, "return_dict_in_generate": True}
    cached, anew = (write(lover_of_bos, row, **options, use_cache=use) for use in (True, False))
    assert (cached.sequences[:, -NEW:] == BOS).all()
    other = write(lover_of_bos, {**row, "pixel_values": -row["pixel_values"]}, **options)
    for one, two, changed in zip(cached.scores, anew.scores, other.scores, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
        assert not torch.allclose(one, changed, atol=1e-4)


def test_what_pads_is_not_read(model) -> None:
    """More padding on the left, and other tokens in it, change nothing."""
    batch = left(*RAGGED)
    wider = {name: torch.nn.functional.pad(batch[name], (8, 0)) for name in ("input_ids", "attention_mask")}
    wider["input_ids"][wider["attention_mask"] == 0] = 77
    assert torch.equal(write(model, {**batch, **wider})[:, -NEW:], write(model, batch)[:, -NEW:])
