"""Pages that are generated when the site is built: recipe keys and commands."""

import posixpath
import re

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from calm.cli.main import app
from calm.training.recipe.reference import recipe_reference

# A figure with one file for light and one for dark pages.
_FIGURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)"[^>]*>\s*<img alt="([^"]*)" src="([^"]+)"\s*/?>\s*</picture>'
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/recipe_keys.md", content=recipe_reference()))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    return files


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Show the figure of the theme that the reader chose, which ``<picture>`` does not know."""

    def image(source: str, theme: str, alt: str) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), source))
        return f'<img alt="{alt}" src="{files.get_file_from_path(path).url_relative_to(page.file)}#only-{theme}">'

    return _FIGURE.sub(lambda match: image(match[3], "light", match[2]) + image(match[1], "dark", match[2]), html)


def _commands() -> str:
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="calm", title="Commands")
