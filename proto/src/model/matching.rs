//! Matches: where a verdict holds. Written once, so that the planes cannot disagree.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::model::flow::{name_from_wire, protocol_from_wire};
use crate::model::{FlowKey, Malformed, Name, Protocol, address_from_bytes, address_to_bytes};
use crate::v1;

/// An inclusive range of ports; `0..=0` is what ICMP has instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self {
        first: 1,
        last: u16::MAX,
    };
    /// What flows without ports have.
    pub const NONE: Self = Self { first: 0, last: 0 };

    /// From `first` to `last`; `None` unless `1 <= first <= last`.
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first != 0 && first <= last).then_some(Self { first, last })
    }

    /// One port; port zero is [`Self::NONE`].
    pub fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// First port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// Last port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether it has a port.
    pub fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL {
            f.write_str("*")
        } else if self.first == self.last {
            self.first.fmt(f)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::ALL);
        }
        let port = |part: &str| -> Result<u16, String> {
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return Err(format!(
                    "{text:?} is not a port (expected one as 443 or a range as 8000-8999)"
                ));
            }
            let port = part.parse().ok().filter(|port| *port != 0);
            port.ok_or_else(|| format!("port {part} is out of range (expected 1 to 65535)"))
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        Self::new(first, last).ok_or_else(|| format!("port range {text} ends before it begins"))
    }
}

/// Where a verdict on flows holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FlowMatch {
    /// Protocol.
    pub protocol: Protocol,
    /// Destination prefix, truncated.
    pub prefix: IpNet,
    /// Destination ports; [`PortRange::NONE`] for ICMP.
    pub ports: PortRange,
    /// Whether the decision looked at the names bound to the address. It then ends when they change.
    pub names_consulted: bool,
}

impl FlowMatch {
    /// The narrowest match that covers a flow: its very destination.
    pub fn exact(key: &FlowKey) -> Self {
        let key = key.judged();
        Self {
            protocol: key.protocol,
            prefix: IpNet::from(key.peer.ip()),
            ports: PortRange::one(key.peer.port()),
            names_consulted: false,
        }
    }

    /// Whether a flow, as it is [judged](FlowKey::judged), lies inside it.
    pub fn matches(&self, key: &FlowKey) -> bool {
        let key = key.judged();
        self.protocol == key.protocol
            && self.ports.contains(key.peer.port())
            && self.prefix.contains(&key.peer.ip())
    }

    /// Whether it stands for one address.
    pub fn is_one_address(&self) -> bool {
        self.prefix.prefix_len() == self.prefix.max_prefix_len()
    }
}

impl fmt::Display for FlowMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.protocol)?;
        if self.is_one_address() {
            match self.prefix.addr() {
                IpAddr::V6(v6) if self.protocol.has_ports() => write!(f, "[{v6}]")?,
                address => address.fmt(f)?,
            }
        } else {
            self.prefix.fmt(f)?;
        }
        if self.protocol.has_ports() {
            write!(f, ":{}", self.ports)?;
        }
        Ok(())
    }
}

impl TryFrom<v1::FlowMatch> for FlowMatch {
    type Error = Malformed;

    fn try_from(message: v1::FlowMatch) -> Result<Self, Malformed> {
        let protocol = protocol_from_wire(message.protocol)?;
        let address = address_from_bytes("match.prefix", &message.prefix)?;
        let prefix = u8::try_from(message.prefix_length)
            .ok()
            .and_then(|length| IpNet::new(address, length).ok())
            .filter(|net| net.trunc() == *net)
            .ok_or_else(|| Malformed::Prefix {
                prefix: format!("{address}/{}", message.prefix_length),
            })?;
        let ports = Malformed::Ports {
            field: "match.ports",
            first: message.first_port,
            last: message.last_port,
        };
        let (Ok(first), Ok(last)) = (
            u16::try_from(message.first_port),
            u16::try_from(message.last_port),
        ) else {
            return Err(ports);
        };
        let range = match (protocol.has_ports(), first, last) {
            (false, 0, 0) => PortRange::NONE,
            (true, _, _) => PortRange::new(first, last).ok_or(ports)?,
            (false, _, _) => return Err(ports),
        };
        let found = Self {
            protocol,
            prefix,
            ports: range,
            names_consulted: message.names_consulted,
        };
        if found.names_consulted && !found.is_one_address() {
            return Err(Malformed::WideNameMatch {
                found: found.to_string(),
            });
        }
        Ok(found)
    }
}

impl From<&FlowMatch> for v1::FlowMatch {
    fn from(found: &FlowMatch) -> Self {
        Self {
            protocol: v1::Protocol::from(found.protocol).into(),
            prefix: address_to_bytes(found.prefix.addr()),
            prefix_length: found.prefix.prefix_len().into(),
            first_port: found.ports.first().into(),
            last_port: found.ports.last().into(),
            names_consulted: found.names_consulted,
        }
    }
}

/// Where a verdict on names holds: on lookups, or on aliases, as [`Match`](crate::model::Match) says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LookupMatch {
    /// This name.
    Exact(Name),
    /// Every name below this one, and not itself.
    Subdomains(Name),
    /// Every name.
    Any,
}

impl LookupMatch {
    /// Whether a name lies inside it.
    pub fn matches(&self, name: &Name) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Subdomains(parent) => name.is_below(parent),
            Self::Any => true,
        }
    }
}

impl fmt::Display for LookupMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Subdomains(name) => write!(f, "*.{name}"),
            Self::Any => f.write_str("*"),
        }
    }
}

/// The names that a message matches. Whether as aliases, the message says beside it.
pub(crate) fn names_match_from_wire(message: &v1::LookupMatch) -> Result<LookupMatch, Malformed> {
    use v1::lookup_match::Kind;
    let name = || name_from_wire("match.name", &message.name);
    match Kind::try_from(message.kind) {
        Ok(Kind::Exact) => name().map(LookupMatch::Exact),
        Ok(Kind::Subdomains) => name().map(LookupMatch::Subdomains),
        Ok(Kind::Any) if message.name.is_empty() => Ok(LookupMatch::Any),
        Ok(Kind::Any) => Err(Malformed::Mismatch { field: "match.name" }),
        Ok(Kind::Unspecified) | Err(_) => Err(Malformed::Enum {
            field: "match.kind",
            value: message.kind,
        }),
    }
}

/// A match of names as a message, of aliases or of lookups.
pub(crate) fn names_match_to_wire(found: &LookupMatch, alias: bool) -> v1::LookupMatch {
    use v1::lookup_match::Kind;
    let (kind, name) = match found {
        LookupMatch::Exact(name) => (Kind::Exact, name.to_string()),
        LookupMatch::Subdomains(name) => (Kind::Subdomains, name.to_string()),
        LookupMatch::Any => (Kind::Any, String::new()),
    };
    v1::LookupMatch {
        kind: kind.into(),
        name,
        alias,
    }
}
