//! Opening the disks of instances, and looking at those that are open elsewhere.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::Stat;

use super::Store;
use super::dir::{Access, Dir};
use super::instances::no_such_disk;
use super::layout::{DiskPart, disk_file};
use super::lock::{Share, try_lock};
use super::marks::Mark;
use super::names::{DiskName, ObjectName};
use super::placing::Place;
use super::plain::PlainDisk;
use crate::error::{Context, ErrorKind, Result};
use crate::format::{BaseRef, LayerId};
use crate::overlay::{BaseImage, CommitCounts, LayerFiles, Overlay, live_map_name, read_superblock};
use crate::storage::aio::{Transfer, wait_until_landed};
use crate::storage::{DirectFile, FileStorage, Way};

/// How often the lock of a disk is tried: a check takes it for an instant to see whether it is free.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// The same for a disk that the daemon has to take up again, for its guest still runs: 5 seconds.
const ADOPTION_ATTEMPTS: u32 = 2500;

/// A disk, open for service: the only one of its kind as long as it is.
#[derive(Debug)]
pub struct Disk {
    kind: Kind,
    /// Says that the daemon has it open.
    mark: Option<Mark>,
}

/// What this daemon's mount did with a disk before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Nothing, or it was closed.
    Closed,
    /// An earlier process had it open, and those who use it still have.
    Open,
    /// The same, and that process had shared its file with others.
    Shared,
}

/// What a disk is made of.
#[derive(Debug)]
pub(super) enum Kind {
    /// Copy-on-write.
    Overlay(Box<Overlay>),
    /// A file of its own.
    Plain(PlainDisk),
}

macro_rules! both {
    ($disk:expr, $inner:ident => $call:expr) => {
        match &$disk.kind {
            Kind::Overlay($inner) => $call,
            Kind::Plain($inner) => $call,
        }
    };
}

/// What can be told of a disk without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskStatus {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the host's disk that its data take; an overlay's map is not counted.
    pub data_allocated: u64,
    /// Bytes of the host's disk that its map takes; 0 without one.
    pub map_allocated: u64,
    /// When its data last changed.
    pub modified: SystemTime,
    /// When its data were last read, as far as the host keeps track.
    pub accessed: SystemTime,
    /// Whether it is an overlay.
    pub cow: bool,
}

impl Disk {
    /// See [`Overlay::size`].
    pub fn size(&self) -> u64 {
        both!(self, disk => disk.size())
    }

    /// See [`Overlay::read_at`].
    ///
    /// # Errors
    /// The same.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        both!(self, disk => disk.read_at(offset, buf))
    }

    /// See [`Overlay::read_by`].
    ///
    /// # Errors
    /// The same.
    pub fn read_by(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<()> {
        both!(self, disk => disk.read_by(way, offset, buf))
    }

    /// See [`Overlay::read_now`].
    ///
    /// # Errors
    /// The same.
    pub fn read_now(&self, way: Way, offset: u64, buf: &mut [u8]) -> Result<bool> {
        both!(self, disk => disk.read_now(way, offset, buf))
    }

    /// See [`Overlay::writes_to_memory`].
    pub fn writes_to_memory(&self, way: Way, offset: u64, len: u64) -> bool {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.writes_to_memory(way, offset, len),
            Kind::Plain(plain) => plain.writes_to_memory(way, offset, len),
        }
    }

    /// See [`Overlay::place`] and [`PlainDisk::place`].
    pub fn place(&self, transfer: Transfer, offset: u64, len: u64) -> Option<Place> {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.place(transfer, offset, len).map(Place::at),
            Kind::Plain(plain) => plain.place(transfer, offset, len),
        }
    }

    /// See [`Overlay::direct_file`].
    pub fn direct_file(&self) -> Option<DirectFile<'_>> {
        both!(self, disk => disk.direct_file())
    }

    /// See [`Overlay::write_by`].
    ///
    /// # Errors
    /// The same.
    pub fn write_by(&self, way: Way, offset: u64, buf: &[u8]) -> Result<()> {
        both!(self, disk => disk.write_by(way, offset, buf))
    }

    /// See [`Overlay::write_at`].
    ///
    /// # Errors
    /// The same.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        both!(self, disk => disk.write_at(offset, buf))
    }

    /// See [`Overlay::zero`].
    ///
    /// # Errors
    /// The same.
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        both!(self, disk => disk.zero(offset, len))
    }

    /// See [`Overlay::preallocate`].
    ///
    /// # Errors
    /// The same.
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        both!(self, disk => disk.preallocate(offset, len))
    }

    /// See [`Overlay::flush`].
    ///
    /// # Errors
    /// The same.
    pub fn flush(&self) -> Result<()> {
        both!(self, disk => disk.flush()).inspect_err(|_| self.note_latched())
    }

    /// After a failed sync.
    fn note_latched(&self) {
        if let Some(mark) = &self.mark
            && self.is_latched()
        {
            mark.note_latched();
        }
    }

    /// See [`Overlay::grow`].
    ///
    /// # Errors
    /// The same.
    pub fn grow(&self, size: u64) -> Result<()> {
        both!(self, disk => disk.grow(size)).inspect_err(|_| self.note_latched())
    }

    /// See [`Overlay::next_data`].
    ///
    /// # Errors
    /// The same.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        both!(self, disk => disk.next_data(offset))
    }

    /// See [`Overlay::next_hole`].
    ///
    /// # Errors
    /// The same.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        both!(self, disk => disk.next_hole(offset))
    }

    pub(super) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// See [`Overlay::checkpoint_due`]; never for a disk that is no overlay.
    pub fn checkpoint_due(&self) -> bool {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.checkpoint_due(),
            Kind::Plain(_) => false,
        }
    }

    /// See [`Overlay::checkpoint`]; a flush for a disk that is no overlay.
    ///
    /// # Errors
    /// Those of [`Overlay::flush`].
    pub fn checkpoint(&self) -> Result<()> {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.checkpoint(),
            Kind::Plain(plain) => plain.flush(),
        }
        .inspect_err(|_| self.note_latched())
    }

    /// See [`Overlay::is_latched`].
    pub fn is_latched(&self) -> bool {
        both!(self, disk => disk.is_latched())
    }

    /// See [`Overlay::commit_counts`]; a disk that is no overlay commits nothing.
    pub fn commit_counts(&self) -> CommitCounts {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.commit_counts(),
            Kind::Plain(_) => CommitCounts::default(),
        }
    }

    /// See [`Overlay::uncommitted_runs`]; 0 for a disk that is no overlay.
    pub fn uncommitted_runs(&self) -> usize {
        match &self.kind {
            Kind::Overlay(overlay) => overlay.uncommitted_runs(),
            Kind::Plain(_) => 0,
        }
    }

    /// See [`Overlay::close`].
    ///
    /// # Errors
    /// Those of [`Overlay::flush`].
    pub fn close(self) -> Result<()> {
        let Self { kind, mark } = self;
        let closed = match kind {
            Kind::Overlay(overlay) => overlay.close(),
            Kind::Plain(plain) => plain.flush(),
        };
        if let Some(mark) = mark {
            mark.remove();
        }
        closed
    }
}

impl From<PlainDisk> for Disk {
    fn from(disk: PlainDisk) -> Self {
        Self { kind: Kind::Plain(disk), mark: None }
    }
}

impl Store {
    /// Opens a disk for service. Nobody else can as long as it is open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such disk; [`ErrorKind::Busy`] if it is open already;
    /// [`ErrorKind::Corrupt`] if its map is damaged or its base is not what it was made over.
    pub fn open_disk(&self, instance: &ObjectName, disk: DiskName) -> Result<Disk> {
        self.open_disk_in(&self.instance_dir(instance)?, instance, disk, Before::Closed)
    }

    /// [`Store::open_disk`] of the very instance `id`, not of a later one under its name.
    ///
    /// # Errors
    /// Those of [`Store::open_disk`]; [`ErrorKind::NotFound`] if another instance has the name now.
    pub fn open_disk_of(&self, instance: &ObjectName, id: LayerId, disk: DiskName) -> Result<Disk> {
        self.open_disk_in(&self.instance_dir_of(instance, id)?, instance, disk, Before::Closed)
    }

    /// Opens a disk that an earlier process of this daemon had open, for those who have it open still: with all that was
    /// answered, whatever [`Store::accepting_loss`] says, or not at all. `is_shared` says that that process had shared its
    /// file ([`Disk::share`]) with others that still have it, and may still hold its lock with it.
    ///
    /// # Errors
    /// Those of [`Store::open_disk_of`]; [`ErrorKind::Io`] if a sync of it had failed, or what was answered is not there.
    pub fn take_up_disk_of(
        &self,
        instance: &ObjectName,
        id: LayerId,
        disk: DiskName,
        is_shared: bool,
    ) -> Result<Disk> {
        let before = if is_shared { Before::Shared } else { Before::Open };
        self.open_disk_in(&self.instance_dir_of(instance, id)?, instance, disk, before)
    }

    fn open_disk_in(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
        before: Before,
    ) -> Result<Disk> {
        let is_kept = before != Before::Closed;
        let is_plain = folder.has(disk_file(disk, DiskPart::Raw))?;
        let part = if is_plain { DiskPart::Raw } else { DiskPart::Map };
        let file = self.lock_disk(folder, instance, disk, part, before)?;
        let mark = if is_kept { Some(self.kept_mark(instance, disk)?) } else { self.mark(instance, disk)? };
        let opened = if is_plain {
            self.open_plain(folder, instance, disk, file, is_kept)
        } else {
            self.open_overlay(folder, instance, disk, file, is_kept)
        };
        match opened {
            Ok(kind) => {
                let disk = Disk { kind, mark };
                if before == Before::Shared {
                    disk.share();
                }
                Ok(disk)
            }
            Err(error) => {
                // Of a disk that was open already the mark stays: whoever has it open still does.
                if let Some(mark) = mark.filter(|_| !is_kept) {
                    mark.remove();
                }
                Err(error)
            }
        }
    }

    fn open_plain(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
        file: File,
        is_kept: bool,
    ) -> Result<Kind> {
        let name = format!("{instance}/{disk}");
        let storage = folder.storage(file, &name);
        let storage = Box::new(storage.with_direct(folder.open_direct(disk_file(disk, DiskPart::Raw))));
        let open = if is_kept { PlainDisk::adopt } else { PlainDisk::open };
        Ok(Kind::Plain(open(&name, storage)?.within(Arc::clone(self.room()?))))
    }

    fn open_overlay(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
        map: File,
        is_kept: bool,
    ) -> Result<Kind> {
        let name = format!("{instance}/{disk}");
        let map = folder.storage(map, format!("map of {name}"));
        let superblock = read_superblock(&map).context(|| format!("open disk {name}"))?;
        let data = folder.open_file(disk_file(disk, DiskPart::Data), Access::ReadWrite)?;
        let base = match superblock.base {
            BaseRef::Blank => BaseImage::blank(),
            BaseRef::Image { id, .. } => {
                let file = self.open_base(&id).context(|| format!("open disk {name}"))?;
                BaseImage::image(id, Box::new(FileStorage::new(file, format!("base {id}"))))?
            }
        };
        let live_map = self.run_dir()?.join(live_map_name(superblock.layer));
        let data = folder.storage(data, format!("data of {name}"));
        let data = Box::new(data.with_direct(folder.open_direct(disk_file(disk, DiskPart::Data))));
        let files = LayerFiles { data, map: Box::new(map) };
        let open = match (is_kept, self.accept_loss) {
            (true, _) => Overlay::adopt,
            (false, true) => Overlay::open_accepting_loss,
            (false, false) => Overlay::open,
        };
        let overlay = open(&name, files, base, &live_map)?.within(Arc::clone(self.room()?));
        Ok(Kind::Overlay(Box::new(overlay)))
    }

    /// The files of an overlay, to be mended; its lock is held as long as they are open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such disk; [`ErrorKind::Busy`] if it is open.
    pub(super) fn layer_for_repair(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
    ) -> Result<LayerFiles> {
        let map = self.lock_disk(folder, instance, disk, DiskPart::Map, Before::Closed)?;
        let data = folder.open_file(disk_file(disk, DiskPart::Data), Access::ReadWrite)?;
        Ok(LayerFiles {
            data: Box::new(folder.storage(data, format!("data of {instance}/{disk}"))),
            map: Box::new(folder.storage(map, format!("map of {instance}/{disk}"))),
        })
    }

    /// Opens the file that carries a disk's lock, and takes it. Nothing of who had it before is under way then.
    fn lock_disk(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
        part: DiskPart,
        before: Before,
    ) -> Result<File> {
        let file = folder.open_file(disk_file(disk, part), Access::ReadWrite).map_err(|error| match error
            .kind()
        {
            ErrorKind::NotFound => no_such_disk(instance, disk),
            _ => error,
        })?;
        let is_kept = self.in_service && self.is_marked(instance, disk)?;
        let most = if is_kept { ADOPTION_ATTEMPTS } else { LOCK_ATTEMPTS };
        let mut attempts = 1;
        while !try_lock(&file, Share::Exclusive).context(|| format!("lock {instance}/{disk}"))? {
            // With whom it was shared the lock is ours until they are told to let go of it.
            if before == Before::Shared {
                break;
            }
            if attempts == most {
                return Err(self.busy_disk(instance, disk));
            }
            attempts += 1;
            std::thread::sleep(LOCK_PAUSE);
        }
        // The instance may have been removed between opening and locking; its remover held the lock until it was.
        let stat = rustix::fs::fstat(&file).context(|| format!("look up {instance}/{disk}"))?;
        if stat.st_nlink == 0 {
            return Err(no_such_disk(instance, disk));
        }
        if self.is_kept_by_daemon(instance, disk)? {
            return Err(self.busy_disk(instance, disk));
        }
        let landed = match part {
            DiskPart::Map => match folder.open_file(disk_file(disk, DiskPart::Data), Access::ReadWrite) {
                Ok(data) => wait_until_landed(&data),
                // Whoever needs it says so.
                Err(_) => Ok(()),
            },
            _ => wait_until_landed(&file),
        };
        landed.context(|| format!("wait for writes to {instance}/{disk} of a process that has died"))?;
        Ok(file)
    }

    /// Opens the map of an overlay to read it here and now, and tells what its file is.
    pub(super) fn open_map(
        &self,
        folder: &Dir,
        instance: &ObjectName,
        disk: DiskName,
    ) -> Result<(FileStorage, Stat)> {
        match folder.open_to_look(disk_file(disk, DiskPart::Map)) {
            Ok((file, stat)) => Ok((FileStorage::new(file, format!("map of {instance}/{disk}")), stat)),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(no_such_disk(instance, disk)),
            Err(error) => Err(error),
        }
    }

    /// Removes the live maps of layers that are gone. They only take memory, so a failure is only noted.
    pub(super) fn remove_live_maps(&self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        match self.run_dir_in_use() {
            Ok(None) => {}
            Ok(Some(dir)) => {
                for name in names {
                    let path = dir.join(name);
                    match std::fs::remove_file(&path) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            log::warn!("remove live map {}: {error}", path.display());
                        }
                        _ => {}
                    }
                }
            }
            Err(error) => log::warn!("cannot remove live maps: {error}"),
        }
    }
}
