//! `forwards:` of a policy, and what is decided of forwards that VMs ask for themselves.

use std::net::SocketAddr;

use super::*;

fn decided(policy: &Effective, grants: &VmGrants, text: &str) -> ForwardDecision {
    let (ports, protocol) = text.split_once('/').unwrap();
    let (listen, port) = ports.rsplit_once(':').unwrap();
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let listen: SocketAddr = listen.parse().unwrap();
    decide_forward(&context, protocol.parse().unwrap(), listen, port.parse().unwrap())
}

fn outcome(policy: &Effective, granted: &[&str], text: &str) -> Outcome {
    decided(policy, &grants(granted.iter().copied()), text).outcome
}

const WEB: &str = "127.0.0.1:8080:80/tcp";

const RULES: &str = r#"version: 1
forwards:
  - {action: deny, listen: "8443", comment: not that one}
  - {action: allow, protocol: tcp, listen: "127.0.0.1:8000-8999", guestPorts: [80, "8000-8999"], name: dev}
  - {action: ask, protocol: udp, listen: ["[::1]", 53]}
  - {action: allow, listen: 9000, vm: {name: other}}
"#;

#[test]
fn the_first_rule_that_matches_decides_and_what_none_allows_is_off() {
    let policy = effective(Some(RULES), None);
    for (text, expected, subject) in [
        (WEB, Outcome::Allow, "dev"),
        ("127.0.0.1:8999:8500/tcp", Outcome::Allow, "dev"),
        ("127.0.0.1:8443:80/tcp", Outcome::Deny, "forwards[0]"),
        ("[::1]:8443:80/udp", Outcome::Deny, "forwards[0]"),
        ("127.0.0.1:8080:81/tcp", Outcome::Deny, "deny"),
        ("127.0.0.1:8080:80/udp", Outcome::Deny, "deny"),
        ("127.0.0.2:8080:80/tcp", Outcome::Deny, "deny"),
        ("127.0.0.1:53:53/udp", Outcome::Ask, "forwards[2]"),
        ("[::1]:9:9/udp", Outcome::Ask, "forwards[2]"),
        ("127.0.0.1:9000:1/tcp", Outcome::Deny, "deny"),
        ("0.0.0.0:8080:80/tcp", Outcome::Deny, "loopback"),
        ("[::]:8080:80/tcp", Outcome::Deny, "loopback"),
        ("203.0.113.9:8080:80/tcp", Outcome::Deny, "loopback"),
        ("127.0.0.1:0:80/tcp", Outcome::Deny, "loopback"),
    ] {
        let decision = decided(&policy, &grants([]), text);
        assert_eq!(
            (decision.outcome, decision.reason.subject.as_str()),
            (expected, subject),
            "{text}: {}",
            decision.reason
        );
    }
    let denied = decided(&policy, &grants([]), "127.0.0.1:8443:80/tcp").reason;
    assert_eq!(denied.text, "rule forwards[0] denies it (not that one)");
    let beyond = decided(&policy, &grants([]), "0.0.0.0:8080:80/tcp").reason;
    assert!(
        beyond
            .text
            .contains("0.0.0.0 is not an address of loopback, where alone a VM may open a port"),
        "{beyond}"
    );
    for (text, remedy) in [
        (
            "0.0.0.0:8080:80/tcp",
            "; under a policy or mode, ask for 127.0.0.1:8080",
        ),
        ("[::]:8080:80/tcp", "; under a policy or mode, ask for [::1]:8080"),
        (
            "[::ffff:1.2.3.4]:1:80/tcp",
            "; under a policy or mode, ask for 127.0.0.1:1",
        ),
        ("0.0.0.0:0:80/tcp", "(expected 127.0.0.1 or [::1])"),
        (
            "127.0.0.1:0:80/tcp",
            "port 0 stands for any port (expected 1 to 65535)",
        ),
    ] {
        let reason = decided(&policy, &grants([]), text).reason;
        assert!(reason.text.ends_with(remedy), "{reason}");
    }
    let off = decided(&policy, &grants([]), "127.0.0.1:1:1/tcp");
    assert_eq!(off.reason.text, "no rule of forwards: allows it");
    assert_eq!(off.remedy, "vnetctl allow forward 127.0.0.1:1:1/tcp --vm web-1");
}

#[test]
fn a_mode_decides_what_no_rule_does() {
    let at = |mode| outcome(&effective(None, mode), &[], WEB);
    assert_eq!(at(None), Outcome::Allow, "open, as under gvproxy");
    assert_eq!(
        outcome(&effective(None, None), &[], "0.0.0.0:0:80/tcp"),
        Outcome::Allow
    );
    assert_eq!(at(Some(Mode::Ask)), Outcome::Ask);
    assert_eq!(
        outcome(&effective(None, Some(Mode::Ask)), &[], "0.0.0.0:8080:80/tcp"),
        Outcome::Deny,
        "never asked"
    );
    for mode in [Mode::Enforce, Mode::Observe, Mode::Block, Mode::Quarantine] {
        assert_eq!(at(Some(mode)), Outcome::Deny, "{mode}");
    }
    let rules = |mode| outcome(&effective(Some(RULES), Some(mode)), &[], WEB);
    assert_eq!(rules(Mode::Observe), Outcome::Allow);
    assert_eq!(rules(Mode::Block), Outcome::Deny);
    assert_eq!(rules(Mode::Quarantine), Outcome::Deny);
}

#[test]
fn a_grant_is_for_one_forward_and_a_no_comes_before_rules() {
    let allow = format!("allow forward {WEB}");
    let deny = format!("deny forward {WEB}");
    let strict = effective(Some("version: 1\n"), None);
    assert_eq!(outcome(&strict, &[&allow], WEB), Outcome::Allow);
    assert_eq!(
        outcome(&strict, &[&allow], "127.0.0.1:8081:80/tcp"),
        Outcome::Deny
    );
    assert_eq!(
        outcome(&strict, &["allow any 0.0.0.0/0", "allow tcp 127.0.0.1:8080"], WEB),
        Outcome::Deny,
        "what allows a flow allows no forward"
    );
    assert_eq!(outcome(&strict, &[&allow, &deny], WEB), Outcome::Deny);
    assert_eq!(
        outcome(&effective(Some(RULES), None), &[&deny], WEB),
        Outcome::Deny
    );
    assert_eq!(
        outcome(&effective(None, None), &[&deny], WEB),
        Outcome::Deny,
        "in an open network as well"
    );
    let asks = effective(None, Some(Mode::Ask));
    assert_eq!(outcome(&asks, &[&allow], WEB), Outcome::Allow);
    // And a grant for a forward is nothing to flows.
    let flows = grants([allow.as_str(), deny.as_str()]);
    assert!(flows.allow.is_empty() && flows.deny.is_empty());
}

#[test]
fn a_grant_that_a_rule_denies_is_overruled_by_it() {
    let policy = effective(Some(RULES), None);
    let (vm, guarded, none) = (vm(), guarded(), grants([]));
    let context = Context {
        vm: &vm,
        policy: &policy,
        grants: &none,
        guarded: &guarded,
        peer: None,
    };
    let grant = |text: &str| {
        let made = grants([text]);
        Grant::clone(
            made.forwards_allowed
                .first()
                .or(made.forwards_denied.first())
                .unwrap(),
        )
    };
    let overruled = |text: &str| overruled_by(&context, &grant(text));
    assert_eq!(
        overruled("allow forward 127.0.0.1:8443:80/tcp").as_deref(),
        Some("forwards[0]")
    );
    assert_eq!(overruled(&format!("allow forward {WEB}")), None);
    assert_eq!(overruled("allow forward 127.0.0.1:1:1/tcp"), None);
    assert_eq!(overruled("deny forward 127.0.0.1:8443:80/tcp"), None);
}

/// Over every mode, and policies and grants made at random: what a mode, a grant or a rule denies is never let
/// through, and under a policy nothing but loopback is.
#[test]
fn a_denial_is_never_overruled() {
    let mut seed: u64 = 0x5eed_f0f0;
    let mut next = |n: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    let places = ["127.0.0.1:8080", "127.0.0.1:8081", "[::1]:8080", "0.0.0.0:8080"];
    for _ in 0..2_000 {
        let mut document = "version: 1\nforwards:\n".to_owned();
        for _ in 0..1 + next(4) {
            let action = ["allow", "deny", "ask"][next(3) as usize];
            let listen = ["8080", "\"127.0.0.1\"", "\"8080-8081\"", "\"[::1]:8080\""][next(4) as usize];
            let protocol = ["", ", protocol: tcp", ", protocol: udp"][next(3) as usize];
            document += &format!("  - {{action: {action}, listen: {listen}{protocol}}}\n");
        }
        let mode = [None, Some(Mode::Ask), Some(Mode::Observe), Some(Mode::Block)][next(4) as usize];
        let policy = effective(Some(&document), mode);
        let place = places[next(4) as usize];
        let protocol = ["tcp", "udp"][next(2) as usize];
        let text = format!("{place}:80/{protocol}");
        let mut given = Vec::new();
        if let Ok(target) = text.parse::<vnet_proto::model::ForwardTarget>() {
            for action in ["allow", "deny"] {
                if next(3) == 0 {
                    given.push(format!("{action} forward {target}"));
                }
            }
        }
        let all = grants(given.iter().map(String::as_str));
        let decision = decided(&policy, &all, &text);
        let what = format!("{document}{mode:?} {given:?} {text}: {:?}", decision.outcome);
        let target = text.parse().ok();
        let rule = target.and_then(|it| policy.forwards().iter().find(|rule| rule.matches(&it)));
        let is_denied = target.is_none()
            || policy.mode() == Some(Mode::Block)
            || !all.forwards_denied.is_empty()
            || rule.is_some_and(|rule| rule.action == ForwardAction::Deny);
        assert_eq!(
            decision.outcome == Outcome::Deny && is_denied,
            is_denied,
            "{what}"
        );
        if decision.outcome == Outcome::Allow {
            let by_rule = rule.is_some_and(|rule| rule.action == ForwardAction::Allow);
            assert!(by_rule || !all.forwards_allowed.is_empty(), "{what}");
        }
    }
}

#[test]
fn what_is_wrong_in_forwards_is_told_with_its_place() {
    let problems = |item: &str| {
        let document = format!("version: 1\nforwards:\n  - {item}\n");
        match Policy::parse("p.yaml", &document) {
            Ok(_) => String::new(),
            Err(errors) => errors.to_string(),
        }
    };
    for (item, told) in [
        (
            "{listen: 80}",
            "p.yaml:3:5: forwards[0] has no action (expected allow, deny or ask)",
        ),
        ("{action: drop}", "action"),
        ("{action: allow, ports: [80]}", "ports"),
        ("{action: allow, protocol: icmp}", "protocol"),
        (
            "{action: allow, listen: \"0.0.0.0:80\"}",
            "p.yaml:3:29: listen: 0.0.0.0 is not an address of loopback, where alone a VM may open a port",
        ),
        (
            "{action: allow, listen: \"192.0.2.1\"}",
            "is not an address of loopback",
        ),
        (
            "{action: allow, listen: \"[::]:80\"}",
            "is not an address of loopback",
        ),
        (
            "{action: allow, listen: web}",
            "is not where a forward can listen",
        ),
        (
            "{action: allow, listen: \"::1:80:x\"}",
            "is not where a forward can listen",
        ),
        (
            "{action: allow, listen: \"127.0.0.1:080\"}",
            "is not where a forward can listen",
        ),
        ("{action: allow, listen: 0}", "listen: "),
        ("{action: allow, listen: 70000}", "listen: "),
        ("{action: allow, listen: \"90-80\"}", "listen: "),
        (
            "{action: allow, guestPorts: [0]}",
            "guestPorts: port 0 is out of range (expected 1 to 65535)",
        ),
        (
            "{action: allow, guestPorts: [-1]}",
            "guestPorts: port -1 is out of range (expected 1 to 65535)",
        ),
        (
            "{action: allow, guestPorts: x}",
            "guestPorts: \"x\" is not a port (expected one as 443 or a range as 8000-8999)",
        ),
        (
            "{action: allow, guestPorts: [\"80-\"]}",
            "guestPorts: \"80-\" is not a port (expected one as 443 or a range as 8000-8999)",
        ),
        (
            "{action: allow, name: \"forwards[9]\"}",
            "is what nameless rules go by",
        ),
        (
            "{action: allow, name: a}\n  - {action: deny, name: a}",
            "is taken by the rule of forwards in line 3",
        ),
    ] {
        let found = problems(item);
        assert!(found.contains(told), "{item}: {found:?}");
    }
    let many = "  - {action: deny}\n".repeat(FORWARD_RULES_MAX);
    assert!(Policy::parse("p", &format!("version: 1\nforwards:\n{many}")).is_ok());
    let more = Policy::parse(
        "p",
        &format!("version: 1\nforwards:\n{many}  - {{action: deny}}\n"),
    );
    assert!(more.unwrap_err().to_string().contains("1000"), "at the limit");
    let inline = OwnPolicy::parse("p", None, &[format!("allow forward {WEB}")]).unwrap_err();
    assert!(inline.to_string().contains("is no destination"), "{inline}");
}
