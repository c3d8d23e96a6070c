//! Targets: what a grant, an inline rule or a question is about, and the one way to write it as text.
//!
//! The text is what `vnetctl allow`, `--allow` and every list show: `tcp 192.0.2.7:443`,
//! `udp 10.0.0.0/8:53`, `tcp [2001:db8::]/32:443`, `icmp 192.0.2.7`, `any 10.0.0.0/8`,
//! `domain *.example.com:443`, `lookup example.com`, `forward 127.0.0.1:8080:80/tcp`. [`Target`]'s `Display` writes what its `FromStr` reads.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::model::{
    FlowKey, FlowSubject, ForwardTarget, ForwardTargetError, Guard, Malformed, Name, NameError, NamePattern,
    PortRange, Protocol, parse_prefix,
};
use crate::v1;

/// What a grant, an inline rule or a question is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Addresses.
    Address {
        /// Protocol. `None`: any in a deny, tcp and udp in an allow.
        protocol: Option<Protocol>,
        /// Destination prefix, truncated.
        prefix: IpNet,
        /// Ports. `None`: every port. With ports and no protocol: tcp and udp.
        ports: Option<PortRange>,
    },
    /// A name, and connections to the addresses bound to it.
    Name {
        /// Which names.
        pattern: NamePattern,
        /// Ports of the connections. `None`: every port, tcp and udp.
        ports: Option<PortRange>,
        /// Only the lookup, no connections.
        lookup_only: bool,
    },
    /// A forward that a VM asks for itself, into that VM.
    Forward(ForwardTarget),
}

impl Target {
    /// The very destination of a flow, as it is [judged](FlowKey::judged).
    pub fn of_flow(key: &FlowKey) -> Self {
        let key = key.judged();
        Self::Address {
            protocol: Some(key.protocol),
            prefix: IpNet::from(key.peer.ip()),
            ports: key.protocol.has_ports().then(|| PortRange::one(key.peer.port())),
        }
    }

    /// What a flow is asked about as: its very destination; of a synthetic address, the name and port that it
    /// stands for.
    pub fn of_subject(flow: &FlowSubject) -> Self {
        match flow
            .names
            .first()
            .filter(|_| flow.guards.contains(Guard::Synthetic))
        {
            Some(name) => Self::Name {
                pattern: NamePattern::Exact(name.clone()),
                ports: flow
                    .key
                    .protocol
                    .has_ports()
                    .then(|| PortRange::one(flow.key.peer.port())),
                lookup_only: false,
            },
            None => Self::of_flow(&flow.key),
        }
    }

    /// A name to look up, with connections to its addresses.
    pub fn of_name(name: Name) -> Self {
        Self::Name {
            pattern: NamePattern::Exact(name),
            ports: None,
            lookup_only: false,
        }
    }

    /// Reads a target from a command line's words, as `["tcp", "192.0.2.7:443"]`.
    ///
    /// # Errors
    /// One sentence that says what was found and what was expected.
    pub fn from_words<S: AsRef<str>>(words: &[S]) -> Result<Self, TargetError> {
        match words {
            [one] => one.as_ref().parse(),
            [kind, rest] => parse(kind.as_ref(), rest.as_ref()),
            [] => Err(TargetError::Empty),
            [_, _, extra, ..] => Err(TargetError::Extra(extra.as_ref().to_owned())),
        }
    }
}

/// Why a text is not a target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// There is nothing.
    #[error("the destination is empty (expected one as \"tcp 192.0.2.7:443\" or \"domain *.example.com\")")]
    Empty,
    /// One word where two are needed.
    #[error("{0:?} lacks its kind or its destination (expected both, as in \"tcp 192.0.2.7:443\")")]
    OneWord(String),
    /// More than two words.
    #[error("{0:?} is one word too many (expected two, as in \"tcp 192.0.2.7:443\")")]
    Extra(String),
    /// The first word is nothing known.
    #[error(
        "{0:?} is not a kind of destination (expected tcp, udp, icmp, icmpv6, any, domain, lookup or forward)"
    )]
    Kind(String),
    /// The address or prefix.
    #[error("{0}")]
    Prefix(String),
    /// The ports.
    #[error("{0}")]
    Ports(String),
    /// Ports where there are none.
    #[error("{kind} has no ports; write {kind} {rest} without them")]
    NoPorts {
        /// The first word.
        kind: String,
        /// The destination without its ports.
        rest: String,
    },
    /// An IPv6 address with ports but without brackets.
    #[error("{0:?} is ambiguous; put an IPv6 address in brackets before its ports, as [2001:db8::1]:443")]
    Brackets(String),
    /// The address is of the other family than the protocol.
    #[error("{protocol} does not run over {prefix} (icmp is IPv4, icmpv6 is IPv6)")]
    Family {
        /// The protocol.
        protocol: Protocol,
        /// The destination.
        prefix: IpNet,
    },
    /// The name.
    #[error(transparent)]
    Name(#[from] crate::model::NameError),
    /// The forward.
    #[error(transparent)]
    Forward(#[from] ForwardTargetError),
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            [] => Err(TargetError::Empty),
            [one] => Err(TargetError::OneWord((*one).to_owned())),
            [kind, rest] => parse(kind, rest),
            [_, _, extra, ..] => Err(TargetError::Extra((*extra).to_owned())),
        }
    }
}

fn parse(kind: &str, rest: &str) -> Result<Target, TargetError> {
    match kind {
        "domain" | "lookup" => {
            let lookup_only = kind == "lookup";
            let (name, ports) = match rest.split_once(':') {
                Some((name, ports)) => (name, Some(ports)),
                None => (rest, None),
            };
            if lookup_only && ports.is_some() {
                return Err(TargetError::NoPorts {
                    kind: kind.to_owned(),
                    rest: name.to_owned(),
                });
            }
            Ok(Target::Name {
                pattern: name.parse()?,
                ports: parse_ports(ports)?,
                lookup_only,
            })
        }
        "forward" => Ok(Target::Forward(rest.parse()?)),
        "any" => address(None, kind, rest),
        _ => {
            let protocol = kind
                .parse::<Protocol>()
                .map_err(|_| TargetError::Kind(kind.to_owned()))?;
            address(Some(protocol), kind, rest)
        }
    }
}

fn address(protocol: Option<Protocol>, kind: &str, rest: &str) -> Result<Target, TargetError> {
    let (prefix, ports) = split_ports(rest)?;
    let prefix = parse_prefix(&prefix).map_err(TargetError::Prefix)?;
    if ports.is_some() && protocol.is_some_and(|p| !p.has_ports()) {
        return Err(TargetError::NoPorts {
            kind: kind.to_owned(),
            rest: prefix_text(prefix),
        });
    }
    let fits = match protocol {
        Some(Protocol::Icmp) => prefix.addr().is_ipv4(),
        Some(Protocol::Icmpv6) => prefix.addr().is_ipv6(),
        Some(Protocol::Tcp | Protocol::Udp) | None => true,
    };
    if let Some(protocol) = protocol.filter(|_| !fits) {
        return Err(TargetError::Family { protocol, prefix });
    }
    Ok(Target::Address {
        protocol,
        prefix,
        ports: parse_ports(ports.as_deref())?,
    })
}

/// Splits `ADDRESS[/LENGTH][:PORTS]`, where an IPv6 address with ports stands in brackets: the
/// length may be inside them or behind them.
fn split_ports(rest: &str) -> Result<(String, Option<String>), TargetError> {
    let own = str::to_owned;
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (inside, tail) = bracketed
            .split_once(']')
            .ok_or_else(|| TargetError::Prefix(format!("{rest:?} lacks its ]")))?;
        let (length, ports) = match tail.split_once(':') {
            Some((length, ports)) => (length, Some(own(ports))),
            None => (tail, None),
        };
        if !length.is_empty() && !length.starts_with('/') {
            return Err(TargetError::Prefix(format!(
                "{length:?} after ] is neither /LENGTH nor :PORTS"
            )));
        }
        return Ok((format!("{inside}{length}"), ports));
    }
    match rest.matches(':').count() {
        0 => Ok((own(rest), None)),
        1 => {
            let (prefix, ports) = rest.split_once(':').unwrap_or((rest, ""));
            Ok((own(prefix), Some(own(ports))))
        }
        // A bare IPv6 address or prefix: a port after it could not be told from its last group.
        _ if rest.rsplit_once('/').is_some_and(|(_, tail)| tail.contains(':')) => {
            Err(TargetError::Brackets(own(rest)))
        }
        _ => Ok((own(rest), None)),
    }
}

fn parse_ports(ports: Option<&str>) -> Result<Option<PortRange>, TargetError> {
    ports
        .filter(|p| *p != "*")
        .map(|p| p.parse().map_err(TargetError::Ports))
        .transpose()
}

/// A prefix as it is written: one of a single address without its length.
pub(super) fn prefix_text(prefix: IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() {
        prefix.addr().to_string()
    } else {
        prefix.to_string()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address {
                protocol,
                prefix,
                ports,
            } => {
                match protocol {
                    Some(protocol) => write!(f, "{protocol} ")?,
                    None => f.write_str("any ")?,
                }
                match (prefix.addr(), ports) {
                    (IpAddr::V6(v6), Some(ports)) => {
                        write!(f, "[{v6}]")?;
                        if prefix.prefix_len() != prefix.max_prefix_len() {
                            write!(f, "/{}", prefix.prefix_len())?;
                        }
                        write!(f, ":{}", port_text(*ports))
                    }
                    (_, Some(ports)) => write!(f, "{}:{}", prefix_text(*prefix), port_text(*ports)),
                    (_, None) => f.write_str(&prefix_text(*prefix)),
                }
            }
            Self::Name {
                pattern,
                ports,
                lookup_only,
            } => {
                write!(f, "{} {pattern}", if *lookup_only { "lookup" } else { "domain" })?;
                match ports {
                    Some(ports) => write!(f, ":{}", port_text(*ports)),
                    None => Ok(()),
                }
            }
            Self::Forward(forward) => write!(f, "forward {forward}"),
        }
    }
}

/// Every port is written out, so that it reads back as ports that were given.
fn port_text(ports: PortRange) -> String {
    if ports == PortRange::ALL {
        "1-65535".to_owned()
    } else {
        ports.to_string()
    }
}

impl TryFrom<v1::Target> for Target {
    type Error = Malformed;

    fn try_from(message: v1::Target) -> Result<Self, Malformed> {
        let ports = |ports: Option<v1::PortRange>| {
            ports
                .map(|ports| {
                    let last = if ports.last == 0 { ports.first } else { ports.last };
                    let refused = Malformed::Ports {
                        field: "target.ports",
                        first: ports.first,
                        last,
                    };
                    match (u16::try_from(ports.first), u16::try_from(last)) {
                        (Ok(first), Ok(last)) => PortRange::new(first, last).ok_or(refused),
                        _ => Err(refused),
                    }
                })
                .transpose()
        };
        match message.kind.ok_or(Malformed::Missing { field: "target" })? {
            v1::target::Kind::Address(address) => {
                let protocol = match v1::Protocol::try_from(address.protocol) {
                    Ok(v1::Protocol::Unspecified) => None,
                    Ok(protocol) => Some(protocol.try_into()?),
                    Err(_) => {
                        return Err(Malformed::Enum {
                            field: "target.protocol",
                            value: address.protocol,
                        });
                    }
                };
                if address.prefix.is_empty() {
                    return Err(Malformed::Missing {
                        field: "target.prefix",
                    });
                }
                let prefix = parse_prefix(&address.prefix).map_err(|text| Malformed::Text {
                    field: "target.prefix",
                    text,
                })?;
                let ports = ports(address.ports)?;
                let refused = |text: String| Malformed::Text {
                    field: "target",
                    text,
                };
                match protocol {
                    Some(protocol) if !protocol.has_ports() && ports.is_some() => {
                        Err(refused(format!("{protocol} has no ports")))
                    }
                    Some(protocol @ (Protocol::Icmp | Protocol::Icmpv6))
                        if prefix.addr().is_ipv4() != (protocol == Protocol::Icmp) =>
                    {
                        Err(refused(TargetError::Family { protocol, prefix }.to_string()))
                    }
                    _ => Ok(Self::Address {
                        protocol,
                        prefix,
                        ports,
                    }),
                }
            }
            v1::target::Kind::Name(name) => {
                let pattern = pattern_from_wire(&name.name).map_err(|source| Malformed::Name {
                    field: "target.name",
                    source,
                })?;
                let ports = ports(name.ports)?;
                if name.lookup_only && ports.is_some() {
                    return Err(Malformed::Mismatch {
                        field: "target.ports",
                    });
                }
                Ok(Self::Name {
                    pattern,
                    ports,
                    lookup_only: name.lookup_only,
                })
            }
            v1::target::Kind::Forward(forward) => {
                let refused = |text: String| Malformed::Text {
                    field: "target.forward",
                    text,
                };
                let listen = forward.listen.parse().map_err(|_| {
                    refused(format!(
                        "{:?} is not an address and port (expected one as 127.0.0.1:8080)",
                        forward.listen
                    ))
                })?;
                let protocol = forward.protocol().try_into()?;
                let port = forward.guest_port;
                let guest_port = u16::try_from(port)
                    .map_err(|_| refused(format!("guest_port is {port} (expected 1 to 65535)")))?;
                ForwardTarget::new(protocol, listen, guest_port)
                    .map(Self::Forward)
                    .map_err(|error| refused(error.to_string()))
            }
        }
    }
}

/// A pattern as a program may send it: what a person types, or the canonical form of any name that a guest
/// may ask for, odd bytes as `\DDD`.
fn pattern_from_wire(text: &str) -> Result<NamePattern, NameError> {
    text.parse().or_else(|error| {
        let canonical = match text.strip_prefix("*.") {
            Some(parent) => Name::from_canonical(parent).map(NamePattern::Subdomains),
            None => Name::from_canonical(text).map(NamePattern::Exact),
        };
        canonical.map_err(|_| error)
    })
}

impl From<&Target> for v1::Target {
    fn from(target: &Target) -> Self {
        let ports = |ports: &Option<PortRange>| {
            ports.map(|p| v1::PortRange {
                first: p.first().into(),
                last: p.last().into(),
            })
        };
        let kind = match target {
            Target::Address {
                protocol,
                prefix,
                ports: range,
            } => v1::target::Kind::Address(v1::AddressTarget {
                protocol: protocol.map_or(v1::Protocol::Unspecified, Into::into).into(),
                prefix: prefix_text(*prefix),
                ports: ports(range),
            }),
            Target::Name {
                pattern,
                ports: range,
                lookup_only,
            } => v1::target::Kind::Name(v1::NameTarget {
                name: pattern.to_string(),
                ports: ports(range),
                lookup_only: *lookup_only,
            }),
            Target::Forward(forward) => v1::target::Kind::Forward(v1::ForwardTarget {
                protocol: v1::Protocol::from(forward.protocol()).into(),
                listen: forward.listen().to_string(),
                guest_port: forward.guest_port().into(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_a_guest_may_ask_for_survives_the_wire() {
        let labels: [&[&[u8]]; 4] = [
            &[b"se cret data", b"exfil", b"test"],
            &[b"a.b", b"7"],
            &[b"\\", b"*"],
            &[b"ok", b"7"],
        ];
        for labels in labels {
            let name = Name::from_labels(labels.iter().copied()).unwrap();
            for pattern in [
                NamePattern::Exact(name.clone()),
                NamePattern::Subdomains(name.clone()),
            ] {
                let target = Target::Name {
                    pattern,
                    ports: None,
                    lookup_only: false,
                };
                assert_eq!(Target::try_from(v1::Target::from(&target)).unwrap(), target);
            }
        }
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        for text in [
            "tcp 192.0.2.7:443",
            "udp 10.0.0.0/8:53",
            "tcp 10.0.0.0/8:8000-8999",
            "forward 127.0.0.1:8080:80/tcp",
            "forward [::1]:53:5353/udp",
            "icmp 192.0.2.7",
            "icmpv6 2001:db8::1",
            "any 10.0.0.0/8",
            "any 10.0.0.0/8:53",
            "tcp 2001:db8::/32",
            "tcp [2001:db8::]/32:443",
            "tcp [2001:db8::1]:443",
            "domain *.github.com:443",
            "domain github.com",
            "lookup github.com",
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            let words: Vec<&str> = text.split(' ').collect();
            assert_eq!(Target::from_words(&words).unwrap(), target);
            assert_eq!(Target::try_from(v1::Target::from(&target)).unwrap(), target);
        }
        let every: Target = "tcp 192.0.2.7:*".parse().unwrap();
        assert_eq!(every.to_string(), "tcp 192.0.2.7");
        let inside: Target = "tcp [2001:db8::/32]:443".parse().unwrap();
        assert_eq!(inside.to_string(), "tcp [2001:db8::]/32:443");
    }

    #[test]
    fn what_does_not_mean_one_thing_is_refused() {
        for text in [
            "",
            "tcp",
            "192.0.2.7:443",
            "tcp 192.0.2.7:443 now",
            "TCP 192.0.2.7:443",
            "sctp 192.0.2.7:443",
            "tcp 192.0.2.7:0",
            "tcp 192.0.2.7:65536",
            "tcp 192.0.2.7:9-8",
            "tcp 192.0.2.7:",
            "tcp 10.0.0.1/8",
            "tcp 2001:db8::/32:443",
            "tcp [2001:db8::1",
            "tcp [2001:db8::1]443",
            "icmp 192.0.2.7:80",
            "icmp 2001:db8::1",
            "icmpv6 192.0.2.7",
            "domain 192.0.2.7",
            "domain a*.example.com",
            "lookup example.com:443",
            "tcp example.com:443",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn malformed_targets_are_refused_from_the_wire() {
        let refused = |kind| Target::try_from(v1::Target { kind }).unwrap_err();
        let address = |prefix: &str, protocol: i32, ports| {
            Some(v1::target::Kind::Address(v1::AddressTarget {
                protocol,
                prefix: prefix.into(),
                ports,
            }))
        };
        let port = |first, last| Some(v1::PortRange { first, last });
        assert!(matches!(refused(None), Malformed::Missing { .. }));
        assert!(matches!(refused(address("", 1, None)), Malformed::Missing { .. }));
        assert!(matches!(
            refused(address("10.0.0.1/8", 1, None)),
            Malformed::Text { .. }
        ));
        assert!(matches!(
            refused(address("10.0.0.1", 9, None)),
            Malformed::Enum { .. }
        ));
        assert!(matches!(
            refused(address("10.0.0.1", 1, port(0, 0))),
            Malformed::Ports { .. }
        ));
        assert!(matches!(
            refused(address("10.0.0.1", 1, port(9, 8))),
            Malformed::Ports { .. }
        ));
        assert!(matches!(
            refused(address("10.0.0.1", 3, port(9, 0))),
            Malformed::Text { .. }
        ));
        assert!(matches!(refused(address("::1", 3, None)), Malformed::Text { .. }));
        let name = |ports, lookup_only| {
            Some(v1::target::Kind::Name(v1::NameTarget {
                name: "a.test".into(),
                ports,
                lookup_only,
            }))
        };
        assert!(matches!(
            refused(name(port(1, 0), true)),
            Malformed::Mismatch { .. }
        ));
        assert!(
            Target::try_from(v1::Target {
                kind: name(port(1, 0), false)
            })
            .is_ok()
        );
    }
}
