from decimal import Decimal

import numpy as np
import pytest

from gemb.errors import GembError
from gemb.store.documents import (
    Document,
    Hit,
    checksum,
    content_hash,
    matches,
    metadata_json,
    spans_json,
)

CAT = Document("cat", "a cat sleeps", "Cat", {"year": 2020, "by": "Ann"})


def test_the_content_hash_depends_on_title_and_text_alone() -> None:
    assert content_hash(CAT) == content_hash(Document("other", CAT.text, CAT.title))
    assert content_hash(CAT) != content_hash(Document("cat", "a cat sleeps.", "Cat"))
    assert content_hash(CAT) != content_hash(Document("cat", CAT.text, ""))
    assert len(content_hash(CAT)) == 16


def test_title_and_text_cannot_run_into_each_other() -> None:
    assert content_hash(Document("a", "bc", "a")) != content_hash(Document("a", "c", "ab"))


def test_the_content_hash_tells_a_changed_vector() -> None:
    vectors = np.ones((1, 4), np.float32)
    assert content_hash(CAT, vectors) == content_hash(CAT, vectors.copy())
    assert content_hash(CAT, vectors) != content_hash(CAT, np.nextafter(vectors, 2, dtype=np.float32))
    assert content_hash(CAT, vectors) != content_hash(CAT)


def test_metadata_is_json_with_sorted_keys() -> None:
    assert metadata_json(CAT) == '{"by":"Ann","year":2020}'
    assert metadata_json(Document("cat")) == "{}"
    assert metadata_json(Document("cat", metadata={"price": Decimal("9.50")})) == '{"price":9.5}'


def test_metadata_that_is_no_json_is_told() -> None:
    with pytest.raises(GembError) as caught:
        metadata_json(Document("cat", metadata={"of": object()}))
    assert str(caught.value) == (
        "the metadata of 'cat' cannot be stored as JSON: field 'of' holds object, which JSON cannot "
        "(type is not json serializable: object)"
    )


def test_half_a_surrogate_pair_is_told() -> None:
    with pytest.raises(GembError) as caught:
        content_hash(Document("cat", "ab\ud800"))
    assert str(caught.value) == "the text of 'cat' has a lone surrogate at character 2; correct the input"


def test_the_checksum_tells_values_their_order_and_their_bounds_apart() -> None:
    values: list[tuple[str | bytes | int, ...]] = [
        ("ab", "c"), ("a", "bc"), ("c", "ab"), (1, 2), (2, 1), (-1, 2), (12,), (b"", "ab", "c"), (2**63,)
    ]  # fmt: skip
    assert len({checksum(*each) for each in values}) == len(values)


@pytest.mark.parametrize("value", [None, 1.5])
def test_values_of_a_type_that_is_never_written_do_not_match(value: object) -> None:
    assert matches(checksum("a", 1), "a", 1)
    assert not matches(checksum("a", 1), "a", value)
    assert not matches(value, "a", 1)


def test_spans_are_kept_as_json() -> None:
    assert spans_json(None) == ""
    assert spans_json([(0, 5), (5, 9)]) == "[[0,5],[5,9]]"


def test_the_excerpt_is_the_passage_or_the_whole_text() -> None:
    assert Hit("cat", 0.5, "", CAT.text, {}).excerpt == "a cat sleeps"
    assert Hit("cat", 0.5, "", CAT.text, {}, passage=(2, 5)).excerpt == "cat"
