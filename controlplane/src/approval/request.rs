//! One pending request: what is asked, by whom, since when, and what is held for it.

use std::fmt;
use std::time::SystemTime;

use vnet_proto::model::{ForwardTarget, Guard, GuardSet, MissId, Name, Reason, Subject, Target};

use crate::approval::scope;
use crate::grant::{GrantId, VmView};

/// A pending request's id, unique for ever.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PendingId(pub String);

impl fmt::Display for PendingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A miss among those of all dataplanes. `dataplane` is the caller's number for one dataplane's life
/// (the same after a reconnect), so that a miss that is announced again is known again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MissRef {
    /// Which dataplane.
    pub dataplane: u64,
    /// Which of its misses.
    pub miss: MissId,
}

/// Where a request is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PendingState {
    /// Waiting for an answer.
    Open,
    /// Answered yes.
    Approved,
    /// Answered no.
    Denied,
    /// Nobody answered in its life.
    Expired,
    /// The guest gave up, or its VM went away.
    Cancelled,
    /// A policy change or a grant decided it.
    Decided,
}

impl fmt::Display for PendingState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Approved => "approved",
            Self::Denied => "denied",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Decided => "decided",
        })
    }
}

/// How wide an answer reaches, narrowest kind first for addresses, then for names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// This address and port.
    HostPort,
    /// This address, any port.
    Host,
    /// This name and port.
    NamePort,
    /// This name, any port.
    Name,
    /// Every name below this name's registrable domain.
    Subdomains,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostPort => "host-port",
            Self::Host => "host",
            Self::NamePort => "name-port",
            Self::Name => "name",
            Self::Subdomains => "subdomains",
        })
    }
}

/// A miss that is held for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldMiss {
    /// Which.
    pub miss: MissRef,
    /// What it is about; its address may differ from the request's when both share a name.
    pub subject: Subject,
    /// When its hold ends.
    pub until: SystemTime,
    /// Packets or queries behind it.
    pub packets: u32,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// That a flow or lookup is let through. Misses are held for it.
    Miss(Subject),
    /// That a forward is opened, which the VM asks for itself. Nothing is held for it here.
    Forward(ForwardTarget),
}

/// A question to a person. Who asks, for what, under which guards, and so what an answer reaches, stays
/// as it was when it was opened: what asks for anything else is another request, with another id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its id.
    pub id: PendingId,
    /// Who asks.
    pub vm: VmView,
    /// What is asked for, as it was first asked.
    pub asked: Asked,
    /// The name of the other guest that the destination belonged to then; empty where that is none.
    pub peer: String,
    /// Names bound to the destination when it was first asked; the first is the one that the narrowest
    /// answer is about. Of a lookup, its name.
    pub names: Vec<Name>,
    /// Guards that the destination is under.
    pub guards: GuardSet,
    /// Why it asks.
    pub reason: Reason,
    /// Where it is in its life.
    pub state: PendingState,
    /// How many misses have asked for it.
    pub count: u64,
    /// When it was first asked.
    pub created_at: SystemTime,
    /// When it was last asked.
    pub last_asked_at: SystemTime,
    /// When it goes away unanswered.
    pub expires_at: SystemTime,
    /// When it was answered or went away; `None`: it is open.
    pub ended_at: Option<SystemTime>,
    /// What is held for it.
    pub held: Vec<HeldMiss>,
    /// The grant that answered it.
    pub grant: Option<GrantId>,
    /// Something that was held for it, or would have been, was refused for want of an answer: the guest may
    /// try again, and a late yes serves that.
    pub(crate) hold_ran_out: bool,
    /// Its entry among the table's wakes.
    pub(crate) wakes_at: SystemTime,
}

impl Request {
    /// Whether a guard stands before what it asks for: then it is answered for that very destination.
    pub fn is_guarded(&self) -> bool {
        !self.guards.without(Guard::Synthetic).is_empty() || self.reason.step == "guard"
    }

    /// Says what is asked, and whether it is still open; its count does not matter.
    pub fn etag(&self) -> String {
        let mut hash = Fnv::new();
        hash.text(&self.id.0);
        hash.text(&self.vm.name);
        hash.text(&self.target().to_string());
        hash.text(&self.peer);
        for name in &self.names {
            hash.text(name.as_str());
        }
        for guard in self.guards.iter() {
            hash.text(&guard.to_string());
        }
        for scope in self.scopes() {
            hash.text(&scope.to_string());
        }
        hash.text(&self.state.to_string());
        format!("{:016x}", hash.0)
    }

    /// What is asked for: one address, protocol and port, or a name to look up.
    pub fn target(&self) -> Target {
        match &self.asked {
            Asked::Miss(Subject::Flow(flow)) => Target::of_subject(flow),
            Asked::Miss(Subject::Lookup(lookup)) => Target::of_name(lookup.name.clone()),
            Asked::Forward(forward) => Target::Forward(*forward),
        }
    }

    /// The flow or lookup that it asks for; `None` where that is neither.
    pub fn subject(&self) -> Option<&Subject> {
        match &self.asked {
            Asked::Miss(subject) => Some(subject),
            Asked::Forward(_) => None,
        }
    }

    /// Scopes that an answer may have, narrowest first.
    pub fn scopes(&self) -> Vec<Scope> {
        scope::offered(self)
    }

    /// What a grant of a scope would be for; `None` for one that is not offered.
    pub fn target_of(&self, scope: Scope) -> Option<Target> {
        scope::target(self, scope, false)
    }

    /// The registrable domain of its best name, by which requests may be shown together.
    pub fn domain(&self) -> Option<&str> {
        scope::domain(self)
    }

    /// Packets and queries that are held for it.
    pub fn held_packets(&self) -> u32 {
        self.held
            .iter()
            .fold(0, |sum, held| sum.saturating_add(held.packets))
    }

    /// When the last of what is held will be refused; `None`: nothing is held.
    pub fn held_until(&self) -> Option<SystemTime> {
        self.held.iter().map(|held| held.until).max()
    }

    /// Whether it waits for an answer.
    pub fn is_open(&self) -> bool {
        self.state == PendingState::Open
    }
}

/// FNV-1a, 64 bits: the same in every build, and nothing rests on its strength.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn text(&mut self, text: &str) {
        for byte in text.bytes().chain([0]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
