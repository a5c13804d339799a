"""The part of a text that shows best why it was found."""

import re

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+(?=\s|$)|[。！？]|$)")
_SHARED_START = 4  # letters; shorter words must be the same
_ENDING = 3  # letters in which two words of one stem may differ: compiler, compilers, compiling
_MARK = "…"


def excerpt(text: str, query: str, characters: int) -> str:
    """At most `characters` of `text` on one line, around the sentence that shares most with `query`.

    A sentence is worth the squared lengths of the query's words that it has: long words say more, and no
    list of a language's small words is needed. Of equal sentences the first is taken; without a shared word
    the text is shown from its beginning. What is left out at either end is marked with `…`.
    """
    line = " ".join(text.split())
    if len(line) <= characters:
        return line
    # A window at the end of the text would be short; it is filled up from before.
    start = min(_best_start(line, query, characters), len(line) - characters + len(_MARK) + 1)
    start = _word_start(line, start)
    shown = f"{_MARK} {line[start:]}" if start else line
    if len(shown) <= characters:
        return shown
    cut = shown.rfind(" ", 0, characters - len(_MARK))
    return f"{shown[: cut if cut > len(_MARK) else characters - 2]} {_MARK}"


def _best_start(line: str, query: str, characters: int) -> int:
    """Where the best sentence begins, or a little before its first shared word where that lies far in."""
    words = {word.casefold() for word in _WORD.findall(query)}
    best = most = 0
    for sentence in _SENTENCE.finditer(line):
        shared: set[str] = set()
        first = sentence.start()
        for match in _WORD.finditer(line, sentence.start(), sentence.end()):
            found = {word for word in words if _same_stem(word, match[0].casefold())}
            if found and not shared:
                first = match.start()
            shared |= found
        worth = sum(len(word) ** 2 for word in shared)
        if worth > most:
            is_far_in = first - sentence.start() > characters // 2
            best, most = first - characters // 4 if is_far_in else sentence.start(), worth
    return best


def _word_start(line: str, start: int) -> int:
    """`start`, or the beginning of the next word where it lies inside one; scripts without blanks stay."""
    if start <= 0 or line[start - 1] == " ":
        return max(0, start)
    blank = line.find(" ", start, start + 30)
    return start if blank < 0 else blank + 1


def _same_stem(one: str, other: str) -> bool:
    if one == other:
        return True
    shorter, longer = sorted((one, other), key=len)
    kept = max(_SHARED_START, len(longer) - _ENDING)
    return len(shorter) >= kept and shorter[:kept] == longer[:kept]
