"""Where a run computes: device, precision and processes. The rest of the code asks here instead of guessing."""

import contextlib
import datetime
import importlib.util
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from core.errors import UserError, count, processes

# Peak of dense bfloat16 products in FLOP/s, from the vendor's data sheets.
PEAK = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Place:
    """Where one process of a run computes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are float32
    rank: int = 0  # of this process among all of the run
    world: int = 1  # processes of the run
    local_rank: int = 0  # of this process among those of its machine

    @property
    def main(self):
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    @property
    def dtype_name(self):
        """The dtype as the setting of that name has it: "bfloat16", say."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self):
        """A context in which matrix products are computed in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def barrier(self):
        """Wait until all processes have come here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, *values):
        """Every value (float) added up over the processes, in float64: a tuple of as many."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def send(self, x):
        """The tensor x on the device. To CUDA it goes from pinned memory, in one piece: then the copy does not wait for
        what the GPU computes."""
        if self.device.type == "cuda":
            return x.contiguous().pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def prepare(self, model):
        """Put a model on the device that is not going to be trained. The weights of its linear layers are converted to
        `dtype` once, which `autocast` would do in every call."""
        model.to(self.device)
        # A tied head becomes a copy, so that the embeddings keep their dtype.
        model.head.weight = torch.nn.Parameter(model.head.weight.detach())
        for module in (*model.blocks.modules(), model.head):
            if isinstance(module, torch.nn.Linear):
                module.to(self.dtype)

    def synchronize(self):
        """Wait until the device has done what it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    @property
    def hardware(self):
        """The hardware in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{cpu_name()}, {count(torch.get_num_threads(), 'thread')}"

    @property
    def peak(self):
        """FLOP/s of dense bfloat16 products that the hardware can reach, or None where it is not known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((value for key, value in PEAK.items() if re.search(rf"\b{key}\b", name)), None)


def choose(device="auto", dtype="auto", inference=False):
    """The settings `device` and `dtype` -> Place. Joins the process group when `torchrun` started this process.

    auto takes CUDA, then MPS, then the CPU; and bfloat16 where the hardware multiplies it, else float16 on CUDA, else
    float32. Decoding on the CPU is bound by memory and gains nothing from bfloat16, so `inference` takes float32 there.
    UserError for what this machine lacks, or for an environment that is not torchrun's.
    """
    rank, world, local_rank = processes()
    device = find_device(device, world, local_rank)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        patience = datetime.timedelta(hours=3)  # while one process prepares a large corpus
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=patience, device_id=device if on_cuda else None)
    dtype = best_dtype(device, inference) if dtype == "auto" else DTYPES[dtype]
    return Place(device, dtype, rank, world, local_rank)


def find_device(name, world, local_rank):
    """The setting `device` -> the torch.device of this process. UserError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    # torch keeps an index in 8 bits: cuda:256 would be cuda:0.
    if device is None or str(device) != name or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name}: choose from auto, cpu, cuda, cuda:1, mps")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if world > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device={name}: this machine has {count(torch.cuda.device_count(), 'CUDA device')}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: this machine has no MPS")
    if device.type == "mps" and world > 1:
        raise UserError("torchrun needs --device=cpu or cuda: MPS knows no processes")
    return device


def best_dtype(device, inference):
    """The torch.dtype that auto means on a torch.device."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and not inference and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16():
    """Whether products in bfloat16 are faster than in float32 on this CPU."""
    # torch has no public name for it, and this one may go.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def cpu_name():
    """The CPU in words."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compiled(model, wanted, place, decoding=False):
    """(the model, compiled if that is wanted and possible; a line that says why it is not, or None).

    wanted: the setting `compile`, True, False or "auto", which means on CUDA. decoding: for one token at a time, where
    CUDA replays all of its kernels as one graph.
    """
    if wanted is False or (wanted == "auto" and place.device.type != "cuda"):
        return model, None
    if missing := no_compiler(place.device):
        return model, f"{missing} here: going on without torch.compile"
    if decoding:
        mode = "reduce-overhead" if place.device.type == "cuda" else None
        return torch.compile(model, dynamic=False, mode=mode), None
    return torch.compile(model), None


def no_compiler(device):
    """The part of torch.compile that this machine lacks, in words, or None."""
    compilers = ("CXX", "g++", "clang++", "cl") if device.type == "cpu" else ("CC", "cc", "gcc", "clang")
    if not any(shutil.which(os.environ.get(name, name)) for name in compilers):
        return "no C++ compiler"
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "no triton"
    return None


def waited():
    """Seconds that this process's threads, added up, were ready to run while others had the cores. Linux alone counts
    them; elsewhere 0."""
    seconds = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):  # A thread may end meanwhile.
        for file in Path("/proc/self/task").glob("*/schedstat"):
            seconds += int(file.read_text(encoding="utf-8").split()[1]) / 1e9
    return seconds


class Neighbours:
    """Other programs on this run's cores. They cost it more than the cores that they take: at every barrier, all of its
    threads wait for the slowest."""

    def __init__(self):
        self.since, self.waited, self.said = time.perf_counter(), waited(), False

    def line(self):
        """A line for the user, or None: once, if this process's threads waited for a core for more than a fifth of the
        last seconds, five of them or more."""
        seconds, held_up = time.perf_counter() - self.since, waited() - self.waited
        if self.said or seconds < 5:
            return None
        self.since, self.waited = self.since + seconds, self.waited + held_up
        share = held_up / seconds / torch.get_num_threads()
        self.said = share > 0.2
        return (
            f"slow: other programs had this run's cores for {share:.0%} of the last {seconds:.0f} s"
            if self.said
            else None
        )
