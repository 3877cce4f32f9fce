"""What happened in a run, as one HTML page that opens from the disk: no server, no network.

    python -m examples.report runs/maze-5           writes runs/maze-5/report.html
    python -m examples.report results               an index of the runs below, and a page for each
    python -m examples.report results --out x.html  the index there, the pages in the folder x/

A finished run is shown from its trace.json, any other from calls.jsonl: also while it goes on.
Of a folder of runs, only the pages of those that changed are made anew.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import collabvr
from examples import cli
from examples.report.pages import write


@dataclass
class Report:
    folder: tyro.conf.Positional[Path]  # a run folder, or a folder with run folders below it
    out: Path | None = None  # the HTML file (default: report.html in the folder)

    def run(self) -> int:
        print(collabvr.clean(str(write(self.folder, self.out))))
        return 0


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after bad input and 130 after an interruption, with a sentence on stderr."""
    return cli.command(__doc__, Report, argv)


if __name__ == "__main__":
    sys.exit(main())
