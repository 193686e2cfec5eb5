# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A checkpoint -> a repo folder that loads anywhere with `trust_remote_code=True` -> the Hub.

    python hub_upload.py runs/demo/sft --repo org/deem --dry-run     # writes and tests the folder, uploads nothing
    python hub_upload.py runs/demo/sft --repo org/deem --private     # the same, then uploads it

The folder holds the weights, the tokenizer, the image processor, the chat template, a model card and, flat beside them,
every code file of `modeling_deem` and `processing`. Before anything is uploaded it is loaded in a process that cannot
import the two packages, through AutoModel, AutoModelForImageTextToText, AutoProcessor and the pipeline; what it writes
and draws must equal what the package makes of the checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from recipes.evaluation.predictions import digest
from recipes.run_report.card import examples, find_record, write_card
from recipes.run_report.model_index import benchmark_tables, eval_results

ROOT = Path(__file__).resolve().parent
PACKAGES = ("modeling_deem", "processing")
# What of a checkpoint belongs on the Hub; optimizer, random and trainer states do not.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
COPIED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "LICENSE*"),
)
MODEL = "modeling_deem.DeemForConditionalGeneration"
IMAGE_PROCESSORS = {
    "pil": "image_processing_pil_deem.DeemImageProcessorPil",
    "torchvision": "image_processing_deem.DeemImageProcessor",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_deem.DeemProcessor", "AutoImageProcessor": IMAGE_PROCESSORS}
CONFIG_MAP = {
    "AutoConfig": "configuration_deem.DeemConfig",
    "AutoModel": MODEL,
    "AutoModelForImageTextToText": MODEL,
    "AutoModelForMultimodalLM": MODEL,
    **PROCESSOR_MAP,
}

# What the folder is asked in the process without the packages, and the checkpoint in a process with them.
PROBE = """
import json, sys
folder, with_package, drawing_steps = sys.argv[1], sys.argv[2] == "package", int(sys.argv[3])
if with_package:
    import modeling_deem
else:  # even where they are installed
    sys.modules["modeling_deem"] = sys.modules["processing"] = None

import numpy as np, PIL.Image, torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

trust = {} if with_package else {"trust_remote_code": True}
size, tokens = (48, 80, 3), 8
picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}]
words = [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
processor = AutoProcessor.from_pretrained(folder, **trust)
image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
classes = [type(processor).__name__, type(image_processor).__name__]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
answers = []
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, **trust)
    classes.append(type(model).__name__)
    for messages in (chat, words):
        inputs = processor.apply_chat_template(messages, **options)
        answers.append(model.generate(**inputs, max_new_tokens=tokens, do_sample=False).tolist())
drawn = None
if drawing_steps and model.config.image_decoder_config is not None:
    generator = torch.Generator().manual_seed(0)
    picture = model.generate_images(**inputs, num_inference_steps=drawing_steps, generator=generator)
    drawn = torch.nn.functional.adaptive_avg_pool2d(picture, 8).flatten().tolist()
del model
pipe = pipeline("image-text-to-text", model=folder, **trust)
classes += [type(pipe.model).__name__, type(pipe.processor).__name__]
answers.append(pipe(text=chat, max_new_tokens=tokens, return_full_text=False)[0]["generated_text"])
print("PROBE " + json.dumps({"classes": classes, "answers": answers, "drawn": drawn}))
"""


# ---- the folder -------------------------------------------------------------------------------------------------------


def code_files() -> list[Path]:
    """The code files that travel: both packages without their `__init__.py` and what no DEEM runs, trainer and feedback.

    Raises:
        ValueError: if two of them have the same name, since they are to lie in one folder.
    """
    stay = ("__init__", "adapters_deem", "training_deem")
    files = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py") if path.stem not in stay)
    files = [path for path in files if not path.stem.startswith("feedback_")]
    if twice := [name for name, count in Counter(path.name for path in files).items() if count > 1]:
        raise ValueError(f"Both packages have a file {twice}; on the Hub they lie in one folder. Rename one of them.")
    return files


def digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed_code(checkpoint: Path) -> list[str] | None:
    """Names of the code files that are not what they were when the checkpoint was saved; None if it does not say.

    `save_pretrained` of model and processor leaves SHA-256 digests of their code in `code_digests.json`.
    """
    path = checkpoint / "code_digests.json"
    if not path.is_file():
        return None
    then = json.loads(path.read_text(encoding="utf-8"))
    now = digests(code_files())
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_repo(checkpoint: Path, out: Path) -> None:
    """Writes the repo folder without its model card; `out` is replaced when the new one is whole.

    Raises:
        ValueError: if `checkpoint` is no whole DEEM checkpoint, saying what it lacks, or `out` is something else than
            an earlier repo folder, or reaches into the checkpoint or the package.
    """
    check_out(out, checkpoint)
    needed = ("config.json", "processor_config.json", "tokenizer_config.json", "chat_template.jinja")
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not any(checkpoint.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        hint = (
            " It holds an adapter: merge it (`merge_and_unload`) and save model and processor."
            * (checkpoint / "adapter_config.json").is_file()
        )
        raise ValueError(
            f"{checkpoint} lacks {', '.join(missing)}. Expected a folder that `save_pretrained` of a DEEM model and of "
            f"its processor wrote.{hint}"
        )
    config = read_json(checkpoint / "config.json")
    if config.get("model_type") != "deem":
        raise ValueError(f"{checkpoint} holds a model of type {config.get('model_type')!r}, expected 'deem'.")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in sorted({path for pattern in COPIED for path in checkpoint.glob(pattern) if path.is_file()}):
        shutil.copy2(path, unfinished / path.name)
    for path in code_files():
        shutil.copy2(path, unfinished / path.name)
    if (ROOT / "LICENSE").is_file():  # not where the package was installed as a wheel
        shutil.copy2(ROOT / "LICENSE", unfinished / "LICENSE")

    write_json(unfinished / "config.json", {**config, "auto_map": CONFIG_MAP})
    processor = {**read_json(checkpoint / "processor_config.json"), "auto_map": PROCESSOR_MAP}
    processor["image_processor"]["auto_map"] = {"AutoImageProcessor": IMAGE_PROCESSORS}
    write_json(unfinished / "processor_config.json", processor)
    # of the code beside it, so that a checkpoint made from this folder can be compared again
    write_json(unfinished / "code_digests.json", digests(code_files()))
    if out.exists():
        shutil.rmtree(out)
    os.replace(unfinished, out)


def check_out(out: Path, checkpoint: Path) -> None:
    """Raises `ValueError` unless a folder may be replaced: it is new, empty, or an earlier repo folder, and apart."""
    protected = {"the checkpoint": checkpoint, "the code": ROOT, **{f"the code {p}": ROOT / p for p in PACKAGES}}
    ours = out.resolve()
    for what, folder in protected.items():
        theirs = folder.resolve()
        inside = theirs in ours.parents and folder.name in PACKAGES
        if ours == theirs or ours in theirs.parents or inside:
            raise ValueError(f"{out} cannot be the repo folder: it would overwrite {what}. Name another with --out.")
    if not out.exists() or not any(out.iterdir()):
        return
    config = out / "config.json"
    if not (config.is_file() and "auto_map" in read_json(config) and (out / "modeling_deem.py").is_file()):
        raise ValueError(f"{out} exists and is no repo folder of an earlier run. Name another with --out.")


# ---- the test ---------------------------------------------------------------------------------------------------------


def probe(folder: Path, with_package: bool, drawing_steps: int, python: str = sys.executable) -> dict[str, Any]:
    """Loads a folder in a process of its own and returns what it answered.

    Args:
        with_package: whether that process imports the package; otherwise it cannot.
        drawing_steps: sampling steps of one picture; 0 for none.

    Raises:
        RuntimeError: if anything did not load or run, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": f"{elsewhere}/modules", "HF_HUB_OFFLINE": "1"}
        if with_package:
            environment["PYTHONPATH"] = str(ROOT)
        mode = "package" if with_package else "remote"
        result = subprocess.run(
            [python, "-c", PROBE, str(folder.resolve()), mode, str(drawing_steps)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
    lines = [line for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    if result.returncode or not lines:
        how = "with the package" if with_package else "with trust_remote_code=True and without the package"
        raise RuntimeError(f"{folder} does not load {how}:\n{result.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("PROBE "))


def compare_probes(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises `RuntimeError` where a folder's probe differs from the package's: classes, token ids, text, picture."""
    for what in ("classes", "answers"):
        if expected[what] != found[what]:
            raise RuntimeError(f"{what} differ from the package's: {found[what]} instead of {expected[what]}.")
    if expected["drawn"] is not None:
        # Equal weights at other addresses in memory may differ in the last bits.
        error = max(abs(a - b) for a, b in zip(expected["drawn"], found["drawn"], strict=True))
        if error > 1e-3:
            raise RuntimeError(f"The picture differs from the package's by {error:.1e}, expected at most 1e-3.")


def check_repo(folder: Path, checkpoint: Path, drawing_steps: int = 2, python: str = sys.executable) -> None:
    """Raises `RuntimeError` unless the folder, loaded by its own code, answers as the package does on the checkpoint."""
    expected = probe(checkpoint, with_package=True, drawing_steps=drawing_steps)
    compare_probes(expected, probe(folder, with_package=False, drawing_steps=drawing_steps, python=python))


def upload(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads a repo folder and takes away what an earlier upload left of weights and code; returns the commit's address.

    Raises:
        RuntimeError: the upload failed; the folder stays.
    """
    api = HfApi()
    stale = ["*.safetensors", "*.safetensors.index.json", "*.py"]  # one file of weights would hide later shards
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Upload DEEM", delete_patterns=stale
        )
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"{folder} is ready and tested, but was not uploaded to {repo}: {error}. Log in (`hf auth login`) or check the "
            "name and the connection, and give the same command again."
        ) from error
    return commit.commit_url


# ---- command line -----------------------------------------------------------------------------------------------------


PARTS = ("vision", "text", "diffusion")


def pairs(option: str, entries: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """["vision=mit", ...] -> {"vision": "mit"}; raises `ValueError` where a key is none of `keys`."""
    result = dict(entry.rpartition("=")[::2] for entry in entries)
    if wrong := [key or value for key, value in result.items() if key not in keys]:
        raise ValueError(f"{option} got {wrong}; expected KEY=VALUE with KEY one of {', '.join(keys) or '(none)'}.")
    return result


def check_results(results: dict[str, Any], checkpoint: Path) -> None:
    """Raises `ValueError` where `--results` are no results of benchmarks, or were measured on other weights."""
    weights = {path.name: digest(path) for path in checkpoint.glob("*.safetensors")} if results else {}
    for name, result in results.items():
        if not isinstance(result, dict) or not {"figures", "headline", "manifest"} <= result.keys():
            raise ValueError(f"--results: {name} is no benchmark's result; give results.json of recipes/evaluate.py.")
        measured = result["manifest"]["model"].get("weights", {})
        if {key: sha for key, sha in measured.items() if key.endswith(".safetensors")} != weights:
            raise ValueError(
                f"--results: {name} was measured on other weights than those in {checkpoint}. Evaluate this checkpoint, or "
                "leave out --results."
            )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder of model and processor")
    parser.add_argument("--repo", required=True, help="name on the Hub, such as org/deem")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--dry-run", action="store_true", help="write and test the folder, upload nothing")
    parser.add_argument("--out", type=Path, help="the folder to write; outputs/hub/<name> by default")
    parser.add_argument("--question", help="that the card's example asks; one of the training data by default")
    parser.add_argument("--caption", help="that the card's example draws; one of the training data by default")
    parser.add_argument("--code", metavar="URL", help="address of the code's repository, for the model card")
    parser.add_argument(
        "--data-names", nargs="*", default=[], metavar="SOURCE=NAME", help="what the card calls --data"
    )
    parser.add_argument("--metrics", type=Path, help="metrics.json of an evaluation, for the model card")
    parser.add_argument(
        "--results", type=Path, help="results.json of benchmarks, for the model card and its model-index"
    )
    parser.add_argument("--licence", default="other", help="licence of the weights, a Hub identifier")
    parser.add_argument("--part-licences", nargs="*", default=[], metavar="PART=LICENCE", help="of the three parts")
    parser.add_argument("--base-models", nargs="*", default=[], metavar="REPO", help="the parts' names on the Hub")
    parser.add_argument("--drawing-steps", type=int, default=2, help="of the picture drawn in the test; 0 for none")
    parser.add_argument("--python", default=sys.executable, help="interpreter that tests the folder")
    parser.add_argument("--allow-changed-code", action="store_true", help="upload although the code has changed")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes, tests and, unless told otherwise, uploads the repo folder; returns it."""
    args = make_parser().parse_args(argv)
    licences = pairs("--part-licences", args.part_licences, PARTS)
    changed = changed_code(args.checkpoint)
    if changed is None:
        print(f"Note: {args.checkpoint} does not say which code it was saved with (no code_digests.json).")
    elif changed:
        message = (
            f"The code differs from what {args.checkpoint} was saved with: {', '.join(changed)}. Check out that "
            "version, or retrain."
        )
        if not args.allow_changed_code:
            raise SystemExit(f"{message} If the change does not concern this model, add --allow-changed-code.")
        print(f"Warning: {message}")

    out = args.out or Path("outputs/hub") / args.repo.rpartition("/")[2]
    make_repo(args.checkpoint, out)
    # only figures that lie with the checkpoint are surely its own
    metrics = read_json(args.metrics) if args.metrics else find_record(args.checkpoint, "metrics.json")
    results = read_json(args.results) if args.results else find_record(args.checkpoint, "results.json")
    check_results(results, args.checkpoint)
    report = find_record(args.checkpoint, "data_report.json")
    names = pairs("--data-names", args.data_names, tuple(report))
    more = {"question": args.question, "caption": args.caption, "code": args.code, "data_names": names}
    more |= {"benchmarks": eval_results(results), "benchmark_tables": benchmark_tables(results)}
    write_card(out, args.checkpoint, args.repo, metrics, args.licence, licences, args.base_models, **more)
    print(f"Wrote {out}. Testing it without the packages.")
    check_repo(out, args.checkpoint, args.drawing_steps, args.python)
    print("It loads, and it answers as the package does.")
    if not metrics and not results:
        print("Note: the model card has no figures; give --metrics or --results of an evaluation of this model.")
    if shown := {key: text for key, text in examples(report).items() if not getattr(args, key)}:
        print(
            f"Note: the model card shows words of the training data, {shown}; give --question and --caption for others."
        )
    if unknown := [part for part in PARTS if part not in licences]:
        print(f"Note: the model card has no licence for {', '.join(unknown)}; give --part-licences PART=LICENCE.")
    if not args.dry_run:
        print(f"Uploaded: {upload(out, args.repo, args.private)}")
    return out


if __name__ == "__main__":
    main()
