//! Which guest holds which IPv4 address of a network.
//!
//! Owns the pool: what DHCP offers and leases, what guests with static addresses claim by ARP, what is
//! kept for one MAC address or one VM. First come, first served; an address is never two guests' at once.
//! The messages are [`crate::engine::gateway::dhcp`]'s, the source checks the engine's.
//!
//! A lease whose time is over stays with its VM until the VM is gone: the engine lets a guest go on using what
//! was bound to its link, so the address must not appear on a second one. Another MAC address of the
//! same VM may have it.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use ipnet::Ipv4Net;
use vnet_proto::model::VmId;

use crate::engine::Time;
use crate::mac::Mac;

/// How long a lease holds unless configured otherwise; gvproxy's.
pub const LEASE_TIME: Duration = Duration::from_secs(3_600);
/// How long an offer waits for its request.
pub const OFFER_TIME: Duration = Duration::from_secs(60);
/// How long a declined address is set aside.
pub const DECLINE_TIME: Duration = Duration::from_secs(600);
/// Addresses held in one network at once.
pub const HOLDINGS_MAX: usize = 8_192;
/// Addresses that one VM holds at once, offers included.
pub const HOLDINGS_PER_VM_MAX: usize = 16;
/// Addresses that one VM may have set aside by declining at once; further ones go back to the pool, so
/// that no guest empties it.
pub const DECLINED_PER_VM_MAX: usize = 4;
/// Clients whose last address is remembered; the oldest goes first.
pub const REMEMBERED_MAX: usize = 1_024;

/// What a pool is made of.
#[derive(Debug, Clone)]
pub struct LeaseConfig {
    /// The guests' subnet.
    pub subnet: Ipv4Net,
    /// Addresses that are nobody's: the gateway, and those that it stands for. The subnet's first and last address
    /// are left out without being named.
    pub reserved: Vec<Ipv4Addr>,
    /// What a client is given before all others, if that is free and it has asked for no other.
    pub first: Option<Ipv4Addr>,
    /// Addresses kept for one MAC address. Those outside the pool are ignored.
    pub fixed: BTreeMap<Mac, Ipv4Addr>,
    /// How long a lease holds.
    pub lease_time: Duration,
}

/// What happened to a pool so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaseCounts {
    /// Offers that could not be made because no address was free.
    pub exhausted: u64,
    /// Addresses set aside because a guest found them in use.
    pub declined: u64,
    /// Claims of addresses that are somebody else's or nobody's.
    pub claims_refused: u64,
    /// Requests refused because of a limit of [`HOLDINGS_MAX`] or [`HOLDINGS_PER_VM_MAX`].
    pub limited: u64,
}

/// The addresses of one network.
#[derive(Debug)]
pub struct Leases {
    config: LeaseConfig,
    reserved: AHashSet<Ipv4Addr>,
    fixed_by_address: AHashMap<Ipv4Addr, Mac>,
    pinned: AHashMap<VmId, Pin>,
    held: BTreeMap<Ipv4Addr, Holding>,
    remembered: AHashMap<(VmId, Mac), Ipv4Addr>,
    remembered_order: VecDeque<(VmId, Mac)>,
    counts: LeaseCounts,
}

/// The address kept for a VM, and for which of its MAC addresses (`None`: any).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pin {
    mac: Option<Mac>,
    address: Ipv4Addr,
}

/// Who holds an address, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holding {
    vm: VmId,
    mac: Mac,
    hold: Hold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Offered { until: Time },
    Leased { until: Time },
    Claimed,
    Declined { until: Time },
}

impl Holding {
    /// Whether it is nobody's any more.
    fn is_over(&self, now: Time) -> bool {
        match self.hold {
            Hold::Offered { until } | Hold::Declined { until } => until <= now,
            Hold::Leased { .. } | Hold::Claimed => false,
        }
    }

    /// Whether this client may have it. A VM's lapsed lease is any of its MAC addresses'.
    fn is_for(&self, vm: VmId, mac: Mac, now: Time) -> bool {
        self.vm == vm
            && match self.hold {
                Hold::Leased { until } => self.mac == mac || until <= now,
                Hold::Offered { .. } | Hold::Claimed => self.mac == mac,
                Hold::Declined { .. } => false,
            }
    }
}

impl Leases {
    /// A pool in which nothing is held.
    pub fn new(config: LeaseConfig) -> Self {
        let mut reserved: AHashSet<Ipv4Addr> = config.reserved.iter().copied().collect();
        if config.subnet.prefix_len() < 31 {
            reserved.extend([config.subnet.network(), config.subnet.broadcast()]);
        }
        let fixed_by_address = config
            .fixed
            .iter()
            .map(|(mac, address)| (*address, *mac))
            .collect();
        Self {
            config,
            reserved,
            fixed_by_address,
            pinned: AHashMap::new(),
            held: BTreeMap::new(),
            remembered: AHashMap::new(),
            remembered_order: VecDeque::new(),
            counts: LeaseCounts::default(),
        }
    }

    /// Keeps an address for one VM (of its MAC addresses for the given one), which then gets no other by DHCP. `false`, and nothing is changed, when
    /// the address is outside the pool, another VM's pin, or held by another VM.
    pub fn pin(&mut self, vm: VmId, mac: Option<Mac>, address: Ipv4Addr) -> bool {
        let taken =
            self.is_pinned_elsewhere(vm, address) || self.held.get(&address).is_some_and(|h| h.vm != vm);
        if !self.is_in_pool(address) || taken {
            return false;
        }
        self.pinned.insert(vm, Pin { mac, address });
        true
    }

    /// Chooses an address for a client and keeps it for [`OFFER_TIME`]: the one kept for it, else the one
    /// it asks for, else the one it has or had last, else the first ([`LeaseConfig::first`]), else the lowest that is free. `None` when there is none.
    pub fn offer(&mut self, vm: VmId, mac: Mac, asked: Option<Ipv4Addr>, now: Time) -> Option<Ipv4Addr> {
        let chosen = self.choose(vm, mac, asked, now);
        let Some(address) = chosen else {
            self.counts.exhausted += 1;
            return None;
        };
        let until = now.saturating_add(OFFER_TIME);
        let current = self
            .held
            .get(&address)
            .filter(|h| !h.is_over(now))
            .map(|h| h.hold);
        match current {
            Some(Hold::Leased { .. } | Hold::Claimed) => Some(address),
            _ => {
                self.withdraw(vm, mac);
                self.hold(
                    address,
                    Holding {
                        vm,
                        mac,
                        hold: Hold::Offered { until },
                    },
                    now,
                )
                .then_some(address)
            }
        }
    }

    /// Leases an address that the client asks for by name: offered to it, its own already, or free. `None`
    /// when it may not have it. Else the address that the same client leased before and has given up by
    /// this, if any.
    pub fn lease(&mut self, vm: VmId, mac: Mac, address: Ipv4Addr, now: Time) -> Option<Option<Ipv4Addr>> {
        if self.kept_for(vm, mac, now).is_some_and(|kept| kept != address)
            || !self.is_available(vm, mac, address, now)
        {
            return None;
        }
        let until = now.saturating_add(self.config.lease_time);
        if !self.hold(
            address,
            Holding {
                vm,
                mac,
                hold: Hold::Leased { until },
            },
            now,
        ) {
            return None;
        }
        self.withdraw(vm, mac);
        let leased = |h: &Holding| h.vm == vm && h.mac == mac && matches!(h.hold, Hold::Leased { .. });
        let before = self
            .held
            .iter()
            .find(|(a, h)| **a != address && leased(h))
            .map(|(a, _)| *a);
        if let Some(before) = before {
            self.held.remove(&before);
        }
        self.remember(vm, mac, address);
        Some(before)
    }

    /// Takes back what was offered to a client that chose another server.
    pub fn withdraw(&mut self, vm: VmId, mac: Mac) {
        self.held
            .retain(|_, h| !(h.vm == vm && h.mac == mac && matches!(h.hold, Hold::Offered { .. })));
    }

    /// A client gives its lease back. Whether it was its own.
    pub fn release(&mut self, vm: VmId, mac: Mac, address: Ipv4Addr) -> bool {
        let own = self.held.get(&address).is_some_and(|h| {
            h.vm == vm && h.mac == mac && matches!(h.hold, Hold::Leased { .. } | Hold::Offered { .. })
        });
        if own {
            self.held.remove(&address);
        }
        own
    }

    /// A client found its address in use by somebody else: it is set aside for [`DECLINE_TIME`]. Whether
    /// it was the client's.
    pub fn decline(&mut self, vm: VmId, mac: Mac, address: Ipv4Addr, now: Time) -> bool {
        if !self.release(vm, mac, address) {
            return false;
        }
        self.counts.declined += 1;
        self.remembered.remove(&(vm, mac));
        let declined =
            |h: &&Holding| h.vm == vm && matches!(h.hold, Hold::Declined { .. }) && !h.is_over(now);
        if self.held.values().filter(declined).count() < DECLINED_PER_VM_MAX {
            let until = now.saturating_add(DECLINE_TIME);
            self.held.insert(
                address,
                Holding {
                    vm,
                    mac,
                    hold: Hold::Declined { until },
                },
            );
        }
        true
    }

    /// A guest uses or announces an address (ARP, duplicate address detection). Whether it is this
    /// guest's from now on: it was free, or its own already.
    pub fn claim(&mut self, vm: VmId, mac: Mac, address: Ipv4Addr, now: Time) -> bool {
        if let Some(holding) = self.held.get(&address)
            && holding.vm == vm
            && matches!(holding.hold, Hold::Leased { .. } | Hold::Claimed)
        {
            return true;
        }
        let claimed = self.is_available(vm, mac, address, now)
            && self.hold(
                address,
                Holding {
                    vm,
                    mac,
                    hold: Hold::Claimed,
                },
                now,
            );
        if !claimed {
            self.counts.claims_refused += 1;
        }
        claimed
    }

    /// Whether an address is kept for a MAC address.
    pub fn is_kept(&self, mac: Mac) -> bool {
        self.config.fixed.contains_key(&mac)
    }

    /// The VM whose an address is, by lease or claim.
    pub fn owner(&self, address: Ipv4Addr) -> Option<VmId> {
        self.holder(address).map(|(vm, _)| vm)
    }

    /// The same, and which of its MAC addresses has it.
    pub fn holder(&self, address: Ipv4Addr) -> Option<(VmId, Mac)> {
        self.held
            .get(&address)
            .filter(|h| matches!(h.hold, Hold::Leased { .. } | Hold::Claimed))
            .map(|h| (h.vm, h.mac))
    }

    /// A VM's link is gone: all that it held is free, and its pin is void. What its clients had last is remembered.
    pub fn release_vm(&mut self, vm: VmId) {
        self.held.retain(|_, h| h.vm != vm);
        self.pinned.remove(&vm);
    }

    /// Every address leased or claimed, lowest first.
    pub fn in_use(&self) -> impl Iterator<Item = (Ipv4Addr, Mac, VmId)> + '_ {
        self.held
            .iter()
            .filter(|(_, h)| matches!(h.hold, Hold::Leased { .. } | Hold::Claimed))
            .map(|(address, h)| (*address, h.mac, h.vm))
    }

    /// What happened so far.
    pub fn counts(&self) -> LeaseCounts {
        self.counts
    }

    fn choose(&self, vm: VmId, mac: Mac, asked: Option<Ipv4Addr>, now: Time) -> Option<Ipv4Addr> {
        if let Some(kept) = self.kept_for(vm, mac, now) {
            return self.is_available(vm, mac, kept, now).then_some(kept);
        }
        let available = |address: &Ipv4Addr| self.is_available(vm, mac, *address, now);
        let current = || {
            let own = |h: &Holding| h.vm == vm && h.mac == mac && matches!(h.hold, Hold::Leased { .. });
            self.held
                .iter()
                .find(|(_, h)| own(h))
                .map(|(address, _)| *address)
        };
        asked
            .filter(available)
            .or_else(current)
            .or_else(|| self.remembered.get(&(vm, mac)).copied().filter(available))
            .or_else(|| self.config.first.filter(available))
            .or_else(|| self.config.subnet.hosts().take(HOLDINGS_MAX * 2).find(available))
    }

    /// The one address that this client gets by DHCP, if one is kept for it.
    fn kept_for(&self, vm: VmId, mac: Mac, now: Time) -> Option<Ipv4Addr> {
        let pinned = self
            .pinned
            .get(&vm)
            .filter(|pin| pin.mac.is_none_or(|m| m == mac))
            .map(|pin| pin.address);
        // Two guests may have the same MAC address; what is kept for it goes to the first.
        let fixed = || {
            self.config
                .fixed
                .get(&mac)
                .copied()
                .filter(|a| self.is_available(vm, mac, *a, now))
        };
        pinned.or_else(fixed)
    }

    fn is_in_pool(&self, address: Ipv4Addr) -> bool {
        self.config.subnet.contains(&address) && !self.reserved.contains(&address)
    }

    fn is_pinned_elsewhere(&self, vm: VmId, address: Ipv4Addr) -> bool {
        self.pinned
            .iter()
            .any(|(other, pin)| pin.address == address && *other != vm)
    }

    /// Whether this client may have an address now.
    fn is_available(&self, vm: VmId, mac: Mac, address: Ipv4Addr, now: Time) -> bool {
        let own_pin = |pin: &Pin| pin.address == address && pin.mac.is_none_or(|m| m == mac);
        self.is_in_pool(address)
            && !self.is_pinned_elsewhere(vm, address)
            && (self.pinned.get(&vm).is_some_and(own_pin)
                || self
                    .fixed_by_address
                    .get(&address)
                    .is_none_or(|kept| *kept == mac))
            && self
                .held
                .get(&address)
                .is_none_or(|h| h.is_over(now) || h.is_for(vm, mac, now))
    }

    /// Writes a holding, within the limits.
    fn hold(&mut self, address: Ipv4Addr, holding: Holding, now: Time) -> bool {
        self.held.retain(|_, h| !h.is_over(now));
        if !self.held.contains_key(&address) {
            let of_vm = self.held.values().filter(|h| h.vm == holding.vm).count();
            if self.held.len() >= HOLDINGS_MAX || of_vm >= HOLDINGS_PER_VM_MAX {
                self.counts.limited += 1;
                return false;
            }
        }
        self.held.insert(address, holding);
        true
    }

    fn remember(&mut self, vm: VmId, mac: Mac, address: Ipv4Addr) {
        if self.remembered.insert((vm, mac), address).is_none() {
            self.remembered_order.push_back((vm, mac));
        }
        while self.remembered_order.len() > REMEMBERED_MAX {
            if let Some(oldest) = self.remembered_order.pop_front() {
                self.remembered.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: VmId = VmId(1);
    const B: VmId = VmId(2);
    const MAC_A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const MAC_B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 127, last)
    }

    const fn at(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    fn pool(prefix: u8, fixed: &[(Mac, Ipv4Addr)]) -> Leases {
        Leases::new(LeaseConfig {
            subnet: Ipv4Net::new(ip(0), prefix).unwrap(),
            reserved: vec![ip(1), ip(254)],
            first: None,
            fixed: fixed.iter().copied().collect(),
            lease_time: LEASE_TIME,
        })
    }

    #[test]
    fn the_first_guest_gets_the_first_address_and_keeps_it() {
        let mut leases = pool(24, &[]);
        assert_eq!(leases.offer(A, MAC_A, None, at(0)), Some(ip(2)));
        assert_eq!(leases.owner(ip(2)), None, "only offered");
        assert_eq!(leases.lease(A, MAC_A, ip(2), at(1)), Some(None));
        assert_eq!(leases.holder(ip(2)), Some((A, MAC_A)));
        assert_eq!(leases.offer(A, MAC_A, None, at(9_000)), Some(ip(2)));
        assert_eq!(
            leases.offer(B, MAC_B, None, at(9_000)),
            Some(ip(3)),
            "a lapsed lease stays its VM's"
        );
    }

    #[test]
    fn the_first_address_may_be_another_and_is_given_to_who_asks_for_none() {
        let first_is = |address| {
            let mut leases = pool(24, &[(MAC_B, ip(10))]);
            leases.config.first = Some(address);
            leases
        };
        let mut leases = first_is(ip(9));
        assert_eq!(leases.offer(B, MAC_B, None, at(0)), Some(ip(10)), "kept for it");
        assert_eq!(
            leases.offer(A, MAC_A, Some(ip(7)), at(0)),
            Some(ip(7)),
            "asked for"
        );
        assert_eq!(
            leases.offer(VmId(3), Mac([2, 0, 0, 0, 0, 3]), None, at(0)),
            Some(ip(9))
        );
        assert_eq!(
            leases.offer(VmId(4), Mac([2, 0, 0, 0, 0, 4]), None, at(0)),
            Some(ip(2))
        );
        // Kept for another, or nobody's at all, it is not given.
        for taken in [ip(10), ip(254), Ipv4Addr::new(10, 0, 0, 9)] {
            assert_eq!(
                first_is(taken).offer(A, MAC_A, None, at(0)),
                Some(ip(2)),
                "{taken}"
            );
        }
    }

    #[test]
    fn the_address_asked_for_is_given_if_it_is_free_and_in_the_pool() {
        let mut leases = pool(24, &[]);
        assert_eq!(leases.offer(A, MAC_A, Some(ip(77)), at(0)), Some(ip(77)));
        assert_eq!(leases.offer(B, MAC_B, Some(ip(77)), at(0)), Some(ip(2)));
        for nobodys in [ip(0), ip(1), ip(254), ip(255), Ipv4Addr::new(10, 0, 0, 9)] {
            assert_eq!(
                leases.offer(B, MAC_B, Some(nobodys), at(0)),
                Some(ip(2)),
                "{nobodys}"
            );
            assert_eq!(leases.lease(B, MAC_B, nobodys, at(0)), None, "{nobodys}");
            assert!(!leases.claim(B, MAC_B, nobodys, at(0)), "{nobodys}");
        }
    }

    #[test]
    fn an_offer_that_is_not_taken_up_is_free_again() {
        let mut leases = pool(24, &[]);
        leases.offer(A, MAC_A, None, at(0));
        assert_eq!(leases.offer(B, MAC_B, Some(ip(2)), at(59)), Some(ip(3)));
        assert_eq!(leases.offer(B, MAC_B, Some(ip(2)), at(60)), Some(ip(2)));
        assert_eq!(leases.lease(A, MAC_A, ip(2), at(61)), None);
    }

    #[test]
    fn a_claimed_address_is_first_come_first_served() {
        let mut leases = pool(24, &[]);
        assert!(leases.claim(A, MAC_A, ip(2), at(0)));
        assert!(leases.claim(A, MAC_A, ip(2), at(1)));
        assert!(!leases.claim(B, MAC_B, ip(2), at(2)));
        assert_eq!(leases.offer(B, MAC_B, Some(ip(2)), at(90_000)), Some(ip(3)));
        assert_eq!(leases.counts().claims_refused, 1);
        leases.release_vm(A);
        assert_eq!(leases.owner(ip(2)), None);
        assert!(leases.claim(B, MAC_B, ip(2), at(3)));
    }

    #[test]
    fn kept_addresses_go_to_their_mac_or_vm_alone() {
        let mut leases = pool(24, &[(MAC_B, ip(2))]);
        assert_eq!(leases.offer(A, MAC_A, Some(ip(2)), at(0)), Some(ip(3)));
        assert!(!leases.claim(A, MAC_A, ip(2), at(0)));
        assert_eq!(leases.offer(B, MAC_B, Some(ip(9)), at(0)), Some(ip(2)));
        assert_eq!(
            leases.lease(B, MAC_B, ip(9), at(0)),
            None,
            "another one is kept for it"
        );

        let pinned = VmId(3);
        let mac = Mac([2, 0, 0, 0, 0, 3]);
        assert!(leases.pin(pinned, Some(mac), ip(50)));
        assert!(!leases.pin(A, None, ip(50)) && !leases.pin(A, None, ip(1)));
        assert_eq!(leases.offer(A, MAC_A, Some(ip(50)), at(0)), Some(ip(3)));
        assert_eq!(leases.offer(pinned, mac, None, at(0)), Some(ip(50)));
        assert!(leases.claim(pinned, mac, ip(50), at(0)));
    }

    #[test]
    fn a_second_guest_with_a_kept_mac_gets_another_address() {
        let mut leases = pool(24, &[(MAC_A, ip(2))]);
        assert_eq!(leases.lease(A, MAC_A, ip(2), at(0)), Some(None));
        assert_eq!(leases.offer(B, MAC_A, None, at(0)), Some(ip(3)));
        assert_eq!(leases.lease(B, MAC_A, ip(3), at(0)), Some(None));
    }

    #[test]
    fn a_client_has_one_lease() {
        let mut leases = pool(24, &[]);
        leases.lease(A, MAC_A, ip(2), at(0));
        assert_eq!(leases.lease(A, MAC_A, ip(7), at(1)), Some(Some(ip(2))));
        assert_eq!(leases.in_use().collect::<Vec<_>>(), [(ip(7), MAC_A, A)]);
    }

    #[test]
    fn an_empty_pool_is_counted() {
        let mut leases = pool(30, &[]);
        assert_eq!(leases.offer(A, MAC_A, None, at(0)), Some(ip(2)));
        assert_eq!(leases.offer(B, MAC_B, None, at(0)), None);
        assert_eq!(leases.counts().exhausted, 1);
    }

    #[test]
    fn one_vm_cannot_empty_the_pool() {
        let mut leases = pool(24, &[]);
        for n in 0..u8::try_from(HOLDINGS_PER_VM_MAX).unwrap() {
            assert!(leases.claim(A, MAC_A, ip(100 + n), at(0)));
        }
        assert!(!leases.claim(A, MAC_A, ip(200), at(0)));
        assert_eq!(leases.counts().limited, 1);

        for _ in 0..50 {
            let address = leases.offer(B, MAC_B, None, at(0)).unwrap();
            leases.lease(B, MAC_B, address, at(0)).unwrap();
            assert!(leases.decline(B, MAC_B, address, at(0)));
        }
        assert_eq!(leases.counts().declined, 50);
        let aside = leases
            .held
            .values()
            .filter(|h| matches!(h.hold, Hold::Declined { .. }))
            .count();
        assert_eq!(aside, DECLINED_PER_VM_MAX);
        assert_eq!(leases.offer(B, MAC_B, Some(ip(2)), at(599)), Some(ip(6)));
        assert_eq!(
            leases.offer(B, MAC_B, Some(ip(2)), at(600)),
            Some(ip(2)),
            "no longer set aside"
        );
    }

    #[test]
    fn only_the_holder_releases() {
        let mut leases = pool(24, &[]);
        leases.lease(A, MAC_A, ip(2), at(0));
        assert!(!leases.release(B, MAC_B, ip(2)) && !leases.decline(B, MAC_B, ip(2), at(0)));
        assert!(leases.release(A, MAC_A, ip(2)));
        assert_eq!(leases.owner(ip(2)), None);
        assert_eq!(
            leases.offer(A, MAC_A, None, at(1)),
            Some(ip(2)),
            "its last one again"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut leases = pool(16, &[]);
        for n in 0..u32::try_from(REMEMBERED_MAX).unwrap() + 5 {
            let address = leases.offer(VmId(n), MAC_A, None, at(0)).unwrap();
            leases.lease(VmId(n), MAC_A, address, at(0)).unwrap();
            leases.release_vm(VmId(n));
        }
        assert_eq!(leases.remembered.len(), REMEMBERED_MAX);
        assert_eq!(leases.remembered_order.len(), REMEMBERED_MAX);
    }
}
