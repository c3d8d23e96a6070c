//! What a history says: of each destination, what was decided last, and how often it was asked for.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use vnet_proto::model::{Guard, Name, Protocol, Subject};

use crate::policy::Outcome;
use crate::replay::{Recorded, never_opens};

/// A destination, as a rule could be about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Destination {
    /// Connections, datagrams, echoes.
    Flow {
        protocol: Protocol,
        address: IpAddr,
        port: u16,
        /// Bound to the address, in canonical order.
        names: Vec<Name>,
        /// Only a rule that names it opens it.
        guarded: bool,
        /// The guest was given a stand-in for the name: the address says nothing, and is left unspecified.
        synthetic: bool,
    },
    /// The lookup of a name.
    Lookup(Name),
}

/// What was decided of a destination.
#[derive(Debug, Clone)]
pub(super) struct Fact {
    pub(super) vm: String,
    pub(super) destination: Destination,
    /// The last time.
    pub(super) outcome: Outcome,
    /// A mode or the default decided that, and no rule.
    pub(super) by_default: bool,
    /// How often, whatever was decided.
    pub(super) count: u64,
    /// The names in the order in which they were bound, newest first, and how often it was so. The newest is
    /// what the guest most likely meant: it had just looked it up.
    pub(super) orders: BTreeMap<Vec<Name>, u64>,
}

/// All of them, in an order of their own that is always the same.
#[derive(Debug, Default)]
pub(super) struct Facts(Vec<Fact>);

impl Facts {
    pub(super) fn gather(history: &[Recorded]) -> Self {
        let mut ordered: Vec<&Recorded> = history
            .iter()
            .filter(|recorded| recorded.left_out().is_none() && !never_opens(recorded))
            .filter(|recorded| !is_stand_in(recorded))
            .collect();
        ordered.sort_by_key(|recorded| recorded.at);
        let mut facts: BTreeMap<(String, Destination), Fact> = BTreeMap::new();
        for recorded in ordered {
            let destination = destination(&recorded.subject);
            let vm = recorded.vm.view.name.clone();
            let fact = facts
                .entry((vm.clone(), destination.clone()))
                .or_insert_with(|| Fact {
                    vm,
                    destination,
                    outcome: recorded.outcome,
                    by_default: false,
                    count: 0,
                    orders: BTreeMap::new(),
                });
            fact.outcome = recorded.outcome;
            fact.by_default = matches!(recorded.reason.step.as_str(), "default" | "guard");
            fact.count += recorded.count;
            if let Subject::Flow(flow) = &recorded.subject
                && !flow.names.is_empty()
            {
                *fact.orders.entry(flow.names.clone()).or_default() += recorded.count;
            }
        }
        Self(facts.into_values().collect())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Fact> {
        self.0.iter()
    }

    /// Whether names were given synthetic addresses.
    pub(super) fn have_synthetic(&self) -> bool {
        let is = |fact: &Fact| matches!(&fact.destination, Destination::Flow { synthetic: true, .. });
        self.0.iter().any(is)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether a lookup got a synthetic address and was not decided: what is decided is its connections.
fn is_stand_in(recorded: &Recorded) -> bool {
    matches!(recorded.subject, Subject::Lookup(_)) && recorded.reason.subject == "dns.answer"
}

fn destination(subject: &Subject) -> Destination {
    match subject {
        Subject::Flow(flow) => {
            let key = flow.key.judged();
            let synthetic = flow.guards.contains(Guard::Synthetic);
            let mut names = flow.names.clone();
            names.sort();
            names.dedup();
            Destination::Flow {
                protocol: key.protocol,
                address: match key.peer.ip() {
                    _ if synthetic => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                    address => address,
                },
                port: key.peer.port(),
                names,
                // A synthetic address is told by its name, and by nothing else.
                guarded: !flow.guards.without(Guard::Synthetic).is_empty(),
                synthetic,
            }
        }
        Subject::Lookup(lookup) => Destination::Lookup(lookup.name.clone()),
    }
}
