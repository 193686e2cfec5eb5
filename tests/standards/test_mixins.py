# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""transformers' own mixins, unmodified, against every class of DEEM: `make standards` (docs in upstream.py).

The testers are built as transformers builds those of its own vision-language models: a tiny real model, rows with one
picture each. Every vision encoder, language model and denoiser takes its turn in one of the combinations.
"""

import unittest
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from deem_fixtures import SIDE, Q, tiny_config, tiny_draws
from family_fixtures import DIFFUSIONS, text_config, vision_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import is_torchvision_available
from upstream import MISSING, load, why_absent

from modeling_deem import DeemConfig, DeemForConditionalGeneration, DeemModel
from modeling_deem.vision_deem import STAGED_ENCODERS
from processing import DeemImageProcessor, DeemImageProcessorPil, DeemProcessor

if reason := why_absent():
    pytest.skip(reason, allow_module_level=True)

ModelTesterMixin = load("test_modeling_common").ModelTesterMixin
GenerationTesterMixin = load("generation.test_utils").GenerationTesterMixin
ConfigTester = load("test_configuration_common").ConfigTester
processing_common = load("test_processing_common")
image_processing_common = load("test_image_processing_common")

# Vision encoder, language model, denoiser.
COMBINATIONS = [
    ("dinov2", "qwen2", "sana"),
    ("clip_vision_model", "qwen3", "pixart"),
    ("siglip_vision_model", "llama", "unet"),
    ("convnextv2", "llama", "unet"),
]
PIL_ONLY = {"pil": DeemImageProcessorPil}
HAS_TORCHVISION = is_torchvision_available()
# Ids below any vocabulary that the mixins shrink to.
PAD, BOS, EOS, START, IMAGE, FIRST_TEXT, VOCABULARY = 0, 1, 2, 3, 4, 5, 99


@pytest.fixture(autouse=True, scope="module")
def in_the_tables_of_names():
    """The mixins tell a headless model from one with a language-model head by tables of class names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_MAPPING_NAMES, "deem", "DeemModel")
        patch.setitem(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "deem", "DeemForConditionalGeneration")
        yield


class DeemModelTester:
    """What the mixins ask about a tiny model; `vision`, `text` and `denoiser` name its parts."""

    vision: str
    text: str
    denoiser: str

    is_training = True
    batch_size, num_image_tokens, seq_length, vocab_size = 4, Q, 7 + Q, VOCABULARY
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    image_token_id, pad_token_id = IMAGE, PAD

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.vision_config = vision_config(self.vision).to_dict()

    def get_config(self) -> DeemConfig:
        tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": self.num_hidden_layers}
        return tiny_config(
            vision_config=vision_config(self.vision),
            text_config=text_config(self.text, **sizes, **tokens),
            image_decoder_config=DIFFUSIONS[self.denoiser],
            image_attention_interval=1,
            image_token_id=IMAGE,
            start_of_image_token_id=START,
            **tokens,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DeemConfig, dict[str, Any]]:
        """Each row: bos, a token, a picture, four tokens."""
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(FIRST_TEXT, VOCABULARY, shape)
        input_ids[:, 0], input_ids[:, 2], input_ids[:, 3 : 3 + Q] = BOS, START, IMAGE
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(self.batch_size, 3, SIDE, SIDE),
        }
        return self.get_config(), inputs


class DeemModelTestBase:
    """What is common to the combinations; no class of its own that pytest would collect."""

    all_model_classes = (DeemModel, DeemForConditionalGeneration)
    _is_composite = True
    model_tester_class: type[DeemModelTester]

    def setUp(self):
        super().setUp()
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=DeemConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "num_image_tokens", "feature_size"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Labels are DEEM's text targets. With them go the pictures to draw, as in every batch of the collator, and the
        draws of the diffusion losses, so that two forwards are comparable."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DeemForConditionalGeneration:
            inputs["target_pixel_values"] = torch.zeros_like(inputs["pixel_values"])
            count = len(inputs["pixel_values"])
            inputs |= {"consistency_draws": tiny_draws(count), "image_draws": tiny_draws(count, image=True)}
        return inputs


class StagedEncoderTest:
    """The mixins know the sizes of ViTs only: one hidden_size, as many hidden states as layers, attention in each."""

    skip_test_image_features_output_shape = True  # last_hidden_state is a map, and its config has sizes, not one size

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return len(self.model_tester.vision_config["depths"]) + 1

    @unittest.skip("ConvNeXt has no attention")
    def test_get_image_features_attentions(self):
        pass


for _vision, _text, _denoiser in COMBINATIONS:
    _tester = type("Tester", (DeemModelTester,), {"vision": _vision, "text": _text, "denoiser": _denoiser})
    _name = f"Deem_{_vision}_{_text}_{_denoiser}_Test"
    _bases = (DeemModelTestBase, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase)
    _bases = (StagedEncoderTest, *_bases) if _vision in STAGED_ENCODERS else _bases
    globals()[_name] = type(_name, _bases, {"model_tester_class": _tester, "__module__": __name__})
del _tester, _name, _bases


@pytest.mark.skipif(bool(MISSING), reason=f"not in this copy of transformers' tests: {', '.join(MISSING)}")
def test_nothing_is_stood_in_for():
    """So that what does not run is seen in the report."""


class DeemImageProcessingTester(image_processing_common.ImageProcessingTester):
    """Sizes unequal to the defaults; both backends are looked up by name, since DEEM is in no table of transformers."""

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        kwargs.setdefault("target_size", {"height": 20, "width": 20})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.2, 0.3, 0.4])
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": DeemImageProcessor, "pil": DeemImageProcessorPil} if HAS_TORCHVISION else PIL_ONLY


class DeemImageProcessingTest(image_processing_common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = DeemImageProcessingTester

    @unittest.skipUnless(HAS_TORCHVISION, "DeemImageProcessor is there, but needs torchvision, which is not installed")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()

    @unittest.skip("It loads in a process that never imports DEEM, whose classes transformers then cannot know")
    def test_pil_can_run_without_torchvision(self):
        pass


class DeemProcessorTest(processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = DeemProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return DeemImageProcessorPil(size={"height": 64, "width": 64}, target_size={"height": 64, "width": 64})

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": Q}
