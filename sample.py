"""Text from a checkpoint, streamed past the training length, and how well it held.

    python sample.py out/rope --prompt="def " --tokens=1024

The place where the training length T was passed is marked. The closing table scores the generated text in blocks of T
tokens with at most T tokens of context, which every encoding was trained for: text that fell apart shows as a loss that
rises, or as 4-grams that repeat.
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
from core.errors import UserError, require, run
from core.flags import Dtype, flags, make
from core.measure import windowed_losses
from data import vocabulary
from model import generate


@dataclass
class Options:
    usage: ClassVar[str] = "python sample.py RUN [--key=value ...]"

    prompt: str = ""  # text to continue; empty begins a new document
    tokens: int = 0  # tokens to generate; 0 means 8 times the training length
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0 means all
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability
    samples: int = 1  # texts at once; the first is streamed
    seed: int = 1337  # of the draws
    stop: bool = False  # let the end-of-text token be drawn, and end there
    posenc: str | list = ""  # arguments for the run's encoding, or another encoding, at test time
    window: int = 0  # attend to the last WINDOW tokens alone, over a cache that stays that small; 0 means to all
    sinks: int = 0  # with a window, keep the first SINKS tokens in sight too
    log_n: bool = False  # multiply queries by ln n / ln T where they see n > T tokens
    crop: int = 0  # no cache: re-encode the last CROP tokens for every token; slow, and never past the training length
    compile: bool = False  # compile first, which takes a while, for faster tokens after
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of products; auto is bfloat16 on CUDA, float16 on older CUDA, else float32

    def __post_init__(self):
        for key in ("tokens", "temperature", "top_k", "window", "sinks", "crop"):
            require(getattr(self, key) >= 0, f"--{key} must not be negative")
        require(0 < self.top_p <= 1, f"--top_p must lie above 0 and not above 1, not {self.top_p}")
        require(self.samples >= 1, f"--samples must be at least 1, not {self.samples}")
        require(not (self.crop and self.window), "--crop and --window exclude each other")
        require(self.window or not self.sinks, "--sinks needs a --window")
        plain = not (self.crop or self.window)
        require(plain or not self.compile, "--compile keeps the whole context: leave out --window and --crop")


class Stream:
    """Token ids to text on stdout, never half a character."""

    def __init__(self, encoding):
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, ids, final=False):
        sys.stdout.write(self.decoder.decode(self.encoding.decode_bytes(ids), final))
        sys.stdout.flush()


def repeated(ids, n=4):
    """The share of n-grams in a list of ids that stood in it before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def block_table(texts, losses, prompt, T):
    """texts: ids of each sample, prompt included; losses: nats of their tokens after the first -> lines of a table."""
    lines = [f"{'tokens':>15}  {'loss':>6}  {'repeated 4-grams':>16}"]
    for begin in range(prompt // T * T, max(map(len, texts)), T):
        first, end = max(begin, prompt), begin + T
        nats = [loss for text in losses for loss in text[first - 1 : end - 1]]
        grams = [repeated(text[first:end]) for text in texts if len(text) > first]
        last = min(end, max(map(len, texts))) - 1
        lines.append(f"{f'{first} - {last}':>15}  {sum(nats) / len(nats):6.3f}  {sum(grams) / len(grams):16.1%}")
    return lines


def main(argv):
    paths, given = flags(argv, Options)
    options = make(Options, given)
    if len(paths) != 1:
        raise UserError(f"name one run; usage: {Options.usage}")
    device = places.choose(options.device, options.dtype, inference=True)
    ways = [options.posenc, ""] if options.posenc else [""]
    opened, *as_trained = runs.open_runs(paths[0], ways, device.device)
    model, config, encoding = opened.model, opened.config, opened.tokenizer
    if not posenc.derives(config.posenc, opened.trained):
        print(f"the model was trained with {opened.trained}: with {config.posenc} expect nonsense", file=sys.stderr)
    T, count = config.train_length, options.tokens or 8 * config.train_length
    end, begin = encoding.eot_token, vocabulary.begin(encoding)
    unsaid = {end, *begin}
    prompt = [*begin, *encoding.encode_ordinary(options.prompt)] or [end]
    if not options.crop:
        try:
            model.check_length(len(prompt) + count - 1)
        except ValueError as error:
            raise UserError(f"--tokens={count}: {error}") from None
    elif options.crop > T:
        raise UserError(f"--crop={options.crop} is more than the training length; take --crop={T}")
    keeps = [one.name for one in model.posenc if one.keeps]
    if options.compile and keeps:
        raise UserError(f"--compile: {keeps[0]} keeps more than keys and values for every token; leave out --compile")
    if options.compile:
        model.to(device.dtype)  # or the compiled model would cast every weight for every token
    forward, why_not = places.compiled(model, options.compile, device, decoding=True)
    if why_not:
        print(why_not, file=sys.stderr)
    # What stands for no text is never drawn: padding of the vocabulary, special tokens.
    silent = [token for token, text in enumerate(vocabulary.token_bytes(encoding)) if not text]
    silent += range(encoding.n_vocab, config.vocab_size)
    tokens = torch.tensor([prompt] * options.samples, device=device.device)

    colour = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    sys.stdout.reconfigure(errors="replace")
    stream, texts = Stream(encoding), [list(prompt) for _ in range(options.samples)]
    open_texts = set(range(options.samples))
    mark = f"\n{colour[0]}[--- {T} tokens: the training length ends here ---]{colour[1]}"
    if options.samples > 1:
        print(f"{colour[0]}[--- sample 1 ---]{colour[1]}")
    stream.write([token for token in prompt[:T] if token not in unsaid])
    if len(prompt) >= T:
        print(mark)
    stream.write([token for token in prompt[T:] if token not in unsaid])
    start = time.perf_counter()
    try:
        with device.autocast():
            for new in generate(
                model, tokens, count, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                seed=options.seed, window=options.window or None, sinks=options.sinks, log_n=options.log_n,
                crop=options.crop or None, forbidden=[token for token in silent if token != end or not options.stop],
                compiled=None if forward is model else forward,
            ):  # fmt: skip
                drawn = new.tolist()
                for index in sorted(open_texts):
                    token = drawn[index]
                    if token == end:
                        open_texts.discard(index)
                        continue
                    texts[index].append(token)
                    if index == 0:
                        stream.write([token])
                        if len(texts[0]) == T:
                            print(mark)
                if not open_texts:
                    break
    except KeyboardInterrupt:
        pass  # what there is gets its table all the same
    seconds = time.perf_counter() - start
    stream.write([], final=True)
    for index, text in enumerate(texts[1:], start=2):
        print(f"\n\n{colour[0]}[--- sample {index} ---]{colour[1]}")
        Stream(encoding).write([token for token in text if token not in unsaid], final=True)

    made = sum(len(text) - len(prompt) for text in texts)
    print(f"\n\n{colour[0]}{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s")
    if made:
        judge = as_trained[0].model if as_trained else model
        losses = [windowed_losses(judge, torch.tensor([text]), T, max(1, T // 2), device)[0].tolist() for text in texts]
        print(f"loss of the generated text, in nats per token, with at most T = {T} tokens of context:")
        print("\n".join(block_table(texts, losses, len(prompt), T)) + colour[1])


if __name__ == "__main__":
    run(main)
