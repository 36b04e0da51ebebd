"""cowdisk: a store, its mount, and an instance per disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from ..host import files_below, processes_with, run, timed
from . import Disk, Peer, Place


class Store:
    """A store of its own in `folder`, and the command line on it."""

    def __init__(self, program: Path, folder: Path, run_dir: Path, options: str):
        self.program, self.folder, self.run_dir, self.options = program, folder, run_dir, options
        self.mountpoint = folder.with_name(f"{folder.name}-mnt")
        self.env = {**os.environ, "COWDISK_STORE": str(folder), "COWDISK_RUN_DIR": str(run_dir)}
        self.do("init")

    def do(self, *words: object) -> str:
        return run(self.program, *words, env=self.env)

    def timed(self, *words: object) -> float:
        return timed(self.program, *words, env=self.env)

    def mount(self) -> float:
        """Milliseconds until the disks can be read."""
        options = ["-o", self.options] if self.options else []
        return self.timed("mount", self.mountpoint, *options)

    def umount(self) -> float:
        """Milliseconds until the daemon has ended."""
        return self.timed("umount", self.mountpoint)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        self.mount()
        try:
            yield
        finally:
            if self.mountpoint.is_mount():
                self.umount()

    def pids(self) -> tuple[int, ...]:
        """The daemon, and whatever it has started."""
        return processes_with("COWDISK_RUN_DIR", str(self.run_dir))

    def disk_path(self, instance: str, disk: str = "disk") -> Path:
        return self.mountpoint / "instances" / instance / disk

    def files(self, instance: str) -> tuple[Path, ...]:
        return files_below(self.folder / "bases", self.folder / "instances" / instance)


class StoreMaker:
    """Makes stores, each with an empty mountpoint beside it, of one program and one set of mount options."""

    def __init__(self, program: Path, run_dirs: Path, options: str):
        self.program, self.run_dirs, self.options = program, run_dirs, options

    def make(self, folder: Path) -> Store:
        run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=self.run_dirs))
        store = Store(self.program, folder, run_dir, self.options)
        store.mountpoint.mkdir()
        return store

    @property
    def can_pass(self) -> bool:
        """Whether the kernel can serve plain files in its stores: by one transport alone, which is the default."""
        return "transport=" not in self.options or "transport=dev_fuse" in self.options

    def with_option(self, option: str) -> StoreMaker:
        """The same with one more mount option."""
        return StoreMaker(self.program, self.run_dirs, ",".join(filter(None, (self.options, option))))


class Cowdisk(Peer):
    """The root disk: copy-on-write over the base."""

    def __init__(self, name: str, place: Place, maker: StoreMaker, stack: ExitStack):
        self.name, self.place, self.numbers = name, place, count()
        self.store = maker.make(place.folder / f"{name.replace(' ', '-')}-store")
        self.prepare()
        stack.enter_context(self.store.mounted())

    def prepare(self) -> None:
        self.store.do("image", "import", "base", self.place.base, "--format", "raw")

    def create(self, name: str) -> Path:
        self.store.do("instance", "create", name, "--image", "base")
        return self.store.disk_path(name)

    @contextmanager
    def disk(self) -> Iterator[Disk]:
        name = f"disk-{next(self.numbers)}"
        path = self.create(name)
        try:
            yield Disk(path, self.store.files(name), self.store.pids())
        finally:
            self.store.do("instance", "remove", name)


class CowdiskLocal(Cowdisk):
    """The local disk: over nothing, one file of the host."""

    layered = False

    def prepare(self) -> None:
        tiny = self.place.folder / "tiny.raw"
        tiny.write_bytes(bytes(1 << 20))
        self.store.do("image", "import", "tiny", tiny, "--format", "raw")
        tiny.unlink()
        self.store.do("flavor", "add", "local", "--local-size", self.place.size, "--fs", "none")

    def create(self, name: str) -> Path:
        self.store.do("instance", "create", name, "--image", "tiny", "--flavor", "local")
        return self.store.disk_path(name, "disk.local")


class CowdiskPassed(CowdiskLocal):
    """The same, served by the kernel."""

    def __init__(self, name: str, place: Place, maker: StoreMaker, stack: ExitStack):
        super().__init__(name, place, maker.with_option("passthrough=auto"), stack)
