//! Scopes: what may be answered to a request, and the target of the grant that each yields.

use ipnet::IpNet;
use vnet_proto::model::{FlowKey, Guard, Name, NamePattern, PortRange, Subject, Target};

use crate::approval::{Asked, Request, Scope};

/// Scopes that an answer may have, narrowest first: the first is the one that is meant when none is
/// given. A name comes before the address, since it is what the guest meant. A guarded destination
/// offers only itself.
pub(crate) fn offered(request: &Request) -> Vec<Scope> {
    let below = request
        .names
        .first()
        .is_some_and(|name| parent_of(name).is_some());
    let subdomains = (below && !request.is_guarded()).then_some(Scope::Subdomains);
    match &request.asked {
        Asked::Forward(_) => vec![Scope::HostPort],
        Asked::Miss(Subject::Lookup(_)) => std::iter::once(Scope::Name).chain(subdomains).collect(),
        Asked::Miss(Subject::Flow(flow)) => {
            let ported = flow.key.protocol.has_ports();
            // A name's grant opens tcp and udp; what has no ports is answered by its address.
            let guarded = request.is_guarded();
            let named = ported && !request.names.is_empty() && !guarded;
            // A synthetic address is nothing that an answer could be about.
            let addressed = !request.guards.contains(Guard::Synthetic);
            let mut scopes = Vec::new();
            if named {
                scopes.push(Scope::NamePort);
            }
            if addressed {
                scopes.push(Scope::HostPort);
            }
            if !guarded {
                if ported && addressed {
                    scopes.push(Scope::Host);
                }
                if named {
                    scopes.push(Scope::Name);
                    scopes.extend(subdomains);
                }
            }
            scopes
        }
    }
}

/// The target of a grant of a scope that is offered; `None` for one that is not.
pub(crate) fn target(request: &Request, scope: Scope, lookup_only: bool) -> Option<Target> {
    if !offered(request).contains(&scope) {
        return None;
    }
    let named = |pattern: NamePattern, ports| {
        Some(Target::Name {
            pattern,
            ports,
            lookup_only,
        })
    };
    let subject = match &request.asked {
        Asked::Miss(subject) => subject,
        Asked::Forward(forward) => return Some(Target::Forward(*forward)),
    };
    match (scope, subject) {
        (Scope::HostPort, Subject::Flow(flow)) => Some(Target::of_flow(&flow.key)),
        (Scope::Host, Subject::Flow(flow)) => Some(any_port(&flow.key)),
        (Scope::NamePort, Subject::Flow(flow)) => {
            let port = PortRange::one(flow.key.peer.port());
            named(NamePattern::Exact(request.names.first()?.clone()), Some(port))
        }
        (Scope::Name, _) => named(NamePattern::Exact(request.names.first()?.clone()), None),
        (Scope::Subdomains, _) => named(NamePattern::Subdomains(parent_of(request.names.first()?)?), None),
        (Scope::HostPort | Scope::Host | Scope::NamePort, Subject::Lookup(_)) => None,
    }
}

/// The registrable domain of what is asked for, by which requests are shown together.
pub(crate) fn domain(request: &Request) -> Option<&str> {
    psl::domain_str(request.names.first()?.as_str())
}

fn any_port(key: &FlowKey) -> Target {
    Target::Address {
        protocol: Some(key.protocol),
        prefix: IpNet::from(key.peer.ip()),
        ports: None,
    }
}

/// The registrable domain (public suffix list) that a name lies below. `None` for that domain itself,
/// which `*.` would leave out, and for names that have none.
fn parent_of(name: &Name) -> Option<Name> {
    let parent = psl::domain_str(name.as_str()).and_then(|domain| Name::from_canonical(domain).ok())?;
    name.is_below(&parent).then_some(parent)
}
