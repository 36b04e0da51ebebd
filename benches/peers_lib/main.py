"""The command line: what is asked for, and where what came out is written."""

import argparse
import os
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from . import plot, readme, report
from .bench import Bench, Choice, say
from .host import BenchError, raise_open_files_limit, run
from .machine import REPOSITORY, describe, make_ready
from .peers.cowdisk import StoreMaker
from .work import data_path, huge, in_qemu, lives, storm

GROUPS = (*data_path.GROUPS, *in_qemu.GROUPS, *lives.GROUPS, *storm.GROUPS, *huge.GROUPS)

ABOUT = """\
Measures cowdisk beside its peers in one run: the plain host file, qemu-storage-daemon's FUSE export of a qcow2 overlay,
qcow2 inside QEMU, nbdkit's filter cow behind nbdfuse, reflink copies on XFS and btrfs in loop devices. In each round
every peer does the same work once, in turn. Written to --out: report.md, samples.csv, report.json, pictures (SVG).

Must run as root, on a machine with 8 GiB of memory (half of it for files in tmpfs) and 16 GiB of free space in --dir.
What is missing is installed by scripts/install-deps. Ctrl-C unmounts and ends what was started, and writes what there
is. Takes under 30 minutes on 2 cores that have nothing else to do."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    groups = "\n".join(f"  {name:9} {about}" for name, about, _ in GROUPS)
    parser = argparse.ArgumentParser(
        "benches/peers",
        description=ABOUT,
        epilog=f"groups:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under 5 minutes: the main rows and peers, shorter")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GROUP/PEER/WORK",
        help="a group, what a peer begins with, what a row contains; parts may be empty; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--transport", action="append", default=[], metavar="NAME",
        help="mount cowdisk with -o transport=NAME; repeatable, each is a peer of its own (default: cowdisk's default)",
    )  # fmt: skip
    parser.add_argument("--mount-options", default="", metavar="OPT,…", help="more options of cowdisk's mounts")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each peer at each row (default: 3)")
    parser.add_argument("--seconds", type=float, help="of load per measurement (default: 0.5, with --quick 0.4)")
    parser.add_argument("--seed", type=int, default=1, help="of contents and of random places (default: 1)")
    parser.add_argument("--dir", type=Path, default=REPOSITORY / "target", help="where disks lie (default: target)")
    parser.add_argument("--memory-dir", type=Path, default=Path("/dev/shm"), help="a tmpfs (default: /dev/shm)")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "target/peers", help="where the report goes (default: target/peers)"
    )
    parser.add_argument("--cowdisk", type=Path, help="the program (default: target/release/cowdisk, built if missing)")
    parser.add_argument("--readme", action="store_true", help="put the table of targets into README.md")
    parser.add_argument("--list", action="store_true", help="say which groups there are, and measure nothing")
    options = parser.parse_args(arguments)
    known = [name for name, _, _ in GROUPS]
    for choice in options.only:
        if choice.split("/")[0] not in ("", *known):
            parser.error(f"--only {choice}: no group of that name; there are: {', '.join(known)}")
    if options.rounds < 1 or (options.seconds is not None and options.seconds < 0.1):
        parser.error("--rounds must be at least 1, --seconds at least 0.1")
    return options


def find_program(options: argparse.Namespace) -> Path:
    if options.cowdisk is not None:
        return Path(options.cowdisk).resolve(strict=True)
    program = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "release/cowdisk"
    if not program.exists():
        say("building cowdisk")
        run("cargo", "build", "--quiet", "--release", "--locked", "--manifest-path", REPOSITORY / "Cargo.toml")
    return program.resolve()


def mounts_of(options: argparse.Namespace, program: Path, run_dirs: Path) -> dict[str, StoreMaker]:
    """By peer: cowdisk as it is, or one per transport."""
    more = [options.mount_options] if options.mount_options else []
    if not options.transport:
        return {"cowdisk": StoreMaker(program, run_dirs, ",".join(more))}
    if "transport=" not in run(program, "mount", "--help"):
        raise BenchError(f"{program} knows no transports: leave --transport out")
    return {
        f"cowdisk {name}": StoreMaker(program, run_dirs, ",".join([f"transport={name}", *more]))
        for name in options.transport
    }


def command_of(options: argparse.Namespace) -> str:
    """The command for the same run elsewhere: without where things lie on this machine."""
    words = ["benches/peers"]
    if options.quick:
        words.append("--quick")
    repeated = [("--only", value) for value in options.only] + [("--transport", value) for value in options.transport]
    single = [("--mount-options", options.mount_options), ("--seconds", options.seconds), ("--rounds", options.rounds)]
    for name, value in [*repeated, *single, ("--seed", options.seed)]:
        if value:
            words += [name, str(value)]
    return shlex.join(words)


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, with whatever a peer has left in it."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="peers-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(options: argparse.Namespace, bench: Bench, facts: report.Facts) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    groups = {name: about for name, about, _ in GROUPS}
    (options.out / "report.md").write_text(report.markdown(bench.rows, groups, facts), encoding="utf-8")
    (options.out / "report.json").write_text(report.as_json(bench.rows, facts), encoding="utf-8")
    report.write_csv(options.out / "samples.csv", bench.rows)
    for group, about in groups.items():
        rows = [row for row in bench.rows if row.group == group and row.baseline]
        if rows:
            baseline = rows[0].baseline
            (options.out / f"{group}.svg").write_text(
                plot.svg(f"{group}: {about} (× {baseline})", rows), encoding="utf-8"
            )
    say(f"written to {options.out}")


def measure(options: argparse.Namespace) -> int:
    make_ready()
    program = find_program(options)
    raise_open_files_limit()
    started = time.monotonic()
    with ExitStack() as stack:
        disk_folder = stack.enter_context(working_folder(options.dir))
        memory_folder = stack.enter_context(working_folder(options.memory_dir))
        bench = Bench(
            disk_folder,
            memory_folder,
            mounts_of(options, program, memory_folder),
            options.quick,
            options.rounds,
            options.seconds or (0.4 if options.quick else 0.5),
            options.seed,
            tuple(Choice.parse(text) for text in options.only),
        )
        facts = {"command": command_of(options), **describe(program, disk_folder)}
        interrupted = False
        try:
            for name, about, measure_group in GROUPS:
                if bench.wants(name):
                    say(f"{name}: {about}")
                    measure_group(bench)
        except KeyboardInterrupt:
            interrupted = True
            say("interrupted")
        facts["took"] = f"{time.monotonic() - started:.0f} s"
        facts["load after"] = f"{os.getloadavg()[0]:.1f}"
        write(options, bench, facts)
        if options.readme and not interrupted:
            readme.update(REPOSITORY, options.out, bench.rows, facts)
    return 130 if interrupted else 0


def interrupt(*_: object) -> NoReturn:
    """Ends the run once; nothing interrupts the unmounting that follows."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 failed, 2 wrong use, 130 interrupted."""
    options = parse(arguments)
    if options.list:
        print("\n".join(name for name, _, _ in GROUPS))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        return measure(options)
    except KeyboardInterrupt:
        return 130
    except (BenchError, OSError) as error:
        say(str(error))
        return 1
