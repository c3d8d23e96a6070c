//! What goes into the table of pending requests and what comes out: asks, ends, answers, changes.

use std::fmt;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{ForwardTarget, Reason, Subject, Target};

#[cfg(doc)]
use crate::approval::{HELD_PER_VM_MAX, OPEN_MAX, OPEN_PER_VM_MAX, PendingTable};
use crate::approval::{MissRef, PendingId, PendingState, Scope};
use crate::grant::{ID_PREFIX_MIN, VmView};

/// A miss for which a person is to be asked.
#[derive(Debug, Clone)]
pub struct Ask<'a> {
    /// The id to use if this opens a request.
    pub id: PendingId,
    /// Who asks.
    pub vm: &'a VmView,
    /// The name of the other guest that it is for; empty where that is none.
    pub peer: String,
    /// What for.
    pub subject: Subject,
    /// Why a person is asked.
    pub reason: Reason,
    /// The miss.
    pub miss: MissRef,
    /// How long it may be held from now. Zero: not at all; the caller refuses it at once, and the request
    /// stays, for a yes that serves the next attempt.
    pub hold: Duration,
    /// Packets or queries held for it.
    pub packets: u32,
    /// Requests that the VM may have open (`approvals.maxPendingPerVm`); at most [`OPEN_PER_VM_MAX`].
    pub open_max: usize,
    /// Requests that it may open within a minute (`approvals.maxRequestsPerMinute`); at most
    /// [`OPEN_PER_VM_MAX`]. `None`: any number.
    pub per_minute_max: Option<usize>,
}

/// A forward for which a person is to be asked. Who waits for the answer is the caller's to know.
#[derive(Debug, Clone)]
pub struct AskForward<'a> {
    /// The id to use if this opens a request.
    pub id: PendingId,
    /// Who asks.
    pub vm: &'a VmView,
    /// What for.
    pub forward: ForwardTarget,
    /// Why a person is asked.
    pub reason: Reason,
    /// How long the caller waits from now; the request lives longer.
    pub hold: Duration,
    /// As in [`Ask`]: requests of every kind count.
    pub open_max: usize,
    /// As in [`Ask`].
    pub per_minute_max: Option<usize>,
}

/// What became of an ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AskOutcome {
    /// It opened this request.
    Opened(PendingId),
    /// It joined this request.
    Joined(PendingId),
    /// It is to be denied: a limit is reached.
    Refused {
        /// Which limit.
        limit: Limit,
        /// How many asks of this VM were refused so far for it. The first of each is worth an event.
        count: u64,
        /// What to tell.
        reason: Reason,
    },
}

/// A limit of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// [`OPEN_PER_VM_MAX`], or what the policy says.
    OpenPerVm,
    /// [`OPEN_MAX`].
    Open,
    /// [`HELD_PER_VM_MAX`].
    HeldPerVm,
    /// Requests of a minute, as the policy says.
    Rate,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenPerVm => "pending-per-vm",
            Self::Open => "pending",
            Self::HeldPerVm => "held-per-vm",
            Self::Rate => "requests-per-minute",
        })
    }
}

/// Why a miss no longer waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MissEnd {
    /// Its deadline passed and it was refused.
    HoldExpired,
    /// The guest gave up.
    GuestGaveUp,
    /// The guest's link is gone.
    VmDown,
    /// A limit of held misses was reached.
    Evicted,
    /// Another verdict covered it.
    Covered,
}

/// What happened to a request; [`PendingTable::get`] has it as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It was opened.
    Added(PendingId),
    /// Its count or its held packets changed. What it asks never does.
    Updated(PendingId),
    /// It is no longer open; its state says why.
    Removed(PendingId),
}

/// A miss that no request holds any more: decide it again and answer it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// The miss.
    pub miss: MissRef,
    /// Whose it is.
    pub vm: VmView,
    /// What it is about.
    pub subject: Subject,
    /// When its hold ends.
    pub until: SystemTime,
    /// Packets or queries behind it.
    pub packets: u32,
    /// The request that held it.
    pub request: PendingId,
}

/// What a call brought about, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// What happened to requests.
    pub changes: Vec<Change>,
    /// Misses to answer now.
    pub released: Vec<Released>,
}

/// A person's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Yes.
    Approve,
    /// No.
    Deny,
}

/// An answer that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// What the grant is for.
    pub target: Target,
    /// The VM that asked.
    pub vm: VmView,
    /// What it brought about.
    pub changes: Changes,
}

impl Changes {
    pub(crate) fn of(change: Change) -> Self {
        Self {
            changes: vec![change],
            released: Vec::new(),
        }
    }

    /// Adds what another call brought about.
    pub fn append(&mut self, mut other: Self) {
        self.changes.append(&mut other.changes);
        self.released.append(&mut other.released);
    }
}

/// Why no request was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// A prefix that is too short to mean one.
    #[error(
        "{0:?} is too short for the beginning of a pending request's id (expected at least {ID_PREFIX_MIN} \
         characters); list them with: vnetctl pending list"
    )]
    Short(String),
    /// Too many have come and gone to tell what a prefix was read off.
    #[error(
        "so many requests have come and gone today that the beginning of an id, as {0:?}, may mean another \
         than the one that was shown; give the whole id"
    )]
    Forgotten(String),
    /// None has this id or prefix.
    #[error("no pending request has an id that begins with {0:?}; list them with: vnetctl pending list")]
    NotFound(String),
    /// Several have ids that begin so.
    #[error(
        "{count} pending requests, those that ended today included, have ids that begin with {prefix:?}; \
         give the whole id"
    )]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many fit.
        count: usize,
    },
}

/// Why an answer was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// No such request.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It is no longer open.
    #[error("pending request {id} is no longer open: it is {state}")]
    NotOpen {
        /// The request.
        id: PendingId,
        /// Its state.
        state: PendingState,
    },
    /// It changed since it was shown.
    #[error("pending request {id} changed since it was shown; look again with: vnetctl pending list")]
    Changed {
        /// The request.
        id: PendingId,
    },
    /// The scope is not one of those offered.
    #[error("scope {scope} cannot answer pending request {id} (expected one of: {offered})")]
    Scope {
        /// The request.
        id: PendingId,
        /// What was asked for.
        scope: Scope,
        /// What is offered.
        offered: String,
    },
    /// "Lookup only" was asked for of a connection.
    #[error("pending request {id} is about a connection, not a lookup; answer it without lookup-only")]
    NotALookup {
        /// The request.
        id: PendingId,
    },
}
