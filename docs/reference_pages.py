# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Pages that MkDocs makes at build time: every public class and function, and every option of every command.

MkDocs calls `on_config` and `on_files` (`hooks` in mkdocs.yml). Options come from the parsers of the commands themselves,
so that a page cannot differ from what `--help` says.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_deem", "processing", "recipes")
# Libraries' own options, of which a recipe's page names only those with another default.
INHERITED = {"training_arguments": "transformers.TrainingArguments", "sft_config": "trl.SFTConfig"}

# What must stand before --help.
FIRST_WORDS = {"precompute_latents.py": ["pretrain"]}

Pages = dict[str, str]  # address within docs -> Markdown


# ---- classes and functions ----


def modules_of(folder: Path) -> list[str]:
    """The modules of one folder, dotted, packages themselves included where they hold more than imports."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    package = ".".join(folder.relative_to(ROOT).parts)
    return [f"{package}.{name}" for name in names]


def public_names() -> str:
    """What `import modeling_deem` and `import processing` give, each linked to its place below."""
    import modeling_deem
    import processing

    lines = ["# Python", ""]
    for package in (modeling_deem, processing):
        lines += [f"## `{package.__name__}`", "", str(package.__doc__).replace("->", "to"), ""]
        for name in package.__all__:
            found = getattr(package, name)
            summary = " ".join((found.__doc__ or "").strip().split("\n\n")[0].split())
            lines.append(f"- [`{name}`][{found.__module__}.{found.__qualname__}]: {summary}")
        lines.append("")
    lines += ["The recipes' own modules need a clone; each folder has its page.", ""]
    return "\n".join(lines)


def python_pages() -> Pages:
    """One page per module of the two packages, one per folder of the recipes."""
    pages = {"reference/python/index.md": public_names()}
    for package in PACKAGES[:2]:
        for module in modules_of(ROOT / package):
            pages[f"reference/python/{module.replace('.', '/')}.md"] = (
                f"---\ntitle: {module.split('.')[-1]}\n---\n# `{module}`\n\n::: {module}\n    options:\n      show_root_heading: false\n"
            )
    for folder in sorted(
        path.parent for path in (ROOT / "recipes").rglob("__init__.py")
    ):  # without: modules of `evaluate`
        modules = modules_of(folder)
        name = "/".join(folder.relative_to(ROOT).parts)
        body = "\n".join(f"::: {module}\n" for module in modules)
        pages[f"reference/python/{name.replace('/', '_')}.md"] = f"---\ntitle: {name}\n---\n# `{name}`\n\n{body}"
    pages["reference/python/hub_upload.md"] = "# `hub_upload`\n\n::: hub_upload\n"
    return pages


# ---- options ----


@contextmanager
def typed(words: list[str], folder: Path) -> Iterator[None]:
    """Within, the command line reads `words`, and the working directory is `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "argv", words):
            yield
    finally:
        os.chdir(before)


def parser_of(script: Path) -> argparse.ArgumentParser | None:
    """The parser of a command, as `--help` finds it; None for a module that is no command."""
    if '__name__ == "__main__"' not in script.read_text(encoding="utf-8"):
        return None
    found: list[argparse.ArgumentParser] = []
    with (
        typed([str(script), *FIRST_WORDS.get(script.name, []), "--help"], ROOT),
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser)),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit:
            pass
    if len(found) != 1:
        raise ValueError(f"{script} has {len(found)} parsers behind --help; expected one.")
    return found[0]


def cell(text: Any) -> str:
    """One cell of a table: no line break, no bar, no HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def table(actions: list[argparse.Action]) -> list[str]:
    lines = ["| option | default | what |", "|---|---|---|"]
    for action in actions:
        name = ", ".join(f"`{one}`" for one in action.option_strings) or f"`{action.dest}`"
        shown = action.default not in (None, argparse.SUPPRESS, "", [], {})
        default = f"`{cell(action.default)}`" if shown and not isinstance(action.default, str | None) else ""
        default = f"`{action.default}`" if shown and isinstance(action.default, str) else default
        choices = "" if not action.choices else " One of " + ", ".join(f"`{one}`" for one in action.choices) + "."
        text = "" if action.help in (None, argparse.SUPPRESS) else action.help.replace("%%", "%")
        lines.append(f"| {name} | {default} | {cell(text)}{choices} |")
    return lines


def inherited_defaults() -> dict[str, dict[str, argparse.Action]]:
    """Options of the libraries' own dataclasses, by name."""
    from transformers import TrainingArguments
    from trl import SFTConfig, TrlParser

    found = {}
    for page, kind in (("training_arguments", TrainingArguments), ("sft_config", SFTConfig)):
        names = {one.name for one in fields(kind)}
        actions = options_of(TrlParser(kind))
        found[page] = {action.dest: action for action in actions if action.dest in names}
    return found


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser, without --help and the negated names of switches."""
    named = [action for action in parser._actions if action.dest != "help"]
    return [action for action in named if not str(action.option_strings[:1]).startswith("['--no_")]


def options_page(script: Path, parser: argparse.ArgumentParser, libraries: dict[str, dict[str, Any]]) -> str:
    """The options of one command: its own in full, a library's only where the default is another."""
    from trl import TrlParser

    actions = options_of(parser)
    names = {action.dest for action in actions}
    bases = [page for page, known in libraries.items() if set(known) <= names]
    base = max(bases, key=lambda page: len(libraries[page]), default=None)
    known = libraries[base] if base else {}
    own = [action for action in actions if action.dest not in known]
    changed = [one for one in actions if one.dest in known and str(one.default) != str(known[one.dest].default)]
    name = script.relative_to(ROOT).as_posix()
    description = script.read_text(encoding="utf-8").split('"""')[1]
    lines = [
        f"---\ntitle: {script.name}\n---",
        f"# `{name}`",
        "",
        "```text",
        description.strip().replace("\\\\", "\\"),
        "```",
        "",
    ]
    lines += ["## Options", "", *table(own), ""]
    if isinstance(parser, TrlParser):
        lines += ["With `--config`, a YAML file gives any of them; the command line wins.", ""]
    if base:
        lines += [f"Besides, all options of [`{INHERITED[base]}`]({base}.md)."]
        lines += ["With another default:", "", *table(changed), ""] if changed else [""]
    return "\n".join(lines)


def options_pages() -> Pages:
    """One page per command of `recipes/` and for `hub_upload.py`, and those of the libraries' options."""
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    libraries = inherited_defaults()
    pages = {}
    for script in [*sorted((ROOT / "recipes").glob("*.py")), ROOT / "hub_upload.py"]:
        parser = parser_of(script)
        if parser is not None:
            pages[f"reference/options/{script.stem}.md"] = options_page(script, parser, libraries)
    for page, known in libraries.items():
        name = INHERITED[page]
        head = [f"# `{name}`", "", "Options of the library, as of the version that this package is tested with.", ""]
        pages[f"reference/options/{page}.md"] = "\n".join([*head, *table(list(known.values())), ""])
    return pages


# ---- MkDocs ----

PAGES: Pages = {}


def fill(nav: Any, name: str, entries: list[str]) -> bool:
    """Put `entries` where mkdocs.yml leaves the list called `name` empty."""
    items = nav if isinstance(nav, list) else [value for value in nav.values()] if isinstance(nav, dict) else []
    for item in items:
        if isinstance(item, dict) and item.get(name) == []:
            item[name] = entries
            return True
        if isinstance(item, dict | list) and fill(item, name, entries):
            return True
    return False


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, and fill the two empty lists of the navigation."""
    PAGES.clear()
    PAGES.update(python_pages() | options_pages())
    for name, folder in (("Python", "reference/python/"), ("Options", "reference/options/")):
        if not fill(config.nav, name, [page for page in PAGES if page.startswith(folder)]):
            raise ValueError(f"mkdocs.yml has no empty list {name!r} in nav, which docs/reference_pages.py fills.")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for address, text in PAGES.items():
        files.append(File.generated(config, address, content=text))
    return files
