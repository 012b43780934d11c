"""How far checkpoints extrapolate, for contexts of L tokens from half to 16 times the training length T.

    python evaluate.py out/rope out/alibi --out_dir=out/reach
    python evaluate.py hf:FOLDER --posenc=rope --posenc='rope(scaling="yarn", factor=2)' --lengths='[4096, 8192, 16384]'

Measured are the loss of the same targets as the context grows (core/measure.py), what far context is worth
(lab/gain.py), the usual perplexities and the loss by position (lab/perplexity.py), and how widely attention spreads
(lab/spread.py); of every task that a run learned, how many examples it answers without a mistake. `--frequencies` takes
rope's pairs apart (lab/frequencies.py).
"""

import core.start  # noqa: F401  # isort: skip

import functools
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import data
from core import place as places
from core import report, runs
from core.errors import UserError, nearest, pasted, require, require_range, run
from core.flags import Dtype, changed, flags, make
from core.measure import MULTIPLES, exact_match, length_loss, reach, record, targets
from core.settings import Reading
from data import vocabulary
from lab import frequencies, gain, passkey, perplexity, spread
from lab.tables import check_folder, file_of, headlines, is_whole, picture, pictures, tables
from posenc import title


@dataclass
class Options(Reading):
    """Options for reading runs, and for what of them is measured. Several --posenc are each laid over every run."""

    usage: ClassVar[str] = "python evaluate.py RUN [RUN ...] [--key=value ...]"
    repeats: ClassVar[tuple] = ("posenc",)

    dtype: Dtype = "auto"  # of products; auto is the run's
    targets: int = 128  # windows scored at every length
    lengths: int | list = field(default_factory=list)  # tokens of context: the same targets there, and nothing else
    train_length: int = 0  # T of the lengths and targets; by default each run's own
    data: str = ""  # another data set than the run's: its name, or a file or folder of text
    data_dir: str = ""  # where the token files are; by default where the run had them
    key_evaluator: str = ""  # a run trained on longer contexts: the loss of tokens that, it finds, need them
    frequencies: bool = False  # look at the pairs of rope's rotations instead: norms, shares of the logits, silencing
    out_dir: str = ""  # write results.json, results.md and the pictures into this folder
    table: str = ""  # also write the first tables, and those of tasks, to this Markdown file, with what made them
    picture: str = ""  # also draw the curves into this PNG; of several tasks alone, those of the first

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "in 1 ... 10^6", "targets")
        require_range(self, "in 0 ... 10^8", "train_length")
        self.lengths = [self.lengths] if isinstance(self.lengths, int) else self.lengths
        ascending = all(type(x) is int and 1 < x <= 10**8 for x in self.lengths) and self.lengths == sorted(
            set(self.lengths)
        )
        form = "must be whole numbers in 2 ... 10^8 that rise, as in --lengths='[1024, 2048, 4096]'"
        require(ascending, f"--lengths={self.lengths} {form}")
        for key in ("lengths", "train_length", "window", "log_n", "key_evaluator"):
            alone = not (self.frequencies and getattr(self, key))
            require(alone, f"--frequencies looks at runs as they were trained: leave out --{key}")
        where = "name a folder for them, --out_dir=out/frequencies say"
        require(self.out_dir or not self.frequencies, f"--frequencies draws pictures: {where}")
        self.check_outputs()

    def check_outputs(self):
        """ValueError where something of the user's would be overwritten, or there is no place to write."""
        require(not self.picture or self.picture.endswith(".png"), f"--picture={self.picture} must end in .png")
        for key, path in (("table", self.table), ("picture", self.picture)):
            require(Path(path).parent.is_dir(), f"--{key}={path}: there is no folder {Path(path).parent}")
            require(not path or not Path(path).is_dir(), f"--{key}={path} is a folder; name a file in it")
        page, mark = Path(self.table), f"<!-- {self.kind} -->"
        mine = not self.table or not page.exists() or report.place_of(self.kind).search(page.read_bytes())
        ends = mark.replace(" ", " /", 1)
        require(mine, f"--table={page} has no line {mark}, with {ends} below, so the table would replace all of it")
        out = Path(self.out_dir)
        held = any((out / name).exists() for name in (runs.CKPT, "config.json"))
        require(not held, f"{out} holds a run or a model; take {pasted(f'--out_dir={out}/reach')}, say")
        require(out.is_dir() or not out.exists(), f"--out_dir={out} is a file; name a folder")
        if self.out_dir:
            check_folder(out)

    @property
    def kind(self):
        """The name of the table's place in a Markdown file, as in <!-- evaluate -->."""
        return "frequencies" if self.frequencies else "evaluate"


def open_runs(paths, options):
    """The runs with each --posenc laid over -> {name in tables: core.runs.Run}. A name says all that is in force.
    UserError where they do not compare."""
    opened_runs = {}
    for name, path in zip(runs.names(paths), paths, strict=True):
        overrides = options.posenc or [""]
        for override, opened in zip(overrides, runs.open_runs(path, overrides), strict=True):
            way = title(override, opened.config.posenc)
            opened_runs[name if not options.posenc else f"{name}: {way}" if paths[1:] else way] = opened
    if len({vocabulary.fingerprint(opened.tokenizer) for opened in opened_runs.values()}) > 1:
        raise UserError("these runs have different tokenizers: a loss per token does not compare them")
    learned = {not data.reads_text(opened.config) for opened in opened_runs.values()}
    if options.frequencies and not options.data and True in learned:
        raise UserError("--frequencies reads text, and some of these runs learned a task: name one with --data")
    if len(learned) > 1:
        raise UserError("some of these runs learned a task and some a text: exact match and loss do not compare them")
    configs = [opened.config for opened in opened_runs.values()]
    # What a record has by name: of several tasks each, and nothing where one task is all there is.
    named = [set(config.datasets) if isinstance(config.dataset, list) else {""} for config in configs]
    if learned == {True} and not options.data and not set.intersection(*named):
        raise UserError("these runs share no task, or one of them learned that task alone: no table has all of them")
    return opened_runs


def open_dataset(opened, options):
    """The run's data set, or the one that --data names. UserError where the run's own has changed."""
    config = opened.config
    config.data_dir = options.data_dir or config.data_dir
    mixed = isinstance(config.dataset, list) and not options.data
    if options.lengths and not mixed:  # no longer window has to fit into the text
        known = dict(original_length=config.original_length or config.train_length, length_schedule={}, segments=1)
        config = changed(config, train_length=options.lengths[0], **known)
    if not options.data:
        dataset = data.open_dataset(config, opened.tokenizer)
        if opened.data_checksum and dataset.meta["data_checksum"] != opened.data_checksum:
            where = dataset.folder
            raise UserError(f"the corpus of {opened.path} is not the one here ({where}); name another --data_dir")
        return dataset
    known = options.data in data.SOURCES and options.data != "text"
    if not known and not Path(options.data).expanduser().exists():
        names = nearest(options.data, [name for name in data.SOURCES if name != "text"])
        raise UserError(f"--data={options.data} is neither a file or folder nor a data set; {names}")
    other = dict(dataset=options.data, text="") if known else dict(dataset="text", text=options.data)
    other |= dict(packages=False, shards=1)
    return data.open_dataset(changed(config, **other), opened.tokenizer)


def summary(model, dataset, place, count):
    """The record that closes a run: loss against context up to 8 T, or exact match of its task, by depth too for a pass
    key; and exact match of each of several tasks."""
    if dataset.text:
        return length_loss(model, dataset.text, place, count, MULTIPLES[:-1]) | beside(model, dataset, place, count)
    if isinstance(dataset, data.Mix):
        return record(model, model.config.train_length, [], count) | beside(model, dataset, place, count)
    result = exact_match(model, dataset, place, count)
    if dataset.name == "passkey":
        result["map"] = passkey.depth_map(model, dataset, place, max(1, count // 4))
    return result


def beside(model, dataset, place, count):
    """How a model answers each of the tasks that it learned -> {"tasks": {name: record}}, {} without any."""
    records = {name: exact_match(model, task, place, count) for name, task in dataset.tasks.items()}
    return {"tasks": records} if records else {}


def is_closed(folder, step):
    """Whether the record that closes a run of so many steps, and its pictures, are in the run's folder."""
    record = runs.read_json(folder / "length.json")
    if record and not is_whole(record):
        runs.set_aside(folder / "length.json")
    if record.get("step") != step or not is_whole(record):
        return False
    return all((folder / file_of(*kind)).exists() for kind in headlines({"": record}))


def measure(model, dataset, tokenizer, place, options, evaluator=None):
    """Everything that is measured of a model -> its record: for a task `summary`; with --lengths the loss of the same
    targets there alone; else also the gain of repeated passages, the usual losses, the loss by position and, where
    nothing is laid over the cache, "attention". evaluator: the gain.Evaluator that marks key tokens, if they are asked
    for."""
    options.check_model(model)
    reading = dict(window=options.window or None, sinks=options.sinks, log_n=options.log_n)
    count, T = options.targets, options.train_length or model.config.train_length
    if not dataset.text:
        if model.config.train_length != T or options.lengths or any(reading.values()) or evaluator:
            refused = "--train_length, --lengths, --window, --log_n and --key_evaluator"
            raise UserError(f"tasks are read as they were trained: leave out {refused}")
        return summary(model, dataset, place, count)
    text = dataset.text
    if lengths := options.lengths:
        if lengths[-1] >= len(text.val):
            raise UserError(f"--lengths: {lengths[-1]} tokens exceed the text, which has {len(text.val)}")
        if lengths[0] > model.max_length:
            raise UserError(f"--lengths: {model.too_long(lengths[0])}")
    multiples = [length / T for length in options.lengths] or MULTIPLES
    marked = evaluator and gain.key_loss(model, evaluator, text, place, count, multiples, T, **reading)
    record = length_loss(model, text, place, count, multiples, T, **reading) | ({"key": marked} if evaluator else {})
    if options.lengths:
        return record
    record["gain"] = gain.repeats(model, text, place, max(1, count // 2), T, **reading)
    few = max(1, count // 8)  # each of them has 64 times as many tokens as a window has targets
    sizes = vocabulary.byte_lengths(tokenizer)
    record |= perplexity.usual_losses(model, text, sizes, place, few, T=T, **reading)
    record["by_position"] = perplexity.position_loss(model, text, place, count, T, **reading)
    if not any(reading.values()):
        lengths, reached = reach(model, T, len(text.val))
        windows = targets(text, T, few).windows(lengths[-1])
        record["attention"] = spread.attention(model, windows, place, reached, T=T)
        if model.config.train_length == T:  # Tasks are read as they were trained.
            record |= beside(model, dataset, place, count)
    return record


def measure_all(opened_runs, datasets, place, options):
    """Measure every run -> ({name: record}, lines of all their tables, what draws their pictures into a folder)."""
    records, path = {}, options.key_evaluator
    evaluator = gain.Evaluator(path, place, options.out_dir) if path else None
    for name, opened in opened_runs.items():
        checksum = opened.data_checksum or datasets[name].meta["data_checksum"]
        known = {"step": opened.step, "posenc": opened.config.posenc, "data_checksum": checksum}
        records[name] = known | measure(opened.model, datasets[name], opened.tokenizer, place, options, evaluator)
    return records, tables(records), functools.partial(pictures, records=records)


def look_at_frequencies(opened_runs, datasets, place, options):
    """Take the rotations of every run apart -> ({name: figures}, lines of their tables, what draws their pictures)."""
    measured = {}
    for name, opened in opened_runs.items():
        T, model, dataset = opened.config.train_length, opened.model, datasets[name].text
        loss = functools.partial(length_loss, model, dataset, place, options.targets, (1, 2, 4))
        measured[name] = model, targets(dataset, T, options.targets).windows(T), loss
    return frequencies.look(measured, place)


def write(records, lines, draw, made, place, options):
    """Leave what was measured where the options say. made: {"command", "seed"}."""
    out, command, seed = Path(options.out_dir), made["command"], made["seed"]
    if options.out_dir:
        out.mkdir(parents=True, exist_ok=True)
        report.write_table(out / "results.md", "evaluate", lines, command, place, seed=seed)
        draw(out)
    if options.table:
        first = lines if options.frequencies else tables(records, headlines)
        report.write_table(options.table, options.kind, first, command, place, seed=seed)
    if options.picture and not options.frequencies:
        picture(options.picture, records, *headlines(records)[0])
    if options.out_dir:  # The figures come last, as the mark that all of it is there.
        file = "frequencies.json" if options.frequencies else "results.json"
        runs.write_record(out / file, {"made": made | report.provenance(place), "runs": records})


def main(argv):
    paths, settings = flags(argv, Options)
    options = make(Options, settings)
    if not paths:
        raise UserError(f"which runs? usage: {Options.usage}")
    opened_runs = open_runs(paths, options)  # all of them first: a mistake comes before the work
    datasets = {name: open_dataset(opened, options) for name, opened in opened_runs.items()}
    configs = [opened.config for opened in opened_runs.values()]
    place = places.choose(options.device, configs[0].dtype if options.dtype == "auto" else options.dtype)
    for opened in opened_runs.values():
        place.prepare(opened.model)
    work = look_at_frequencies if options.frequencies else measure_all
    records, lines, draw = work(opened_runs, datasets, place, options)
    print("\n".join(lines))
    seed = ", ".join(map(str, sorted({config.seed for config in configs})))
    write(records, lines, draw, {"command": shlex.join(["python", "evaluate.py", *argv]), "seed": seed}, place, options)


if __name__ == "__main__":
    run(main)
