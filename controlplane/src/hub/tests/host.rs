//! What a dataplane says of the host: where destinations are dialled, and which VMs metadata services are open to.

use super::*;

const METADATA: &str = "169.254.169.254:80";

fn metadata_flow() -> Subject {
    let Subject::Flow(mut subject) = flow(METADATA, &[]) else {
        unreachable!()
    };
    subject.guards = subject.guards.with(vnet_proto::model::Guard::Metadata);
    Subject::Flow(subject)
}

fn with_flag(handle: u32, name: &str) -> v1::VmUp {
    v1::VmUp {
        ec2_metadata_access: true,
        ..vm_up(handle, name)
    }
}

/// Action, step and subject.
fn explained(rig: &Rig, vm: &str, target: &str) -> (i32, String, String) {
    let explained = rig.hub.explain(vm, &target.parse().unwrap()).unwrap();
    let reason = explained.reason.unwrap();
    (explained.action, reason.step, reason.subject)
}

#[test]
fn the_flag_is_that_of_the_vm_that_brings_it_and_is_explained() {
    let rig = Rig::open();
    let mut dp = rig.dataplane_with(hello(1, vec![with_flag(1, "cloud"), vm_up(2, "other")]));
    assert_eq!(dp.verdict(metadata_flow()).action, ALLOW, "of the first");
    let target = format!("tcp {METADATA}");
    let flag = (ALLOW, "rule".to_owned(), "--ec2-metadata-access".to_owned());
    let guard = (DENY, "guard".to_owned(), "metadata".to_owned());
    assert_eq!(explained(&rig, "cloud", &target), flag);
    assert_eq!(explained(&rig, "other", &target), guard);
    assert_eq!(explained(&rig, "cloud", "tcp [fd00:ec2::254]:80"), guard);

    // A policy that comes later leaves it open, and one that names it closes it.
    rig.apply("defaultAction: deny\n");
    assert_eq!(explained(&rig, "cloud", &target), flag);
    rig.apply("defaultAction: allow\nrules: [{action: deny, cidr: 169.254.169.254/32}]\n");
    let rule = (DENY, "rule".to_owned(), "rules[0]".to_owned());
    assert_eq!(explained(&rig, "cloud", &target), rule);
}

#[test]
fn secure_mode_asks_nobody_about_what_the_flag_opens() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane_with(hello(1, vec![with_flag(1, "cloud")]));
    assert_eq!(dp.verdict(metadata_flow()).action, ALLOW);
    assert!(rig.hub.pending(Which::default()).is_empty());
    dp.miss(flow(WEB, &[]));
    assert_eq!(
        rig.hub.pending(Which::default()).len(),
        1,
        "and about the rest as ever"
    );
}

#[test]
fn a_vm_that_attaches_again_without_the_flag_has_it_no_more() {
    let rig = Rig::open();
    let dp = rig.dataplane_with(hello(1, vec![with_flag(1, "cloud")]));
    let target = format!("tcp {METADATA}");
    assert_eq!(explained(&rig, "cloud", &target).0, ALLOW);
    drop(dp);
    let _dp = rig.dataplane_with(hello(1, vec![vm_up(1, "cloud")]));
    assert_eq!(explained(&rig, "cloud", &target).0, DENY);
}

fn nat(entries: &[(&str, &str)]) -> Vec<v1::Nat> {
    let entry = |(address, dialled): &(&str, &str)| v1::Nat {
        address: (*address).to_owned(),
        dialled: (*dialled).to_owned(),
    };
    entries.iter().map(entry).collect()
}

#[test]
fn what_is_dialled_elsewhere_is_explained_by_where_that_is() {
    let rig = Rig::open();
    rig.apply(
        "version: 1\nrules:\n  - {action: deny, cidr: 10.0.0.0/8}\n  - {action: allow, cidr: 0.0.0.0/0}\n",
    );
    let mut dp = rig.dataplane_with(v1::Hello {
        nat: nat(&[("198.51.100.1", "10.0.0.7"), ("198.51.100.2", "127.0.0.1")]),
        ..hello(1, vec![vm_up(1, "web")])
    });
    let rule = |index: u32| ("rule".to_owned(), format!("rules[{index}]"));
    let (action, step, subject) = explained(&rig, "web", "tcp 198.51.100.1:80");
    assert_eq!((action, (step, subject)), (DENY, rule(0)));
    for host in ["198.51.100.2", "192.168.127.254"] {
        let explained = rig.hub.explain("web", &format!("tcp {host}:80").parse().unwrap());
        let explained = explained.unwrap();
        assert_eq!(
            (explained.action, explained.guards),
            (DENY, vec![v1::Guard::Host as i32]),
            "{host}"
        );
    }
    let (action, step, subject) = explained(&rig, "web", "tcp 198.51.100.3:80");
    assert_eq!((action, (step, subject)), (ALLOW, rule(1)));

    // No verdict reaches over them.
    let verdict = dp.verdict(flow("198.51.100.3:80", &[]));
    let Some(v1::verdict::Match::Flow(found)) = verdict.r#match else {
        panic!("{verdict:?}")
    };
    assert_eq!(
        (found.prefix, found.prefix_length),
        (vec![198, 51, 100, 3], 32),
        "its neighbours lead elsewhere"
    );
}

#[test]
fn a_hello_with_wrong_or_too_many_translations_is_refused_and_says_why() {
    let rig = Rig::open();
    let refused = |nat: Vec<v1::Nat>| {
        let hello = v1::Hello {
            nat,
            ..hello(1, Vec::new())
        };
        rig.hub
            .attach(hello, "")
            .err()
            .map(|status| status.message().to_owned())
    };
    let most = nat(&vec![("198.51.100.1", "10.0.0.7"); 256]);
    assert_eq!(refused(most), None);
    let more = nat(&vec![("198.51.100.1", "10.0.0.7"); 257]);
    assert_eq!(
        refused(more).as_deref(),
        Some("hello.nat has 257 entries (at most 256)")
    );
    assert_eq!(
        refused(nat(&[("198.51.100.1", "host")])).as_deref(),
        Some("hello.nat.dialled is \"host\", which does not parse")
    );
    assert_eq!(
        refused(nat(&[("", "10.0.0.7")])).as_deref(),
        Some("hello.nat.address is empty (expected an address)")
    );
}
