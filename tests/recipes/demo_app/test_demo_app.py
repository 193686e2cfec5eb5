# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The web demo without a browser: work that stops, files and strokes, a conversation, and the viewer's figures."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deem_fixtures import tiny_model
from PIL import Image

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from processing.regions_deem import Region
from recipes import inspect_image
from recipes.app import AppArguments, load_checkpoints
from recipes.generation.checkpoint import make_scheduler
from recipes.seeing.views import look

gr = pytest.importorskip("gradio", reason='the demo needs gradio: pip install -e ".[demo]"')

from recipes.demo_app.chat import DRAW_WHEN, Settings, Turn, converse, new_turn  # noqa: E402  after the skip
from recipes.demo_app.drawing import usable_schedulers  # noqa: E402
from recipes.demo_app.layout import build_app  # noqa: E402
from recipes.demo_app.seeing import whole_numbers  # noqa: E402
from recipes.demo_app.uploads import marked_image, open_upload  # noqa: E402
from recipes.demo_app.work import checked_seed, reports_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def handler(app: Any, name: str) -> Callable[..., Iterator]:
    """The function behind a named button of the page, and the components that it fills."""
    (found,) = [one for one in app.fns.values() if one.api_name == name]
    return found


# ---- work ----


def test_reports_come_and_then_the_result() -> None:
    assert list(reports_of(lambda report: [report(1), report(2)] and "done")) == [1, 2, "done"]


def test_a_sentence_reaches_the_user_and_other_errors_the_log() -> None:
    def refuse(report: Any) -> None:
        raise ValueError("Give a circle.")

    with pytest.raises(gr.Error, match="Give a circle"):
        list(reports_of(refuse))
    with pytest.raises(ZeroDivisionError):
        list(reports_of(lambda report: 1 / 0))
    assert list(reports_of(lambda report: "next")) == ["next"]  # an error leaves nothing locked


def test_closing_stops_the_work() -> None:
    steps = []

    def work(report: Any) -> None:
        while True:
            steps.append(None)
            report(len(steps))
            time.sleep(0.001)

    stream = reports_of(work)
    next(stream)
    stream.close()
    assert list(reports_of(lambda report: "next")) == ["next"]  # it waits until the work has ended
    number = len(steps)
    time.sleep(0.05)
    assert len(steps) == number


@pytest.mark.parametrize("seed", [None, -1, 2**63])
def test_a_seed_that_is_none(seed: int | None) -> None:
    with pytest.raises(ValueError, match="The seed is"):
        checked_seed(seed)


# ---- files and strokes ----


def test_a_file_that_is_no_image_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear all")
    (tmp_path / "strip.png").write_bytes(b"")
    Image.new("RGB", (900, 10)).save(tmp_path / "long.png")
    for name in ("letter.png", "strip.png", "long.png"):
        with pytest.raises(ValueError, match=f"^{name} cannot be read as an image") as refused:
            open_upload(str(tmp_path / name))
        assert str(tmp_path) not in str(refused.value)
    with pytest.raises(ValueError, match="no image yet"):
        open_upload(None)
    with pytest.raises(ValueError, match="gone.png is no longer there"):
        open_upload({"path": str(tmp_path / "gone.png")})


def test_strokes_are_a_mask_a_box_or_a_point(picture: Image.Image) -> None:
    strokes = Image.new("RGBA", picture.size)
    strokes.paste((255, 0, 0, 255), (10, 20, 30, 40))
    editor = {"background": picture, "layers": [strokes], "composite": picture}
    assert marked_image(editor, "mask", 0.1)[1].sum() == 400
    assert marked_image(editor, "box", 0.1)[1] == Region(box=(10, 20, 30, 40))
    assert marked_image(editor, "point", 0.1)[1] == Region(point=(19.5, 29.5), radius=0.1)
    assert marked_image({**editor, "layers": []}, "mask", 0.1)[1] is None
    assert marked_image({"background": None, "layers": []}, "mask", 0.1) is None
    clear = Image.new("RGBA", picture.size)
    assert marked_image({"background": clear, "layers": []}, "mask", 0.1) is None
    with pytest.raises(ValueError, match="on no image"):
        marked_image({"background": clear, "layers": [strokes]}, "mask", 0.1)
    clear.putpixel((0, 0), (0, 0, 0, 255))
    assert marked_image({"background": clear, "layers": []}, "mask", 0.1)[0].getpixel((1, 1)) == (255, 255, 255)


def test_words_that_are_no_numbers() -> None:
    assert whole_numbers("1, 2 3", "Seeds") == [1, 2, 3] and whole_numbers(" ", "Seeds") == []
    with pytest.raises(ValueError, match="Seeds: '1 two' are not whole numbers"):
        whole_numbers("1 two", "Seeds")


# ---- a conversation ----


def reports(model: Any, processor: DeemProcessor, turns: list[Turn], **settings: Any) -> list[tuple]:
    told: list[tuple] = []
    converse(model, processor, turns, Settings(max_new_tokens=6, num_inference_steps=2, **settings), told.append)
    return told


def test_it_writes_and_draws_as_the_model_does(model, tiny_processor: DeemProcessor, picture: Image.Image) -> None:
    turn = Turn("What is it?", [picture], [None])
    told = reports(model, tiny_processor, [turn], draw_when=DRAW_WHEN[1], max_pieces=3)
    assert [report for report in told if report[0] == "step"] == [("step", 1), ("step", 2)]
    pieces = [value for kind, value in told if kind == "piece"]
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = tiny_processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = model.generate_interleaved(
        **tiny_processor(text=prompt, images=[picture], return_tensors="pt"),
        image_processor=tiny_processor.image_processor,
        max_pieces=3,
        draw_every_turn=True,
        max_new_tokens=6,
        num_inference_steps=2,
        guidance_scale=3.5,
        do_sample=False,
        generator=[torch.Generator().manual_seed(0)],
        scheduler=model.image_decoder.make_scheduler("DDIMScheduler"),
    ).pieces[0]
    assert pieces[0] == tiny_processor.decode(expected[0], skip_special_tokens=True).strip()
    drawn = (expected[1] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(pieces[1]), drawn)
    texts = [value for kind, value in told if kind == "text"]
    assert texts[0] != texts[1] and texts[1].startswith(texts[0].rstrip("\ufffd"))  # as it grows


def test_what_was_said_and_drawn_before_counts(model, tiny_processor: DeemProcessor, picture: Image.Image) -> None:
    first = Turn("What is it?", [picture], [None], answer=["a star", picture])
    again = Turn("And now?")
    after = reports(model, tiny_processor, [first, again], draw_when=DRAW_WHEN[2])
    alone = reports(model, tiny_processor, [again], draw_when=DRAW_WHEN[2])
    refused = Turn("nonsense", refused=True)
    assert after != alone == reports(model, tiny_processor, [refused, again], draw_when=DRAW_WHEN[2])
    assert not any(kind == "step" for kind, _ in after)


def test_a_region_counts(model, tiny_processor: DeemProcessor, picture: Image.Image) -> None:
    whole = reports(model, tiny_processor, [Turn("a", [picture], [None])], draw_when=DRAW_WHEN[1], max_pieces=2)
    turn = Turn("a", [picture], [Region(box=(0, 0, 16, 16))])
    part = reports(model, tiny_processor, [turn], draw_when=DRAW_WHEN[1], max_pieces=2)
    assert not np.array_equal(np.asarray(whole[-1][1]), np.asarray(part[-1][1]))


def test_the_marked_image_goes_along_once(picture: Image.Image) -> None:
    message, marked = {"text": "and?", "files": []}, (picture, None)
    first = new_turn(message, [], marked)
    assert len(first.images) == 1 and not new_turn(message, [first], marked).images
    assert len(new_turn(message, [first], (picture, Region(point=(1, 1)))).images) == 1
    top, middle = np.zeros((48, 64), dtype=bool), np.zeros((48, 64), dtype=bool)
    top[10, 10], middle[24, 30] = True, True  # painted anew, somewhere else
    painted = new_turn(message, [], (picture, top))
    assert not new_turn(message, [painted], (picture, top)).images
    assert len(new_turn(message, [painted], (picture, middle)).images) == 1
    with pytest.raises(ValueError, match="Nothing was said"):
        new_turn({"text": " ", "files": []}, [], None)


def test_what_is_on_the_page_is_what_the_model_knows(model, tiny_processor: DeemProcessor, tmp_path: Path) -> None:
    answer = handler(build_app({"tiny": (model, tiny_processor)}), "chat").fn
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")

    def say(text: str, history: list[dict], turns: list[Turn], files: Any = (), **changes: Any) -> tuple:
        settings = {"max_new_tokens": 6, "temperature": 0.0, "draw_when": DRAW_WHEN[2], "max_pieces": 1}
        settings |= {"num_inference_steps": 2, "guidance_scale": 3.5, "seed": 0} | changes
        message = {"text": text, "files": list(files)}
        *_, (_, history, turns) = _run(answer, message, history, turns, None, "mask", 0.05, *settings.values())
        return history, turns

    history, one = say("a", [], [])
    _, two = say("b", history, one)
    assert [turn.text for turn in two] == ["a", "b"] and len(one) == 1
    assert say("b", history, two)[1] == two  # asked again
    assert [turn.text for turn in say("c", [], two)[1]] == ["c"]  # all was cleared

    # Asked again, files come as dicts.
    path = str(tmp_path / "a.png")
    (first,), (again,) = (say("a", [], [], [file])[1] for file in (path, {"path": path, "meta": {}}))
    assert first.answer == again.answer and first.images == again.images

    # What goes wrong is said, stands on the page, and the model does not see it.
    history, refused = say("a", [], [], seed=None)
    assert refused[0].refused and "The seed is empty" in history[-1]["content"]
    assert say("b", history, refused)[1][1].answer == say("b", [], [])[1][0].answer
    assert say("", history, refused)[1] == refused  # nothing was said, and nothing stands on the page
    stopped = [*history, {"role": "user", "content": "b"}]  # before it began
    assert [turn.refused for turn in say("c", stopped, refused)[1]] == [True, True, False]


def test_an_error_within_is_no_end_of_the_conversation(
    model, tiny_processor: DeemProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = handler(build_app({"tiny": (model, tiny_processor)}), "chat").fn

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory at /secret")

    monkeypatch.setattr(model, "stream_interleaved", fail)
    message = {"text": "a", "files": []}
    *_, (_, history, turns) = _run(answer, message, [], [], None, "mask", 0.05, *asdict(Settings()).values())
    assert turns[0].refused and "went wrong" in history[-1]["content"] and "secret" not in history[-1]["content"]


def test_one_request_at_a_time(model, tiny_processor: DeemProcessor) -> None:
    app = build_app({"tiny": (model, tiny_processor)})
    computing = [function for function in app.fns.values() if function.types_generator]
    assert len(computing) >= 4 and {function.concurrency_id for function in computing} == {"model"}


def _run(fn: Callable, *arguments: Any) -> list[Any]:
    """What an asynchronous handler of Gradio yields."""

    async def collect() -> list[Any]:
        return [item async for item in fn(*arguments)]

    return asyncio.run(collect())


# ---- what the encoder sees ----


def assert_same(figures: dict[str, Any], others: dict[str, Any]) -> None:
    """Equal but for rounding: weights that were loaded lie elsewhere in memory, and sums come in another order."""
    assert figures["error"] == pytest.approx(others["error"], rel=1e-5)
    assert figures["timesteps"] == pytest.approx(others["timesteps"], rel=1e-5)
    assert figures["tokens"] == pytest.approx(others["tokens"], abs=1e-6)


def test_app_viewer_and_model_have_the_same_figures(
    model, tiny_processor: DeemProcessor, picture: Image.Image, tmp_path: Path
) -> None:
    file = str(tmp_path / "a.png")
    picture.save(file)
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    app = build_app(load_checkpoints(AppArguments(model=str(tmp_path / "checkpoint"))))
    see = handler(app, "see").fn
    *progress, shown = see(file, "3 4", "", 2, True, 2, 1.0)
    assert len(progress) > 2 and all("passes" in next(iter(told.values())) for told in progress)
    (views,) = [value for value in shown.values() if isinstance(value, dict)]
    figures = views["checkpoint"].figures()

    options = {"seeds": [3, 4], "num_noise": 2, "num_inference_steps": 2}
    (view,) = look(model, tiny_processor, [file], **options)
    assert_same(figures, view.figures())
    for shown_image, image in zip(views["checkpoint"].redrawn, view.redrawn, strict=True):
        assert np.abs(np.asarray(shown_image, float) - np.asarray(image, float)).max() <= 1
    viewer = inspect_image.InspectArguments(
        model=str(tmp_path / "checkpoint"), images=[file], out=str(tmp_path / "seen"), **options
    )
    assert_same(inspect_image.inspect(viewer, viewer.model)[0].figures(), figures)
    inputs = tiny_processor.image_processor(picture, return_targets=True, return_tensors="pt")
    error = model.image_error(**inputs, num_noise=2, per_token=True, seed=3)
    assert figures["error"] == pytest.approx(float(error.image_errors[0]), rel=1e-5)
    assert figures["tokens"] == pytest.approx(error.token_errors[0].tolist(), abs=1e-6)
    words = [value for component, value in shown.items() if isinstance(component, gr.Markdown)]
    assert any(f"{figures['error']:.4f}" in value for value in words)


def test_a_stopped_look_computes_no_more(
    model, tiny_processor: DeemProcessor, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "a.png")
    passes = []
    handle = model.image_decoder.denoiser.register_forward_hook(lambda *_: passes.append(None))
    see = handler(build_app({"tiny": (model, tiny_processor)}), "see").fn
    stream = see(str(tmp_path / "a.png"), "0", "", 1, False, 50, 1.0)
    next(stream)
    stream.close()
    assert list(reports_of(lambda report: "next")) == ["next"]  # it waits until the work has ended
    handle.remove()
    assert len(passes) < 10 and not model.image_decoder.denoiser._forward_hooks


# ---- drawing ----


def test_drawing_shows_previews_and_ends_with_the_image(model, tiny_processor: DeemProcessor) -> None:
    draw = handler(build_app({"tiny": (model, tiny_processor)}), "draw").fn
    *steps, (image, words) = draw("a red circle", None, 4, 2.0, "DDIMScheduler", 1)
    assert [told for _, told in steps] == [f"step {step} of 4" for step in (1, 2, 3, 4)] and "seed 1" in words
    assert all(isinstance(preview, Image.Image) for preview, _ in steps)
    assert np.abs(np.asarray(steps[-1][0], float) - np.asarray(image, float)).max() <= 1
    with pytest.raises(gr.Error, match="Nothing to draw from"):
        list(draw(" ", None, 4, 2.0, "DDIMScheduler", 1))
    *steps, (_, words) = draw("a red circle", None, 4, 2.0, "HeunDiscreteScheduler", 1)
    assert steps[-1][1] == "step 7 of 7" and "7 steps" in words  # Heun's takes two passes in a step, but in the last


def test_schedulers_that_are_offered_draw(model) -> None:
    offered = usable_schedulers(model)
    assert {"DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"} <= set(offered)
    for name in offered:
        make_scheduler(model, name)


def test_a_model_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tiny"):
        load_checkpoints(AppArguments(model=str(tmp_path)))
