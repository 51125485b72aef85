"""What the build of the site adds: pages and files that live elsewhere in the repository, and formulae as MathML.

The pages of `ELSEWHERE` exist once, where they are made; here they keep their place in the tree, so that links work.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    "examples/RESULTS.md",
    "examples/results/README.md",
    "examples/results/PLAN.md",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
FILES = ("examples/results/*.png", "examples/results/*.sh", "benchmarks/results/*.png")  # as they are
PLOT = re.compile(r'(<img [^>]*src="([^"]+\.png)"[^>]*>)')
PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>(?:&#x02032;|′)</mi></msup>")  # raised twice without a mathematics font
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, figures and lists of commands that are not in this folder."""
    linked = sorted(path for pattern in FILES for path in ROOT.glob(pattern))
    for path in [*(ROOT / name for name in ELSEWHERE), *linked]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where pages are on the site: in the repository those of this folder lie a level deeper."""
    if page.file.src_uri in ELSEWHERE:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    out = "../" * (page.file.src_uri.count("/") + 1)
    return markdown.replace(f"]({out}", f"]({out.removeprefix('../')}")


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML, which browsers draw themselves, and link every plot to its full size."""

    def mathml(found: re.Match[str]) -> str:
        formula = str(convert(html.unescape(found[3]), display="inline" if found[2] == "(" else "block"))
        return PRIME.sub(r"\1<mo>′</mo>", formula)

    return PLOT.sub(r'<a href="\2">\1</a>', FORMULA.sub(mathml, content))
