//! Between the dataplane's own types and the session's messages. The model's conversions live in
//! `vnet_proto::model`; here are those of types that only a dataplane has.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use vnet_proto::model::{Budget, Epoch, ForwardListen, Malformed, Name, Protocol, VmId, address_to_bytes};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use crate::message::{
    CachedVerdict, DNS_TTL_MAX, DnsDenial, DnsSettings, FlowEnd, FlowOpened, Forward, MissEnd, NameRefusal,
    OwnList, OwnPolicy, Report, VmStatus, VmUp,
};
use crate::session::commands::Refusal;
use crate::zone::Zone;

pub(super) fn vm_up(up: &VmUp, status: Option<&VmStatus>) -> v1::VmUp {
    v1::VmUp {
        vm: up.vm.0,
        name: up.name.clone(),
        labels: up.labels.clone().into_iter().collect(),
        transport: up.transport.to_owned(),
        own_policy: up.own_policy.as_ref().map(own_policy),
        mode: up.mode.map_or(v1::Mode::Unspecified, Into::into).into(),
        resolver_patience: duration(up.resolver_patience),
        attached_at: Some(up.attached_at.into()),
        attached: status.is_none_or(|s| s.attached),
        addresses: status.map(|s| texts(&s.addresses)).unwrap_or_default(),
        mac: status.map(|s| s.mac.clone()).unwrap_or_default(),
        ec2_metadata_access: up.ec2_metadata_access,
    }
}

fn own_policy(policy: &OwnPolicy) -> v1::OwnPolicy {
    v1::OwnPolicy {
        document: policy.document.clone().unwrap_or_default(),
        source: policy.source.clone(),
        rules: policy.rules.clone(),
        lists: policy.lists.iter().map(own_list).collect(),
    }
}

fn own_list(list: &OwnList) -> v1::PolicyList {
    v1::PolicyList {
        path: list.path.clone(),
        sha256: list.sha256.clone(),
        content: list.content.clone(),
        size_bytes: list.size_bytes,
    }
}

pub(super) fn vm_status(status: &VmStatus) -> v1::VmStatus {
    v1::VmStatus {
        vm: status.vm.0,
        addresses: texts(&status.addresses),
        mac: status.mac.clone(),
        claimed_hostname: status.claimed_hostname.clone(),
        leased_address: status.leased_address.map(|a| a.to_string()).unwrap_or_default(),
        dropped_frames: status.dropped_frames.clone().into_iter().collect(),
        counters: status.counters.clone().into_iter().collect(),
        attached: status.attached,
    }
}

fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

pub(super) fn flow_opened(flow: &FlowOpened, bytes_up: u64, bytes_down: u64) -> v1::FlowOpened {
    let mut subject = v1::FlowSubject::from(&flow.subject);
    if flow.ingress {
        // On the wire the one who opened the flow stands first; here the guest does.
        std::mem::swap(&mut subject.guest_address, &mut subject.address);
        std::mem::swap(&mut subject.guest_port, &mut subject.port);
        subject.dialled.clear();
    }
    v1::FlowOpened {
        flow_id: flow.flow.0,
        vm: flow.vm.0,
        ingress: flow.ingress,
        subject: Some(subject),
        epoch: flow.epoch.map(Into::into),
        grant_id: flow.grant.clone(),
        reason: Some((&flow.reason).into()),
        would_deny: flow.would_deny,
        opened_at: Some(flow.opened_at.into()),
        bytes_up,
        bytes_down,
        miss_id: flow.miss.map_or(0, |miss| miss.0),
        names: flow.names.iter().map(ToString::to_string).collect(),
    }
}

pub(super) fn binding(
    vm: VmId,
    name: &Name,
    addresses: &[IpAddr],
    expires_in: Duration,
) -> v1::BindingLearned {
    v1::BindingLearned {
        vm: vm.0,
        name: name.to_string(),
        addresses: addresses.iter().copied().map(address_to_bytes).collect(),
        expires_in: duration(expires_in),
    }
}

pub(super) fn grant_use(vm: VmId, grant: &str, used: Budget) -> v1::GrantUse {
    v1::GrantUse {
        vm: vm.0,
        grant_id: grant.to_owned(),
        used: Some(used.into()),
    }
}

pub(super) fn host_addresses(addresses: &[IpAddr]) -> v1::HostAddresses {
    v1::HostAddresses {
        addresses: addresses.iter().copied().map(address_to_bytes).collect(),
    }
}

/// The message of a report; `None` for what the session answers itself.
pub(super) fn report(report: &Report, epoch: Option<Epoch>) -> Option<Message> {
    Some(match report {
        Report::VmUp(up) => Message::VmUp(vm_up(up, None)),
        Report::VmStatus(status) => Message::VmStatus(vm_status(status)),
        Report::VmDown { vm, link_error } => Message::VmDown(v1::VmDown {
            vm: vm.0,
            link_error: link_error.clone().unwrap_or_default(),
        }),
        Report::Miss(miss) => Message::Miss(miss.to_message(epoch)),
        Report::MissEnded { miss, end } => Message::MissEnded(v1::MissEnded {
            miss_id: miss.0,
            end: miss_end(*end).into(),
        }),
        Report::FlowOpened(flow) => Message::FlowOpened(flow_opened(flow, 0, 0)),
        Report::FlowClosed {
            flow,
            end,
            bytes_up,
            bytes_down,
            refusal,
        } => Message::FlowClosed(v1::FlowClosed {
            flow_id: flow.0,
            end: flow_end(*end).into(),
            bytes_up: *bytes_up,
            bytes_down: *bytes_down,
            refusal: refusal.as_deref().map(name_refusal),
        }),
        Report::FlowStats(counts) => Message::FlowStats(v1::FlowStats {
            counts: counts
                .iter()
                .map(|(flow, up, down)| v1::FlowCount {
                    flow_id: flow.0,
                    bytes_up: *up,
                    bytes_down: *down,
                })
                .collect(),
            uses: Vec::new(),
        }),
        Report::Uses { vm, uses } => Message::FlowStats(v1::FlowStats {
            counts: Vec::new(),
            uses: uses
                .iter()
                .map(|(grant, used)| grant_use(*vm, grant, *used))
                .collect(),
        }),
        Report::Decided {
            vm,
            subject,
            action,
            reason,
            count,
            would_deny,
        } => Message::Decided(v1::Decided {
            vm: vm.0,
            subject: Some(match subject {
                vnet_proto::model::Subject::Flow(flow) => v1::decided::Subject::Flow(flow.into()),
                vnet_proto::model::Subject::Lookup(lookup) => v1::decided::Subject::Lookup(lookup.into()),
            }),
            action: v1::Action::from(*action).into(),
            reason: Some(reason.into()),
            count: *count,
            would_deny: *would_deny,
        }),
        Report::Binding {
            vm,
            name,
            addresses,
            expires_in,
        } => Message::Binding(binding(*vm, name, addresses, *expires_in)),
        Report::LimitReached {
            vm,
            limit,
            subject,
            value,
            count,
        } => Message::LimitReached(v1::LimitReached {
            vm: vm.0,
            limit: (*limit).to_owned(),
            subject: subject.clone(),
            value: *value,
            count: *count,
        }),
        Report::HostAddresses(addresses) => Message::HostAddresses(host_addresses(addresses)),
        Report::Done { .. } | Report::Verdicts { .. } | Report::End => return None,
    })
}

fn miss_end(end: MissEnd) -> v1::MissEnd {
    match end {
        MissEnd::HoldExpired => v1::MissEnd::HoldExpired,
        MissEnd::GuestGaveUp => v1::MissEnd::GuestGaveUp,
        MissEnd::VmDown => v1::MissEnd::VmDown,
        MissEnd::Evicted => v1::MissEnd::Evicted,
        MissEnd::Covered => v1::MissEnd::Covered,
    }
}

fn flow_end(end: FlowEnd) -> v1::FlowEnd {
    match end {
        FlowEnd::Finished => v1::FlowEnd::Finished,
        FlowEnd::GuestReset => v1::FlowEnd::GuestReset,
        FlowEnd::HostReset => v1::FlowEnd::HostReset,
        FlowEnd::Idle => v1::FlowEnd::Idle,
        FlowEnd::Cut => v1::FlowEnd::Cut,
        FlowEnd::VmDown => v1::FlowEnd::VmDown,
        FlowEnd::Evicted => v1::FlowEnd::Evicted,
        FlowEnd::GrantEnded => v1::FlowEnd::GrantEnded,
        FlowEnd::Unreachable => v1::FlowEnd::Unreachable,
        FlowEnd::NameRefused => v1::FlowEnd::NameRefused,
    }
}

fn name_refusal(refusal: &NameRefusal) -> v1::NameRefusal {
    v1::NameRefusal {
        word: refusal.word.to_owned(),
        text: refusal.text.clone(),
        spoken: refusal
            .spoken
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        wanted: refusal.wanted.iter().map(ToString::to_string).collect(),
    }
}

/// A Welcome that can be acted on.
#[derive(Debug)]
pub(super) struct Welcome {
    pub(super) epoch: Epoch,
    pub(super) lease: Duration,
    pub(super) heartbeat: Duration,
    pub(super) hold: Duration,
    pub(super) vms: Vec<v1::VmSettings>,
    pub(super) closed: Vec<SocketAddr>,
    pub(super) judges_aliases: bool,
}

impl TryFrom<v1::Welcome> for Welcome {
    type Error = Malformed;

    fn try_from(message: v1::Welcome) -> Result<Self, Malformed> {
        let closed = sockets("welcome.closed_addresses", &message.closed_addresses)?;
        Ok(Self {
            epoch: required("welcome.epoch", message.epoch)?.try_into()?,
            lease: positive("welcome.lease", message.lease, LEASE_MAX)?,
            heartbeat: positive(
                "welcome.heartbeat_interval",
                message.heartbeat_interval,
                HEARTBEAT_MAX,
            )?,
            hold: positive("welcome.hold", message.hold, HOLD_MAX)?,
            vms: message.vms,
            closed,
            judges_aliases: message.judges_aliases,
        })
    }
}

/// Addresses with ports. One that does not parse spoils all: left out, it would be open.
pub(super) fn sockets(field: &'static str, texts: &[String]) -> Result<Vec<SocketAddr>, Malformed> {
    let parsed = texts.iter().map(|text| text.parse());
    parsed
        .collect::<Result<_, _>>()
        .map_err(|_| Malformed::Mismatch { field })
}

pub(super) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, Malformed> {
    value.ok_or(Malformed::Missing { field })
}

/// A time that must be given, above zero and at most `most`.
pub(super) fn positive(
    field: &'static str,
    value: Option<prost_types::Duration>,
    most: Duration,
) -> Result<Duration, Malformed> {
    let value = required(field, value)?;
    let seconds = value.seconds.unsigned_abs();
    Duration::try_from(value)
        .ok()
        .filter(|d| !d.is_zero() && *d <= most)
        .ok_or(Malformed::Range {
            field,
            value: seconds,
        })
}

pub(super) fn duration(value: Duration) -> Option<prost_types::Duration> {
    value.try_into().ok()
}

/// How a VM's lookups are treated; what is unset is as if nothing were said.
pub(super) fn dns_settings(message: v1::DnsSettings) -> Result<DnsSettings, Malformed> {
    let deny_with = match v1::DnsDenial::try_from(message.deny_with) {
        Ok(v1::DnsDenial::Unspecified | v1::DnsDenial::Refused) => DnsDenial::Refused,
        Ok(v1::DnsDenial::Nxdomain) => DnsDenial::NxDomain,
        Ok(v1::DnsDenial::Servfail) => DnsDenial::ServFail,
        Err(_) => {
            return Err(Malformed::Enum {
                field: "dns_settings.deny_with",
                value: message.deny_with,
            });
        }
    };
    let ttl_max = match message.ttl_max {
        None => DNS_TTL_MAX,
        given => positive("dns_settings.ttl_max", given, TTL_MAX)?,
    };
    let ttl_min = match message.ttl_min {
        None => Duration::ZERO,
        given => positive("dns_settings.ttl_min", given, ttl_max)?,
    };
    Ok(DnsSettings {
        ttl_min,
        ttl_max,
        deny_with,
        deny_text: message.deny_text,
        queries_per_second: message.queries_per_second,
        queries_per_minute: message.queries_per_minute,
        names_per_domain: message.names_per_domain,
        redirect: message.redirect,
    })
}

/// What is left until `deadline`.
pub(super) fn remaining(deadline: Instant, now: Instant) -> Duration {
    deadline.saturating_duration_since(now)
}

pub(super) fn forward_to_wire(forward: &Forward, network: &str) -> v1::Forward {
    v1::Forward {
        network: network.to_owned(),
        protocol: v1::Protocol::from(forward.protocol).into(),
        listen: forward.listen.to_string(),
        target: forward.target.to_string(),
        keep_client_address: forward.keep_client,
        asked_by: forward.asked_by.clone(),
        grant_id: forward.grant_id.clone(),
    }
}

pub(super) fn command_error(refusal: Refusal) -> v1::CommandError {
    v1::CommandError {
        code: (refusal.code as i32).cast_unsigned(),
        text: refusal.text,
        listen_error: refusal.listen.map(|error| v1::ListenError {
            problem: error.problem.into(),
            listen: error.listen.to_string(),
            by_own_forward: error.by_own_forward,
        }),
    }
}

/// Reads a forward.
pub(super) fn forward_from_wire(message: &v1::Forward) -> Result<Forward, Refusal> {
    let (protocol, listen) = forward_key_from_wire(message)?;
    if message.target.is_empty() {
        return Err(Refusal::invalid("forward.target is not set"));
    }
    let target = message.target.parse().map_err(|_| {
        Refusal::invalid(format!(
            "forward.target is {:?} (expected ADDRESS:PORT, as 192.168.127.2:80)",
            message.target
        ))
    })?;
    Ok(Forward {
        protocol,
        listen,
        target,
        keep_client: message.keep_client_address,
        asked_by: message.asked_by.clone(),
        grant_id: message.grant_id.clone(),
    })
}

/// Reads what names a forward.
pub(super) fn forward_key_from_wire(message: &v1::Forward) -> Result<(Protocol, ForwardListen), Refusal> {
    let protocol = match message.protocol() {
        v1::Protocol::Tcp => Protocol::Tcp,
        v1::Protocol::Udp => Protocol::Udp,
        _ => return Err(Refusal::invalid("forward.protocol is neither tcp nor udp")),
    };
    let listen = message
        .listen
        .parse()
        .map_err(|error| Refusal::invalid(format!("forward.listen: {error}")))?;
    Ok((protocol, listen))
}

pub(super) fn zone_to_wire(zone: &Zone, network: &str) -> v1::Zone {
    v1::Zone {
        network: network.to_owned(),
        name: zone.text().to_owned(),
        records: zone
            .records
            .iter()
            .map(|record| v1::ZoneRecord {
                name: record.owner.name().map(ToString::to_string).unwrap_or_default(),
                address: record.address.map(|a| a.to_string()).unwrap_or_default(),
                regexp: record
                    .owner
                    .pattern()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            })
            .collect(),
        default_address: zone.default_address.map(|a| a.to_string()).unwrap_or_default(),
    }
}

pub(super) fn zone_from_wire(message: &v1::Zone) -> Result<Zone, Refusal> {
    let records = message
        .records
        .iter()
        .map(|r| [&*r.name, &*r.regexp, &*r.address]);
    Zone::read(&message.name, records, &message.default_address)
        .map_err(|problem| Refusal::invalid(problem.to_string()))
}

/// The longest lease that is taken. A cached allow never outlives it without a controlplane.
const LEASE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest heartbeat interval that is taken.
const HEARTBEAT_MAX: Duration = Duration::from_secs(10 * 60);
/// The longest time to live that is told to a guest.
const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest time for which a cached allow outlives its lease.
pub(super) const LOSS_GRACE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest hold that is taken.
pub(super) const HOLD_MAX: Duration = Duration::from_secs(60 * 60);

/// A cached verdict for the wire.
pub(super) fn cached_to_wire(cached: &CachedVerdict) -> v1::CachedVerdict {
    v1::CachedVerdict {
        action: v1::Action::from(cached.action).into(),
        r#match: Some((&cached.found).into()),
        epoch: Some(cached.epoch.into()),
        would_deny: cached.would_deny,
        guards: cached.guards.iter().map(|g| v1::Guard::from(g).into()).collect(),
        peer: cached.neighbour.map_or(0, |vm| vm.0),
        grant_id: cached.grant.clone(),
        names: cached.names.iter().map(ToString::to_string).collect(),
    }
}
