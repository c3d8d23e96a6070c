//! Policy: the file that people write, the rules it holds, and the one pure function that decides.
//!
//! - [`Policy::parse`] reads a document, or says everything that is wrong with it.
//! - [`Effective::compose`] puts together what one VM is under: a document, its own rules, a mode.
//! - [`decide_flow`] and [`decide_lookup`] answer, with the step and subject behind the answer and the
//!   widest region in which the same answer holds.
//!
//! Nothing here knows a clock, a socket, a store or a generated type.

mod alias;
mod answer;
mod document;
mod effective;
mod eval;
mod file;
mod forwards;
mod guard;
mod index;
mod keys;
mod lint;
mod list;
mod names;
mod naming;
mod patterns;
mod prefixes;
mod reader;
mod region;
mod resolvers;
mod rule;
mod schema;
mod selftest;
mod settings;
mod synthetic;
pub mod yaml;

#[cfg(test)]
mod tests;

pub use document::{DefaultAction, DnsAnswer, DnsPolicy, Policy, PolicyError, PolicyErrors, PolicyWarning};
pub use effective::{
    APPROVAL_TIMEOUT, Effective, Modes, OWN_POLICY, OwnPolicy, PolicyInForce, Unsettled, claimants,
};
pub(crate) use eval::would_let_through;
pub use eval::{
    Context, Decision, FlowDecision, LookupDecision, Outcome, PeerView, decide_flow, decide_live,
    decide_lookup, overruled_by,
};
pub(crate) use file::is_unprintable;
pub use file::{APPROVAL_TIMEOUT_MAX, DOCUMENT_BYTES_MAX, LIST_MAX, RULES_MAX, list_paths};
pub use forwards::{
    FORWARD_RULES_MAX, ForwardAction, ForwardDecision, ForwardRule, ListenRange, decide_forward, on_loopback,
};
pub use guard::GuardedRanges;
pub use index::RuleList;
pub use list::{Attachment, Attachments, LIST_ENTRIES_MAX, LISTS_BYTES_MAX, List, ListCache, ListFormat};
pub use names::{NameSet, NameTable};
pub use naming::{EchGuard, NameGuards, QuicGuard};
pub use patterns::{NamePatterns, PATTERN_BYTES_MAX, PATTERNS_MAX};
pub use prefixes::{PortSet, PrefixSet, PrefixTable};
pub use reader::nearest;
pub use region::{FlowTest, ProtocolSet};
pub use rule::{Rule, RuleAction};
pub use schema::schema;
pub use selftest::{Destination, PROBES_MAX, PolicyTest, Probe};
pub use settings::{
    CONTROLLER_LOSS_MAX, CONTROLLER_LOSS_MIN, Denial, DnsGuard, GuardAction, LongestLifetime,
    NAMES_PER_DOMAIN, PENDING_MAX, Profile, QUERIES_MAX, QUERIES_PER_MINUTE, QUERIES_PER_SECOND, Settings,
    TTL_MAX, TTL_MAX_DEFAULT, WidestScope,
};
