"""The host: running programs and ending them, the CPU and the memory they take, and what the page cache holds."""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")

Env = dict[str, str] | None


class BenchError(Exception):
    """What went wrong, in words for the one who runs the bench."""


def run(*command: object, env: Env = None) -> str:
    """Runs a program to its end and returns its standard output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def timed(*command: object, env: Env = None) -> float:
    """Milliseconds that a program takes from start to end."""
    before = time.perf_counter()
    run(*command, env=env)
    return (time.perf_counter() - before) * 1000


@contextmanager
def program(*command: object, ready: Callable[[], bool], env: Env = None, log: Path) -> Iterator[int]:
    """A program in the background, from the moment it is `ready`; ended by its pid. Ctrl-C does not reach it."""
    words = [str(word) for word in command]
    with open(log, "wb") as said:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 20
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{words[0]} does not serve: {log.read_text(errors='replace').strip()[-500:]}")
            time.sleep(0.002)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def exported(path: Path) -> Iterator[Path]:
    """A file on which a program mounts its export; both are gone afterwards, also if the program has crashed."""
    path.touch()
    try:
        yield path
    finally:
        if any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines()):
            run("fusermount3", "-u", "-z", path)
        path.unlink()


@contextmanager
def loop_mount(kind: str, image: Path, folder: Path, size: int) -> Iterator[Path]:
    """A new file system of a kind, `size` bytes long, in a loop device that goes past the cache of the file below."""
    mkfs = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}[kind]
    run("truncate", "-s", size, image)
    run(*mkfs, image)
    folder.mkdir()
    device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
    try:
        run("mount", device, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
    finally:
        run("losetup", "--detach", device)
        image.unlink()


def random_bytes(seed: int) -> bytes:
    """1 MiB that no file system can make smaller by itself."""
    return random.Random(seed).randbytes(PIECE)


def make_image(path: Path, size: int, data_bytes: int, seed: int) -> None:
    """An image of `size` bytes, of which `data_bytes` in pieces of up to 16 MiB over its length are data."""
    content = random_bytes(seed)
    pieces = max(1, data_bytes // (16 << 20))
    with open(path, "wb") as image:
        for n in range(pieces):
            image.seek(n * (size // pieces) // PIECE * PIECE)
            for _ in range(data_bytes // pieces // PIECE):
                image.write(content)
        image.truncate(size)
        os.fsync(image.fileno())


def files_below(*folders: Path) -> tuple[Path, ...]:
    return tuple(path for folder in folders for path in folder.rglob("*") if path.is_file())


def evict(files: Iterable[Path]) -> None:
    """Has the page cache forget these files; those of others stay."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of these files in the host's page cache."""
    paths = list(files)
    said = run("fincore", "--bytes", "--noheadings", "--output", "RES", *paths) if paths else ""
    return sum(int(word) for word in said.split())


def warm(files: Iterable[Path]) -> None:
    """Has the page cache hold these files."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU that these processes have taken, in user and in kernel mode; ticks of 10 ms."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes; of what they share with others, their part."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def processes_with(variable: str, value: str) -> tuple[int, ...]:
    """Processes that have this environment variable: a daemon and all that it has started."""
    mark = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environ = (folder / "environ").read_bytes()
            except OSError:
                continue
            if mark in environ.split(b"\0"):
                found.append(int(folder.name))
    return tuple(found)


def raise_open_files_limit() -> None:
    """For 1,000 open disks; the programs that are started inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
