import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Finished


def test_help_shows_an_example_and_every_rule(gemb: Callable[..., Finished]) -> None:
    done = gemb("mine", "--help")
    assert done.code == 0
    assert "gemb mine pairs.jsonl --corpus docs.jsonl -o mined.jsonl -m minilm" in done.out
    for option in ("--negatives", "--first-rank", "--relative-margin", "--second", "--pick", "--cache"):
        assert option in done.out


def test_pairs_are_mined(gemb: Callable[..., Finished], tmp_path: Path) -> None:
    texts = [("a cat sits", "a cat is sitting"), ("rain falls", "it rains"), ("he cooks", "a man cooks")]
    rows = [{"anchor": query, "positive": positive} for query, positive in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "mined.jsonl"
    words = ["mine", tmp_path / "pairs.jsonl", "-o", output, "-m", "minilm", "--threads", "1", "--json"]
    done = gemb(*words, "--negatives", "2")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows_by_negatives"] == {"2": 3}
    mined = [json.loads(line) for line in output.read_text().splitlines()]
    assert {text for row in mined for text in row["negative"]} == {positive for _, positive in texts}


def test_a_margin_is_a_number_or_none(gemb: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "a cat", "positive": "a cat sits"}\n')
    words = ["mine", tmp_path / "pairs.jsonl", "-o", tmp_path / "mined.jsonl", "--threads", "1", "--dry-run"]
    done = gemb(*words, "--relative-margin", "none", "--max-score", "0.5")
    assert done.code == 0, done.err
    assert "top 5 of ranks 1 to 100, at most 0.5" in done.out
    refused = gemb(*words, "--relative-margin", "off")
    assert refused.code == 2
    assert "--relative-margin: 'off' is not a number" in refused.err


def test_a_mistake_is_one_message(gemb: Callable[..., Finished], tmp_path: Path) -> None:
    done = gemb("mine", tmp_path / "nothing.jsonl", "-o", tmp_path / "mined.jsonl")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "nothing.jsonl" in done.err
