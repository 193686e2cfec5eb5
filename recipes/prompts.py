# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""All texts that are put around data: in training, generation and evaluation the same.

Sections are those of data_and_evaluation.md, which describes the released code. A space or newline counts: the model sees
it. `{image}` stands for the placeholders of the images, `{text}` for what the user gives.
"""

# ---- one question about one image: section 1.5, as released ----

QUESTION_REQUEST = "Based on the image, please answer the question. "  # then the image and the question
# The release trains without this request and evaluates with it; here half of the training questions have it, so that
# the two forms do not drift apart.
ONE_WORD_REQUEST = " Please provide an accurate answer within one word."
ANSWER_BEGIN = "The answer is"

# ---- captions as dialogues ----

DESCRIBE_REQUEST = "Could you provide a short description of the image?"  # section 1.5, as released, for evaluation
CAPTION_BEGIN = "A photo of"
# Ours; the release draws from 17 and 69 paraphrases (section 1.5).
DESCRIBE_REQUESTS = (
    DESCRIBE_REQUEST,
    "Describe the image briefly.",
    "What does this picture show?",
    "Give a short caption for the picture.",
    "Say in a few words what can be seen here.",
)
RECONSTRUCT_REQUEST = "Reconstruct the full image from its description: "  # section 1.5, as released, for evaluation
DRAW_REQUESTS = (
    "Please draw the complete picture that this description belongs to: ",
    RECONSTRUCT_REQUEST,
    "Make a picture of the following: ",
    "Show what these words describe: ",
)

# ---- phrases and boxes: section 2.7, as released ----

GROUNDING_REQUEST = " Provide the bounding box coordinate of the region this sentence describes: {phrase}. "
GROUNDING_ANSWER = "the bounding box coordinate is<box>{box}</box>"
REFERRING_REQUEST = " Provide a sentence that describes the region "  # then the region
REFERRING_REQUEST_END = ". "

# ---- marked regions: section 2.8 ----

# What the first turn asks for, by kind of data. Ours; the release has instructions of the same sense.
REGION_INSTRUCTIONS = {
    "category": "Name the category of each marked region, in one or two words.",
    "part": "Name the object and the part of it that each marked region shows. The classes are: {classes}.",
    "refcoco": "Describe the marked region so that it can be told from others: what it is, where it is and what it "
    "looks like.",
    "refcoco+": "Describe the marked region by what it looks like and how it stands to others, without saying where in "
    "the picture it is.",
    "phrases": "Here is an overview of the picture. Some of its regions are marked in the following.",
}
# Ours, as the instructions.
REGION_REQUESTS = (
    "Give a short description of this region.",
    "What is shown here?",
    "Describe the marked part in a few words.",
    "What can be seen in this region?",
    "Say briefly what this region contains.",
    "Caption this region.",
)
DETAIL_REQUEST = " Describe this region in detail."  # Osprey's descriptions; ours
REASON_REQUESTS = ("Why?", "Why do you think so?", "What is the reason?", "How can you tell?")  # VCR; ours
REGION_NAME = "<ref>region{number}</ref> "  # then the region; as released

# The form of dialogues in the released region stage, spelling included (section 2.8).
RELEASED_SYSTEM = "You are a helpful assistant.\n\n"
RELEASED_MARKERS = {"user": "## user", "assistant": "## asistant"}

# ---- prompts at inference, in the forms in which the paper evaluates (section 1.5) ----

# What the user says and how the answer begins; None: no dialogue at all.
PROMPTS = {
    "question": (f"{QUESTION_REQUEST}{{image}}{{text}}{ONE_WORD_REQUEST}", f" {ANSWER_BEGIN}"),
    "caption": (f"{{image}}{{text}} {DESCRIBE_REQUEST} ", f" {CAPTION_BEGIN}"),
    "chat": ("{image}{text} ", ""),
    "draw": (f"{{image}}{RECONSTRUCT_REQUEST}{{text}} ", ""),
    "plain": ("{image}{text}", None),
}

# ---- texts that the small language model of `recipes/parts.py` is trained on; ours ----

PARTS_DIALOGUE = "You are a helpful assistant.\n\n ## USER: {user}\n ## ASSISTANT: {assistant}"
PARTS_DESCRIBE_REQUESTS = (f"{DESCRIBE_REQUEST} ", "Describe the image in one sentence. ")
