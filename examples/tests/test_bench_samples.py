"""The data sets that the benchmark reads, and where it puts the videos."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import collabvr
from collabvr import Clip, Problem
from examples.bench.samples import Sample, prompt_of, read_prompts, samples
from examples.bench.samples import places as outputs

ROOT = Path(__file__).resolve().parents[2]


def picture(path, grey=9, size=(32, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), grey, np.uint8)).save(path)


def entry(root, place, truth=2.0, prompt="Do it.\n"):
    """A folder with first_frame.png, prompt.txt and perhaps a ground truth at 16 fps."""
    picture(root / place / "first_frame.png")
    (root / place / "prompt.txt").write_text(prompt, encoding="utf-8")
    if truth:
        frames = np.zeros((round(16 * truth), 32, 48, 3), np.uint8)
        (root / place / "ground_truth.mp4").write_bytes(collabvr.mp4(Clip(frames, 16)))


def write_vbvr(root, as_json=False):
    """Four samples of two splits; as_json: VBVR-Bench.json, the pictures inside."""
    entries = []
    for split in ("In-Domain_50", "Out-of-Domain_50"):
        for index in ("00000", "00001"):
            place = Path(split, "G-1_maze_data-generator", index)
            entry(root, place)
            image = root / place / "first_frame.png"
            entries.append({
                "prompt": "Do it.",
                "first_frame_path": str(place / "first_frame.png"),
                "first_image": base64.b64encode(image.read_bytes()).decode(),
                "ground_truth_video_path": str(place / "ground_truth.mp4"),
            })
            if as_json:
                image.unlink()
    if as_json:
        (root / "VBVR-Bench.json").write_text(json.dumps(entries))
    return root


VBVR_IDS = [f"{split}/G-1_maze_data-generator/0000{i}"
            for split in ("In-Domain_50", "Out-of-Domain_50") for i in (0, 1)]


def read(data, task=""):
    return list(samples(str(data), task))


def refused(data, *words, task=""):
    with pytest.raises(Problem) as error:
        read(data, task)
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said, said


# ------------------------------------------------------------------------------
# VBVR-Bench and InferKit


@pytest.mark.parametrize("as_json", [False, True])
def test_vbvr_bench_is_read_from_its_json_or_tree(tmp_path, as_json):
    """Clips last as long as the ground truth."""
    found = read(write_vbvr(tmp_path, as_json))
    assert [x.id for x in found] == VBVR_IDS
    assert {x.seconds for x in found} == {2.0} and {x.task for x in found} == {"Do it."}
    assert {x.category for x in found} == {"In-Domain_50", "Out-of-Domain_50"}
    assert all(x.data().startswith(b"\x89PNG") for x in found)
    assert outputs(found[0], "collabvr", 1, 1) == [f"{VBVR_IDS[0]}.mp4"]


def test_vbvr_bench_may_be_a_relative_path(tmp_path, monkeypatch):
    write_vbvr(tmp_path / "data" / "vb", as_json=True)
    monkeypatch.chdir(tmp_path / "data")
    for data in ("vb", "vb/VBVR-Bench.json"):
        assert [x.id for x in read(data)] == VBVR_IDS


def test_inferkits_folders_are_read(tmp_path):
    """Two deep. Without a ground truth clips last as Config says."""
    entry(tmp_path, "maze_task/maze_0001", truth=3.0)
    entry(tmp_path, "chess_task/chess_0000", truth=None)
    chess, maze = read(tmp_path)
    assert (chess.id, chess.category, chess.seconds) == ("chess_task/chess_0000", "chess_task", 0)
    assert (maze.id, maze.seconds) == ("maze_task/maze_0001", 3.0)


@pytest.mark.parametrize("places", [
    [f"{split}/O-1_maze_data-generator/00000" for split in ("In-Domain_50", "Out-of-Domain_50")],
    [f"Multi-0{k}_maze_data-generator/Multi-0{k}_maze_data-generator_task/Multi-0{k}_maze_00000000"
     for k in (1, 2)]])
def test_vbvr_pro_and_multistep_are_read(tmp_path, places):
    """Trees of VBVR-Bench's depth, with metadata beside each picture."""
    for place in places:
        entry(tmp_path, place)
        (tmp_path / place / "metadata.json").write_text("{}")
        picture(tmp_path / place / "final_frame.png")
    found = read(tmp_path)
    assert [x.id for x in found] == places and {x.seconds for x in found} == {2.0}
    assert [outputs(x, "collabvr", 1, 1) for x in found] == [[f"{x}.mp4"] for x in places]


def test_names_that_begin_with_a_dot_are_no_data(tmp_path, capsys):
    """In any layout: an archive from a Mac holds a ._NAME beside each NAME."""
    def dots(path):
        path.with_name(f"._{path.name}").write_bytes(b"no picture")

    jsonl = write_lines(tmp_path / "a.jsonl", LINE | {"id": "._s0"})
    refused(jsonl, "no sample id")
    trees = {"vbvr": write_vbvr, "manifest": write_manifest, "v_reason": write_v_reason}
    counts = {"vbvr": 4, "manifest": 2, "v_reason": len(PICTURES), "pictures": 1}
    for name, write in trees.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    picture(tmp_path / "pictures" / "maze.png")
    entry(tmp_path / "vbvr", ".trash/G-1/00000")
    (tmp_path / "manifest" / "._x").mkdir()
    (tmp_path / "manifest" / "._x" / "data.json").write_text("no list")
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("prompts.txt")]:
        dots(path)
    for name, count in counts.items():
        assert len(read(tmp_path / name, "Go.")) == count, name
    assert not capsys.readouterr().err


def test_a_folder_too_deep_or_too_high_is_refused(tmp_path):
    root = write_vbvr(tmp_path / "up" / "vb")
    refused(root / "In-Domain_50", "one split of VBVR-Bench", "the folder above")
    refused(root / VBVR_IDS[0], "0 folders deep", "<split>/<task>/<idx>/first_frame.png")
    refused(tmp_path, "5 folders deep", "VBVR-Bench", "above or below")


def test_what_a_vbvr_sample_lacks_is_named(tmp_path):
    root = write_vbvr(tmp_path / "tree")
    (root / VBVR_IDS[0] / "prompt.txt").unlink()
    refused(root, "prompt.txt is missing")
    root = write_vbvr(tmp_path / "truth")
    (root / VBVR_IDS[0] / "ground_truth.mp4").write_bytes(b"no video")
    refused(root, "ground_truth.mp4 cannot be read")
    root = write_vbvr(tmp_path / "json", as_json=True)
    (root / "VBVR-Bench.json").write_text('[{"prompt": "x"}]')
    refused(root, "entry 1", "first_frame_path")


# ------------------------------------------------------------------------------
# Gen-ViRe


def gen_vire_rows(count=3):
    datasets = pytest.importorskip("datasets")
    grey = [Image.fromarray(np.full((32, 48, 3), 5 * i, np.uint8)) for i in range(count)]
    rows = [{"main_category": f"Spatial Reasoning {i % 2}", "sub_category": "maze",
             "id": f"m_{i}", "image": grey[i], "i2v_prompt": f"Do {i}.",
             "frame_crop_mode": "full"} for i in range(count)]
    kinds = {k: datasets.Value("string") for k in rows[0]} | {"image": datasets.Image()}
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saved", "saved split", "snapshot", "files", "one file"])
def test_gen_vire_is_read_as_it_lies_around(tmp_path, kind):
    """As save_to_disk left it, or as parquet files: those of the hub's client in data/."""
    datasets = pytest.importorskip("datasets")
    rows, data = gen_vire_rows(), tmp_path / "x"
    if kind == "saved":
        rows.save_to_disk(data)
    elif kind == "saved split":
        datasets.DatasetDict({"train": rows}).save_to_disk(data)
    else:
        folder = data / "data" if kind == "snapshot" else data
        folder.mkdir(parents=True)
        rows.to_parquet(folder / "train-00000-of-00001.parquet")
        (data / "README.md").touch()
        data = next(folder.glob("*.parquet")) if kind == "one file" else data
    found = read(data)
    assert [x.id for x in found] == [f"Spatial Reasoning {i % 2}/maze/m_{i}" for i in range(3)]
    assert [x.task for x in found] == ["Do 0.", "Do 1.", "Do 2."]
    assert all(x.data().startswith(b"\x89PNG") for x in found)


def test_gen_vire_goes_into_five_run_folders():
    """Five copies of one run, or each of five runs into its own."""
    x = Sample("Spatial/maze/m_0", "Do it.", layout="gen_vire")
    assert outputs(x, "single", 1, 1) == [
        f"0_generated_videos/single/single_{k}/Spatial/maze/m_0.mp4" for k in range(5)]
    assert outputs(x, "single", 3, 5) == [
        "0_generated_videos/single/single_2/Spatial/maze/m_0.mp4"]


# ------------------------------------------------------------------------------
# VideoThinkBench


def manifest_row(root, i, **more):
    picture(root / "tasks" / "color_grid" / "puzzles" / f"{i:02}.png")
    return {
        "id": f"color_grid-{i:02}", "task_group": "visual_puzzle", "task_type": "color_grid",
        "prompts": {"ti2v": f"Fill {i}.", "ti2i": None},
        "assets": {"puzzle_image": f"tasks/color_grid/puzzles/{i:02}.png", "solution_image": "x"},
    } | more


def write_manifest(root, **more):
    rows = [manifest_row(root, i, **more) for i in range(2)]
    (root / "canonical_manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_videothinkbench_is_read_from_its_manifest(tmp_path):
    write_manifest(tmp_path)
    for data in (tmp_path, tmp_path / "canonical_manifest.jsonl"):
        found = read(data)
        assert [x.id for x in found] == ["color_grid-00", "color_grid-01"]
        assert [x.task for x in found] == ["Fill 0.", "Fill 1."]
        assert {x.category for x in found} == {"color_grid"} and found[1].data()
        assert outputs(found[0], "collabvr", 1, 1) == [
            "color_grid-00/generated.mp4", "color_grid-00/last_frame.png"]


def test_videothinkbenchs_older_tasks_are_read(tmp_path):
    """<task>/data.json, with ti2v_prompt or prompt."""
    for task, key in (("color_grid", "ti2v_prompt"), ("maze_square", "prompt")):
        picture(tmp_path / task / "puzzles" / "00.png")
        rows = [{"id": f"{task}-00", key: "Go.", "image": "puzzles/00.png"}]
        (tmp_path / task / "data.json").write_text(json.dumps(rows))
    assert [x.id for x in read(tmp_path)] == ["color_grid-00", "maze_square-00"]
    assert all(x.data() for x in read(tmp_path))


def test_a_manifest_without_its_prompt_is_refused(tmp_path):
    write_manifest(tmp_path, prompts={})
    refused(tmp_path, "canonical_manifest.jsonl, line 1", "prompts.ti2v")


# ------------------------------------------------------------------------------
# V-ReasonBench

PROMPTS = """\
==================================================
TASK PROMPTS
==================================================

Math:
Complete the math problems.
Do not change anything else.

Communicating_vessel:
Two tubes.

==================================================
SUDOKU PROMPTS
==================================================
4x4:
Solve the 4x4 sudoku.

9x9:
Solve the 9x9 sudoku.

==================================================
VISUAL SYMMETRY PROMPTS
==================================================

vertical:
Reflect it.

==================================================
TEMPERATURE PROMPTS
==================================================

00:
An ice cube.
"""
PICTURES = {  # name: (task, what follows the model, prompt)
    "math_level1_2_00": ("math", "level1_2_00",
                         "Complete the math problems. Do not change anything else."),
    "communicating_vessels_03": ("communicating_vessels", "03", "Two tubes."),
    "sudoku_easy_2_07": ("sudoku", "easy_2_07", "Solve the 4x4 sudoku."),
    "sudoku_hard_3_00": ("sudoku", "hard_3_00", "Solve the 9x9 sudoku."),
    "visual_symmetry_vertical_16_02": ("visual_symmetry", "vertical_16_02", "Reflect it."),
    "temperature_00": ("temperature", "00", "An ice cube."),
}


def write_v_reason(root):
    for name in PICTURES:
        picture(root / "dataset" / f"{name}.png")
    (root / "prompts.txt").write_text(PROMPTS)
    return root


def test_v_reasonbench_is_read_with_its_prompts(tmp_path):
    """From its repository, or from its folder of pictures."""
    root = write_v_reason(tmp_path)
    for data in (root, root / "dataset"):
        found = {x.id: x for x in read(data)}
        assert found.keys() == PICTURES.keys()
        for name, (task, rest, prompt) in PICTURES.items():
            assert (found[name].name, found[name].task) == ((task, rest), prompt)


def test_v_reasonbenchs_videos_are_named_for_it(tmp_path):
    """<task>_<model>_[<subtype>_]<idx>_seed<N>, the model without an underscore."""
    for x in read(write_v_reason(tmp_path)):
        task, rest, _ = PICTURES[x.id]
        names = [outputs(x, "my_method", k, 5)[0] for k in (1, 2)]
        assert names == [f"{task}_my-method_{rest}_seed{k}.mp4" for k in (1, 2)]


def test_a_picture_without_a_prompt_is_named(tmp_path):
    root = write_v_reason(tmp_path)
    picture(root / "dataset" / "lever_balance_00.png")
    refused(root, "lever_balance_00.png has no prompt", "'lever_balance_00:'")


def test_the_longest_name_in_prompts_txt_counts(tmp_path):
    (tmp_path / "p").write_text("TASK PROMPTS\nMath:\na\n\nMath_level2:\nb\n")
    prompts = read_prompts(tmp_path / "p")
    assert prompt_of("math_level2_2_00", prompts) == ("math_level2", "b")
    assert prompt_of("math_level1_2_00", prompts) == ("math", "a")
    assert prompt_of("mathematics_00", prompts) is None


# ------------------------------------------------------------------------------
# JSONL and folders of pictures


def write_lines(path, *rows, start=""):
    path.write_text(start + "\n".join(json.dumps(x, ensure_ascii=False) for x in rows),
                    encoding="utf-8")
    return path


LINE = {"id": "s0", "image": "0.png", "task": "Do 0."}


def test_a_jsonl_is_read_with_and_without_a_category(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", LINE, LINE | {"id": "s1", "category": "b"})
    one, two = read(path)
    assert (one.id, one.task, one.category, two.category) == ("s0", "Do 0.", "", "b")
    assert one.image == str(tmp_path / "0.png") and one.seconds == 0
    assert outputs(one, "m", 1, 1) == ["s0.mp4"]
    assert [outputs(one, "m", k, 2) for k in (1, 2)] == [["seed1/s0.mp4"], ["seed2/s0.mp4"]]


@pytest.mark.slow
def test_texts_are_utf_8_in_any_locale(tmp_path):
    """With or without a byte-order mark; U+2028 inside a text is no line end."""
    write_lines(tmp_path / "x.jsonl", LINE | {"task": "把圆\u2028移到"}, start="\ufeff")
    entry(tmp_path / "tree", "a_task/1", truth=None, prompt="\ufeff把圆移到方块\n")
    code = ("from examples.bench.samples import samples; import sys\n"
            "for x in sys.argv[1:]: print(ascii([y.task for y in samples(x)]))")
    said = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, tmp_path / "x.jsonl", tmp_path / "tree"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}).stdout
    assert said.splitlines() == [ascii(["把圆\u2028移到"]), ascii(["把圆移到方块"])]


@pytest.mark.parametrize(
    "row", [{"image": "x", "task": "t"}, {"id": "a", "image": "x"}, ["a"], "a"])
def test_a_line_that_does_not_fit_is_named(tmp_path, row):
    """With what is expected."""
    path = write_lines(tmp_path / "x.jsonl", LINE, row)
    refused(path, "line 2", "texts id, image and task, and perhaps category")


@pytest.mark.parametrize("text, word", [
    ("", "no samples"), ("{", "line 1"), (json.dumps(LINE | {"task": " "}), "no task"),
    (json.dumps(LINE | {"task": 7}), "no task"), (json.dumps(LINE | {"id": 1}), "is no text"),
    (json.dumps(LINE) + "\n" + json.dumps(LINE | {"image": "y"}), "two samples s0")])
def test_bad_lines_get_one_sentence(tmp_path, text, word):
    (tmp_path / "x.jsonl").write_text(text)
    refused(tmp_path / "x.jsonl", word)


@pytest.mark.parametrize("bad", [
    "..", ".", "", " ", "../x", "a/b", "/etc/x", "a\\b", "x" * 201, "a\0b", "a\nb", "\ud800",
    "... ", "a\u2028b"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path, bad):
    (tmp_path / "x.jsonl").write_text(json.dumps(LINE | {"id": bad}))
    refused(tmp_path / "x.jsonl", "no sample id")


def test_a_folder_of_pictures_has_one_task_for_all(tmp_path, capsys):
    """Every format that Pillow reads counts, and what is skipped is named."""
    for name in ("b.png", "a.JPG", "c.webp", "d.avif", "e.jp2", "f.tga", "g.ppm", "h.ico"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    found = read(tmp_path, " Turn left. ")
    assert [x.id for x in found] == list("abcdefgh") and {x.task for x in found} == {"Turn left."}
    said = capsys.readouterr().err
    assert said == "No pictures, skipped: folder, notes.txt\n"


def test_what_is_no_data_set_is_told_what_would_be_one(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    refused(tmp_path / "pictures", "say with --task")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no samples", "VBVR-Bench", "JSONL", "prompts.txt")
    refused(tmp_path / "nowhere.jsonl", "does not exist", "JSONL")


def test_a_hub_id_that_cannot_be_loaded_is_told_so(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    refused("somebody/some-data", "no file or folder here", "offline")
