"""Device, precision and threads: what is chosen, why, and what is refused."""

import os
from pathlib import Path

import pytest
import torch

from gemb import device
from gemb.device import Device, Processor, pick
from gemb.errors import Exit, GembError

AVX2 = Processor("Some Processor @ 2.4GHz", frozenset({"sse2", "avx2", "fma"}))
AMX = Processor("Big Processor", frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}))
ARM = Processor("aarch64", frozenset({"asimd", "neon", "bf16"}))


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bf16 instructions and four threads of it."""
    monkeypatch.setattr(device, "processor", lambda: AVX2)
    monkeypatch.setattr(device, "available_threads", lambda: 4)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bf16 instructions and one thread of it."""
    monkeypatch.setattr(device, "processor", lambda: AMX)
    monkeypatch.setattr(device, "available_threads", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where torch sees neither CUDA nor MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # noqa: TID251  # the stand-in of a machine
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)  # noqa: TID251


def message(*arguments: object, **named: object) -> str:
    """What `pick` says when it refuses; always a user's mistake."""
    with pytest.raises(GembError) as caught:
        pick(*arguments, **named)  # type: ignore[arg-type]
    assert caught.value.exit_code == Exit.USAGE
    return str(caught.value)


# --- the choice and its reason


@pytest.mark.usefixtures("avx2", "no_gpu")
def test_without_bf16_instructions_fp32_is_chosen_and_the_line_says_why() -> None:
    chosen = pick()
    assert chosen == Device(
        "cpu", "Some Processor @ 2.4GHz, avx2", "fp32", 4, "this processor has no bf16 instructions"
    )
    assert chosen.line == (
        "cpu (Some Processor @ 2.4GHz, avx2), 4 threads; fp32 because this processor has no bf16 instructions"
    )


@pytest.mark.usefixtures("amx", "no_gpu")
def test_with_bf16_instructions_bf16_is_chosen() -> None:
    assert pick("cpu").line == (
        "cpu (Big Processor, avx2 avx512f avx512_vnni avx512_bf16 amx_bf16), 1 thread; "
        "bf16 because this processor has bf16 instructions"
    )
    assert pick("cpu", "fp32").line.endswith("fp32 because --precision fp32 asks for it")


@pytest.mark.usefixtures("avx2")
def test_bf16_where_it_is_slower_is_obeyed_and_told() -> None:
    chosen = pick("cpu", "bf16", threads=2)
    assert (chosen.precision, chosen.threads) == ("bf16", 2)
    assert chosen.reason == (
        "--precision bf16 asks for it, though this processor has no bf16 instructions "
        "and fp32 would be faster"
    )


def test_bf16_instructions_are_known_by_their_flags() -> None:
    assert AMX.has_bf16
    assert ARM.has_bf16
    assert not AVX2.has_bf16
    assert str(ARM) == "aarch64, neon bf16"
    assert str(Processor("Old", frozenset({"sse2"}))) == "Old"


@pytest.mark.usefixtures("avx2", "no_gpu")
def test_the_environment_names_the_device_where_the_user_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMB_DEVICE", "mps")
    assert message() == "--device mps: torch sees no Apple GPU here; use --device cpu"
    assert pick("cpu").name == "cpu"


# --- GPUs, as far as a stand-in goes


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """A machine with two GPUs; their compute capabilities may be changed."""
    capabilities = {"cuda:0": (9, 0), "cuda:1": (7, 5)}

    class Properties:
        name = "NVIDIA H200"
        total_memory = 139 << 30

    cuda = torch.cuda  # noqa: TID251  # the stand-in of a machine
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(cuda, "get_device_capability", lambda name: capabilities[name])
    return capabilities


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_preferred_and_computes_bf16() -> None:
    assert pick().line == (
        "cuda:0 (NVIDIA H200, 139 GiB); bf16 because this GPU computes bf16 and float16 gives NaN in Gemma"
    )
    assert (
        pick("cuda", "fp32").line
        == "cuda:0 (NVIDIA H200, 139 GiB); fp32 because --precision fp32 asks for it"
    )


@pytest.mark.usefixtures("two_gpus")
def test_an_old_gpu_computes_fp32() -> None:
    assert pick("cuda:1").reason == "this GPU has no bf16 instructions"
    assert pick("cuda:1").precision == "fp32"


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert message("cuda:2") == (
        "--device cuda:2: this machine has 2 of them; choose another, or --device cpu"
    )


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_is_refused_where_there_is_none() -> None:
    assert message("cuda") == (
        "--device cuda: torch sees no CUDA device here; choose another, or --device cpu"
    )


def test_all_devices_are_all_gpus_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.cuda  # noqa: TID251  # the stand-in of a machine
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 3)
    assert device.all_devices("all") == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert device.all_devices("all") == ["cpu"]
    assert device.all_devices("cuda:1, cpu,") == ["cuda:1", "cpu"]
    with pytest.raises(
        GembError, match=r"^--devices is empty; name some, such as cuda:0,cuda:1, or use all$"
    ):
        device.all_devices(" , ")


# --- what is refused


@pytest.mark.parametrize("name", ["fp16", "f16", "float16", "half"])
def test_float16_is_refused(name: str) -> None:
    assert message("cpu", name) == (
        f"--precision {name} is refused: float16 gives NaN in Gemma models; use bf16 or fp32"
    )


def test_int8_is_not_offered_and_the_message_says_what_is() -> None:
    assert message("cpu", "int8") == (
        "--precision int8 is refused: without a compiled kernel it is no faster than bf16; "
        "use bf16, or --dtype int8 for small vectors"
    )


def test_other_mistakes_name_the_choices() -> None:
    assert message("cpu", "fp8") == "--precision 'fp8' is unknown; choose auto, fp32 or bf16"
    assert message("tpu") == "--device 'tpu' is unknown; choose auto, cpu, cuda, cuda:N or mps"
    assert message("cuda:x") == "--device 'cuda:x' is unknown; choose auto, cpu, cuda, cuda:N or mps"
    assert message("cpu", threads=0) == "--threads is 0, but at least 1 is needed"


# --- the machine


def test_the_processor_is_read_from_cpuinfo() -> None:
    intel = "processor\t: 0\nmodel name\t: Intel(R)  Xeon(R)\nflags\t\t: fpu avx2 amx_bf16\nprocessor\t: 1\n"
    assert device._from_cpuinfo(intel, "x86_64") == Processor(
        "Intel(R) Xeon(R)", frozenset({"fpu", "avx2", "amx_bf16"})
    )
    arm = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\n"
    assert device._from_cpuinfo(arm, "aarch64") == Processor(
        "aarch64", frozenset({"fp", "asimd", "bf16", "neon"})
    )
    assert device._from_cpuinfo("", "riscv") == Processor("riscv", frozenset())


def test_this_processor_has_a_name() -> None:
    assert device.processor().name


def write(place: Path, content: str) -> None:
    """A file of a cgroup file system."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content)


def test_threads_follow_the_quota_of_the_cgroup_and_those_above_it(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/jobs/mine\n")
    assert device._cgroup_processors(tmp_path, own) is None
    write(tmp_path / "jobs/mine/cpu.max", "max 100000\n")
    assert device._cgroup_processors(tmp_path, own) is None
    write(tmp_path / "jobs/cpu.max", "250000 100000\n")
    assert device._cgroup_processors(tmp_path, own) == 2.5
    write(tmp_path / "cpu.max", "150000 100000\n")  # as a container sees itself
    assert device._cgroup_processors(tmp_path, own) == 1.5
    assert device._cgroup_processors(tmp_path, tmp_path / "missing") == 1.5


def test_threads_follow_the_quota_of_an_older_cgroup(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("9:name=systemd:/\n3:cpu,cpuacct:/jobs\n")
    write(tmp_path / "cpu/jobs/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/jobs/cpu.cfs_period_us", "100000\n")
    assert device._cgroup_processors(tmp_path, own) is None
    write(tmp_path / "cpu/jobs/cpu.cfs_quota_us", "300000\n")
    assert device._cgroup_processors(tmp_path, own) == 3.0


def test_free_memory_follows_the_limit_of_the_cgroup_and_those_above_it(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/jobs/mine\n")
    assert device._cgroup_free_bytes(tmp_path, own) is None
    for name, limit, used in (("jobs/mine", "max", 50), ("jobs", "1000", 400)):
        write(tmp_path / name / "memory.max", f"{limit}\n")
        write(tmp_path / name / "memory.current", f"{used}\n")
        write(tmp_path / name / "memory.stat", "anon 10\ninactive_file 30\n")
    assert device._cgroup_free_bytes(tmp_path, own) == 630


def test_free_memory_follows_the_limit_of_an_older_cgroup(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("4:memory:/jobs\n")
    write(tmp_path / "memory/jobs/memory.limit_in_bytes", "1000\n")
    write(tmp_path / "memory/jobs/memory.usage_in_bytes", "990\n")
    write(tmp_path / "memory/jobs/memory.stat", "inactive_file 1\ntotal_inactive_file 5\n")
    assert device._cgroup_free_bytes(tmp_path, own) == 15


def test_threads_are_the_least_of_affinity_quota_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for quota, variable, expected in [
        (None, None, 8),
        (3.9, None, 3),
        (0.5, None, 1),
        (None, "2", 2),
        (None, "64", 8),
        (3.0, "5,2", 3),
        (None, "many", 8),
        (None, "0", 8),
    ]:
        monkeypatch.setattr(device, "_cgroup_processors", lambda quota=quota: quota)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert device.available_threads() == expected, (quota, variable)


def test_free_memory_of_this_machine_is_some() -> None:
    free = device.free_memory_bytes("cpu")
    assert free is None or free > 1 << 20


# --- torch


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert device.is_out_of_memory(MemoryError())
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    cpu = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"
    assert device.is_out_of_memory(RuntimeError(cpu))
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not device.is_out_of_memory(ValueError("out of memory"))


def test_a_real_failed_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert device.is_out_of_memory(caught.value)


def test_one_thread_lasts_as_long_as_its_block() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with device.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_compute_capability_of_a_cpu_is_none() -> None:
    assert device.compute_capability(torch.device("cpu")) == (0, 0)
    device.release_cache("cpu")


def test_an_empty_gemb_device_means_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMB_DEVICE", "")
    with_empty = device.pick()
    monkeypatch.delenv("GEMB_DEVICE")
    assert with_empty == device.pick()
