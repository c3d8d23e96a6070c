use super::*;
use crate::policy::Outcome;
use crate::replay::tests::{History, now};

use Outcome::{Allow, Ask, Deny, Drop};

fn suggested(history: &History) -> Suggestion {
    let suggestion = from_history(&history.0, now()).unwrap_or_else(|e| panic!("{e}"));
    // What is handed out is what was checked: it loads, passes its tests, and the report is its own.
    let policy = Policy::parse("again", &suggestion.document).unwrap();
    policy.run_tests("again", now()).unwrap();
    assert!(policy.probes() > 0, "{}", suggestion.document);
    assert_eq!(
        history.replay(&suggestion.document).changed(),
        suggestion.report.changed()
    );
    suggestion
}

/// The document's lines without the header, comments and tests.
fn rules(document: &str) -> Vec<String> {
    let lines = document.lines().filter(|line| !line.starts_with('#'));
    let lines = lines.take_while(|line| *line != "tests:");
    lines
        .map(|line| line.split("  #").next().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn names_stand_for_addresses_and_those_of_one_domain_become_one_pattern() {
    let mut history = History::default();
    for (name, address) in [
        ("api.github.com", "192.0.2.7"),
        ("codeload.github.com", "192.0.2.8"),
    ] {
        history.add("web", &format!("lookup {name}"), &[], Allow, "default");
        history.add("web", &format!("tcp {address}:443"), &[name], Allow, "default");
    }
    history.add("web", "lookup github.com", &[], Allow, "default");
    history.add("web", "tcp 192.0.2.9:443", &["github.com"], Allow, "default");
    history.add("web", "tcp 192.0.2.9:22", &["github.com"], Allow, "default");
    history.add("web", "tcp 198.51.100.1:8080", &[], Allow, "default");
    history.add("web", "tcp 198.51.100.1:8081", &[], Allow, "default");
    history.add("web", "udp 198.51.100.2:123", &[], Allow, "default");
    history.add("web", "icmp 198.51.100.2", &[], Allow, "default");
    let suggestion = suggested(&history);
    assert_eq!(
        rules(&suggestion.document),
        [
            "version: 1",
            "defaultAction: deny",
            "rules:",
            "  - name: \"names-tcp\"",
            "    action: allow",
            "    domains:",
            "      - \"github.com\"",
            "    ports: [22, 443]",
            "    protocol: tcp",
            "  - name: \"names-tcp-443\"",
            "    action: allow",
            "    domains:",
            "      - \"*.github.com\"",
            "    ports: [443]",
            "    protocol: tcp",
            "  - name: \"addresses-tcp\"",
            "    action: allow",
            "    cidrs:",
            "      - \"198.51.100.1/32\"",
            "    ports: [\"8080-8081\"]",
            "    protocol: tcp",
            "  - name: \"addresses-udp-123\"",
            "    action: allow",
            "    cidrs:",
            "      - \"198.51.100.2/32\"",
            "    ports: [123]",
            "    protocol: udp",
            "  - name: \"addresses-icmp\"",
            "    action: allow",
            "    cidrs:",
            "      - \"198.51.100.2/32\"",
            "    protocol: icmp",
            "dns:",
            "  defaultAction: deny",
        ]
    );
    assert!(
        suggestion
            .document
            .contains("- \"*.github.com\"  # 2 flows to 2 names"),
        "{}",
        suggestion.document
    );
    assert_eq!(suggestion.report.changed(), 0);
    for probe in [
        "tcp api.github.com:443",
        "tcp github.com:22",
        "udp 198.51.100.2:123",
        "icmp 198.51.100.2",
    ] {
        assert!(suggestion.document.contains(&format!("- \"{probe}\"")), "{probe}");
    }
}

#[test]
fn of_several_names_on_one_address_the_one_looked_up_last_is_meant() {
    let mut history = History::default();
    history.add("web", "lookup one.example.com", &[], Allow, "default");
    history.add("web", "tcp 192.0.2.7:443", &["one.example.com"], Allow, "default");
    history.add("web", "lookup two.example.net", &[], Allow, "default");
    history.add(
        "web",
        "tcp 192.0.2.7:443",
        &["two.example.net", "one.example.com"],
        Allow,
        "default",
    );
    history.add("web", "lookup tracker.example.org", &[], Allow, "default");
    let names = ["one.example.com", "tracker.example.org", "two.example.net"];
    history.add("web", "tcp 192.0.2.7:443", &names, Allow, "default");
    let document = suggested(&history).document;
    let rules = rules(&document).join("\n");
    assert!(
        rules
            .contains("domains:\n      - \"one.example.com\"\n      - \"two.example.net\"\n    ports: [443]"),
        "{document}"
    );
    assert!(
        document.contains("- \"one.example.com\"  # 2 flows\n"),
        "{document}"
    );
    assert!(
        rules.contains("allowedDomains:\n    - \"tracker.example.org\""),
        "{document}"
    );
}

#[test]
fn a_public_suffix_is_never_folded() {
    let mut history = History::default();
    for name in ["one.github.io", "two.github.io", "one.co.uk", "two.co.uk"] {
        history.add("web", "tcp 192.0.2.7:443", &[name], Allow, "default");
    }
    let document = suggested(&history).document;
    assert!(!document.contains('*'), "{document}");
    assert!(
        document.contains("\"one.co.uk\"") && document.contains("\"two.github.io\""),
        "{document}"
    );
}

#[test]
fn what_was_refused_below_a_domain_keeps_its_names_apart() {
    let mut history = History::default();
    for name in ["a.example.com", "b.example.com"] {
        history.add("web", &format!("lookup {name}"), &[], Allow, "default");
        history.add("web", "tcp 192.0.2.7:443", &[name], Allow, "default");
    }
    history.add(
        "web",
        "lookup ads.example.com",
        &[],
        Deny,
        "dns:dns.blockedDomains",
    );
    let suggestion = suggested(&history);
    assert!(
        !suggestion.document.contains("*.example.com"),
        "{}",
        suggestion.document
    );
    assert_eq!(suggestion.report.changed(), 0);
}

#[test]
fn a_name_that_is_only_looked_up_opens_no_port() {
    let mut history = History::default();
    history.add("web", "lookup a.example.com", &[], Allow, "default");
    history.add("web", "tcp 192.0.2.7:443", &["a.example.com"], Allow, "default");
    history.add("web", "lookup only.example.net", &[], Allow, "default");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    let mut other = History::default();
    other.add("web", "tcp 192.0.2.8:443", &["only.example.net"], Deny, "default");
    other.add("web", "lookup only.example.net", &[], Allow, "default");
    // A shared address is reached by the name that was connected to.
    other.add(
        "web",
        "tcp 192.0.2.7:443",
        &["a.example.com", "only.example.net"],
        Allow,
        "default",
    );
    assert_eq!(
        other.replay(&suggestion.document).changed(),
        0,
        "{}",
        suggestion.document
    );
}

#[test]
fn a_flow_to_a_synthetic_address_is_allowed_by_its_name() {
    let mut history = History::default();
    history.add(
        "web",
        "tcp 198.18.0.1:443",
        &["api.example.com"],
        Allow,
        "default",
    );
    history.found("192.0.2.7");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    let text = &suggestion.document;
    assert!(
        text.contains("- \"api.example.com\"  # 1 flow") && !text.contains("198.18"),
        "{text}"
    );
    assert!(text.contains("answer: synthetic"), "{text}");
}

#[test]
fn what_was_only_given_a_synthetic_address_or_refused_under_one_gets_no_rule() {
    let mut history = History::default();
    history.add(
        "web",
        "tcp 198.18.0.1:443",
        &["api.example.com"],
        Allow,
        "default",
    );
    history.found("192.0.2.7");
    history.add("web", "lookup aside.example.org", &[], Allow, "dns:dns.answer");
    history.add(
        "web",
        "tcp 198.18.0.2:443",
        &["bad.example.net"],
        Drop,
        "rule:bad",
    );
    let text = suggested(&history).document;
    assert!(
        !text.contains("aside") && !text.contains("198.18") && !text.contains("0.0.0.0"),
        "nobody has said that these may be looked up: {text}"
    );
}

#[test]
fn guarded_destinations_are_named_and_private_ones_too() {
    let mut history = History::default();
    history.add("web", "tcp 192.168.127.254:8080", &[], Allow, "default");
    history.add(
        "web",
        "tcp 10.1.2.3:443",
        &["intranet.example.com"],
        Allow,
        "default",
    );
    history.add("web", "lookup intranet.example.com", &[], Allow, "default");
    history.add("web", "tcp 192.168.127.3:5432", &[], Allow, "default");
    history.add("web", "tcp 169.254.169.254:80", &[], Deny, "guard:metadata");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    assert!(
        suggestion.document.contains("10.1.2.3/32"),
        "{}",
        suggestion.document
    );
}

#[test]
fn asks_and_drops_stay_what_they_were() {
    let mut history = History::default();
    history.add("web", "tcp 192.0.2.7:443", &["a.example.com"], Allow, "rule:web");
    history.add("web", "lookup a.example.com", &[], Allow, "rule:web");
    history.add(
        "web",
        "tcp 192.0.2.9:25",
        &["mail.example.com"],
        Drop,
        "rule:no-mail",
    );
    history.add("web", "lookup mail.example.com", &[], Allow, "rule:web");
    history.add("web", "tcp 10.0.0.7:22", &[], Ask, "rule:lab");
    history.add("web", "lookup lab.example.com", &[], Ask, "rule:lab");
    history.add("web", "tcp 192.0.2.10:1", &[], Deny, "default");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
}

#[test]
fn a_history_of_secure_mode_stays_one_that_asks() {
    let mut history = History::default();
    history.add("web", "tcp 192.0.2.7:443", &[], Allow, "grant:g1");
    history.add("web", "tcp 192.0.2.8:443", &[], Ask, "default");
    let suggestion = suggested(&history);
    assert!(
        suggestion.document.contains("\nmode: ask\n"),
        "{}",
        suggestion.document
    );
    assert_eq!(suggestion.report.changed(), 0);
}

#[test]
fn vms_that_were_treated_apart_are_kept_apart() {
    let mut history = History::default();
    history.add("web", "tcp 192.0.2.7:443", &[], Allow, "rule:web");
    history.add("db", "tcp 192.0.2.7:443", &[], Deny, "default");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    assert!(
        suggestion.document.contains("vm: {name: \"web\"}"),
        "{}",
        suggestion.document
    );
}

#[test]
fn where_a_history_contradicts_itself_the_last_decision_counts_and_the_rest_is_told() {
    let mut history = History::default();
    history.add("web", "tcp 192.0.2.7:443", &[], Ask, "default");
    history.add("web", "tcp 192.0.2.7:443", &[], Allow, "grant:g1");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 1);
    let changes = suggestion.report.changes();
    assert_eq!((changes[0].before.0, changes[0].after.0), (Ask, Allow));
}

#[test]
fn ipv6_is_written_and_tested_like_everything_else() {
    let mut history = History::default();
    history.add("web", "tcp [2001:db8::7]:443", &[], Allow, "default");
    history.add(
        "web",
        "tcp [2001:db8::8]:443",
        &["a.example.com"],
        Allow,
        "default",
    );
    history.add("web", "icmpv6 2001:db8::7", &[], Allow, "default");
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    assert!(
        suggestion.document.contains("- \"tcp [2001:db8::7]:443\""),
        "{}",
        suggestion.document
    );
}

#[test]
fn a_name_that_no_file_can_say_is_allowed_by_its_address() {
    let mut history = History::default();
    history.add("web", "tcp 192.0.2.7:443", &["a.example.com"], Allow, "default");
    let odd = vnet_proto::model::Name::from_labels([b"a\"]\n- x".as_slice(), b"test"].into_iter()).unwrap();
    if let vnet_proto::model::Subject::Flow(flow) = &mut history.0[0].subject {
        flow.names = vec![odd];
    }
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0, "{}", suggestion.document);
    assert!(
        suggestion.document.contains("192.0.2.7/32"),
        "{}",
        suggestion.document
    );
}

#[test]
fn nothing_and_too_much_are_refused() {
    let none = from_history(&[], now()).unwrap_err();
    assert!(matches!(none, SuggestError::Nothing(_)) && none.to_string().contains("observe"));
    let mut history = History::default();
    for n in 0..=DESTINATIONS_MAX {
        let address = std::net::Ipv4Addr::from(0x0102_0000 + u32::try_from(n).unwrap());
        history.add("web", &format!("tcp {address}:443"), &[], Allow, "default");
    }
    let many = from_history(&history.0, now()).unwrap_err();
    assert!(
        matches!(many, SuggestError::TooMany { found } if found == DESTINATIONS_MAX + 1),
        "{many}"
    );
    history.0.pop();
    let suggestion = suggested(&history);
    assert_eq!(suggestion.report.changed(), 0);
}

/// Histories drawn at random, each destination of which is decided once: nothing changes.
#[test]
fn replaying_a_history_against_its_suggestion_changes_nothing() {
    let mut seed = 0x5eed_0001_u64;
    let mut below = move |bound: usize| {
        seed ^= seed >> 12;
        seed ^= seed << 25;
        seed ^= seed >> 27;
        usize::try_from((seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound as u64).unwrap()
    };
    const NAMES: [&str; 8] = [
        "a.example.com",
        "b.example.com",
        "example.com",
        "x.y.example.com",
        "a.co.uk",
        "p.a.co.uk",
        "q.a.co.uk",
        "z.test",
    ];
    for round in 0..300 {
        let mut history = History::default();
        let mut decided = std::collections::HashSet::new();
        for _ in 0..1 + below(25) {
            // A name always has one address, so that nothing contradicts itself by chance.
            let n = below(NAMES.len());
            let outcome = [Allow, Allow, Allow, Deny, Drop, Ask][below(6)];
            let (what, names) = match below(3) {
                0 => (format!("lookup {}", NAMES[n]), vec![]),
                1 => (
                    format!("tcp 192.0.2.{}:{}", n + 1, [22, 80, 443][below(3)]),
                    vec![NAMES[n]],
                ),
                _ => (format!("udp 198.51.100.{}:53", n + 1), vec![]),
            };
            // The lookup and the connections of a name go together: a name that may not be looked up has none.
            let key = if names.is_empty() && !what.starts_with("lookup") {
                what.clone()
            } else {
                NAMES[n].to_owned()
            };
            if decided.insert((key, what.clone())) && (outcome == Allow || !what.starts_with("tcp")) {
                history.add("web", &what, &names, outcome, "rule:r");
            }
        }
        if history.0.is_empty() {
            continue;
        }
        let suggestion = suggested(&history);
        assert_eq!(
            suggestion.report.changed(),
            0,
            "round {round}: {:#?}\n{}",
            suggestion.report.changes(),
            suggestion.document
        );
    }
}

mod answers {
    use std::time::{Duration, SystemTime};

    use vnet_proto::model::{Budget, VmSelector};

    use super::*;
    use crate::grant::{Grant, GrantAction, GrantId, Lifetime};

    fn grant(action: GrantAction, target: &str, vms: VmSelector) -> Grant {
        let mut grant = Grant::new(
            GrantId(format!("{action} {target}")),
            action,
            target.parse().unwrap(),
            vms,
            Lifetime::For(Duration::from_secs(3600)),
            Budget::default(),
            "mira".to_owned(),
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
        );
        grant.reason = "a \"build\"\nneeds: it \u{202e}".to_owned();
        grant
    }

    #[test]
    fn answers_become_rules_that_say_the_same() {
        let web = || VmSelector::named("web");
        let labels = VmSelector::new(None, [("role".to_owned(), "a b".to_owned())].into());
        let grants = [
            grant(GrantAction::Allow, "tcp 192.0.2.7:443", web()),
            grant(GrantAction::Allow, "tcp 192.0.2.7:443", web()),
            grant(GrantAction::Allow, "domain api.example.com:443", web()),
            grant(GrantAction::Allow, "domain *.example.net", VmSelector::all()),
            grant(GrantAction::Allow, "lookup only.example.org", VmSelector::all()),
            grant(GrantAction::Allow, "any 10.0.0.0/8", labels.unwrap()),
            grant(GrantAction::Deny, "tcp 192.0.2.0/24:25", VmSelector::named("w*")),
            grant(GrantAction::Deny, "domain ads.example.net", VmSelector::all()),
            grant(GrantAction::Allow, "icmp 192.0.2.7", web()),
        ];
        let document = from_answers(&grants, now()).unwrap();
        let policy = Policy::parse("again", &document).unwrap();
        policy.run_tests("again", now()).unwrap();
        assert_eq!(document.matches("  - name: ").count(), 8, "{document}");
        let ask = |vm: &str, destination: &str| {
            policy.answers(Some(&VmSelector::named(vm)), &destination.parse().unwrap(), now())
        };
        assert_eq!(ask("web", "tcp 192.0.2.7:443"), Allow);
        assert_eq!(ask("db", "tcp 192.0.2.7:443"), Deny);
        assert_eq!(ask("web", "tcp 192.0.2.7:25"), Deny);
        assert_eq!(ask("web", "tcp api.example.com:443"), Allow);
        assert_eq!(ask("db", "tcp x.example.net:8443"), Allow);
        assert_eq!(ask("db", "domain ads.example.net"), Deny);
        assert_eq!(ask("db", "domain only.example.org"), Allow);
        assert_eq!(ask("db", "tcp only.example.org:443"), Deny);
        assert_eq!(ask("web", "icmp 192.0.2.7"), Allow);
        assert!(
            document.contains("allowed by mira at 1970-01-12T13:46:40Z, for 1h: a \\\"build\\\" needs: it"),
            "{document}"
        );
        assert!(policy.probes() >= 5, "{document}");
    }

    #[test]
    fn a_lookup_that_was_allowed_to_one_vm_is_allowed_to_no_other() {
        let grants = [
            grant(
                GrantAction::Allow,
                "lookup one.example.org",
                VmSelector::named("web"),
            ),
            grant(GrantAction::Allow, "lookup all.example.org", VmSelector::all()),
            grant(
                GrantAction::Allow,
                "domain one.example.org:22",
                VmSelector::named("db"),
            ),
        ];
        let document = from_answers(&grants, now()).unwrap();
        let policy = Policy::parse("again", &document).unwrap();
        assert_eq!(policy.warnings, [], "{document}");
        for (vm, destination, expected) in [
            ("web", "domain one.example.org", Allow),
            ("api", "domain one.example.org", Deny),
            ("web", "domain all.example.org", Allow),
            ("api", "domain all.example.org", Allow),
            ("web", "tcp one.example.org:443", Deny),
            ("web", "tcp one.example.org:22", Deny),
            ("api", "udp all.example.org:443", Deny),
            ("db", "tcp one.example.org:22", Allow),
            ("db", "tcp one.example.org:443", Deny),
        ] {
            let vm_selector = VmSelector::named(vm);
            let found = policy.answers(Some(&vm_selector), &destination.parse().unwrap(), now());
            assert_eq!(found, expected, "{destination} for {vm}: {document}");
        }
    }

    #[test]
    fn forwards_that_were_answered_are_rules_of_their_own() {
        let forward = grant(
            GrantAction::Allow,
            "forward 127.0.0.1:8080:80/tcp",
            VmSelector::named("web"),
        );
        let no = grant(GrantAction::Deny, "forward [::1]:53:53/udp", VmSelector::all());
        let flow = grant(GrantAction::Allow, "tcp 192.0.2.7:443", VmSelector::all());
        for (grants, rules) in [
            (vec![forward.clone(), no.clone()], 0),
            (vec![forward, flow, no], 1),
        ] {
            let document = from_answers(&grants, now()).unwrap();
            let policy = Policy::parse("again", &document).unwrap_or_else(|e| panic!("{e}\n{document}"));
            let [denied, allowed] = &policy.forwards[..] else {
                panic!("{document}")
            };
            assert_eq!(policy.rules.as_slice().len(), rules, "{document}");
            assert!(denied.matches(&"[::1]:53:53/udp".parse().unwrap()), "{document}");
            assert!(
                allowed.matches(&"127.0.0.1:8080:80/tcp".parse().unwrap()),
                "{document}"
            );
            assert!(
                !allowed.matches(&"127.0.0.1:8080:80/udp".parse().unwrap()),
                "{document}"
            );
            assert_eq!(allowed.vms, Some(VmSelector::named("web")), "{document}");
        }
    }

    #[test]
    fn a_budget_that_a_file_cannot_keep_is_told() {
        let plain = grant(GrantAction::Allow, "tcp 192.0.2.7:443", VmSelector::all());
        let document = from_answers(std::slice::from_ref(&plain), now()).unwrap();
        assert!(
            !document.contains("budget") && !document.contains("at most"),
            "{document}"
        );
        let mut counted = plain;
        counted.budget = Budget {
            connections: 5,
            bytes_down: 1000,
            ..Budget::default()
        };
        let document = from_answers(&[counted], now()).unwrap();
        assert!(document.contains("\n# A file has no budgets:"), "{document}");
        let comment = "for 1h, for at most 5 connections, 1000 bytes down, which is not kept here: a ";
        assert!(document.contains(comment), "{document}");
    }

    #[test]
    fn a_file_of_many_answers_has_no_more_tests_than_its_limit() {
        let one = |n: u32| {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + n);
            grant(
                GrantAction::Allow,
                &format!("tcp {address}:443"),
                VmSelector::all(),
            )
        };
        let most = u32::try_from(plan::PROBES_MAX).unwrap();
        for (answers, expected) in [(most - 1, most - 1), (most, most), (most + 10, most)] {
            let grants: Vec<Grant> = (0..answers).map(one).collect();
            let document = from_answers(&grants, now()).unwrap();
            let policy = Policy::parse("again", &document).unwrap();
            assert_eq!(policy.probes(), expected as usize, "of {answers}");
            assert_eq!(policy.rules.as_slice().len(), answers as usize);
        }
    }

    #[test]
    fn no_answers_make_no_file() {
        assert!(matches!(from_answers(&[], now()), Err(SuggestError::Nothing(_))));
    }
}
