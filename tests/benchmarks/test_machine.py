from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.machine import this_machine, thread_environment

CPU_INFO = """\
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9354 32-Core Processor
stepping\t: 1
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16

model name\t: another
"""


@pytest.fixture
def zen4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPU_INFO)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("zen4")
def test_the_processor_and_its_flags_are_read() -> None:
    found = this_machine()
    assert found.processor == "AMD EPYC 9354 32-Core Processor"
    assert found.family_model_stepping == "25/17/1"
    assert found.flags == ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
    assert found.slug == "amd-epyc-9354-32-core-avx512_bf16"


@pytest.mark.usefixtures("zen4")
@pytest.mark.parametrize(
    ("limit", "avx512", "bf16"), [("native", True, True), ("avx512", True, False), ("avx2", False, False)]
)
def test_a_limit_hides_what_it_switches_off(limit: str, avx512: bool, bf16: bool) -> None:
    found = this_machine(limit)
    assert (found.has_avx512, found.has_bf16) == (avx512, bf16)


@pytest.mark.usefixtures("zen4")
def test_a_limited_result_has_a_name_of_its_own() -> None:
    assert this_machine("avx2").slug == "amd-epyc-9354-32-core-limited-to-avx2"


def test_a_process_gets_its_threads_its_limit_and_no_network() -> None:
    environment = thread_environment(2, "avx2")
    assert environment["OMP_NUM_THREADS"] == environment["RAYON_NUM_THREADS"] == "2"
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment["HF_HUB_OFFLINE"] == "1"
