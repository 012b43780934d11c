"""Several configs x seeds, trained on the same data from the same initial weights, in one table and one picture.

    python compare.py configs/rope.py configs/alibi.py --seeds=3
    python compare.py none rope alibi 'rope(fraction=0.75)' --common=configs/quick.py --jobs=2 --out_dir=out/quick

What is compared are config files, or values of `posenc`. Seeds pair the runs: those of one seed see the same batches
and start from the same weights apart from the encoding, so the differences to the first are far surer than the losses.
The same command goes on where it was stopped, and adds what is new. Where runs go on from another (`init_from`), that
one is measured too: as it is, under a window of its training length, and with each encoding laid over it, untrained.
"""

import core.start  # noqa: F401  # isort: skip

import concurrent.futures
import functools
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

import data
import evaluate
import posenc
from core import flags as configs
from core import place as places
from core import report, runs
from core.errors import UserError, require, run
from core.settings import Config
from data import tasks, vocabulary
from evaluate import TABLES, by_multiple

HERE = Path(__file__).parent
SINKS = 4  # under the window that stretched contexts are compared with


@dataclass
class Compare(Config):
    """Settings that all runs share, and how to compare."""

    usage: ClassVar[str] = "python compare.py CONFIG.py|POSENC ... [--common=CONFIG.py] [--key=value ...]"

    common: str | list = ""  # config file of settings that all share, or several
    seeds: int = 3  # runs of each, with seed, seed + 1, ...
    jobs: int = 0  # runs at once, which share the CPU's cores or take turns on GPUs; 0 means 1, or one for each GPU
    targets: int = 64  # windows scored at every length
    docs: str = ""  # a folder whose results.md has a place for the tables, <!-- NAME --> of out_dir; and for NAME.png

    def __post_init__(self):
        super().__post_init__()
        for key in ("seeds", "targets"):
            require(getattr(self, key) >= 1, f"--{key} must be at least 1, not {getattr(self, key)}")
        require(self.jobs >= 0, "--jobs must not be negative")
        require(not self.docs or (Path(self.docs) / "results.md").is_file(), f"--docs={self.docs} has no results.md")


@dataclass
class Contestant:
    name: str  # in tables
    folder: str  # of its runs, with the seed behind it
    argv: list  # what train.py is told
    settings: dict  # the same, read

    def config(self, seed, out):
        return runs.settle([], self.settings | {"seed": seed, "out_dir": str(out / f"{self.folder}-{seed}")})


def contestants(words, common, flags):
    """What the command line names -> [Contestant]. UserError for what is neither config file nor encoding."""
    if "posenc" in flags:
        raise UserError("--posenc would make all of them the same; name encodings as you name config files, without it")
    shared, found = {}, {}
    for file in common:
        shared |= configs.read(file, Config)
    for word in words:
        if word.endswith(".py"):
            name, folder, own, argv = Path(word).stem, Path(word).stem, configs.read(word, Config), [word]
        else:
            try:
                posenc.parse(word)
            except ValueError as error:
                raise UserError(f"{word} is no config file (FILE.py), and as an encoding: {error}") from None
            name, folder, own, argv = word, report.slug(word), {"posenc": word}, [f"--posenc={word}"]
        if folder in found:
            raise UserError(f"two are called '{folder}': give the config files different names")
        argv = [*common, *argv, *(f"--{key}={value}" for key, value in flags.items())]
        found[folder] = Contestant(name, folder, argv, shared | own | flags)
    if not found:
        raise UserError(f"which configs? usage: {Compare.usage}")
    return list(found.values())


class Workers:
    """Scripts in processes of their own, `jobs` at once, which share the cores or take turns on the GPUs."""

    def __init__(self, jobs, device, logs):
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        self.jobs, self.logs, self.running, self.stopped = jobs or max(1, gpus), logs, set(), threading.Event()
        self.places = queue.Queue()
        for index in range(self.jobs):
            self.places.put(f"cuda:{index % gpus}" if gpus else device.type)
        self.env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}

    def call(self, name, script, *argv):
        """Run a script to its end; what it prints goes to a file. UserError with the last line of that, if it fails."""
        log, place = self.logs / f"{name}.log", self.places.get()
        try:
            if self.stopped.is_set():
                return
            command = [sys.executable, str(HERE / script), *map(str, argv), f"--device={place}"]
            with open(log, "w") as out:
                process = subprocess.Popen(command, env=self.env, stdout=out, stderr=subprocess.STDOUT)
                self.running.add(process)
                if self.stopped.is_set():  # since we looked: nobody else would end it
                    process.terminate()
                status = process.wait()
                self.running.discard(process)
        finally:
            self.places.put(place)
        if status and not self.stopped.is_set():
            said = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.startswith(script)]
            why = f"killed by signal {-status}" if status < 0 else said[-1] if said else f"exit status {status}"
            raise UserError(f"{name}: {why} (all it said is in {log})")

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
                return {keys[one]: one.result() for one in tqdm(done, "runs", len(keys), disable=None, unit="")}
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    tqdm.write("stopping; the same command goes on from there", file=sys.stderr)
                self.stopped.set()
                for process in list(self.running):
                    process.terminate()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)


def measured(workers, name, folder, path, step, checksum, *flags):
    """evaluate.py's result for the run at `path`: the one in the folder, where the same call left it after the run's
    checkpoint was written, or a new one."""
    argv = [str(path), *flags, f"--out_dir={folder}"]

    def read():
        saved = runs.read_json(folder / "length.json")
        same = saved and saved["made"]["command"].startswith(shlex.join(["python", "evaluate.py", *argv]))
        if not same or (folder / "length.json").stat().st_mtime < runs.find(path).stat().st_mtime:
            return None
        (result,) = saved["runs"].values()
        current = result["step"] == step and result.get("data_checksum", checksum) == checksum
        return result | {"commit": saved["made"]["commit"]} if current else None

    if not read():
        workers.call(f"{name}-reach", "evaluate.py", *argv)
    result = read()
    if not result and not workers.stopped.is_set():
        raise UserError(f"{path} is not at step {step}: was it trained further? Choose that --max_steps, or --out_dir")
    return result


def trained(workers, config, argv, checksum, *flags):
    """Train a run, or go on with it, and measure it -> evaluate.py's result."""
    folder = Path(config.out_dir)
    apart = runs.MAY_CHANGE - {"max_steps"} | (set() if config.vocab_size else {"vocab_size"})  # 0: the tokenizer's
    # As JSON, whose keys are text; a run from before a setting existed has its default.
    saved, wanted = (
        {key: json.dumps(value) for key, value in settings.items() if key not in apart}
        for settings in (runs.plain(Config()) | runs.read_json(folder / "config.json"), runs.plain(config))
    )
    (found,) = runs.read_json(folder / "reach" / "length.json").get("runs", {None: {}}).values()
    current = found.get("step") == config.max_steps and found.get("data_checksum", checksum) == checksum
    if saved != wanted or not current:  # a run told to go on has other settings before it has gone
        quiet = "--length_targets=0"  # its closing table would be measured twice
        workers.call(folder.name, "train.py", quiet, *argv, f"--seed={config.seed}", f"--out_dir={folder}")
    return measured(workers, folder.name, folder / "reach", folder, config.max_steps, checksum, *flags)


def mean(results):
    """Results of several seeds -> one with their means: nested dicts and lists of numbers, of the same form in all."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean([result[key] for result in results]) for key in first}
    if isinstance(first, list):
        return [mean(list(column)) for column in zip(*results, strict=True)]
    return statistics.fmean(results) if isinstance(first, float) else first


def with_error(numbers, form):
    """Numbers of several seeds -> their mean, with its sign, and its standard error, as text."""
    error = f" ± {form.format(statistics.stdev(numbers) / math.sqrt(len(numbers)))}" if len(numbers) > 1 else ""
    return form.replace("{:", "{:+").format(statistics.fmean(numbers)) + error


def seeds_table(results, seeds, key):
    """{name: [result of each seed]} -> lines: mean, every seed, and the paired difference to the first of them."""
    title, _, form = TABLES[key]
    rows, first = {}, None
    for name, many in results.items():
        numbers = [by_multiple(one, key) for one in many]
        first = first or numbers
        at = {m: [one[m] for one in numbers] for m in numbers[0]}  # multiple of T: what each seed has there
        rows[name, "mean"] = {m: f"**{form.format(statistics.fmean(column))}**" for m, column in at.items()}
        for index, seed in enumerate(seeds):
            rows[name, f"seed {seed}"] = {m: form.format(column[index]) for m, column in at.items()}
        if numbers is not first:
            pairs = {m: [x - one[m] for x, one in zip(at[m], first, strict=True)] for m in at if m in first[0]}
            rows[name, f"less {next(iter(results))}"] = {m: with_error(column, form) for m, column in pairs.items()}
    return evaluate.at_multiples([title, ""], rows)


def ratio_table(results):
    """{name: mean result} -> lines: perplexity over that at T."""
    rows = {}
    for name, result in results.items():
        loss = by_multiple(result, "loss")
        rows[name,] = {m: f"{math.exp(nats - loss[1]):.2f}" for m, nats in loss.items() if 1 in loss}
    return evaluate.at_multiples(["perplexity / perplexity at T"], rows)


def lies_over(state, spec):
    """Whether a checkpoint reads with another encoding untrained: one with weights of its own has none in it."""
    try:
        runs.load_weights(runs.build(runs.config_of(state, posenc=spec)), state)
    except UserError:
        return False
    return True


def before_training(workers, out, bases, every, T, checksum, *flags):
    """{title: function that measures}: the runs that others go on from, as they are, under a window, and with every
    encoding that goes on from them laid over, untrained, if it has no weights of its own. bases: {path: checkpoint};
    those of another corpus are left out, and published models where --data cannot name this one."""
    jobs, first = {}, every[0][1]
    for name, (base, state) in zip(runs.names(list(bases)), bases.items(), strict=True):
        published = "data_checksum" not in state
        if published and (first.packages or first.shards > 1 or not isinstance(first.text, str)):
            continue
        if state.get("data_checksum", checksum) != checksum:
            continue
        data_flag = [f"--data={first.text or first.dataset}"] if published else []
        ways = {f"{name} as it is": data_flag}
        if state["config"]["dataset"] not in tasks.TASKS:
            ways[f"{name} under a window of T"] = [*data_flag, f"--window={T}", f"--sinks={SINKS}"]
        for one, config in every:
            another = config.init_from == base and config.posenc != state["config"]["posenc"]
            if another and lies_over(state, config.posenc):
                ways[f"{one.name}, untrained"] = [*data_flag, f"--posenc={config.posenc}"]
        for title, more in ways.items():
            folder = out / "untrained" / report.slug(title)
            jobs[title] = functools.partial(
                measured, workers, folder.name, folder, base, state["step"], checksum, *flags, *more
            )
    return jobs


def main(argv):
    words, given = configs.flags(argv, Compare)
    ours = {field.name for field in fields(Compare)} - {field.name for field in fields(Config)}
    ours |= {"out_dir", "seed", "device"}
    options = configs.make(Compare, {key: value for key, value in given.items() if key in ours})
    common = [options.common] if isinstance(options.common, str) else options.common
    rest = {key: value for key, value in given.items() if key not in ours}
    found = contestants(words, [file for file in common if file], rest)
    out, seeds = Path(options.out_dir or "out/compare"), [options.seed + index for index in range(options.seeds)]
    if (out / runs.CKPT).exists() or out.is_file():
        raise UserError(f"{out} is {'a file' if out.is_file() else 'a run'}; choose another folder with --out_dir")
    page, marks = Path(options.docs) / "results.md", (f"<!-- {out.name} -->\n", f"<!-- /{out.name} -->")
    if options.docs and not all(mark in page.read_text() for mark in marks):  # or the tables would replace all of it
        raise UserError(f"{page} has no place for the tables: the lines {marks[0].strip()} and {marks[1]}")
    device = places.choose(options.device)
    every = [(one, one.config(seed, out)) for seed in seeds for one in found]
    first = every[0][1]
    for key in ("dataset", "text", "packages", "shards", "tokenizer"):
        if len({str(getattr(config, key)) for _, config in every}) > 1:
            raise UserError(f"{key} is not the same in all of them: their numbers would not compare")
    bases = {base: runs.load(base) for base in {config.init_from: 0 for _, config in every if config.init_from}}
    lengths = [config.original_length or config.train_length for _, config in every]
    own = [state["config"]["train_length"] for state in bases.values()]
    T = min(lengths + own)
    if first.dataset in tasks.TASKS and len({*own, *(config.train_length for _, config in every)}) > 1:
        raise UserError("train_length must be the same in all of them: tasks are measured at multiples of their own")
    checksum = data.open_dataset(first, vocabulary.load(first.tokenizer)).meta["data_checksum"]
    lock = runs.lock(out / "logs")  # held until this process ends
    if lock is None:
        raise UserError(f"another comparison works in {out}: wait for its end, or choose another folder with --out_dir")

    workers = Workers(min(options.jobs, len(every)), device.device, out / "logs")
    flags = f"--targets={options.targets}", f"--train_length={T}"
    jobs = before_training(workers, out, bases, every, T, checksum, *flags)
    untrained = list(jobs)
    for one, config in every:
        jobs[one.name, config.seed] = functools.partial(trained, workers, config, one.argv, checksum, *flags)
    tqdm.write(f"{len(jobs)} runs, {workers.jobs} at once; what they say goes to {out}/logs", file=sys.stderr)
    results = workers.all(jobs)

    by_seed = {one.name: [results[one.name, seed] for seed in seeds] for one in found}
    means = {title: results[title] for title in untrained} | {name: mean(many) for name, many in by_seed.items()}
    key = evaluate.headline(means)
    lines = [*evaluate.tables(means), "", *seeds_table(by_seed, seeds, key)]
    if key == "loss":
        lines += ["", *ratio_table(means)]
    command = shlex.join(["python", "compare.py", *argv])
    runs.write_json(
        out / "results.json",
        {
            "made": {"command": command} | report.provenance(device),
            "train_length": T,
            "untrained": {title: results[title] for title in untrained},
            "runs": {name: dict(zip(map(str, seeds), many, strict=True)) for name, many in by_seed.items()},
        },
    )
    evaluate.pictures(out, means, by_seed)
    commits = ", ".join(sorted({result["commit"] for result in results.values()}))
    said = {"seeds": ", ".join(map(str, seeds)), "measured at": commits}
    for folder in [out, *([Path(options.docs)] if options.docs else [])]:
        report.write_table(folder / "results.md", out.name, lines, command, device, **said)
    if options.docs:
        shutil.copy(out / "length.png", Path(options.docs) / f"{out.name}.png")
    print("\n".join(evaluate.table(means)))
    print(f"all of it: {out}/results.md, results.json, length.png")


if __name__ == "__main__":
    run(main)
