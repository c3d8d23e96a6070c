//! Addresses that the gateway stands for beside its own: destinations that are dialled at others (the host alias
//! is one of them), and those for which it answers ARP.
//!
//! One table for all guests of a network, made once. It is read when a flow begins, and for packets to addresses of
//! the subnet; never for those of flows that are known.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;

use ahash::{AHashMap, AHashSet};

/// Destinations that are dialled at others, and virtual addresses, at most; each.
pub const NAT_MAX: usize = 64;

/// The table.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Nat {
    dialled: AHashMap<Ipv4Addr, IpAddr>,
    answered: AHashSet<Ipv4Addr>,
}

impl Nat {
    /// Of destinations with what they are dialled at, and addresses that ARP is answered for.
    pub fn new(
        dialled: impl IntoIterator<Item = (Ipv4Addr, IpAddr)>,
        answered: impl IntoIterator<Item = Ipv4Addr>,
    ) -> Self {
        Self {
            dialled: dialled.into_iter().collect(),
            answered: answered.into_iter().collect(),
        }
    }

    /// What a destination is dialled at, where that is another address.
    pub fn dialled(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(v4) => self.dialled.get(&v4).copied(),
            IpAddr::V6(_) => None,
        }
    }

    /// Whether the gateway answers ARP for an address beside its own. No guest ever has such a one.
    pub fn is_answered(&self, address: Ipv4Addr) -> bool {
        self.answered.contains(&address)
    }
}

/// Whether an IPv4 address of a network may be a guest's.
pub fn may_be_a_guests(address: Ipv4Addr, subnet: &Ipv4Net, gateway: Ipv4Addr, nat: &Nat) -> bool {
    subnet.contains(&address)
        && address != subnet.network()
        && address != subnet.broadcast()
        && address != gateway
        && !nat.is_answered(address)
}
