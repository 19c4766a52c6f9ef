"""Hooks of MkDocs: the page of all error sentences, and links to files outside of docs/, such as ../conf/train.yaml.

On a code host these links work as they are. On the site they become links to `repo_url` if mkdocs.yml sets it, else the
name of the file alone. A file that does not exist ends the build.
"""

import re
from pathlib import Path

import errors  # MkDocs puts the folder of a hook on the path
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    def outside(found: re.Match) -> str:
        is_image, text, path, anchor = found.groups()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path} links to {path}, which does not exist.")
        if config.repo_url and not is_image:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(outside, markdown)


def on_files(files, config):
    files.append(File.generated(config, "errors.md", content=errors.page()))
    return files
