//! What a rule or grant tests of a flow, and the region in which all tests made so far come out the same.
//!
//! The discipline that makes a verdict's match safe: a region begins as wide as the guarded ranges
//! allow, and each test that is made narrows it by the one field that answered the test. A test that
//! reads names pins the region to one address.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vnet_proto::model::special::judged;
use vnet_proto::model::{FlowMatch, FlowSubject, Guard, Name, PortRange, Protocol};

use crate::policy::{GuardedRanges, NameSet, PortSet, PrefixSet};

/// A set of protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProtocolSet(u8);

impl ProtocolSet {
    /// Every protocol that flows have.
    pub const ALL: Self = Self(0b1111);
    /// What an allow means when it names none.
    pub const TCP_UDP: Self = Self(1 << Protocol::Tcp as u8 | 1 << Protocol::Udp as u8);

    /// One.
    pub fn one(protocol: Protocol) -> Self {
        Self(1 << protocol as u8)
    }

    /// Whether it has one.
    pub fn contains(self, protocol: Protocol) -> bool {
        self.0 & (1 << protocol as u8) != 0
    }

    /// Those that both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether it has all that `other` has.
    pub fn has_all(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    pub(crate) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
}

impl FromIterator<Protocol> for ProtocolSet {
    fn from_iter<I: IntoIterator<Item = Protocol>>(protocols: I) -> Self {
        Self(protocols.into_iter().fold(0, |set, p| set | 1 << p as u8))
    }
}

/// What a rule or grant tests of a flow. Every part that is there must agree.
#[derive(Debug, Clone, Default)]
pub struct FlowTest {
    /// Protocols.
    pub protocols: ProtocolSet,
    /// Destinations; empty: any.
    pub prefixes: PrefixSet,
    /// Ports; empty: any, or none where the protocol has none.
    pub ports: PortSet,
    /// Names that the destination must be bound to; `None`: not asked.
    pub names: Option<Arc<NameSet>>,
}

impl FlowTest {
    /// Whether, names aside, it covers every flow that `other` does. It may say no where several of its
    /// parts together would; it never says yes where one flow is left out.
    pub fn covers_but_for_names(&self, other: &FlowTest) -> bool {
        self.protocols.has_all(other.protocols) && self.covers_ports(other) && self.covers_prefixes(other)
    }

    /// Whether it holds of a flow, guards aside.
    pub(crate) fn covers_flow(&self, protocol: Protocol, address: IpAddr, port: u16, names: &[Name]) -> bool {
        self.protocols.contains(protocol)
            && (self.prefixes.is_empty() || self.prefixes.contains(address))
            && (self.ports.is_empty() || self.ports.range_of(port).is_some())
            && (self.names.as_ref()).is_none_or(|wanted| names.iter().any(|name| wanted.contains(name)))
    }

    /// Whether it has every port that `other` has.
    pub(crate) fn covers_ports(&self, other: &FlowTest) -> bool {
        self.ports.is_empty()
            || !other.ports.is_empty() && other.ports.ranges().iter().all(|inner| self.ports.covers(*inner))
    }

    /// Whether it has every destination that `other` has.
    pub(crate) fn covers_prefixes(&self, other: &FlowTest) -> bool {
        self.prefixes.is_empty()
            || !other.prefixes.is_empty() && other.prefixes.iter().all(|inner| self.prefixes.covers(inner))
    }
}

/// Which addresses of a flow a test looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sides {
    /// The one that the guest sees.
    Visible,
    /// Either: the one that the guest sees, or the one that would be dialled.
    Either,
}

/// Around one flow: where every test made so far comes out as it did for that flow.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    prefix: IpNet,
    ports: PortRange,
    names_consulted: bool,
    /// The flow's address stands for a name that is not resolved: no prefix matches it.
    synthetic: bool,
    /// What opens by name and prefix is taken to match, since the address found is judged later.
    trusting: bool,
}

impl Region {
    /// As wide as the guarded ranges around the flow allow. A flow under a guard, or inside a guarded
    /// range, stands for itself alone: guards are judged on the very address and port.
    pub(crate) fn around(flow: &FlowSubject, guarded: &GuardedRanges) -> Self {
        let peer = flow.key.peer;
        let moved = judged(flow.dialled) != peer.ip();
        let alone = !flow.guards.is_empty() || moved || guarded.holds(peer.ip());
        if alone {
            return Self {
                prefix: IpNet::from(peer.ip()),
                ports: PortRange::one(peer.port()),
                names_consulted: false,
                synthetic: flow.guards.contains(Guard::Synthetic),
                trusting: false,
            };
        }
        let mut region = Self {
            prefix: everything(peer.ip()),
            ports: if flow.key.protocol.has_ports() {
                PortRange::ALL
            } else {
                PortRange::NONE
            },
            names_consulted: false,
            synthetic: false,
            trusting: false,
        };
        for range in guarded.iter() {
            region.exclude(peer.ip(), range);
        }
        region
    }

    /// Makes a test, and narrows the region to where it comes out the same. A test that fails narrows
    /// by one field that fails it; one that holds, by all.
    pub(crate) fn test(&mut self, test: &FlowTest, flow: &FlowSubject, sides: Sides) -> bool {
        let (address, port) = (flow.key.peer.ip(), flow.key.peer.port());
        // The protocol is part of every region, so that reading it narrows nothing.
        if !test.protocols.contains(flow.key.protocol) {
            return false;
        }
        let unknown = self.synthetic && !test.prefixes.is_empty();
        let trusted = unknown && self.trusting && sides == Sides::Visible && test.names.is_some();
        if unknown && !trusted {
            return false;
        }
        let range = test.ports.range_of(port);
        let ports = test.ports.is_empty() || range.is_some();
        let prefix = test
            .prefixes
            .holding(address)
            .min_by_key(|prefix| prefix.prefix_len());
        // Where the dialled address differs, the region is the flow alone.
        let dialled = sides == Sides::Either && test.prefixes.contains(judged(flow.dialled));
        let prefixes = test.prefixes.is_empty() || trusted || prefix.is_some() || dialled;
        if !prefixes && (ports || !test.prefixes.nearest(address).any(|p| self.touches(p))) {
            for prefix in test.prefixes.nearest(address) {
                self.exclude(address, prefix);
            }
            return false;
        }
        if !ports {
            self.exclude_ports(&test.ports, port);
            return false;
        }
        if let Some(names) = &test.names {
            self.consult_names(address);
            if !flow.names.iter().any(|name| names.contains(name)) {
                return false;
            }
        }
        if let Some(prefix) = prefix {
            self.limit(prefix);
        }
        if let Some(range) = range {
            self.limit_ports(range.first(), range.last());
        }
        true
    }

    /// Takes what opens by name and prefix to match an address that is not known yet.
    pub(crate) fn trusting(self) -> Self {
        Self {
            trusting: true,
            ..self
        }
    }

    /// Narrows the ports to the gap around `port` that none of `ports` has.
    pub(crate) fn exclude_ports(&mut self, ports: &PortSet, port: u16) {
        let (before, after) = ports.beside(port);
        if let Some(range) = before {
            self.limit_ports(range.last() + 1, u16::MAX);
        }
        if let Some(range) = after {
            self.limit_ports(0, range.first().saturating_sub(1));
        }
    }

    /// The ports that it has.
    pub(crate) fn ports(&self) -> PortRange {
        self.ports
    }

    fn limit_ports(&mut self, first: u16, last: u16) {
        let narrowed = PortRange::new(self.ports.first().max(first), self.ports.last().min(last));
        // What has no ports keeps none.
        if let Some(ports) = narrowed {
            self.ports = ports;
        }
    }

    /// Something read which names are bound to the address: the region is that address, until its
    /// names change.
    pub(crate) fn consult_names(&mut self, address: IpAddr) {
        self.prefix = IpNet::from(address);
        self.names_consulted = true;
    }

    /// Narrows the region to the widest prefix around `address` that does not touch `range`, which
    /// does not contain `address`.
    pub(crate) fn exclude(&mut self, address: IpAddr, range: IpNet) {
        if !self.touches(range) || range.contains(&address) {
            return;
        }
        let length = common_bits(address, range.addr()) + 1;
        if let Ok(prefix) = IpNet::new(address, length) {
            self.prefix = prefix.trunc();
        }
    }

    /// Whether it and a range share an address.
    pub(crate) fn touches(&self, range: IpNet) -> bool {
        self.prefix.contains(&range) || range.contains(&self.prefix)
    }

    /// Narrows the region to a prefix that contains the flow's address.
    pub(crate) fn limit(&mut self, prefix: IpNet) {
        if prefix.prefix_len() > self.prefix.prefix_len() {
            self.prefix = prefix.trunc();
        }
    }

    /// Whether names were read.
    pub(crate) fn names_consulted(&self) -> bool {
        self.names_consulted
    }

    /// The match.
    pub(crate) fn into_match(self, protocol: Protocol) -> FlowMatch {
        FlowMatch {
            protocol,
            prefix: self.prefix,
            ports: self.ports,
            names_consulted: self.names_consulted,
        }
    }
}

fn everything(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

/// How many leading bits two addresses of one family share.
fn common_bits(a: IpAddr, b: IpAddr) -> u8 {
    let shared = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    };
    u8::try_from(shared).unwrap_or(u8::MAX)
}
