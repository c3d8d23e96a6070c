//! What a dataplane's own flags say of the host: destinations that are dialled at others, and metadata services
//! that are opened.

use super::*;

/// As [`flow`], dialled at another address.
fn moved(text: &str, dialled: &str) -> FlowSubject {
    FlowSubject {
        dialled: dialled.parse().unwrap(),
        ..flow(text)
    }
}

/// Outcome, step and subject.
fn decided(effective: &Effective, grants: &VmGrants, flow: &FlowSubject) -> (Outcome, String, String) {
    let (vm, guarded) = (vm(), guarded().with_moved([flow.key.peer.ip()]));
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let decision = decide_flow(&context, flow);
    assert!(decision.found.is_one_address(), "{}", decision.found);
    (decision.outcome, decision.reason.step, decision.reason.subject)
}

fn with_flag(document: Option<&str>, mode: Option<Mode>) -> Effective {
    effective(document, mode).with_ec2_metadata_access(true)
}

const METADATA: &str = "tcp 169.254.169.254:80 !metadata";
const FLAG: &str = "--ec2-metadata-access";

#[test]
fn the_flag_opens_link_local_addresses_of_an_open_vm_and_nothing_else() {
    let (open, none) = (with_flag(None, None), VmGrants::default());
    assert!(open.is_open(), "the flag limits nothing");
    for text in [
        METADATA,
        "udp 169.254.7.7:123 !metadata",
        "icmp 169.254.169.254 !metadata",
    ] {
        says(&open, &none, text, Outcome::Allow, "rule", FLAG);
        says(
            &effective(None, None),
            &none,
            text,
            Outcome::Deny,
            "guard",
            "metadata",
        );
    }
    assert_eq!(
        decide(&open, &none, METADATA).reason.text,
        "--ec2-metadata-access allows it"
    );
    for text in [
        "tcp [fe80::1]:80 !metadata",
        "tcp [fd00:ec2::254]:80 !metadata",
        "tcp 168.63.129.16:80 !metadata",
        "tcp 100.100.100.200:80 !metadata",
    ] {
        says(&open, &none, text, Outcome::Deny, "guard", "metadata");
    }
    says(
        &open,
        &none,
        "tcp 192.0.2.7:80",
        Outcome::Allow,
        "default",
        "allow",
    );
}

#[test]
fn under_a_policy_or_mode_the_flag_is_a_last_rule() {
    let none = VmGrants::default();
    let deny_all = "defaultAction: deny\n";
    for mode in [None, Some(Mode::Ask), Some(Mode::Observe), Some(Mode::Enforce)] {
        let policy = with_flag(Some(deny_all), mode);
        says(&policy, &none, METADATA, Outcome::Allow, "rule", FLAG);
        assert!(!decide(&policy, &none, METADATA).would_deny);
    }
    says(
        &with_flag(None, Some(Mode::Ask)),
        &none,
        METADATA,
        Outcome::Allow,
        "rule",
        FLAG,
    );
    for mode in [Mode::Block, Mode::Quarantine] {
        let policy = with_flag(Some(deny_all), Some(mode));
        says(&policy, &none, METADATA, Outcome::Deny, "mode", &mode.to_string());
    }
    let without = effective(Some(deny_all), None);
    says(&without, &none, METADATA, Outcome::Deny, "guard", "metadata");
}

#[test]
fn whatever_is_said_explicitly_comes_before_the_flag() {
    let none = VmGrants::default();
    let rule = |action: &str, cidr: &str| {
        let document = format!("version: 1\nrules: [{{action: {action}, cidr: {cidr}}}]\n");
        with_flag(Some(&document), None)
    };
    says(
        &rule("deny", "169.254.169.254/32"),
        &none,
        METADATA,
        Outcome::Deny,
        "rule",
        "rules[0]",
    );
    let beside = "tcp 169.254.169.253:80 !metadata";
    says(
        &rule("deny", "169.254.169.254/32"),
        &none,
        beside,
        Outcome::Allow,
        "rule",
        FLAG,
    );
    says(
        &rule("drop", "0.0.0.0/0"),
        &none,
        METADATA,
        Outcome::Drop,
        "rule",
        "rules[0]",
    );
    says(
        &rule("ask", "169.254.0.0/16"),
        &none,
        METADATA,
        Outcome::Ask,
        "rule",
        "rules[0]",
    );
    says(
        &rule("ask", "0.0.0.0/0"),
        &none,
        METADATA,
        Outcome::Allow,
        "rule",
        FLAG,
    );
    let denied = grants(["deny any 169.254.0.0/16"]);
    says(
        &with_flag(None, None),
        &denied,
        METADATA,
        Outcome::Deny,
        "grant",
        "g0",
    );
    // It is a prefix, which names neither an address of the host's own nor another DNS server.
    let policy = with_flag(Some("defaultAction: deny\n"), None);
    says(
        &policy,
        &none,
        "tcp 169.254.9.9:22 !metadata !host",
        Outcome::Deny,
        "guard",
        "metadata",
    );
    says(
        &policy,
        &none,
        "udp 169.254.169.253:53 !metadata",
        Outcome::Deny,
        "guard",
        "metadata",
    );
    says(
        &policy,
        &none,
        "tcp 169.254.169.254:80 a.test !metadata !private-from-dns",
        Outcome::Allow,
        "rule",
        FLAG,
    );
}

#[test]
fn a_destination_that_is_dialled_at_another_is_judged_by_that_or_by_its_very_name() {
    let none = VmGrants::default();
    let to = moved("tcp 10.1.1.1:443", "203.0.113.50");
    let rule = |action: &str, cidr: &str| {
        effective(
            Some(&format!(
                "version: 1\nrules: [{{action: {action}, cidr: {cidr}}}]\n"
            )),
            None,
        )
    };
    for (cidr, opens) in [
        ("10.1.1.1/32", true),
        ("203.0.113.50/32", true),
        ("203.0.113.0/24", true),
        ("0.0.0.0/0", true),
        ("10.1.1.0/24", false),
        ("10.0.0.0/8", false),
        ("10.1.1.2/32", false),
    ] {
        let (outcome, ..) = decided(&rule("allow", cidr), &none, &to);
        assert_eq!(outcome == Outcome::Allow, opens, "{cidr}");
    }
    for cidr in ["10.1.1.0/24", "203.0.113.0/24"] {
        let policy = effective(
            Some(&format!(
                "defaultAction: allow\nrules: [{{action: deny, cidr: {cidr}}}]\n"
            )),
            None,
        );
        assert_eq!(decided(&policy, &none, &to).0, Outcome::Deny, "{cidr}");
    }
    for (grant, opens) in [
        ("allow tcp 10.1.1.1:443", true),
        ("allow tcp 203.0.113.50:443", true),
        ("allow tcp 10.1.0.0/16:443", false),
    ] {
        let (outcome, ..) = decided(&rule("deny", "192.0.2.1/32"), &grants([grant]), &to);
        assert_eq!(outcome == Outcome::Allow, opens, "{grant}");
    }
}

#[test]
fn a_destination_that_leads_to_the_hosts_loopback_is_guarded_as_that() {
    let none = VmGrants::default();
    let to = moved("tcp 198.51.100.1:8080 !host", "127.0.0.1");
    assert_eq!(
        decided(&effective(None, None), &none, &to).0,
        Outcome::Allow,
        "open is open"
    );
    let guard = (Outcome::Deny, "guard".to_owned(), "host".to_owned());
    for broad in ["0.0.0.0/0", "198.51.100.0/24", "126.0.0.0/7"] {
        let document = format!("version: 1\nrules: [{{action: allow, cidr: {broad}}}]\n");
        assert_eq!(
            decided(&effective(Some(&document), None), &none, &to),
            guard,
            "{broad}"
        );
    }
    assert_eq!(
        decided(&effective(Some("defaultAction: allow\n"), None), &none, &to),
        guard
    );
    for naming in ["127.0.0.0/8", "127.0.0.1/32", "198.51.100.1/32"] {
        let document = format!("version: 1\nrules: [{{action: allow, cidr: {naming}}}]\n");
        let (outcome, ..) = decided(&effective(Some(&document), None), &none, &to);
        assert_eq!(outcome, Outcome::Allow, "{naming}");
    }
}

#[test]
fn a_destination_that_leads_to_another_dns_server_is_guarded_as_that() {
    let none = VmGrants::default();
    let to = moved("tcp 198.51.100.1:443", "8.8.8.8");
    let document = |cidr: &str| format!("version: 1\nrules: [{{action: allow, cidr: {cidr}}}]\n");
    let (outcome, step, subject) = decided(&effective(Some(&document("0.0.0.0/0")), None), &none, &to);
    assert_eq!(
        (outcome, step.as_str(), subject.as_str()),
        (Outcome::Deny, "guard", "dns")
    );
    for naming in ["8.8.8.8/32", "198.51.100.1/32"] {
        let (outcome, ..) = decided(&effective(Some(&document(naming)), None), &none, &to);
        assert_eq!(outcome, Outcome::Allow, "{naming}");
    }
}

#[test]
fn no_region_reaches_over_a_destination_that_is_dialled_at_another() {
    let (vm, none) = (vm(), VmGrants::default());
    let policy = effective(
        Some("version: 1\nrules: [{action: allow, cidr: 1.2.0.0/16}]\n"),
        None,
    );
    let guarded = guarded().with_moved(["1.2.9.9".parse().unwrap()]);
    let context = Context {
        vm: &vm,
        policy: &policy,
        grants: &none,
        guarded: &guarded,
        peer: None,
    };
    let decision = decide_flow(&context, &flow("tcp 1.2.9.8:443"));
    assert_eq!(decision.outcome, Outcome::Allow);
    assert_eq!(decision.found.prefix.to_string(), "1.2.9.8/32");
    let decision = decide_flow(&context, &flow("tcp 1.2.128.1:443"));
    assert_eq!(
        decision.found.prefix.to_string(),
        "1.2.128.0/17",
        "and as far as it may"
    );
}
