//! What policy means, tested through its public functions.

mod aliases;
mod defaults;
mod documentation;
mod forwards;
mod guests;
mod host;
mod language;
mod loading;
mod order;
mod property;
mod published;
mod remedies;
mod resolvers;
mod sets;
mod settings;
mod synthetic;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{
    Budget, FlowKey, FlowSubject, Guard, LookupSubject, Mode, Protocol, Target, VmSelector,
};

use super::*;
use crate::grant::{Grant, GrantAction, GrantId, Lifetime, VmGrants, VmInstance, VmView};

/// The sample in the design, which users of the draft have.
const SAMPLE: &str = r#"defaultAction: deny
rules:
  - action: allow
    cidr: "0.0.0.0/0"
    ports: [443, 80]
    protocol: tcp
  - action: deny
    cidr: "10.0.0.0/8"
dns:
  defaultAction: deny
  allowedDomains: ["*.github.com", "registry.fedoraproject.org"]
  blockedDomains: ["*.malware.example"]
approvalTimeout: 30
"#;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// A moment at which both clocks agree.
fn at(time: SystemTime) -> crate::clock::Now {
    crate::clock::Now {
        steady: time,
        wall: time,
    }
}

fn vm() -> VmView {
    VmView {
        name: "web-1".into(),
        labels: BTreeMap::from([("role".into(), "agent".into())]),
        instance: VmInstance("boot/1".into()),
    }
}

fn guarded() -> GuardedRanges {
    GuardedRanges::new(
        ["192.168.127.0/24".parse().unwrap()],
        [
            "192.168.127.254".parse().unwrap(),
            "203.0.113.9".parse().unwrap(),
            "10.0.0.9".parse().unwrap(),
            "fd12::9".parse().unwrap(),
        ],
    )
}

fn policy(document: &str) -> Policy {
    Policy::parse("p.yaml", document).unwrap_or_else(|errors| panic!("{errors}"))
}

fn effective(document: Option<&str>, mode: Option<Mode>) -> Effective {
    let policy = document.map(policy);
    let claimed = policy.as_ref().map(|policy| PolicyInForce {
        name: "default",
        revision: 3,
        policy,
    });
    Effective::compose(at(now()), &vm(), claimed, None, Modes { set: None, own: mode })
}

fn grants<'a>(texts: impl IntoIterator<Item = &'a str>) -> VmGrants {
    let made = texts.into_iter().enumerate().map(|(index, text)| {
        let (action, target) = text.split_once(' ').unwrap();
        let action = if action == "allow" {
            GrantAction::Allow
        } else {
            GrantAction::Deny
        };
        let id = GrantId(format!("g{index}"));
        let target = target.parse().unwrap();
        let all = VmSelector::all();
        Arc::new(Grant::new(
            id,
            action,
            target,
            all,
            Lifetime::Forever,
            Budget::default(),
            "ann".into(),
            now(),
        ))
    });
    VmGrants::new(made, 1)
}

/// `tcp 1.2.3.4:443 [name...] [!guard...]`, dialled as seen but for the host alias, and judged as it comes
/// from the wire.
fn flow(text: &str) -> FlowSubject {
    let mut words = text.split(' ');
    let protocol: Protocol = words.next().unwrap().parse().unwrap();
    let peer = words.next().unwrap();
    let peer = if protocol.has_ports() {
        peer.parse().unwrap()
    } else {
        std::net::SocketAddr::new(peer.parse().unwrap(), 0)
    };
    let guest = if peer.is_ipv4() {
        "192.168.127.2:40000"
    } else {
        "[fd00::2]:40000"
    };
    let mut subject = FlowSubject {
        key: FlowKey {
            protocol,
            guest: guest.parse().unwrap(),
            peer,
        }
        .judged(),
        dialled: peer.ip(),
        names: Vec::new(),
        guards: Default::default(),
        peer_vm: None,
    };
    if peer.ip() == "192.168.127.254".parse::<IpAddr>().unwrap() {
        subject.dialled = "127.0.0.1".parse().unwrap();
    }
    for word in words {
        match word.strip_prefix('!') {
            Some(guard) => {
                let guard = Guard::ALL.into_iter().find(|g| g.to_string() == guard).unwrap();
                subject.guards = subject.guards.with(guard);
            }
            None => subject.names.push(word.parse().unwrap()),
        }
    }
    subject
}

fn lookup(name: &str) -> LookupSubject {
    LookupSubject::new(name.parse().unwrap(), 1)
}

fn decide(effective: &Effective, grants: &VmGrants, text: &str) -> FlowDecision {
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let decision = decide_flow(&context, &flow(text));
    assert!(
        decision.found.matches(&flow(text).key),
        "{} does not cover {text}",
        decision.found
    );
    decision
}

fn ask_name(effective: &Effective, grants: &VmGrants, name: &str) -> LookupDecision {
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let decision = decide_lookup(&context, &lookup(name));
    assert!(
        decision.found.matches(&lookup(name).name),
        "{} does not cover {name}",
        decision.found
    );
    decision
}

/// Outcome, step and subject of a flow.
#[track_caller]
fn says(effective: &Effective, grants: &VmGrants, text: &str, outcome: Outcome, step: &str, subject: &str) {
    let decision = decide(effective, grants, text);
    let found = (
        decision.outcome,
        decision.reason.step.as_str(),
        decision.reason.subject.as_str(),
    );
    assert_eq!(found, (outcome, step, subject), "{text}: {}", decision.reason);
}

/// Outcome, step and subject of a lookup.
#[track_caller]
fn says_name(
    effective: &Effective,
    grants: &VmGrants,
    name: &str,
    outcome: Outcome,
    step: &str,
    subject: &str,
) {
    let decision = ask_name(effective, grants, name);
    let found = (
        decision.outcome,
        decision.reason.step.as_str(),
        decision.reason.subject.as_str(),
    );
    assert_eq!(found, (outcome, step, subject), "{name}: {}", decision.reason);
}
