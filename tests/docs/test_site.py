# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The site as `make docs` builds it: no warning, no broken link, nothing from another host, every name and option."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pages import ROOT, blocks_of, commands_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
Options = dict[str, set[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)  # raises Abort after a warning
        config.plugins.run_event("shutdown")
    return folder


@pytest.fixture(scope="module")
def options(site: Path) -> Options:
    """The options of every command, as its page lists them, those of the library's trainers included."""
    folder = site / "reference" / "options"
    text = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}
    own = {name: set(re.findall(r"<code>(--[\w-]+)</code>", page)) for name, page in text.items()}
    for name, page in text.items():
        if "With <code>--config</code>" in page:
            own[name] = own[name] | {"--config"}
        for library in ("sft_config", "training_arguments"):
            if f'Besides, all options of <a href="{library}.html">' in page:
                own[name] = own[name] | own[library]
    return own


def test_nothing_comes_from_another_host(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]+")
    pages = list(site.rglob("*.html"))
    found = {path.name: hits for path in pages if (hits := loaded.findall(path.read_text(encoding="utf-8")))}
    assert len(pages) > 80 and found == {}


def test_every_public_name_is_described(site: Path) -> None:
    anchors = set()
    for path in (site / "reference" / "python").rglob("*.html"):
        anchors |= set(re.findall(r'id="([\w.]+)"', path.read_text(encoding="utf-8")))
    for package in ("modeling_deem", "processing"):
        module = import_module(package)
        found = [getattr(module, name) for name in module.__all__]
        assert [one for one in found if f"{one.__module__}.{one.__qualname__}" not in anchors] == []
    assert {"recipes.training.trainer.DeemTrainingArguments", "hub_upload.main"} <= anchors


def test_every_command_has_its_page(options: Options) -> None:
    commands = [path for path in (ROOT / "recipes").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert {path.stem for path in commands} | {"hub_upload"} <= options.keys()
    assert {"--data", "--pack_length", "--on_nan", "--learning_rate"} <= options["pretrain"]
    assert {"--repo", "--dry-run"} <= options["hub_upload"]


def commands() -> list[tuple[str, str, set[str]]]:
    """Place, recipe and options of every command that a page shows, in blocks and within the text."""
    found = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language in ("bash", "console"):
                found += [(block.place, words) for words in commands_of(block.text)]
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for line in re.findall(r"`((?:python )?(?:recipes/\w+|hub_upload)\.py [^`]*)`", text):
            found.append((str(page.relative_to(ROOT)), line.split()))
    shown = []
    for place, words in found:
        scripts = [word for word in words if re.fullmatch(r"(recipes/)?\w+\.py", word)]
        if scripts and (scripts[0].startswith("recipes/") or scripts[0] == "hub_upload.py"):
            behind = words[words.index(scripts[0]) :]
            given = {word.strip("[],").split("=")[0] for word in behind if word.lstrip("[").startswith("--")}
            shown.append((place, Path(scripts[0]).stem, given - {"--help"}))
    return shown


def test_every_command_that_a_page_shows_exists_with_its_options(options: Options) -> None:
    shown = commands()
    assert len(shown) > 60 and len({name for _, name, _ in shown}) > 12
    wrong = [(place, name, given - options.get(name, set())) for place, name, given in shown]
    assert [case for case in wrong if case[2] or case[1] not in options] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks_of(page):
        if block.language in ("python", "py"):
            compile(block.text, block.place, "exec")
        assert block.language in ("python", "bash", "console", "text", "yaml", "bibtex", ""), block.place


def test_files_that_pages_name_exist() -> None:
    missing = []
    for page in PAGES:
        named = re.findall(r"`((?:recipes|modeling_deem|processing|tests|docs)/[\w./-]+\.\w+)`", page.read_text())
        missing += [(page.name, name) for name in named if not (ROOT / name).exists()]
    assert missing == []
