//! What `mount.cowdisk` understands: the arguments of mount(8), and the exit codes that it expects.

pub mod arguments;

/// Exit codes of mount(8), see its manual page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The disks can be read.
    Mounted = 0,
    /// The helper was called in a wrong way.
    Usage = 1,
    /// Something on this system is missing, such as the cowdisk command.
    System = 2,
    /// cowdisk refused to mount, or failed to.
    Failed = 32,
}

/// Why nothing was mounted: the exit code and the line for the user. No line if cowdisk has said it already.
#[derive(Debug)]
pub struct Refusal {
    /// What mount(8) is told.
    pub exit: Exit,
    /// What the user is told.
    pub message: Option<String>,
}

impl Refusal {
    /// A refusal with a line for the user.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: Some(message.into()) }
    }
}
