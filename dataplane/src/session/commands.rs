//! Commands: what a controlplane may have done in this dataplane's network, and how it is refused.

use std::sync::Arc;

use tonic::Code;
use vnet_proto::model::{ForwardListen, Name, VmId};
use vnet_proto::v1;

use crate::capture::{Capture, CaptureSpec};
use crate::forward::{self, ForwardError, Forwards, Holder};
use crate::message::Forward;
use crate::zone::{Zone, ZoneRecord};

/// Why a command was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind.
    pub code: Code,
    /// One sentence for people.
    pub text: String,
    /// Of a forward: what is wrong where it was to listen.
    pub listen: Option<ListenError>,
}

/// What is wrong with a place to listen, for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenError {
    /// What.
    pub problem: v1::ListenProblem,
    /// Where.
    pub listen: ForwardListen,
    /// Another forward of this network has it.
    pub by_own_forward: bool,
}

impl Refusal {
    /// One of this kind.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            listen: None,
        }
    }

    /// The command is not one that could ever be done.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, text)
    }
}

impl From<ForwardError> for Refusal {
    fn from(error: ForwardError) -> Self {
        let code = match error {
            ForwardError::InUse { .. } | ForwardError::PathTaken { .. } => Code::AlreadyExists,
            ForwardError::NotPermitted { .. } | ForwardError::Privileged { .. } => Code::PermissionDenied,
            ForwardError::NoSuchAddress { .. }
            | ForwardError::Protocol(_)
            | ForwardError::NotOverUnix(_)
            | ForwardError::Target(_)
            | ForwardError::Range { .. } => Code::InvalidArgument,
            ForwardError::NoSuchDirectory { .. } => Code::FailedPrecondition,
            ForwardError::Listen { .. } => Code::Unavailable,
            ForwardError::NotFound { .. } => Code::NotFound,
            ForwardError::TooMany { .. } | ForwardError::Descriptors(_) => Code::ResourceExhausted,
        };
        let cause = std::error::Error::source(&error)
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        Self {
            listen: ListenError::of(&error),
            ..Self::new(code, format!("{error}{cause}"))
        }
    }
}

impl ListenError {
    fn of(error: &ForwardError) -> Option<Self> {
        use v1::ListenProblem;
        let (problem, listen) = match error {
            ForwardError::InUse { listen, .. } => (ListenProblem::InUse, listen.clone()),
            ForwardError::PathTaken { listen, .. } => (ListenProblem::PathTaken, listen.clone()),
            ForwardError::NoSuchAddress { listen } => {
                (ListenProblem::NoSuchAddress, ForwardListen::Address(*listen))
            }
            ForwardError::NoSuchDirectory { listen } => (ListenProblem::NoSuchDirectory, listen.clone()),
            ForwardError::NotPermitted { listen, .. } => (ListenProblem::NotPermitted, listen.clone()),
            ForwardError::Privileged { listen, .. } => {
                (ListenProblem::NotPermitted, ForwardListen::Address(*listen))
            }
            ForwardError::Listen { .. }
            | ForwardError::Protocol(_)
            | ForwardError::NotOverUnix(_)
            | ForwardError::Target(_)
            | ForwardError::Range { .. }
            | ForwardError::NotFound { .. }
            | ForwardError::Descriptors(_)
            | ForwardError::TooMany { .. } => return None,
        };
        let by_own_forward = matches!(
            error,
            ForwardError::InUse {
                by: Some(Holder::Forward { .. }),
                ..
            }
        );
        Some(Self {
            problem,
            listen,
            by_own_forward,
        })
    }
}

/// The zones of a network. Implemented by what answers guests' lookups.
pub trait Zones: Send + Sync {
    /// The zones served now, in order of precedence.
    fn zones(&self) -> Vec<Zone>;

    /// Adds a zone, or replaces the one of that name.
    ///
    /// # Errors
    /// [`Refusal`], as at a limit.
    fn set_zone(&self, zone: Zone) -> Result<(), Refusal>;

    /// Adds records before those of the zone of that name and replaces its default address, or adds the zone. What
    /// it is then.
    ///
    /// # Errors
    /// [`Refusal`], as at a limit.
    fn merge_zone(&self, zone: Zone) -> Result<Zone, Refusal>;

    /// Removes records of a zone that are for the same as these, and have their address if they have one. What the
    /// zone is then.
    ///
    /// # Errors
    /// [`Refusal`] when there are none.
    fn remove_records(&self, name: Option<&Name>, records: &[ZoneRecord]) -> Result<Zone, Refusal>;

    /// Removes a zone; `None` names the root.
    ///
    /// # Errors
    /// [`Refusal`] when there is none of that name.
    fn delete_zone(&self, name: Option<&Name>) -> Result<(), Refusal>;
}

/// The captures of a network. Implemented by what knows its guests.
pub trait Captures: Send + Sync {
    /// Captures a guest from now on, until the capture is stopped. `wake` is called when something waits to be taken
    /// out.
    ///
    /// # Errors
    /// [`Refusal`] at a limit, and when there is no such guest.
    fn start_capture(
        &self,
        vm: VmId,
        spec: CaptureSpec,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Arc<Capture>, Refusal>;
}

/// What commands act on.
#[derive(Clone)]
pub struct Commands {
    /// Forwards of the network.
    pub forwards: Forwards,
    /// Zones of the network.
    pub zones: Arc<dyn Zones>,
    /// Captures of the network.
    pub captures: Arc<dyn Captures>,
}

impl Commands {
    /// Opens `count` forwards from this one on, all or none.
    pub(super) fn expose(&self, first: &Forward, count: u32) -> Result<Vec<Forward>, Refusal> {
        Ok(self.forwards.expose(forward::range(first, count)?)?)
    }
}
