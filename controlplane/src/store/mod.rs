//! The store: what outlives the controlplane.
//!
//! Grants, policy revisions, what was set for VMs by name, and the history of events. Records hold the
//! contract's own messages, encoded: the contract only ever grows, so what an older version wrote a
//! newer one reads. [`Writer`] is the only one that writes, from a thread of its own, so that a slow
//! disk delays no decision. Deciding and remembering while running are the hub's.

mod memory;
mod retention;
mod schema;
mod sqlite;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use rusqlite::ErrorCode;
use vnet_proto::model::Budget;
use vnet_proto::v1;

pub use memory::MemoryStore;
pub use retention::{
    Class, HISTORY_ACTS_MAX, HISTORY_PRESENCE_MAX, HISTORY_TRAFFIC_MAX, HISTORY_TRAFFIC_PER_VM_MAX,
};
pub use sqlite::SqliteStore;
pub use writer::{Durable, Writer};

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A SQLite file.
    Sqlite(PathBuf),
    /// Gone with the process.
    Memory,
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "memory:" {
            Ok(Self::Memory)
        } else if let Some(file) = text.strip_prefix("sqlite:") {
            let file = file.strip_prefix("//").unwrap_or(file);
            if file.is_empty() {
                return Err(format!("{text:?} names no file (expected sqlite:FILE)"));
            }
            Ok(Self::Sqlite(file.into()))
        } else if text.starts_with("etcd:") {
            Err("etcd is not built yet as a store (expected sqlite:FILE or memory:)".to_owned())
        } else {
            Err(format!(
                "{text:?} is not a store (expected sqlite:FILE or memory:)"
            ))
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(file) => write!(f, "sqlite:{}", file.display()),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

/// Why a store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory will not do.
    #[error(transparent)]
    Path(#[from] crate::paths::PathError),
    /// Another controlplane has it.
    #[error(
        "store {} is in use by another controlplane{}; stop it, or give --store another file",
        .file.display(),
        .holder.as_ref().map_or_else(String::new, |holder| format!(" ({})", holder.words()))
    )]
    InUse {
        /// The file.
        file: PathBuf,
        /// Who has it, where it is known.
        holder: Option<Holder>,
    },
    /// A newer version wrote it.
    #[error("store {} has schema version {found} (this program knows up to {known}); use a newer vnet", .file.display())]
    Newer {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// The file cannot be opened.
    #[error("store {} cannot be opened", .file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// SQLite refuses.
    #[error("the store failed: {source}{}", remedy(.source))]
    Sqlite {
        /// Why.
        #[from]
        source: rusqlite::Error,
    },
    /// SQLite refuses to open a file.
    #[error("store {} cannot be used: {source}{}", .file.display(), remedy(.source))]
    Unusable {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// A record does not decode.
    #[error("the store has a damaged record in {table}")]
    Damaged {
        /// Where.
        table: &'static str,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// The thread that writes has ended.
    #[error("the store is closed")]
    Closed,
    /// The queue of writes is full.
    #[error("the store is too slow: its queue of writes is full")]
    Busy,
}

/// Revisions of a policy that are kept with their lists: the last ones, and beside them the one that comes back
/// if the last is not confirmed. Older ones keep their documents.
pub const LISTED_REVISIONS_MAX: u64 = 16;

/// What helps against what SQLite refuses.
fn remedy(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "; make room on its disk",
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "; put a copy in its place, or move it away, and what is named as it with -wal and -shm, to begin anew"
        }
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
            "; let this user write it and its directory"
        }
        _ => "",
    }
}

/// A grant as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredGrant {
    /// The grant.
    pub grant: v1::Grant,
    /// Attachments of VMs that an "until the VM stops" grant is bound to.
    pub instances: Vec<String>,
    /// What attachments of VMs have told of their use of its budget; it is part of `grant.used`.
    pub uses: Vec<(String, Budget)>,
}

/// What is kept of a VM by name: who has the name, and what was set for it. Every VM has one while it is attached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredVm {
    /// The mode that was set; unspecified for none.
    pub mode: v1::Mode,
    /// Labels that were set; an empty value removes one.
    pub labels: BTreeMap<String, String>,
    /// The attachment that has the name, and for which it was set. All but quarantine is gone with that; empty for a
    /// quarantine whose VM is gone.
    pub instance: String,
    /// The name that it asked for, where another VM had it; else empty.
    pub wanted: String,
    /// The process of its dataplane ([`crate::process::mark`]); empty where that was not told.
    pub process: String,
}

/// Everything that a start needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Grants not revoked, in no order; some may have ended by time.
    pub grants: Vec<StoredGrant>,
    /// The last revision of each policy, with the content of its lists.
    pub policies: Vec<v1::Policy>,
    /// Of those that await confirmation, what they fall back to, likewise.
    pub fallbacks: Vec<v1::Policy>,
    /// VMs, by name.
    pub vms: BTreeMap<String, StoredVm>,
}

/// One change of the state.
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// Adds or replaces a grant.
    PutGrant(Box<StoredGrant>),
    /// Removes a grant.
    DeleteGrant(String),
    /// Adds a revision of a policy, with the content of its lists, each of which is kept once however many
    /// revisions name it, and until none of those that are kept with theirs does ([`LISTED_REVISIONS_MAX`]). A
    /// list without content is one that another of those revisions brought.
    PutPolicy(v1::Policy),
    /// A revision awaits confirmation no more, and stays.
    ConfirmPolicy {
        /// The policy's name.
        name: String,
        /// Which.
        revision: u64,
    },
    /// Sets, or with `None` forgets, what is kept of a VM.
    PutVm(String, Option<StoredVm>),
}

/// How a history was left by whoever added events last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct History {
    /// The highest sequence number among its events.
    pub last_sequence: u64,
    /// It was not closed: its writer was killed, or the machine stopped, and what was not yet added is missing.
    pub cut_off: bool,
}

/// Which events to read back.
#[derive(Debug, Clone, Default)]
pub struct EventQuery {
    /// Only those before this sequence number; zero: from the newest.
    pub before: u64,
    /// Only those after this sequence number.
    pub after: u64,
    /// Only those of these kinds; empty: all.
    pub kinds: Vec<i32>,
    /// Only those from this time on.
    pub start: Option<SystemTime>,
    /// Only those before this time.
    pub end: Option<SystemTime>,
    /// The oldest first, rather than the newest.
    pub oldest_first: bool,
    /// At most this many.
    pub limit: usize,
}

/// A place to keep state and history. Calls block.
pub trait Store: Send + 'static {
    /// Everything that a start needs.
    ///
    /// # Errors
    /// [`StoreError`].
    fn load(&mut self) -> Result<Snapshot, StoreError>;

    /// Does all of the changes, or none; they are durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`].
    fn apply(&mut self, writes: &[Write]) -> Result<(), StoreError>;

    /// One revision of a policy, with the content of its lists, which is empty for those that are no longer
    /// kept ([`LISTED_REVISIONS_MAX`]).
    ///
    /// # Errors
    /// [`StoreError`].
    fn policy(&mut self, name: &str, revision: u64) -> Result<Option<v1::Policy>, StoreError>;

    /// Revisions of a policy before one (zero: from the newest), newest first, without documents and without
    /// the content of lists.
    ///
    /// # Errors
    /// [`StoreError`].
    fn revisions(&mut self, name: &str, before: u64, limit: usize) -> Result<Vec<v1::Policy>, StoreError>;

    /// Adds events, oldest first, and lets the oldest of each part of the history go beyond its limit
    /// ([`Class`]). Says how many went.
    ///
    /// # Errors
    /// [`StoreError`].
    fn append_events(&mut self, events: &[v1::Event]) -> Result<u64, StoreError>;

    /// Events, in the query's order.
    ///
    /// # Errors
    /// [`StoreError`].
    fn events(&mut self, query: &EventQuery) -> Result<Vec<v1::Event>, StoreError>;

    /// Notes, durably, that events will be added from now on; and says how the history was left.
    ///
    /// # Errors
    /// [`StoreError`].
    fn open_history(&mut self) -> Result<History, StoreError>;

    /// Notes that all events were added.
    ///
    /// # Errors
    /// [`StoreError`].
    fn close_history(&mut self) -> Result<(), StoreError>;

    /// Says where this process serves its API (a URL), for another that is refused the store.
    fn sign(&mut self, _serves: &str) {}
}

/// The revision that comes back if this one, the last of its policy, is not confirmed. `None`: it awaits nothing,
/// or nothing was in force before it.
fn fallback_of(policy: &v1::Policy) -> Option<u64> {
    policy.confirm_until?;
    (policy.falls_back_to != 0).then_some(policy.falls_back_to)
}

/// A policy's revision that awaits confirmation no more.
fn confirmed(policy: v1::Policy) -> v1::Policy {
    v1::Policy {
        confirm_until: None,
        falls_back_to: 0,
        ..policy
    }
}

/// Who has a store, as it signed beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Where it serves its API, as a URL.
    pub serves: Option<String>,
}

impl Holder {
    /// As `pid 1, serving unix:///run/vnet/control.sock`.
    pub fn words(&self) -> String {
        match &self.serves {
            Some(serves) => format!("pid {}, serving {serves}", self.pid),
            None => format!("pid {}", self.pid),
        }
    }
}

/// Who had the store in this file last, and has it if it has not ended.
pub fn holder(file: &Path) -> Option<Holder> {
    sqlite::holder(file)
}

/// Opens a store.
///
/// # Errors
/// [`StoreError`]; [`StoreError::InUse`] if another controlplane has it.
pub fn open(location: &Location) -> Result<Box<dyn Store>, StoreError> {
    Ok(match location {
        Location::Sqlite(file) => Box::new(SqliteStore::open(file)?),
        Location::Memory => Box::new(MemoryStore::default()),
    })
}
