//! The design's "Defaults" paragraph, sentence by sentence.

use super::Outcome::{Allow, Ask, Deny};
use super::*;

fn none() -> VmGrants {
    grants([])
}

fn own(document: Option<&str>, rules: &[&str], mode: Option<Mode>) -> Effective {
    let rules: Vec<String> = rules.iter().map(|r| (*r).to_owned()).collect();
    let own = OwnPolicy::parse("own.yaml", document, &rules).unwrap_or_else(|errors| panic!("{errors}"));
    Effective::compose(at(now()), &vm(), None, Some(&own), Modes { set: None, own: mode })
}

#[test]
fn with_no_policy_no_mode_and_no_allow_it_is_open_but_for_metadata() {
    let open = effective(None, None);
    assert!(open.is_open() && open.mode().is_none() && open.is_switch_open());
    says(&open, &none(), "tcp 1.2.3.4:443", Allow, "default", "allow");
    says(&open, &none(), "icmp 1.2.3.4", Allow, "default", "allow");
    says(
        &open,
        &none(),
        "tcp 192.168.127.254:22 !host",
        Allow,
        "default",
        "allow",
    );
    says(
        &open,
        &none(),
        "tcp 10.0.0.5:22 a.test !private-from-dns",
        Allow,
        "default",
        "allow",
    );
    says_name(&open, &none(), "a.test", Allow, "default", "allow");
    says(
        &open,
        &none(),
        "tcp 169.254.169.254:80 !metadata",
        Deny,
        "guard",
        "metadata",
    );
    says(
        &open,
        &none(),
        "tcp 169.254.169.254:80 !host !metadata",
        Deny,
        "guard",
        "metadata",
    );
    says(
        &open,
        &grants(["allow tcp 169.254.169.254:80"]),
        "tcp 169.254.169.254:80 !metadata",
        Allow,
        "grant",
        "g0",
    );
    says(
        &open,
        &grants(["deny tcp 1.2.3.4:443"]),
        "tcp 1.2.3.4:443",
        Deny,
        "grant",
        "g0",
    );
}

#[test]
fn an_open_vm_reaches_only_guests_that_are_open_too() {
    let (vm, guarded, open, none) = (vm(), guarded(), effective(None, None), none());
    let subject = flow("tcp 192.168.127.3:22 !guest");
    let peer = |mode| Some(PeerView { name: "db", mode });
    for (peer, outcome) in [
        (peer(None), Allow),
        (peer(Some(Mode::Enforce)), Deny),
        (None, Deny),
    ] {
        let context = Context {
            vm: &vm,
            policy: &open,
            grants: &none,
            guarded: &guarded,
            peer,
        };
        assert_eq!(decide_flow(&context, &subject).outcome, outcome);
    }
    let closed = effective(Some("defaultAction: allow"), None);
    let context = Context {
        vm: &vm,
        policy: &closed,
        grants: &none,
        guarded: &guarded,
        peer: peer(None),
    };
    assert_eq!(
        decide_flow(&context, &subject).outcome,
        Deny,
        "a policy closes the switch"
    );
}

#[test]
fn any_allow_or_deny_makes_the_default_deny_and_stands_before_the_files_rules() {
    let policy = own(None, &["allow tcp 10.99.0.1:8080"], None);
    assert_eq!(
        (policy.mode(), policy.policy_name()),
        (Some(Mode::Enforce), "own")
    );
    says(
        &policy,
        &none(),
        "tcp 10.99.0.1:8080",
        Allow,
        "rule",
        "--allow tcp 10.99.0.1:8080",
    );
    says(&policy, &none(), "tcp 10.99.0.1:8081", Deny, "default", "deny");
    says(
        &own(None, &["deny tcp 1.2.3.4:1"], None),
        &none(),
        "tcp 9.8.9.9:9",
        Deny,
        "default",
        "deny",
    );
    says_name(
        &own(None, &["allow domain a.test"], None),
        &none(),
        "a.test",
        Allow,
        "rule",
        "--allow domain a.test",
    );
    says_name(
        &own(None, &["allow domain a.test"], None),
        &none(),
        "b.test",
        Deny,
        "default",
        "deny",
    );

    let document = "rules: [{name: all, action: allow}]";
    let both = own(Some(document), &["deny udp 10.0.0.0/8:53"], None);
    says(
        &both,
        &none(),
        "udp 10.0.0.1:53",
        Deny,
        "rule",
        "--deny udp 10.0.0.0/8:53",
    );
    says(&both, &none(), "udp 10.0.0.1:54", Allow, "rule", "all");
}

#[test]
fn whoever_brought_anything_is_not_open_even_if_nothing_is_left_of_it() {
    let policy = own(None, &[], None);
    assert!(!policy.is_open() && policy.mode() == Some(Mode::Enforce));
    says(&policy, &none(), "tcp 1.2.3.4:443", Deny, "default", "deny");
    says_name(&policy, &none(), "a.test", Deny, "default", "deny");
}

#[test]
fn rules_of_its_own_stand_before_the_named_policy_that_a_vm_falls_to() {
    let named = policy("rules: [{name: all, action: allow}]");
    let own = OwnPolicy::parse("", None, &["deny tcp 1.2.3.4".to_owned()]).unwrap();
    let claimed = Some(PolicyInForce {
        name: "default",
        revision: 1,
        policy: &named,
    });
    let policy = Effective::compose(at(now()), &vm(), claimed, Some(&own), Modes::default());
    says(
        &policy,
        &none(),
        "tcp 1.2.3.4:1",
        Deny,
        "rule",
        "--deny tcp 1.2.3.4",
    );
    says(&policy, &none(), "tcp 1.2.3.5:1", Allow, "rule", "all");
    let own = OwnPolicy::parse(
        "o.yaml",
        Some("rules: [{name: own, action: allow, cidr: 1.0.0.0/8}]"),
        &[],
    )
    .unwrap();
    let policy = Effective::compose(at(now()), &vm(), claimed, Some(&own), Modes::default());
    says(&policy, &none(), "tcp 1.2.3.4:1", Allow, "rule", "own");
    says(&policy, &none(), "tcp 2.2.3.4:1", Deny, "default", "deny");
}

#[test]
fn a_file_without_default_action_denies() {
    let policy = effective(Some("version: 1"), None);
    says(&policy, &none(), "tcp 1.2.3.4:443", Deny, "default", "deny");
    says_name(&policy, &none(), "a.test", Deny, "default", "deny");
    let allow = effective(Some("defaultAction: allow"), None);
    says(&allow, &none(), "tcp 1.2.3.4:443", Allow, "default", "allow");
    says(&allow, &none(), "icmp 1.2.3.4", Allow, "default", "allow");
}

#[test]
fn secure_mode_asks_and_overrides_default_allow() {
    for document in [
        None,
        Some("defaultAction: allow"),
        Some("defaultAction: deny"),
        Some(SAMPLE),
    ] {
        let policy = effective(document, Some(Mode::Ask));
        says(&policy, &none(), "tcp 9.8.9.9:22", Ask, "default", "deny");
        assert_eq!(policy.default_action(), DefaultAction::Deny);
    }
    let policy = effective(Some("mode: enforce\ndefaultAction: allow"), Some(Mode::Ask));
    says(&policy, &none(), "tcp 9.8.9.9:22", Ask, "default", "deny");
    says(
        &effective(Some(SAMPLE), Some(Mode::Ask)),
        &none(),
        "tcp 9.8.9.9:443",
        Allow,
        "rule",
        "rules[0]",
    );
}

#[test]
fn an_omitted_default_for_lookups_is_the_effective_default_action() {
    for (document, mode, outcome) in [
        ("version: 1\ndefaultAction: deny", None, Deny),
        ("version: 1\ndefaultAction: allow", None, Allow),
        ("version: 1\ndefaultAction: allow", Some(Mode::Ask), Ask),
        ("defaultAction: deny\ndns: {allowedDomains: []}", None, Deny),
        ("dns: {blockedDomains: [b.test]}", None, Deny),
        ("dns: {defaultAction: allow}", None, Allow),
        ("dns: {defaultAction: allow}", Some(Mode::Ask), Allow),
        ("dns: {defaultAction: deny}", Some(Mode::Ask), Ask),
        ("defaultAction: allow\ndns: {defaultAction: deny}", None, Deny),
    ] {
        let decision = ask_name(&effective(Some(document), mode), &none(), "a.test");
        assert_eq!(decision.outcome, outcome, "{document} {mode:?}");
    }
    assert_eq!(
        ask_name(&effective(None, Some(Mode::Ask)), &none(), "a.test").outcome,
        Ask
    );
    assert_eq!(
        ask_name(&effective(None, Some(Mode::Enforce)), &none(), "a.test").outcome,
        Deny
    );
}

#[test]
fn the_drafts_form_leaves_lookups_open_outside_secure_mode_and_says_so() {
    let document = "defaultAction: deny\nrules: [{action: allow, cidr: 1.0.0.0/8}]";
    let draft = effective(Some(document), None);
    says_name(&draft, &none(), "a.test", Allow, "default", "allow");
    says(&draft, &none(), "tcp 5.6.7.8:443 a.test", Deny, "default", "deny");
    assert!(draft.leaves_dns_open());
    assert!(
        policy(document)
            .warnings
            .iter()
            .any(|w| w.text.contains("open channel")),
        "{:?}",
        policy(document).warnings
    );

    let secure = effective(Some(document), Some(Mode::Ask));
    says_name(&secure, &none(), "a.test", Ask, "default", "deny");
    assert!(!secure.leaves_dns_open());
    let versioned = effective(Some(&format!("version: 1\n{document}")), None);
    says_name(&versioned, &none(), "a.test", Deny, "default", "deny");
    assert!(!versioned.leaves_dns_open());
}

#[test]
fn names_in_allow_rules_resolve_by_themselves() {
    let policy = effective(
        Some("version: 1\nrules: [{action: allow, domains: [a.test], ports: [22]}]"),
        None,
    );
    says_name(&policy, &none(), "a.test", Allow, "rule", "rules[0]");
    says_name(&policy, &none(), "b.test", Deny, "default", "deny");
}

#[test]
fn an_omitted_protocol_is_any_for_deny_and_tcp_and_udp_for_allow() {
    let policy = effective(
        Some("defaultAction: allow\nrules: [{action: deny, cidr: 1.0.0.0/8}]"),
        None,
    );
    for text in ["tcp 1.2.3.4:1", "udp 1.2.3.4:1", "icmp 1.2.3.4"] {
        says(&policy, &none(), text, Deny, "rule", "rules[0]");
    }
    let policy = effective(Some("rules: [{action: allow, cidr: 1.0.0.0/8}]"), None);
    for text in ["tcp 1.2.3.4:1", "udp 1.2.3.4:65535"] {
        says(&policy, &none(), text, Allow, "rule", "rules[0]");
    }
    says(&policy, &none(), "icmp 1.2.3.4", Deny, "default", "deny");
    let policy = effective(
        Some("rules: [{action: allow, protocol: any, cidr: 1.0.0.0/8}]"),
        None,
    );
    says(&policy, &none(), "icmp 1.2.3.4", Allow, "rule", "rules[0]");
}

#[test]
fn omitted_ports_and_cidr_are_any() {
    let policy = effective(
        Some("rules: [{action: allow, protocol: [tcp, icmp, icmpv6]}]"),
        None,
    );
    for text in [
        "tcp 1.2.3.4:1",
        "tcp [2001:db8::1]:65535",
        "icmp 1.2.3.4",
        "icmpv6 2001:db8::1",
    ] {
        says(&policy, &none(), text, Allow, "rule", "rules[0]");
    }
    says(&policy, &none(), "udp 1.2.3.4:1", Deny, "default", "deny");
}

#[test]
fn modes_override_in_order() {
    let document = policy("mode: observe");
    let claimed = Some(PolicyInForce {
        name: "default",
        revision: 1,
        policy: &document,
    });
    let mode = |set, own| Effective::compose(at(now()), &vm(), claimed, None, Modes { set, own }).mode();
    assert_eq!(mode(None, None), Some(Mode::Observe));
    assert_eq!(mode(None, Some(Mode::Ask)), Some(Mode::Ask));
    assert_eq!(
        mode(Some(Mode::Quarantine), Some(Mode::Ask)),
        Some(Mode::Quarantine)
    );
    let quarantined = Effective::compose(
        at(now()),
        &vm(),
        None,
        None,
        Modes {
            set: Some(Mode::Quarantine),
            own: None,
        },
    );
    assert!(quarantined.closes_forwards() && !quarantined.is_switch_open());
}

#[test]
fn each_vm_is_claimed_by_selectors_and_two_claims_are_seen() {
    let a = policy("appliesTo: {name: 'web-*'}");
    let b = policy("appliesTo: {labels: {role: agent}}");
    let c = policy("appliesTo: {name: db}");
    assert_eq!(claimants(&vm(), [("a", &a), ("c", &c)]), ["a"]);
    assert_eq!(claimants(&vm(), [("a", &a), ("b", &b)]), ["a", "b"]);
    assert!(claimants(&vm(), [("c", &c), ("default", &policy("version: 1"))]).is_empty());
}

#[test]
fn the_hold_is_the_files_or_thirty_seconds() {
    assert_eq!(
        effective(None, Some(Mode::Ask)).approval_timeout(),
        Duration::from_secs(30)
    );
    assert_eq!(
        effective(Some("approvalTimeout: 5"), None).approval_timeout(),
        Duration::from_secs(5)
    );
}
