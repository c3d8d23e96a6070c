//! Which synthetic address stands for which name, and what those names were found to stand for.
//!
//! Owns the table and its limits. An address is given to another name only when the guest's answer has run
//! out, no flow to it lives, and none of the addresses that nobody has had yet is left; verdicts on it are
//! void then (the caller sees to that). So a program that remembers an address longer than it should keeps
//! meaning the name that it asked for, as far as the range goes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ahash::AHashMap;
use ipnet::{Ipv4Net, Ipv6Net};
use vnet_proto::model::{Epoch, Name, Protocol};

use crate::engine::Time;

/// Where synthetic IPv4 addresses lie: the first half of the range for benchmarks (RFC 2544), which nobody
/// routes.
pub const RANGE_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 16);
/// Where synthetic IPv6 addresses lie: a unique local prefix (RFC 4193).
pub const RANGE_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd73, 0x796e, 0x7468, 0, 0, 0, 0, 0), 112);
/// Names of one VM that have a synthetic address at once. Beyond it lookups fail.
pub const NAMES_MAX: usize = 65_534;
/// For how long the guest may keep an answer.
pub const ANSWER_TTL: Duration = Duration::from_secs(60);
/// For how long an address stays its name's after that, at least.
pub const ANSWER_GRACE: Duration = Duration::from_secs(30);
/// Flows of one VM that wait for a lookup at once.
pub const RESOLVING_MAX: usize = 1_024;
/// Lookups of one VM under way at once.
pub const LOOKUPS_MAX: usize = 256;

/// Addresses kept of one name.
const ADDRESSES_MAX: usize = 16;
/// Destinations of one name that were judged and are remembered; the oldest goes first.
const JUDGED_MAX: usize = 16;
/// Old names looked at for one that may go.
const SCAN_MAX: usize = 256;

/// Its number in the range, from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(u16);

impl Place {
    /// That of an address; `None` for one outside the ranges.
    pub fn of(address: IpAddr) -> Option<Self> {
        let low = match address {
            IpAddr::V4(v4) if RANGE_V4.contains(&v4) => v4.to_bits() & 0xffff,
            IpAddr::V6(v6) if RANGE_V6.contains(&v6) => u32::from(v6.segments()[7]),
            _ => return None,
        };
        // The first address of a range is nobody's.
        u16::try_from(low).ok()?.checked_sub(1).map(Self)
    }

    /// Its IPv4 address.
    pub fn v4(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(RANGE_V4.network().to_bits() + u32::from(self.0) + 1)
    }

    /// Its IPv6 address.
    pub fn v6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(RANGE_V6.network().to_bits() + u128::from(self.0) + 1)
    }

    fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A destination that the controlplane let pass, of one name, under one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) protocol: Protocol,
    pub(super) port: u16,
    pub(super) address: IpAddr,
    pub(super) epoch: Epoch,
    pub(super) until: Option<Time>,
}

/// The names that have synthetic addresses.
#[derive(Debug)]
pub struct Synthetics {
    capacity: usize,
    entries: Vec<Entry>,
    by_name: AHashMap<Name, Place>,
    by_expiry: BTreeSet<(Time, Place)>,
    /// Lookups under way, by their number.
    lookups: AHashMap<u64, Lookup>,
    next_lookup: u64,
    waiting: usize,
    exhausted: u64,
    reused: u64,
    failed: u64,
}

#[derive(Debug)]
struct Entry {
    name: Name,
    expires_at: Time,
    /// What it really stands for, and until when that may be taken for granted.
    found: Option<(Vec<IpAddr>, Time)>,
    /// Which of them is dialled next.
    turn: usize,
    /// Flows that wait for its lookup, by their places.
    waiting: Vec<usize>,
    judged: Vec<Judged>,
}

/// One lookup under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lookup {
    pub(super) place: Place,
    pub(super) query_type: u16,
}

impl Default for Synthetics {
    fn default() -> Self {
        Self::with_capacity(NAMES_MAX)
    }
}

impl Synthetics {
    /// An empty table for at most `capacity` names.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            capacity: capacity.min(NAMES_MAX),
            entries: Vec::new(),
            by_name: AHashMap::new(),
            by_expiry: BTreeSet::new(),
            lookups: AHashMap::new(),
            next_lookup: 0,
            waiting: 0,
            exhausted: 0,
            reused: 0,
            failed: 0,
        }
    }

    /// Whether no name has an address.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Names that have an address.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// What happened so far, by name.
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("synthetic_names", self.entries.len() as u64),
            ("synthetic_exhausted", self.exhausted),
            ("synthetic_reused", self.reused),
            ("synthetic_lookups_failed", self.failed),
        ]
    }

    /// The address of a name that is told to the guest now: the one that it has, or a new one. `in_use` says
    /// whether a flow to an address lives. The second is true for an address that was another name's: whatever
    /// was decided about it is void. `None`: the range is exhausted.
    pub fn tell(&mut self, now: Time, name: &Name, in_use: impl Fn(Place) -> bool) -> Option<(Place, bool)> {
        let expires_at = now + ANSWER_TTL + ANSWER_GRACE;
        if let Some(place) = self.by_name.get(name).copied() {
            self.prolong(place, expires_at);
            return Some((place, false));
        }
        let entry = Entry {
            name: name.clone(),
            expires_at,
            found: None,
            turn: 0,
            waiting: Vec::new(),
            judged: Vec::new(),
        };
        let next = u16::try_from(self.entries.len()).ok().map(Place);
        let (place, reused) = match next.filter(|_| self.entries.len() < self.capacity) {
            Some(place) => {
                self.entries.push(entry);
                (place, false)
            }
            None => {
                let Some(place) = self.oldest_free(now, expires_at, in_use) else {
                    self.exhausted += 1;
                    return None;
                };
                let old = std::mem::replace(self.entries.get_mut(place.index())?, entry);
                self.by_name.remove(&old.name);
                self.by_expiry.remove(&(old.expires_at, place));
                self.lookups.retain(|_, lookup| lookup.place != place);
                self.reused += 1;
                (place, true)
            }
        };
        self.by_name.insert(name.clone(), place);
        self.by_expiry.insert((expires_at, place));
        Some((place, reused))
    }

    /// The one that ran out longest ago and that nothing uses. Those that are in use still are put off, so
    /// that they are not looked at each time.
    fn oldest_free(&mut self, now: Time, expires_at: Time, in_use: impl Fn(Place) -> bool) -> Option<Place> {
        for _ in 0..SCAN_MAX {
            let place = self
                .by_expiry
                .first()
                .filter(|(at, _)| *at <= now)
                .map(|(_, place)| *place)?;
            let waits = self
                .entries
                .get(place.index())
                .is_some_and(|e| !e.waiting.is_empty());
            if !waits && !in_use(place) {
                return Some(place);
            }
            self.prolong(place, expires_at);
        }
        None
    }

    fn prolong(&mut self, place: Place, expires_at: Time) {
        if let Some(entry) = self.entries.get_mut(place.index()) {
            self.by_expiry.remove(&(entry.expires_at, place));
            entry.expires_at = entry.expires_at.max(expires_at);
            self.by_expiry.insert((entry.expires_at, place));
        }
    }

    /// The place of an address that stands for a name.
    pub fn find(&self, address: IpAddr) -> Option<Place> {
        Place::of(address).filter(|place| place.index() < self.entries.len())
    }

    /// The name that an address stands for.
    pub fn name_of(&self, address: IpAddr) -> Option<&Name> {
        let place = self.find(address)?;
        self.entries.get(place.index()).map(|entry| &entry.name)
    }

    /// What a name was found to stand for, from the one whose turn it is on.
    pub(super) fn found(&self, now: Time, place: Place) -> Option<Vec<IpAddr>> {
        let entry = self.entries.get(place.index())?;
        let (addresses, until) = entry.found.as_ref()?;
        (now < *until).then(|| {
            let mut addresses = addresses.clone();
            let turn = entry.turn % addresses.len().max(1);
            addresses.rotate_left(turn);
            addresses
        })
    }

    /// The address that was dialled does not answer: another has its turn.
    pub(in crate::engine) fn pass_turn(&mut self, place: Place) {
        if let Some(entry) = self.entries.get_mut(place.index()) {
            entry.turn = entry.turn.wrapping_add(1);
        }
    }

    /// A flow waits for the lookup of a name. True if one must be started. `None` at a limit.
    pub(super) fn wait(&mut self, place: Place, flow: usize) -> Option<bool> {
        let under_way = self.lookups.values().any(|lookup| lookup.place == place);
        if self.waiting >= RESOLVING_MAX || (!under_way && self.lookups.len() >= LOOKUPS_MAX) {
            return None;
        }
        let entry = self.entries.get_mut(place.index())?;
        entry.waiting.push(flow);
        self.waiting += 1;
        Some(!under_way)
    }

    /// A flow waits no longer.
    pub(in crate::engine) fn leave(&mut self, place: Place, flow: usize) {
        if let Some(entry) = self.entries.get_mut(place.index()) {
            let before = entry.waiting.len();
            entry.waiting.retain(|at| *at != flow);
            self.waiting -= before - entry.waiting.len();
        }
    }

    /// Starts a lookup; its number, and the name.
    pub(super) fn start(&mut self, place: Place, query_type: u16) -> Option<(u64, Name)> {
        let name = self.entries.get(place.index())?.name.clone();
        let number = self.next_lookup;
        self.next_lookup += 1;
        self.lookups.insert(number, Lookup { place, query_type });
        Some((number, name))
    }

    /// What a lookup under way asks for, if anybody still wants to know.
    pub(super) fn under_way(&self, number: u64) -> Option<(Name, u16)> {
        let lookup = self.lookups.get(&number)?;
        let name = self.entries.get(lookup.place.index())?.name.clone();
        Some((name, lookup.query_type))
    }

    /// A lookup came to an end; what it was, if anybody still wants to know.
    pub(super) fn end(&mut self, number: u64) -> Option<(Lookup, Name)> {
        let lookup = self.lookups.remove(&number)?;
        let name = self.entries.get(lookup.place.index())?.name.clone();
        Some((lookup, name))
    }

    /// Keeps what a name stands for, and hands out the flows that waited for it.
    pub(super) fn settle(&mut self, place: Place, mut addresses: Vec<IpAddr>, until: Time) -> Vec<usize> {
        let Some(entry) = self.entries.get_mut(place.index()) else {
            return Vec::new();
        };
        addresses.truncate(ADDRESSES_MAX);
        if addresses.is_empty() {
            self.failed += 1;
            entry.found = None;
        } else {
            entry.found = Some((addresses, until));
        }
        self.waiting -= entry.waiting.len();
        std::mem::take(&mut entry.waiting)
    }

    /// Remembers that a destination of a name may be dialled.
    pub(super) fn note_judged(&mut self, place: Place, judged: Judged) {
        if let Some(entry) = self.entries.get_mut(place.index()) {
            entry.judged.retain(|j| {
                (j.protocol, j.port, j.address) != (judged.protocol, judged.port, judged.address)
            });
            if entry.judged.len() >= JUDGED_MAX {
                entry.judged.remove(0);
            }
            entry.judged.push(judged);
        }
    }

    /// Whether a destination of a name was let pass under this epoch.
    pub(super) fn is_judged(
        &self,
        now: Time,
        place: Place,
        (protocol, port, address): (Protocol, u16, IpAddr),
        epoch: Option<Epoch>,
    ) -> bool {
        self.entries.get(place.index()).is_some_and(|entry| {
            entry.judged.iter().any(|j| {
                (j.protocol, j.port, j.address) == (protocol, port, address)
                    && Some(j.epoch) == epoch
                    && j.until.is_none_or(|until| now < until)
            })
        })
    }

    /// Forgets what was let pass: guards changed.
    pub(in crate::engine) fn forget_judged(&mut self) {
        for entry in &mut self.entries {
            entry.judged.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(i: usize) -> Name {
        format!("n{i}.test").parse().unwrap()
    }

    const S: fn(u64) -> Time = Duration::from_secs;

    #[test]
    fn a_name_keeps_its_address_and_each_name_has_its_own() {
        let mut table = Synthetics::default();
        let (a, _) = table.tell(S(0), &name(1), |_| false).unwrap();
        let (b, _) = table.tell(S(0), &name(2), |_| false).unwrap();
        assert_ne!(a, b);
        assert_eq!(table.tell(S(10_000), &name(1), |_| false), Some((a, false)));
        for address in [IpAddr::from(a.v4()), a.v6().into()] {
            assert_eq!(table.name_of(address), Some(&name(1)));
        }
        assert!(RANGE_V4.contains(&a.v4()) && a.v4() != RANGE_V4.network());
        assert_eq!(table.name_of("198.18.9.9".parse().unwrap()), None);
        assert_eq!(table.name_of("198.19.0.1".parse().unwrap()), None);
    }

    #[test]
    fn an_address_is_given_on_only_when_its_answer_ran_out_and_no_flow_lives() {
        let mut table = Synthetics::with_capacity(2);
        let (first, _) = table.tell(S(0), &name(1), |_| false).unwrap();
        let (second, _) = table.tell(S(1), &name(2), |_| false).unwrap();
        assert_eq!(table.tell(S(89), &name(3), |_| false), None, "answers still hold");
        assert_eq!(
            table.tell(S(91), &name(3), |place| place == first),
            Some((second, true)),
            "a flow to the oldest lives"
        );
        assert_eq!(table.name_of(second.v4().into()), Some(&name(3)));
        assert_eq!(
            table.counters()[1..3],
            [("synthetic_exhausted", 1), ("synthetic_reused", 1)]
        );
    }

    #[test]
    fn the_whole_range_can_be_given_out_and_no_more() {
        let mut table = Synthetics::default();
        let mut refused = 0;
        for i in 0..100_000 {
            refused += usize::from(table.tell(S(0), &name(i), |_| false).is_none());
        }
        assert_eq!((table.len(), refused), (NAMES_MAX, 100_000 - NAMES_MAX));
        let (last, _) = table.tell(S(0), &name(NAMES_MAX - 1), |_| false).unwrap();
        assert_eq!(last.v4(), Ipv4Addr::new(198, 18, 255, 254));
    }

    #[test]
    fn flows_that_wait_and_lookups_under_way_have_a_limit() {
        let mut table = Synthetics::default();
        for i in 0..LOOKUPS_MAX {
            let (place, _) = table.tell(S(0), &name(i), |_| false).unwrap();
            assert_eq!(table.wait(place, i), Some(true));
            table.start(place, 1).unwrap();
        }
        let (one_more, _) = table.tell(S(0), &name(LOOKUPS_MAX), |_| false).unwrap();
        assert_eq!(table.wait(one_more, 0), None, "a lookup too many");
        let (first, _) = table.tell(S(0), &name(0), |_| false).unwrap();
        for i in LOOKUPS_MAX..RESOLVING_MAX {
            assert_eq!(table.wait(first, i), Some(false));
        }
        assert_eq!(table.wait(first, 0), None, "a flow too many");
        table.leave(first, LOOKUPS_MAX);
        assert_eq!(table.wait(first, 0), Some(false));
        assert_eq!(
            table.settle(first, Vec::new(), S(0)).len(),
            RESOLVING_MAX - LOOKUPS_MAX + 1
        );
    }

    #[test]
    fn what_was_judged_holds_for_that_destination_and_epoch_alone() {
        let mut table = Synthetics::default();
        let (place, _) = table.tell(S(0), &name(1), |_| false).unwrap();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let epoch = |counter| Epoch {
            incarnation: 1,
            counter,
        };
        for port in 0..20 {
            table.note_judged(
                place,
                Judged {
                    protocol: Protocol::Tcp,
                    port,
                    address,
                    epoch: epoch(1),
                    until: Some(S(9)),
                },
            );
        }
        let known =
            |now, port, e| table.is_judged(now, place, (Protocol::Tcp, port, address), Some(epoch(e)));
        assert!(known(S(1), 19, 1) && known(S(1), 4, 1));
        assert!(!known(S(1), 3, 1), "the oldest went at the limit");
        assert!(!known(S(1), 19, 2) && !known(S(9), 19, 1));
        assert!(!table.is_judged(S(1), place, (Protocol::Udp, 19, address), Some(epoch(1))));
    }
}
