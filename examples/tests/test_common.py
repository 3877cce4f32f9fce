"""What the examples share: intervals, tables, run folders that are not trusted, command lines."""

import importlib.machinery
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from collabvr import Clip, Problem, RecordedModels, Result
from examples import cli, runs, stats

ROOT = Path(__file__).resolve().parents[2]
PICTURE = np.full((16, 24, 3), 9, np.uint8)


# ------------------------------------------------------------------------------
# Intervals and tables


def test_wilson_is_the_published_interval():
    """Newcombe 1998, Table I: 81 of 263, and 0 of 20."""
    assert stats.wilson([1] * 81 + [0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert stats.wilson([0] * 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_the_bootstrap_covers_a_mean_about_19_times_in_20():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        low, high = stats.bootstrap(np.mean, rng.normal(3, 1, 50))
        hits += low < 3 < high
    assert 34 <= hits < 40


def test_the_bootstrap_draws_rows_whole():
    """A statistic of two columns sees pairs: the second is twice the first in every draw."""
    x = np.arange(10)
    assert stats.bootstrap(lambda a, b: float(np.abs(2 * a - b).max()), x, 2 * x) == (0, 0)


def test_a_paired_difference_has_the_pairs_spread_only():
    base = np.random.default_rng(1).normal(0, 100, 50)
    mean, low, high = stats.paired(base, base + 1)
    assert mean == low == high == pytest.approx(1)


def test_texts_of_shares_and_estimates():
    assert stats.percent([1, 1, 0]) == "67 % (21-94)" and stats.percent([]) == "-"
    assert stats.percent([1, 1, 0], digits=1).startswith("66.7 %")
    assert stats.estimate(np.mean, [1, 1, 1]) == "1.000 (1.00-1.00)"
    assert stats.estimate(np.mean, [1]) == "-"


def test_a_table_is_text_and_markdown():
    table = stats.Table("T", ["", "n", "share"], [["a|b", 1200, 0.5], ["c\nd", None, "x"]])
    assert table.text().split("\n")[:3] == ["T", "         n  share", "a|b  1,200  0.500"]
    assert "| a\\|b | 1,200 | 0.500 |\n| c d | - | x |" in table.markdown()
    assert table.markdown().split("\n")[3] == "|---|---:|---:|"


# ------------------------------------------------------------------------------
# Run folders


def paint(frame, prompt, seconds, seed):
    return Clip(np.repeat(frame[None], 1 + int(4 * seconds), 0), 4)


@pytest.fixture
def folder(tmp_path):
    """A finished run of one clip."""
    models = RecordedModels(paint, None, tmp_path / "run")
    models.facts = {"settings": {"seed": 0}}
    models.begin(PICTURE, "go")
    clip = models.generate(PICTURE, "go", 2)
    models.save(Result(clip, "unverified", [1]))
    return tmp_path / "run"


def test_a_finished_run_is_read_as_it_was_made(folder):
    run = runs.load_run(folder)
    assert run.status == "unverified" and run.facts["task"] == "go"
    assert run.notes == ["In the video without an accept: step 1."]
    (call,) = run.calls
    assert (run.clip(call).frames == PICTURE).all() and run.clip(call).seconds == 2
    assert (run.picture() == PICTURE).all() and run.video().name == "video.mp4"
    assert run.cost()["vgm_seconds"] == 2


@pytest.mark.parametrize("journal", [None, "", '{"role": "pla'])
def test_a_run_without_an_answer_says_so(folder, journal):
    """No line yet, or one that a power cut tore."""
    (folder / "trace.json").unlink()
    (folder / "calls.jsonl").unlink()
    if journal is not None:
        (folder / "calls.jsonl").write_text(journal)
    assert runs.STATUS[runs.load_run(folder).status].word == "no call was answered yet"


def test_an_unfinished_run_is_read_from_its_calls(folder):
    (folder / "trace.json").unlink()
    with open(folder / "calls.jsonl", "a") as file:
        file.write('{"role": "planner", "t": 1, "fault": "no JSON object"}\n{"torn')
    run = runs.load_run(folder)
    assert (run.status, run.notes) == ("failed", ["planner: no JSON object"])
    assert len(run.calls) == 2 and run.video() is None, "the video may be of an older run"


@pytest.mark.parametrize("name, text", [
    ("trace.json", "[]"), ("trace.json", '{"calls": 1}'), ("trace.json", "{"),
    ("trace.json", '{"calls": [{"role": 1}], "status": "", "unverified_steps": []}'),
    ("start.json", "7"),
])
def test_a_damaged_run_is_refused_in_one_sentence(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(Problem, match="holds no run"):
        runs.load_run(folder)


@pytest.mark.parametrize("name", [
    "../secret", "/etc/hostname", "linked", "linked_folder/secret", "clips/../../secret", "x\0y",
    "loop", "clips"])
def test_nothing_outside_the_folder_is_read(folder, name):
    """No name leads out, no link does, and a folder is no file."""
    (folder.parent / "secret").write_text("secret")
    (folder / "linked").symlink_to(folder.parent / "secret")
    (folder / "linked_folder").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    assert runs.load_run(folder).file(name) is None


def test_a_link_in_a_run_folder_shows_nothing(folder, tmp_path):
    for name in ("video.mp4", "input.png", "clips/001.mkv"):
        (folder / name).rename(tmp_path / "moved")
        (folder / name).symlink_to(tmp_path / "moved")
    run = runs.load_run(folder)
    assert run.video() is None and run.picture() is None and run.clip(run.calls[0]) is None


def test_a_run_folder_that_is_a_link_out_of_the_root_is_empty(folder, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "run").symlink_to(folder)
    assert runs.load_run(results / "run").calls
    assert runs.load_run(results / "run", results).calls == []


def test_what_a_trace_names_is_never_imported(folder, tmp_path, monkeypatch):
    """Whatever field it stands in."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    trace = json.loads((folder / "trace.json").read_text())
    trace |= {k: "evil.py:X" for k in ("method", "vgm", "vlm", "generator", "status")}
    (folder / "trace.json").write_text(json.dumps(trace))
    assert runs.load_run(folder).status == "evil.py:X"
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_readers_of_data_have_no_importer_and_no_pickle():
    """The files that read what others made; cli.needed imports what this code names."""
    words = ("pickle", "eval(", "exec(", "runpy", "__import__", "allow_pickle", "torch.load")
    for name in ("runs.py", "bench/samples.py", "bench/summary.py", "bench/run.py"):
        text = (ROOT / "examples" / name).read_text()
        assert [word for word in words if word in text] == [], name


# ------------------------------------------------------------------------------
# Lines of JSON


def test_lines_end_at_newlines_only(tmp_path):
    """U+2028 inside a text is no line end, whatever the locale; a byte-order mark is none of it."""
    (tmp_path / "x").write_bytes('\ufeff{"a": "b\u2028c\x85"}\n\n{"a": "猫"}'.encode())
    assert list(runs.read_lines(tmp_path / "x")) == [(1, {"a": "b\u2028c\x85"}), (3, {"a": "猫"})]


@pytest.mark.parametrize("data", [b'{"a": 1}\n{', b'{"a": 1}\n"\xff"'])
def test_a_line_that_is_no_json_is_named(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Problem, match="x, line 2, is no JSON in UTF-8"):
        list(runs.read_lines(tmp_path / "x"))


# ------------------------------------------------------------------------------
# Command lines


@dataclass
class Say:
    """Says something."""

    word: str = "hello"
    loud: bool = False

    def run(self) -> int:
        if self.word == "wrong":
            raise Problem("This word\nis wrong.")
        print(self.word.upper() if self.loud else self.word)
        return 0


def test_a_command_runs_and_returns_its_status(capsys):
    assert cli.command("Doc.", Say, ["--loud"]) == 0
    assert cli.command("Doc.", {"one": Say, "two": Say}, ["two", "--word", "x"]) == 0
    assert capsys.readouterr().out == "HELLO\nx\n"


def test_a_problem_is_one_sentence_and_status_2(capsys):
    assert cli.command("Doc.", Say, ["--word", "wrong"]) == 2
    assert capsys.readouterr().err == f"{cli.program()}: This word is wrong.\n"


def test_a_wrong_option_is_status_2_and_help_is_0(capsys):
    assert cli.command("Doc.", Say, ["--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err
    assert cli.command("Doc.", Say, ["--help"]) == 0
    assert "Doc." in capsys.readouterr().out


@pytest.mark.parametrize("module, typed", [
    ("examples.report.__main__", "python -m examples.report"),
    ("examples.maze.run", "python -m examples.maze.run"), (None, "python mine.py")])
def test_messages_name_the_program_as_it_was_typed(module, typed, monkeypatch, capsys):
    """In usage lines, those of subcommands too, and before a sentence."""
    main = types.ModuleType("__main__")
    main.__spec__ = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert cli.command("Doc.", {"one": Say, "two": Say}, ["two", "--help"]) == 0
    assert cli.command("Doc.", {"one": Say, "two": Say}, ["two", "--bogus"]) == 2
    assert cli.command("Doc.", Say, ["--word", "wrong"]) == 2
    out, err = capsys.readouterr()
    assert f"usage: {typed} two " in out and f"run {typed} --help" in " ".join(err.split())
    assert err.endswith(f"\n{typed}: This word is wrong.\n")


@settings
class Limited:
    share: Annotated[float, Field(le=1)] = 0.5

    def run(self) -> int:
        return 0


def test_a_wrong_value_names_no_page_of_pydantics():
    """In a process of its own, as pydantic looks once."""
    code = ("from examples.tests.test_common import Limited, common\n"
            "cli.command('', Limited, ['--share', '2'])")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYDANTIC_ERRORS_INCLUDE_URL"})
    assert "less than or equal to 1" in done.stderr and "pydantic.dev" not in done.stderr


@pytest.mark.parametrize("argv", [["--word", "x" * 100_000], ["--word", "x"], ["--help"]])
@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_reads_spoils_no_work(argv, full, monkeypatch, capsys):
    """On a full disk, and in a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as disk, open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", disk if full else pipe)
        assert cli.command("Doc.", Say, argv) == 0
    assert capsys.readouterr().err == ""


def test_a_program_without_output_ends_well(monkeypatch):
    """After `>&-` there is none. That a disk is full shows when Python ends."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.command("Doc.", Say, []) == cli.command("Doc.", Say, ["--help"]) == 0
    with open("/dev/full", "w") as disk:
        done = subprocess.run([sys.executable, "-m", "examples.report", "--help"], cwd=ROOT,
                              stdout=disk, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_the_terminal_cannot_show_stops_no_print(monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.command("Doc.", Say, ["--word", "é"]) == 0
        assert terminal.buffer.getvalue() == b"\\xe9\n"


def test_a_missing_package_says_what_to_install():
    with pytest.raises(Problem, match="no_such is needed: pip install -r examples/requirements"):
        cli.needed("no_such")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_130_and_a_sentence(sent):
    code = ("import signal, sys, time; from examples import \n", cli, runs, stats
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs ignore it\n"
            "def work(): print('ready', flush=True); time.sleep(60)\n"
            "sys.exit(cli.guarded(work))")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == "python -c: Interrupted. The same command goes on from here.\n"


def test_the_guard_leaves_the_signal_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    assert cli.guarded(lambda: 0) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_readme_holds_a_placeholder():
    """A word in capitals alone in a cell, where a figure should be; the first column has names."""
    for file in [ROOT / "README.md", *ROOT.glob("examples/**/README.md")]:
        text = file.read_text()
        assert re.findall(r"\S \| ([A-Z_]{3,})(?= \|)", text) == [], file
        assert re.findall(r"\b(SAME_ROWS|TODO|TBD|XXX)\b", text) == [], file
