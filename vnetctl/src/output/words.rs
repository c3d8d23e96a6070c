//! The contract's values in the words that a person types: `tcp 10.0.0.1:80`, `until the VM stops`.
//!
//! These read what a controlplane sent and never refuse: what this version does not know is shown as it
//! is, so that an old tool can still list what a new controlplane holds.

use std::time::Duration;

use vnet_proto::model::{NamePattern, Target, VmSelector};
use vnet_proto::v1;

use super::text;

/// What a grant or a question is about, as `vnetctl allow` takes it; a forward that a VM asks for in words, as
/// `to open tcp 127.0.0.1:8080 to its port 80`.
pub fn target(target: Option<&v1::Target>) -> String {
    match target.cloned().map(Target::try_from) {
        Some(Ok(Target::Forward(forward))) => forward.in_words(),
        Some(Ok(target)) => target.to_string(),
        Some(Err(error)) => format!("unreadable ({error})"),
        None => text::NONE.to_owned(),
    }
}

/// What a person should know who allows a target: that anyone may own a name in it.
pub fn warning(target: &Target) -> Option<String> {
    let Target::Name {
        pattern: pattern @ NamePattern::Subdomains(suffix),
        ..
    } = target
    else {
        return None;
    };
    let listed = psl::suffix(suffix.as_str().as_bytes()).filter(|found| *found == suffix.as_str())?;
    listed
        .is_known()
        .then(|| format!("warning: {pattern} covers a public suffix: anyone may own a name below {suffix}"))
}

/// Which VMs.
pub fn selector(selector: Option<&v1::VmSelector>) -> String {
    match selector.cloned().map(VmSelector::try_from) {
        Some(Ok(selector)) if selector.is_all() => "all VMs".to_owned(),
        Some(Ok(selector)) => selector.to_string(),
        _ => text::NONE.to_owned(),
    }
}

/// `K=V` pairs in order.
pub fn labels(labels: &std::collections::HashMap<String, String>) -> String {
    let mut pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    pairs.sort();
    pairs.join(",")
}

/// How long a grant holds.
pub fn lifetime(lifetime: Option<&v1::Lifetime>) -> String {
    match lifetime.and_then(|l| l.kind.as_ref()) {
        Some(v1::lifetime::Kind::Once(_)) => "once".to_owned(),
        Some(v1::lifetime::Kind::Duration(d)) => {
            format!("for {}", text::span(Duration::try_from(*d).unwrap_or_default()))
        }
        Some(v1::lifetime::Kind::UntilVmStops(_)) => "until the VM stops".to_owned(),
        Some(v1::lifetime::Kind::Forever(_)) => "forever".to_owned(),
        None => text::NONE.to_owned(),
    }
}

/// The limits of a grant, as `5 connections, 5.2 MB up`; with what is used of them, as
/// `2/5 connections, 1.0 MB/5.2 MB up`. Empty where there is none.
pub fn budget(budget: Option<&v1::Budget>, used: Option<&v1::Budget>) -> String {
    let budget = budget.copied().unwrap_or_default();
    let part = |limit: u64, spent: fn(&v1::Budget) -> u64, unit: &str, shown: fn(u64) -> String| {
        let of = used.map(|u| format!("{}/", shown(spent(u)))).unwrap_or_default();
        (limit != 0).then(|| format!("{of}{} {unit}", shown(limit)))
    };
    let connections = if budget.connections == 1 {
        "connection"
    } else {
        "connections"
    };
    let parts = [
        part(
            budget.connections,
            |b| b.connections,
            connections,
            |n| n.to_string(),
        ),
        part(budget.bytes_up, |b| b.bytes_up, "up", text::bytes),
        part(budget.bytes_down, |b| b.bytes_down, "down", text::bytes),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// An enum's value without its prefix, in lower case with dashes: `FLOW_DIRECTION_EGRESS` is `egress`.
fn plain(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix)
        .unwrap_or(name)
        .to_ascii_lowercase()
        .replace('_', "-")
}

macro_rules! enum_words {
    ($($(#[$doc:meta])* $function:ident($kind:ty, $prefix:literal);)*) => {$(
        $(#[$doc])*
        pub fn $function(value: i32) -> String {
            match <$kind>::try_from(value) {
                Ok(known) => plain(known.as_str_name(), $prefix),
                Err(_) => value.to_string(),
            }
        }
    )*};
}

enum_words! {
    /// `tcp`, `udp` ...
    protocol(v1::Protocol, "PROTOCOL_");
    /// `allow`, `deny` ...
    action(v1::Action, "ACTION_");
    /// `enforce`, `ask` ...
    mode(v1::Mode, "MODE_");
    /// `metadata`, `host` ...
    guard(v1::Guard, "GUARD_");
    /// `attached`, `detached` ...
    vm_state(v1::VmState, "VM_STATE_");
    /// `open`, `approved` ...
    pending_state(v1::PendingState, "PENDING_STATE_");
    /// `host-port`, `name` ...
    scope(v1::Scope, "SCOPE_");
    /// `flow-opened`, `grant-created` ...
    event_kind(v1::EventKind, "EVENT_KIND_");
    /// `egress`, `ingress`.
    direction(v1::FlowDirection, "FLOW_DIRECTION_");
    /// `added`, `updated` ...
    vm_change(v1::VmChange, "VM_CHANGE_");
    /// `added`, `updated` ...
    pending_change(v1::PendingChange, "PENDING_CHANGE_");
    /// `added`, `updated` ...
    flow_change(v1::FlowChange, "FLOW_CHANGE_");
}

/// A reason as `rule rules[2]: sentence`.
pub fn reason(reason: Option<&v1::Reason>) -> String {
    let Some(reason) = reason else {
        return text::NONE.to_owned();
    };
    let head = [reason.step.as_str(), reason.subject.as_str()];
    let head = head
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    match (head.is_empty(), reason.text.is_empty()) {
        (false, false) => format!("{head}: {}", reason.text),
        (true, false) => reason.text.clone(),
        _ => text::or_none(head),
    }
}

/// Where a decision came from, short enough for a column: `rules[2]`, `metadata`, else the step.
pub fn reason_short(reason: Option<&v1::Reason>) -> String {
    match reason {
        Some(reason) if !reason.subject.is_empty() => reason.subject.clone(),
        Some(reason) => text::or_none(reason.step.as_str()),
        None => text::NONE.to_owned(),
    }
}

/// What a change did to live flows, and who has not confirmed it; empty when there is nothing to say.
pub fn cut(report: Option<&v1::CutReport>) -> String {
    let Some(report) = report else {
        return String::new();
    };
    let on = match report.dataplanes_cut {
        0 => String::new(),
        1 => " on 1 dataplane".to_owned(),
        count => format!(" on {count} dataplanes"),
    };
    let mut said = match report.flows {
        0 => String::new(),
        1 => format!("; 1 live flow{on} was cut"),
        flows => format!("; {flows} live flows{on} were cut"),
    };
    if !report.dataplanes_silent.is_empty() {
        said.push_str(&format!(
            "; not acknowledged yet by {} (their verdicts end with their leases)",
            report.dataplanes_silent.join(", ")
        ));
    }
    said
}

/// A flow's far end, as `tcp 10.0.0.1:80`.
pub fn far_end(tuple: Option<&v1::FlowTuple>) -> String {
    tuple.map_or_else(
        || text::NONE.to_owned(),
        |t| format!("{} {}", protocol(t.protocol), endpoint(&t.address, t.port)),
    )
}

/// What is reached, with the VM whose address it is, as `tcp 192.168.127.3:22 (db)`; nothing is added where
/// that is none.
pub fn of_vm(what: String, peer_vm: &str) -> String {
    if peer_vm.is_empty() {
        what
    } else {
        format!("{what} ({peer_vm})")
    }
}

/// A flow's end in the guest, as `192.168.127.2:40000`.
pub fn near_end(tuple: Option<&v1::FlowTuple>) -> String {
    tuple.map_or_else(
        || text::NONE.to_owned(),
        |t| endpoint(&t.guest_address, t.guest_port),
    )
}

fn endpoint(address: &str, port: u32) -> String {
    match (port, address.contains(':')) {
        (0, _) => address.to_owned(),
        (_, true) => format!("[{address}]:{port}"),
        (_, false) => format!("{address}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(protocol: v1::Protocol, prefix: &str, ports: Option<(u32, u32)>) -> v1::Target {
        v1::Target {
            kind: Some(v1::target::Kind::Address(v1::AddressTarget {
                protocol: protocol.into(),
                prefix: prefix.to_owned(),
                ports: ports.map(|(first, last)| v1::PortRange { first, last }),
            })),
        }
    }

    #[test]
    fn names_that_anyone_may_own_are_warned_of() {
        let warned = |words: &str| warning(&words.parse::<Target>().unwrap());
        for (words, expected) in [
            (
                "domain *.com",
                "*.com covers a public suffix: anyone may own a name below com",
            ),
            (
                "domain *.co.uk:443",
                "*.co.uk covers a public suffix: anyone may own a name below co.uk",
            ),
            (
                "lookup *.github.io",
                "*.github.io covers a public suffix: anyone may own a name below github.io",
            ),
        ] {
            assert_eq!(warned(words), Some(format!("warning: {expected}")), "{words}");
        }
        // A name of its own, one that is in no list, and addresses.
        for words in [
            "domain *.example.com",
            "domain com",
            "domain *.corp",
            "tcp 0.0.0.0/0:443",
        ] {
            assert_eq!(warned(words), None, "{words}");
        }
    }

    #[test]
    fn targets_read_as_they_are_typed() {
        let name = v1::Target {
            kind: Some(v1::target::Kind::Name(v1::NameTarget {
                name: "*.github.com".to_owned(),
                ports: Some(v1::PortRange { first: 443, last: 0 }),
                lookup_only: false,
            })),
        };
        let cases = [
            (
                address(v1::Protocol::Tcp, "192.0.2.7/32", Some((443, 0))),
                "tcp 192.0.2.7:443",
            ),
            (
                address(v1::Protocol::Tcp, "192.0.2.7", Some((443, 443))),
                "tcp 192.0.2.7:443",
            ),
            (
                address(v1::Protocol::Udp, "10.0.0.0/8", Some((8000, 8999))),
                "udp 10.0.0.0/8:8000-8999",
            ),
            (
                address(v1::Protocol::Tcp, "2001:db8::1/128", Some((22, 22))),
                "tcp [2001:db8::1]:22",
            ),
            (
                address(v1::Protocol::Icmpv6, "2001:db8::1/128", None),
                "icmpv6 2001:db8::1",
            ),
            (
                address(v1::Protocol::Unspecified, "10.0.0.0/8", None),
                "any 10.0.0.0/8",
            ),
            (name, "domain *.github.com:443"),
        ];

        for (message, expected) in cases {
            assert_eq!(target(Some(&message)), expected);
        }
        let forward = v1::Target {
            kind: Some(v1::target::Kind::Forward(v1::ForwardTarget {
                protocol: v1::Protocol::Tcp.into(),
                listen: "127.0.0.1:8080".to_owned(),
                guest_port: 80,
            })),
        };
        assert_eq!(
            target(Some(&forward)),
            "to open tcp 127.0.0.1:8080 to its port 80"
        );
        assert_eq!(target(None), "-");
    }

    #[test]
    fn selectors_say_all_only_when_all_is_meant() {
        let by = |name: &str, labels: &[(&str, &str)], all| v1::VmSelector {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            all,
        };

        assert_eq!(selector(Some(&by("web", &[], false))), "web");
        assert_eq!(
            selector(Some(&by("", &[("b", "2"), ("a", "1")], false))),
            "a=1,b=2"
        );
        assert_eq!(selector(Some(&by("", &[], true))), "all VMs");
        assert_eq!(selector(Some(&by("", &[], false))), "-");
    }

    #[test]
    fn a_budget_shows_what_is_used_of_each_limit() {
        let limits = v1::Budget {
            connections: 5,
            bytes_up: 0,
            bytes_down: 50_000_000,
        };
        let used = v1::Budget {
            connections: 2,
            bytes_up: 77,
            bytes_down: 1_200_000,
        };
        assert_eq!(budget(Some(&limits), None), "5 connections, 50.0 MB down");
        assert_eq!(
            budget(Some(&limits), Some(&used)),
            "2/5 connections, 1.2 MB/50.0 MB down"
        );
        assert_eq!(budget(None, Some(&used)), "");
    }

    #[test]
    fn values_of_a_newer_contract_are_shown_as_numbers() {
        assert_eq!(mode(v1::Mode::Quarantine.into()), "quarantine");
        assert_eq!(event_kind(v1::EventKind::FlowOpened.into()), "flow-opened");
        assert_eq!(mode(77), "77");
    }

    #[test]
    fn silent_dataplanes_are_named() {
        let report = v1::CutReport {
            flows: 2,
            dataplanes_acknowledged: 1,
            dataplanes_silent: vec!["host-9".to_owned()],
            dataplanes_cut: 1,
        };

        assert_eq!(
            cut(Some(&report)),
            "; 2 live flows on 1 dataplane were cut; not acknowledged yet by host-9 (their verdicts end with their leases)"
        );
        assert_eq!(cut(Some(&v1::CutReport::default())), "");
    }
}
