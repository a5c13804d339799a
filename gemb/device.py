"""Which device, number format and thread count a run uses, and why.

The only module that asks about CUDA, MPS or the processor. Every choice comes with its reason, and
every run prints it.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gemb.errors import GembError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")

_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "bf16")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply bf16. Without them bf16 is several times slower than fp32."""


@dataclass(frozen=True)
class Processor:
    """The CPU: its name, the instruction sets that matter here, and its caches."""

    name: str
    flags: frozenset[str]

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16 in hardware."""
        return bool(self.flags & _BF16_FLAGS)

    def __str__(self) -> str:
        shown = [flag for flag in _SHOWN_FLAGS if flag in self.flags]
        return f"{self.name}, {' '.join(shown)}" if shown else self.name


@dataclass(frozen=True)
class Device:
    """Where tensors live and how they are computed, with the reason."""

    name: str
    """As torch spells it: cpu, cuda:0, mps."""
    description: str
    """The hardware, for people."""
    precision: Precision
    threads: int
    """Worker threads on a CPU; 1 elsewhere, where the device itself is parallel."""
    reason: str

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.name.split(":")[0]

    @property
    def line(self) -> str:
        """One line for the report."""
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.kind == "cpu" else ""
        return f"{self.name} ({self.description}){threads}; {self.precision} because {self.reason}"


@cache
def processor() -> Processor:
    """This machine's processor, from /proc/cpuinfo, sysctl or what Python knows."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return _from_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"), name)
    if platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string") or name
        flags = frozenset({"neon"} if platform.machine() == "arm64" else ())
        if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
            flags |= {"bf16"}
    return Processor(name, flags)


def _from_cpuinfo(text: str, name: str) -> Processor:
    """The processor that Linux describes; `name` where it gives none, as on ARM."""
    if model := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        name = " ".join(model[1].split())
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = frozenset(found[1].split() if found else ())
    return Processor(name, flags | {"neon"} if "asimd" in flags else flags)


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def available_threads() -> int:
    """Processors this process may use: its affinity, its cgroup's quota, and OMP_NUM_THREADS if smaller."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        count = os.cpu_count() or 1
    quota = _cgroup_processors()
    if quota is not None:
        count = min(count, max(1, int(quota)))
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        count = min(count, int(wanted))
    return count


def _cgroup_processors(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """The CPU quota of this process's cgroup and those above it, in processors; None if there is none."""
    quotas = []
    for folder, version in _cgroups("cpu", root, own):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quotas.append(_quota(*(folder / name for name in names)))
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroup_free_bytes(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What this process's cgroup and those above it still allow in bytes; None if there is no limit."""
    free = []
    for folder, version in _cgroups("memory", root, own):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        try:
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            statistics = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # "max" among them
            continue
        # Pages of files that nobody has used lately are counted as used, and given up on demand.
        found = re.search(rf"^{names[2]} (\d+)$", statistics, re.MULTILINE)
        free.append(limit - used + (int(found[1]) if found else 0))
    return max(0, min(free)) if free else None


def _cgroups(controller: str, root: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's cgroup under a controller and of those above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in ("0::/", f"0:{controller}:/", *lines):  # the roots: a container sees its own as the root
        _, controllers, path = line.split(":", 2)
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            if not controllers:
                yield root / folder, 2
            elif controller in controllers.split(","):
                yield root / controller / folder, 1


def _quota(*files: Path) -> float | None:
    """Quota over period, from one file or one each; None where there is no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()[:2]
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def pick(device: str = "auto", precision: str = "auto", threads: int | None = None) -> Device:
    """The device, precision and threads of a run, with the reason.

    `device` is auto, cpu, cuda, cuda:N or mps; `precision` auto, fp32 or bf16; `threads` counts worker
    threads on a CPU and defaults to `available_threads()`.
    Raises GembError for a device that is not there or a precision that is not offered.
    """
    if device == "auto":
        device = os.environ.get("GEMB_DEVICE") or "auto"  # set but empty is not set
    if precision not in PRECISIONS:
        from gemb.recipe import refused_precision  # here: it loads the whole schema

        reason = refused_precision(precision)
        raise GembError(
            f"--precision {precision} is refused: {reason}"
            if reason
            else f"--precision {precision!r} is unknown; choose auto, fp32 or bf16"
        )
    if threads is not None and threads < 1:
        raise GembError(f"--threads is {threads}, but at least 1 is needed")
    name, description = _device(device)
    if name == "cpu":
        chip = processor()
        if precision != "auto":
            chosen, reason = precision, f"--precision {precision} asks for it"
            if precision == "bf16" and not chip.has_bf16:
                reason += ", though this processor has no bf16 instructions and fp32 would be faster"
        elif chip.has_bf16:
            chosen, reason = "bf16", "this processor has bf16 instructions"
        else:
            chosen, reason = "fp32", "this processor has no bf16 instructions"
        return Device(name, str(chip), _as_precision(chosen), threads or available_threads(), reason)
    if precision != "auto":
        chosen, reason = precision, f"--precision {precision} asks for it"
    elif name.startswith("cuda") and not _cuda_has_bf16(name):
        chosen, reason = "fp32", "this GPU has no bf16 instructions"
    else:
        chosen, reason = "bf16", "this GPU computes bf16 and float16 gives NaN in Gemma"
    return Device(name, description, _as_precision(chosen), 1, reason)


def _as_precision(name: str) -> Precision:
    return "bf16" if name == "bf16" else "fp32"


def _device(wanted: str) -> tuple[str, str]:
    """Name and description of the device asked for."""
    if wanted == "cpu":
        return "cpu", ""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda:0" if cuda else "mps" if mps else "cpu"
    if wanted == "cpu":
        return "cpu", ""
    if match := re.fullmatch(r"cuda(?::(\d+))?", wanted):
        index = int(match[1] or 0)
        if index >= cuda:
            have = f"this machine has {cuda} of them" if cuda else "torch sees no CUDA device here"
            raise GembError(f"--device {wanted}: {have}; choose another, or --device cpu")
        properties = torch.cuda.get_device_properties(index)
        return f"cuda:{index}", f"{properties.name}, {properties.total_memory >> 30} GiB"
    if wanted == "mps":
        if not mps:
            raise GembError("--device mps: torch sees no Apple GPU here; use --device cpu")
        return "mps", f"{platform.machine()} GPU"
    raise GembError(f"--device {wanted!r} is unknown; choose auto, cpu, cuda, cuda:N or mps")


def _cuda_has_bf16(name: str) -> bool:
    import torch

    major, _ = torch.cuda.get_device_capability(name)
    return major >= 8  # Ampere


def all_devices(wanted: str) -> list[str]:
    """The devices named by `--devices`: a comma list, or `all` for every GPU (the CPU if there is none)."""
    if wanted != "all":
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        if not names:
            raise GembError("--devices is empty; name some, such as cuda:0,cuda:1, or use all")
        return names
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def free_memory_bytes(device: str) -> int | None:
    """Memory that can still be taken on `device`; None where nobody can tell."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    free = int(found[1]) * 1024 if found else None
    return min((count for count in (free, _cgroup_free_bytes()) if count is not None), default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory is full."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release_cache(device: str) -> None:
    """Give cached blocks back to the device after an out-of-memory error."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def compute_capability(device: "torch.device") -> tuple[int, int]:
    """(major, minor) of a CUDA device; (0, 0) elsewhere."""
    if device.type != "cuda":
        return (0, 0)
    import torch

    return torch.cuda.get_device_capability(device)


@contextmanager
def one_thread() -> "Iterator[None]":
    """Run torch's operators of this thread on this thread alone; other threads do the same beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
