"""Write the tables of the READMEs from the JSON files in `scripts/results`.

    python scripts/report_results.py            # rewrites the tables in place
    python scripts/report_results.py --check    # exits with 1 if a table is not what its file says

A README is prose with blocks in it. A block names a view of a result file, and everything between its two lines is
generated:

    <!-- results: quality quality-ruler-tiny-nvidia-h100-80gb-hbm3.json -->
    <!-- end -->

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from views import VIEWS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
READMES = (ROOT / "README.md", RESULTS / "README.md")

BLOCK = re.compile(r"(<!-- results: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """A README whose blocks say what their files say.

    Raises:
      KeyError: a block names no view.
      FileNotFoundError: a block names no file.
    """

    def block(match: re.Match[str]) -> str:
        begin, view, name, end = match.groups()
        return f"{begin}\n{VIEWS[view](json.loads((RESULTS / name).read_text()))}\n{end}"

    return BLOCK.sub(block, text)


def files_shown(text: str) -> set[str]:
    """The names of the result files that a README's blocks show."""
    return {match[3] for match in BLOCK.finditer(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if something would change")
    options = parser.parse_args()
    stale = [path for path in READMES if refreshed(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is not what its files say' if options.check else 'rewritten'}")
        if not options.check:
            path.write_text(refreshed(path.read_text()))
    sys.exit(options.check and bool(stale))


if __name__ == "__main__":
    main()
