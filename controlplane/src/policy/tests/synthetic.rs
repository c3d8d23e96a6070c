//! Synthetic answers: what is decided of a name, and of the address that it turns out to stand for.

use super::Outcome::{Allow, Ask, Deny, Drop};
use super::*;

const STAND_IN: &str = "198.18.0.1";

/// A flow to the synthetic address of a name; `found`: what it was resolved to.
fn stand_in(protocol_port: (&str, u16), name: &str, found: Option<&str>) -> FlowSubject {
    let (protocol, port) = protocol_port;
    let to = if port == 0 {
        STAND_IN.to_owned()
    } else {
        format!("{STAND_IN}:{port}")
    };
    let mut subject = flow(&format!("{protocol} {to} {name} !synthetic"));
    if let Some(found) = found {
        subject.dialled = found.parse().unwrap();
        subject.guards = subject
            .guards
            .iter()
            .chain(guarded().guards_of(subject.dialled, false).iter())
            .collect();
    }
    subject
}

fn judge(effective: &Effective, grants: &VmGrants, subject: &FlowSubject) -> FlowDecision {
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let decision = decide_flow(&context, subject);
    assert_eq!(
        decision.found.to_string(),
        subject.key.to_string(),
        "one address, one port"
    );
    assert!(decision.found.names_consulted);
    decision
}

/// What becomes of https to a name, by the name and then by an address.
fn https(effective: &Effective, grants: &VmGrants, name: &str, found: &str) -> (Outcome, Outcome) {
    let of = |found| judge(effective, grants, &stand_in(("tcp", 443), name, found)).outcome;
    (of(None), of(Some(found)))
}

fn under(rules: &str) -> Effective {
    let document = format!("version: 1\nmode: ask\ndns: {{answer: synthetic}}\nrules: {rules}\n");
    effective(Some(&document), None)
}

#[test]
fn a_lookup_that_would_be_asked_about_gets_an_address_and_only_that() {
    let policy = under("[{action: deny, domains: [bad.test]}, {action: allow, domains: [good.test]}]");
    let asked = ask_name(&policy, &grants([]), "new.test");
    assert_eq!((asked.outcome, asked.synthetic_only), (Allow, true));
    assert_eq!(asked.found.to_string(), "new.test", "of this name alone");
    assert_eq!(asked.reason.subject, "dns.answer");
    let good = ask_name(&policy, &grants([]), "good.test");
    assert_eq!((good.outcome, good.synthetic_only), (Allow, false));
    let bad = ask_name(&policy, &grants([]), "bad.test");
    assert_eq!((bad.outcome, bad.synthetic_only), (Deny, false));

    let real = effective(Some("version: 1\nmode: ask\n"), None);
    assert_eq!(ask_name(&real, &grants([]), "new.test").outcome, Ask);
    let enforced = effective(Some("version: 1\ndns: {answer: synthetic}\n"), None);
    assert_eq!(ask_name(&enforced, &grants([]), "new.test").outcome, Deny);
}

#[test]
fn the_question_is_about_the_name_and_port() {
    let policy = under("[]");
    let decision = judge(&policy, &grants([]), &stand_in(("tcp", 443), "api.test", None));
    assert_eq!(decision.outcome, Ask);
    assert_eq!(decision.remedy, "vnetctl allow domain 'api.test' --vm web-1");
    let asked_about = Target::of_subject(&stand_in(("tcp", 443), "api.test", None));
    assert_eq!(asked_about.to_string(), "domain api.test:443");
    assert!(
        !decision.reason.text.contains("198.18"),
        "{}",
        decision.reason.text
    );
}

#[test]
fn names_open_it_and_prefixes_never_do() {
    for (rule, expected) in [
        ("{action: allow, domains: [api.test]}", Allow),
        ("{action: allow, domains: ['*.api.test']}", Ask),
        ("{action: allow, domains: [api.test], ports: [80]}", Ask),
        ("{action: allow, cidr: 198.18.0.0/15}", Ask),
        ("{action: allow, cidr: 198.18.0.1/32}", Ask),
        ("{action: allow, cidr: 0.0.0.0/0}", Ask),
        ("{action: allow, ports: [443]}", Allow),
        ("{action: deny, cidr: 198.18.0.0/15}", Ask),
        ("{action: deny, domains: [api.test]}", Deny),
        ("{action: drop, domains: [api.test]}", Drop),
    ] {
        let policy = under(&format!("[{rule}]"));
        let decision = judge(&policy, &grants([]), &stand_in(("tcp", 443), "api.test", None));
        assert_eq!(decision.outcome, expected, "{rule}");
    }
    let policy = under("[]");
    for (grant, expected) in [
        ("allow domain api.test:443", Allow),
        ("allow domain api.test", Allow),
        ("allow domain other.test", Ask),
        ("allow tcp 198.18.0.1:443", Ask),
        ("deny domain api.test", Deny),
    ] {
        let subject = stand_in(("tcp", 443), "api.test", None);
        assert_eq!(
            judge(&policy, &grants([grant]), &subject).outcome,
            expected,
            "{grant}"
        );
    }
}

#[test]
fn a_verdict_by_name_demands_that_name() {
    let policy = under("[{action: allow, domains: [api.test]}]");
    let decision = judge(&policy, &grants([]), &stand_in(("tcp", 443), "api.test", None));
    assert_eq!(decision.name_demand, vnet_proto::model::NameDemand::ByPort);
    assert_eq!(decision.names, ["api.test".parse().unwrap()]);
}

#[test]
fn the_address_found_is_stopped_by_denies_and_guards_and_by_nothing_else() {
    let by_name = under("[{action: allow, domains: [api.test]}]");
    assert_eq!(
        https(&by_name, &grants([]), "api.test", "192.0.2.7"),
        (Allow, Allow)
    );
    let by_grant = under("[]");
    let given = grants(["allow domain api.test:443"]);
    assert_eq!(https(&by_grant, &given, "api.test", "192.0.2.7"), (Allow, Allow));
    // Spent meanwhile: it was for once.
    assert_eq!(
        https(&by_grant, &grants([]), "api.test", "192.0.2.7"),
        (Ask, Allow)
    );

    for private in [
        "10.1.2.3",
        "192.168.127.254",
        "169.254.169.254",
        "203.0.113.9",
        "fd12::9",
    ] {
        assert_eq!(
            https(&by_name, &grants([]), "api.test", private),
            (Allow, Deny),
            "{private}"
        );
    }
    let denied = under("[{action: deny, cidr: 192.0.2.0/24}, {action: allow, domains: [api.test]}]");
    assert_eq!(
        https(&denied, &grants([]), "api.test", "192.0.2.7"),
        (Allow, Deny)
    );
    assert_eq!(
        https(&denied, &grants([]), "api.test", "198.51.100.7"),
        (Allow, Allow)
    );
    let given = grants(["allow domain api.test", "deny tcp 192.0.2.7:443"]);
    assert_eq!(https(&by_grant, &given, "api.test", "192.0.2.7"), (Allow, Deny));
    let blocked = effective(
        Some("version: 1\ndns: {answer: synthetic}\nrules: [{action: allow, domains: [api.test]}]\n"),
        Some(Mode::Block),
    );
    assert_eq!(
        https(&blocked, &grants([]), "api.test", "192.0.2.7"),
        (Deny, Deny)
    );
}

#[test]
fn what_is_found_is_said_with_the_name() {
    let by_name = under("[{action: allow, domains: [api.test]}]");
    let denied = judge(
        &by_name,
        &grants([]),
        &stand_in(("tcp", 443), "api.test", Some("10.1.2.3")),
    );
    assert!(
        denied.reason.text.starts_with("api.test stands for 10.1.2.3:"),
        "{}",
        denied.reason.text
    );
    assert!(denied.once);
}

#[test]
fn a_rule_with_a_name_and_a_prefix_opens_that_name_at_those_addresses() {
    let policy = under("[{action: allow, domains: [db.corp.test], cidr: 10.0.0.0/8}]");
    assert_eq!(
        https(&policy, &grants([]), "db.corp.test", "10.1.2.3"),
        (Allow, Allow)
    );
    assert_eq!(
        https(&policy, &grants([]), "db.corp.test", "192.0.2.7"),
        (Allow, Deny)
    );
    assert_eq!(
        https(&policy, &grants([]), "db.corp.test", "172.16.0.1"),
        (Allow, Deny)
    );
    assert_eq!(https(&policy, &grants([]), "other.test", "10.1.2.3").0, Ask);
    let lookups = under("[{action: allow, domains: [db.corp.test], cidr: 10.0.0.0/8, ports: [22]}]");
    assert_eq!(https(&lookups, &grants([]), "db.corp.test", "10.1.2.3").0, Ask);
}

#[test]
fn what_a_rule_would_ask_about_at_the_address_was_answered_by_the_name_unless_that_was_for_other_addresses() {
    let asked = under("[{action: ask, domains: [api.test]}]");
    let given = grants(["allow domain api.test"]);
    assert_eq!(https(&asked, &given, "api.test", "192.0.2.7"), (Allow, Allow));
    // Spent meanwhile: it was for once.
    assert_eq!(https(&asked, &grants([]), "api.test", "192.0.2.7"), (Ask, Allow));

    let partly = under(
        "[{action: allow, domains: [db.corp.test], cidr: 10.0.0.0/8}, {action: ask, domains: [db.corp.test]}]",
    );
    assert_eq!(
        https(&partly, &grants([]), "db.corp.test", "10.1.2.3"),
        (Allow, Allow)
    );
    assert_eq!(
        https(&partly, &grants([]), "db.corp.test", "192.0.2.7"),
        (Allow, Deny),
        "nobody was asked about this one"
    );
}

#[test]
fn ping_is_not_asked_about_since_no_answer_would_open_it() {
    let asked = judge(
        &under("[]"),
        &grants([]),
        &stand_in(("icmp", 0), "api.test", None),
    );
    assert_eq!(asked.outcome, Deny);
    let policy = under("[{action: allow, protocol: icmp, domains: [api.test]}]");
    let allowed = judge(&policy, &grants([]), &stand_in(("icmp", 0), "api.test", None));
    assert_eq!(allowed.outcome, Allow);
}

#[test]
fn a_live_flow_is_judged_by_its_name_and_its_address() {
    let (vm, guarded) = (vm(), guarded());
    let subject = stand_in(("tcp", 443), "api.test", Some("192.0.2.7"));
    let live = |policy: &Effective, grants: &VmGrants| {
        let context = Context {
            vm: &vm,
            policy,
            grants,
            guarded: &guarded,
            peer: None,
        };
        decide_live(&context, &subject).outcome
    };
    let allowed = under("[{action: allow, domains: [api.test]}]");
    assert_eq!(live(&allowed, &grants([])), Allow);
    assert_eq!(live(&allowed, &grants(["deny any 192.0.2.0/24"])), Deny);
    assert_eq!(live(&allowed, &grants(["deny domain api.test"])), Deny);
    assert_eq!(
        live(&under("[]"), &grants([])),
        Ask,
        "nothing allows the name any more"
    );
    let denied = under("[{action: deny, cidr: 192.0.2.0/24}]");
    assert_eq!(
        live(&denied, &grants([])),
        Deny,
        "a spent answer is outranked by what is said of the address"
    );
}

#[test]
fn mode_observe_demands_no_name_of_it() {
    let policy = effective(
        Some("version: 1\ndns: {answer: synthetic}\nrules: [{action: allow, domains: [api.test]}]\n"),
        Some(Mode::Observe),
    );
    let decision = judge(&policy, &grants([]), &stand_in(("tcp", 443), "api.test", None));
    assert_eq!(decision.outcome, Allow);
    assert_eq!(decision.name_demand, vnet_proto::model::NameDemand::Off);
    assert!(decision.names.is_empty());
}
