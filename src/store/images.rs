//! Images: names for bases, with the kernel and ramdisk that go with them. Import, list, verify, remove.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::atomic::Removal;
use super::bases::BaseDraft;
use super::boot::BootFileDraft;
use super::foreign::SourceFormat;
use super::names::ObjectName;
use super::progress::{Progress, Work};
use super::record::{self, BootFileId, RECORD_BYTES_MAX};
use super::references::{Except, User, list_names};
use super::source::{Accept, Source};
use super::timestamp::Timestamp;
use super::{Store, convert, copy, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::BaseId;
use crate::storage::Storage;
use crate::units::{HumanBytes, SECTOR_BYTES, check_disk_bytes};

/// An image of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: ObjectName,
    /// Its content.
    pub base: BaseId,
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// The kernel that it is booted with, if it brings one.
    pub kernel: Option<BootFileId>,
    /// The ramdisk that it is booted with, if it brings one.
    pub ramdisk: Option<BootFileId>,
    /// The format that it was imported from.
    pub format: SourceFormat,
    /// The file name that it was imported from.
    pub source_name: String,
    /// When it was imported.
    pub created: Timestamp,
}

/// What to import.
#[derive(Clone, Debug, Default)]
pub struct ImportRequest {
    /// The image file, or a block device.
    pub source: PathBuf,
    /// Its format; `None`: what its first bytes say, raw if they say nothing.
    pub format: Option<SourceFormat>,
    /// A kernel for it.
    pub kernel: Option<PathBuf>,
    /// A ramdisk for it.
    pub ramdisk: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageRecord {
    #[serde(with = "record::as_text")]
    base: BaseId,
    size: u64,
    kernel: Option<BootFileId>,
    ramdisk: Option<BootFileId>,
    #[serde(with = "record::as_text")]
    format: SourceFormat,
    source_name: String,
    created: Timestamp,
}

impl Image {
    fn from_record(name: ObjectName, record: ImageRecord) -> Result<Self> {
        check_disk_bytes(record.size).context(|| format!("image {name}: record"))?;
        let ImageRecord { base, size, kernel, ramdisk, format, source_name, created } = record;
        Ok(Self { name, base, size, kernel, ramdisk, format, source_name, created })
    }

    fn to_record(&self) -> ImageRecord {
        let Self { base, size, kernel, ramdisk, format, created, .. } = *self;
        ImageRecord { base, size, kernel, ramdisk, format, source_name: self.source_name.clone(), created }
    }
}

impl Store {
    /// Imports an image. The same content under two names is stored once. Reading, hashing and writing overlap; holes
    /// and zeroes of the source take no space. An image of another format than raw is converted by `qemu-img`, once it
    /// is found to name nothing outside itself. After an error, or when cancelled, nothing is left.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken; [`ErrorKind::Invalid`] if the source is no file that can be imported
    /// or changes while it is read; [`ErrorKind::NoSpace`]; [`ErrorKind::Interrupted`].
    pub fn import_image(
        &self,
        name: &ObjectName,
        request: &ImportRequest,
        progress: &dyn Progress,
    ) -> Result<Image> {
        self.import(name, request, progress).context(|| format!("import image {name}")).map_err(
            |error| match (error.kind(), self.space()) {
                (ErrorKind::NoSpace, Ok(now)) if error.hint().is_none() => error.with_hint(format!(
                    "the filesystem of {} has {} free for it now that the import is undone: cowdisk df",
                    self.path.display(),
                    HumanBytes(now.left())
                )),
                _ => error,
            },
        )
    }

    fn import(&self, name: &ObjectName, request: &ImportRequest, progress: &dyn Progress) -> Result<Image> {
        self.check_image_absent(name)?;
        let source = Source::open(&request.source, Accept::RegularFileOrBlockDevice)?;
        let format = source.format(request.format)?;
        let kernel =
            request.kernel.as_deref().map(|path| self.draft_boot_file(path, progress)).transpose()?;
        let ramdisk =
            request.ramdisk.as_deref().map(|path| self.draft_boot_file(path, progress)).transpose()?;

        let draft = BaseDraft::new(&self.tmp)?;
        let (base, size) = self.read_source(&source, format, &draft, progress)?;
        source.check_unchanged()?;
        draft.seal()?;
        let image = Image {
            name: name.clone(),
            base,
            size,
            kernel: kernel.as_ref().map(|draft| draft.id),
            ramdisk: ramdisk.as_ref().map(|draft| draft.id),
            format,
            source_name: source.file_name(),
            created: Timestamp::now(),
        };
        self.publish_image(&image, draft, [kernel, ramdisk])?;
        Ok(image)
    }

    /// Fills the draft from the source; returns the content's identity and the bytes of the disk.
    fn read_source(
        &self,
        source: &Source,
        format: SourceFormat,
        draft: &BaseDraft<'_>,
        progress: &dyn Progress,
    ) -> Result<(BaseId, u64)> {
        if format != SourceFormat::Raw {
            let size = convert::convert(source, format, draft, self.room()?, progress)?;
            let work = Work::begin(progress, "hash", Some(size));
            let hash = copy::hash_and_punch(draft.file(), size, &work)?;
            return Ok((BaseId(hash), size));
        }
        let size = source.len().next_multiple_of(SECTOR_BYTES);
        if !source.is_device() && draft.file().clone_contents(source.file()) {
            let work = Work::begin(progress, "hash", Some(size));
            draft.file().set_len(size)?;
            let hash = copy::hash_and_punch(draft.file(), size, &work);
            return Ok((BaseId(hash.context(|| source.shown())?), size));
        }
        if let Some(bytes) = source.allocated() {
            self.check_room("the copy", bytes).map_err(|error| {
                error.with_hint(
                    "if the file holds many zeroes, make holes of them: fallocate --dig-holes FILE",
                )
            })?;
        }
        let work = Work::begin(progress, "copy", Some(size));
        let hash = copy::copy_and_hash(source.file(), source.len(), draft.file(), size, self.room()?, &work);
        Ok((BaseId(hash.context(|| source.shown())?), size))
    }

    /// Gives an image and all that it refers to their places.
    fn publish_image(
        &self,
        image: &Image,
        base: BaseDraft<'_>,
        boot_files: [Option<BootFileDraft<'_>>; 2],
    ) -> Result<()> {
        let lock = self.lock()?;
        self.check_image_absent(&image.name)?;
        self.in_steps(&lock, || {
            let record = record::draft(&self.tmp, "image", &image.to_record())?.make_sign()?;
            // Of an earlier image of that name, should a crash have left it.
            self.forget_attributes(&layout::image_attributes_file(&image.name))?;
            self.publish_base(base, &image.base, &lock)?;
            for boot_file in boot_files.into_iter().flatten() {
                self.publish_boot_file(boot_file, &lock)?;
            }
            record.commit(&self.images, &layout::record_file(&image.name))
        })
    }

    fn check_image_absent(&self, name: &ObjectName) -> Result<()> {
        if self.images.has(&layout::record_file(name))? {
            return Err(Error::new(ErrorKind::Exists, format!("image {name}: exists already")));
        }
        Ok(())
    }

    /// The names of all images, in order, whether their records can be read or not.
    ///
    /// # Errors
    /// Those of the host.
    pub fn image_names(&self) -> Result<Vec<ObjectName>> {
        Ok(self.images.names()?.iter().filter_map(|file| layout::name_of_record(file)).collect())
    }

    /// All images, by name.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the file, if a record is damaged.
    pub fn images(&self) -> Result<Vec<Image>> {
        present(self.image_names()?.iter().map(|name| self.image(name)))
    }

    /// An image.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`], naming the file, if its record is damaged.
    pub fn image(&self, name: &ObjectName) -> Result<Image> {
        let record = record::read(&self.images, &layout::record_file(name), RECORD_BYTES_MAX);
        match record {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::new(ErrorKind::NotFound, format!("image {name}: not found"))
                    .with_hint("see what there is: cowdisk image list"))
            }
            record => Image::from_record(name.clone(), record?),
        }
    }

    /// Removes an image and, unless something else refers to them, its base, kernel and ramdisk.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the instances, if overlays over it were made from it or need it, or if it is open;
    /// nothing is changed then.
    pub fn remove_image(&self, name: &ObjectName) -> Result<()> {
        self.remove_image_locked(name).context(|| format!("remove image {name}"))
    }

    fn remove_image_locked(&self, name: &ObjectName) -> Result<()> {
        let lock = self.lock()?;
        let image = self.image(name)?;
        let others = self.references(&lock, Except::Image(name))?;
        let base_goes = !others.image_or_flavor_has_base(&image.base);
        let users = others.users(|User { instance, overlaid_bases }| {
            instance.cow && instance.image == *name || base_goes && overlaid_bases.contains(&image.base)
        });
        if !users.is_empty() {
            return Err(Error::new(ErrorKind::Busy, format!("overlays need it: {}", list_names(&users)))
                .with_hint("remove these instances first"));
        }
        let held = if base_goes { self.hold_base(&image.base)? } else { None };
        self.in_steps(&lock, || {
            let removal = Removal::begin(&self.tmp, &self.images, &layout::record_file(name))?;
            if base_goes {
                self.remove_held_base(&image.base, held, &lock)?;
            }
            for id in image.kernel.iter().chain(&image.ramdisk) {
                if !others.has_boot_file(id) {
                    self.remove_boot_file(id, &lock)?;
                }
            }
            self.forget_attributes(&layout::image_attributes_file(name))?;
            removal.finish()
        })
    }

    /// Reads all of an image again and compares it with its identity. A base that is whole but whose modification time
    /// was changed opens again after this.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], saying what has changed.
    pub fn verify_image(&self, name: &ObjectName, progress: &dyn Progress) -> Result<()> {
        let image = self.image(name)?;
        self.verify_base(&image.base, progress).context(|| format!("verify image {name}"))?;
        for (what, id) in [("kernel", image.kernel), ("ramdisk", image.ramdisk)] {
            if let Some(id) = id {
                self.verify_boot_file(&id, progress).context(|| format!("verify {what} of image {name}"))?;
            }
        }
        Ok(())
    }
}

/// Collects what is there, passing over what was removed between listing and reading.
pub(super) fn present<T>(found: impl Iterator<Item = Result<T>>) -> Result<Vec<T>> {
    found.filter(|object| !matches!(object, Err(error) if error.kind() == ErrorKind::NotFound)).collect()
}
