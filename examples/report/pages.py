"""The files of a report: a page for each run and, of a folder of runs, an index."""

from __future__ import annotations

import functools
import hashlib
import os
import urllib.parse
from pathlib import Path

from tqdm import tqdm

import collabvr
from collabvr import Problem, explained
from examples import runs
from examples.maze import rule, world
from examples.report import index, markup
from examples.report import page as page_of
from examples.report.index import Row
from examples.runs import Run

# a page is made anew when one of them changes
SOURCES = [collabvr, runs, index, markup, page_of, rule, world]


def write(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, or an index of the runs below the folder and the page of each.

    A page that shows what its run folder holds is left as it is. Returns the file to open.
    Raises Problem, OSError.
    """
    folder = Path(folder)
    out = Path(out or folder / "report.html")
    if not folder.is_dir():
        raise Problem(f"{folder} is no folder: give that of a run, or one with runs below it.")
    if out.suffix != ".html" or not out.parent.is_dir():
        raise Problem(f"--out is {out}: it takes a file in a folder that exists, ending in .html.")
    found = {path.parent for name in ("calls.jsonl", "start.json") for path in folder.rglob(name)}
    if not found:
        raise Problem(f"There is no run in {folder}: no calls.jsonl and no start.json.")
    if folder in found:
        with explained(f"{folder} cannot be shown", Exception):  # whatever it holds
            save(out, page_of.page(runs.load_run(folder)))
        return out
    refuse_links(out.with_suffix(""), out.parent)
    rows = [row(place, folder, out) for place in tqdm(sorted(found), unit="run", disable=None)]
    save(out, index.listing(folder.resolve().name, rows))
    return out


def row(place: Path, folder: Path, out: Path) -> Row:
    """A run's row in the index. Its page and thumbnail are written if they are not as the run."""
    name = place.relative_to(folder).as_posix()
    pages = out.with_suffix("")
    page, thumbnail = pages / f"{name}.html", pages / f"{name}.jpg"
    found = Row(name, Run(place, "unreadable", [], [], {}))
    try:  # one that cannot be shown must not hide the others
        with explained(f"{place} cannot be shown", Exception):
            refuse_links(page.parent, out.parent)
            mark = mark_of(place)
            run = runs.load_run(place)
            if not is_current(page, mark):
                picture = index.thumbnail(run)
                if picture:
                    save(thumbnail, picture)
                else:
                    thumbnail.unlink(missing_ok=True)
                save(page, page_of.page(run, link(out, page), mark))
            found = Row(name, run, link(page, out))
            if thumbnail.exists():
                found.thumbnail = link(thumbnail, out)
    except Problem as problem:
        found.run.notes = [str(problem)]
    return found


def mark_of(place: Path) -> str:
    """A hash of what a page of that folder shows, and of the code that makes it.

    It is taken before the folder is read: what changes in between makes another mark.
    """
    seen = [code()]
    for name in ("start.json", "trace.json", "calls.jsonl"):
        path = runs.inside(place / name, place)
        seen.append(hashlib.sha256(path.read_bytes()).hexdigest() if path else "")
    for path in [place / "input.png", place / "video.mp4", *sorted(place.glob("clips/*"))]:
        if path.exists():
            about = path.stat()
            seen.append(f"{path.name} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode(errors="replace")).hexdigest()


@functools.cache
def code() -> str:
    """A hash of the code that makes a page."""
    return collabvr.digest(*[Path(module.__file__).read_text() for module in SOURCES])


def is_current(page: Path, mark: str) -> bool:
    if not page.is_file():
        return False
    with open(page, "rb") as file:
        return mark.encode() in file.read(1000)


def link(to: Path, start: Path) -> str:
    """A relative link from one page to another."""
    return urllib.parse.quote(Path(os.path.relpath(to, start.parent)).as_posix())


def refuse_links(folder: Path, root: Path) -> None:
    """Raises Problem if a folder below root, on the way to this one, is a link to anywhere."""
    if folder.resolve() != root.resolve() / folder.relative_to(root):
        raise Problem(f"{folder} is a link, or behind one: nothing is written there. Delete the "
                      "link, or name another file with --out.")


def save(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode(errors="replace")  # of half a character
    collabvr.write_file(path, content)
