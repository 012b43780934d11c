"""Several configs x seeds, trained on the same data from the same initial weights, in one table and one picture.

    python compare.py configs/rope.py configs/alibi.py --seeds=3
    python compare.py none rope alibi 'rope(fraction=0.75)' --common=configs/quick.py --jobs=2 --out_dir=out/quick

What is compared are config files, or values of `posenc`. Seeds pair the runs: those of one seed see the same batches
and start from the same weights apart from the encoding, so the differences to the first are far surer than the losses.
The same command goes on where it was stopped, and adds what is new.
"""

import core.start  # noqa: F401  # isort: skip

import functools
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

import data
import posenc
from core import files, report, runs
from core import flags as configs
from core import place as places
from core.errors import UserError, count, require, require_range, run
from core.settings import Config
from data import tasks, vocabulary
from lab import tables
from lab.workers import Workers, trained


@dataclass
class Compare(Config):
    """Settings that all runs share, and how to compare."""

    usage: ClassVar[str] = "python compare.py CONFIG.py|POSENC ... [--common=CONFIG.py] [--key=value ...]"

    common: str | list = ""  # config file of settings that all share, or several
    seeds: int = 3  # runs of each, with seed, seed + 1, ...
    jobs: int = 0  # runs at once, which share the CPU's cores or take turns on GPUs; 0 means 1, or one for each GPU
    targets: int = 64  # windows scored at every length
    key_evaluator: str = ""  # a run trained on longer contexts: the loss of tokens that, it finds, need them
    docs: str = ""  # a folder whose results.md has the place <!-- NAME --> of out_dir for the tables, or a page (.md)

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "in 1 ... 10^4", "seeds")
        require_range(self, "in 1 ... 10^6", "targets")
        require_range(self, "in 0 ... 10^6", "jobs")
        self.out_dir = self.out_dir or "out/compare"
        out = Path(self.out_dir)
        taken = "a file" if out.is_file() else "a run" if (out / runs.CKPT).exists() else ""
        require(not taken, f"{out} is {taken}; choose another folder with --out_dir")
        tables.check_folder(out)
        if self.docs:
            require(self.page.is_file(), f"--docs={self.docs}: there is no page {self.page}")
            placed = report.place_of(out.name).search(self.page.read_bytes())
            marks = f"the lines <!-- {out.name} --> and <!-- /{out.name} -->"
            require(placed, f"{self.page} has no place for the tables: {marks}")

    @property
    def page(self):
        """The page that gets the tables too; pictures go beside it."""
        return Path(self.docs) if self.docs.endswith(".md") else Path(self.docs) / "results.md"


# These settings of the command line are the comparison's own; all others are for its runs.
OWN = {"out_dir", "seed", "device"} | {field.name for field in fields(Compare)} - {
    field.name for field in fields(Config)
}


@dataclass
class Contestant:
    name: str  # a config file's, or an encoding as it was typed
    folder: str  # of its runs, with the seed behind it
    argv: list  # what train.py is told
    settings: dict  # the same, read

    def config(self, seed, out):
        return runs.settle([], self.settings | {"seed": seed, "out_dir": str(out / f"{self.folder}-{seed}")})

    def title(self, config):
        """The name in tables: that of an encoding says all that is in force, whatever `init_from` began with."""
        named = self.settings.get("posenc") == self.name
        return posenc.title(self.name, config.posenc) if named else self.name


def contestants(words, common, settings):
    """Words of the command line, config files that all share, and {key: value} of flags -> [Contestant]. UserError for
    a word that is neither config file nor encoding."""
    if "posenc" in settings:
        raise UserError("--posenc would make all of them the same; name encodings as you name config files, without it")
    shared, named = {}, {}
    for file in common:
        shared |= configs.read(file, Config)
    for word in words:
        if word.endswith(".py"):
            name, folder, own, argv = Path(word).stem, Path(word).stem, configs.read(word, Config), [word]
        else:
            spec = configs.convert_flag(word, "posenc", Config)  # a list over the layers perhaps
            try:
                posenc.members(spec)
            except ValueError as error:
                raise UserError(f"{word} is no config file (FILE.py), and as an encoding: {error}") from None
            name, folder, own, argv = word, report.slug(word), {"posenc": spec}, [f"--posenc={word}"]
        if folder in named:
            raise UserError(f"two are called '{folder}': give the config files different names")
        argv = [*common, *argv, *(f"--{key}={value}" for key, value in settings.items())]
        named[folder] = Contestant(name, folder, argv, shared | own | settings)
    if not named:
        raise UserError(f"which configs? usage: {Compare.usage}")
    return list(named.values())


def shared_length(all_configs):
    """T of the comparison: the shortest length that any of the runs, or a run that one goes on from, was trained at.
    UserError for runs whose numbers would not compare."""
    for key in ("dataset", "text", "packages", "shards", "tokenizer"):
        if len({str(getattr(config, key)) for config in all_configs}) > 1:
            raise UserError(f"{key} is not the same in all of them: their numbers would not compare")
    bases = dict.fromkeys(config.init_from for config in all_configs if config.init_from)
    before = [runs.load(base)["config"]["train_length"] for base in bases]
    lengths = {*before, *(config.train_length for config in all_configs)}
    if set(all_configs[0].datasets) & set(tasks.TASKS) and len(lengths) > 1:
        raise UserError("train_length must be the same in all of them: tasks are measured at multiples of their own")
    return min([*before, *(config.original_length or config.train_length for config in all_configs)])


def beside(name, key, task):
    """The name, beside a page, of the picture of one of the tables in the folder `name`."""
    own = f"{task}.png" if task else tables.file_of(key)
    return f"{name}.png" if own == "length.png" else f"{name}-{own}"


def write(by_seed, seeds, T, command, place, options):
    """{name: [record of each seed]} -> tables, picture and all figures in the folders that the options name."""
    out = Path(options.out_dir)
    means = {name: tables.mean(records) for name, records in by_seed.items()}
    lines, headlines = tables.tables(means), tables.headlines(means)
    for key, task in headlines:
        lines += ["", *tables.seeds_table(by_seed, seeds, key, task)]
        if key == "loss":
            lines += ["", *tables.ratio_table(means)]
    all_runs = {name: dict(zip(map(str, seeds), records, strict=True)) for name, records in by_seed.items()}
    commits = sorted({record["commit"] for records in by_seed.values() for record in records})
    said = {"seeds": ", ".join(map(str, seeds)), "measured at": ", ".join(commits)}
    for page in [out / "results.md", options.page] if options.docs else [out / "results.md"]:
        report.write_table(page, out.name, lines, command, place, **said)
    tables.pictures(out, means, by_seed)
    drawn = {tables.file_of(*kind): beside(out.name, *kind) for kind in headlines}
    for own, shown in drawn.items() if options.docs else ():
        with files.atomic(options.page.parent / shown, "wb") as file:
            file.write((out / own).read_bytes())
    made = {"command": command} | report.provenance(place)
    runs.write_record(out / "results.json", {"made": made, "train_length": T, "runs": all_runs})
    print("\n".join(tables.tables(means, tables.headlines)))
    print(f"all of it: {out}/results.md, results.json, {', '.join(drawn)}")


def main(argv):
    words, settings = configs.flags(argv, Compare)
    options = configs.make(Compare, {key: value for key, value in settings.items() if key in OWN})
    common = [options.common] if isinstance(options.common, str) else options.common
    named = contestants(
        words, [file for file in common if file], {key: value for key, value in settings.items() if key not in OWN}
    )
    place, out = places.choose(options.device), Path(options.out_dir)
    seeds = [options.seed + index for index in range(options.seeds)]
    all_configs = {(each.name, seed): each.config(seed, out) for seed in seeds for each in named}
    titles = {each.name: each.title(all_configs[each.name, seeds[0]]) for each in named}
    if same := [title for title in titles.values() if list(titles.values()).count(title) > 1]:
        raise UserError(f"two of them are {same[0]}, laid over the encoding that init_from began with")
    first, T = next(iter(all_configs.values())), shared_length(list(all_configs.values()))
    checksum = data.open_dataset(first, vocabulary.load(first.tokenizer)).meta["data_checksum"]
    lock = runs.lock(out / "logs")  # held until this process ends
    if lock is None:
        raise UserError(f"another comparison works in {out}: wait for its end, or choose another folder with --out_dir")

    workers = Workers(min(options.jobs, len(all_configs)), place.device, out / "logs")
    told, measured = {each.name: each.argv for each in named}, [f"--targets={options.targets}", f"--train_length={T}"]
    measured += [f"--key_evaluator={options.key_evaluator}"] if options.key_evaluator else []
    jobs = {
        (name, seed): functools.partial(trained, workers, config, told[name], checksum, *measured)
        for (name, seed), config in all_configs.items()
    }
    tqdm.write(f"{count(len(jobs), 'run')}, {workers.jobs} at once; what they say goes to {out}/logs", file=sys.stderr)
    results = {key: record for key, records in workers.all(jobs).items() for record in records.values()}
    by_seed = {title: [results[name, seed] for seed in seeds] for name, title in titles.items()}
    write(by_seed, seeds, T, shlex.join(["python", "compare.py", *argv]), place, options)


if __name__ == "__main__":
    run(main)
