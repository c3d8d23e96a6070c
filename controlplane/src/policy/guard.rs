//! Guarded ranges: which addresses a dataplane guards, and which prefix names a guard.
//!
//! The dataplane judges each flow's guards on the address really dialled and reports them; what is
//! here only keeps regions from reaching into guarded ranges, and says whether a prefix names one. Both
//! planes read the same tables, [`vnet_proto::model::special`]. Addresses that are dialled at others are no
//! guarded ones, but regions keep clear of them likewise: what holds beside them does not hold there.

use std::net::IpAddr;

use ipnet::IpNet;
use vnet_proto::model::special::{LOOPBACK, METADATA, PRIVATE};
use vnet_proto::model::{Guard, GuardSet};

/// The guarded ranges of one dataplane.
#[derive(Debug, Clone, Default)]
pub struct GuardedRanges {
    ranges: Vec<(Guard, IpNet)>,
    /// Addresses that are dialled at others: each stands for itself alone.
    moved: Vec<IpNet>,
}

impl GuardedRanges {
    /// From what a dataplane's Hello says: its guest subnets, the host's addresses.
    /// Loopback, unspecified, link-local and metadata addresses are always there.
    pub fn new(
        subnets: impl IntoIterator<Item = IpNet>,
        host_addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        let mut ranges: Vec<(Guard, IpNet)> = METADATA.iter().map(|net| (Guard::Metadata, *net)).collect();
        ranges.extend(LOOPBACK.iter().map(|net| (Guard::Host, *net)));
        let own = host_addresses.into_iter();
        ranges.extend(own.map(|address| (Guard::Host, IpNet::from(address))));
        ranges.extend(subnets.into_iter().map(|net| (Guard::Guest, net.trunc())));
        ranges.sort_unstable_by_key(|(guard, net)| (*net, *guard));
        ranges.dedup();
        Self {
            ranges,
            moved: Vec::new(),
        }
    }

    /// With addresses that are dialled at others: no region reaches over them, whatever guards them.
    pub fn with_moved(self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        Self {
            moved: addresses.into_iter().map(IpNet::from).collect(),
            ..self
        }
    }

    /// Whether one of them holds an address, or it is dialled at another.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.iter().any(|net| net.contains(&address))
    }

    /// The guards that an address is under, as a dataplane would report them; `from_dns`: a name is
    /// bound to it.
    pub fn guards_of(&self, address: IpAddr, from_dns: bool) -> GuardSet {
        let guards = self
            .ranges
            .iter()
            .filter(|(_, net)| net.contains(&address))
            .map(|(guard, _)| *guard);
        let guards: GuardSet = guards.collect();
        if from_dns && is_inside_private(IpNet::from(address)) {
            guards.with(Guard::PrivateFromDns)
        } else {
            guards
        }
    }

    /// The same of an address that is dialled at another, and is no guest's: by the one that is dialled, and
    /// from DNS by either.
    pub fn guards_of_moved(&self, address: IpAddr, dialled: IpAddr, from_dns: bool) -> GuardSet {
        let guards = self.guards_of(dialled, from_dns).without(Guard::Guest);
        if from_dns && is_inside_private(IpNet::from(address)) {
            guards.with(Guard::PrivateFromDns)
        } else {
            guards
        }
    }

    /// Single addresses that are the host's.
    pub(crate) fn host_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let own = self.ranges.iter().filter(|(guard, _)| *guard == Guard::Host);
        own.filter(|(_, net)| net.prefix_len() == net.max_prefix_len())
            .map(|(_, net)| net.addr())
    }

    /// All of them, and the addresses that are dialled at others.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        let ranges = self.ranges.iter().map(|(_, net)| *net);
        ranges.chain(self.moved.iter().copied())
    }

    /// All of them, with what guards each.
    pub(crate) fn iter_with_guards(&self) -> impl Iterator<Item = (Guard, IpNet)> + '_ {
        self.ranges.iter().copied()
    }

    /// Whether a prefix that matches a flow to `peer` (dialled as `dialled`) names every guard in
    /// `guards`: it lies inside a range of that guard, or is that one address. Nothing names
    /// [`Guard::Daemon`].
    pub(crate) fn names_all(&self, guards: GuardSet, prefix: IpNet, peer: IpAddr, dialled: IpAddr) -> bool {
        let alone = prefix == IpNet::from(peer) || prefix == IpNet::from(dialled);
        guards.iter().all(|guard| match guard {
            Guard::Daemon => false,
            Guard::Synthetic => true,
            Guard::PrivateFromDns => alone || is_inside_private(prefix),
            Guard::Metadata | Guard::Host | Guard::Guest => {
                alone
                    || self
                        .ranges
                        .iter()
                        .any(|(g, range)| *g == guard && range.contains(&prefix))
            }
        })
    }
}

/// The private and special ranges, an address of which, learned from DNS, is under
/// [`Guard::PrivateFromDns`].
pub(crate) fn private_ranges() -> &'static [IpNet] {
    PRIVATE
}

/// Whether a prefix lies inside one private range.
pub(crate) fn is_inside_private(prefix: IpNet) -> bool {
    PRIVATE.iter().any(|range| range.contains(&prefix))
}
