"""What is kept of what was made: the latest that was asked for, within a number of bytes."""

from fusionkit.codecs.kept import Kept


def test_what_was_longest_not_asked_for_goes_first() -> None:
    kept, made = Kept[bytes](10, len), []

    def ask(key: str, size: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return key.encode() * size

        return kept.get(key, make)

    for key in "abac":
        assert ask(key, 4) == key.encode() * 4
    assert made == ["a", "b", "c"]
    assert ask("a", 4) == b"aaaa"
    assert made == ["a", "b", "c"], "asked for again, and so kept when c came"
    ask("b", 4)
    assert made == ["a", "b", "c", "b"]


def test_what_is_too_large_is_made_each_time() -> None:
    kept = Kept[bytes](10, len)
    for size in (11, 12):
        assert len(kept.get("a", lambda size=size: bytes(size))) == size
    assert kept.get("a", lambda: b"small") == b"small"
    assert kept.get("a", lambda: b"other") == b"small"
