"""Train a GPT from configs: tokens -> steps -> checkpoints -> loss at 1/2 to 8 times the training length.

    python train.py configs/rope.py
    python train.py configs/alibi.py configs/small_gpu.py --max_steps=1e4
    torchrun --standalone --nproc_per_node=8 train.py configs/rope.py configs/gpt2.py

The same command again goes on where the run stopped. `--help` lists every setting.
"""

from core import start as process  # isort: skip

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from core import flags, optimizers, report, runs
from core import place as places
from core.errors import UserError, brief, command, out_of_memory, pasted, run
from core.log import Log
from core.measure import batches, validation_loss
from core.place import Place
from core.settings import Config
from core.stop import Stop
from data import vocabulary
from model import GPT, derive_seed


@dataclass
class Training:
    """A run in progress: all that a step reads or changes."""

    config: Config
    place: Place
    dataset: Any  # a data.Dataset, a data.tasks.Task, or a data.Mix of them
    model: GPT
    forward: torch.nn.Module  # the model, perhaps compiled, perhaps wrapped by DistributedDataParallel
    optimizers: list
    scaler: torch.amp.GradScaler  # of the loss, so that small gradients survive float16; without effect elsewhere
    step: int  # steps done
    before: Config  # the settings of the last of them: some may change where a run goes on
    best: float  # the lowest validation loss so far
    lock: Any  # held until the process ends, so that no other trains into the folder


def open_data(config, place):
    """The tokenizer and the data set of a run. One process of each machine prepares what is missing, then the others
    open it."""
    tokenizer = vocabulary.load(config.tokenizer)
    if place.local_rank == 0:
        dataset = data.open_dataset(config, tokenizer)
    place.barrier()
    if place.local_rank != 0:
        dataset = data.open_dataset(config, tokenizer)
    place.barrier()
    config.vocab_size = config.vocab_size or tokenizer.n_vocab
    if config.vocab_size < tokenizer.n_vocab:
        needed = f"tokenizer {config.tokenizer} has {tokenizer.n_vocab}"
        raise UserError(f"vocab_size={config.vocab_size} is too small: {needed}")
    return tokenizer, dataset


def start(config, place, tokenizer, dataset):
    """The Training to go on with: new, from its own checkpoint, or from `init_from`. Whatever is wrong with the
    settings or the folder is a UserError here, before anything is written."""
    out, state = Path(config.out_dir), runs.resume(config, dataset, tokenizer)
    model = runs.build(config, place.device)
    if model.max_length < config.train_length:
        raise UserError(f"train_length={config.train_length}: {model.too_long(config.train_length)}")
    # A memory's first tokens would be mixed with none, where those before them have left.
    unfit = [encoding.name for encoding in model.posenc if not encoding.relative or encoding.recalls]
    if config.segments > 1 and unfit:
        raise UserError(f"segments={config.segments} needs relative positions, token by token: {unfit[0]} has others")

    step, best, before, updaters = 0, math.inf, config, optimizers.make(model, config, place)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    if state:
        step, best, before = state["step"], state["best"], runs.config_of(state)
        runs.load_weights(model, state)
        for optimizer, saved in zip(updaters, state["optimizer"], strict=True):  # their settings are those of the run
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        if state["scaler"]:  # empty where the run was not in float16 before
            scaler.load_state_dict(state["scaler"])
    elif config.init_from:
        base = runs.load(config.init_from)
        if place.main:
            runs.note_progress(config.init_from, base)
        runs.check_tokenizer(tokenizer, base)
        runs.load_weights(model, base, fresh=True)

    # This is a barrier too: every rank has read the checkpoint before rank 0 writes a new one.
    if place.sum(step) != (step * place.world,):
        raise UserError(f"not all processes find the same checkpoint in {out}: it must lie on a disk that they share")
    lock = not place.main or runs.lock(out)
    if place.sum(lock is None) != (0,):
        raise UserError(f"another process trains into {out}: wait for its end, or choose another folder with --out_dir")
    return Training(config, place, dataset, model, model, updaters, scaler, step, before, best, lock)


def sequences(config, place):
    """Sequences of a step that one process computes, and those of them that it computes at once."""
    share, rest = divmod(config.batch_size, place.world)
    micro_batch = config.micro_batch_size or share
    if rest or share % micro_batch:
        by = f"{place.world} processes x micro_batch_size={micro_batch}"
        raise UserError(f"batch_size={config.batch_size} does not divide by {by}")
    if micro_batch % config.segments:
        by = f"segments={config.segments}; try --batch_size=32"
        raise UserError(f"{micro_batch} sequences at once do not divide by {by}")
    return share, micro_batch


def one_step(training):
    """One step: a batch, forward and backward, an update. It touches no file and no clock.

    Returns this process's part of the loss (), in nats per target of the whole step, and the gradient's norm ()."""
    config, place, model, forward = training.config, training.place, training.model, training.forward
    step, scaler = training.step, training.scaler

    # The batch is a pure function of (seed, step), and every process takes its own slice of the rows. The short windows
    # of a schedule come in larger numbers, windows of several segments in smaller: the tokens of a step stay as many.
    phase, (begin, length) = [(i, phase) for i, phase in enumerate(config.phases) if phase[0] <= step][-1]
    share, micro_batch = sequences(config, place)
    rows, rows_here, rows_at_once = (n * config.train_length // length for n in (config.batch_size, share, micro_batch))
    part = slice(place.rank * rows_here, (place.rank + 1) * rows_here)
    inputs, targets = training.dataset.batch(length, rows, (config.seed, phase), step - begin, part)
    # The loss is one sum over all targets of the step, divided once by their number, however they are spread over
    # micro-batches and processes. A task leaves some targets out, so there the processes add up what each of them has.
    masks = training.dataset.masks
    targets_in_step = place.sum(int((targets >= 0).sum()))[0] if masks else rows * length

    # Dropout and random positions are drawn from (seed, step) as well, so that a resumed run draws the same.
    torch.manual_seed(derive_seed(config.seed, step, place.rank))
    model.redraw(length, derive_seed(config.seed, step), config.window_factor(step))
    model.train()

    # Forward and backward, one micro-batch after the other: gradients add up. Processes exchange them in the last
    # backward pass alone, where DDP takes their mean; ours are parts of one sum, hence the factor.
    loss = torch.zeros((), device=place.device)
    micro_batches = list(zip(batches(inputs, rows_at_once), batches(targets, rows_at_once), strict=True))
    for index, (x, y) in enumerate(micro_batches, start=1):
        x, y = place.send(x), place.send(y)  # (micro-batch, length)
        with forward.no_sync() if place.world > 1 and index < len(micro_batches) else nullcontext():
            with place.autocast():
                share_of_loss = forward(x, y, segments=config.segments).sum() / targets_in_step
            scaler.scale(share_of_loss * place.world).backward()
        loss += share_of_loss.detach()

    # The update: set the learning rate, clip the gradient, step. With float16 a gradient that overflowed is left out by
    # all optimizers, and the scale of the loss is lowered.
    for optimizer in training.optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * optimizers.learning_rate(config, step)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    if not scaler.is_enabled() or norm.isfinite():
        for optimizer in training.optimizers:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return loss, norm


def train(config, place):
    """One run from its first step, or from where it stopped, to its end. Returns the exit status."""
    _, micro_batch = sequences(config, place)
    tokenizer, dataset = open_data(config, place)
    training = start(config, place, tokenizer, dataset)
    finished = training.step >= config.max_steps
    log = Log(config, place, training.step, training.before, process.BEGAN)
    prepare(training, log)
    windows = dataset.validation(config.train_length, max(1, config.eval_tokens // config.train_length))
    token_bytes, signal = vocabulary.byte_lengths(tokenizer), 0

    since, since_step = time.perf_counter(), training.step
    with Stop(place) as stop:
        while training.step < config.max_steps and not signal:
            loss, norm = one_step(training)
            step = training.step
            log.bar.update()

            # Some steps are followed by a look at the loss, an evaluation, a checkpoint. All processes agree on which.
            last, signal = step == config.max_steps, stop.asked()
            log_due = step % config.log_interval == 0
            evaluation_due = step % config.eval_interval == 0 or last
            checkpoint_due = step % config.checkpoint_interval == 0 or last or signal
            if log_due or evaluation_due or checkpoint_due:
                (loss,) = place.sum(loss.item())
                check_finite(training, loss, norm, log)
            if log_due:
                tell(training, log, loss, norm, step - since_step, time.perf_counter() - since)
                since, since_step = time.perf_counter(), step
            if evaluation_due:
                began = time.perf_counter()
                validate(training, log, windows, token_bytes, micro_batch)
                since += time.perf_counter() - began  # the speed is that of training alone
                signal = stop.asked()  # An evaluation takes its time.
            if checkpoint_due or signal:
                save(training, runs.CKPT)
    log.bar.close()
    if signal := stop.asked():  # Now every signal has been seen: one that comes later ends the process by itself.
        return stopped(training, log, signal)
    close(training, log, finished)
    return 0


def prepare(training, log):
    """Preparations before the first step: the run's config.json, the tokenizer of a published model beside it,
    deterministic kernels, compiling, DDP."""
    config, place, dataset = training.config, training.place, training.dataset
    if place.main:
        runs.bring_tokenizer(config, config.out_dir)
        runs.write_json(Path(config.out_dir) / "config.json", runs.plain(config))
    # Deterministic kernels, so that a resumed run is bitwise the same. Filling memory that is about to be overwritten,
    # which comes with them, would only cost time.
    torch.use_deterministic_algorithms(place.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    training.forward, why_not = places.compiled(training.model, config.compile, place)
    if why_not:
        log.say(why_not)
    if place.world > 1:
        ids = [place.device] if place.device.type == "cuda" else None
        training.forward = DistributedDataParallel(training.forward, device_ids=ids)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    log.say(
        f"{config.out_dir}: {parameters / 1e6:.2f} M parameters, {brief(config.posenc)}, "
        f"{dataset.size} training tokens ({' + '.join(dict.fromkeys(config.datasets))}, {config.tokenizer}), "
        f"{place.world} x {place.hardware}, {place.dtype_name}"
    )


def check_finite(training, loss, norm, log):
    """UserError where the loss or the gradient is no number any more, so that no such weights are ever saved. An
    infinite norm is no failure in float16: that step was left out."""
    if math.isfinite(loss) and (training.scaler.is_enabled() or norm.isfinite()):
        return
    latest = Path(training.config.out_dir) / runs.CKPT
    kept = f"the last good checkpoint is {latest}" if latest.exists() else "none was saved"
    way_out = "Try a lower --learning_rate, or --dtype=float32, with another --out_dir"
    raise UserError(f"loss {loss}, gradient norm {norm.item()} at step {training.step}; {kept}. {way_out}")


def tell(training, log, loss, norm, steps, seconds):
    """A line of metrics.jsonl, and the numbers beside the progress bar, after so many steps in so many seconds."""
    config, place, rate = training.config, training.place, training.optimizers[0].param_groups[0]["lr"]
    speed = steps * config.batch_size * config.train_length / seconds  # tokens per second
    log.write(step=training.step, loss=loss, learning_rate=rate, grad_norm=norm.item(), tokens_per_second=round(speed))
    shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
    if place.peak:
        shown["mfu"] = f"{speed * training.model.flops_per_token() / (place.peak * place.world):.0%}"
    log.bar.set_postfix(shown, refresh=False)
    if slow := log.neighbours.line():
        log.say(slow)


def validate(training, log, windows, token_bytes, rows):
    """Measure the loss of `windows`, `rows` at a time, and keep the weights if it is the lowest so far."""
    training.model.eval()
    val_loss, val_bpb = validation_loss(training.model, windows, token_bytes, training.place, rows)
    log.write(step=training.step, val_loss=val_loss, val_bpb=val_bpb)
    log.say(f"step {training.step}: validation loss {val_loss:.4f}, {val_bpb:.4f} bits per byte")
    if val_loss < training.best:
        training.best = val_loss
        save(training, runs.BEST)


def save(training, name):
    """Write a checkpoint of that name into the run's folder: best.pt to read, ckpt.pt to go on from too."""
    if training.place.main:
        state = {"model": training.model.state_dict(), "step": training.step, "config": runs.plain(training.config)}
        state |= {key: training.dataset.meta[key] for key in ("tokenizer_fingerprint", "data_checksum")}
        if name == runs.CKPT:
            state["optimizer"] = [optimizer.state_dict() for optimizer in training.optimizers]
            state |= {"scaler": training.scaler.state_dict(), "best": training.best}
        runs.save(training.config.out_dir, name, state)


def stopped(training, log, signal):
    """Say where a signal has stopped the run. Returns the exit status."""
    where = f"step {training.step}, saved in {training.config.out_dir}"
    log.say(f"stopped after {where}; the same command goes on from there")
    training.place.barrier()  # torchrun ends the others as soon as the first one leaves.
    return 128 + signal


def close(training, log, finished):
    """The end of a run, perhaps one that was `finished` before: loss against context, the pictures, and the command to
    type next."""
    import evaluate  # which draws on the laboratory, and is needed here alone

    config, place, model, dataset = training.config, training.place, training.model, training.dataset
    out = Path(config.out_dir)
    if finished:
        another = f"{pasted(f'--init_from={config.out_dir}')} and another --out_dir"
        more = another if config.length_schedule or config.window_schedule else "raise --max_steps"
        log.say(f"{config.out_dir} is finished ({training.step} steps); for more of them {more}")
    if config.length_targets and not evaluate.is_closed(out, training.step):
        model.eval()
        result = evaluate.summary(model, dataset, place, config.length_targets)
        if place.main:
            made = {"step": training.step, "seed": config.seed} | report.provenance(place)
            evaluate.pictures(out, {out.name: result})
            runs.write_record(out / "length.json", result | made)  # last, as the mark that all of it is there
            log.say("\n".join(evaluate.tables({out.name: result}, evaluate.headlines)))
    if place.main:
        log.draw()
        log.say(f"next: {next_command(config, model, dataset)}")


def next_command(config, model, dataset):
    """The command that shows what the run has learned."""
    if not dataset.text:
        prompt, tokens = next(iter(dataset.tasks.values())).prompt(config.train_length)
        more = ["--temperature=0", "--stop"]
    else:
        prompt = "def " if "python" in config.datasets else ""
        tokens = max(1, min(8 * config.train_length, model.max_length - 8))
        # A run in segments learned to have so many tokens behind it.
        more = [f"--window={config.train_length}"] if config.segments > 1 else []
    prompt = [f"--prompt={prompt}"] if prompt else []
    return command("sample.py", Path(config.out_dir), *prompt, f"--tokens={tokens}", *more)


def main(argv):
    config = runs.settle(*flags.parse(argv, Config))
    place = places.choose(config.device, config.dtype)
    try:
        status = train(config, place)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        now = config.micro_batch_size or config.batch_size // place.world
        less = f"lower --micro_batch_size (now {now}; gradients accumulate), or take a smaller model"
        raise UserError(f"out of memory: {less}") from None
    if dist.is_initialized():  # after an error the others would report the lost connection instead of it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
