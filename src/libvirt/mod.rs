//! Instances in libvirt: the XML of their disks and domains, and the calls that start, stop, attach and detach.
//!
//! libvirt is driven by its own client, virsh. The alternative, the crate `virt`, binds the C library: a call costs 2 ms
//! instead of 35, but the binary then does not even start on a host without libvirt.so.0, building it needs libvirt's
//! headers, its handles panic when dropped after the connection broke, and libvirt's C code prints errors to
//! stderr on its own. A start or an attach takes 200 ms and more inside libvirt, so the 35 ms do not matter, and
//! whatever cowdisk does here an operator can repeat by hand.
//!
//! A started instance is a *transient* domain: it exists in libvirt as long as it runs. The store stays the only place
//! that knows which instances there are, nothing stale is left in libvirt when an instance is removed or the mount moves, and
//! libvirt cannot start a guest by itself before the store is mounted. Who wants a persistent domain defines it:
//! `cowdisk libvirt xml --domain NAME | virsh define /dev/stdin`; stop, attach and detach work on that as well.

pub mod domain;
pub mod guest;
pub mod kvm;
pub mod virsh;
pub mod xml;
