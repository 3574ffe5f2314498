"""How threads share a batch: each takes the next few images when it is free, so that none waits for a busy one."""

from math import ceil


def cut(count: int, threads: int, least: int, largest: int) -> list[slice]:
    """Slices of `count` images, equally many for each thread, of at most `largest`.

    One slice, for all threads together, where each would have fewer than `least`: cutting costs more than waiting then.
    """
    if threads == 1 or count < threads * least:
        return [slice(0, count)]
    size = ceil(count / (threads * ceil(count / (threads * largest))))
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
