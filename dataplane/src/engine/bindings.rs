//! What one VM's own lookups taught: name to addresses and back, each with an expiry.
//!
//! Owns the table and its limits. Where an answer comes from, and for how long it teaches, is
//! [`super::gateway::dns`]'s; what follows from a binding is the controlplane's. A binding by itself
//! allows nothing: it only says under which names a destination is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ahash::AHashMap;
use vnet_proto::model::Name;
use vnet_proto::model::special::judged;

use crate::engine::Time;

/// Bindings (a name with one address) of one VM; the oldest goes first.
pub const BINDINGS_MAX: usize = 8_192;
/// Names bound to one address; the oldest goes first. They all travel with each miss.
pub const NAMES_PER_ADDRESS_MAX: usize = 16;
/// Addresses taken from one answer.
pub const ADDRESSES_PER_ANSWER_MAX: usize = 256;

/// The bindings of one VM.
#[derive(Debug)]
pub struct Bindings {
    capacity: usize,
    by_address: AHashMap<IpAddr, Vec<Bound>>,
    /// Every binding by when it was last learned: the first is the oldest.
    by_age: BTreeMap<u64, (IpAddr, Time)>,
    by_expiry: BTreeSet<(Time, u64)>,
    next: u64,
    evicted: u64,
}

/// A name bound to an address. Those of one address are kept oldest first.
#[derive(Debug)]
struct Bound {
    name: Name,
    serial: u64,
    expires_at: Time,
}

impl Default for Bindings {
    fn default() -> Self {
        Self::with_capacity(BINDINGS_MAX)
    }
}

impl Bindings {
    /// An empty table that holds at most so many bindings.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            by_address: AHashMap::new(),
            by_age: BTreeMap::new(),
            by_expiry: BTreeSet::new(),
            next: 0,
            evicted: 0,
        }
    }

    /// Learns that `name` stands for `addresses` for the next `lifetime`. A binding already known lives
    /// on; its end is never drawn nearer. Private addresses are learned too: the engine raises a guard for them
    /// ([`is_private_or_special`](vnet_proto::model::special::is_private_or_special)).
    ///
    /// Returns the addresses whose names are others than before, also by eviction: verdicts that rest
    /// on their names are void.
    pub fn learn(&mut self, now: Time, name: &Name, addresses: &[IpAddr], lifetime: Duration) -> Vec<IpAddr> {
        let mut changed = Vec::new();
        let expires_at = now.saturating_add(lifetime);
        for address in addresses
            .iter()
            .take(ADDRESSES_PER_ANSWER_MAX)
            .copied()
            .map(judged)
        {
            if self.learn_one(now, name, address, expires_at) {
                changed.push(address);
            }
            let crowded = self
                .by_address
                .get(&address)
                .filter(|names| names.len() > NAMES_PER_ADDRESS_MAX);
            if let Some(oldest) = crowded.and_then(|names| names.first()).map(|b| b.serial) {
                self.evict(oldest);
            }
            while self.by_age.len() > self.capacity {
                let Some((&oldest, _)) = self.by_age.first_key_value() else {
                    break;
                };
                changed.extend(self.evict(oldest));
            }
        }
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// The names bound to an address, the newest first.
    pub fn names_of(&self, now: Time, address: IpAddr) -> Vec<Name> {
        let bound = self.by_address.get(&judged(address));
        bound
            .into_iter()
            .flatten()
            .rev()
            .filter(|b| b.expires_at > now)
            .map(|b| b.name.clone())
            .collect()
    }

    /// Ends the bindings whose time is over. Returns the addresses that lost a name.
    pub fn expire(&mut self, now: Time) -> Vec<IpAddr> {
        let mut changed = Vec::new();
        while let Some(&(expires_at, serial)) = self.by_expiry.first()
            && expires_at <= now
        {
            changed.extend(self.remove(serial));
        }
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// When [`Self::expire`] has something to do next.
    pub fn next_expiry(&self) -> Option<Time> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    /// Every binding in force: name, addresses, and for how long from now the last of them holds.
    pub fn in_force(&self, now: Time) -> BTreeMap<Name, (Vec<IpAddr>, Duration)> {
        let mut all: BTreeMap<Name, (Vec<IpAddr>, Duration)> = BTreeMap::new();
        for (address, bound) in &self.by_address {
            for b in bound.iter().filter(|b| b.expires_at > now) {
                let (addresses, expires_in) = all.entry(b.name.clone()).or_default();
                addresses.push(*address);
                *expires_in = (*expires_in).max(b.expires_at - now);
            }
        }
        all.values_mut()
            .for_each(|(addresses, _)| addresses.sort_unstable());
        all
    }

    /// Bindings held now, those whose time is over but not yet swept included.
    pub fn len(&self) -> usize {
        self.by_age.len()
    }

    /// Whether nothing is bound.
    pub fn is_empty(&self) -> bool {
        self.by_age.is_empty()
    }

    /// Bindings that went before their time because a limit was reached.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Whether the names of the address are others than before.
    fn learn_one(&mut self, now: Time, name: &Name, address: IpAddr, expires_at: Time) -> bool {
        let serial = self.next;
        self.next += 1;
        let bound = self.by_address.entry(address).or_default();
        let known = bound
            .iter()
            .position(|b| b.name == *name)
            .map(|at| bound.remove(at));
        let expires_at = known
            .as_ref()
            .map_or(expires_at, |b| b.expires_at.max(expires_at));
        bound.push(Bound {
            name: name.clone(),
            serial,
            expires_at,
        });
        if let Some(old) = &known {
            self.by_age.remove(&old.serial);
            self.by_expiry.remove(&(old.expires_at, old.serial));
        }
        self.by_age.insert(serial, (address, expires_at));
        self.by_expiry.insert((expires_at, serial));
        known.is_none_or(|old| old.expires_at <= now)
    }

    fn evict(&mut self, serial: u64) -> Option<IpAddr> {
        self.evicted += 1;
        self.remove(serial)
    }

    fn remove(&mut self, serial: u64) -> Option<IpAddr> {
        let (address, expires_at) = self.by_age.remove(&serial)?;
        self.by_expiry.remove(&(expires_at, serial));
        let bound = self.by_address.get_mut(&address)?;
        bound.retain(|b| b.serial != serial);
        if bound.is_empty() {
            self.by_address.remove(&address);
        }
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    const fn at(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    #[test]
    fn names_of_an_address_come_newest_first_and_end_with_their_time() {
        let mut bindings = Bindings::default();
        let address = ip("203.0.113.7");
        bindings.learn(at(0), &name("a.test"), &[address], at(60));
        bindings.learn(at(1), &name("b.test"), &[address], at(10));
        assert_eq!(
            bindings.names_of(at(2), address),
            [name("b.test"), name("a.test")]
        );
        assert_eq!(
            bindings.names_of(at(11), address),
            [name("a.test")],
            "ended, though not swept"
        );
        assert_eq!(bindings.next_expiry(), Some(at(11)));
        assert_eq!(bindings.expire(at(11)), [address]);
        assert_eq!(bindings.expire(at(60)), [address]);
        assert!(bindings.is_empty());
        assert_eq!(bindings.next_expiry(), None);
    }

    #[test]
    fn only_what_is_new_counts_as_changed_and_an_end_is_never_drawn_nearer() {
        let mut bindings = Bindings::default();
        let (one, two) = (ip("203.0.113.1"), ip("203.0.113.2"));
        assert_eq!(bindings.learn(at(0), &name("a.test"), &[one], at(100)), [one]);
        assert_eq!(bindings.learn(at(1), &name("a.test"), &[two, one], at(5)), [two]);
        assert_eq!(bindings.names_of(at(50), one), [name("a.test")]);
        assert_eq!(
            bindings.learn(at(200), &name("a.test"), &[one], at(5)),
            [one],
            "it had ended meanwhile"
        );
    }

    #[test]
    fn addresses_that_stand_for_an_ipv4_address_are_that_address() {
        let mut bindings = Bindings::default();
        bindings.learn(at(0), &name("a.test"), &[ip("::ffff:10.0.0.1")], at(60));
        bindings.learn(at(0), &name("b.test"), &[ip("64:ff9b::10.0.0.1")], at(60));
        for spelling in ["10.0.0.1", "64:ff9b::a00:1"] {
            let names = bindings.names_of(at(1), ip(spelling));
            assert_eq!(names, [name("b.test"), name("a.test")], "{spelling}");
        }
    }

    #[test]
    fn at_the_limit_the_oldest_goes_and_is_counted() {
        let mut bindings = Bindings::with_capacity(2);
        let [one, two, three] = [1, 2, 3].map(|n| IpAddr::from([203, 0, 113, n]));
        bindings.learn(at(0), &name("a.test"), &[one, two], at(60));
        bindings.learn(at(1), &name("a.test"), &[one], at(60));
        assert_eq!(
            bindings.learn(at(2), &name("b.test"), &[three], at(60)),
            [two, three]
        );
        assert_eq!((bindings.len(), bindings.evicted()), (2, 1));
        assert!(bindings.names_of(at(3), two).is_empty());
    }

    #[test]
    fn one_address_keeps_its_newest_names() {
        let mut bindings = Bindings::default();
        let address = ip("203.0.113.1");
        for n in 0..=NAMES_PER_ADDRESS_MAX {
            assert_eq!(
                bindings.learn(at(0), &name(&format!("n{n}.test")), &[address], at(60)),
                [address]
            );
        }
        let names = bindings.names_of(at(1), address);
        assert_eq!(names.len(), NAMES_PER_ADDRESS_MAX);
        assert!(!names.contains(&name("n0.test")));
        assert_eq!(bindings.evicted(), 1);
    }

    #[test]
    fn what_is_in_force_is_listed_by_name() {
        let mut bindings = Bindings::default();
        bindings.learn(
            at(0),
            &name("a.test"),
            &[ip("203.0.113.2"), ip("203.0.113.1")],
            at(60),
        );
        let all = bindings.in_force(at(10));
        assert_eq!(
            all[&name("a.test")],
            (vec![ip("203.0.113.1"), ip("203.0.113.2")], at(50))
        );
        assert!(bindings.in_force(at(60)).is_empty());
    }
}
