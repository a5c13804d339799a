"""What ran the benchmark: processor, instruction sets, thread counts and versions of the libraries.

Only `/proc` and package metadata are read, so that asking costs neither memory nor a heavy import.
"""

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""The instruction sets that decide which kernels run, as Linux spells them; weakest first."""
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "onnxruntime",
    "onnx",
    "numpy",
)

LIMITS: dict[str, dict[str, str]] = {
    "native": {},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
"""Environment that keeps torch, MKL and oneDNN below an instruction set; onnxruntime knows no such limit."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One computer, as far as it matters to a figure; `instructions` is what the limit left over."""

    processor: str
    family_model_stepping: str
    cores: int
    flags: tuple[str, ...]
    instructions: str
    memory_bytes: int
    system: str

    @property
    def has_avx512(self) -> bool:
        """True where 512-bit arithmetic is there and not switched off."""
        return "avx512f" in self.flags

    @property
    def has_bf16(self) -> bool:
        """True where the processor multiplies bf16 by itself; elsewhere bf16 is slower than fp32."""
        return bool({"avx512_bf16", "amx_bf16"} & set(self.flags))

    @property
    def slug(self) -> str:
        """The processor in file names, for example `amd-epyc-9354-avx512_bf16`."""
        words = re.sub(r"\((?:R|TM)\)|\b(?:processor|cpu)\b|@.*", " ", self.processor, flags=re.IGNORECASE)
        name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
        if self.instructions != "native":
            return f"{name}-limited-to-{self.instructions}"
        strongest = [flag for flag in FLAGS if flag in self.flags and not flag.endswith(("vnni", "int8"))]
        return f"{name}-{strongest[-1] if strongest else platform.machine()}"

    def lines(self) -> list[str]:
        """Two lines for a person: the processor, then what it can do."""
        limit = "" if self.instructions == "native" else f"; limited to {self.instructions} for torch"
        return [
            f"{self.processor} (family/model/stepping {self.family_model_stepping}), {self.cores} cores, "
            f"{self.memory_bytes / 2**30:.0f} GiB, {self.system}",
            f"flags: {' '.join(self.flags) or 'none of ' + ' '.join(FLAGS)}{limit}",
        ]

    def as_dict(self) -> dict[str, object]:
        """The same as plain JSON values."""
        return asdict(self)


def this_machine(instructions: str = "native") -> Machine:
    """The computer that runs this process, its flags cut to the limit named `instructions` (see LIMITS)."""
    fields: dict[str, str] = {}
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    present = set(fields.get("flags", "").split())
    hidden = {
        "native": (),
        "avx512": ("avx512_bf16", "amx"),
        "avx2": ("avx512", "amx", "avx_vnni"),
    }[instructions]
    flags = tuple(flag for flag in FLAGS if flag in present and not flag.startswith(hidden or ("none",)))
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        family_model_stepping="/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping")),
        cores=len(os.sched_getaffinity(0)),
        flags=flags,
        instructions=instructions,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    )


def versions() -> dict[str, str]:
    """The version of every library that takes part, "not installed" where it is missing."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def thread_environment(threads: int, instructions: str = "native") -> dict[str, str]:
    """The environment of a process that may use `threads` threads and the given instruction sets.

    It also closes the network, because a benchmark that downloads measures the network.
    """
    count = str(threads)
    return {
        **os.environ,
        **LIMITS[instructions],
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        # Said aloud, or tokenizers warns after a fork; the thread count is rayon's.
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
