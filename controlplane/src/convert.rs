//! From what the hub holds to the contract's messages, and back where the store keeps them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{FlowKey, Guard, LIFETIME_MAX, LIFETIME_MIN, Malformed, Mode, Subject, VmSelector};
use vnet_proto::v1;

use crate::approval::{PendingState, Request, Scope};
use crate::fleet::{Dataplane, LiveFlow, Vm};
use crate::grant::{Account, Grant, GrantAction, GrantId, Lifetime, VmInstance};
use crate::policy::{Denial, DnsGuard, Effective, Outcome};
use crate::store::StoredGrant;

/// A time for the wire.
pub(crate) fn timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    Some(time.into())
}

/// A time from the wire.
pub(crate) fn time(message: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    message.and_then(|t| SystemTime::try_from(t).ok())
}

/// A span for the wire.
pub(crate) fn span(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

/// A record type's name (RFC 3597 §5 for those without).
pub(crate) fn record_type(number: u16) -> String {
    let known = match number {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        43 => "DS",
        48 => "DNSKEY",
        64 => "SVCB",
        65 => "HTTPS",
        255 => "ANY",
        257 => "CAA",
        _ => return format!("TYPE{number}"),
    };
    known.to_owned()
}

pub(crate) fn tuple(key: &FlowKey) -> v1::FlowTuple {
    v1::FlowTuple {
        protocol: v1::Protocol::from(key.protocol).into(),
        guest_address: key.guest.ip().to_string(),
        guest_port: key.guest.port().into(),
        address: key.peer.ip().to_string(),
        port: key.peer.port().into(),
    }
}

pub(crate) fn action(outcome: Outcome) -> v1::Action {
    match outcome {
        Outcome::Allow => v1::Action::Allow,
        Outcome::Deny => v1::Action::Deny,
        Outcome::Drop => v1::Action::Drop,
        Outcome::Ask => v1::Action::Ask,
    }
}

pub(crate) fn mode(mode: Option<Mode>) -> v1::Mode {
    mode.map_or(v1::Mode::Open, Into::into)
}

pub(crate) fn flow(flow: &LiveFlow) -> v1::Flow {
    let subject = &flow.subject;
    v1::Flow {
        id: flow.id.clone(),
        vm: flow.vm.clone(),
        tuple: Some(tuple(&subject.key)),
        direction: if flow.ingress {
            v1::FlowDirection::Ingress
        } else {
            v1::FlowDirection::Egress
        }
        .into(),
        names: subject.names.iter().map(ToString::to_string).collect(),
        opened_at: timestamp(flow.opened_at),
        bytes_up: flow.bytes_up,
        bytes_down: flow.bytes_down,
        reason: Some((&flow.reason).into()),
        would_deny: flow.would_deny,
        dialled: if subject.dialled == subject.key.peer.ip() {
            String::new()
        } else {
            subject.dialled.to_string()
        },
        peer_vm: flow.peer.clone(),
        ended: String::new(),
    }
}

pub(crate) fn vm(vm: &Vm, dataplane: Option<&Dataplane>, pending: u64) -> v1::Vm {
    v1::Vm {
        name: vm.view.name.clone(),
        labels: vm.view.labels.clone().into_iter().collect(),
        state: vm.state().into(),
        mode: mode(vm.effective.mode()).into(),
        policy: vm.effective.policy_name().to_owned(),
        revision: vm.effective.revision(),
        dataplane: dataplane.map(|d| d.name.clone()).unwrap_or_default(),
        network: dataplane.map(|d| d.network.clone()).unwrap_or_default(),
        addresses: vm.addresses.clone(),
        mac: vm.mac.clone(),
        claimed_hostname: vm.claimed_hostname.clone(),
        leased_address: vm.leased_address.clone(),
        link_error: vm.link_error.clone(),
        wanted_name: vm.set.wanted.clone(),
        attached_at: vm.attached_at.and_then(timestamp),
        live_flows: vm.live_flows,
        pending_requests: pending,
        etag: vm_etag(vm),
        transport: vm.transport.clone(),
        dropped_frames: vm.dropped_frames.clone().into_iter().collect(),
        counters: vm.counters.clone().into_iter().collect(),
    }
}

/// Changes whenever the labels or the mode do.
pub(crate) fn vm_etag(vm: &Vm) -> String {
    let labels: BTreeMap<&String, &String> = vm.view.labels.iter().collect();
    etag(&format!(
        "{:?} {:?} {labels:?}",
        vm.view.instance,
        vm.effective.mode()
    ))
}

/// A short text that differs whenever `content` does (FNV-1a, 64 bits; nothing rests on its strength).
pub(crate) fn etag(content: &str) -> String {
    let hash = content.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| {
        (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

pub(crate) fn scope(scope: Scope) -> v1::Scope {
    match scope {
        Scope::HostPort => v1::Scope::HostPort,
        Scope::Host => v1::Scope::Host,
        Scope::NamePort => v1::Scope::NamePort,
        Scope::Name => v1::Scope::Name,
        Scope::Subdomains => v1::Scope::Subdomains,
    }
}

pub(crate) fn scope_from(value: i32) -> Result<Option<Scope>, Malformed> {
    match v1::Scope::try_from(value) {
        Ok(v1::Scope::Unspecified) => Ok(None),
        Ok(v1::Scope::HostPort) => Ok(Some(Scope::HostPort)),
        Ok(v1::Scope::Host) => Ok(Some(Scope::Host)),
        Ok(v1::Scope::NamePort) => Ok(Some(Scope::NamePort)),
        Ok(v1::Scope::Name) => Ok(Some(Scope::Name)),
        Ok(v1::Scope::Subdomains) => Ok(Some(Scope::Subdomains)),
        Err(_) => Err(Malformed::Enum {
            field: "scope",
            value,
        }),
    }
}

pub(crate) fn request(request: &Request) -> v1::PendingRequest {
    let state = match request.state {
        PendingState::Open => v1::PendingState::Open,
        PendingState::Approved => v1::PendingState::Approved,
        PendingState::Denied => v1::PendingState::Denied,
        PendingState::Expired => v1::PendingState::Expired,
        PendingState::Cancelled => v1::PendingState::Cancelled,
        PendingState::Decided => v1::PendingState::Decided,
    };
    v1::PendingRequest {
        id: request.id.0.clone(),
        etag: request.etag(),
        vm: request.vm.name.clone(),
        target: Some((&request.target()).into()),
        names: request.names.iter().map(ToString::to_string).collect(),
        query_type: match request.subject() {
            Some(Subject::Lookup(lookup)) => record_type(lookup.query_type),
            Some(Subject::Flow(_)) | None => String::new(),
        },
        // That an address is synthetic guards nothing: the name is what is asked for.
        guards: (request.guards.without(Guard::Synthetic).iter())
            .map(|g| v1::Guard::from(g).into())
            .collect(),
        state: state.into(),
        count: request.count,
        held: request.held_packets(),
        created_at: timestamp(request.created_at),
        last_asked_at: timestamp(request.last_asked_at),
        held_until: request.held_until().and_then(timestamp),
        expires_at: timestamp(request.expires_at),
        reason: Some((&request.reason).into()),
        scopes: request.scopes().into_iter().map(|s| scope(s).into()).collect(),
        grant_id: request.grant.as_ref().map(|g| g.0.clone()).unwrap_or_default(),
        labels: request.vm.labels.clone().into_iter().collect(),
        peer_vm: request.peer.clone(),
        domain: request.domain().unwrap_or_default().to_owned(),
        options: Vec::new(),
    }
}

/// A grant, with what its account says is used of its budget.
pub(crate) fn grant(grant: &Grant, account: Option<&Account>) -> v1::Grant {
    use v1::lifetime::Kind;
    let kind = match grant.lifetime {
        Lifetime::Once => Some(Kind::Once(true)),
        Lifetime::For(length) => span(length).map(Kind::Duration),
        Lifetime::UntilVmStops => Some(Kind::UntilVmStops(true)),
        Lifetime::Forever => Some(Kind::Forever(true)),
    };
    let limits = |budget: vnet_proto::model::Budget| (budget != Default::default()).then(|| budget.into());
    v1::Grant {
        id: grant.id.0.clone(),
        action: match grant.action {
            GrantAction::Allow => v1::Action::Allow,
            GrantAction::Deny => v1::Action::Deny,
        }
        .into(),
        target: Some((&grant.target).into()),
        vms: Some((&grant.vms).into()),
        lifetime: Some(v1::Lifetime { kind }),
        budget: limits(grant.budget),
        created_at: timestamp(grant.created_at),
        expires_at: grant.expires_at.and_then(timestamp),
        creator: grant.creator.clone(),
        reason: grant.reason.clone(),
        hits: grant.hits,
        last_hit_at: grant.last_hit_at.and_then(timestamp),
        pending_id: grant.pending_id.clone(),
        used: limits(account.map_or(grant.used, Account::used)),
    }
}

/// A lifetime as a client asks for it; `None`: it did not.
pub(crate) fn lifetime(message: Option<v1::Lifetime>) -> Result<Option<Lifetime>, Malformed> {
    use v1::lifetime::Kind;
    let Some(message) = message else { return Ok(None) };
    let refused = |text: &str| Malformed::Text {
        field: "lifetime",
        text: text.to_owned(),
    };
    match message.kind.ok_or(Malformed::Missing { field: "lifetime" })? {
        Kind::Once(true) => Ok(Some(Lifetime::Once)),
        Kind::UntilVmStops(true) => Ok(Some(Lifetime::UntilVmStops)),
        Kind::Forever(true) => Ok(Some(Lifetime::Forever)),
        Kind::Once(false) | Kind::UntilVmStops(false) | Kind::Forever(false) => {
            Err(refused("is set to false (leave it unset, or set one to true)"))
        }
        Kind::Duration(length) => match Duration::try_from(length) {
            Ok(length) if length > LIFETIME_MAX => Err(refused(
                "is longer than 36525 days, the most there is (to have no end, set forever; vnetctl: --forever)",
            )),
            Ok(length) if length >= LIFETIME_MIN => Ok(Some(Lifetime::For(length))),
            _ => Err(refused("is shorter than one second")),
        },
    }
}

/// A lifetime as the store kept it. An earlier version took any length: what is over the limit now has no end,
/// since a denial must not be forgotten for having been meant to hold for so long.
fn stored_lifetime(message: Option<v1::Lifetime>) -> Result<Option<Lifetime>, Malformed> {
    let kind = message.as_ref().and_then(|m| m.kind.as_ref());
    if let Some(v1::lifetime::Kind::Duration(length)) = kind
        && Duration::try_from(*length).is_ok_and(|length| length > LIFETIME_MAX)
    {
        return Ok(Some(Lifetime::Forever));
    }
    lifetime(message)
}

/// A grant as the store kept it.
pub(crate) fn stored_grant(stored: StoredGrant) -> Result<Grant, Malformed> {
    let message = stored.grant;
    let action = match v1::Action::try_from(message.action) {
        Ok(v1::Action::Allow) => GrantAction::Allow,
        Ok(v1::Action::Deny) => GrantAction::Deny,
        _ => {
            return Err(Malformed::Enum {
                field: "grant.action",
                value: message.action,
            });
        }
    };
    let lifetime = stored_lifetime(message.lifetime)?.ok_or(Malformed::Missing {
        field: "grant.lifetime",
    })?;
    Ok(Grant {
        id: GrantId(message.id),
        action,
        target: message
            .target
            .ok_or(Malformed::Missing {
                field: "grant.target",
            })?
            .try_into()?,
        vms: VmSelector::try_from(message.vms.ok_or(Malformed::Missing { field: "grant.vms" })?)?,
        lifetime,
        budget: message.budget.map(Into::into).unwrap_or_default(),
        used: message.used.map(Into::into).unwrap_or_default(),
        created_at: time(message.created_at).ok_or(Malformed::Missing {
            field: "grant.created_at",
        })?,
        expires_at: time(message.expires_at).filter(|_| lifetime != Lifetime::Forever),
        creator: message.creator,
        reason: message.reason,
        hits: message.hits,
        last_hit_at: time(message.last_hit_at),
        pending_id: message.pending_id,
        instances: stored
            .instances
            .into_iter()
            .map(VmInstance)
            .collect::<BTreeSet<_>>(),
    })
}

/// A grant as the store is to keep it.
pub(crate) fn to_store(made: &Grant, account: Option<&Account>) -> StoredGrant {
    StoredGrant {
        grant: grant(made, account),
        instances: made.instances.iter().map(|i| i.0.clone()).collect(),
        uses: account
            .into_iter()
            .flat_map(Account::vms)
            .map(|(vm, used)| (vm.0.clone(), used))
            .collect(),
    }
}

/// How a VM's dataplane is to treat its lookups.
pub(crate) fn dns_settings(effective: &Effective) -> v1::DnsSettings {
    let said = effective.settings();
    let (ttl_min, ttl_max) = said.ttl();
    let [queries_per_second, queries_per_minute, names_per_domain] = effective.lookup_limits();
    v1::DnsSettings {
        ttl_min: Some(ttl_min).filter(|min| !min.is_zero()).and_then(span),
        ttl_max: span(ttl_max),
        deny_with: match said.deny_with.unwrap_or_default() {
            Denial::Refused => v1::DnsDenial::Refused,
            Denial::NxDomain => v1::DnsDenial::Nxdomain,
            Denial::ServFail => v1::DnsDenial::Servfail,
        }
        .into(),
        deny_text: said.deny_text.clone().unwrap_or_default(),
        queries_per_second,
        queries_per_minute,
        names_per_domain,
        redirect: effective.dns_guard() == DnsGuard::Redirect,
    }
}

#[cfg(test)]
mod tests {
    use vnet_proto::model::Target;

    use super::*;

    #[test]
    fn a_stored_answer_of_a_length_that_is_no_longer_taken_holds_for_ever() {
        let stored = |seconds| StoredGrant {
            grant: v1::Grant {
                id: "g".to_owned(),
                action: v1::Action::Deny.into(),
                target: Some((&"tcp 192.0.2.7:443".parse::<Target>().unwrap()).into()),
                vms: Some((&VmSelector::all()).into()),
                lifetime: Some(v1::Lifetime {
                    kind: Some(v1::lifetime::Kind::Duration(prost_types::Duration {
                        seconds,
                        nanos: 0,
                    })),
                }),
                created_at: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
                expires_at: Some(prost_types::Timestamp { seconds, nanos: 0 }),
                ..Default::default()
            },
            instances: Vec::new(),
            uses: Default::default(),
        };

        let long = stored_grant(stored(359_999_999_996_400)).unwrap();

        assert_eq!((long.lifetime, long.expires_at), (Lifetime::Forever, None));
        let hour = stored_grant(stored(3600)).unwrap();
        assert_eq!(hour.lifetime, Lifetime::For(Duration::from_secs(3600)));
        assert!(hour.expires_at.is_some());
    }
}
