//! A rule of a policy: what it matches, and what it does.

use std::fmt;
use std::time::SystemTime;

use vnet_proto::model::{NameDemand, VmSelector};

use crate::clock::Now;
use crate::policy::FlowTest;

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RuleAction {
    /// Lets through.
    Allow,
    /// Refuses and tells the guest.
    Deny,
    /// Refuses in silence.
    Drop,
    /// Asks a person.
    Ask,
}

impl RuleAction {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Allow, Self::Deny, Self::Drop, Self::Ask];

    /// Whether it refuses.
    pub fn refuses(self) -> bool {
        matches!(self, Self::Deny | Self::Drop)
    }
}

impl fmt::Display for RuleAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Drop => "drop",
            Self::Ask => "ask",
        })
    }
}

/// One rule.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Its name, or `rules[N]` by its place, counted from zero. Inline rules are `--allow "..."`.
    pub label: String,
    /// What it does.
    pub action: RuleAction,
    /// What it matches of a flow.
    pub test: FlowTest,
    /// It is about lookups only.
    pub lookup_only: bool,
    /// What a flow must say of the name, as written; `None`: omitted.
    pub demand: Option<NameDemand>,
    /// When it ends; it matches nothing from then on.
    pub until: Option<SystemTime>,
    /// Which VMs it is for; `None`: all.
    pub vms: Option<VmSelector>,
    /// Its author's words.
    pub comment: String,
    /// Where it stands in its document, from 1; zero for inline rules.
    pub line: u32,
    /// The column there, from 1.
    pub column: u32,
}

impl Rule {
    /// Whether its time is over. What lets through ends by the clock that is never behind, what refuses by
    /// the wall clock: where the two differ, nothing opens early or stays open.
    pub fn is_over(&self, now: Now) -> bool {
        let clock = if self.action.refuses() {
            now.wall
        } else {
            now.steady
        };
        self.until.is_some_and(|until| until <= clock)
    }

    /// What a flow that it lets through must say of its name.
    pub fn name_demand(&self) -> NameDemand {
        match self.test.names {
            Some(_) => self.demand.unwrap_or(NameDemand::ByPort),
            None => NameDemand::Off,
        }
    }

    /// Whether lookups are its business. A rule that refuses or drops only some ports, protocols or
    /// addresses of a name says nothing of the name; one that allows or asks needs the lookup first.
    pub fn is_for_lookups(&self) -> bool {
        let test = &self.test;
        test.names.is_some()
            && (!self.action.refuses()
                || test.prefixes.is_empty()
                    && test.ports.is_empty()
                    && test.protocols == crate::policy::ProtocolSet::ALL)
    }
}
