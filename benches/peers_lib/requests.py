"""Load by this program itself: filling, punching, and many readers at once."""

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .host import PIECE, BenchError, random_bytes

KEEP_SIZE_AND_PUNCH_HOLE = 3
LIBC = ctypes.CDLL(None, use_errno=True)


def fill(path: Path, size: int, seed: int) -> None:
    """Writes the first `size` bytes of a file, durably."""
    content = random_bytes(seed)
    fd = os.open(path, os.O_WRONLY)
    try:
        for at in range(0, size, PIECE):
            os.pwrite(fd, content[: size - at], at)
        os.fsync(fd)
    finally:
        os.close(fd)


def punch(path: Path, end: int, *, length: int, seconds: float, seed: int) -> float:
    """Discards per second of `length` bytes each, in random order, no place twice; with a sync at the end."""
    places = list(range(0, end, length))
    random.Random(seed).shuffle(places)
    fd = os.open(path, os.O_RDWR)
    try:
        count, before = 0, time.perf_counter()
        while count < len(places) and time.perf_counter() - before < seconds:
            if LIBC.fallocate(fd, KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_long(places[count]), ctypes.c_long(length)):
                raise BenchError(f"punch a hole into {path}: {os.strerror(ctypes.get_errno())}")
            count += 1
        os.fsync(fd)
        return count / (time.perf_counter() - before)
    finally:
        os.close(fd)


def read_all(path: Path, direct: bool) -> None:
    """Reads a file from start to end in requests of 1 MiB."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, PIECE) as buffer:
            at = 0
            while (count := os.preadv(fd, [buffer], at)) > 0:
                at += count
    finally:
        os.close(fd)


def at_once(jobs: list[Callable[[], None]]) -> float:
    """Seconds until all of the jobs are done, each in a thread of its own."""
    failures: list[Exception] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as failure:  # Passed on below: a thread has nobody to raise it to.
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    before = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - before
