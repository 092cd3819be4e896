"""The README and the pages of ``docs/``: length, links, blocks of code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown form them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for pair in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))):
        link = "".join(pair)
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_exist(page):
    assert broken_links(page) == []


def test_missing_files_and_anchors_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    links = "[1](other.md#a-heading-here) [2](other.md#b) [3](no.md) [4](https://a.b) `[5](no)`"
    page.write_text(links + "\n\n```text\n[6](no)\n```\n", encoding="utf-8")
    assert broken_links(page) == ["other.md#b", "no.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_code_parse(page):
    for code in blocks(page, "python"):
        ast.parse(code)
    for code in blocks(page, "yaml"):
        yaml.safe_load(code)


def test_readme_names_only_public_python():
    import calm

    code = "\n".join(blocks(ROOT / "README.md", "python"))
    assert set(re.findall(r"\bcalm\.(\w+)", code)) <= set(calm.__all__)
    assert code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_recipes_exist(page):
    from typer.main import get_command

    from calm.cli.main import app

    shell = "\n".join(blocks(page, "bash"))
    named = re.findall(r"^(?:\S+=\S+ )*calm (\w+)", shell, re.MULTILINE)
    assert set(named) <= set(get_command(app).commands)
    recipes = re.findall(r"\brecipes/[\w/]+\.yaml", page.read_text(encoding="utf-8"))
    assert [name for name in recipes if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_of_the_source_exist(page):
    named = re.findall(r"`([a-z_]+/[\w/]+\.(?:py|sh|yaml|jinja))`", FENCE.sub("", page.read_text(encoding="utf-8")))
    roots = [ROOT, ROOT / "src", ROOT / "src" / "calm"]
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert [name for name in missing if "NAME" not in name] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_no_former_names(page):
    content = page.read_text(encoding="utf-8")
    former = ["token_prediction", "finish.yaml", "examples/study/cpu.yaml"]
    assert [name for name in former if name in content] == []
