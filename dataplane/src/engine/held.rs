//! What is held while a miss is open: which flows and lookups wait for which question.
//!
//! Flows to the same destination join one miss. A miss ends when it is answered, or when nothing
//! waits for it any more.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ahash::HashMap;
use vnet_proto::model::{FlowKey, Match, MissId, Name, Protocol, VmId};

/// Misses open at once in one VM. Beyond it, what is new is refused.
pub const MISSES_MAX: usize = 4_096;
/// Flows that wait at once in one VM.
pub const HELD_FLOWS_MAX: usize = 8_192;
/// Datagrams kept of one held UDP flow, the oldest.
pub const DATAGRAMS_MAX: usize = 4;
/// Bytes kept of one held UDP flow.
pub const DATAGRAM_BYTES_MAX: usize = 16 << 10;

/// Differences of a hold smaller than this change nothing.
const HOLD_STEP: Duration = Duration::from_millis(500);

/// What all flows that join one miss have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// Protocol.
    pub protocol: Protocol,
    /// Destination as it is judged.
    pub peer: SocketAddr,
    /// What would be dialled, where that is another address.
    pub dialled: Option<IpAddr>,
    /// The other guest that it belongs to. Whoever has the address next is another question.
    pub neighbour: Option<VmId>,
}

/// An open miss.
#[derive(Debug)]
pub enum HeldMiss {
    /// Flows to one destination.
    Flows {
        /// Where they want to go.
        target: Target,
        /// Their places in the flow table, in the order they came.
        flows: Vec<usize>,
        /// How long each is held from its arrival.
        hold: Duration,
        /// Names bound to the destination, as the session was told last.
        names: Vec<Name>,
    },
    /// A lookup, with everything that joined it (the gateway's DNS holds the queries).
    Lookup {
        /// The name.
        name: Name,
        /// The type that was asked first.
        query_type: u16,
    },
    /// An alias in answers to lookups ([`crate::engine::aliases`] has the answers).
    Alias {
        /// The alias.
        name: Name,
        /// The type that was asked for where it was met first.
        query_type: u16,
    },
}

/// The open misses of one VM.
pub struct Held {
    vm: VmId,
    next: u64,
    misses: HashMap<MissId, HeldMiss>,
    by_target: HashMap<Target, MissId>,
    by_name: HashMap<Name, MissId>,
    by_alias: HashMap<Name, MissId>,
    flows: usize,
    /// How long a flow is held when nothing else is said.
    pub hold: Duration,
}

impl Held {
    /// Nothing held. Ids carry the VM in their high bits, so that the session can route answers.
    pub fn new(vm: VmId, hold: Duration) -> Self {
        Self {
            vm,
            next: 1,
            misses: HashMap::default(),
            by_target: HashMap::default(),
            by_name: HashMap::default(),
            by_alias: HashMap::default(),
            flows: 0,
            hold,
        }
    }

    /// Open misses.
    pub fn len(&self) -> usize {
        self.misses.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.misses.is_empty()
    }

    /// An open miss.
    pub fn get(&self, miss: MissId) -> Option<&HeldMiss> {
        self.misses.get(&miss)
    }

    /// Adds a flow. The miss it waits for, how many flows wait for it now, and for how long from now;
    /// `None` at a limit.
    pub fn join_flow(&mut self, target: Target, flow: usize) -> Option<(MissId, usize, Duration)> {
        if self.flows >= HELD_FLOWS_MAX {
            return None;
        }
        let miss = match self.by_target.get(&target) {
            Some(miss) => *miss,
            None => {
                let hold = self.hold;
                let miss = self.open(HeldMiss::Flows {
                    target,
                    flows: Vec::new(),
                    hold,
                    names: Vec::new(),
                })?;
                self.by_target.insert(target, miss);
                miss
            }
        };
        let Some(HeldMiss::Flows { flows, hold, .. }) = self.misses.get_mut(&miss) else {
            return None;
        };
        flows.push(flow);
        self.flows += 1;
        Some((miss, flows.len(), *hold))
    }

    /// Adds a lookup. The miss it waits for, and whether that is new; `None` at the limit.
    pub fn join_lookup(&mut self, name: &Name, query_type: u16) -> Option<(MissId, bool)> {
        if let Some(miss) = self.by_name.get(name) {
            return Some((*miss, false));
        }
        let miss = self.open(HeldMiss::Lookup {
            name: name.clone(),
            query_type,
        })?;
        self.by_name.insert(name.clone(), miss);
        Some((miss, true))
    }

    /// Adds an answer that has an alias. The miss it waits for, and whether that is new; `None` at the limit.
    pub fn join_alias(&mut self, name: &Name, query_type: u16) -> Option<(MissId, bool)> {
        if let Some(miss) = self.by_alias.get(name) {
            return Some((*miss, false));
        }
        let miss = self.open(HeldMiss::Alias {
            name: name.clone(),
            query_type,
        })?;
        self.by_alias.insert(name.clone(), miss);
        Some((miss, true))
    }

    fn open(&mut self, held: HeldMiss) -> Option<MissId> {
        if self.misses.len() >= MISSES_MAX {
            return None;
        }
        let miss = crate::message::miss_id(self.vm, self.next);
        self.next += 1;
        self.misses.insert(miss, held);
        Some(miss)
    }

    /// A person is asked: flows of this miss may wait for so long. The flows, for new deadlines; none when
    /// that is what they may already: a flow that joins moves nobody else's deadline.
    pub fn extend(&mut self, miss: MissId, new_hold: Duration) -> &[usize] {
        match self.misses.get_mut(&miss) {
            Some(HeldMiss::Flows { flows, hold, .. }) => {
                if hold.abs_diff(new_hold) < HOLD_STEP {
                    return &[];
                }
                *hold = new_hold;
                flows
            }
            _ => &[],
        }
    }

    /// The session is told of these names.
    pub fn note_names(&mut self, miss: MissId, told: &[Name]) {
        if let Some(HeldMiss::Flows { names, .. }) = self.misses.get_mut(&miss) {
            names.clear();
            names.extend_from_slice(told);
        }
    }

    /// A flow no longer waits. True when its miss ended with it.
    pub fn leave(&mut self, miss: MissId, flow: usize) -> bool {
        let Some(HeldMiss::Flows { flows, target, .. }) = self.misses.get_mut(&miss) else {
            return false;
        };
        let before = flows.len();
        flows.retain(|f| *f != flow);
        self.flows -= before - flows.len();
        if !flows.is_empty() {
            return false;
        }
        let target = *target;
        self.by_target.remove(&target);
        self.misses.remove(&miss);
        true
    }

    /// Takes a miss out: it is answered.
    pub fn take(&mut self, miss: MissId) -> Option<HeldMiss> {
        let held = self.misses.remove(&miss)?;
        match &held {
            HeldMiss::Flows { target, flows, .. } => {
                self.by_target.remove(target);
                self.flows -= flows.len();
            }
            HeldMiss::Lookup { name, .. } => drop(self.by_name.remove(name)),
            HeldMiss::Alias { name, .. } => drop(self.by_alias.remove(name)),
        }
        Some(held)
    }

    /// The miss that a name waits for.
    pub fn lookup_miss(&self, name: &Name) -> Option<MissId> {
        self.by_name.get(name).copied()
    }

    /// The miss that an alias waits for.
    pub fn alias_miss(&self, name: &Name) -> Option<MissId> {
        self.by_alias.get(name).copied()
    }

    /// Open misses whose every flow or name lies inside a match.
    pub fn covered_by(&self, found: &Match) -> Vec<MissId> {
        let covers = |held: &HeldMiss| match (held, found) {
            (HeldMiss::Flows { target, .. }, Match::Flow(found)) => {
                // The guest's own side never matters to a match.
                let guest = SocketAddr::new(unspecified_like(target.peer.ip()), 0);
                found.matches(&FlowKey {
                    protocol: target.protocol,
                    guest,
                    peer: target.peer,
                })
            }
            (HeldMiss::Lookup { name, .. }, Match::Lookup(found))
            | (HeldMiss::Alias { name, .. }, Match::Alias(found)) => found.matches(name),
            _ => false,
        };
        self.misses
            .iter()
            .filter(|(_, held)| covers(held))
            .map(|(miss, _)| *miss)
            .collect()
    }

    /// Every open miss.
    pub fn all(&self) -> Vec<MissId> {
        self.misses.keys().copied().collect()
    }
}

fn unspecified_like(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::from([0u8; 4]),
        IpAddr::V6(_) => IpAddr::from([0u8; 16]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(peer: &str) -> Target {
        Target {
            protocol: Protocol::Tcp,
            peer: peer.parse().unwrap(),
            dialled: None,
            neighbour: None,
        }
    }

    #[test]
    fn flows_to_one_destination_share_a_miss_until_the_last_leaves() {
        let mut held = Held::new(VmId(3), Duration::from_secs(30));
        let (miss, count, _) = held.join_flow(to("10.0.0.1:80"), 7).unwrap();
        assert_eq!((miss.0 >> 40, count), (3, 1));
        assert_eq!(held.join_flow(to("10.0.0.1:80"), 8).unwrap().0, miss);
        assert_ne!(held.join_flow(to("10.0.0.1:81"), 9).unwrap().0, miss);
        let guests = Target {
            neighbour: Some(VmId(4)),
            ..to("10.0.0.1:80")
        };
        assert_ne!(
            held.join_flow(guests, 10).unwrap().0,
            miss,
            "another owner, another question"
        );
        assert!(!held.leave(miss, 7));
        assert!(held.leave(miss, 8));
        assert_eq!(held.len(), 2);
    }

    #[test]
    fn limits_refuse_what_is_new_and_joining_goes_on() {
        let mut held = Held::new(VmId(1), Duration::from_secs(30));
        for i in 0..MISSES_MAX {
            assert!(
                held.join_flow(to(&format!("10.0.{}.{}:80", i / 256, i % 256)), i)
                    .is_some()
            );
        }
        assert!(held.join_flow(to("10.1.0.0:80"), 1).is_none());
        assert!(held.join_lookup(&"a.test".parse().unwrap(), 1).is_none());
        for i in MISSES_MAX..HELD_FLOWS_MAX {
            assert!(held.join_flow(to("10.0.0.0:80"), i).is_some());
        }
        assert!(held.join_flow(to("10.0.0.0:80"), 1).is_none());
        for miss in held.all() {
            held.take(miss);
        }
        assert!(held.is_empty() && held.flows == 0 && held.by_target.is_empty());
    }
}
