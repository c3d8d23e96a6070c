//! The decision: one pure function for flows and one for lookups, in the design's order.

use std::time::SystemTime;

use vnet_proto::model::{Budget, FlowMatch, FlowSubject, LookupMatch, LookupSubject, Reason};

use crate::grant::{Grant, GrantId, VmGrants, VmView};
use crate::policy::{Effective, GuardedRanges};

/// What a decision reads beside its subject.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The VM.
    pub vm: &'a VmView,
    /// What it is under.
    pub policy: &'a Effective,
    /// The grants that reach it, all in force.
    pub grants: &'a VmGrants,
    /// What its dataplane guards.
    pub guarded: &'a GuardedRanges,
    /// For a flow to another guest: whether that one, too, is under neither policy nor mode.
    pub peer_open: bool,
}

/// What comes of a flow or lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It goes through.
    Allow,
    /// It is refused, and the guest is told.
    Deny,
    /// It is refused in silence.
    Drop,
    /// A person is asked.
    Ask,
}

/// An answer, with what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<M> {
    /// What is done.
    pub outcome: Outcome,
    /// The step, subject and sentence behind it.
    pub reason: Reason,
    /// Where the same outcome holds. For [`Outcome::Ask`], the subject alone.
    pub found: M,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// The grant that it rests on.
    pub grant: Option<GrantId>,
    /// It is for this one subject only and never cached: the grant is for once.
    pub once: bool,
    /// What is left of the grant's budget.
    pub budget: Option<Budget>,
    /// When the grant ends by time.
    pub expires_at: Option<SystemTime>,
    /// What would change the answer, in one sentence; empty where nothing would.
    pub remedy: String,
}

/// An answer about a flow.
pub type FlowDecision = Decision<FlowMatch>;

/// An answer about a lookup.
pub type LookupDecision = Decision<LookupMatch>;

/// Decides a flow.
pub fn decide_flow(_context: &Context<'_>, _flow: &FlowSubject) -> FlowDecision {
    unimplemented!()
}

/// Decides a lookup.
pub fn decide_lookup(_context: &Context<'_>, _lookup: &LookupSubject) -> LookupDecision {
    unimplemented!()
}

/// The rule that makes a grant without effect for a VM, if one does: it refuses all that the grant
/// would allow. A grant that denies is never overruled.
pub fn overruled_by(_context: &Context<'_>, _grant: &Grant) -> Option<String> {
    unimplemented!()
}
