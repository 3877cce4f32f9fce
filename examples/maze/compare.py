"""Every method of the paper on the same held-out mazes: score, seconds of video, calls.

    python examples/maze/compare.py --out runs/compare
    python examples/maze/compare.py --out runs/compare --methods single,collabvr --mazes 10
    python examples/maze/compare.py --out runs/compare --methods collabvr,qwen9b,qwen27b,gemini
    python examples/maze/compare.py --out runs/compare --segments foreign --mazes 100
    python examples/maze/compare.py .. --methods route1,best1,replan1   what follows a rejection

The mazes come from seeds that training never used; `foreign` ones are made and drawn by another
program, in other palettes, and get as many steps as their path has segments, three at least. A
score comes from world.py's rule, never from the VLM that steered. Each finished run is a line in
DIR/runs.jsonl, and the same command with the same code goes on; results.json has the means.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import baselines
import numpy as np
import vlm
import world
from PIL import Image, ImageColor, ImageDraw
from run import CONFIG, VLM, WAN
from tqdm import tqdm

import collabvr

SUPERVISORS = {  # the paper's Table 6: accept recall, reject recall, plan depth; and a seed
    "gemini": vlm.Errors(0.848, 0.656, 0.680, 1), "qwen27b": vlm.Errors(0.824, 0.448, 0.587, 2),
    "qwen9b": vlm.Errors(0.776, 0.408, 0.564, 3)}
METHODS = {  # name: (class, what differs from run.py's CONFIG)
    **{name: (method, {}) for name, method in baselines.METHODS.items()},
    "best": (collabvr.CollabVR, {"on_exhausted": "best"}),  # M1+M2 without router
    "replan": (collabvr.CollabVR, {"on_exhausted": "replan"}),
    **{f"steps{k}": (collabvr.CollabVR, {"N_max": k}) for k in range(1, 6)},
    **{f"attempts{k}": (baselines.M2, {"M": k}) for k in range(1, 6)},  # as in Fig. 13
    **{name: (collabvr.CollabVR, {}) for name in SUPERVISORS},
    **{f"{name}{x}1": (collabvr.CollabVR, {"on_exhausted": x, "M": 1})
       for name in ["", *(f"{k}-" for k in SUPERVISORS)] for x in ("route", "best", "replan")}}
HEADLINE = "single,pass2,pass4,videotpo,preplan,m1,m2,collabvr,best,replan"
NUMBERS = ["solved", "score", "vgm_seconds", "clips", "vlm_calls", "steps", "regenerations"]


# ----------------------------------------------------------------------------------- one sample


def held_out(segments: int, i: int, seed: int) -> world.Maze:
    """The i-th held-out maze of that many straight segments, 4 to 8 cells a side."""
    rng = np.random.default_rng([seed, 77, segments, i])
    return world.make(int(rng.integers(4, 9)), segments, rng)


PALETTES = [  # wall, corridor, circle, goal
    ("black", "white", "red", "green"), ("navy", "lightyellow", "crimson", "limegreen"),
    ("saddlebrown", "wheat", "blue", "red"), ("gray", "white", "orange", "blue"),
    ("white", "black", "yellow", "red"), ("darkgreen", "palegreen", "magenta", "gold"),
    ("slategray", "snow", "purple", "cyan"), ("firebrick", "mistyrose", "teal", "gold"),
    ("#1e1e2e", "#cdd6f4", "#f38ba8", "#a6e3a1"), ("peru", "cornsilk", "darkviolet", "orange"),
    ("white", "#202020", "deepskyblue", "tomato"), ("#444", "#aaa", "lime", "red")]


def foreign(i: int, seed: int) -> tuple[world.Maze, np.ndarray]:
    """The i-th maze that world.py had no hand in, and its picture: corridors one cell wide by
    Prim's algorithm, 5 to 8 cells a side, drawn by Pillow at 40 pixels a cell and scaled to 16."""
    rng = np.random.default_rng([seed, 78, i])
    n = int(rng.integers(5, 9))
    edge = int(rng.integers(2)) if n % 2 else 0  # a wall all around, or corridors up to the edge
    open = np.zeros((n, n), bool)
    open[edge, edge] = True
    while True:
        ways = [(r, c, dr, dc) for r, c in np.argwhere(open) for dr, dc in world.MOVES.values()
                if (r - edge) % 2 == (c - edge) % 2 == 0
                and all(edge <= x < n - edge for x in (r + 2 * dr, c + 2 * dc))
                and not open[r + 2 * dr, c + 2 * dc]]
        if not ways:
            break
        r, c, dr, dc = ways[rng.integers(len(ways))]
        open[r + dr, c + dc] = open[r + 2 * dr, c + 2 * dc] = True
    cells = np.argwhere(open)
    start, goal = (tuple(map(int, cells[k])) for k in rng.choice(len(cells), 2, replace=False))
    names = PALETTES[rng.integers(len(PALETTES))]
    picture = Image.new("RGB", (40 * n, 40 * n), names[0])
    pen = ImageDraw.Draw(picture)

    def square(shape, cell, half, colour):
        middle = [40 * cell[1] + 20, 40 * cell[0] + 20]
        shape([x - half for x in middle] + [x + half - 1 for x in middle], fill=colour)

    for cell in cells.tolist():
        square(pen.rectangle, cell, 20, names[1])
    half, radius = int(rng.integers(11, 17)), int(rng.integers(11, 16))
    square(pen.rectangle, goal, half, names[3])
    square(pen.ellipse, start, radius, names[2])
    look = world.Look(*map(ImageColor.getrgb, names), radius=radius / 40, half=half / 40)
    return (world.Maze(open, start, goal, look),
            np.array(picture.resize((16 * n, 16 * n), Image.Resampling.LANCZOS)))


def start(vgm: str) -> None:
    """Once a process: one thread, the generator and an endpoint for each supervisor."""
    import torch

    global GENERATOR, URLS
    torch.set_num_threads(1)
    logging.getLogger("collabvr").setLevel(logging.ERROR)
    GENERATOR, URLS = collabvr.Wan(**WAN | {"vgm": vgm}), {}
    for name, errors in {"": vlm.Errors(), **SUPERVISORS}.items():
        server = vlm.serve(errors=errors)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        URLS[name] = f"http://127.0.0.1:{server.server_port}/v1"


def sample(method: str, segments: int, i: int, seed: int) -> dict:
    """One method on one maze, as a flat row."""
    kind, changes = METHODS[method]
    settings = CONFIG | changes
    if segments == "foreign":
        maze, picture = foreign(i, seed)
        way = world.segments(world.shortest_path(maze.open, maze.start, maze.goal))
        settings = {"N_max": max(3, len(way))} | settings
    else:
        maze = held_out(segments, i, seed)
        picture = world.draw(maze)
    reader = collabvr.OpenAIVLM(**VLM, vlm_url=URLS.get(method.partition("-")[0], URLS[""]))
    models = collabvr.Models(GENERATOR, reader, seed=1000 * i)
    config = collabvr.Config(**settings)
    result = kind(models, config).run(picture, world.task(maze))
    s, cost = world.score(result.video.frames, maze), models.cost()
    fine = s.one_circle and not s.left_corridors and not s.jumped
    return {"method": method, "segments": segments, "i": i, "seed": seed, "status": result.status,
            "solved": float(s.solved), "score": s.progress * fine,
            "exhausted": exhausted(models.calls, config),
            "vlm_calls": sum(n for role, n in cost["calls"].items() if role != "vgm"),
            **{k: cost[k] for k in ("vgm_seconds", "clips", "steps", "regenerations")}}


def exhausted(calls: list[dict], config: collabvr.Config) -> list[tuple[str, bool | None]]:
    """Of each step with M rejections: what was then decided, and whether the next clip that was
    verified, of regen the joined one, was accepted (None: none was)."""
    said = [x for x in calls if x["role"] in ("verifier", "router") and "reply" in x]
    out = []
    for i, x in enumerate(said):
        tries = sum(y["t"] == x["t"] for y in said[: i + 1])
        if tries == config.M and x["reply"]["verdict"] == "reject":
            routes = [y["reply"]["action"] for y in said[i + 1 : i + 2] if y["role"] == "router"]
            later = [y["reply"]["verdict"] for y in said[i + 1 :] if y["role"] == "verifier"]
            out.append(((routes or [config.on_exhausted])[0],
                        later[0] == "accept" if later else None))
    return out


def collect(args) -> list[dict]:
    """All rows that are asked for: the same code's from the file, new ones from --workers."""
    used = [*sorted(args.vgm.glob("*/*.safetensors")), *(
        Path(x.__file__) for x in (collabvr, baselines, vlm, world))]
    code = hashlib.sha256(b"".join(p.read_bytes() for p in used)).hexdigest()[:12]
    path, rows = args.out / "runs.jsonl", []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill: run again
                rows += [r] if (r := json.loads(line)).get("code") == code else []
    keys = [(m, k, i, args.seed) for i in range(args.mazes) for k in args.segments
            for m in args.methods]
    done = {(r["method"], r["segments"], r["i"], r["seed"]): r for r in rows}
    todo = [key for key in keys if key not in done]
    fresh = multiprocessing.get_context("spawn")
    with (path.open("a") as file, tqdm(total=len(keys), initial=len(keys) - len(todo)) as bar,
          ProcessPoolExecutor(args.workers, fresh, start, (str(args.vgm),)) as pool):
        futures = {pool.submit(sample, *key): key for key in todo}
        try:
            for future in as_completed(futures):
                done[futures[future]] = row = future.result() | {"code": code}
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # what is finished is in the file
    return [done[key] for key in keys]


# ------------------------------------------------------------------------------------ summaries


def interval(values, kind: str) -> list[float]:
    """95 %: Wilson's for shares, a bootstrap of the mean for anything else."""
    x = np.asarray(values, float)
    if kind == "solved":
        n, p, z = len(x), x.mean(), 1.96
        middle, half = p + z * z / 2 / n, z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        return [float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))]
    means = np.random.default_rng(0).choice(x, (2000, len(x))).mean(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def summary(rows: list[dict]) -> dict:
    """Means of the numbers, with intervals beside them."""
    out = {"n": len(rows)}
    for name in NUMBERS:
        values = [r[name] for r in rows]
        out |= {name: float(np.mean(values)), f"{name}_ci": interval(values, name)}
    return out


def summaries(rows: list[dict], args) -> list[dict]:
    """A summary per method and number of segments, and one per method over all."""
    out = []
    for method in args.methods:
        mine = [r for r in rows if r["method"] == method]
        for segments in [*args.segments, "all"]:
            some = [r for r in mine if segments in (r["segments"], "all")]
            out.append({"method": method, "segments": segments} | summary(some))
    return out


def table1(table: list[dict], args) -> str:
    """Cost and solved share by number of segments, as the paper's Tables 1 and 3."""
    heads = [*("foreign" if k == "foreign" else f"{k} segment{'s' * (k > 1)}"
               for k in args.segments), "all"]
    lines = [f"| method | VGM s | {' | '.join(f'solved, {h}' for h in heads)} | score |",
             "|---|---|" + "---|" * len(heads) + "---|"]
    for method in args.methods:
        mine = {r["segments"]: r for r in table if r["method"] == method}
        cells = [f"{100 * r['solved']:.0f} % ({100 * r['solved_ci'][0]:.0f}"
                 f"-{100 * r['solved_ci'][1]:.0f})" for r in mine.values()]
        both = mine["all"]
        lines.append(f"| {method} | {both['vgm_seconds']:.1f} | {' | '.join(cells)} | "
                     f"{both['score']:.3f} |")
    return "\n".join(lines)


def table10(rows: list[dict], args) -> str:
    """mean / standard deviation / median / range of what a run took, as the paper's Table 10."""
    names = ["steps", "regenerations", "clips", "vlm_calls", "vgm_seconds"]
    lines = [f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for method in args.methods:
        cells = []
        for name in names:
            x = np.array([r[name] for r in rows if r["method"] == method])
            cells.append(f"{x.mean():.2f} / {x.std():.2f} / {np.median(x):g} / "
                         f"{x.min():g}-{x.max():g}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exhaustion(rows: list[dict], args) -> str:
    """What became of steps with M rejections, and what it changed against the first method."""
    first, heads = args.methods[0], "such mazes | solved of them | route: next clip accepted"
    lines = [f"| method | {heads} | solved, minus {first} | VGM s, minus {first} |",
             "|---|---|---|---|---|---|"]
    for method in args.methods:
        mine, base = ([r for r in rows if r["method"] == m] for m in (method, first))
        hit = [r for r in mine if r.get("exhausted")]
        ways = [tuple(x) for r in hit for x in r["exhausted"]]
        told = [f"{k} {ways.count((k, True))} of {sum(x[0] == k for x in ways)}"
                for k in sorted({x[0] for x in ways})]
        differences = ([a[k] - b[k] for a, b in zip(mine, base)] for k in ("solved", "vgm_seconds"))
        cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(np.mean(x), *interval(x, "difference"))
                 for x in differences]
        lines.append(f"| {method} | {len(hit)} | {sum(r['solved'] for r in hit):.0f} | "
                     f"{', '.join(told)} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- figures


def figures(table: list[dict], args) -> None:
    """Fig. 2 (score against VGM seconds), and Fig. 13 and the supervisors if they were run."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No figures: pip install matplotlib draws them.")
        return
    rows = {r["method"]: r for r in table if r["segments"] == "all"}

    def points(names, title, file):
        names = [name for name in names if name in rows]
        if len(names) < 2:
            return
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        x, y = ([rows[name][k] for name in names] for k in ("vgm_seconds", "score"))
        for i, name in enumerate(names):
            r = rows[name]
            axes.errorbar(x[i], y[i], fmt="osD^v<>P"[i], capsize=2, label=name,
                          xerr=[[abs(x[i] - r["vgm_seconds_ci"][0])],
                                [abs(r["vgm_seconds_ci"][1] - x[i])]],
                          yerr=[[abs(y[i] - r["score_ci"][0])], [abs(r["score_ci"][1] - y[i])]])
        axes.legend(loc="lower right", ncols=2)
        n = rows[names[0]]["n"]
        axes.set(title=f"{title} ({n} mazes each, 95 % intervals)", ylim=(0, 1.1),
                 xlabel="VGM seconds a maze", ylabel="score by rule", xlim=(0, 1.2 * max(x)))
        axes.grid(alpha=0.3)
        figure.savefig(args.out / file, dpi=120)
        plt.close(figure)

    def sweep(stem, title):
        ks = [k for k in range(1, 6) if f"{stem}{k}" in rows]
        if len(ks) < 2:
            return
        figure, both = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
        for axes, key in zip(both, ("score", "vgm_seconds"), strict=True):
            y, ends = (np.array([rows[f"{stem}{k}"][key + ci] for k in ks]) for ci in ("", "_ci"))
            axes.errorbar(ks, y, abs(ends.T - y), fmt="o-", capsize=2)
            axes.set(xlabel=title, xticks=ks, ylim=(0, None),
                     ylabel="score by rule" if key == "score" else "VGM seconds a maze")
            axes.grid(alpha=0.3)
        figure.suptitle(f"{rows[f'{stem}{ks[0]}']['n']} mazes each, 95 % intervals")
        figure.savefig(args.out / f"{stem}.png", dpi=120)
        plt.close(figure)

    points(baselines.METHODS, "Score and cost", "score-cost.png")
    sweep("attempts", "attempts M, M2 alone")
    sweep("steps", "planning steps N_max")
    points(["collabvr", "gemini", "qwen27b", "qwen9b"], "Supervisors", "supervisors.png")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=HEADLINE, type=lambda s: s.split(","),
                        help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--segments", default="1,2,3",
                        help="straight pieces of the shortest path, or foreign",
                        type=lambda s: [int(k) if k.isdigit() else k for k in s.split(",")])
    parser.add_argument("--mazes", type=int, default=35, help="for each number of segments (35)")
    parser.add_argument("--seed", type=int, default=0, help="of the mazes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--vgm", type=Path, default=HERE / "tiny-wan")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args(argv)
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; --help lists them")
    if wrong := [k for k in args.segments if k not in (1, 2, 3, 4, "foreign")]:
        parser.error(f"--segments takes 1, 2, 3, 4 and foreign, not {wrong[0]}")
    for name, least in ("mazes", 1), ("workers", 1), ("seed", 0):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not (args.vgm / "model_index.json").is_file():
        parser.error(f"{args.vgm} is no diffusers folder")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = collect(args)
    table = summaries(rows, args)
    results = {"mazes": args.mazes, "seed": args.seed, "rows": table}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table1(table, args), table10(rows, args), exhaustion(rows, args), sep="\n\n")
    figures(table, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
