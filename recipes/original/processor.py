# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The processor of a converted model."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ConvNextImageProcessorPil, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_deem import DeemConfig, DeemImageProcessorPil, DeemProcessor


def number_tokenizer(config: DeemConfig) -> PreTrainedTokenizerFast:
    """Return a stand-in for test models that have no tokenizer: words are token ids, "10 11 12" is [10, 11, 12]."""
    special = {config.bos_token_id: "<s>", config.eos_token_id: "</s>", config.pad_token_id: "<pad>"}
    first_new = min(config.image_token_id, config.start_of_image_token_id)
    names = [special.get(index, str(index)) for index in range(first_new)]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name) for name in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build_processor(config: DeemConfig, source: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> DeemProcessor:
    """Return the processor of a converted model.

    Raises:
        ValueError: if a special token does not get the id that the model was trained with.
    """
    if "<|sniffer|>" in tokenizer.get_vocab():
        raise ValueError(
            "The tokenizer already has the released image tokens ('<|sniffer|>'). Give the language model's own, "
            f"with the {min(config.image_token_id, config.start_of_image_token_id)} tokens it was trained with."
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    processor = DeemProcessor.from_parts(
        ConvNextImageProcessorPil(
            size={"shortest_edge": source["image_size"]}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
        ),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        target_size=source["dec_image_size"],
        grounding_tokens=True,
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "start_of_image_token_id"):
        owner = processor if "image" in name else processor.tokenizer
        if getattr(owner, name) != getattr(config, name):
            raise ValueError(
                f"The tokenizer gives {name} = {getattr(owner, name)}, but the model was trained with "
                f"{getattr(config, name)}. Give the tokenizer of its language model, without added tokens."
            )
    return processor


def make_processor(
    config: DeemConfig, source: dict[str, Any], tokenizer: str | None = None
) -> DeemProcessor | DeemImageProcessorPil:
    """Return the processor of a converted model, or its image processor alone.

    Args:
        source: the original's hyper-parameters.
        tokenizer: folder of the language model's tokenizer; "none" for the image processor alone. Without it, models of
            test size get `number_tokenizer`.

    Raises:
        ValueError: if a vocabulary of real size comes without its tokenizer, or with one of other ids.
    """
    if tokenizer == "none":
        return DeemImageProcessorPil(size=source["image_size"], target_size=source["dec_image_size"])
    if tokenizer is not None:
        return build_processor(config, source, AutoTokenizer.from_pretrained(tokenizer))
    if config.text_config.vocab_size >= 1000:
        raise ValueError(
            f"A vocabulary of {config.text_config.vocab_size} needs its tokenizer: --tokenizer FOLDER of the language "
            "model (Vicuna). --tokenizer none writes the model and its image processor only."
        )
    print("No --tokenizer: this test-sized vocabulary gets one whose words are token ids ('10 11 12').")
    return build_processor(config, source, number_tokenizer(config))
