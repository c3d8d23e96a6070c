//! Guests towards each other: closed but for what names the other's address.

use super::Outcome::{Allow, Ask, Deny, Drop};
use super::*;

const DB: &str = "192.168.127.3";

/// A flow of web-1's to VM db, decided.
fn decide_to(effective: &Effective, grants: &VmGrants, text: &str, peer: Option<Mode>) -> FlowDecision {
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: Some(PeerView {
            name: "db",
            mode: peer,
        }),
    };
    let subject = flow(&format!("{text} !guest"));
    let decision = decide_flow(&context, &subject);
    assert_eq!(
        decision.found.to_string(),
        subject.key.to_string(),
        "what is decided of a guest holds for one address and port"
    );
    decision
}

fn outcome(effective: &Effective, text: &str) -> Outcome {
    decide_to(effective, &grants([]), text, Some(Mode::Enforce)).outcome
}

#[test]
fn a_broad_rule_opens_no_guest_and_one_that_names_the_address_does() {
    let tcp = format!("tcp {DB}:22");
    for (rule, expected) in [
        ("{action: allow}", Deny),
        ("{action: allow, cidr: 0.0.0.0/0}", Deny),
        ("{action: allow, cidr: 192.0.0.0/8, protocol: any}", Deny),
        ("{action: allow, cidr: 192.168.126.0/23}", Deny),
        ("{action: allow, cidr: 192.168.0.0/16, ports: [22]}", Deny),
        ("{action: allow, cidr: 192.168.127.0/24}", Allow),
        ("{action: allow, cidr: 192.168.127.0/30}", Allow),
        ("{action: allow, cidr: 192.168.127.3/32}", Allow),
        ("{action: allow, cidr: 192.168.127.3/32, ports: [22]}", Allow),
        ("{action: allow, cidr: 192.168.127.3/32, ports: [23]}", Deny),
        ("{action: allow, cidr: 192.168.127.3/32, protocol: udp}", Deny),
        ("{action: allow, cidr: 192.168.127.4/32}", Deny),
        ("{action: allow, cidrs: [0.0.0.0/0, 192.168.127.3/32]}", Allow),
        ("{action: allow, domains: [db.test]}", Deny),
        ("{action: allow, cidr: 192.168.127.3/32, vm: {name: other}}", Deny),
        ("{action: ask, cidr: 0.0.0.0/0}", Deny),
        ("{action: ask, cidr: 192.168.127.3/32}", Ask),
        ("{action: deny, cidr: 0.0.0.0/0}", Deny),
        ("{action: drop}", Drop),
    ] {
        for default in ["allow", "deny"] {
            let document = format!("defaultAction: {default}\nrules: [{rule}]");
            let policy = effective(Some(&document), None);
            assert_eq!(outcome(&policy, &tcp), expected, "{document}");
        }
    }
}

#[test]
fn a_name_that_stands_for_a_guests_address_opens_nothing() {
    let policy = effective(
        Some("rules: [{action: allow, domains: [db.test]}]\ndns: {allowedDomains: [db.test]}"),
        None,
    );
    let text = format!("tcp {DB}:22 db.test !private-from-dns");
    assert_eq!(outcome(&policy, &text), Deny);
    let named = effective(Some("rules: [{action: allow, cidr: 192.168.127.3/32}]"), None);
    assert_eq!(outcome(&named, &text), Allow);
}

#[test]
fn echo_needs_a_rule_for_echo() {
    let ping = format!("icmp {DB}");
    let tcp_only = effective(Some("rules: [{action: allow, cidr: 192.168.127.3/32}]"), None);
    assert_eq!(outcome(&tcp_only, &ping), Deny);
    let any = effective(
        Some("rules: [{action: allow, cidr: 192.168.127.3/32, protocol: icmp}]"),
        None,
    );
    assert_eq!(outcome(&any, &ping), Allow);
}

#[test]
fn grants_open_a_guest_only_by_its_address() {
    let tcp = format!("tcp {DB}:22");
    let closed = effective(Some("version: 1"), None);
    let open = effective(None, None);
    for (grant, expected) in [
        ("allow tcp 0.0.0.0/0", Deny),
        ("allow any 192.168.0.0/16", Deny),
        ("allow domain db.test", Deny),
        ("allow tcp 192.168.127.3:22", Allow),
        ("allow any 192.168.127.0/24", Allow),
        ("deny tcp 0.0.0.0/0", Deny),
    ] {
        for policy in [&closed, &open] {
            let decision = decide_to(policy, &grants([grant]), &tcp, Some(Mode::Enforce));
            assert_eq!(decision.outcome, expected, "{grant}");
        }
    }
}

#[test]
fn the_guard_asks_in_mode_ask_and_denies_in_all_others() {
    let tcp = format!("tcp {DB}:22");
    for (mode, expected) in [
        (Mode::Ask, Ask),
        (Mode::Enforce, Deny),
        (Mode::Observe, Deny),
        (Mode::Block, Deny),
    ] {
        let policy = effective(Some("defaultAction: allow\nrules: [{action: allow}]"), Some(mode));
        let decision = decide_to(&policy, &grants([]), &tcp, Some(Mode::Enforce));
        assert_eq!(decision.outcome, expected, "{mode}");
        if mode != Mode::Block {
            assert_eq!(decision.reason.subject, "guest");
            assert!(
                decision.reason.text.contains("the address of VM db"),
                "{}",
                decision.reason
            );
            assert_eq!(decision.remedy, "vnetctl allow tcp 192.168.127.3:22 --vm web-1");
        }
    }
}

#[test]
fn a_guest_in_mode_block_or_quarantine_is_closed_to_the_others_too() {
    let tcp = format!("tcp {DB}:22");
    let named = effective(Some("rules: [{action: allow, cidr: 192.168.127.3/32}]"), None);
    let granted = grants(["allow tcp 192.168.127.3:22"]);
    for peer in [Mode::Block, Mode::Quarantine] {
        for policy in [&named, &effective(None, None), &effective(None, Some(Mode::Ask))] {
            let decision = decide_to(policy, &granted, &tcp, Some(peer));
            assert_eq!(decision.outcome, Deny, "{peer}");
            assert_eq!(decision.reason.step, "mode");
            assert_eq!(decision.remedy, "vnetctl vm mode db enforce");
        }
    }
    for peer in [None, Some(Mode::Enforce), Some(Mode::Ask), Some(Mode::Observe)] {
        assert_eq!(
            decide_to(&named, &grants([]), &tcp, peer).outcome,
            Allow,
            "{peer:?}"
        );
    }
    // Its own mode comes first, and a mode elsewhere is no concern of what is no guest.
    let blocked = effective(None, Some(Mode::Block));
    let decision = decide_to(&blocked, &granted, &tcp, Some(Mode::Quarantine));
    assert_eq!(decision.reason.subject, "block");
}

#[test]
fn no_match_outside_reaches_into_the_guests_subnet() {
    let subnet: ipnet::IpNet = "192.168.127.0/24".parse().unwrap();
    for document in [
        None,
        Some("defaultAction: allow"),
        Some("rules: [{action: allow, cidr: 0.0.0.0/0}]"),
        Some("rules: [{action: allow, cidr: 192.168.0.0/16}]"),
        Some("rules: [{action: deny, cidr: 192.0.0.0/8}]"),
        Some("version: 1"),
    ] {
        let policy = effective(document, None);
        for outside in ["192.168.126.255", "192.168.128.1", "192.168.1.1", "203.0.113.77"] {
            let found = decide(&policy, &grants([]), &format!("tcp {outside}:22")).found;
            assert!(
                !found.prefix.contains(&subnet) && !subnet.contains(&found.prefix),
                "{outside} under {document:?}: {found}"
            );
        }
    }
}
