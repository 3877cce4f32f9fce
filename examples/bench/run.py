"""Any method over a data set, on one machine or many.

    python -m examples.bench.run --data VBVR-Bench --out results --method collabvr
    python -m examples.bench.run ..  --in-flight 3   three samples share the generator
    python -m examples.bench.run ..  --shard 2/4     the second of four machines or GPUs
    python -m examples.bench.run ..  --ray 4         Ray Data, an actor for each of four GPUs
    python -m examples.bench.run ..  --generator served --url http://localhost:30000
    python -m examples.bench.summary results         the paper's statistics

DATA and the layout of OUT/videos: see examples/bench/samples.py. OUT/runs/ID is a sample's run
folder. The same command goes on where it stopped; a sample that failed (failed.txt in its run
folder says why) is tried again. A generator or a method of one's own is a class in one's own file:

    sys.exit(examples.bench.run.main(vgm=MyGenerator, method=MyMethod))
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
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import filelock
import numpy as np
from PIL import Image
from tqdm import tqdm

import collabvr
from collabvr import (
    Clip,
    CollabVR,
    Config,
    Models,
    OpenAIVLM,
    Problem,
    RecordedModels,
    explained,
)
from examples.baselines import METHODS
from examples.bench.samples import Sample, places, samples
from examples.cli import guarded, needed, program
from examples.runs import read_json, read_lines, write_lines

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = {  # those that --generator names, imported when one is asked for
    "wan": ("collabvr", "Wan"),
    "fast_wan": ("examples.models.fast_wan", "FastWan"),
    "served": ("examples.models.served", "Served"),
    "veo": ("examples.models.veo", "Veo"),
    "cosmos": ("examples.models.cosmos", "Cosmos"),
}
VGM, VLM = TypeVar("VGM"), TypeVar("VLM")


@dataclass
class Options(Generic[VGM, VLM]):
    data: str  # a folder, a file or a hub id: see examples/bench/samples.py
    out: Path  # results folder, which resumes
    config: Config
    vlm: VLM
    vgm: VGM
    method: str = ""  # a name of examples/baselines.py (default: collabvr, or your own)
    task: str = ""  # what is to be done in all pictures of a folder
    seed: int = 0  # of a sample's first clip, then one more each
    seeds: int = 1  # independent runs of each sample
    fill_failed: bool = False  # a still video of the input in place of one that failed
    shard: str = "1/1"  # i/n: every n-th run, from the i-th on
    in_flight: int = 1  # samples that share one generator
    ray: int = 0  # Ray actors; on several machines give absolute paths
    ray_gpus: float | None = None  # of an actor (default: 1 if there is one)
    ray_cpus: float = 0.5  # CPUs of an actor

    def check(self) -> None:
        """Raises Problem."""
        shard = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard)
        if not shard or int(shard[1]) > int(shard[2]):
            raise Problem(f"--shard is {self.shard}: expected is i/n, as 2/4.")
        for name, least in {"seed": 0, "seeds": 1, "in_flight": 1, "ray": 0, "ray_cpus": 0}.items():
            if getattr(self, name) < least:
                raise Problem(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected is "
                              f"{least} or more.")


@dataclass
class Shipped(Options[VGM, VLM], Generic[VGM, VLM]):
    # which generator: its options join the others
    generator: Literal["wan", "fast_wan", "served", "veo", "cosmos"] = "wan"


class Job(NamedTuple):
    """One run of a sample."""

    id: str  # of its run folder below OUT/runs
    sample: Sample
    number: int  # from 1


class Done(NamedTuple):
    """What became of a job."""

    id: str
    error: str  # "": none
    seconds: float  # of video that were generated for it


# ------------------------------------------------------------------------------
# The benchmark: which runs there are, and which are left


class Benchmark:
    """A data set, a method and all settings. Raises Problem before any model is called."""

    def __init__(self, options: Options, name: str, method: type[CollabVR]):
        options.check()
        self.options, self.name, self.method = options, name, method
        self.settings = self.all_settings()

    def run(self) -> int:
        """Runs what is not finished. The exit status: 1 if something failed."""
        jobs = self.jobs()
        i, n = map(int, self.options.shard.split("/"))
        mine = jobs[i - 1::n]
        self.enlist(jobs)
        left = [job for job in mine if not self.finished(job)]
        self.announce(left)
        failed, seconds = [], 0.0
        done = self.with_ray(left) if self.options.ray else self.in_threads(left)
        bar = tqdm(total=len(mine), initial=len(mine) - len(left), unit="run",
                   mininterval=0.1 if sys.stderr.isatty() else 30)  # 30: in a file
        with contextlib.closing(done), bar:
            for number, x in enumerate(done, 1):
                seconds += x.seconds
                if x.error:
                    failed.append(x)
                    bar.write(f"{x.id}: {x.error}", file=sys.stderr)
                if len(failed) == number == 5 and len({y.error for y in failed}) == 1:
                    raise Problem(f"The first five runs failed alike: {failed[0].error}")
                bar.set_postfix(failed=len(failed), VGM_s=round(seconds, 1), refresh=False)
                bar.update()
        print(f"{len(mine)} runs: {len(mine) - len(failed)} done, {len(failed)} failed, "
              f"{seconds:.1f} s of video for what this start made. "
              f"The videos are in {self.options.out / 'videos'}")
        if failed:
            self.say_what_failed(failed)
        return 1 if failed else 0

    def jobs(self) -> list[Job]:
        """All runs of all samples, pictures unread. Raises Problem."""
        found, seeds = [], self.options.seeds
        for x in samples(self.options.data, self.options.task):
            for k in range(1, seeds + 1):
                found.append(Job(x.id if seeds == 1 else f"{x.id}/seed{k}", x, k))
        return found

    def announce(self, left: list[Job]) -> None:
        """Says what it may cost, if the method is Algorithm 1's loop."""
        if not left or self.method.run is not CollabVR.run:
            return
        worst = np.zeros(3)
        for job in left:
            with contextlib.suppress(Problem):  # it fails when its turn comes
                worst += self.config_of(job.sample).worst_case()
        print("At worst: {:.0f} clips, {:.0f} s of generated video, {:.0f} VLM calls, and what "
              "fails.".format(*worst), file=sys.stderr)

    def say_what_failed(self, failed: list[Done]) -> None:
        what = ("Evaluators that stop at a missing video need --fill-failed: it puts a still video "
                "of the input picture in its place.")
        if self.options.fill_failed:
            what = "Still videos of their input pictures are in their place."
        names = ", ".join(x.id for x in failed[:20]) + (", .." if len(failed) > 20 else "")
        print(f"Failed: {names}. failed.txt in the run folder says more. The same command tries "
              f"them again. {what}", file=sys.stderr)

    # --- what a result depends on

    def all_settings(self) -> dict:
        """Everything that a video depends on, beside its sample. Finds no model, loads none."""
        c = self.options
        found = {"method": self.name, **asdict(c.config), "seed": c.seed, "seeds": c.seeds}
        if self.method not in METHODS.values():
            found["method.code"] = collabvr.digest(collabvr.identity(self.method.run))
        for name, model in (("vlm", c.vlm), ("generator", c.vgm)):
            found[name] = type(model).__name__
            known = collabvr.identity(model)
            fields = asdict(model) if is_dataclass(model) else {}
            if isinstance(known, dict):
                fields = known
            else:
                found[f"{name}.code"] = collabvr.digest(known)
            found |= {f"{name}.{k}": v for k, v in fields.items()}
        return json.loads(collabvr.to_json(found))

    def enlist(self, jobs: list[Job]) -> None:
        """Keeps which runs there are, for a summary must know what is missing, and the settings.
        Raises Problem if the folder is of others."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        new = {job.id: self.entry(job) for job in jobs}
        with filelock.FileLock(out / "lock"):  # shards start together
            settings, listed = out / "settings.json", out / "samples.jsonl"
            with explained(f"{out} is damaged", OSError, ValueError, LookupError, TypeError):
                before = read_json(settings) if settings.exists() else self.settings
                old = [x for _, x in read_lines(listed)] if listed.exists() else []
                others = [x["id"] for x in old if new.get(x["id"]) != x]
            changed = differences(before, self.settings)
            if changed and any((out / "runs").rglob("trace.json")):
                raise Problem(f"{out} was made with other settings: {'; '.join(changed)}. Choose "
                              "another --out.")
            if others and not changed:
                raise Problem(f"{out} is of another data set: {self.options.data} has no sample "
                              f"{others[0]} as there. Choose another --out.")
            collabvr.write_file(settings, collabvr.to_json(self.settings))
            write_lines(listed, list(new.values()))

    def entry(self, job: Job) -> dict:
        x = job.sample
        return {"id": job.id, "category": x.category, "sample": x.id, "seed": job.number}

    def config_of(self, x: Sample) -> Config:
        """The settings, with the sample's own length of clips if it has one. Raises Problem."""
        if not x.seconds:
            return self.options.config
        with explained(f"{x.id} is {x.seconds:g} s long", ValueError):
            return replace(self.options.config, seconds_first=x.seconds, seconds_next=x.seconds)

    def chosen(self, config: Config) -> dict:
        """All settings as collabvr.py writes them into a trace."""
        c = self.options
        chosen = asdict(config)
        for model in (c.vlm, c.vgm):
            chosen |= asdict(model) if is_dataclass(model) else {}
        chosen["seed"] = c.seed
        return {k: "***" if collabvr.SECRET.search(k) else v for k, v in chosen.items()}

    def made_with(self, job: Job) -> str:
        """A hash of all that the video depends on."""
        x = job.sample
        picture = hashlib.sha256(x.picture()).hexdigest()
        return collabvr.digest(self.settings, picture, x.task, x.seconds, job.number)

    def folder(self, job: Job) -> Path:
        return self.options.out / "runs" / job.id

    def videos(self, job: Job) -> list[Path]:
        """Where its final video, and picture, lie as the evaluators want them."""
        names = places(job.sample, self.name, job.number, self.options.seeds)
        return [self.options.out / "videos" / name for name in names]

    def finished(self, job: Job) -> bool:
        """Whether it has a video of these settings. A missing picture is the run's to report."""
        files = [self.folder(job) / "trace.json", self.folder(job) / "video.mp4"]
        with contextlib.suppress(OSError, ValueError, TypeError):
            if all(path.exists() for path in [*files, *self.videos(job)]):
                return read_json(files[0]).get("made_with") == self.made_with(job)
        return False

    # --- the ways to run

    def in_threads(self, left: list[Job]) -> Iterator[Done]:
        """--in-flight samples at a time, which share one generator."""
        if not left:
            return
        runner, results, jobs = Runner(self), queue.Queue(), iter(left)
        lock, stop = threading.Lock(), threading.Event()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                results.put(runner.attempt(job))

        for _ in range(self.options.in_flight):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in left:
                yield results.get()
        finally:
            stop.set()

    def with_ray(self, left: list[Job]) -> Iterator[Done]:
        """Ray Data: actors that build the pipeline once each. An actor that dies is replaced, as
        often as it takes (Ray Data's default); its samples go on where they were."""
        if not left:
            return
        c = self.options
        start = str(time.time())
        rows = [to_row(job) | {"start": start} for job in left]
        ray = begin_ray()
        try:
            gpus = c.ray_gpus
            if gpus is None:
                gpus = min(1, ray.cluster_resources().get("GPU", 0))
            found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                Runner,
                fn_constructor_args=(self,),
                num_cpus=c.ray_cpus,
                num_gpus=gpus,
                compute=ray.data.ActorPoolStrategy(
                    size=min(c.ray, len(rows)),
                    max_tasks_in_flight_per_actor=c.in_flight,
                    max_concurrent_calls_per_actor=c.in_flight,
                    enable_true_multi_threading=c.in_flight > 1,
                ),
            )
            for row in found.iter_rows():
                yield Done(**row)
        except Exception as error:  # noqa: BLE001  Ray's classes of errors are many
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise Problem(f"Ray gave up: {cause}") from None
        finally:
            ray.shutdown()


def differences(old: dict, new: dict) -> list[str]:
    """What changed, a text each."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, now = json.dumps(old.get(key)), json.dumps(new.get(key))
        if before != now:
            found.append(f"{key} was {before:.60}, is {now:.60}")
    return found


def begin_ray():
    """The module, connected to the cluster that RAY_ADDRESS names, or else to one of its own on
    this machine, which nobody else can reach."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # else Ray listens on every interface
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = needed("ray")
    needed("ray.data")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # whose traces fill screens
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address or "local", include_dashboard=False, logging_level="ERROR",
             log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def to_row(job: Job) -> dict:
    fields = asdict(job.sample)
    content = fields.pop("content")
    return {"job": json.dumps([job.id, fields, job.number]), "content": content}


def from_row(row: dict) -> Job:
    name, fields, number = json.loads(row["job"])
    fields |= {"content": row["content"], "name": tuple(fields["name"])}
    return Job(name, Sample(**fields), number)


# ------------------------------------------------------------------------------
# Running a sample


class OneAtATime(Models):
    """Threads share a generator, which is never called by two at once. The wait for it is no part
    of the call: so the lock stands between RecordedModels and the Models that measure."""

    turn: threading.Lock

    def call_vgm(self, *request):
        with self.turn:
            return super().call_vgm(*request)


class SampleModels(RecordedModels, OneAtATime):
    """The models of one of several independent runs, whose seeds are its own."""

    def __init__(self, vgm, vlm, folder: Path, seed: int, number: int, turn: threading.Lock):
        self.turn = turn
        self.shift = 100_000 * (number - 1)
        super().__init__(vgm, vlm, folder, seed + self.shift)

    def generate(self, frame, prompt: str, seconds: float, t=1, j=1, seed=None) -> Clip:
        if seed is not None:
            seed += self.shift
        return super().generate(frame, prompt, seconds, t, j, seed)


class Runner:
    """The models, built once for many samples. Raises Problem if one cannot work."""

    def __init__(self, benchmark: Benchmark):
        logging.getLogger("collabvr").setLevel(logging.WARNING)  # a bar is shown, not every call
        self.benchmark = benchmark
        self.turn = threading.Lock()
        collabvr.check(benchmark.options.vgm)

    def __getstate__(self):
        return {"benchmark": self.benchmark}

    def __call__(self, row: dict) -> dict:
        """For Ray Data, which tries what a worker died of again and again: here three times."""
        job = from_row(row)
        tries = self.benchmark.folder(job) / "tries"
        tries.parent.mkdir(parents=True, exist_ok=True)
        with open(tries, "a+") as file:
            file.write(f"{row['start']}\n")
            file.seek(0)
            died = file.read().split().count(row["start"]) - 1
        if died < 3:
            done = self.attempt(job)
        else:
            done = self.failed(job, "its worker died three times")
        tries.unlink()
        return done._asdict()

    def attempt(self, job: Job) -> Done:
        """Whatever goes wrong is told, and the other samples go on."""
        try:
            seconds = self.make(job)
        except Problem as error:
            return self.failed(job, str(error))
        except Exception as error:  # noqa: BLE001
            return self.failed(job, collabvr.first_line(error), traceback.format_exc())
        (self.benchmark.folder(job) / "failed.txt").unlink(missing_ok=True)
        return Done(job.id, "", seconds)

    def make(self, job: Job) -> float:
        """Runs a sample and saves it; seconds of video that were generated for it."""
        b, c, x = self.benchmark, self.benchmark.options, job.sample
        folder = b.folder(job)
        I0 = self.picture(job)
        self.empty(job)
        config = b.config_of(x)
        models = SampleModels(c.vgm, c.vlm, folder, c.seed, job.number, self.turn)
        try:
            models.facts = {
                "image": x.image,
                "settings": b.chosen(config),
                "id": job.id,
                "category": x.category,
                "method": b.name,
                "seconds": x.seconds,
                "made_by": collabvr.digest(b.settings),
                "made_with": b.made_with(job),
            }
            result = b.method(models, config).run(I0, x.task)
            video = models.save(result)
            self.deliver(job, video.read_bytes(), result.video.frames[-1])
            return models.cost()["vgm_seconds"]
        finally:
            models.lock.release()

    def picture(self, job: Job) -> np.ndarray:
        """The input image. Raises Problem."""
        x = job.sample
        if not x.content:
            return collabvr.load_image(x.image)
        path = self.benchmark.folder(job) / "given"
        path.parent.mkdir(parents=True, exist_ok=True)
        collabvr.write_file(path, x.content)
        return collabvr.load_image(path)

    def deliver(self, job: Job, video: bytes, last_frame: np.ndarray) -> None:
        """Puts both where the evaluators look."""
        for path in self.benchmark.videos(job):
            path.parent.mkdir(parents=True, exist_ok=True)
            data = video
            if path.suffix == ".png":
                out = io.BytesIO()
                Image.fromarray(last_frame).save(out, "PNG")
                data = out.getvalue()
            collabvr.write_file(path, data)

    def failed(self, job: Job, error: str, whole: str = "") -> Done:
        """Writes down what went wrong and, with --fill-failed, puts a still video in its place."""
        folder = self.benchmark.folder(job)
        with contextlib.suppress(OSError, Problem):
            folder.mkdir(parents=True, exist_ok=True)
            text = collabvr.clean(f"{job.id}: {error}\n{whole}")
            collabvr.write_file(folder / "failed.txt", text.encode())
        if self.benchmark.options.fill_failed:
            try:
                self.fill(job)
            except (Problem, OSError) as reason:
                error = f"{error} No still video could take its place: {reason}"
        return Done(job.id, collabvr.clean(error), 0.0)

    def fill(self, job: Job) -> None:
        """A still video of the input picture, as long as a first clip. still.mp4 marks it."""
        picture = self.picture(job)
        width, height = collabvr.fit(picture.shape[1], picture.shape[0], 16)
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        frames = round(16 * self.benchmark.config_of(job.sample).seconds_first) + 1
        video = collabvr.mp4(Clip(np.repeat(np.array(small)[None], frames, 0), 16))
        collabvr.write_file(self.benchmark.folder(job) / "still.mp4", video)
        self.deliver(job, video, np.array(small))

    def empty(self, job: Job) -> None:
        """Takes away the still video of an earlier start."""
        still = self.benchmark.folder(job) / "still.mp4"
        if still.exists():
            for path in [*self.benchmark.videos(job), still]:
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------
# The command line


def main(
    vgm: type | None = None,
    method: type[CollabVR] | None = None,
    vlm: type = OpenAIVLM,
    argv: list[str] | None = None,
) -> int:
    """The command line, with a generator, method or VLM of one's own: classes whose dataclass
    fields become options. 0: all that was asked for is there; 1: samples failed; 2: bad input;
    130: interrupted."""
    methods = METHODS if method is None else {**METHODS, method.__name__: method}

    def action() -> int:
        options = parse(vgm, vlm, argv)
        name = options.method or ("collabvr" if method is None else method.__name__)
        if name not in methods:
            raise Problem(f"--method is {name}: expected is one of {', '.join(methods)}.")
        return Benchmark(options, name, methods[name]).run()

    return guarded(action)


@dataclass
class NoOptions:
    """In place of a generator that is no dataclass."""


def check_names(*kinds: type) -> None:
    """Raises Problem for two options of one name."""
    owner: dict[str, type] = {}
    for kind in kinds:
        for name in kind.__dataclass_fields__:
            if name in owner and name not in ("config", "vlm", "vgm"):  # those are groups
                raise Problem(f"{kind.__name__}.{name} would be the option that "
                              f"{owner[name].__name__}.{name} is: give it another name.")
            owner[name] = kind


def parse(vgm: type | None, vlm: type, argv: list[str] | None) -> Options:
    import tyro

    @dataclass
    class Which:
        generator: Literal[tuple(GENERATORS)] = "wan"  # type: ignore[valid-type]

    kind = Options
    if vgm is None:
        kind = Shipped
        which, _ = tyro.cli(Which, args=argv, add_help=False, return_unknown_args=True)
        module, name = GENERATORS[which.generator]
        vgm = getattr(importlib.import_module(module), name)
    fields = vgm if is_dataclass(vgm) else NoOptions
    check_names(kind, Config, vlm, fields)
    options = tyro.cli(kind[fields, vlm], args=argv, prog=program(),
                       description=__doc__,
                       config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    if fields is NoOptions:
        options.vgm = vgm() if isinstance(vgm, type) else vgm
    return options


if __name__ == "__main__":
    # under that name Ray's workers find the classes
    from examples.bench.run import main

    sys.exit(main())
