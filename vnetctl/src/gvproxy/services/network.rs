//! What gvproxy's draft of approvals has at `/network/{pending,approved,connections,allow,deny}` and
//! `/dns/{pending,denied,allowed,allow}`: what the network's VMs ask for, what came of it, and answers.
//!
//! An answer is a grant for each VM of the network, until that stops: the draft's answers end with its process, which
//! is one VM's life. A connection is an address, a protocol and a port; where a VM asks for a name that was not
//! resolved yet, its `ip` is that name, and is taken as one in an answer.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hyper::StatusCode;
use prost_types::Timestamp;
use serde::Serialize;
use vnet_proto::model::{Name, NamePattern};
use vnet_proto::v1;

use super::Services;
use super::address::quoted;
use super::answer::Answer;
use super::json::{Json, Object};
use crate::client::{PAGE_SIZE, unary};

/// VMs that one answer makes grants for.
const ANSWERED_VMS_MAX: usize = 64;

/// A connection that a VM asked for, as the draft has it; and the names that its address is known by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Connection {
    pub(super) protocol: String,
    pub(super) ip: String,
    pub(super) port: u32,
    pub(super) count: u64,
    pub(super) status: &'static str,
    pub(super) time: String,
    pub(super) last_seen: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) names: Vec<String>,
}

/// A name that was looked up, as the draft has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Domain {
    pub(super) domain: String,
    pub(super) count: u64,
    pub(super) first_seen: String,
    pub(super) last_seen: String,
}

/// How a connection stands.
pub(super) const PENDING: &str = "pending";
pub(super) const DENIED: &str = "denied";
pub(super) const APPROVED: &str = "approved";

impl Services {
    /// What waits for an answer.
    pub(super) async fn network_pending(&self) -> Result<Answer, Answer> {
        let mut all = Connections::default();
        for request in self.control.list_pending().await? {
            all.add(pending(&request));
        }
        Ok(Answer::typed(&all.list()))
    }

    /// What was answered: `protocol:ip:port`, and whether it is allowed.
    pub(super) async fn network_approved(&self) -> Result<Answer, Answer> {
        let grants = self.control.list_grants().await?;
        let approved: BTreeMap<String, bool> = grants
            .iter()
            .filter_map(|grant| {
                let connection = granted(grant)?;
                let Connection {
                    protocol, ip, port, ..
                } = &connection;
                Some((format!("{protocol}:{ip}:{port}"), connection.status == APPROVED))
            })
            .collect();
        Ok(Answer::typed(&approved))
    }

    /// Every connection that is known of: asked for, answered, live, or denied of late.
    pub(super) async fn network_connections(&self) -> Result<Answer, Answer> {
        Ok(Answer::typed(&self.connections().await?))
    }

    /// The same, as a list: oldest first.
    pub(super) async fn connections(&self) -> Result<Vec<Connection>, Answer> {
        let mut all = Connections::default();
        // What is told later says how it stands.
        for event in self.denied_events().await? {
            all.extend(of_event(&event, DENIED));
        }
        for grant in self.control.list_grants().await? {
            all.extend(granted(&grant));
        }
        for flow in self.control.list_flows().await? {
            all.extend(live(&flow));
        }
        for request in self.control.list_pending().await? {
            all.add(pending(&request));
        }
        Ok(all.list())
    }

    /// Names whose lookups wait for an answer.
    pub(super) async fn dns_pending(&self) -> Result<Answer, Answer> {
        let mut all = Domains::default();
        for request in self.control.list_pending().await? {
            all.extend(pending_name(&request));
        }
        Ok(Answer::typed(&all.list()))
    }

    /// Names whose lookups were denied.
    pub(super) async fn dns_denied(&self) -> Result<Answer, Answer> {
        let request = v1::ListDeniedRequest {
            network: self.control.network().to_owned(),
            ..Default::default()
        };
        let list = self
            .control
            .call(|client| async move { client.dns().list_denied(unary(request)).await })
            .await?;
        let mut all = Domains::default();
        for denied in &list.denied {
            let at = when(denied.last_at.as_ref());
            all.add(Domain {
                domain: denied.name.clone(),
                count: denied.count,
                first_seen: at.clone(),
                last_seen: at,
            });
        }
        Ok(Answer::typed(&all.list()))
    }

    /// Names that were allowed.
    pub(super) async fn dns_allowed(&self) -> Result<Answer, Answer> {
        let grants = self.control.list_grants().await?;
        let mut names: Vec<&str> = grants.iter().rev().filter_map(allowed_name).collect();
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(*name));
        Ok(Answer::typed(&names))
    }

    /// Allows or denies a connection.
    pub(super) async fn answer_network(&self, body: &[u8], is_allowed: bool) -> Result<Answer, Answer> {
        let read = || -> Result<(String, String, i64), String> {
            let value = Json::read(body)?;
            let request = Object::of(&value, "ConnectionRequest")?;
            Ok((
                request.text("protocol")?,
                request.text("ip")?,
                request.integer("port")?,
            ))
        };
        let (protocol, ip, port) = read().map_err(Answer::bad_request)?;
        let target = target(&protocol, &ip, port).map_err(Answer::bad_request)?;
        self.grant(target, is_allowed).await
    }

    /// Allows a name: its lookup, and connections to its addresses.
    pub(super) async fn allow_name(&self, body: &[u8]) -> Result<Answer, Answer> {
        let value = Json::read(body).map_err(Answer::bad_request)?;
        let request = Object::of(&value, "AllowRequest").map_err(Answer::bad_request)?;
        let domain = request.text("domain").map_err(Answer::bad_request)?;
        if domain.is_empty() {
            return Err(Answer::bad_request("domain is required"));
        }
        let name: NamePattern = domain
            .parse()
            .map_err(|error| Answer::bad_request(format!("{}: {error}", quoted(&domain))))?;
        let target = v1::target::Kind::Name(v1::NameTarget {
            name: name.to_string(),
            ..Default::default()
        });
        self.grant(target, true).await
    }

    /// Makes the grants of an answer.
    async fn grant(&self, kind: v1::target::Kind, is_allowed: bool) -> Result<Answer, Answer> {
        let vms = self.control.list_vms().await?;
        let names: Vec<String> = vms.into_iter().map(|vm| vm.name).collect();
        if names.is_empty() {
            let text = format!(
                "no VM is on network {}, and so none to answer for",
                self.control.network()
            );
            return Err(Answer::error(StatusCode::CONFLICT, text));
        }
        if names.len() > ANSWERED_VMS_MAX {
            let text = format!(
                "{} VMs are on this network (at most {ANSWERED_VMS_MAX} are answered for)",
                names.len()
            );
            return Err(Answer::error(StatusCode::CONFLICT, text)
                .with_remedy("answer with vnetctl allow --vm NAME or -l SELECTOR"));
        }
        let action = if is_allowed {
            v1::Action::Allow
        } else {
            v1::Action::Deny
        };
        for name in names {
            let request = v1::CreateGrantRequest {
                action: action.into(),
                target: Some(v1::Target {
                    kind: Some(kind.clone()),
                }),
                vms: Some(v1::VmSelector {
                    name,
                    ..Default::default()
                }),
                lifetime: Some(v1::Lifetime {
                    kind: Some(v1::lifetime::Kind::UntilVmStops(true)),
                }),
                reason: "answered through the services API".to_owned(),
                ..Default::default()
            };
            self.control
                .call(|client| async move { client.grants().create_grant(unary(request)).await })
                .await?;
        }
        Ok(Answer::done())
    }

    /// The latest denials, oldest first.
    async fn denied_events(&self) -> Result<Vec<v1::Event>, Answer> {
        let request = v1::ListEventsRequest {
            kinds: vec![v1::EventKind::FlowDenied.into()],
            page_size: PAGE_SIZE,
            network: self.control.network().to_owned(),
            ..Default::default()
        };
        let list = self
            .control
            .call(|client| async move { client.events().list_events(unary(request)).await })
            .await?;
        Ok(list.events.into_iter().rev().collect())
    }
}

/// What an answer of the draft's form is for.
fn target(protocol: &str, ip: &str, port: i64) -> Result<v1::target::Kind, String> {
    let (proto, has_ports) = match protocol {
        "tcp" => (v1::Protocol::Tcp, true),
        "udp" => (v1::Protocol::Udp, true),
        "icmp" => (v1::Protocol::Icmp, false),
        "icmpv6" => (v1::Protocol::Icmpv6, false),
        other => {
            return Err(format!(
                "protocol is {} (expected tcp, udp, icmp or icmpv6)",
                quoted(other)
            ));
        }
    };
    let ports = match u16::try_from(port) {
        Ok(port) if has_ports && port != 0 => Some(v1::PortRange {
            first: port.into(),
            last: 0,
        }),
        Ok(0) if !has_ports => None,
        _ if has_ports => return Err(format!("port is {port} (expected 1 to 65535)")),
        _ => return Err(format!("port is {port}, and {protocol} has none (expected 0)")),
    };
    if let Ok(address) = ip.parse::<IpAddr>() {
        return Ok(v1::target::Kind::Address(v1::AddressTarget {
            protocol: proto.into(),
            prefix: address.to_canonical().to_string(),
            ports,
        }));
    }
    // What is read as an address and is none is no name of anything either.
    match ip.parse::<Name>() {
        Ok(name) if has_ports && ip.bytes().any(|byte| byte.is_ascii_alphabetic()) => {
            Ok(v1::target::Kind::Name(v1::NameTarget {
                name: name.to_string(),
                ports,
                ..Default::default()
            }))
        }
        _ => Err(format!(
            "ip is {} (expected an address, as 192.0.2.1)",
            quoted(ip)
        )),
    }
}

/// A flow that waits, as a connection; a lookup is none.
pub(super) fn pending(request: &v1::PendingRequest) -> Option<Connection> {
    if !request.query_type.is_empty() {
        return None;
    }
    let (protocol, ip, port) = place(request.target.as_ref())?;
    Some(Connection {
        protocol: protocol.to_owned(),
        ip,
        port,
        count: request.count,
        status: PENDING,
        time: when(request.created_at.as_ref()),
        last_seen: when(request.last_asked_at.as_ref().or(request.created_at.as_ref())),
        names: request.names.clone(),
    })
}

/// A lookup that waits.
pub(super) fn pending_name(request: &v1::PendingRequest) -> Option<Domain> {
    let Some(v1::target::Kind::Name(name)) = request.target.as_ref()?.kind.as_ref() else {
        return None;
    };
    if request.query_type.is_empty() {
        return None;
    }
    Some(Domain {
        domain: name.name.clone(),
        count: request.count,
        first_seen: when(request.created_at.as_ref()),
        last_seen: when(request.last_asked_at.as_ref().or(request.created_at.as_ref())),
    })
}

/// What a grant decides, where it is for one connection.
pub(super) fn granted(grant: &v1::Grant) -> Option<Connection> {
    let (protocol, ip, port) = place(grant.target.as_ref())?;
    let status = match grant.action() {
        v1::Action::Allow => APPROVED,
        _ => DENIED,
    };
    Some(Connection {
        protocol: protocol.to_owned(),
        ip,
        port,
        count: grant.hits,
        status,
        time: when(grant.created_at.as_ref()),
        last_seen: when(grant.last_hit_at.as_ref().or(grant.created_at.as_ref())),
        names: Vec::new(),
    })
}

/// The name that a grant allows.
pub(super) fn allowed_name(grant: &v1::Grant) -> Option<&str> {
    match grant.target.as_ref()?.kind.as_ref()? {
        v1::target::Kind::Name(name) if grant.action() == v1::Action::Allow => Some(&name.name),
        _ => None,
    }
}

/// An event about a flow, as a connection.
pub(super) fn of_event(event: &v1::Event, status: &'static str) -> Option<Connection> {
    let tuple = event.tuple.as_ref()?;
    let protocol = word(tuple.protocol())?;
    // A synthetic address means nothing outside of this VM's lookups: the name that it stands for does.
    let is_synthetic = event.guards().any(|guard| guard == v1::Guard::Synthetic);
    let ip = match event.names.first() {
        Some(name) if is_synthetic => name,
        _ => &tuple.address,
    };
    let at = when(event.time.as_ref());
    Some(Connection {
        protocol: protocol.to_owned(),
        ip: ip.clone(),
        port: tuple.port,
        count: event.count.max(1),
        status,
        time: at.clone(),
        last_seen: at,
        names: event.names.clone(),
    })
}

fn live(flow: &v1::Flow) -> Option<Connection> {
    if flow.direction() != v1::FlowDirection::Egress {
        return None;
    }
    let tuple = flow.tuple.as_ref()?;
    let at = when(flow.opened_at.as_ref());
    Some(Connection {
        protocol: word(tuple.protocol())?.to_owned(),
        ip: tuple.address.clone(),
        port: tuple.port,
        count: 1,
        status: APPROVED,
        time: at.clone(),
        last_seen: at,
        names: flow.names.clone(),
    })
}

/// Protocol, address or name, and port of a target that is one of each.
fn place(target: Option<&v1::Target>) -> Option<(&'static str, String, u32)> {
    let one = |ports: Option<&v1::PortRange>| match ports {
        Some(ports) if ports.last == 0 || ports.last == ports.first => Some(ports.first),
        _ => None,
    };
    match target?.kind.as_ref()? {
        v1::target::Kind::Address(address) => {
            let ip = match address.prefix.split_once('/') {
                Some((ip, "32")) if !ip.contains(':') => ip,
                Some((ip, "128")) => ip,
                Some(_) => return None,
                None => &address.prefix,
            };
            let port = match address.protocol() {
                v1::Protocol::Icmp | v1::Protocol::Icmpv6 => 0,
                _ => one(address.ports.as_ref())?,
            };
            Some((word(address.protocol())?, ip.to_owned(), port))
        }
        // Which protocol is not said of a name; an answer for its port holds for both.
        v1::target::Kind::Name(name) if !name.lookup_only => {
            Some(("tcp", name.name.clone(), one(name.ports.as_ref())?))
        }
        v1::target::Kind::Name(_) | v1::target::Kind::Forward(_) => None,
    }
}

fn word(protocol: v1::Protocol) -> Option<&'static str> {
    match protocol {
        v1::Protocol::Tcp => Some("tcp"),
        v1::Protocol::Udp => Some("udp"),
        v1::Protocol::Icmp => Some("icmp"),
        v1::Protocol::Icmpv6 => Some("icmpv6"),
        v1::Protocol::Unspecified => None,
    }
}

/// A time to the second, in RFC 3339; empty where there is none.
pub(super) fn when(time: Option<&Timestamp>) -> String {
    time.map_or_else(String::new, |time| {
        Timestamp {
            seconds: time.seconds,
            nanos: 0,
        }
        .to_string()
    })
}

/// Connections, those to the same place as one: counts are added, and what is told last says how it stands.
#[derive(Default)]
struct Connections(BTreeMap<(String, String, u32), Connection>);

impl Connections {
    fn add(&mut self, connection: Option<Connection>) {
        self.extend(connection);
    }

    fn extend(&mut self, connections: impl IntoIterator<Item = Connection>) {
        for mut next in connections {
            let key = (next.protocol.clone(), next.ip.clone(), next.port);
            if let Some(known) = self.0.remove(&key) {
                next.count = next.count.saturating_add(known.count);
                next.time = next.time.min(known.time);
                next.last_seen = next.last_seen.max(known.last_seen);
                if next.names.is_empty() {
                    next.names = known.names;
                }
            }
            self.0.insert(key, next);
        }
    }

    fn list(self) -> Vec<Connection> {
        let mut list: Vec<Connection> = self.0.into_values().collect();
        list.sort_by(|a, b| a.time.cmp(&b.time));
        list
    }
}

/// Names, those of different record types and VMs as one.
#[derive(Default)]
struct Domains(BTreeMap<String, Domain>);

impl Domains {
    fn extend(&mut self, domains: impl IntoIterator<Item = Domain>) {
        for domain in domains {
            self.add(domain);
        }
    }

    fn add(&mut self, domain: Domain) {
        match self.0.get_mut(&domain.domain) {
            Some(known) => {
                known.count = known.count.saturating_add(domain.count);
                known.first_seen = known.first_seen.clone().min(domain.first_seen);
                known.last_seen = known.last_seen.clone().max(domain.last_seen);
            }
            None => {
                self.0.insert(domain.domain.clone(), domain);
            }
        }
    }

    fn list(self) -> Vec<Domain> {
        let mut list: Vec<Domain> = self.0.into_values().collect();
        list.sort_by(|a, b| a.first_seen.cmp(&b.first_seen));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_name_one_place_and_what_is_none_is_refused() {
        let address = |protocol: v1::Protocol, prefix: &str, port: Option<u32>| {
            v1::target::Kind::Address(v1::AddressTarget {
                protocol: protocol.into(),
                prefix: prefix.to_owned(),
                ports: port.map(|first| v1::PortRange { first, last: 0 }),
            })
        };
        let right = [
            (
                ("tcp", "192.0.2.1", 443),
                address(v1::Protocol::Tcp, "192.0.2.1", Some(443)),
            ),
            (
                ("udp", "2001:DB8::1", 53),
                address(v1::Protocol::Udp, "2001:db8::1", Some(53)),
            ),
            (
                ("tcp", "::ffff:192.0.2.1", 1),
                address(v1::Protocol::Tcp, "192.0.2.1", Some(1)),
            ),
            (
                ("icmp", "192.0.2.1", 0),
                address(v1::Protocol::Icmp, "192.0.2.1", None),
            ),
        ];
        for ((protocol, ip, port), expected) in right {
            assert_eq!(target(protocol, ip, port), Ok(expected), "{protocol} {ip} {port}");
        }
        let v1::target::Kind::Name(name) = target("tcp", "Example.com", 443).unwrap() else {
            panic!()
        };
        assert_eq!(
            (name.name.as_str(), name.ports.unwrap().first),
            ("example.com", 443)
        );
        let wrong = [
            (("sctp", "192.0.2.1", 1), "protocol is \"sctp\""),
            (("", "192.0.2.1", 1), "protocol is \"\""),
            (("tcp", "192.0.2.1", 0), "port is 0"),
            (("tcp", "192.0.2.1", 65536), "port is 65536"),
            (("tcp", "192.0.2.1", -1), "port is -1"),
            (("icmp", "192.0.2.1", 80), "port is 80"),
            (("tcp", "192.0.2", 80), "ip is \"192.0.2\""),
            (("tcp", "", 80), "ip is \"\""),
            (("tcp", "192.0.2.0/24", 80), "ip is \"192.0.2.0/24\""),
            (("tcp", "*.example.com", 80), "ip is \"*.example.com\""),
        ];
        for ((protocol, ip, port), expected) in wrong {
            let error = target(protocol, ip, port).unwrap_err();
            assert!(error.starts_with(expected), "{protocol} {ip} {port}: {error}");
        }
    }

    #[test]
    fn one_place_is_one_connection_and_the_last_word_is_how_it_stands() {
        let of = |time: &str, count, status| Connection {
            protocol: "tcp".to_owned(),
            ip: "192.0.2.1".to_owned(),
            port: 443,
            count,
            status,
            time: time.to_owned(),
            last_seen: time.to_owned(),
            names: Vec::new(),
        };
        let mut all = Connections::default();
        all.extend([
            of("2026-01-02T00:00:00Z", 2, DENIED),
            of("2026-01-01T00:00:00Z", 3, PENDING),
        ]);

        let list = all.list();

        assert_eq!(list.len(), 1);
        assert_eq!((list[0].count, list[0].status), (5, PENDING));
        assert_eq!(
            (list[0].time.as_str(), list[0].last_seen.as_str()),
            ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
        );
    }
}
