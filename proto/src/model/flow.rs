//! Flows, lookups and the misses about them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::model::special::judged;
use crate::model::{Epoch, Malformed, MissId, Name, VmId, address_from_bytes, address_to_bytes};
use crate::v1;

/// A protocol that flows have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo, IPv4.
    Icmp,
    /// ICMP echo, IPv6.
    Icmpv6,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Udp, Self::Icmp, Self::Icmpv6];

    /// Whether its flows have ports.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "icmpv6",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|p| p.to_string() == text)
            .ok_or_else(|| format!("{text:?} is not a protocol (expected tcp, udp, icmp or icmpv6)"))
    }
}

impl TryFrom<v1::Protocol> for Protocol {
    type Error = Malformed;

    fn try_from(message: v1::Protocol) -> Result<Self, Malformed> {
        match message {
            v1::Protocol::Tcp => Ok(Self::Tcp),
            v1::Protocol::Udp => Ok(Self::Udp),
            v1::Protocol::Icmp => Ok(Self::Icmp),
            v1::Protocol::Icmpv6 => Ok(Self::Icmpv6),
            v1::Protocol::Unspecified => Err(Malformed::Enum {
                field: "protocol",
                value: 0,
            }),
        }
    }
}

impl From<Protocol> for v1::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Icmp => Self::Icmp,
            Protocol::Icmpv6 => Self::Icmpv6,
        }
    }
}

pub(crate) fn protocol_from_wire(value: i32) -> Result<Protocol, Malformed> {
    v1::Protocol::try_from(value)
        .map_err(|_| Malformed::Enum {
            field: "protocol",
            value,
        })?
        .try_into()
}

/// How a VM's undecided traffic is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The policy's default action holds.
    Enforce,
    /// A default deny becomes a pending request.
    Ask,
    /// Allow, and record what would have been denied.
    Observe,
    /// All guest-initiated traffic is denied and cut.
    Block,
    /// Block, and forwards cut too.
    Quarantine,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Enforce,
        Self::Ask,
        Self::Observe,
        Self::Block,
        Self::Quarantine,
    ];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforce",
            Self::Ask => "ask",
            Self::Observe => "observe",
            Self::Block => "block",
            Self::Quarantine => "quarantine",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|m| m.to_string() == text)
            .ok_or_else(|| {
                format!("{text:?} is not a mode (expected enforce, ask, observe, block or quarantine)")
            })
    }
}

impl From<Mode> for v1::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Enforce,
            Mode::Ask => Self::Ask,
            Mode::Observe => Self::Observe,
            Mode::Block => Self::Block,
            Mode::Quarantine => Self::Quarantine,
        }
    }
}

/// Unspecified is `None`: leave it as it is. `OPEN` is reported, never set.
impl TryFrom<v1::Mode> for Option<Mode> {
    type Error = Malformed;

    fn try_from(message: v1::Mode) -> Result<Self, Malformed> {
        Ok(match message {
            v1::Mode::Unspecified => None,
            v1::Mode::Enforce => Some(Mode::Enforce),
            v1::Mode::Ask => Some(Mode::Ask),
            v1::Mode::Observe => Some(Mode::Observe),
            v1::Mode::Block => Some(Mode::Block),
            v1::Mode::Quarantine => Some(Mode::Quarantine),
            v1::Mode::Open => {
                return Err(Malformed::Enum {
                    field: "mode",
                    value: message as i32,
                });
            }
        })
    }
}

/// A built-in protection that a broad rule does not lift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guard {
    /// Cloud metadata and link-local addresses.
    Metadata,
    /// An address that the dataplane's host owns.
    Host,
    /// A private address learned from DNS.
    PrivateFromDns,
    /// Another guest.
    Guest,
    /// An address where a vnet daemon listens; nothing opens it.
    Daemon,
    /// A synthetic address: it stands for a name that was not resolved. Only
    /// what names that name opens it.
    Synthetic,
}

impl Guard {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Metadata,
        Self::Host,
        Self::PrivateFromDns,
        Self::Guest,
        Self::Daemon,
        Self::Synthetic,
    ];
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Metadata => "metadata",
            Self::Host => "host",
            Self::PrivateFromDns => "private-from-dns",
            Self::Guest => "guest",
            Self::Daemon => "daemon",
            Self::Synthetic => "synthetic",
        })
    }
}

impl From<Guard> for v1::Guard {
    fn from(guard: Guard) -> Self {
        match guard {
            Guard::Metadata => Self::Metadata,
            Guard::Host => Self::Host,
            Guard::PrivateFromDns => Self::PrivateFromDns,
            Guard::Guest => Self::Guest,
            Guard::Daemon => Self::Daemon,
            Guard::Synthetic => Self::Synthetic,
        }
    }
}

fn guard_from_wire(value: i32) -> Result<Guard, Malformed> {
    let refused = Malformed::Enum {
        field: "guards",
        value,
    };
    match v1::Guard::try_from(value) {
        Ok(v1::Guard::Metadata) => Ok(Guard::Metadata),
        Ok(v1::Guard::Host) => Ok(Guard::Host),
        Ok(v1::Guard::PrivateFromDns) => Ok(Guard::PrivateFromDns),
        Ok(v1::Guard::Guest) => Ok(Guard::Guest),
        Ok(v1::Guard::Daemon) => Ok(Guard::Daemon),
        Ok(v1::Guard::Synthetic) => Ok(Guard::Synthetic),
        Ok(v1::Guard::Unspecified) | Err(_) => Err(refused),
    }
}

/// A set of guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct GuardSet(u8);

impl GuardSet {
    /// No guard.
    pub const EMPTY: Self = Self(0);

    /// With one more.
    #[must_use]
    pub fn with(self, guard: Guard) -> Self {
        Self(self.0 | 1 << guard as u8)
    }

    /// Without one.
    #[must_use]
    pub fn without(self, guard: Guard) -> Self {
        Self(self.0 & !(1 << guard as u8))
    }

    /// Whether it has one.
    pub fn contains(self, guard: Guard) -> bool {
        self.0 & (1 << guard as u8) != 0
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those in it.
    pub fn iter(self) -> impl Iterator<Item = Guard> {
        Guard::ALL.into_iter().filter(move |g| self.contains(*g))
    }
}

impl FromIterator<Guard> for GuardSet {
    fn from_iter<I: IntoIterator<Item = Guard>>(guards: I) -> Self {
        guards.into_iter().fold(Self::EMPTY, Self::with)
    }
}

/// A flow's identity inside one VM: addresses as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Protocol.
    pub protocol: Protocol,
    /// The guest's side. The port is the echo identifier for ICMP.
    pub guest: SocketAddr,
    /// The other side. The port is zero for ICMP.
    pub peer: SocketAddr,
}

impl FlowKey {
    /// The flow as it is judged: to the IPv4 address where the guest wrote one as IPv6 ([`judged`]). What
    /// matches, caches and joins flows compares these, so that no spelling goes round a rule.
    #[must_use]
    pub fn judged(self) -> Self {
        let address = judged(self.peer.ip());
        if address == self.peer.ip() {
            return self;
        }
        Self {
            protocol: match self.protocol {
                Protocol::Icmpv6 => Protocol::Icmp,
                other => other,
            },
            peer: SocketAddr::new(address, self.peer.port()),
            ..self
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.protocol.has_ports() {
            write!(f, "{} {}", self.protocol, self.peer)
        } else {
            write!(f, "{} {}", self.protocol, self.peer.ip())
        }
    }
}

/// A flow that a guest wants to open, with the evidence for deciding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowSubject {
    /// Which flow; from the wire it comes [judged](FlowKey::judged).
    pub key: FlowKey,
    /// The address that would really be dialled (differs for the host alias and for NAT64).
    pub dialled: IpAddr,
    /// Names bound to the destination for this VM, newest first.
    pub names: Vec<Name>,
    /// Guards that the destination is under.
    pub guards: GuardSet,
    /// The guest that owns the destination, under [`Guard::Guest`].
    pub peer_vm: Option<VmId>,
}

/// A name that a guest wants to look up, or an alias that the answer has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LookupSubject {
    /// The name.
    pub name: Name,
    /// The record type's number (RFC 1035 §3.2.2).
    pub query_type: u16,
    /// The guest did not ask for it: it is an alias in the answer to a lookup that was allowed.
    pub alias: bool,
}

impl LookupSubject {
    /// A name that a guest asks for.
    pub fn new(name: Name, query_type: u16) -> Self {
        Self {
            name,
            query_type,
            alias: false,
        }
    }

    /// An alias in the answer to a lookup of this type.
    pub fn alias(name: Name, query_type: u16) -> Self {
        Self {
            name,
            query_type,
            alias: true,
        }
    }
}

/// What a miss is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A flow.
    Flow(FlowSubject),
    /// A lookup.
    Lookup(LookupSubject),
}

/// A flow or lookup that the cache does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// Its id.
    pub id: MissId,
    /// Whose it is.
    pub vm: VmId,
    /// What it is about.
    pub subject: Subject,
    /// How long it may be held from now.
    pub hold: Duration,
    /// Packets or queries held for it now.
    pub held: u32,
}

/// A miss for the wire, under the epoch that the dataplane holds.
impl Miss {
    /// The message.
    pub fn to_message(&self, epoch: Option<Epoch>) -> v1::Miss {
        v1::Miss {
            miss_id: self.id.0,
            vm: self.vm.0,
            subject: Some(match &self.subject {
                Subject::Flow(flow) => v1::miss::Subject::Flow(flow.into()),
                Subject::Lookup(lookup) => v1::miss::Subject::Lookup(lookup.into()),
            }),
            hold: duration_to_wire(self.hold),
            epoch: epoch.map(Into::into),
            held: self.held,
        }
    }
}

impl TryFrom<v1::Miss> for Miss {
    type Error = Malformed;

    fn try_from(message: v1::Miss) -> Result<Self, Malformed> {
        Ok(Self {
            id: MissId(message.miss_id),
            vm: VmId(message.vm),
            subject: match message.subject.ok_or(Malformed::Missing {
                field: "miss.subject",
            })? {
                v1::miss::Subject::Flow(flow) => Subject::Flow(flow.try_into()?),
                v1::miss::Subject::Lookup(lookup) => Subject::Lookup(lookup.try_into()?),
            },
            hold: duration_from_wire("miss.hold", message.hold)?
                .ok_or(Malformed::Missing { field: "miss.hold" })?,
            held: message.held,
        })
    }
}

impl TryFrom<v1::FlowSubject> for FlowSubject {
    type Error = Malformed;

    fn try_from(message: v1::FlowSubject) -> Result<Self, Malformed> {
        let protocol = protocol_from_wire(message.protocol)?;
        let guest = address_from_bytes("flow.guest_address", &message.guest_address)?;
        let peer = address_from_bytes("flow.address", &message.address)?;
        let dialled = if message.dialled.is_empty() {
            peer
        } else {
            address_from_bytes("flow.dialled", &message.dialled)?
        };
        // They differ where a flow was read before: its destination is the one that it is judged as.
        let read_before = dialled.is_ipv4() == guest.is_ipv4() && judged(dialled) == peer;
        if guest.is_ipv4() != peer.is_ipv4() && !read_before {
            return Err(Malformed::MixedFamilies {
                field: "flow.guest_address",
            });
        }
        let port = |field: &'static str, value: u32| {
            u16::try_from(value).map_err(|_| Malformed::Ports {
                field,
                first: value,
                last: value,
            })
        };
        let guest_port = port("flow.guest_port", message.guest_port)?;
        let peer_port = port("flow.port", message.port)?;
        if protocol.has_ports() != (peer_port != 0) {
            return Err(Malformed::Ports {
                field: "flow.port",
                first: message.port,
                last: message.port,
            });
        }
        let guards = message
            .guards
            .iter()
            .map(|g| guard_from_wire(*g))
            .collect::<Result<GuardSet, _>>()?;
        Ok(Self {
            key: FlowKey {
                protocol,
                guest: SocketAddr::new(guest, guest_port),
                peer: SocketAddr::new(peer, peer_port),
            }
            .judged(),
            dialled,
            names: names_from_wire("flow.names", &message.names)?,
            guards,
            peer_vm: guards.contains(Guard::Guest).then_some(VmId(message.peer)),
        })
    }
}

impl From<&FlowSubject> for v1::FlowSubject {
    fn from(flow: &FlowSubject) -> Self {
        Self {
            protocol: v1::Protocol::from(flow.key.protocol).into(),
            guest_address: address_to_bytes(flow.key.guest.ip()),
            guest_port: flow.key.guest.port().into(),
            address: address_to_bytes(flow.key.peer.ip()),
            port: flow.key.peer.port().into(),
            dialled: if flow.dialled == flow.key.peer.ip() {
                Vec::new()
            } else {
                address_to_bytes(flow.dialled)
            },
            names: flow.names.iter().map(ToString::to_string).collect(),
            guards: flow.guards.iter().map(|g| v1::Guard::from(g).into()).collect(),
            peer: flow.peer_vm.map_or(0, |vm| vm.0),
        }
    }
}

impl TryFrom<v1::LookupSubject> for LookupSubject {
    type Error = Malformed;

    fn try_from(message: v1::LookupSubject) -> Result<Self, Malformed> {
        Ok(Self {
            name: name_from_wire("lookup.name", &message.name)?,
            query_type: u16::try_from(message.query_type).map_err(|_| Malformed::Range {
                field: "lookup.query_type",
                value: message.query_type.into(),
            })?,
            alias: message.alias,
        })
    }
}

impl From<&LookupSubject> for v1::LookupSubject {
    fn from(lookup: &LookupSubject) -> Self {
        Self {
            name: lookup.name.to_string(),
            query_type: lookup.query_type.into(),
            alias: lookup.alias,
        }
    }
}

/// Reads the names of a field.
pub fn names_from_wire(field: &'static str, names: &[String]) -> Result<Vec<Name>, Malformed> {
    names.iter().map(|name| name_from_wire(field, name)).collect()
}

pub(crate) fn name_from_wire(field: &'static str, text: &str) -> Result<Name, Malformed> {
    Name::from_canonical(text).map_err(|source| Malformed::Name { field, source })
}

pub(crate) fn duration_to_wire(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

pub(crate) fn duration_from_wire(
    field: &'static str,
    message: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Malformed> {
    message
        .map(|d| {
            let seconds = d.seconds.unsigned_abs();
            Duration::try_from(d).map_err(|_| Malformed::Range {
                field,
                value: seconds,
            })
        })
        .transpose()
}
