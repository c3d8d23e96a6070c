//! What can go wrong while a guest is made, in words that a person can act on.

use std::io;

use serde::{Deserialize, Serialize};

/// A guest could not be made, or its command could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The [`Spec`](super::Spec) asks for something that cannot be.
    #[error("{0}")]
    Spec(String),
    /// The helper process could not be started.
    #[error("cannot start the guest's helper process {program}")]
    Spawn {
        /// What was to be executed.
        program: String,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// The channel to the helper failed.
    #[error("lost contact with the guest's helper process while {doing}")]
    Channel {
        /// What for.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The helper process ended before the guest was ready.
    #[error("the guest's helper process ended before the guest was ready ({status})")]
    HelperDied {
        /// How.
        status: String,
    },
    /// The helper could not make the guest.
    #[error("{0}")]
    Setup(Failure),
}

impl SandboxError {
    /// The exit code of `vnetctl run` for it: always the one for vnet's own failures. That a command
    /// was not found is known only after the start and is told by [`Exit`](super::Exit).
    pub fn exit_code(&self) -> u8 {
        super::EXIT_FAILED
    }
}

/// One step of making a guest that failed, with what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was being done, for "cannot ...".
    pub step: String,
    /// What the system said.
    pub cause: String,
    /// What to do, where that is known; may have several lines.
    pub remedy: Option<String>,
}

impl Failure {
    /// A failure whose remedy is not known.
    pub(crate) fn new(step: impl Into<String>, cause: impl ToString) -> Failure {
        Failure {
            step: step.into(),
            cause: cause.to_string(),
            remedy: None,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot {}: {}", self.step, self.cause)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// `.step("do this")?` for everything the system may refuse.
pub(crate) trait Step<T> {
    /// Names what was being done.
    fn step(self, step: impl Into<String>) -> Result<T, Failure>;
}

impl<T, E: ToString> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|cause| Failure::new(step, cause))
    }
}
