"""Any method over a data set, on one machine or many.

    python examples/benchmark.py run --data VBVR-Bench --out results --method collabvr
    python examples/benchmark.py run .. --in-flight 3   three samples share the generator
    python examples/benchmark.py run .. --shard 2/4     the second of four machines or GPUs
    python examples/benchmark.py run .. --ray 4         Ray Data, an actor for each of four GPUs
    python examples/benchmark.py summary results        the paper's statistics: summary.py
    python examples/benchmark.py simulate               what K and n gain: simulate.py

DATA: a VBVR-Bench folder (VBVR-Bench.json or the bare tree); Gen-ViRe, as hub id or saved copy; a
JSONL of image, task, id and perhaps category; or a folder of pictures, with --task.
OUT/runs/ID is a sample's run folder, OUT/videos what the official evaluators read. The same command
goes on where it stopped; what failed (failed.txt in its run folder) is tried again.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated

import filelock
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import commands
import numpy as np
from commands import needed
from samples import Sample, samples
from summary import Summary

import collabvr
from collabvr import Config, Models, OpenAIVLM, Problem, Wan, digest, write_file


# ================================================================================== Running
@settings(config={"extra": "forbid", "validate_default": True})
class Run:
    """Runs a method over a data set."""
    data: str  # VBVR-Bench folder, Gen-ViRe (hub id or copy), JSONL, or folder of pictures
    out: Path  # results folder, which resumes
    config: Config
    vlm: OpenAIVLM
    vgm: Wan
    method: str = "collabvr"  # one of examples/baselines.py, or FILE.py:NAME of your own
    task: str = ""  # what is to be done in all pictures of a folder
    # i/n: every n-th sample, from the i-th on
    shard: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] = "1/1"
    in_flight: Annotated[int, Field(ge=1, le=64)] = 1  # samples that share one generator
    ray: Annotated[int, Field(ge=0)] = 0  # Ray actors; on several machines give absolute paths
    ray_gpus: Annotated[float, Field(ge=0)] | None = None  # of an actor; None: 1 if there is one
    ray_cpus: Annotated[float, Field(ge=0)] = 0.5  # CPUs of an actor
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0  # of a sample's first clip, then one more each
    vgm_arg: list[str] = field(default_factory=list)  # NAME=VALUE for the class in FILE.py:NAME

    def run(self) -> int:
        """Runs what is not finished; the exit status. Raises Problem before any model is called."""
        i, n = map(int, self.shard.split("/"))
        listed, mine, left, worst = {}, 0, set(), np.zeros(3)
        commands.method(self.method)  # a Problem if there is no such method
        for k, x in enumerate(samples(self.data, self.task)):
            if x.id in listed:
                raise Problem(f"{self.data} holds two samples {x.id}.")
            listed[x.id] = {"id": x.id, "category": x.category, "method": self.method}
            if k % n == i - 1:
                mine += 1
                if not self.finished(x):
                    left.add(x.id)
                    with contextlib.suppress(Problem):  # it fails when its turn comes
                        worst += self.config_of(x).worst_case()
        if i > n or not listed:
            raise Problem(f"{self.data} holds no samples, or not for shard {self.shard}.")
        if left and self.method != "single":  # which asks nobody
            self.vlm.check()
            print(f"{self.vlm.host} will see the pictures.", file=sys.stderr)
        if left and self.method in ("collabvr", "m1", "m2"):
            print("At worst: {:.0f} clips, {:.0f} s of generated video, {:.0f} VLM calls, and what "
                  "fails.".format(*worst), file=sys.stderr)
        self.enlist(listed)
        runner = Runner(self) if left and not self.ray else None
        errors: list[str] = []
        made: list[float] = []  # seconds of video
        with tqdm(total=mine, initial=mine - len(left), unit="sample",
                  mininterval=0.1 if sys.stderr.isatty() else 30) as bar:  # 30: in a file
            def told(error: str, seconds: float) -> None:
                if error:
                    errors.append(error)
                    bar.write(error, file=sys.stderr)
                made.append(seconds)
                bar.set_postfix(failed=len(errors), VGM_s=round(sum(made), 1), refresh=False)
                bar.update()

            todo = (x for x in samples(self.data, self.task) if x.id in left)
            if runner:
                self.in_threads(runner, todo, told)
            elif left:
                self.with_ray(todo, told)
        print(f"{mine} samples: {mine - len(errors)} done, {len(errors)} failed, {sum(made):.1f} s "
              f"of video for what this start made. The videos are in {self.out / 'videos'}")
        return 1 if errors else 0

    def enlist(self, new: dict[str, dict]) -> None:
        """Keeps which samples there are: a summary must know what is missing. Raises Problem."""
        path = self.out / "samples.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.out / "lock"):  # shards start together
            with collabvr.explained(f"{path} is damaged", ValueError, KeyError, TypeError):
                old = path.read_text().splitlines() if path.exists() else []
                others = [x for x in map(json.loads, old) if new.get(x["id"]) != x]
            if others:
                raise Problem(f"{self.out} holds another method or data set: choose another --out.")
            write_file(path, "".join(json.dumps(x) + "\n" for x in new.values()).encode())

    @functools.cached_property
    def code(self) -> str:
        """What the files of generator and method hold at the start, if they are FILE.py:NAME."""
        files = [x.rpartition(":")[0] for x in (self.vgm.vgm, self.method)]
        return "".join(Path(x).read_text() for x in files if x.endswith(".py"))

    def config_of(self, x: Sample) -> Config:
        """The settings, with the sample's own length of clips if it has one. Raises Problem."""
        if not x.seconds:
            return self.config
        with collabvr.explained(f"{x.id} is {x.seconds:g} s long", ValueError):
            return replace(self.config, seconds_first=x.seconds, seconds_next=x.seconds)

    def made_with(self, x: Sample) -> str:
        """A hash of all that the video depends on, found without loading a model."""
        image = x.image if isinstance(x.image, bytes) else Path(x.image).read_bytes()
        return digest(self.method, asdict(self.config), self.vlm.identity, self.vgm.identity,
                      self.code, self.vgm_arg, self.seed, hashlib.sha256(image).hexdigest(),
                      x.task, x.seconds)

    def videos(self, x: Sample) -> list[Path]:
        """Where its final video lies, as the evaluators want it."""
        name = self.method.rpartition(":")[2]
        return [self.out / "videos" / f.format(name) / f"{x.id}.mp4" for f in x.folders]

    def finished(self, x: Sample) -> bool:
        """Whether it has a video of these settings. A missing picture is the run's to report."""
        folder = self.out / "runs" / x.id
        with contextlib.suppress(OSError, ValueError):
            made = json.loads((folder / "trace.json").read_bytes()).get("made_with")
            files = [folder / "video.mp4", *self.videos(x)]
            return made == self.made_with(x) and all(path.exists() for path in files)
        return False

    def in_threads(self, runner: Runner, todo: Iterator[Sample], told) -> None:
        """K samples at a time; the next one is read when a thread is free for it."""
        jobs: queue.Queue[Sample | None] = queue.Queue(1)

        def work() -> None:
            for x in iter(jobs.get, None):
                told(*runner.attempt(x))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.in_flight)]
        for thread in threads:
            thread.start()
        for x in itertools.chain(todo, [None] * self.in_flight):
            jobs.put(x)
        for thread in threads:
            thread.join()

    def with_ray(self, todo: Iterator[Sample], told) -> None:
        """Ray Data: N actors, each of which builds the pipeline once. An actor that dies is
        replaced, as often as it takes (Ray Data's default); its samples go on where they were."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray, K = needed("ray"), self.in_flight
        needed("ray.data")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # whose traces fill screens
        start = str(time.time())
        items = [{"sample": pickle.dumps(x), "start": start} for x in todo]
        try:
            ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False,
                     runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}})
            ray.data.DataContext.get_current().enable_progress_bars = False
            gpus = min(1, ray.cluster_resources().get("GPU", 0))
            rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
                Runner, fn_constructor_args=(self,), num_cpus=self.ray_cpus,
                num_gpus=gpus if self.ray_gpus is None else self.ray_gpus,
                compute=ray.data.ActorPoolStrategy(
                    size=min(self.ray, len(items)), max_tasks_in_flight_per_actor=K,
                    max_concurrent_calls_per_actor=K, enable_true_multi_threading=K > 1))
            for row in rows.iter_rows():
                told(row["error"], row["seconds"])
        except Exception as error:  # noqa: BLE001  Ray's classes of errors are many
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise Problem(f"Ray gave up: {cause}") from None
        finally:
            ray.shutdown()


class OneAtATime:
    """A generator that several threads share: it is never called by two at once."""

    def __init__(self, vgm):
        self.vgm, self.identity = vgm, getattr(vgm, "identity", {})
        self.lock, self.mine = threading.Lock(), threading.local()

    def __call__(self, *request):
        with self.lock:
            began = time.monotonic()
            try:
                return self.vgm(*request)
            finally:
                self.mine.seconds = round(time.monotonic() - began, 3)


class Waiting(Models):
    """Models whose generator may be busy: the wait for it is no part of the call."""

    def film(self, *request) -> tuple[dict, collabvr.Clip | None]:
        line, clip = super().film(*request)
        return line | {"wall_seconds": self.vgm.mine.seconds}, clip


class Runner:
    """The pipeline, built once for many samples. Raises Problem if a model cannot be had."""

    def __init__(self, command: Run):
        logging.getLogger("collabvr").setLevel(logging.WARNING)  # a bar is shown, not every call
        self.command = command
        vgm = collabvr.load_generator(
            command.vgm, dict(x.partition("=")[::2] for x in command.vgm_arg))
        vgm.check(min(command.config.seconds_first, command.config.seconds_next))
        self.vgm, self.method = OneAtATime(vgm), commands.method(command.method)

    def __call__(self, row: dict) -> dict:
        """For Ray Data, which tries what a worker died of again and again: here three times."""
        x = pickle.loads(row["sample"])
        tries = self.command.out / "runs" / x.id / "tries"
        tries.parent.mkdir(parents=True, exist_ok=True)
        with open(tries, "a+") as file:
            file.write(f"{row['start']}\n")
            file.seek(0)
            died = file.read().split().count(row["start"]) - 1
        result = self.attempt(x) if died < 3 else (f"{x.id}: its worker died three times", 0.0)
        tries.unlink()
        return dict(zip(("error", "seconds"), result))

    def attempt(self, x: Sample) -> tuple[str, float]:
        """('', seconds of video), or (what went wrong, 0) and failed.txt in its run folder."""
        failed = self.command.out / "runs" / x.id / "failed.txt"
        try:
            seconds = self.make(x)
            failed.unlink(missing_ok=True)
            return "", seconds
        except Exception as error:  # noqa: BLE001  whatever it is, the other samples go on
            whole = "" if isinstance(error, Problem) else traceback.format_exc()
            text = f"{x.id}: {collabvr.first_line(error)}"
            with contextlib.suppress(OSError):
                failed.parent.mkdir(parents=True, exist_ok=True)
                write_file(failed, f"{text}\n{collabvr.clean(whole)}".encode())
            return text, 0.0

    def make(self, x: Sample) -> float:
        """Runs a sample and saves it; seconds of video that were generated for it."""
        c, folder = self.command, self.command.out / "runs" / x.id
        config, given = c.config_of(x), folder / "input.png"
        models = Waiting(self.vgm, c.vlm, folder, c.seed)
        try:
            if isinstance(x.image, bytes):
                write_file(given, x.image)
            I0 = collabvr.load_image(given if isinstance(x.image, bytes) else x.image)
            chosen = asdict(config) | asdict(c.vlm) | asdict(c.vgm) | {"seed": c.seed}
            facts = {"input": digest(I0, x.task), "image": given.name if isinstance(
                x.image, bytes) else x.image, "task": x.task, "settings": chosen, "id": x.id,
                "category": x.category, "method": c.method, "seconds": x.seconds,
                "made_with": c.made_with(x)}
            start = folder / "start.json"
            if start.exists() and json.loads(start.read_bytes())["input"] != facts["input"]:
                raise Problem(f"{folder} is a run with another image or task: choose another --out")
            write_file(start, collabvr.clean(json.dumps(facts)).encode())
            Image.fromarray(I0).save(given)
            for path in (folder / "trace.json", folder / "video.mp4", *c.videos(x)):
                path.unlink(missing_ok=True)  # of other settings, if any
            result = self.method(models, config).run(I0, x.task)
            video = collabvr.save(result, models, **facts)
            for path in c.videos(x):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, video.read_bytes())
            return models.cost()["vgm_seconds"]
        finally:
            models.lock.release()


# =============================================================================== Command line
def main(argv=None) -> int:
    """0: all that was asked for is there; 1: samples failed; 2: bad input; 130: interrupted."""
    from simulate import Simulate  # which imports this file
    return commands.run("benchmark.py", __doc__, {"run": Run, "summary": Summary,
                                                  "simulate": Simulate}, argv)


if __name__ == "__main__":
    from benchmark import main  # Ray's workers get its classes by that name
    status = main()
    if status == 130:
        os._exit(status)  # threads are still at work
    sys.exit(status)
