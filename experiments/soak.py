"""Looks for the next failure: kills, power cuts, spoiled files, flags and options, at random.

python experiments/soak.py [short] [kills disks cuts ranks files flags options] [SEED]

kills    training is killed at random moments, and just before and after its renames, until it
         ends; its last checkpoint must equal that of a run in peace, bit for bit
disks    the same with files that cannot grow beyond a random size for a while
cuts     training on a file system of its own, of which a copy is taken at a random moment, as a
         power cut would leave it: every save that had returned must be there (needs root and a
         loop device)
ranks    two processes under torchrun, of which a random one is killed
files, flags, options    experiments/soak_inputs.py
Without a word all of it is done: about half an hour on two cores. "short" takes under a minute.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
import soak_inputs
import torch

import config
import train_ddpd
from support import checkpoint

WORK = Path("out/soak")
CRASHED = 70            # exit status of a child that ended by an unexpected exception
TINY = """
    --image-size 8 --n-layer 1 --n-head 1 --n-embd 16 --base-width 16 --batch-size 4
    --warmup-iters 2 --log-interval 5 --eval-interval 20 --eval-sequences 8 --eval-samples 1
    --save-interval 4 --max-iters 60 --dtype float32
""".split()
METHODS = {
    "mask": [],
    "uniform": ["--denoiser-process", "uniform"],
    "single": ["--nets", "single", "--denoiser-process", "uniform"],
    "gidd": ["--method", "gidd"],
    "forcing": ["--method", "forcing", "--noise-granularity", "token"],
}
LONGEST_S = 0.6         # until a kill
COUNTS = {              # long, short
    "kills": (250, 8), "disks": (40, 2), "cuts": (25, 0), "ranks": (10, 0),
    "files": (5200, 250), "flags": (1200, 120), "options": (3200, 150),
}


class Outcome(NamedTuple):
    n: int                  # attempts
    words: str              # what was done
    failures: list[str]


# Training in a child that may be killed


def tiny_config(folder: Path, method: str) -> config.Config:
    return config.load(argv=[*TINY, *METHODS[method], "--out-dir", str(folder)])


def fork_training(cfg: config.Config, prepare: Callable = lambda: None) -> int:
    """Train in a child of this process, after prepare().  -> its process id"""
    pid = os.fork()
    if pid:
        return pid
    status = 0
    log = os.open(WORK / "child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        prepare()
        train_ddpd.main(cfg)
    except SystemExit as error:
        print(error.code)
        status = 1
    except BaseException:
        traceback.print_exc()
        status = CRASHED
    sys.stdout.flush()
    os._exit(status)


def train_in_peace(method: str) -> str:
    """The digest of a run's last checkpoint, if nothing disturbs it."""
    folder = WORK / f"peace_{method}"
    if not (folder / "ckpt.pt").exists():
        os.waitpid(fork_training(tiny_config(folder, method)), 0)
    return weights_digest(folder)


def weights_digest(folder: Path) -> str:
    state = checkpoint.require_checkpoint(folder)
    return checkpoint.digest([state[part] for part in ("it", "nets", "ema", "optimizers")])


def kill_at_rename(rng: random.Random) -> Callable:
    """-> what makes a child kill itself just before or after one of its next renames"""
    n_left = rng.randint(1, 16)
    is_before = rng.random() < 0.5
    rename = os.replace

    def replace(*args):
        nonlocal n_left
        n_left -= 1
        if n_left == 0 and is_before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)
        if n_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        os.replace = replace
    return prepare


def limit_files(rng: random.Random) -> Callable:
    """-> what makes a child's files end at a random size"""
    size = int(10 ** rng.uniform(1, 5.5))

    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return prepare


def last_words() -> str:
    lines = (WORK / "child.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "silence"


def n_starts(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text(errors="replace").count('"start": true') if log.exists() else 0


def kill_later(pid: int, seconds: float) -> int:
    """-> exit status, negative of a signal"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Kills and full disks


def kills(n: int, rng: random.Random) -> Outcome:
    """n kills after training began; kills before that are not counted."""
    failures = []
    n_kills = n_runs = n_renames = 0
    while n_kills < n:
        method = rng.choice(list(METHODS))
        expected = train_in_peace(method)
        folder = fresh_folder("killed")
        n_runs += 1
        status = -1
        while status != 0:
            before = n_starts(folder)
            at_rename = rng.random() < 0.5
            prepare = kill_at_rename(rng) if at_rename else lambda: None
            pid = fork_training(tiny_config(folder, method), prepare)
            status = kill_later(pid, 30 if at_rename else rng.uniform(0, LONGEST_S))
            if status > 0:
                failures.append(f"{method}, kill {n_kills}: {last_words()}")
                break
            has_trained = status < 0 and n_starts(folder) > before
            n_kills += has_trained
            n_renames += has_trained and at_rename
        if status == 0 and weights_digest(folder) != expected:
            failures.append(f"{method}: other weights after kills")
    words = f"kills in training, {n_renames} of them at a rename; {n_runs} runs"
    return Outcome(n_kills, words, failures)


def disks(n: int, rng: random.Random) -> Outcome:
    """Runs whose files cannot grow for a while: they go on, or end in a line; and end the same."""
    failures = []
    n_ended = 0
    for _ in range(n):
        method = rng.choice(list(METHODS))
        expected = train_in_peace(method)
        folder = fresh_folder("full")
        pid = fork_training(tiny_config(folder, method), limit_files(rng))
        status = kill_later(pid, 60)
        if status not in (0, 1):
            failures.append(f"{method}, full disk: {last_words()}")
        n_ended += status == 1
        pid = fork_training(tiny_config(folder, method))
        status = kill_later(pid, 60)
        if status:
            failures.append(f"{method}, after a full disk: {last_words()}")
        elif weights_digest(folder) != expected:
            failures.append(f"{method}: other weights after a full disk")
    return Outcome(n, f"runs on a full disk, {n_ended} ended by it", failures)


def fresh_folder(name: str) -> Path:
    shutil.rmtree(WORK / name, ignore_errors=True)
    return WORK / name


# Power cuts


def run_quietly(*command) -> bool:
    return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0


@contextlib.contextmanager
def mounted(image: Path):
    """A file system in a file.  yields its folder, or None where there is no loop device"""
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    is_mounted = run_quietly("mount", "-o", "loop", image, folder)
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            run_quietly("umount", "-l", folder)


def report_saves(path: Path) -> Callable:
    """-> what makes a child note the iteration of each save that has returned"""
    def prepare():
        save = checkpoint.save_checkpoint

        def save_checkpoint(folder, state):
            is_saved = save(folder, state)
            with open(path, "a") as file:
                file.write(f"{state['it']}\n")
            return is_saved

        checkpoint.save_checkpoint = save_checkpoint
    return prepare


def cuts(n: int, rng: random.Random) -> Outcome:
    failures = []
    n_cuts = 0
    image, after = WORK / "disk.img", WORK / "after.img"
    for i in range(n):
        with open(image, "wb") as file:
            file.truncate(2**25)
        if not run_quietly("mkfs.ext4", "-q", "-F", image):
            return Outcome(0, "power cuts: skipped, no mkfs.ext4", [])
        saves = WORK / "saves.txt"
        saves.write_text("")
        with mounted(image) as folder:
            if folder is None:
                return Outcome(0, "power cuts: skipped, no loop device", [])
            cfg = tiny_config(folder / "run", "mask")
            pid = fork_training(cfg, report_saves(saves))
            while not saves.read_text() and os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
            with contextlib.suppress(ChildProcessError):
                kill_later(pid, rng.uniform(0, LONGEST_S))
            n_saved = int(saves.read_text().split()[-1])
            shutil.copyfile(image, after)
        with mounted(after) as folder:
            try:
                it = checkpoint.require_checkpoint(folder / "run")["it"]
                if it < n_saved:
                    failures.append(f"cut {i}: iteration {n_saved} was saved, {it} is there")
            except SystemExit as error:
                failures.append(f"cut {i}: {error}")
        n_cuts += 1
    return Outcome(n_cuts, "power cuts", failures)


# Two processes


def start_ranks(folder: Path, n_restarts: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--max-restarts={n_restarts}", common.ROOT / "train_ddpd.py", *TINY]
    command += ["--max-iters", "400", "--out-dir", folder]
    with open(WORK / "child.log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)


def ranks(n: int, rng: random.Random) -> Outcome:
    if n == 0:
        return Outcome(0, "kills of one of two ranks: skipped", [])
    failures = []
    peace = WORK / "peace_ranks"
    if not (peace / "ckpt.pt").exists():
        start_ranks(peace, 0).wait()
    folder = fresh_folder("ranks")
    n_kills = 0
    while n_kills < n:
        agent = start_ranks(folder, n_restarts=n)
        before = n_starts(folder)
        while agent.poll() is None and n_kills < n:
            if n_starts(folder) == before:
                time.sleep(0.05)
                continue
            before = n_starts(folder)
            time.sleep(rng.uniform(0, 2 * LONGEST_S))
            children = subprocess.run(
                ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True
            ).stdout.split()
            if children:
                os.kill(int(rng.choice(children)), signal.SIGKILL)
                n_kills += 1
        if agent.wait():
            failures.append(f"ranks, kill {n_kills}: {last_words()}")
            break
        if weights_digest(folder) != weights_digest(peace):
            failures.append("ranks: other weights after kills")
        folder = fresh_folder("ranks")
    return Outcome(n_kills, "kills of one of two ranks", failures)


if __name__ == "__main__":
    torch.set_num_threads(1)                            # sums in one order, and forks are safe
    parts = dict(kills=kills, disks=disks, cuts=cuts, ranks=ranks)
    parts |= {name: getattr(soak_inputs, name) for name in ("files", "flags", "options")}
    words = common.read_words(__doc__, *parts, "short")
    seed = (common.read_numbers() or [0])[0]
    WORK.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in common.choose(words, parts):
        began = time.monotonic()
        outcome = Outcome(*parts[name](COUNTS[name]["short" in words], random.Random(seed)))
        outcomes.append(outcome)
        seconds = time.monotonic() - began
        print(f"{outcome.n} {outcome.words}: {len(outcome.failures)} failures, {seconds:.0f} s")
        for failure in outcome.failures:
            print(f"    {failure}")
    raise SystemExit(1 if any(outcome.failures for outcome in outcomes) else 0)
