//! Verdicts: what was decided, where it holds, and until when.

use std::fmt;
use std::time::Duration;

use crate::model::flow::names_from_wire;
use crate::model::flow::{duration_from_wire, duration_to_wire};
use crate::model::matching::{names_match_from_wire, names_match_to_wire};
use crate::model::{Epoch, FlowMatch, LookupMatch, LookupSubject, Malformed, MissId, Name, Protocol};
use crate::v1;

/// What a verdict does. Asking is never a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VerdictAction {
    /// Let it through.
    Allow,
    /// Refuse it and tell the guest.
    Deny,
    /// Refuse it in silence.
    Drop,
}

impl fmt::Display for VerdictAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Drop => "drop",
        })
    }
}

impl From<VerdictAction> for v1::Action {
    fn from(action: VerdictAction) -> Self {
        match action {
            VerdictAction::Allow => Self::Allow,
            VerdictAction::Deny => Self::Deny,
            VerdictAction::Drop => Self::Drop,
        }
    }
}

/// What a flow must say of the name that its verdict rests on: in the server name of its TLS ClientHello
/// (over QUIC as well), or in the Host of its HTTP request. What it says must be one of the verdict's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum NameDemand {
    /// Nothing: the verdict rests on no name, or its rule says `sni: off`.
    #[default]
    Off,
    /// On 443 and on TCP port 80 as [`Self::Require`], elsewhere as [`Self::IfPresent`].
    ByPort,
    /// A name that it says must fit; one that says none passes.
    IfPresent,
    /// It must say a name that fits.
    Require,
}

impl NameDemand {
    /// Those that a rule may say.
    pub const WRITTEN: [Self; 3] = [Self::Require, Self::IfPresent, Self::Off];

    /// What is demanded of one flow; never [`Self::ByPort`].
    #[must_use]
    pub fn of(self, protocol: Protocol, port: u16) -> Self {
        match (self, protocol, port) {
            (Self::ByPort, Protocol::Tcp, 443 | 80) | (Self::ByPort, Protocol::Udp, 443) => Self::Require,
            (Self::ByPort, _, _) => Self::IfPresent,
            (said, _, _) => said,
        }
    }
}

impl fmt::Display for NameDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::ByPort => "by-port",
            Self::IfPresent => "match-if-present",
            Self::Require => "require",
        })
    }
}

impl From<v1::NameDemand> for NameDemand {
    fn from(message: v1::NameDemand) -> Self {
        match message {
            v1::NameDemand::Unspecified => Self::Off,
            v1::NameDemand::ByPort => Self::ByPort,
            v1::NameDemand::IfPresent => Self::IfPresent,
            v1::NameDemand::Require => Self::Require,
        }
    }
}

impl From<NameDemand> for v1::NameDemand {
    fn from(demand: NameDemand) -> Self {
        match demand {
            NameDemand::Off => Self::Unspecified,
            NameDemand::ByPort => Self::ByPort,
            NameDemand::IfPresent => Self::IfPresent,
            NameDemand::Require => Self::Require,
        }
    }
}

/// Why a verdict came out as it did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Reason {
    /// The step of the evaluation order that answered.
    pub step: String,
    /// The rule, grant or guard; empty where there is none.
    pub subject: String,
    /// One sentence for people.
    pub text: String,
}

impl Reason {
    /// From its parts.
    pub fn new(step: impl Into<String>, subject: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            step: step.into(),
            subject: subject.into(),
            text: text.into(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<v1::Reason> for Reason {
    fn from(message: v1::Reason) -> Self {
        Self {
            step: message.step,
            subject: message.subject,
            text: message.text,
        }
    }
}

impl From<&Reason> for v1::Reason {
    fn from(reason: &Reason) -> Self {
        Self {
            step: reason.step.clone(),
            subject: reason.subject.clone(),
            text: reason.text.clone(),
        }
    }
}

/// Limits that end a grant when used up; zero is no such limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Budget {
    /// Flows opened.
    pub connections: u64,
    /// Bytes from the guest.
    pub bytes_up: u64,
    /// Bytes to the guest.
    pub bytes_down: u64,
}

impl Budget {
    /// The sum, field by field.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    /// The difference, field by field, and never below zero.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.with(other, u64::saturating_sub)
    }

    fn with(self, other: Self, both: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            connections: both(self.connections, other.connections),
            bytes_up: both(self.bytes_up, other.bytes_up),
            bytes_down: both(self.bytes_down, other.bytes_down),
        }
    }

    /// Whether bytes are limited, either way.
    pub fn limits_bytes(self) -> bool {
        self.bytes_up != 0 || self.bytes_down != 0
    }
}

/// What a VM may still do under a grant with a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Allowance {
    /// What is left; zero is no such limit.
    pub left: Budget,
    /// What this VM had used when so much was left.
    pub used: Budget,
}

impl Allowance {
    /// How much this VM may have used in all when it ends; zero is no such limit.
    pub fn limit(self) -> Budget {
        let limit = |left: u64, used: u64| if left == 0 { 0 } else { used.saturating_add(left) };
        self.left.with(self.used, limit)
    }
}

impl From<v1::Budget> for Budget {
    fn from(message: v1::Budget) -> Self {
        Self {
            connections: message.connections,
            bytes_up: message.bytes_up,
            bytes_down: message.bytes_down,
        }
    }
}

impl From<Budget> for v1::Budget {
    fn from(budget: Budget) -> Self {
        Self {
            connections: budget.connections,
            bytes_up: budget.bytes_up,
            bytes_down: budget.bytes_down,
        }
    }
}

/// Where a verdict holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Match {
    /// Flows.
    Flow(FlowMatch),
    /// Lookups.
    Lookup(LookupMatch),
    /// Aliases in the answers to lookups. What holds for one kind of names never holds for the other.
    Alias(LookupMatch),
}

impl Match {
    /// From a message that matches names.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    pub fn of_names(message: &v1::LookupMatch) -> Result<Self, Malformed> {
        Ok(Self::about(message.alias, names_match_from_wire(message)?))
    }

    /// A match of names, about aliases or about lookups.
    fn about(aliases: bool, found: LookupMatch) -> Self {
        if aliases {
            Self::Alias(found)
        } else {
            Self::Lookup(found)
        }
    }

    /// A match of names, about what a lookup, or an alias, is one of.
    pub fn of_lookup(lookup: &LookupSubject, found: LookupMatch) -> Self {
        Self::about(lookup.alias, found)
    }

    /// Whether a lookup, or an alias, lies inside it.
    pub fn matches_lookup(&self, lookup: &LookupSubject) -> bool {
        match self {
            Self::Lookup(found) => !lookup.alias && found.matches(&lookup.name),
            Self::Alias(found) => lookup.alias && found.matches(&lookup.name),
            Self::Flow(_) => false,
        }
    }
}

impl From<&Match> for v1::verdict::Match {
    fn from(found: &Match) -> Self {
        match found {
            Match::Flow(flow) => Self::Flow(flow.into()),
            Match::Lookup(names) => Self::Lookup(names_match_to_wire(names, false)),
            Match::Alias(names) => Self::Lookup(names_match_to_wire(names, true)),
        }
    }
}

impl From<&Match> for v1::cached_verdict::Match {
    fn from(found: &Match) -> Self {
        match found.into() {
            v1::verdict::Match::Flow(flow) => Self::Flow(flow),
            v1::verdict::Match::Lookup(names) => Self::Lookup(names),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flow(flow) => flow.fmt(f),
            Self::Lookup(lookup) => lookup.fmt(f),
            Self::Alias(alias) => write!(f, "alias {alias}"),
        }
    }
}

/// Answers a miss, and every later flow or lookup inside its match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The miss that it answers.
    pub miss: MissId,
    /// What is done.
    pub action: VerdictAction,
    /// Where it holds.
    pub found: Match,
    /// When it was made.
    pub epoch: Epoch,
    /// When it ends whatever heartbeats say, from now.
    pub expires_in: Option<Duration>,
    /// For the miss itself only, never cached.
    pub once: bool,
    /// What the VM may still do under its grant's budget; `None`: no limit.
    pub budget: Option<Allowance>,
    /// The grant that it rests on; empty for none.
    pub grant: String,
    /// Why.
    pub reason: Reason,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// What a flow must say of the name that it rests on.
    pub name_demand: NameDemand,
    /// The names that it may say: those bound to the destination on which the verdict rests.
    pub names: Vec<Name>,
    /// For a lookup: nothing of it may go upstream. Addresses are answered with synthetic ones.
    pub synthetic_only: bool,
}

impl TryFrom<v1::Verdict> for Verdict {
    type Error = Malformed;

    fn try_from(message: v1::Verdict) -> Result<Self, Malformed> {
        let action = match v1::Action::try_from(message.action) {
            Ok(v1::Action::Allow) => VerdictAction::Allow,
            Ok(v1::Action::Deny) => VerdictAction::Deny,
            Ok(v1::Action::Drop) => VerdictAction::Drop,
            Ok(v1::Action::Ask | v1::Action::Unspecified) | Err(_) => {
                return Err(Malformed::Enum {
                    field: "verdict.action",
                    value: message.action,
                });
            }
        };
        let found = match message.r#match.ok_or(Malformed::Missing {
            field: "verdict.match",
        })? {
            v1::verdict::Match::Flow(flow) => Match::Flow(flow.try_into()?),
            v1::verdict::Match::Lookup(names) => Match::of_names(&names)?,
        };
        Ok(Self {
            miss: MissId(message.miss_id),
            action,
            found,
            epoch: message
                .epoch
                .ok_or(Malformed::Missing {
                    field: "verdict.epoch",
                })?
                .try_into()?,
            expires_in: duration_from_wire("verdict.expires_in", message.expires_in)?,
            once: message.once,
            budget: message.budget.map(|left| Allowance {
                left: left.into(),
                used: message.budget_used.map(Into::into).unwrap_or_default(),
            }),
            grant: message.grant_id,
            reason: message.reason.map(Into::into).unwrap_or_default(),
            would_deny: message.would_deny,
            name_demand: v1::NameDemand::try_from(message.name_demand)
                .map_err(|_| Malformed::Enum {
                    field: "verdict.name_demand",
                    value: message.name_demand,
                })?
                .into(),
            names: names_from_wire("verdict.names", &message.names)?,
            synthetic_only: message.synthetic_only,
        })
    }
}

impl From<&Verdict> for v1::Verdict {
    fn from(verdict: &Verdict) -> Self {
        Self {
            miss_id: verdict.miss.0,
            action: v1::Action::from(verdict.action).into(),
            r#match: Some((&verdict.found).into()),
            epoch: Some(verdict.epoch.into()),
            expires_in: verdict.expires_in.and_then(duration_to_wire),
            once: verdict.once,
            budget: verdict.budget.map(|allowance| allowance.left.into()),
            budget_used: verdict.budget.map(|allowance| allowance.used.into()),
            grant_id: verdict.grant.clone(),
            reason: Some((&verdict.reason).into()),
            would_deny: verdict.would_deny,
            name_demand: v1::NameDemand::from(verdict.name_demand).into(),
            names: verdict.names.iter().map(ToString::to_string).collect(),
            synthetic_only: verdict.synthetic_only,
        }
    }
}
