# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Caption scores and words against pycocoevalcap's, and worked by hand."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recipes.evaluation.scoring.captions import (
    Scores,
    bleu,
    bleu_counts,
    bleu_figure,
    cider_d,
    meteor,
    meteor_missing,
    rouge_l,
)
from recipes.evaluation.scoring.intervals import bootstrap_interval
from recipes.evaluation.scoring.ptb import ptb_tokenize

needs_java = pytest.mark.skipif(meteor_missing() is not None, reason=str(meteor_missing()))


def test_words_equal_the_official_ones(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/ptb_tokenisation.json")["cases"]:
        assert " ".join(ptb_tokenize(case["input"])) == case["expected"], case["input"]
    for case in shared_file("vectors/captioning.json")["cases"]:
        for image, texts in case["references"].items():
            assert [" ".join(ptb_tokenize(text)) for text in texts] == case["tokenised_references"][image]


def test_scores_equal_the_official_ones(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/captioning.json")["cases"]:
        predictions = [case["predictions"][image] for image in case["references"]]
        references = list(case["references"].values())
        names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"]
        expected = Scores(
            [case["corpus"][name] for name in names], np.array([case["per_image"][name] for name in names]).T
        )
        assert_close(bleu(predictions, references), expected)
        for name, metric in (("ROUGE_L", rouge_l), ("CIDEr", cider_d)):
            expected = Scores(case["corpus"][name], np.array(case["per_image"][name]))
            assert_close(metric(predictions, references), expected)


@needs_java
def test_meteor_equals_the_official_one(shared_file: Callable[[str], Any]) -> None:
    """One test: the Java program takes seconds to start."""
    for case in shared_file("vectors/captioning.json")["cases"]:
        predictions = [case["predictions"][image] for image in case["references"]]
        expected = Scores(case["corpus"]["METEOR"], np.array(case["per_image"]["METEOR"]))
        assert_close(meteor(predictions, list(case["references"].values())), expected)
    scores = meteor(["", "a red dog"], [["a cat"], ["a red dog"]])
    assert scores.per_image[0] == 0.0 and scores.per_image[1] > 0.9


def test_scores_equal_those_of_pycocoevalcap_on_random_captions(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    drawn = random.Random(0)
    for _ in range(200):
        vocabulary = [f"w{index}" for index in range(drawn.choice((3, 10, 50)))]

        def caption(words: list[str] = vocabulary) -> str:
            return " ".join(drawn.choices(words, k=drawn.randint(1, 12)))

        references = [[caption() for _ in range(drawn.randint(1, 5))] for _ in range(drawn.randint(2, 8))]
        predictions = [drawn.choice((caption(), drawn.choice(expected))) for expected in references]
        expected, said = dict(enumerate(references)), {index: [text] for index, text in enumerate(predictions)}
        corpus, per_image = Bleu(4).compute_score(expected, said, verbose=0)
        assert_close(bleu(predictions, references, str.split), Scores(corpus, np.array(per_image).T))
        assert_close(rouge_l(predictions, references, str.split), Scores(*Rouge().compute_score(expected, said)))
        assert_close(cider_d(predictions, references, str.split), Scores(*Cider().compute_score(expected, said)))


@needs_java
def test_words_equal_those_of_the_java_tokenizer() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    pieces = (
        "a man woman dog the two 10 1st St. U.S. Mr. o'clock it's don't dogs' t-shirt two-story AT&T 5:30 p.m. 1,000 1/2 and/or "
        "No. 5 #1 $5 50% & \" ' ( ) , . ! ? ; : - -- ... they're 'quoted' \"big\" café T.V. D.C. black/white 747 8x10 etc. vs. "
        "3-year-old can't cannot gonna Jr. rock 'n' roll Coca-Cola I'm 6'2\" wine. horse, bus; train! laptop(s) 35mm"
    ).split()
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(pieces, k=drawn.randint(4, 12))) for _ in range(300)]
    official = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(texts)})
    for index, text in enumerate(texts):
        assert " ".join(ptb_tokenize(text)) == " ".join(official[index][0].split()), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's two-story T-shirt, isn't it?!", "a man 's two-story t-shirt is n't it ?!"),
        ("“Cannot” — wait… (no) [x]", "can not wait -lrb- no -rrb- -lsb- x -rsb-"),
        ("At 5:30 p.m. on Main St. No. 5.", "at 5:30 p.m. on main st. no. 5"),
        ("in vitamin C. The dog", "in vitamin c the dog"),
        ("", ""),
        ("?", ""),
    ],
)
def test_words_by_hand(text: str, words: str) -> None:
    assert " ".join(ptb_tokenize(text)) == words


def test_bleu_by_hand() -> None:
    scores = bleu(["the the the cat"], [["the cat sat", "a cat on the mat"]])
    assert scores.corpus[0] == pytest.approx(2 / 4, abs=1e-8)  # "the" counts once, as in either reference
    assert scores.corpus[1] == pytest.approx((2 / 4 * 1 / 3) ** 0.5, abs=1e-8)
    short = bleu(["a cat"], [["a cat on the mat"]])
    assert short.corpus[0] == pytest.approx(np.exp(1 - 5 / 2), abs=1e-8)


def test_rouge_by_hand() -> None:
    assert rouge_l(["a b c d"], [["a c"]]).corpus == pytest.approx(2.44 * 0.5 / (1 + 1.44 * 0.5))
    assert rouge_l(["", "x"], [["a"], ["a"]]).corpus == 0.0


def test_cider_of_equal_captions_is_ten_and_of_one_image_none() -> None:
    texts = ["a red dog runs far", "two cats sleep here now"]
    assert cider_d(texts, [[text] for text in texts]).per_image == pytest.approx([10.0, 10.0])
    with pytest.warns(UserWarning, match="single image is 0"):
        assert cider_d(texts[:1], [texts[:1]]).corpus == 0.0


def test_an_empty_caption_scores_zero() -> None:
    for metric in (bleu, rouge_l, cider_d):
        scores = metric(["", "a red dog"], [["a cat"], ["a red dog"]])
        assert np.all(scores.per_image[0] < 1e-8) and np.isfinite(scores.per_image).all()


def test_bleu_of_summed_counts_gives_an_interval() -> None:
    predictions = ["a red dog runs", "two cats sit", "a bus", "a man on a horse"] * 5
    references = [["a red dog runs far"], ["two cats sleep"], ["a big bus"], ["a man rides a horse"]] * 5
    counts = bleu_counts(predictions, references)
    interval = bootstrap_interval(counts, bleu_figure(1))
    assert interval.value == pytest.approx(bleu(predictions, references).corpus[0])
    assert interval.low < interval.value < interval.high


def test_meteor_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "no `java` on the path" in str(meteor_missing())
    with pytest.raises(RuntimeError, match="install a JRE"):
        meteor(["a"], [["a"]])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        bleu(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="image 1 has"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="image 0 has 'a'"):
        rouge_l(["a"], ["a"])
    with pytest.raises(ValueError, match="got 0 for 0 images"):
        bleu([], [])


def assert_close(given: Scores, expected: Scores) -> None:
    np.testing.assert_allclose(given.corpus, expected.corpus, atol=1e-6, rtol=0)
    np.testing.assert_allclose(given.per_image, expected.per_image, atol=1e-6, rtol=0)
