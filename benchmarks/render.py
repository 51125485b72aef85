"""Fill the tables of README.md beside this file from results/; the text around them stays.

python benchmarks/render.py
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

from timing import RESULTS

PAGE = Path(__file__).with_name("README.md")
MARK = re.compile(r"(<!-- (?P<result>[a-z]+-[a-z-]+) -->\n)(?P<old>.*?)(<!-- end -->)", re.DOTALL)


def rendered(page: str, results: Path) -> str:
    """A page with the table of `results/step-cpu.json` between `<!-- step-cpu -->` and `<!-- end -->`, and so on.

    Args:
        page: with marks.
        results: folder of what was recorded. Where there is no such file, the page keeps what it has.
    """

    def table(found: re.Match[str]) -> str:
        path = results / f"{found['result']}.json"
        if not path.exists():
            return found[0]
        content = json.loads(path.read_text(encoding="utf-8"))
        script = importlib.import_module(found["result"].partition("-")[0])
        return f"{found[1]}`{content['command']}` on {content['machine']}\n\n{script.table(content['rows'])}{found[4]}"

    return MARK.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
