"""Lists of seeds, kept as ranges so that millions of seeds take little memory."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

MOST_SEED = 2**63 - 1
MOST_PER_RANGE = 1_000_000


class Seeds:
    """A list of seeds, in order, stored as ranges of consecutive numbers."""

    def __init__(self, ranges: Iterable[range]):
        self.ranges: list[range] = []
        self.count = 0
        for part in ranges:
            self.count += len(part)
            if self.ranges and self.ranges[-1].stop == part.start:
                self.ranges[-1] = range(self.ranges[-1].start, part.stop)
            else:
                self.ranges.append(part)

    @property
    def first(self) -> int:
        return self.ranges[0].start

    def __iter__(self) -> Iterator[int]:
        return (seed for part in self.ranges for seed in part)


def consecutive(first: int, count: int) -> Seeds:
    """Returns `count` consecutive seeds beginning with `first`. Raises ValueError if the last one
    would be above the largest seed, 2^63 - 1."""
    if first + count - 1 > MOST_SEED:
        raise ValueError(f"seeds go up to 2^63 - 1, not to {first + count - 1}")
    return Seeds([range(first, first + count)])


def parse(text: str) -> Seeds:
    """Parses a list of numbers and ranges: "0-9,12" becomes the seeds 0, ..., 9, 12. Raises
    ValueError for other text, for seeds above 2^63 - 1, and for a range of more than a million
    seeds."""
    return Seeds(_part(part, text) for part in text.split(","))


def _part(part: str, text: str) -> range:
    match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
    if match is None:
        shown = text if len(text) <= 60 else part[:60]
        raise ValueError(f"--seeds takes numbers and ranges such as 0-9,12, not {shown!r}")
    largest = max(
        (digits.lstrip("0") for digits in match.groups("")), key=lambda digits: (len(digits), digits)
    )
    if len(largest) > 19 or int(largest or 0) > MOST_SEED:
        raise ValueError(f"seeds go up to 2^63 - 1, not to {largest[:40]}")
    first = int(match[1])
    last = int(match[2] or match[1])
    if last < first or last - first >= MOST_PER_RANGE:
        raise ValueError(f"--seeds: {part.strip()} is not a range of at most a million seeds, lowest first")
    return range(first, last + 1)


class Taken:
    """A set of whole numbers, stored as sorted ranges that do not touch."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    def take(self, wanted: range) -> list[range]:
        """Adds the numbers `wanted` to the set. Returns those of them that were not in the set
        before, as ranges in order."""
        # The ranges number `low` to `high` - 1 overlap or touch `wanted`.
        low = bisect_right(self.stops, wanted.start - 1)
        high = bisect_right(self.starts, wanted.stop)
        free = []
        begin = wanted.start
        for start, stop in zip(self.starts[low:high], self.stops[low:high]):
            if begin < min(start, wanted.stop):
                free.append(range(begin, min(start, wanted.stop)))
            begin = max(begin, stop)
        if begin < wanted.stop:
            free.append(range(begin, wanted.stop))
        begin = wanted.start
        end = wanted.stop
        if low < high:
            begin = min(begin, self.starts[low])
            end = max(end, self.stops[high - 1])
        self.starts[low:high] = [begin]
        self.stops[low:high] = [end]
        return free
