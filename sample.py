"""Text from a checkpoint, streamed past the training length, and how well it held.

    python sample.py out/rope --prompt="def " --tokens=1024

The place where the training length T was passed is marked. The closing table scores the generated text in blocks of T
tokens with at most T tokens of context, which every encoding was trained for: text that fell apart shows as a loss that
rises, or as 4-grams that repeat. Its last column is what the context further back changes of the loss, for the model as
it wrote: below zero the text drew on it, around zero it did not, and above zero it would be likelier without.
"""

import core.start  # noqa: F401  # isort: skip

import codecs
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

import posenc
from core import place as places
from core import runs
from core.errors import UserError, note, require, require_range, run
from core.flags import flags, make
from core.measure import token_losses, windowed_losses
from core.settings import Reading
from data import vocabulary
from model import generate


@dataclass
class Options(Reading):
    """The options of sample.py, beside those that it shares with evaluate.py."""

    usage: ClassVar[str] = "python sample.py RUN [--key=value ...]"

    prompt: str = ""  # text to continue; empty begins a new document
    tokens: int = 0  # tokens to generate, 8 T unless given; dynamic, longrope and randomized are scaled to their number
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0 means all
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability
    samples: int = 1  # texts at once; the first is streamed
    seed: int = 1337  # of the draws
    stop: bool = False  # let the tokens that end a text be drawn, and end there
    crop: int = 0  # no cache: re-encode the last CROP tokens for every token; slow, and never past the training length
    compile: bool = False  # compile first, which takes a while, for faster tokens after

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "0 or more", "temperature", "top_k", "crop")
        require_range(self, "in 0 ... 1 and above 0", "top_p")
        require_range(self, "in 0 ... 2^63 - 1", "tokens")
        require_range(self, "in 1 ... 10^4", "samples")
        require_range(self, "in -2^63 ... 2^64 - 1", "seed")
        require(not (self.crop and self.window), "--crop and --window exclude each other")
        whole = not (self.crop or self.window)
        require(whole or not self.compile, "--compile keeps the whole context: leave out --window and --crop")


def dim(text):
    """The text as a terminal shows it faintly, and as it is elsewhere."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


class Stream:
    """Token ids to text on stdout, never half a character, with a mark behind the first `length` tokens."""

    def __init__(self, tokenizer, length=None):
        self.tokenizer, self.length, self.written = tokenizer, length, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.silent = {*vocabulary.ends(tokenizer), *vocabulary.begin(tokenizer)}

    def write(self, ids, final=False):
        """Print the text of these ids; with `final`, of a character that they leave unfinished too."""
        for token in ids:
            if token not in self.silent:
                sys.stdout.write(self.decoder.decode(self.tokenizer.decode_bytes([token])))
            self.written += 1
            if self.written == self.length:
                print(dim(f"\n[--- {self.length} tokens: the training length ends here ---]"))
        sys.stdout.write(self.decoder.decode(b"", final))
        sys.stdout.flush()


def check(options, model, prompt, count):
    """UserError for what this model cannot do: `prompt` ids continued by `count` tokens under these options."""
    T = model.config.train_length
    if options.crop > T:
        raise UserError(f"--crop={options.crop} is more than the training length; take --crop={T}")
    if not options.crop:
        try:
            model.check_length(len(prompt) + count - 1)
        except ValueError as error:
            raise UserError(f"--tokens={count}: {error}") from None
    stateful = [encoding.name for encoding in model.posenc if encoding.has_state]
    if options.compile and stateful:
        raise UserError(
            f"--compile: {stateful[0]} keeps more than keys and values for every token; leave out --compile"
        )


def never_drawn(tokenizer, vocab_size, stop):
    """The set of ids that are not drawn: those that stand for no text, as special tokens and what pads a vocabulary to
    `vocab_size` do, and those that end a text, unless `stop` lets them. UserError where no others are left."""
    ends = set(vocabulary.ends(tokenizer))
    silent = {token for token, text in enumerate(vocabulary.token_bytes(tokenizer)) if not text}
    silent |= {*range(tokenizer.n_vocab, vocab_size)}
    forbidden = silent - ends if stop else silent | ends
    if len(forbidden) == vocab_size:
        raise UserError("all tokens of this vocabulary end a text or stand for none: there is nothing to draw")
    return forbidden


def write_texts(model, tokenizer, prompt, count, options, place):
    """Continue `prompt` by `count` tokens, or to an end of text, in options.samples ways; the first is streamed.
    Returns the ids of each, prompt included, and the seconds it took. Ctrl-C ends them where they are."""
    ends, config = vocabulary.ends(tokenizer), model.config
    forbidden = never_drawn(tokenizer, config.vocab_size, options.stop)
    if options.compile:
        model.to(place.dtype)  # The compiled model would convert every weight for every token.
    forward, why_not = places.compiled(model, options.compile, place, decoding=True)
    if why_not:
        print(why_not, file=sys.stderr)
    tokens = torch.tensor([prompt] * options.samples, device=place.device)
    texts, going = [list(prompt) for _ in range(options.samples)], set(range(options.samples))
    stream = Stream(tokenizer, config.train_length)
    stream.write(prompt)
    start = time.perf_counter()
    try:
        with place.autocast():
            for new in generate(
                model, tokens, count, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                seed=options.seed, window=options.window or None, sinks=options.sinks, log_n=options.log_n,
                crop=options.crop or None, forbidden=forbidden,
                compiled=None if forward is model else forward,
            ):  # fmt: skip
                for index, token in enumerate(new.tolist()):
                    if token in ends:
                        going.discard(index)
                    elif index in going:
                        texts[index].append(token)
                        if index == 0:
                            stream.write([token])
                if not going:
                    break
    except KeyboardInterrupt:
        pass  # The text so far gets its table all the same.
    seconds = time.perf_counter() - start
    stream.write([], final=True)
    return texts, seconds


def repeated(ids, n=4):
    """The share of n-grams in a list of ids that stood in it before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def far_context(model, ids, T, options, place):
    """ids (1, N) -> [the loss of each after the first with all of the context that it was drawn from, less its loss
    with at most T tokens of that]."""
    reading = dict(window=options.window or None, sinks=options.sinks, log_n=options.log_n)
    whole = token_losses(model, ids, ids.shape[1] - 1, place, **reading)
    return (whole - windowed_losses(model, ids, T, max(1, T // 2), place, **reading))[0].tolist()


def block_table(texts, losses, far, prompt, T):
    """The lines of a table of loss, repetition and far context in every T tokens. texts: ids of each sample, of which
    the first `prompt` were given; losses: nats of their tokens after the first; far: what `far_context` says of them,
    or nothing."""
    lines = [f"{'tokens':>15}  {'loss':>6}  {'repeated 4-grams':>16}" + f"  {'far context':>11}" * bool(far)]
    longest = max(map(len, texts))

    def mean(values, first, end):
        block = [value for text in values for value in text[first - 1 : end - 1]]
        return sum(block) / len(block)

    for begin in range(prompt // T * T, longest, T):
        first, end = max(begin, prompt), begin + T
        grams = [repeated(text[first:end]) for text in texts if len(text) > first]
        span, share = f"{first} - {min(end, longest) - 1}", sum(grams) / len(grams)
        changed = f"  {mean(far, first, end):+11.3f}" if far else ""
        lines.append(f"{span:>15}  {mean(losses, first, end):6.3f}  {share:16.1%}{changed}")
    return lines


def main(argv):
    paths, settings = flags(argv, Options)
    options = make(Options, settings)
    if len(paths) != 1:
        raise UserError(f"name one run; usage: {Options.usage}")
    place = places.choose(options.device, options.dtype, inference=True)
    overrides = [options.posenc, ""] if options.posenc else [""]
    opened, *as_trained = runs.open_runs(paths[0], overrides, place.device)
    model, config, tokenizer = opened.model, opened.config, opened.tokenizer
    if not posenc.derives(config.posenc, opened.trained):
        note(f"the model was trained with {opened.trained}: with {config.posenc} expect nonsense")
    T, count = config.train_length, options.tokens or 8 * config.train_length
    if any(encoding.by_length for encoding in model.posenc) and not options.crop:
        note(f"{config.posenc} is scaled to the whole text: another --tokens is another text")
    prompt = [*vocabulary.begin(tokenizer), *vocabulary.encode(tokenizer, options.prompt)] or [tokenizer.eot_token]
    options.check_model(model)
    check(options, model, prompt, count)

    if options.samples > 1:
        print(dim("[--- sample 1 ---]"))
    texts, seconds = write_texts(model, tokenizer, prompt, count, options, place)
    for index, text in enumerate(texts[1:], start=2):
        print(dim(f"\n\n[--- sample {index} ---]"))
        Stream(tokenizer).write(text, final=True)

    made = sum(len(text) - len(prompt) for text in texts)
    print("\n\n" + dim(f"{made} token{'s' * (made != 1)} in {seconds:.1f} s, {made / seconds:.0f} tokens/s"))
    if made:
        judge = as_trained[0].model if as_trained else model
        rows = [torch.tensor([text]) for text in texts]
        losses = [windowed_losses(judge, ids, T, max(1, T // 2), place)[0].tolist() for ids in rows]
        far = [] if options.crop else [far_context(model, ids, T, options, place) for ids in rows]
        title = f"loss of the generated text, in nats per token, with at most T = {T} tokens of context:"
        print(dim("\n".join([title, *block_table(texts, losses, far, len(prompt), T)])))


if __name__ == "__main__":
    run(main, lasting=False)
