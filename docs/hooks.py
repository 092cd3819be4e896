"""Pages that are generated when the site is built: recipe keys and commands."""

import posixpath
import re

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from calm.cli.main import app
from calm.training.recipe.reference import recipe_reference

# <picture> elements: one figure for light and one for dark pages. MkDocs does not resolve paths in HTML.
_FIGURE = re.compile(r'\b(src|srcset)="((?:\.\./)*figures/[^"]+)"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/recipe_keys.md", content=recipe_reference()))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    return files


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Make the paths of figures relative to the page's address."""

    def relative(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        return f'{match[1]}="{files.get_file_from_path(source).url_relative_to(page.file)}"'

    return _FIGURE.sub(relative, html)


def _commands() -> str:
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="calm", title="Commands")
