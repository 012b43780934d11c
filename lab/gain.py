"""What context past T is worth to a model, measured without training it.

A loss that is flat past T says that longer contexts break nothing, and not that they are used. Two measures say that:

**Repeated passages.** The targets of `core.measure.targets` stand a second time, at a chosen distance before
themselves, and the gain is what their loss falls by. It is measured against the same window with another passage in
that place, of the same length, from another part of the text. So the two readings differ in nothing but the content
of these tokens: positions, the length of the context and the words around the hole in it are the same. A first
reading of the passage at its earlier place would differ in all of these. A small gain need not be a copy: a model that
counts letters profits from the same letters too.

**Key tokens.** Few tokens of a text need far context, and a mean over all of them drowns these (Fang et al. 2024, "What
is Wrong with Perplexity for Long-context Language Modeling?", arXiv 2410.23771). One model that was trained on longer
contexts, the evaluator, marks those which it predicts well, and only with far context; the loss of every run is then
taken of these alone.
"""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from core import report, runs
from core.errors import UserError
from core.measure import last_losses, reach, target_losses, targets
from data import vocabulary

DISTANCES = (0.25, 0.5, 0.75, 1, 2, 4, 8, 16)  # of T, between the beginnings of the two readings
# The paper marks tokens of some four bytes whose loss falls by more than 2 nats with the far context, to less than 2.
NATS, NATS_PER_BYTE = 2.0, 0.5
FILE = "key_tokens.json"


def repeats(model, dataset, place, count, T=0, **reading):
    """What an earlier reading of the targets, so far back, saves of their nats -> {"distances" in tokens, and for each
    "other" and "same", the mean loss with another passage there and with the same one, "gain", their difference, and
    "error", its standard error over the windows}.

    A context has T tokens, or as many as it takes for the earlier passage to be its first. Distances that the text or
    the positions do not reach are left out. T is the model's own unless named. reading: the cache's window, sinks and
    log_n.
    """
    T = T or model.config.train_length
    drawn, size = targets(dataset, T, count), len(dataset.val)
    scored, away = drawn.scored, replace(drawn, ends=(drawn.ends + size // 2) % size)
    distances = sorted({max(scored, round(T * far)) for far in DISTANCES})
    lengths = {distance: max(T, distance + scored) - 1 for distance in distances}
    lengths = {distance: length for distance, length in lengths.items() if length <= min(size - 1, model.max_length)}
    passages = [part.windows(scored - 1) for part in (away, drawn)]
    found = {"distances": list(lengths), "other": [], "same": [], "gain": [], "error": []}
    with report.progress(2 * len(drawn.ends) * sum(lengths.values()), "repeated passages", place) as bar:
        for distance, length in lengths.items():
            windows, losses = drawn.windows(length), []
            begin = length + 1 - scored - distance
            for passage in passages:
                windows[:, begin : begin + scored] = passage
                losses.append(last_losses(model, windows, scored, place, bar, **reading).double().mean(1))
            other, same = losses
            numbers = other.mean(), same.mean(), (other - same).mean(), standard_error(other - same)
            for name, number in zip(list(found)[1:], numbers, strict=True):
                found[name].append(float(number))
    return found


def standard_error(gains):
    """The standard error of the mean of gains (N,). Of one alone nothing is known: its error is as large as it is."""
    return gains.std() / math.sqrt(len(gains)) if len(gains) > 1 else gains.abs().max()


class Evaluator:
    """The run that marks key tokens, for all runs of one table.

    Its marks are kept in a file of the folder, {T: {"made", "tokens"}}, the latter their places in the validation text,
    and hold as long as all that made them is the same. Without a folder, "", they are made for each T once.
    """

    def __init__(self, path, place, folder=""):
        self.run, self.place, self.path, self.kept = runs.open_run(path), place, folder and Path(folder) / FILE, {}
        place.prepare(self.run.model)
        with open(runs.find(path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.known = {"evaluator": str(path), "step": self.run.step, "checkpoint": digest}

    def marks(self, dataset, T, count):
        """Which of the targets are key tokens -> (their Targets, (N, scored) bool). UserError where none is, or the
        evaluator cannot say."""
        drawn = targets(dataset, T, count)
        places = drawn.ends[:, None] + np.arange(-drawn.scored, 0)
        long = self.long(dataset, T, drawn)
        sizes = vocabulary.byte_lengths(self.run.tokenizer)
        nats = min(NATS, NATS_PER_BYTE * float(sizes[dataset.val[places]].mean()))
        made = self.known | {"data_checksum": dataset.meta["data_checksum"], "targets": places.size, "nats": nats}
        made |= {"short": T, "long": long, "dtype": self.place.dtype_name}
        self.kept = self.kept or (runs.read_json(self.path) if self.path else {})
        if self.kept.get(str(T), {}).get("made") != made:
            key = key_tokens(self.run.model, drawn, self.place, (T, long), nats)
            self.kept[str(T)] = {"made": made, "tokens": places[key].tolist()}
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                runs.write_record(self.path, self.kept)
        key = np.isin(places, self.kept[str(T)]["tokens"])
        if not key.any():
            name = self.known["evaluator"]
            raise UserError(f"{name} marks none of {key.size} targets as key tokens: raise --targets")
        return drawn, key

    def long(self, dataset, T, drawn):
        """The long context, in tokens: the evaluator's training length, as far as the targets' documents go. UserError
        where the evaluator cannot judge them."""
        trained, name = self.run.config.train_length, f"--key_evaluator={self.known['evaluator']}"
        if vocabulary.fingerprint(self.run.tokenizer) != dataset.meta.get("tokenizer_fingerprint"):
            raise UserError(f"{name} has another tokenizer than the runs: its tokens are not theirs")
        if min(trained, drawn.own) <= T:
            known = f"it was trained on {trained} tokens and targets have {drawn.own} before them"
            raise UserError(f"{name}: {known}: both must exceed T = {T}; lower --train_length, or take another run")
        return min(trained, drawn.own)


def key_tokens(model, drawn, place, lengths, nats):
    """Targets, lengths (short, long) -> (N, scored) bool: those whose loss the long context lowers by more than `nats`,
    to less than `nats`."""
    with report.progress(len(drawn.ends) * sum(lengths), "key tokens", place) as bar:
        short, long = (target_losses(model, drawn, length, place, bar).numpy() for length in lengths)
    return (short - long > nats) & (long < nats)


def key_loss(model, evaluator, dataset, place, count, multiples, T=0, **reading):
    """The loss of key tokens alone -> {"lengths", "loss", "tokens": how many, "evaluator": who marked them}."""
    T = T or model.config.train_length
    drawn, key = evaluator.marks(dataset, T, count)
    _, lengths = reach(model, T, len(dataset.val), multiples)
    rows, losses = key.any(1), []
    drawn = replace(drawn, ends=drawn.ends[rows])
    with report.progress(len(drawn.ends) * sum(lengths), "loss of key tokens", place) as bar:
        for length in lengths:
            nats = target_losses(model, drawn, length, place, bar, **reading)
            losses.append(nats.double().numpy()[key[rows]].mean().item())
    known = {"tokens": int(key.sum()), "evaluator": evaluator.known["evaluator"]}
    return {"lengths": lengths, "loss": losses, **known}
