"""What a user can name as an input, and what is said about what cannot be one."""

import errno
import gzip
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import zstandard

from gemb.errors import Exit, GembError, MachineError
from gemb.text import inputs
from gemb.text.inputs import documents_below, lines_of, open_bytes, resolve_inputs


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names in messages."""
    monkeypatch.chdir(tmp_path)


def write(name: str, data: str | bytes = "x\n") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def problem(*names: str) -> str:
    with pytest.raises(GembError) as caught:
        resolve_inputs(names)
    assert caught.value.exit_code is Exit.USAGE
    return str(caught.value)


def test_several_files_keep_their_order_and_a_glob_is_sorted() -> None:
    for name in ("b.jsonl", "a.jsonl", "z.csv"):
        write(name)
    assert [file.name for file in resolve_inputs(["z.csv", "*.jsonl"])] == ["z.csv", "a.jsonl", "b.jsonl"]


def test_two_stars_of_a_glob_go_into_folders() -> None:
    write("one.txt"), write("deep/er/two.txt")
    assert [file.name for file in resolve_inputs(["**/*.txt"])] == ["deep/er/two.txt", "one.txt"]


def test_a_file_with_a_star_in_its_name_is_that_file() -> None:
    write("a*.txt"), write("ab.txt")
    assert [file.name for file in resolve_inputs(["a*.txt"])] == ["a*.txt"]


@pytest.mark.parametrize(
    ("name", "form", "compression"),
    [
        ("a.jsonl", "jsonl", "none"),
        ("a.NDJSON", "jsonl", "none"),
        ("a.csv.gz", "csv", "gzip"),
        ("a.tsv.zst", "tsv", "zstd"),
        ("a.txt", "text", "none"),
        ("a.md", "document", "none"),
        ("a.parquet", "parquet", "none"),
    ],
)
def test_the_suffix_tells_the_format(name: str, form: str, compression: str) -> None:
    write(name, "some text\n")
    (file,) = resolve_inputs([name])
    assert (file.format, file.compression, file.size_bytes) == (form, compression, 10)


def test_the_input_format_overrides_the_suffix() -> None:
    write("rows.log")
    (file,) = resolve_inputs(["rows.log"], input_format="text")
    assert file.format == "text"


@pytest.mark.parametrize("corpus", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"])
def test_a_folder_with_a_beir_corpus_is_that_corpus(corpus: str) -> None:
    write(f"set/{corpus}"), write("set/notes.txt")
    (file,) = resolve_inputs(["set"])
    assert (file.name, file.format) == (f"set/{corpus}", "jsonl")


def test_documents_of_a_folder_are_sorted_by_path_and_hidden_ones_left_out() -> None:
    names = ["a/z.txt", "a.txt", "a-b/c.md", "B.MD", "a/b/c.txt"]
    for name in [*names, "d/.hidden/x.txt", "d/.y.txt", "d/code.py"]:
        write(f"docs/{name}")
    root = Path("docs")
    found = [path.relative_to(root).as_posix() for path in documents_below(root)]
    assert found == sorted(names)
    (file,) = resolve_inputs(["docs"])
    assert (file.format, file.size_bytes) == ("folder", 2 * len(names))


def test_links_to_folders_are_not_followed() -> None:
    write("docs/a.txt")
    Path("docs/again").symlink_to(Path("docs").resolve())
    assert len(list(documents_below(Path("docs")))) == 1


def test_an_edit_in_the_middle_changes_the_fingerprint() -> None:
    data = bytearray(b"line\n" * 1_000_000)
    write("a.txt", bytes(data))
    (file,) = resolve_inputs(["a.txt"])
    before = file.fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", before)
    assert before == file.fingerprint()
    data[2_500_000] = ord("x")
    write("a.txt", bytes(data))
    os.utime("a.txt", ns=(file.mtime_ns, file.mtime_ns))
    assert resolve_inputs(["a.txt"])[0].fingerprint() != before


def test_a_folders_fingerprint_tells_a_renamed_and_a_changed_document() -> None:
    write("docs/a.txt"), write("docs/b.txt")
    seen = {resolve_inputs(["docs"])[0].fingerprint()}
    Path("docs/a.txt").rename("docs/c.txt")
    seen.add(resolve_inputs(["docs"])[0].fingerprint())
    write("docs/b.txt", "longer\n")
    seen.add(resolve_inputs(["docs"])[0].fingerprint())
    assert len(seen) == 3


def test_a_stream_has_no_fingerprint() -> None:
    (file,) = resolve_inputs(["-"])
    assert (file.is_stream, file.format, file.fingerprint()) == (True, "auto", "")


def test_a_pipe_is_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe")
    (file,) = resolve_inputs(["pipe"])
    assert (file.is_stream, file.format) == (True, "auto")


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_frames_of_any_number_are_read_whole(frames: int) -> None:
    rows = b"".join(b"row %d\n" % number for number in range(30_000))
    write("a.txt.zst", zstandard.compress(rows) * frames)
    (file,) = resolve_inputs(["a.txt.zst"])
    with open_bytes(file) as stream:
        assert stream.read() == rows * frames


def test_members_of_a_gzip_file_are_read_one_after_the_other() -> None:
    write("a.txt.gz", gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    (file,) = resolve_inputs(["a.txt.gz"])
    with open_bytes(file) as stream:
        assert list(lines_of(file, stream)) == [b"one\n", b"two\n"]


@pytest.mark.parametrize("cut", [0.5, 0.9])
@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_data_that_break_off_say_where(suffix: str, compress: object, cut: float) -> None:
    rows = b"".join(b"row %d %d\n" % (number, number * 7919 % 65537) for number in range(50_000))
    packed = compress(rows)  # type: ignore[operator]
    write(f"a.txt{suffix}", packed[: int(len(packed) * cut)])
    (file,) = resolve_inputs([f"a.txt{suffix}"])
    lines = []
    with open_bytes(file) as stream, pytest.raises(GembError) as caught:  # noqa: PT012  # counts the lines before
        for line in lines_of(file, stream):
            lines.append(line)
    assert str(caught.value) == (
        f"a.txt{suffix}: the compressed data break after line {len(lines)}: it is cut off; "
        "fetch or make the file again"
    )
    assert rows.startswith(b"".join(lines))
    assert len(lines) > 1000


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_data_with_a_flipped_byte_are_refused(suffix: str, compress: object) -> None:
    packed = bytearray(compress(os.urandom(10_000) + b"\n"))  # type: ignore[operator]
    packed[0] ^= 0xFF
    write(f"a.txt{suffix}", bytes(packed))
    (file,) = resolve_inputs([f"a.txt{suffix}"])
    with open_bytes(file) as stream, pytest.raises(GembError, match="it is damaged"):
        list(lines_of(file, stream))


def test_without_zstandard_the_message_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    write("a.jsonl.zst")
    assert problem("a.jsonl.zst") == (
        "a.jsonl.zst: zstd data need the zstandard package; pip install 'gemb[zstd]'"
    )


def test_all_problems_are_told_at_once() -> None:
    write("a.doc"), write("b.txt")
    Path("empty").mkdir()
    assert problem("none.jsonl", "*.csv", "a.doc", "empty", "b.txt", "b.txt", "dtype=f16").splitlines() == [
        "inputs: 6 problems",
        "  none.jsonl: no such file or folder",
        "  *.csv: no file matches",
        "  a.doc: cannot tell its format by the name; the choices are .jsonl, .ndjson, .csv, .tsv, .parquet, "
        ".txt, .md, all but .parquet also with .gz or .zst, or --input-format "
        "jsonl|csv|tsv|parquet|text|document",
        "  empty: the folder holds nothing",
        "  dtype=f16: no such file or folder; if it is a key of the recipe and its value, "
        "pass --set dtype=f16",
        "  b.txt: given twice",
    ]


def test_no_input_at_all_says_what_can_be_named() -> None:
    assert problem() == "no input given; name files, folders or globs, or - for stdin"


def test_a_folder_without_texts_names_the_files_that_could_be_read() -> None:
    write("rows/a.csv"), write("rows/b.py")
    assert problem("rows") == (
        "rows: the folder holds no .txt or .md file and no corpus.jsonl; "
        "name its files instead, e.g. rows/*.csv"
    )


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A file that this process may not read, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()
        file = Path(folder, "secret.jsonl")
        file.write_text("{}\n")
        file.chmod(0)
        if user == 0:
            os.seteuid(65534)  # nobody: root may read everything
        try:
            yield file
        finally:
            os.seteuid(user)


def test_an_unreadable_file_is_told_before_reading(unreadable: Path) -> None:
    assert problem(str(unreadable)) == f"{unreadable}: no permission to read it"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_the_command_that_converts_it(encoding: str) -> None:
    write("a.jsonl", '{"text": "hello"}\n'.encode(encoding))
    assert problem("a.jsonl") == (
        "a.jsonl: is UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 a.jsonl > utf8-a.jsonl converts it"
    )


class BrokenDisk(io.RawIOBase):
    def __init__(self) -> None:
        self.blocks = [b"one\ntwo\nthr"]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        if not self.blocks:
            raise OSError(errno.EIO, "Input/output error")
        block = self.blocks.pop()
        buffer[: len(block)] = block
        return len(block)


def test_a_disk_that_fails_is_not_the_users_mistake() -> None:
    write("a.txt")
    (file,) = resolve_inputs(["a.txt"])
    with pytest.raises(MachineError) as caught:
        list(lines_of(file, io.BufferedReader(cast(io.RawIOBase, BrokenDisk()))))
    assert str(caught.value) == "a.txt: cannot be read after line 2: Input/output error"
    assert caught.value.exit_code is Exit.FAILED


def test_utf_16_inside_a_compressed_file_is_named_when_it_is_read() -> None:
    write("a.txt.gz", gzip.compress("hello\n".encode("utf-16")))
    (file,) = resolve_inputs(["a.txt.gz"])
    with open_bytes(file) as stream, pytest.raises(GembError, match="is UTF-16, not UTF-8"):
        list(lines_of(file, stream))


def test_a_compressed_file_under_a_plain_name_is_told_its_right_name() -> None:
    write("a.jsonl", gzip.compress(b"{}\n")), write("b.csv", zstandard.compress(b"text\n"))
    assert problem("a.jsonl", "b.csv").splitlines()[1:] == [
        "  a.jsonl: is compressed with gzip; rename it to a.jsonl.gz",
        "  b.csv: is compressed with zstd; rename it to b.csv.zst",
    ]


def test_a_json_array_is_told_how_to_become_lines() -> None:
    write("a.jsonl", '\ufeff \n[{"text": "x"}]')
    assert problem("a.jsonl") == (
        "a.jsonl: starts with '[', so it is one JSON array and not one object a line; "
        "jq -c '.[]' a.jsonl > rows.jsonl makes lines of it"
    )


def test_finding_inputs_loads_no_heavy_module() -> None:
    program = (
        "import sys, gemb.text.records; "
        "heavy = {'torch', 'transformers', 'pyarrow', 'zstandard', 'tokenizers', 'numpy'}; "
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
