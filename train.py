"""Train a GPT from configs: tokens -> steps -> checkpoints -> loss at 1/2 to 8 times the training length.

    python train.py configs/rope.py
    python train.py configs/alibi.py configs/small_gpu.py --max_steps=1e4
    torchrun --standalone --nproc_per_node=8 train.py configs/rope.py configs/gpt2.py

The same command again goes on where the run stopped. `--help` lists every setting.
"""

from core import start  # isort: skip

import math
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import posenc
from core import flags as configs
from core import measure, optimizers, report, runs
from core import place as places
from core.errors import UserError, run
from core.settings import Config
from data import vocabulary
from model import GPTConfig, derive_seed

TRY = "Try a lower --learning_rate, or --dtype=float32, with another --out_dir"
# What may differ when a run goes on; all else would make it another run.
MAY_CHANGE = {
    "max_steps", "eval_interval", "log_interval", "checkpoint_interval", "device", "compile", "micro_batch_size",
    "out_dir", "data_dir", "length_targets",
}  # fmt: skip


def settle(names, given):
    """Names of the config files and {key: value} -> the whole Config. `init_from` lends it model settings."""
    inherited = {}
    if given.get("init_from"):
        base = runs.load(given["init_from"])["config"]
        keys = [field.name for field in fields(GPTConfig)] + ["tokenizer"]
        inherited = {key: base[key] for key in keys if key in base}
        given["posenc"] = runs.merge_posenc(base["posenc"], given.get("posenc", ""))
        # What the encoding learned, and what stretches it, stays relative to the length it was trained at.
        kept = posenc.derives(given["posenc"], base["posenc"])
        inherited["original_length"] = (base["original_length"] or base["train_length"]) if kept else 0
    config = configs.make(Config, inherited | given)
    if not config.out_dir:
        spec = config.posenc if isinstance(config.posenc, str) else "-".join(config.posenc)
        config.out_dir = "out/" + ("-".join(names) or spec.partition("(")[0])
    return config


def learning_rate(config, step):
    """The learning rate of a step, as a share of its peak: up, then level and down (wsd), or up and along a cosine."""
    share = (step + 0.5) / config.max_steps
    if share < config.warmup:
        return share / config.warmup
    if config.schedule == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * (share - config.warmup) / (1 - config.warmup))
    else:
        fall = min(1.0, (1 - share) / config.decay) if config.decay else 1.0
    return config.final_lr + (1 - config.final_lr) * fall


def resume(config, out, dataset, encoding):
    """The state of the run in the folder `out`, or None where it is new. UserError if that run is another one."""
    if not any((out / name).exists() for name in (runs.CKPT, runs.PREVIOUS)):
        return None
    state = runs.load(out)
    # A run from before a setting existed has its default.
    old, new = runs.plain(runs.config_of(state)), runs.plain(config)
    differ = [key for key in new if key not in MAY_CHANGE and old[key] != new[key]]
    if differ:
        said = ", ".join(f"{key} was {old[key]!r} and is now {new[key]!r}" for key in differ)
        raise UserError(
            f"{out} holds a run with other settings: {said}. Start another with --out_dir, or set them back"
        )
    if "optimizer" not in state:
        raise UserError(
            f"{runs.find(out)} cannot go on: it holds no optimiser state (best.pt does not); use --init_from"
        )
    runs.check_tokenizer(encoding, state)
    if state["data_checksum"] != dataset.meta["data_checksum"]:
        raise UserError(f"the corpus of {out} has changed since it began ({dataset.folder}); start anew with --out_dir")
    return state


def train(config, device):
    """One run from its first step, or from where it stopped, to its end. Returns the exit status."""
    out, encoding = Path(config.out_dir), vocabulary.load(config.tokenizer)
    share, rest = divmod(config.batch_size, device.world)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise UserError(
            f"batch_size={config.batch_size} does not divide by {device.world} processes x micro_batch_size={micro}"
        )
    if micro % config.segments:
        raise UserError(f"{micro} sequences at once do not divide by segments={config.segments}; try --batch_size=32")
    for first in (True, False):  # one process of each machine prepares what is missing, then the others open it
        if first == (device.local_rank == 0):
            dataset = data.open_dataset(config, encoding)
        device.barrier()
    config.vocab_size = config.vocab_size or encoding.n_vocab
    if config.vocab_size < encoding.n_vocab:
        raise UserError(
            f"vocab_size={config.vocab_size} is too small: tokenizer {config.tokenizer} has {encoding.n_vocab}"
        )

    state = resume(config, out, dataset, encoding)
    model = runs.build(config, device.device)
    if model.max_length < config.train_length:
        raise UserError(f"train_length={config.train_length}: {model.too_long(config.train_length)}")
    if config.segments > 1:
        absolute = [one.name for one in model.posenc if not one.relative]
        if absolute:
            raise UserError(f"segments={config.segments} needs relative positions, and those of {absolute[0]} are not")
    updaters = optimizers.make(model, config, device)
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
    step, best = 0, math.inf
    if state:
        step, best = state["step"], state["best"]
        runs.load_weights(model, state)
        for updater, saved in zip(updaters, state["optimizer"], strict=True):
            updater.load_state_dict(saved)
        if state["scaler"]:  # empty where the run was not in float16 before
            scaler.load_state_dict(state["scaler"])
    elif config.init_from:
        base = runs.load(config.init_from)
        runs.check_tokenizer(encoding, base)
        runs.load_weights(model, base, fresh=True)
    # Also the point where all have looked before the main process writes.
    if device.sum(step) != (step * device.world,):
        raise UserError(f"not all processes find the same checkpoint in {out}: it must lie on a disk that they share")
    lock = not device.main or runs.lock(out)  # held until this process ends
    if device.sum(lock is None) != (0,):
        raise UserError(f"another process trains into {out}: wait for its end, or choose another folder with --out_dir")
    finished = step >= config.max_steps

    def save(name, **more):
        if device.main:
            known = {key: dataset.meta[key] for key in ("tokenizer_fingerprint", "data_checksum")}
            runs.save(
                out, name, {"model": model.state_dict(), "step": step, "config": runs.plain(config)} | known | more
            )

    log, stop = runs.Log(out, device, step, config.max_steps, start.BEGAN), places.Stop(device)
    if device.main:
        runs.write_json(out / "config.json", runs.plain(config))
    # Or a resumed run would differ in its last bits. Filling what is about to be overwritten would only cost time.
    torch.use_deterministic_algorithms(device.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    forward, why_not = places.compiled(model, config.compile, device)
    if why_not:
        log.say(why_not)
    if device.world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.device] if device.device.type == "cuda" else None)
    windows = dataset.validation(config.train_length, max(1, config.eval_tokens // config.train_length))
    token_bytes, parameters = vocabulary.byte_lengths(encoding), sum(p.numel() for p in model.parameters())
    log.say(
        f"{out}: {parameters / 1e6:.2f} M parameters, {config.posenc}, {dataset.size} training tokens "
        f"({config.dataset}, {config.tokenizer}), {device.world} x {device.hardware}, "
        f"{device.dtype_name}"
    )

    tokens_per_step = config.batch_size * config.train_length
    asked, since, since_step = 0, time.perf_counter(), step
    while step < config.max_steps and not asked:
        # Forward and backward, micro-batch by micro-batch.
        phase, (first, length) = [(i, p) for i, p in enumerate(config.phases) if p[0] <= step][-1]
        # Shorter windows are more of them, and windows of several segments fewer.
        rows, mine, at_once = (n * config.train_length // length for n in (config.batch_size, share, micro))
        part = slice(device.rank * mine, (device.rank + 1) * mine)
        inputs, targets = dataset.batch(length, rows, (config.seed, phase), step - first, part)
        scored = device.sum(int((targets >= 0).sum()))[0] if dataset.masks else rows * length  # of all processes
        torch.manual_seed(derive_seed(config.seed, step, device.rank))  # dropout
        model.redraw(length, derive_seed(config.seed, step))
        model.train()
        loss = torch.zeros((), device=device.device)
        micro_batches = list(zip(*(measure.batches(half, at_once) for half in (inputs, targets)), strict=True))
        for index, (x, y) in enumerate(micro_batches):
            x, y = device.send(x), device.send(y)
            last = index == len(micro_batches) - 1
            with forward.no_sync() if device.world > 1 and not last else nullcontext():
                with device.autocast():
                    losses = forward(x, y, segments=config.segments)
                    part_loss = losses.sum() / scored  # a share of the mean over the whole step
                # DDP averages gradients over the processes, where ours are parts of one sum.
                scaler.scale(part_loss * device.world).backward()
            loss += part_loss.detach()

        # Update.
        for updater in updaters:
            scaler.unscale_(updater)
            for group in updater.param_groups:
                group["lr"] = config.learning_rate * learning_rate(config, step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        if not scaler.is_enabled() or norm.isfinite():  # with float16 both optimisers step, or neither
            for updater in updaters:
                scaler.step(updater)
        scaler.update()
        for updater in updaters:
            updater.zero_grad(set_to_none=True)
        step += 1
        log.bar.update()

        # Measure, log, save.
        asked = stop.asked()
        done = step == config.max_steps
        logs, saves = step % config.log_interval == 0, step % config.checkpoint_interval == 0 or done or asked
        evaluates = step % config.eval_interval == 0 or done
        if logs or saves or evaluates:
            (mean,) = device.sum(loss.item())
            # An infinite norm is no failure in float16: that step was left out, and the scale lowered.
            if not math.isfinite(mean) or not (scaler.is_enabled() or norm.isfinite()):
                log.bar.close()
                kept = (
                    f"the last good checkpoint is {out / runs.CKPT}" if (out / runs.CKPT).exists() else "none was saved"
                )
                raise UserError(f"loss {mean}, gradient norm {norm.item()} at step {step}; {kept}. {TRY}")
        if logs:
            speed = (step - since_step) * tokens_per_step / (time.perf_counter() - since)
            since, since_step = time.perf_counter(), step
            rate = updaters[0].param_groups[0]["lr"]
            log.write(step=step, loss=mean, learning_rate=rate, grad_norm=norm.item(), tokens_per_second=round(speed))
            shown = {"loss": f"{mean:.3f}", "tok/s": f"{speed:,.0f}"}
            if peak := device.peak:
                shown["mfu"] = f"{speed * model.flops_per_token() / (peak * device.world):.0%}"
            log.bar.set_postfix(shown, refresh=False)
        if evaluates:
            began = time.perf_counter()
            model.eval()
            val_loss, val_bpb = measure.validation_loss(model, windows, token_bytes, device, micro)
            log.write(step=step, val_loss=val_loss, val_bpb=val_bpb)
            log.say(f"step {step}: validation loss {val_loss:.4f}, {val_bpb:.4f} bits per byte")
            if val_loss < best:
                best = val_loss
                save(runs.BEST)
            since += time.perf_counter() - began
        if saves:
            optimizer_states = [updater.state_dict() for updater in updaters]
            save(runs.CKPT, optimizer=optimizer_states, scaler=scaler.state_dict(), best=best)
    log.bar.close()
    if asked:
        log.say(f"stopped after step {step}, saved in {out}; the same command goes on from there")
        return 128 + asked
    if finished:
        log.say(f"{out} is finished ({step} steps); for more of them raise --max_steps")
    stop.end()
    close(model, config, dataset, device, log, step)
    return 0


def close(model, config, dataset, device, log, step):
    """The end of a run: loss against context, the pictures, and the command to type next."""
    import evaluate  # the closing table is its own; nothing else of training needs the laboratory

    out = Path(config.out_dir)
    if config.length_targets and runs.read_json(out / "length.json").get("step") != step:
        model.eval()
        result = evaluate.summary(model, dataset, device, config.length_targets)
        if device.main:
            made = {"step": step, "seed": config.seed} | report.provenance(device)
            runs.write_json(out / "length.json", result | made)
            evaluate.pictures(out, {out.name: result})
            log.say("\n".join(evaluate.table({out.name: result})))
    if device.main:
        log.draw()
        prompt, tokens = "", max(1, min(8 * config.train_length, model.max_length - 8))
        more = f" --window={config.train_length}" if config.segments > 1 else ""  # it learned to have so much behind it
        if config.dataset == "python":
            prompt = "def "
        if dataset.masks:
            (prompt, tokens), more = dataset.prompt(config.train_length), " --temperature=0 --stop"
        prompt = f' --prompt="{prompt}"' if prompt else ""
        log.say(f"next: python sample.py {out}{prompt} --tokens={tokens}{more}")


def main(argv):
    config = settle(*configs.parse(argv, Config))
    device = places.choose(config.device, config.dtype)
    try:
        status = train(config, device)
    except RuntimeError as error:  # CUDA has a class for it, MPS and the CPU do not
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        now = config.micro_batch_size or config.batch_size // device.world
        raise UserError(f"out of memory: lower --micro_batch_size (now {now}); gradients accumulate") from None
    if dist.is_initialized():  # not after an error: others would take our leaving for what went wrong
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
