"""Runs that are trained and measured by train.py and evaluate.py, in processes of their own, several at once.

Folders are all the memory there is: a run that is finished is not trained again, and one that was measured is not
measured again. A comparison that was killed therefore goes on where it was, and it can do nothing that a user could
not.
"""

import concurrent.futures
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
from tqdm import tqdm

from core import files, runs
from core.errors import ENDS_WITH_PARENT, UserError, no_flag
from core.measure import TASK_MULTIPLES
from core.settings import Config
from lab import tables

ROOT = Path(__file__).parent.parent


class Workers:
    """Scripts in processes of their own, `jobs` at once, which share the cores or take turns on the GPUs.

    jobs: 0 means 1, or one for each GPU. device: torch.device, where they compute. logs: a folder for all they say.
    """

    def __init__(self, jobs, device, logs):
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        self.jobs, self.logs, self.running, self.stopped = jobs or max(1, gpus), logs, set(), threading.Event()
        self.devices = queue.Queue()
        for index in range(self.jobs):
            self.devices.put(f"cuda:{index % gpus}" if gpus else device.type)
        # A process ends when the pipe of its stdin does, and the kernel ends that with this process, however it ends.
        own = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs)), ENDS_WITH_PARENT: "1"}
        self.env = os.environ | own

    def call(self, name, script, *argv):
        """Run a script to its end; what it prints goes to a file. UserError with the last line of that, if it fails."""
        log, device = self.logs / f"{name}.log", self.devices.get()
        try:
            if self.stopped.is_set():
                return
            status = self.wait([sys.executable, str(ROOT / script), *map(str, argv), f"--device={device}"], log)
        finally:
            self.devices.put(device)
        if status and not self.stopped.is_set():
            said = [
                line
                for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
                if line.startswith(script)
            ]
            why = f"killed by signal {-status}" if status < 0 else said[-1] if said else f"exit status {status}"
            raise UserError(f"{name}: {why} (all it said is in {log})")

    def wait(self, command, log):
        """Run the command, its output into the file `log` -> its exit status, below 0 where a signal ended it."""
        with open(log, "w", encoding="utf-8") as out:
            pipes = {"stdin": subprocess.PIPE, "stdout": out, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=self.env, **pipes)
            self.running.add(process)
            if self.stopped.is_set():  # since `call` looked: nobody else would end it
                process.terminate()
            status = process.wait()
            process.stdin.close()
            self.running.discard(process)
        return status

    def wait_for(self, folder):
        """Wait until no other process trains into a run's folder: where a comparison was killed, the runs that it had
        started are still saving what they have."""
        lock, said = folder / runs.LOCK, False
        while lock.exists() and not free(lock) and not self.stopped.wait(said and 0.5):
            if not said:
                tqdm.write(f"waiting for another process, which trains into {folder}", file=sys.stderr)
            said = True

    def all(self, functions):
        """{key: function that calls us} -> {key: what it returned}. The first failure, Ctrl-C or SIGTERM stops all of
        them; runs save what they have."""

        def stop(number, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            keys = {pool.submit(function): key for key, function in functions.items()}
            try:
                done = concurrent.futures.as_completed(keys)
                return {
                    keys[future]: future.result() for future in tqdm(done, "runs", len(keys), disable=None, unit="")
                }
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    tqdm.write("stopping; the same command goes on from there", file=sys.stderr)
                self.stopped.set()
                for process in list(self.running):
                    process.terminate()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)


def free(path):
    """Whether no process holds the lock at `path`."""
    held = files.lock(path)
    if held is not None:
        held.release()
    return held is not None


def trained(workers, config, argv, checksum, *flags):
    """Train the run of `config`, or go on with it, and measure it -> {name: record}, as evaluate.py left them.

    argv: what train.py is told, but for seed and folder. checksum: of the corpus. flags: what evaluate.py is told.
    UserError where a script fails.
    """
    folder = Path(config.out_dir)
    saved, wanted = runs.read_json(folder / "config.json"), runs.plain(config)
    _, records, _ = left(folder / "reach")
    # The records are looked at too: a run that was told to go on has its new settings before it has gone.
    same = settings_of(saved, config) == settings_of(wanted, config)
    if not same or not up_to_date(records, config.max_steps, checksum):
        workers.wait_for(folder)
        quiet = "--length_targets=0"  # its closing table would be measured twice
        workers.call(folder.name, "train.py", quiet, *argv, f"--seed={config.seed}", f"--out_dir={folder}")
    return measured(workers, folder, config.max_steps, checksum, *flags)


def settings_of(saved, config):
    """The saved settings that have to be those of `config` for a run to be the same one, as JSON, whose keys are text.
    A run from before a setting existed has its default."""
    free = runs.MAY_CHANGE - {"max_steps"}
    free |= set() if config.vocab_size else {"vocab_size"}  # 0 stands for the tokenizer's
    return {key: json.dumps(value) for key, value in (runs.plain(Config()) | saved).items() if key not in free}


def measured(workers, run, step, checksum, *flags):
    """{name: record} of the run, which is at `step`: those in RUN/reach, where the same call of evaluate.py left them
    after the run's checkpoint was written, or new ones. UserError where the run is at another step."""
    folder = run / "reach"
    argv = [no_flag(run), *flags, f"--out_dir={folder}"]

    def read():
        command, records, written = left(folder)
        same = command.startswith(shlex.join(["python", "evaluate.py", *argv]))
        newer = written >= runs.find(run).stat().st_mtime
        return records if same and newer and up_to_date(records, step, checksum) else {}

    if not read():
        workers.call(f"{run.name}-reach", "evaluate.py", *argv)
    records = read()
    if not records and not workers.stopped.is_set():
        raise UserError(f"{run} is not at step {step}: was it trained further? Choose that --max_steps, or --out_dir")
    return records


def left(folder):
    """A folder that evaluate.py wrote into -> (its command, {name: record}, the time when it was written)."""
    for name in ("results.json", "length.json"):  # the second is its older name
        file = folder / name
        saved = runs.read_json(file)
        try:
            command, commit = saved["made"]["command"], {"commit": saved["made"]["commit"]}
            records = {name: record | commit for name, record in saved["runs"].items()}
            known = isinstance(command, str) and isinstance(commit["commit"], str)
            whole = known and all(tables.is_whole(record) and "step" in record for record in records.values())
        except (LookupError, TypeError, AttributeError):
            whole = False
        if whole:
            return command, records, file.stat().st_mtime
        if saved:
            runs.set_aside(file)
    return "", {}, 0.0


def up_to_date(records, step, checksum):
    """Whether there are records, all of them of that step and corpus, and measured as they would be now."""
    parts = [part for record in records.values() for part in (record, *record.get("tasks", {}).values())]
    if not all(map(as_today, parts)):
        return False
    known = {(record["step"], record.get("data_checksum", checksum)) for record in records.values()}
    return known == {(step, checksum)}


def as_today(record):
    """Whether a text was scored on the targets that are drawn now, and a task at today's multiples of T. Its shortest
    example may stand for the first of them."""
    if "exact" not in record:
        return "loss" not in record or "own_context" in record  # a mixture of tasks alone has no loss of its own
    return set(record["lengths"][1:]) <= {int(multiple * record["train_length"]) for multiple in TASK_MULTIPLES}
