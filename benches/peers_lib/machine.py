"""What a run was made on, and whether the machine has what a run needs."""

import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path

from .host import BenchError, run

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = (
    "fio", "qemu-img", "qemu-io", "qemu-storage-daemon", "nbdkit", "nbdfuse", "mkfs.xfs", "mkfs.btrfs", "losetup",
    "fincore", "fusermount3",
)  # fmt: skip


def make_ready() -> None:
    """Installs what is missing.

    Raises BenchError if this is not possible.
    """
    if os.geteuid() != 0:
        raise BenchError("must run as root, for loop devices and mounts: sudo benches/peers")
    if any(shutil.which(tool) is None for tool in TOOLS):
        run(REPOSITORY / "scripts/install-deps", "bench")


def describe(cowdisk: Path, folder: Path) -> dict[str, str]:
    """The machine and the programs, in words."""
    host_fs = run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", folder).split()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} × {cpu_model()}, {memory_gib()} GiB",
        "kernel": platform.release(),
        "host file system": host_fs[-1] if host_fs else "unknown",
        "cowdisk": run(cowdisk, "--version").strip(),
        "qemu": run("qemu-img", "--version").splitlines()[0],
        "fio": run("fio", "--version").strip(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30))
