"""Where each text of a packed batch lies."""

import numpy as np

from gemb.model.layout import Group, Layout


def layout(*lengths: int, least_rows: int = 1) -> Layout:
    """The layout of texts of these token counts."""
    return Layout.of(np.array(lengths, dtype=np.int32), least_rows=least_rows)


def test_equal_neighbours_form_a_group() -> None:
    made = layout(5, 5, 5, 3, 1, 1)
    assert made.groups == (Group(0, 0, 3, 5), Group(15, 3, 1, 3), Group(18, 4, 2, 1))
    assert [group.stop for group in made.groups] == [15, 18, 20]
    assert (made.tokens, made.rows, made.longest, made.filled) == (20, 6, 5, 20)


def test_equal_texts_apart_are_two_groups() -> None:
    assert layout(2, 3, 2).groups == (Group(0, 0, 1, 2), Group(2, 1, 1, 3), Group(5, 2, 1, 2))


def test_positions_count_anew_in_each_text() -> None:
    assert layout(3, 1, 2).positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout(3, 1, 2).starts.tolist() == [0, 3, 4, 6]


def test_a_small_batch_is_filled_once_at_its_end() -> None:
    made = layout(2, 1, least_rows=6)
    assert (made.tokens, made.filled) == (3, 6)
    assert made.positions.tolist() == [0, 1, 0, 0, 0, 0]
    assert made.starts.tolist() == [0, 2, 3]
    assert layout(4, 3, least_rows=6).filled == 7


def test_no_text_is_a_layout_without_groups() -> None:
    made = layout()
    assert (made.groups, made.tokens, made.rows, made.longest) == ((), 0, 0, 0)
    assert made.starts.tolist() == [0]


def test_texts_stand_apart_whatever_their_lengths() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        lengths = np.sort(random.integers(1, 9, random.integers(1, 30)).astype(np.int32))[::-1].copy()
        made = Layout.of(lengths)
        texts = [
            (group.start + row * group.length, group.length)
            for group in made.groups
            for row in range(group.rows)
        ]
        assert [length for _, length in texts] == lengths.tolist()
        assert [start for start, _ in texts] == made.starts[:-1].tolist()
        assert [group.row for group in made.groups] == [
            int(np.searchsorted(made.starts.numpy(), group.start)) for group in made.groups
        ]
