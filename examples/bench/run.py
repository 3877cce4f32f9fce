"""Any method over a data set, on one machine or many.

    python -m examples.bench.run --data VBVR-Bench --out results --method collabvr
    python -m examples.bench.run ..  --in-flight 3   three samples share the generator
    python -m examples.bench.run ..  --shard 2/4     the second of four machines or GPUs
    python -m examples.bench.run ..  --ray 4         an actor of Ray for each of four GPUs
    python -m examples.bench.run ..  --generator served --url http://localhost:30000
    python -m examples.bench.run ..  --method still  the floor: input pictures, no model is asked
    python -m examples.bench.summary results         the paper's statistics

examples/bench/README.md has the layouts of DATA and of OUT/videos. OUT/runs/ID is the run folder of
a sample. The same command goes on where it stopped, and tries again what failed. A generator, a VLM
or a method of one's own is a class in one's own file:

    sys.exit(examples.bench.run.main(vgm=MyGenerator, vlm=MyVLM, method=MyMethod))
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import filelock
import numpy as np
import tyro
from PIL import Image
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm import tqdm

import collabvr
from collabvr import Clip, CollabVR, Config, OpenAIVLM, Picture, Problem, write_file
from examples.baselines import METHODS, Single, Still
from examples.bench.samples import Sample, places, samples
from examples.cli import guarded, needed, program
from examples.runs import read_json, read_lines, write_lines

GENERATORS = {  # those that --generator names, imported when one is asked for
    "wan": ("collabvr", "Wan"),
    "fast_wan": ("examples.models.fast_wan", "FastWan"),
    "served": ("examples.models.served", "Served"),
    "veo": ("examples.models.veo", "Veo"),
    "cosmos": ("examples.models.cosmos", "Cosmos"),
}
VGM = TypeVar("VGM", bound=Any)
VLM = TypeVar("VLM", bound=Any)


def i_of_n(text: str) -> str:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError("expected is i/n, as 2/4")
    return text


@checked_dataclass(config=collabvr.STRICT)
class Runs:
    """Which runs there are, and who makes them."""

    seed: Annotated[int, Field(ge=0)] = 0  # of a sample's first clip, then one more each
    seeds: collabvr.Count = 1  # independent runs of each sample
    shard: Annotated[str, AfterValidator(i_of_n)] = "1/1"  # i/n: every n-th run, from the i-th on
    in_flight: collabvr.Count = 1  # samples that share one generator
    ray: Annotated[int, Field(ge=0)] = 0  # Ray actors; on several machines give absolute paths
    # GPUs of an actor (None: 1 if there is one)
    ray_gpus: Annotated[float, Field(ge=0)] | None = None
    ray_cpus: Annotated[float, Field(ge=0)] = 0.5  # CPUs of an actor


@dataclass
class Options(Generic[VGM, VLM]):
    data: str  # a folder, a file or a hub id: see examples/bench/README.md
    out: Path  # results folder, which resumes
    config: Config
    vlm: VLM
    vgm: VGM
    runs: Runs
    method: str = ""  # a name of examples/baselines.py (default: collabvr, or your own)
    task: str = ""  # what is to be done in all pictures of a folder
    fill_failed: bool = False  # a still video of the input in place of one that failed


@dataclass
class Which:
    # which generator: its options join the others
    generator: Literal["wan", "fast_wan", "served", "veo", "cosmos"] = "wan"


@dataclass
class Shipped(Which, Options[VGM, VLM], Generic[VGM, VLM]):
    """The options where the generator is one of ours."""


# ------------------------------------------------------------------------------
# Which runs there are


@dataclass(frozen=True)
class Job:
    """One run of a sample, and all that it depends on but the models."""

    id: str  # of its run folder below OUT/runs
    sample: Sample
    folder: Path  # its run folder
    videos: list[Path]  # where the evaluators look for its video, and perhaps last frame
    method: type[CollabVR]
    config: Config  # with the sample's own length of clips, if it has one
    seed: int  # of the first clip
    shift: int  # what is added to the seeds that a method names
    facts: dict  # for its trace
    settings: str  # a hash of all that counts, beside the picture

    def made_with(self) -> str:
        """A hash of all that the video depends on. Raises OSError without a picture."""
        return collabvr.digest(self.settings, hashlib.sha256(self.sample.data()).hexdigest())

    def finished(self) -> bool:
        """Whether its videos of these settings are there."""
        with contextlib.suppress(OSError, ValueError, TypeError):  # the run will say what is wrong
            trace = read_json(self.folder / "trace.json")
            made = "status" in trace and trace.get("made_with") == self.made_with()
            return made and all(path.exists() for path in self.videos)
        return False

    def deliver(self, video: bytes, last_frame: Picture) -> None:
        """Puts both where the evaluators look."""
        picture = io.BytesIO()
        Image.fromarray(last_frame).save(picture, "PNG")
        for path in self.videos:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, picture.getvalue() if path.suffix == ".png" else video)

    def failed(self, done: Done, fill: bool) -> None:
        """Writes down what went wrong; `fill`: and puts a still where no video is."""
        with contextlib.suppress(OSError, Problem):  # a full disk
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "failed.txt", f"{done.error}\n{done.details}".encode())
            if fill and not all(path.exists() for path in self.videos):
                still = Still(collabvr.Models(None, None), self.config)
                clip = still.run(self.sample.picture(), self.sample.task).video
                video = collabvr.mp4(clip)
                write_file(self.folder / "still.mp4", video)  # what tells it from a run's video
                self.deliver(video, clip.frames[-1])


def jobs_of(options: Options, name: str, method: type[CollabVR]) -> list[Job]:
    """All runs of all samples, pictures unread. Raises Problem."""
    runs, jobs = options.runs, []
    settings = settings_of(options, name, method)
    chosen = {**asdict(options.config), **asdict(options.vlm), **asdict(options.vgm)}
    for x in samples(options.data, options.task):
        config = options.config
        if x.seconds:
            with collabvr.explained(f"{x.id} is {x.seconds:g} s long", ValueError):
                config = replace(config, seconds_first=x.seconds, seconds_next=x.seconds)
        facts = {
            "image": x.image, "category": x.category, "method": name,
            "settings": {**chosen, **asdict(config), "seed": runs.seed},
        }
        for k in range(1, runs.seeds + 1):
            id = x.id if runs.seeds == 1 else f"{x.id}/seed{k}"
            names = places(x, name, k, runs.seeds)
            videos = [options.out / "videos" / place for place in names]
            shift = 100_000 * (k - 1)
            jobs.append(Job(
                id, x, options.out / "runs" / id, videos, method, config, runs.seed + shift,
                shift, {"id": id, **facts}, collabvr.digest(settings, x.task, x.seconds, k)))
    return jobs


def settings_of(options: Options, name: str, method: type[CollabVR]) -> dict:
    """All settings that change a video. Finds no model, loads none. Raises Problem."""
    runs = options.runs
    settings: dict[str, Any] = {
        "method": name, **asdict(options.config), "seed": runs.seed, "seeds": runs.seeds}
    if method not in METHODS.values():
        settings["method.code"] = collabvr.digest(collabvr.identity(method.run))
    for kind, model in {"vlm": options.vlm, "generator": options.vgm}.items():
        known = collabvr.identity(model)
        if not isinstance(known, dict):
            known = {**asdict(model), "code": collabvr.digest(known)}
        settings[kind] = type(model).__name__
        settings |= {f"{kind}.{field}": value for field, value in known.items()}
    return json.loads(json.dumps(settings, default=str))


def enlist(out: Path, settings: dict, jobs: list[Job]) -> None:
    """Keeps the settings, and which runs there are: a summary must know what is missing.

    Raises Problem if runs of other settings or data were begun in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {job.id: {"id": job.id, "category": job.sample.category} for job in jobs}
    path, listed = out / "settings.json", out / "samples.jsonl"
    with filelock.FileLock(out / "lock"):  # shards start together
        if path.exists() and any((out / "runs").rglob("trace.json")):
            changed = differences(read_json(path), settings)
            if changed:
                raise Problem(f"{out} was made with other settings: {'; '.join(changed)}. Choose "
                              "another --out.")
            for _, row in read_lines(listed):
                if rows.get(row["id"]) != row:
                    raise Problem(f"{out} is of another data set, which has no sample {row['id']} "
                                  "as there. Choose another --out.")
        write_file(path, json.dumps(settings, indent=2).encode())
        write_lines(listed, list(rows.values()))


def differences(old: dict, new: dict) -> list[str]:
    """What changed, a text each."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, now = json.dumps(old.get(key)), json.dumps(new.get(key))
        if before != now:
            found.append(f"{key} was {before:.60}, is {now:.60}")
    return found


# ------------------------------------------------------------------------------
# One run


@dataclass
class Done:
    """What became of a job."""

    seconds: float = 0.0  # of video that were generated for it
    error: str = ""  # "": none
    details: str = ""  # a traceback
    busy: bool = False  # another process works on it


class JobModels(collabvr.RecordedModels):
    """The models of one of several independent runs, whose seeds are its own. Threads share a
    generator, which is never called by two at once: no call counts its wait for the others."""

    def __init__(self, worker: Worker, job: Job):
        super().__init__(worker.vgm, worker.vlm, job.folder, job.seed)
        self.turn, self.shift = worker.turn, job.shift

    def call_vgm(self, *request):
        with self.turn:
            return super().call_vgm(*request)

    def generate(self, frame, prompt: str, seconds: float, t=1, j=1, seed=None) -> Clip:
        if seed is not None:
            seed += self.shift
        return super().generate(frame, prompt, seconds, t, j, seed)


class Worker:
    """The models, built once for many jobs. Threads may share it; Ray makes an actor of it."""

    def __init__(self, vgm, vlm):
        self.vgm, self.vlm = vgm, vlm
        self.turn = threading.Lock()
        logging.getLogger("collabvr").setLevel(logging.WARNING)  # a bar is shown, not every call

    def check(self, method: type[CollabVR]) -> None:
        """Raises Problem if a model that the method asks cannot work."""
        asks = [self.vgm, self.vlm]
        if issubclass(method, (Single, Still)):  # no VLM, or none at all
            asks = [self.vgm] if issubclass(method, Single) else []
        for model in asks:
            if hasattr(model, "check"):
                model.check()

    def run_one(self, job: Job) -> Done:
        """Runs a sample. Whatever goes wrong is told, and the other samples go on."""
        try:
            return Done(self.make(job))
        except Problem as error:
            return Done(error=str(error), busy=isinstance(error.__cause__, filelock.Timeout))
        except BaseException as error:  # noqa: BLE001  a generator's sys.exit(), too
            return Done(error=f"{type(error).__name__}: {error}", details=traceback.format_exc())

    def make(self, job: Job) -> float:
        """Runs a sample and delivers it; seconds of video that were generated for it."""
        I0 = job.sample.picture()
        models = JobModels(self, job)
        try:
            models.facts = {**job.facts, "made_with": job.made_with()}
            result = job.method(models, job.config).run(I0, job.sample.task)
            video = models.save(result)
            job.deliver(video.read_bytes(), result.video.frames[-1])
        finally:
            models.lock.release()
        for mark in ("failed.txt", "still.mp4"):  # of earlier starts
            (job.folder / mark).unlink(missing_ok=True)
        return models.cost()["vgm_seconds"]


# ------------------------------------------------------------------------------
# All runs


def run_all(jobs: list[Job], runs: list[Callable[[Job], Done]]) -> Iterator[tuple[Job, Done]]:
    """Runs the jobs. Each function has a thread, which takes a job when it is done with one."""
    left: deque[Job] = deque(jobs)
    results: queue.SimpleQueue[tuple[Job, Done]] = queue.SimpleQueue()

    def work(run_one):
        with contextlib.suppress(IndexError):  # none is left
            while True:
                job = left.popleft()
                results.put((job, run_one(job)))

    for run_one in runs:
        # daemons: an interrupted program need not wait for their clips
        threading.Thread(target=work, args=[run_one], daemon=True).start()
    try:
        for _ in jobs:
            yield results.get()
    finally:
        left.clear()


@contextlib.contextmanager
def workers(options: Options, method: type[CollabVR], left: list[Job]):
    """What runs a job, --in-flight times for each generator. Raises Problem if a model cannot work,
    before the first clip."""
    if not left:  # neither a key nor a GPU is needed
        yield []
        return
    if not options.runs.ray:
        worker = Worker(options.vgm, options.vlm)
        worker.check(method)
        yield [worker.run_one] * options.runs.in_flight
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # else Ray listens on every interface
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = needed("ray")
    ray.init(address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        yield ray_actors(ray, options, method)
    finally:
        ray.shutdown()


def ray_actors(ray, options: Options, method: type[CollabVR]) -> list[Callable[[Job], Done]]:
    """An actor that dies is replaced, and its jobs go on; a job of which three died has failed."""
    runs = options.runs
    there = ray.cluster_resources().get("GPU", 0)
    gpus = min(1, there) if runs.ray_gpus is None else runs.ray_gpus
    if gpus * runs.ray > there:
        raise Problem(f"--ray {runs.ray} needs {gpus * runs.ray:g} GPUs, but Ray has {there:g}.")
    actor = ray.remote(Worker).options(
        num_cpus=runs.ray_cpus, num_gpus=gpus, max_concurrency=runs.in_flight,
        max_restarts=-1, max_task_retries=2)
    actors = [actor.remote(options.vgm, options.vlm) for _ in range(runs.ray)]
    try:
        ray.get([actor.check.remote(method) for actor in actors])
    except ray.exceptions.RayError as error:
        raise Problem(str(getattr(error, "cause", error))) from None

    def asked(actor):
        def run_one(job: Job) -> Done:
            try:
                return ray.get(actor.run_one.remote(job))
            except ray.exceptions.RayError as error:
                return Done(error=f"its worker died three times ({collabvr.fault_of(error)})")
        return run_one

    return [asked(actor) for actor in actors for _ in range(runs.in_flight)]


def benchmark(options: Options, name: str, method: type[CollabVR]) -> int:
    """Runs what is not finished. The exit status: 1 if a video is missing. Raises Problem."""
    jobs = jobs_of(options, name, method)
    enlist(options.out, settings_of(options, name, method), jobs)
    i, n = map(int, options.runs.shard.split("/"))
    mine = jobs[i - 1::n]
    left = [job for job in mine if not job.finished()]
    again = {job.id for job in left if (job.folder / "failed.txt").exists()}
    left.sort(key=lambda job: job.id in again)  # they come last
    failed, busy, seconds = [], [], 0.0
    stop = Stop(made=len(left) < len(mine))
    bar = tqdm(total=len(mine), initial=len(mine) - len(left), unit="run",
               mininterval=0.1 if sys.stderr.isatty() else 30)  # 30: in a file
    with bar, workers(options, method, left) as runs:
        announce(left, method)
        for job, done in run_all(left, runs):
            seconds += done.seconds
            if done.busy:
                busy.append(job.id)
            elif done.error:
                failed.append(job.id)
                job.failed(done, options.fill_failed)
                bar.write(f"{job.id}: {done.error}", file=sys.stderr)
            if not done.busy and job.id not in again:
                stop.look(job, done)
            bar.set_postfix(failed=len(failed), VGM_s=round(seconds, 1), refresh=False)
            bar.update()
    there = len(mine) - len(failed) - len(busy)
    print(f"{len(mine)} runs: {there} done, {len(failed)} failed, {len(busy)} busy, {seconds:.1f} "
          f"s of video for what this start made. The videos are in {options.out / 'videos'}")
    say_what_is_missing(failed, busy)
    return 1 if failed or busy else 0


def say_what_is_missing(failed: list[str], busy: list[str]) -> None:
    for what, ids in {"Failed": failed, "Busy, another process works on them": busy}.items():
        if ids:
            print(f"{what}: {', '.join(ids[:20])}{', ..' * (len(ids) > 20)}.", file=sys.stderr)
    if failed:
        print("failed.txt in the run folder says more. The same command tries them again. "
              "Evaluators that stop at a missing video need --fill-failed.", file=sys.stderr)


@dataclass
class Stop:
    """Ends a benchmark whose runs, one after the other, fail alike: none would do better."""

    made: bool  # whether there is a video of any run
    kind: str = ""  # of the last failure, without what differs from sample to sample
    alike: int = 0  # such failures in a row

    def look(self, job: Job, done: Done) -> None:
        """Takes note of a run that is over. Raises Problem."""
        if not done.error:
            self.made, self.alike = True, 0
            return
        # names, numbers and paths differ where the cause is the same
        kind = re.sub(r"\S*[\d/\\]\S*", "", done.error.replace(job.id, ""))
        self.alike = self.alike + 1 if kind == self.kind else 1
        self.kind = kind
        if self.alike == (10 if self.made else 5):
            raise Problem(f"{self.alike} runs in a row failed alike: {done.error} The same command "
                          "goes on with the others, and tries these last.")


def announce(left: list[Job], method: type[CollabVR]) -> None:
    """Says what it may cost, if the method is Algorithm 1's loop."""
    if left and method.run is CollabVR.run:
        worst = np.sum([collabvr.worst_case(job.config) for job in left], axis=0)
        print("At worst: {:.0f} clips, {:.0f} s of generated video, {:.0f} VLM calls, and what "
              "fails.".format(*worst), file=sys.stderr)


# ------------------------------------------------------------------------------
# The command line


def main(
    vgm: type | None = None,
    vlm: type = OpenAIVLM,
    method: type[CollabVR] | None = None,
    argv: list[str] | None = None,
) -> int:
    """The command line, with a generator, VLM or method of one's own: the first two are
    dataclasses, whose fields become options. Returns the exit status: 0, every video is there; 1,
    some are not; 2, bad input; 130, interrupted."""
    own = {} if method is None else {method.__name__: method}
    methods: dict[str, type[CollabVR]] = {**METHODS, **own}

    def action() -> int:
        options = parse(vgm, vlm, argv)
        name = options.method or next(iter(own), "collabvr")
        if name not in methods:
            raise Problem(f"--method is {name}: expected is one of {', '.join(methods)}.")
        return benchmark(options, name, methods[name])

    return guarded(action)


def parse(vgm: type | None, vlm: type, argv: list[str] | None) -> Options:
    """The options. --generator comes first: it says which others there are. Raises Problem."""
    kind: Any = Options
    if vgm is None:
        kind = Shipped
        which, _ = tyro.cli(Which, args=argv, add_help=False, return_unknown_args=True)
        module, name = GENERATORS[which.generator]
        vgm = getattr(importlib.import_module(module), name)
    # tyro asserts that no two options have one name
    with collabvr.explained("Two options have one name: rename yours", AssertionError):
        return tyro.cli(kind[vgm, vlm], args=argv, prog=program(), description=__doc__,
                        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))


if __name__ == "__main__":
    # under that name Ray's workers find the classes
    from examples.bench.run import main

    sys.exit(main())
