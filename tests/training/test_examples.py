"""The usable rows of a data set by number, in every format, and what is said about the others."""

import csv
import gzip
import io
import queue
import resource
import threading
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gemb.errors import GembError
from gemb.files import Lock
from gemb.training.columns import Example, Text
from gemb.training.data_recipe import NO_PROMPTS, ColumnNames, DataSet
from gemb.training.examples import Rows, open_rows
from tests.conftest import DATA

PAIRS: list[dict[str, Any]] = [
    {"anchor": "first, \"quoted\"", "positive": "line\nbreak"},
    {"anchor": "Ä 中文 😀", "positive": "p1", "negative": "n1"},
    {"anchor": "third", "positive": "p2", "negative": None},
]  # fmt: skip
EXAMPLES = [
    Example(Text('first, "quoted"'), (Text("line\nbreak"),)),
    Example(Text("Ä 中文 😀"), (Text("p1"),), (Text("n1"),)),
    Example(Text("third"), (Text("p2"),)),
]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names in messages."""
    monkeypatch.chdir(tmp_path)


def write(name: str, data: bytes | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["anchor", "positive", "negative"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    columns = {name: [row.get(name) for row in rows] for name in ("anchor", "positive", "negative")}
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=2)
    return out.getvalue()


def rows_of(*paths: str, **keys: Any) -> Rows:  # noqa: ANN401  # the keys of a DataSet
    data = DataSet(path=paths if len(paths) > 1 else paths[0], prompts=NO_PROMPTS, **keys)
    return open_rows(data, Path("cache"))


def read(*paths: str, **keys: Any) -> list[Example]:  # noqa: ANN401
    with rows_of(*paths, **keys) as rows:
        return [rows.example(row) for row in range(rows.size)]


def failure(*paths: str, **keys: Any) -> str:  # noqa: ANN401
    with pytest.raises(GembError) as error:
        rows_of(*paths, **keys)
    return str(error.value)


FORMATS = {
    "pairs.jsonl": jsonl(PAIRS),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(PAIRS),
    "blank.jsonl": b"\n \r\n" + jsonl(PAIRS).replace(b"\n", b"\r\n\n"),
    "unended.jsonl": jsonl(PAIRS).rstrip(b"\n"),
    "pairs.jsonl.gz": gzip.compress(jsonl(PAIRS)),
    "pairs.jsonl.zst": zstandard.compress(jsonl(PAIRS)),
    "pairs.csv": table(PAIRS, ","),
    "pairs.tsv.gz": gzip.compress(table(PAIRS, "\t")),
    "pairs.parquet": parquet(PAIRS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_rows_are_the_same_in_every_format(name: str) -> None:
    assert read(write(name, FORMATS[name])) == EXAMPLES


def test_rows_of_several_files_follow_one_another_and_tell_their_places() -> None:
    names = [write(name, FORMATS[name]) for name in ("pairs.jsonl", "pairs.jsonl.gz", "pairs.csv")]
    assert read(*names) == EXAMPLES * 3
    with rows_of(*names) as rows:
        assert [rows.place(row) for row in (1, 3, 7)] == ["pairs.jsonl:2", "pairs.jsonl.gz:1", "pairs.csv:4"]


def test_plain_rows_are_read_where_they_lie_and_nothing_is_copied() -> None:
    write("pairs.jsonl", FORMATS["pairs.jsonl"])
    read("pairs.jsonl")
    (folder,) = Path("cache").iterdir()
    assert (folder / "rows").stat().st_size == 0
    assert (folder / "index").stat().st_size == 3 * 24


def test_rows_that_teach_nothing_are_counted_and_written_down_with_their_lines() -> None:
    rows: list[Any] = [
        {"anchor": "a", "positive": "a"},
        {"anchor": "b", "positive": "p"},
        {"anchor": " ", "positive": "p"},
        {"anchor": "c", "positive": "c"},
        ["d", "p"],
    ]
    write("pairs.jsonl", jsonl(rows) + b'{"anchor": \n{"anchor": "e", "positive": "q"}\n')
    with rows_of("pairs.jsonl") as found:
        assert [found.place(row) for row in range(found.size)] == ["pairs.jsonl:2", "pairs.jsonl:7"]
        prepared = found.prepared
    assert prepared.rejected == 5
    assert prepared.reasons["the positive equals the query"] == 2
    assert prepared.first_rejects[:2] == (
        "pairs.jsonl:1: the positive equals the query",
        'pairs.jsonl:3: "anchor" is empty',
    )
    (folder,) = Path("cache").iterdir()
    rejects = [orjson.loads(line) for line in (folder / "rejects.jsonl").read_bytes().splitlines()]
    assert [reject["line"] for reject in rejects] == [1, 3, 4, 5, 6]
    assert rejects[3]["reason"] == "not an object with named values"


def test_a_file_without_a_header_line_gets_its_names_from_the_recipe_and_may_hold_bare_quotes() -> None:
    path = write("pairs.tsv", '"Hm" he said\t"Tja\nyes\tja\n')
    assert read(path, header=("query", "positive"), quoting=False) == [
        Example(Text('"Hm" he said'), (Text('"Tja'),)),
        Example(Text("yes"), (Text("ja"),)),
    ]
    swapped = read(path, header=("positive", "query"), quoting=False)
    assert swapped[1] == Example(Text("ja"), (Text("yes"),))
    assert failure(path, header=("query", "positive", "negative"), quoting=False).startswith(
        "pairs: no usable row; 2 rejected, the first: pairs.tsv:1: 2 columns where the header has 3"
    )


def test_broken_rows_of_csv_are_rejected_and_the_others_read() -> None:
    rows = b'anchor,positive\na,p\nb\n\nc,\xff\nd,"q\nr"\ne,"s"x\nf,\n'
    with rows_of(write("pairs.csv", rows)) as found:
        assert [found.example(row).query.text for row in range(found.size)] == ["a", "d"]
        assert found.prepared.first_rejects == (
            "pairs.csv:3: 1 columns where the header has 2",
            "pairs.csv:5: not UTF-8: byte 0xff at byte 2 of the row",
            "pairs.csv:8: broken quoting: ',' expected after '\"'",
            'pairs.csv:9: "positive" is empty',
        )


def test_damaged_parquet_and_compressed_files_are_told() -> None:
    write("pairs.parquet", FORMATS["pairs.parquet"][:-30])
    assert failure("pairs.parquet").startswith("pairs.parquet: not a Parquet file, or damaged: ")
    write("pairs.jsonl.gz", FORMATS["pairs.jsonl.gz"][:-4])  # without the end of the checksum
    assert failure("pairs.jsonl.gz") == (
        "pairs.jsonl.gz: the compressed data break after line 3: it is cut off; fetch or make the file again"
    )


def test_a_data_set_without_a_usable_row_is_an_error() -> None:
    write("pairs.jsonl", jsonl([{"anchor": "a", "positive": "a"}, {"anchor": "", "positive": "b"}]))
    (where,) = [f"cache/{folder.name}/rejects.jsonl" for folder in _prepared_folder("pairs.jsonl")]
    assert failure("pairs.jsonl") == (
        "pairs: no usable row; 2 rejected, the first: pairs.jsonl:1: the positive equals the query; "
        f"all are in {where}"
    )
    write("empty.jsonl", "")
    assert failure("empty.jsonl") == "empty: no rows in empty.jsonl"


def _prepared_folder(name: str) -> list[Path]:
    failure(name)
    return list(Path("cache").iterdir())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "pairs.jsonl",
            '{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positive": "b", "negatve": "c"}\n',
            'pairs.jsonl:2: unknown column "negatve"; did you mean negative?; name the columns that are '
            "wanted under columns:, the others are then left out",
        ),
        (
            "pairs.csv",
            "anchr,positive\na,b\n",
            'pairs.csv:1: unknown column "anchr"; did you mean anchor?; or name the columns under columns:',
        ),
        ("pairs.csv", "anchor,anchor\na,b\n", "pairs.csv: two columns are named anchor; rename one of them"),
        (
            "pairs.jsonl",
            '{"query": "a", "positive_document_ids": ["1"]}\n',
            'pairs.jsonl:1: "positive_document_ids" holds ids of documents; name the file with their texts '
            "under corpus:",
        ),
        (
            "texts.txt",
            "one\ntwo\n",
            "texts.txt: holds texts without columns; training data are rows of .jsonl, .csv, .tsv or "
            ".parquet files, or a BEIR folder with queries.jsonl and qrels",
        ),
    ],
)
def test_what_is_wrong_with_a_whole_file_is_told_before_the_first_step(
    name: str, data: str, message: str
) -> None:
    write(name, data)
    assert failure(name) == message


def test_a_missing_file_and_a_stream_are_refused() -> None:
    assert failure("pairs.jsonl") == "pairs.jsonl: no such file or folder"
    assert failure("-") == "-: training data are read many times; save the stream to a file"


def test_a_named_column_that_no_row_has_is_an_error_and_one_that_some_rows_lack_is_none() -> None:
    write("pairs.jsonl", jsonl([{"title": "a", "body": "b"}, {"title": "c", "body": "d", "hard": "e"}]))
    named = ColumnNames(query="title", positive="body", negative="hard")
    assert [example.negatives for example in read("pairs.jsonl", columns=named)] == [(), (Text("e"),)]
    slip = ColumnNames(query="titel", positive="body")
    assert failure("pairs.jsonl", columns=slip) == (
        'pairs: no row has the column "titel" (query); did you mean title?'
    )


def test_a_limit_takes_the_first_usable_rows() -> None:
    write("pairs.jsonl", jsonl([{"anchor": "a", "positive": "a"}, *PAIRS]))
    assert read("pairs.jsonl", limit=2) == EXAMPLES[:2]


def test_prepared_rows_are_used_again_until_a_file_changes() -> None:
    write("pairs.jsonl", FORMATS["pairs.jsonl"])
    heard: list[str] = []
    data = DataSet(path="pairs.jsonl", prompts=NO_PROMPTS)
    first = open_rows(data, Path("cache"))
    (index,) = Path("cache").glob("*/index")
    made = index.stat().st_mtime_ns
    again = open_rows(data, Path("cache"), notice=heard.append)
    assert index.stat().st_mtime_ns == made
    assert heard == []
    assert again.prepared == first.prepared
    write("pairs.jsonl", FORMATS["pairs.jsonl"] + jsonl(PAIRS))
    changed = open_rows(data, Path("cache"))
    assert changed.size == 6
    assert changed.prepared.fingerprint != first.prepared.fingerprint
    for rows in (first, again, changed):
        rows.close()


def test_a_preparation_that_was_killed_is_done_again() -> None:
    write("pairs.jsonl", FORMATS["pairs.jsonl"])
    read("pairs.jsonl")
    (folder,) = Path("cache").iterdir()
    (folder / "prepared.json").unlink()
    (folder / "index").write_bytes(b"half")
    assert read("pairs.jsonl") == EXAMPLES


def test_a_file_that_changes_in_use_stops_the_run() -> None:
    write("pairs.jsonl", FORMATS["pairs.jsonl"])
    with rows_of("pairs.jsonl") as rows:
        with Path("pairs.jsonl").open("r+b") as file:
            file.truncate(60)
        with pytest.raises(GembError) as error:
            rows.example(2)
    assert str(error.value) == "pairs.jsonl:3: changed while it was in use; start the run again"


def test_a_second_process_waits_for_the_one_that_prepares() -> None:
    data = DataSet(path=write("pairs.jsonl", FORMATS["pairs.jsonl"]), prompts=NO_PROMPTS)
    open_rows(data, Path("cache")).close()
    (folder,) = Path("cache").iterdir()
    heard: queue.Queue[str] = queue.Queue()
    sizes: list[int] = []

    def second() -> None:
        with open_rows(data, Path("cache"), notice=heard.put) as rows:
            sizes.append(rows.size)

    with Lock(folder / "lock", "data set pairs"):
        thread = threading.Thread(target=second)
        thread.start()
        told = heard.get(timeout=30)
        assert sizes == []
    thread.join(timeout=30)
    assert sizes == [3]
    assert told.startswith("waiting up to 86400 s for data set pairs, held by process ")


def test_a_full_disk_is_told_and_leaves_nothing_that_looks_whole() -> None:
    write("pairs.csv", table(PAIRS * 1000, ","))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = failure("pairs.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = Path("cache").iterdir()
    assert message == (
        f"cannot write {folder}: the file grew past a size limit; raise it (ulimit -f) or write smaller "
        "parts to a folder, then run the same command again"
    )
    assert not (folder / "prepared.json").exists()
    assert len(read("pairs.csv")) == 3000


def test_labels_whose_rows_all_have_one_text_are_rejected() -> None:
    rows = [("a", "x"), ("b", "y"), ("c", "x"), ("d", "z"), ("d", "z"), ("e", "y"), ("f", "y")]
    write("texts.jsonl", jsonl([{"text": text, "label": label} for text, label in rows]))
    with rows_of("texts.jsonl") as found:
        assert [found.example(row).query.text for row in range(found.size)] == ["a", "b", "c", "e", "f"]
        labels = found.prepared.labels
        in_order = [found.in_label_order(place) for place in range(found.size)]
        assert found.prepared.first_rejects == (
            'texts.jsonl:4: no other text has the label "z"',
            'texts.jsonl:5: no other text has the label "z"',
        )
    assert in_order == [0, 2, 1, 3, 4]
    assert {name: (label.start, label.count, label.one, label.other) for name, label in labels.items()} == {
        "x": (0, 2, 0, 2),
        "y": (2, 3, 1, 3),
    }


CORPUS = [
    {"_id": "d1", "title": "One", "text": "first"},
    {"_id": "d2", "title": "", "text": "second"},
    {"_id": "d3", "title": "", "text": ""},
    {"_id": "d4", "title": "", "text": "fourth"},
]
QUERIES = [{"_id": "q1", "text": "one?"}, {"_id": "q2", "text": "two?"}, {"_id": "q3", "text": "never"}]


def beir(qrels: str) -> str:
    write("set/corpus.jsonl", jsonl(CORPUS))
    write("set/queries.jsonl", jsonl(QUERIES))
    write("set/qrels/train.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    return "set"


def test_a_beir_folder_gives_one_example_a_judged_query() -> None:
    folder = beir("q2\td2\t1\nq1\td1\t2\nq2\td4\t0\nq2\td1\t1\n")
    assert read(folder) == [
        Example(Text("two?"), (Text("second"), Text("first", "One")), (Text("fourth"),)),
        Example(Text("one?"), (Text("first", "One"),)),
    ]


def test_judgements_with_unknown_ids_are_rejected_with_their_lines() -> None:
    folder = beir("q9\td1\t1\nq1\td9\t1\nq1\td1\t1\nq2\td3\t1\n")
    with rows_of(folder) as rows:
        assert [rows.example(row).query.text for row in range(rows.size)] == ["one?"]
        assert rows.prepared.first_rejects == (
            'set/qrels/train.tsv:2: no query "q9" in set/queries.jsonl',
            'set/qrels/train.tsv:3: no document "d9" with a text in set/corpus.jsonl',
            'set/qrels/train.tsv:5: no document "d3" with a text in set/corpus.jsonl',
            'set/qrels/train.tsv:5: no relevant document for query "q2"',
        )


def test_a_beir_folder_that_lacks_something_says_what() -> None:
    folder = beir("q1\td1\t1\n")
    assert failure(folder, split="dev") == (
        "set: no qrels/dev.tsv; the splits are train, choose one with split:"
    )
    write("set/qrels/train.tsv", "query\tdoc\tscore\nq1\td1\t1\n")
    assert failure(folder) == (
        'set/qrels/train.tsv:1: no column "query-id"; the header of qrels is query-id, corpus-id, score'
    )
    write("set/qrels/train.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tgood\n")
    assert failure(folder) == 'set/qrels/train.tsv:2: "score" is "good", not an integer'
    Path("set/corpus.jsonl").unlink()
    assert failure(folder) == "set: queries.jsonl is there, but no corpus.jsonl beside it"


def test_rows_with_ids_find_their_texts_in_the_corpus() -> None:
    corpus = write("documents.jsonl", jsonl(CORPUS))
    write(
        "pairs.jsonl",
        jsonl(
            [
                {"query": "one?", "positive_document_ids": ["d1"], "negative_document_ids": ["d2"]},
                {"query": "two?", "positive_document_ids": ["d9"], "negative_document_ids": []},
            ]
        ),
    )
    with rows_of("pairs.jsonl", corpus=corpus) as rows:
        assert rows.size == 1
        assert rows.example(0) == Example(Text("one?"), (Text("first", "One"),), (Text("second"),))
        assert rows.prepared.first_rejects == (
            'pairs.jsonl:2: "positive_document_ids" names document "d9", which the corpus does not hold',
        )


def test_an_id_that_stands_twice_in_a_corpus_is_an_error() -> None:
    corpus = write("documents.jsonl", jsonl([*CORPUS, CORPUS[0]]))
    write("pairs.jsonl", jsonl([{"query": "one?", "positive_document_ids": ["d1"]}]))
    assert failure("pairs.jsonl", corpus=corpus) == 'documents.jsonl:5: id "d1" is not new'


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("path", "size", "rejected"),
    [
        # 11 positives equal their anchor, 4 negatives equal the positive.
        ("pairs/nli-triplets.jsonl.gz", 3053, 15),
        ("pairs/conala-train.jsonl.gz", 2351, 0),
        ("retrieval/scifact", 809, 0),  # BEIR's count of train queries
        ("sts/stsb/stsb-en.train.jsonl", 5749, 0),
        ("classification/tweeteval-hate/train.jsonl", 8993, 7),  # 7 texts of white space only
    ],
)
def test_real_data_are_read_to_the_last_row(path: str, size: int, rejected: int) -> None:
    with rows_of(str(DATA / path)) as rows:
        assert (rows.size, rows.prepared.rejected) == (size, rejected)
        rows.example(rows.size - 1)
