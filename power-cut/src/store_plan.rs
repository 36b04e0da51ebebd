//! What the guest does with the store meanwhile, and how the store looks after each step.

use std::collections::BTreeMap;

use crate::plan::DISK_SECTORS;

/// The number that the disks of short-lived instances go by in their sectors.
pub const SHORT_LIVED: u64 = 9;

/// The number by which marks and sectors call who works on the store: one after the last stream.
pub const KEEPER: usize = crate::plan::STREAMS.len();

/// One change of the store; durable once it has returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreStep {
    /// `cowdisk init`.
    Init,
    /// `cowdisk image import`.
    Import,
    /// `cowdisk instance create`.
    Create(String),
    /// `cowdisk mount`; from here on the streams write.
    Mount,
    /// Writes the first sector of an instance's root disk and syncs it.
    Put(String),
    /// Gives an instance's root disk to a user.
    Chown(String, u32),
    /// Grows the root disk of `web` to so many bytes.
    Grow(u64),
    /// `cowdisk instance remove`.
    Remove(String),
}

/// What can be seen of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreState {
    /// It is a store.
    pub made: bool,
    /// It has the image.
    pub image: bool,
    /// Its instances.
    pub instances: BTreeMap<String, InstanceState>,
    /// Bytes of the root disk of `web`.
    pub web_bytes: u64,
}

/// What can be seen of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstanceState {
    /// Who owns its root disk.
    pub owner: u32,
    /// Whether the first sector of a short-lived one was written.
    pub put: bool,
}

/// The instances that stay.
pub const LASTING: [&str; 2] = ["web", "plain"];

/// Everything that is done to the store, in order.
pub fn store_steps(rounds: u64) -> Vec<StoreStep> {
    let mut steps = vec![StoreStep::Init, StoreStep::Import];
    steps.extend(LASTING.map(|name| StoreStep::Create(name.to_owned())));
    steps.push(StoreStep::Mount);
    for round in 0..rounds {
        let name = format!("short-{round}");
        steps.push(StoreStep::Create(name.clone()));
        steps.push(StoreStep::Put(name.clone()));
        steps.push(StoreStep::Chown(name, 1000 + u32::try_from(round).unwrap_or(0)));
        steps.push(StoreStep::Grow(DISK_SECTORS * 512 + (round + 1) * (96 << 10)));
        if round > 0 {
            steps.push(StoreStep::Remove(format!("short-{}", round - 1)));
        }
    }
    steps
}

impl StoreState {
    /// How a store looks after these steps.
    pub fn after(steps: &[StoreStep]) -> Self {
        let mut state = Self::default();
        for step in steps {
            state.apply(step);
        }
        state
    }

    fn apply(&mut self, step: &StoreStep) {
        match step {
            StoreStep::Init => self.made = true,
            StoreStep::Import => self.image = true,
            StoreStep::Create(name) => {
                if name == "web" {
                    self.web_bytes = DISK_SECTORS * 512;
                }
                self.instances.insert(name.clone(), InstanceState::default());
            }
            StoreStep::Mount => {}
            StoreStep::Put(name) => self.instance(name).put = true,
            StoreStep::Chown(name, owner) => self.instance(name).owner = *owner,
            StoreStep::Grow(bytes) => self.web_bytes = *bytes,
            StoreStep::Remove(name) => drop(self.instances.remove(name)),
        }
    }

    fn instance(&mut self, name: &str) -> &mut InstanceState {
        self.instances.entry(name.to_owned()).or_default()
    }
}
