//! The table of pending requests: open, join, hold, answer, expire, cancel, decide again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Reason, Subject, Target};

use crate::approval::{MissRef, PendingId, PendingState, Request, Scope};
use crate::grant::{GrantId, VmInstance, VmView};

/// How long a request lives unanswered.
pub const LIFE: Duration = Duration::from_secs(600);
/// Open requests of one VM.
pub const OPEN_PER_VM_MAX: usize = 1_024;
/// Open requests of all VMs.
pub const OPEN_MAX: usize = 16_384;
/// Misses held for one VM's requests.
pub const HELD_PER_VM_MAX: usize = 8_192;
/// Names kept of one request.
pub const NAMES_PER_REQUEST_MAX: usize = 16;
/// Requests kept after their end.
pub const RECENT_MAX: usize = 1_024;

/// A miss for which a person is to be asked.
#[derive(Debug, Clone)]
pub struct Ask<'a> {
    /// The id to use if this opens a request.
    pub id: PendingId,
    /// Who asks.
    pub vm: &'a VmView,
    /// What for.
    pub subject: Subject,
    /// Why a person is asked.
    pub reason: Reason,
    /// The miss.
    pub miss: MissRef,
    /// How long it may be held from now.
    pub hold: Duration,
    /// Packets or queries held for it.
    pub packets: u32,
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
    /// [`OPEN_PER_VM_MAX`].
    OpenPerVm,
    /// [`OPEN_MAX`].
    Open,
    /// [`HELD_PER_VM_MAX`].
    HeldPerVm,
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
    /// Its count, its held packets or its names changed.
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

/// Why no request was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// None has this id or prefix.
    #[error("no pending request has an id that begins with {0:?}; list them with: vnetctl pending list")]
    NotFound(String),
    /// Several have ids that begin so.
    #[error("{count} pending requests have ids that begin with {prefix:?}; give more of the id")]
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
    /// "Lookup only" was asked for where no name is known.
    #[error("pending request {id} has no name, so that its lookup alone cannot be allowed")]
    NoName {
        /// The request.
        id: PendingId,
    },
}

/// All pending requests: those open, and the last that ended.
#[derive(Debug, Default)]
pub struct PendingTable {
    open: BTreeMap<PendingId, Request>,
    recent: VecDeque<Request>,
    by_miss: HashMap<MissRef, PendingId>,
}

impl PendingTable {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A miss asks: joins the open request that asks the same, or opens one. A miss that is announced
    /// again (after a reconnect) changes nothing.
    pub fn ask(&mut self, _now: SystemTime, _ask: Ask<'_>) -> (AskOutcome, Changes) {
        unimplemented!()
    }

    /// A miss no longer waits.
    ///
    /// A request whose guest gave up, with nothing else held and nothing ever refused for want of an
    /// answer, is cancelled. After a hold ran out it stays: a late yes serves the next attempt.
    pub fn miss_ended(&mut self, _now: SystemTime, _miss: MissRef, _end: MissEnd) -> Changes {
        unimplemented!()
    }

    /// A VM's link is gone for good: its requests are cancelled.
    pub fn vm_stopped(&mut self, _now: SystemTime, _instance: &VmInstance) -> Changes {
        unimplemented!()
    }

    /// Ends requests whose life is over, and lets go of misses whose hold is; the dataplane refuses
    /// those by its own clock.
    pub fn expire(&mut self, _now: SystemTime) -> Changes {
        unimplemented!()
    }

    /// When [`PendingTable::expire`] next has something to do.
    pub fn next_expiry(&self) -> Option<SystemTime> {
        unimplemented!()
    }

    /// What a grant that answers a request would be for; changes nothing.
    ///
    /// `scope` `None` is the narrowest. `lookup_only` keeps a name's grant from its connections.
    ///
    /// # Errors
    /// [`AnswerError`]; an etag that is given must be the request's.
    pub fn quote(
        &self,
        _id: &PendingId,
        _etag: Option<&str>,
        _scope: Option<Scope>,
        _lookup_only: bool,
    ) -> Result<Target, AnswerError> {
        unimplemented!()
    }

    /// Takes an answer: the request ends, and what it held is released, to be decided under `grant`,
    /// which the caller makes for the target that [`PendingTable::quote`] gave for the same arguments.
    ///
    /// # Errors
    /// As [`PendingTable::quote`].
    pub fn answer(
        &mut self,
        _now: SystemTime,
        _id: &PendingId,
        _etag: Option<&str>,
        _answer: Answer,
        _scope: Option<Scope>,
        _lookup_only: bool,
        _grant: GrantId,
    ) -> Result<Answered, AnswerError> {
        unimplemented!()
    }

    /// Policy, mode or grants changed: `still_asks` says of a VM's subject whether a person is still to
    /// be asked. A request that is not ends as [`PendingState::Decided`]; a held miss that is not is
    /// released, to be decided again by the caller.
    pub fn decide_again(
        &mut self,
        _now: SystemTime,
        _still_asks: impl FnMut(&VmView, &Subject) -> bool,
    ) -> Changes {
        unimplemented!()
    }

    /// One by its id, open or lately ended.
    pub fn get(&self, _id: &PendingId) -> Option<&Request> {
        unimplemented!()
    }

    /// One by its id or a prefix of it that fits it only; open ones come before those that ended.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn find(&self, _prefix: &str) -> Result<&Request, FindError> {
        unimplemented!()
    }

    /// The open requests, oldest first.
    pub fn open(&self) -> Vec<&Request> {
        unimplemented!()
    }

    /// How many are open.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// How many of an attachment's are open.
    pub fn open_count_of(&self, _instance: &VmInstance) -> usize {
        unimplemented!()
    }
}
