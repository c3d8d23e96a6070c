//! `tests`: what a policy's author expects of it, asked of the real evaluator whenever the policy is loaded.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use vnet_proto::model::{FlowKey, FlowSubject, LookupSubject, Name, PortRange, Protocol, VmSelector};

use crate::clock::Now;
use crate::grant::{VmGrants, VmInstance, VmView};
use crate::policy::{
    Context, Effective, GuardedRanges, Modes, Outcome, Policy, PolicyError, PolicyErrors, PolicyInForce,
    decide_flow, decide_lookup,
};

/// Destinations that the tests of a document may name.
pub const PROBES_MAX: usize = 10_000;

/// The address that a name stands for in tests (RFC 5737).
pub(crate) const BOUND_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 254);

/// One of `tests`.
#[derive(Debug, Clone)]
pub struct PolicyTest {
    /// Its name in messages.
    pub label: String,
    /// The VM that it is about.
    pub vm: VmView,
    /// What is expected.
    pub probes: Vec<Probe>,
}

/// A destination, and what is expected of it.
#[derive(Debug, Clone)]
pub struct Probe {
    /// As written.
    pub text: String,
    /// What it means.
    pub destination: Destination,
    /// `Allow`, `Deny` (which `drop` is as well) or `Ask`.
    pub expected: Outcome,
    /// Where it stands, from 1.
    pub line: u32,
    /// The column there.
    pub column: u32,
}

/// What a test asks about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A connection, datagram or echo to an address.
    Address(Protocol, SocketAddr),
    /// The lookup of a name, and then the connection to what it is bound to.
    Named(Protocol, Name, u16),
    /// A lookup alone.
    Lookup(Name),
}

impl std::str::FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "(expected one as \"tcp api.example.com:443\", \"udp 192.0.2.1:53\", \"icmp 192.0.2.1\" or \
                        \"domain example.com\")";
        let wrong = || format!("{text:?} is not a destination {expected}");
        let mut words = text.split_ascii_whitespace();
        let (Some(word), Some(rest), None) = (words.next(), words.next(), words.next()) else {
            return Err(wrong());
        };
        if matches!(word, "domain" | "lookup") {
            return rest
                .parse()
                .map(Self::Lookup)
                .map_err(|error| format!("{error} {expected}"));
        }
        let protocol: Protocol = word.parse().map_err(|_| wrong())?;
        let (host, port) = if protocol.has_ports() {
            let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
            let port: PortRange = port.parse().map_err(|error| format!("{text:?}: {error}"))?;
            if port.first() != port.last() {
                return Err(format!("{text:?} has more than one port {expected}"));
            }
            (host, port.first())
        } else {
            (rest, 0)
        };
        let bare = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        match bare.unwrap_or(host).parse::<IpAddr>() {
            Ok(address) if address.is_ipv6() && protocol.has_ports() && bare.is_none() => Err(wrong()),
            Ok(address) => Ok(Self::Address(protocol, SocketAddr::new(address, port))),
            Err(_) => {
                let name: Name = host.parse().map_err(|error| format!("{text:?}: {error}"))?;
                Ok(Self::Named(protocol, name, port))
            }
        }
    }
}

/// What one destination came to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    outcome: Outcome,
    because: String,
}

impl Policy {
    /// Runs the policy's own tests, as they come out at `now`. `source` is its path, for messages.
    ///
    /// # Errors
    /// Each test that fails: what was expected, what came of it, and by which rule or step.
    pub fn run_tests(&self, source: &str, now: Now) -> Result<(), PolicyErrors> {
        let mut problems = Vec::new();
        for test in &self.tests {
            let claimed = PolicyInForce {
                name: source,
                revision: 0,
                policy: self,
            };
            let effective = Effective::compose(now, &test.vm, Some(claimed), None, Modes::default());
            for probe in &test.probes {
                let found = ask(&effective, &test.vm, &probe.destination);
                let refused = matches!(found.outcome, Outcome::Deny | Outcome::Drop);
                if found.outcome == probe.expected || refused && probe.expected == Outcome::Deny {
                    continue;
                }
                problems.push(PolicyError {
                    source_name: source.to_owned(),
                    line: probe.line,
                    column: probe.column,
                    text: format!(
                        "{}: {:?} is {} for {} (expected {}): {}",
                        test.label,
                        probe.text,
                        Word(found.outcome),
                        test.vm.name,
                        Word(probe.expected),
                        found.because,
                    ),
                });
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(PolicyErrors(problems))
        }
    }

    /// What one of its tests would come to: `Allow`, `Ask`, or `Deny` (which `drop` is as well). Without a
    /// selector it is about a VM that `appliesTo` claims.
    pub fn answers(&self, vm: Option<&VmSelector>, destination: &Destination, now: Now) -> Outcome {
        let vm = vm_of(vm.or(self.applies_to.as_ref()));
        let claimed = PolicyInForce {
            name: "",
            revision: 0,
            policy: self,
        };
        let effective = Effective::compose(now, &vm, Some(claimed), None, Modes::default());
        match ask(&effective, &vm, destination).outcome {
            Outcome::Drop => Outcome::Deny,
            outcome => outcome,
        }
    }

    /// How many destinations its tests name.
    pub fn probes(&self) -> usize {
        self.tests.iter().map(|test| test.probes.len()).sum()
    }
}

struct Word(Outcome);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Outcome::Allow => "allow",
            Outcome::Deny => "deny",
            Outcome::Drop => "drop",
            Outcome::Ask => "ask",
        })
    }
}

/// The VM that a test is about: one that the selector claims.
pub(crate) fn vm_of(selector: Option<&VmSelector>) -> VmView {
    let name = selector
        .and_then(VmSelector::name)
        .unwrap_or("test")
        .replace('*', "x");
    VmView {
        name,
        labels: selector.map_or_else(BTreeMap::new, |s| s.labels().clone()),
        instance: VmInstance("test".to_owned()),
    }
}

/// Asks in a network of the default form, where nobody was granted anything.
fn ask(effective: &Effective, vm: &VmView, destination: &Destination) -> Found {
    let subnet = ipnet::IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 127, 0), 24));
    let host_alias = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 254));
    let guarded = GuardedRanges::new([subnet], []).with_moved([host_alias]);
    let context = Context {
        vm,
        policy: effective,
        grants: &VmGrants::default(),
        guarded: &guarded,
        peer: None,
    };
    let lookup = |name: &Name| {
        let subject = LookupSubject::new(name.clone(), 1);
        let decision = decide_lookup(&context, &subject);
        Found {
            outcome: decision.outcome,
            because: decision.reason.text,
        }
    };
    let flow = |protocol, peer: SocketAddr, names: Vec<Name>| {
        let (address, from_dns) = (peer.ip(), !names.is_empty());
        let (dialled, guards) = if address == host_alias {
            let dialled = Ipv4Addr::LOCALHOST.into();
            (dialled, guarded.guards_of_moved(address, dialled, from_dns))
        } else {
            (address, guarded.guards_of(address, from_dns))
        };
        let subject = FlowSubject {
            key: FlowKey {
                protocol,
                guest: SocketAddr::new(
                    if peer.is_ipv4() {
                        Ipv4Addr::UNSPECIFIED.into()
                    } else {
                        std::net::Ipv6Addr::UNSPECIFIED.into()
                    },
                    0,
                ),
                peer,
            },
            dialled,
            names,
            guards,
            peer_vm: None,
        };
        let decision = decide_flow(&context, &subject);
        Found {
            outcome: decision.outcome,
            because: decision.reason.text,
        }
    };
    match destination {
        Destination::Lookup(name) => lookup(name),
        Destination::Address(protocol, peer) => flow(*protocol, *peer, Vec::new()),
        Destination::Named(protocol, name, port) => {
            let found = lookup(name);
            if found.outcome != Outcome::Allow {
                let because = format!("its lookup comes first: {}", found.because);
                return Found { because, ..found };
            }
            flow(
                *protocol,
                SocketAddr::new(BOUND_ADDRESS.into(), *port),
                vec![name.clone()],
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_alias_is_judged_where_it_is_dialled_as_in_a_network() {
        let outcome = |document: &str| {
            let policy = Policy::parse("p.yaml", document).unwrap();
            let destination = "tcp 192.168.127.254:80".parse().unwrap();
            policy.answers(None, &destination, Now::BEFORE_ALL)
        };
        let rule = |guards: &str, cidr: &str| {
            format!("version: 1\n{guards}rules: [{{action: allow, cidr: {cidr}}}]\n")
        };
        // It is the host, and no guest, though it lies in their subnet.
        assert_eq!(
            outcome(&rule("guards: {host: off}\n", "0.0.0.0/0")),
            Outcome::Allow
        );
        assert_eq!(
            outcome(&rule("guards: {guests: off}\n", "0.0.0.0/0")),
            Outcome::Deny
        );
        assert_eq!(outcome(&rule("", "192.168.127.0/24")), Outcome::Deny);
        for naming in ["192.168.127.254/32", "127.0.0.0/8"] {
            assert_eq!(outcome(&rule("", naming)), Outcome::Allow, "{naming}");
        }
    }

    #[test]
    fn destinations_are_written_as_on_the_command_line_or_by_name() {
        let read = |text: &str| text.parse::<Destination>();
        let name: Name = "api.example.com".parse().unwrap();
        assert_eq!(
            read("tcp api.example.com:443"),
            Ok(Destination::Named(Protocol::Tcp, name.clone(), 443))
        );
        assert_eq!(read("domain api.example.com"), Ok(Destination::Lookup(name)));
        let v6 = "[2001:db8::1]:53".parse().unwrap();
        assert_eq!(
            read("udp [2001:db8::1]:53"),
            Ok(Destination::Address(Protocol::Udp, v6))
        );
        assert!(matches!(
            read("icmp 192.0.2.1"),
            Ok(Destination::Address(Protocol::Icmp, _))
        ));
        for bad in [
            "tcp",
            "tcp 192.0.2.1",
            "192.0.2.1:443",
            "tcp 192.0.2.1:0",
            "tcp 192.0.2.1:1-2",
            "tcp 10.0.0.0/8:1",
            "domain *.example.com",
            "udp 2001:db8::1:53",
            "tcp a b",
        ] {
            assert!(read(bad).is_err(), "{bad} was taken");
        }
    }
}
