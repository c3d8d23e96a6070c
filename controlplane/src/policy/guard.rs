//! Guarded ranges: which addresses a dataplane guards, and which prefix names a guard.
//!
//! The dataplane judges each flow's guards on the address really dialled and reports them; what is
//! here only keeps regions from reaching into guarded ranges, and says whether a prefix names one.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use vnet_proto::model::{Guard, GuardSet};

/// The guarded ranges of one dataplane.
#[derive(Debug, Clone, Default)]
pub struct GuardedRanges {
    ranges: Vec<(Guard, IpNet)>,
}

impl GuardedRanges {
    /// From what a dataplane's Hello says: its guest subnets, its host alias, the host's addresses.
    /// Loopback, unspecified, link-local and metadata addresses are always there.
    pub fn new(
        subnets: impl IntoIterator<Item = IpNet>,
        host_alias: Option<IpAddr>,
        host_addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        let mut ranges: Vec<(Guard, IpNet)> = METADATA.iter().map(|net| (Guard::Metadata, *net)).collect();
        ranges.extend(HOST.iter().map(|net| (Guard::Host, *net)));
        let own = host_alias.into_iter().chain(host_addresses);
        ranges.extend(own.map(|address| (Guard::Host, IpNet::from(address))));
        ranges.extend(subnets.into_iter().map(|net| (Guard::Guest, net.trunc())));
        ranges.sort_unstable_by_key(|(guard, net)| (*net, *guard));
        ranges.dedup();
        Self { ranges }
    }

    /// Whether one of them holds an address.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|(_, net)| net.contains(&address))
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

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.ranges.iter().map(|(_, net)| *net)
    }

    /// Whether a prefix that matches a flow to `peer` (dialled as `dialled`) names every guard in
    /// `guards`: it lies inside a range of that guard, or is that one address. Nothing names
    /// [`Guard::Daemon`].
    pub(crate) fn names_all(&self, guards: GuardSet, prefix: IpNet, peer: IpAddr, dialled: IpAddr) -> bool {
        let alone = prefix == IpNet::from(peer) || prefix == IpNet::from(dialled);
        guards.iter().all(|guard| match guard {
            Guard::Daemon => false,
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
/// [`Guard::PrivateFromDns`]. More than a dataplane guards is harmless: it only keeps matches narrower.
pub(crate) fn private_ranges() -> &'static [IpNet] {
    PRIVATE
}

/// Whether a prefix lies inside one private range.
pub(crate) fn is_inside_private(prefix: IpNet) -> bool {
    PRIVATE.iter().any(|range| range.contains(&prefix))
}

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), length))
}

const fn v6(segments: [u16; 8], length: u8) -> IpNet {
    let [a, b, c, d, e, f, g, h] = segments;
    IpNet::V6(Ipv6Net::new_assert(
        std::net::Ipv6Addr::new(a, b, c, d, e, f, g, h),
        length,
    ))
}

/// Link-local (RFC 3927, RFC 4291 §2.5.6) and where clouds serve metadata.
const METADATA: &[IpNet] = &[
    v4(169, 254, 0, 0, 16),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
];

/// Loopback and "this host" in every spelling (RFC 6890 §2.2, RFC 4291 §2.5).
const HOST: &[IpNet] = &[
    v4(0, 0, 0, 0, 8),
    v4(127, 0, 0, 0, 8),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 127),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
];

const PRIVATE: &[IpNet] = &[
    v4(0, 0, 0, 0, 8),
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(127, 0, 0, 0, 8),
    v4(169, 254, 0, 0, 16),
    v4(172, 16, 0, 0, 12),
    v4(192, 0, 0, 0, 24),
    v4(192, 168, 0, 0, 16),
    v4(198, 18, 0, 0, 15),
    v4(224, 0, 0, 0, 3),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 8),
    v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 32),
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];
