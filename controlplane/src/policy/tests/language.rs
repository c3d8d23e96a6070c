//! What the keys of a rule mean beyond where it matches, the tests inside a file, and the notes' T01 to T06.

use vnet_proto::model::NameDemand;

use super::*;

fn problem(document: &str) -> String {
    Policy::parse("p.yaml", document).unwrap_err().to_string()
}

fn under_at(document: &str, time: SystemTime) -> Effective {
    let policy = policy(document);
    let claimed = PolicyInForce {
        name: "default",
        revision: 3,
        policy: &policy,
    };
    Effective::compose(at(time), &vm(), Some(claimed), None, Modes::default())
}

const UNTIL: &str = "version: 1\nrules:\n  - {name: brief, action: allow, cidr: 1.2.3.0/24, until: 2027-01-15T08:00:10Z}\n  \
                     - {name: shut, action: deny, cidr: 9.0.0.0/8, until: 2027-01-15T08:00:20Z}\n  \
                     - {name: rest, action: allow, cidr: 9.9.0.0/16}\n";

/// `now()` is 2027-01-15T08:00:00Z.
fn after(seconds: u64) -> SystemTime {
    now() + Duration::from_secs(seconds)
}

#[test]
fn a_rule_with_until_ends_then_and_its_decisions_carry_that_end() {
    let none = grants([]);
    let before = under_at(UNTIL, now());
    let decision = decide(&before, &none, "tcp 1.2.3.4:80");
    assert_eq!(decision.outcome, Outcome::Allow);
    assert_eq!(decision.expires_at, Some(after(10)));
    assert!(
        decision.reason.text.contains("until 2027-01-15T08:00:10Z"),
        "{}",
        decision.reason
    );
    assert_eq!(
        decide(&before, &none, "tcp 9.9.1.1:80").expires_at,
        Some(after(20))
    );
    assert_eq!(decide(&before, &none, "tcp 8.8.8.8:80").expires_at, None);
    assert!(!before.is_outdated(at(after(9))) && before.is_outdated(at(after(10))));

    let later = under_at(UNTIL, after(10));
    says(&later, &none, "tcp 1.2.3.4:80", Outcome::Deny, "default", "deny");
    says(&later, &none, "tcp 9.9.1.1:80", Outcome::Deny, "rule", "shut");
    assert!(later.is_outdated(at(after(20))));
    let last = under_at(UNTIL, after(20));
    says(&last, &none, "tcp 9.9.1.1:80", Outcome::Allow, "rule", "rest");
    assert!(!last.is_outdated(at(after(1_000_000))));
}

#[test]
fn where_the_clocks_differ_nothing_opens_early_and_nothing_stays_open() {
    let policy = policy(UNTIL);
    let claimed = PolicyInForce {
        name: "default",
        revision: 3,
        policy: &policy,
    };
    // The wall clock was set back by 30 s.
    let set_back = crate::clock::Now {
        steady: after(25),
        wall: now(),
    };
    let under = Effective::compose(set_back, &vm(), Some(claimed), None, Modes::default());
    let none = grants([]);
    says(&under, &none, "tcp 1.2.3.4:80", Outcome::Deny, "default", "deny");
    says(&under, &none, "tcp 9.9.1.1:80", Outcome::Deny, "rule", "shut");
}

#[test]
fn a_grant_behind_an_asking_rule_holds_no_longer_than_that_rule() {
    let document = "version: 1\nrules:\n  - {action: ask, cidr: 1.2.3.0/24, until: 2027-01-15T08:00:10Z}\n  - {action: deny, cidr: 1.2.3.0/24}\n";
    let found = decide(
        &under_at(document, now()),
        &grants(["allow tcp 1.2.3.4:80"]),
        "tcp 1.2.3.4:80",
    );
    assert_eq!(
        (found.outcome, found.expires_at),
        (Outcome::Allow, Some(after(10)))
    );
}

#[test]
fn a_rule_that_is_over_is_told_of() {
    let told = |seconds| {
        let warnings = policy(UNTIL).over_by(at(after(seconds)));
        warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(told(9), Vec::<String>::new());
    assert_eq!(told(10), ["3:5: brief can never match: its until is in the past"]);
}

#[test]
fn what_guards_stop_of_a_broad_rule_and_what_is_shadowed_in_part_is_told() {
    let told = |rules: &str| -> Vec<String> {
        let policy = policy(&format!("version: 1\nrules:\n{rules}"));
        policy.warnings.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        told("  - {name: broad, action: allow, cidr: 169.0.0.0/8}\n"),
        [
            "3:5: broad: 169.0.0.0/8 is broader than 169.254.0.0/16, which stays guarded; add 169.254.0.0/16 itself to open that as well"
        ]
    );
    assert_eq!(
        told("  - {name: named, action: allow, cidr: 169.254.169.254/32, ports: [80]}\n"),
        Vec::<String>::new()
    );
    assert_eq!(
        told(
            "  - {name: a, action: allow, cidr: 20.0.0.0/8, ports: [\"80-90\"], protocol: tcp}\n  - {name: b, action: deny, cidrs: [20.1.0.0/16, 30.0.0.0/8], ports: [85, \"90-100\"]}\n"
        ),
        [
            "4:5: b does not deny tcp 85, 90 to 20.1.0.0/16: a (line 3) allows that before; put b first if it should"
        ]
    );
    let shadowed = told(
        "  - {name: a, action: deny, domains: [\"*.a.test\"]}\n  - {name: b, action: allow, domains: [x.a.test], ports: [443]}\n",
    );
    assert_eq!(
        shadowed,
        ["4:5: b can never match: a (line 3) matches all of it before"]
    );
    let ends = told(
        "  - {name: a, action: deny, cidr: 20.0.0.0/8, until: 2100-01-01T00:00:00Z}\n  - {name: b, action: allow, cidr: 20.1.0.0/16}\n",
    );
    assert_eq!(ends, Vec::<String>::new());
}

#[test]
fn a_wrong_until_is_told() {
    for wrong in [
        "tomorrow",
        "2027-01-15",
        "2027-01-15T08:00:00+02:00",
        "10m",
        "2027-13-01T00:00:00Z",
    ] {
        let told = problem(&format!(
            "version: 1\nrules:\n  - {{action: deny, until: \"{wrong}\"}}\n"
        ));
        assert!(
            told.contains("is not a moment (expected a moment in UTC, as 2026-12-31T00:00:00Z)"),
            "{told}"
        );
    }
}

#[test]
fn every_verdict_that_rests_on_a_name_says_what_is_demanded_of_it() {
    let document = "version: 1\nrules:\n  - {name: a, action: allow, domains: [\"*.a.test\"], ports: [443]}\n  \
                    - {name: b, action: allow, domains: [b.test], sni: off}\n  - {name: c, action: allow, domains: [c.test], sni: match-if-present}\n  \
                    - {name: d, action: allow, domains: [d.test], sni: require}\n  - {name: n, action: allow, cidr: 9.0.0.0/8}\n\
                    dns: {allowedDomains: [e.test]}\n";
    let policy = effective(Some(document), None);
    let given = grants(["allow domain f.test:443", "allow tcp 7.7.7.7:443"]);
    for (flow, demand, names) in [
        (
            "tcp 1.3.1.1:443 x.a.test b.test y.a.test",
            NameDemand::ByPort,
            vec!["x.a.test", "y.a.test"],
        ),
        ("tcp 1.3.1.1:80 b.test", NameDemand::Off, vec![]),
        ("tcp 1.3.1.1:80 c.test", NameDemand::IfPresent, vec!["c.test"]),
        (
            "tcp 1.3.1.1:22 d.test other.test",
            NameDemand::Require,
            vec!["d.test"],
        ),
        ("tcp 9.1.1.1:443 q.test", NameDemand::Off, vec![]),
        (
            "tcp 1.3.1.1:443 e.test q.test",
            NameDemand::ByPort,
            vec!["e.test"],
        ),
        (
            "tcp 1.3.1.1:443 f.test q.test",
            NameDemand::ByPort,
            vec!["f.test"],
        ),
        ("tcp 7.7.7.7:443 q.test", NameDemand::Off, vec![]),
    ] {
        let found = decide(&policy, &given, flow);
        let said: Vec<String> = found.names.iter().map(ToString::to_string).collect();
        assert_eq!(
            (found.outcome, found.name_demand),
            (Outcome::Allow, demand),
            "{flow}"
        );
        assert_eq!(said, names, "{flow}");
    }
}

#[test]
fn sni_without_names_or_in_a_refusal_is_refused_and_a_written_one_needs_no_warning() {
    let rule = |rest: &str| format!("version: 1\nrules:\n  - {{{rest}}}\n");
    assert!(problem(&rule("action: allow, sni: require")).contains("this rule has none; leave sni out"));
    assert!(
        problem(&rule("action: deny, domains: a.test, sni: require")).contains("this rule is one to deny")
    );
    assert!(problem(&rule("action: allow, domains: a.test, sni: requre")).contains("did you mean require?"));
    let told = |text: &str| {
        policy(&rule(text))
            .warnings
            .iter()
            .map(ToString::to_string)
            .collect::<String>()
    };
    for sni in ["", ", sni: require", ", sni: match-if-present", ", sni: off"] {
        assert_eq!(told(&format!("action: allow, domains: a.test{sni}")), "");
    }
}

#[test]
fn an_answer_to_a_rule_that_asks_demands_what_the_rule_does() {
    for (sni, demand) in [
        ("", NameDemand::ByPort),
        (", sni: require", NameDemand::Require),
        (", sni: match-if-present", NameDemand::IfPresent),
        (", sni: off", NameDemand::Off),
    ] {
        let document = format!("version: 1\nrules:\n  - {{action: ask, domains: a.test{sni}}}\n");
        let policy = effective(Some(&document), None);
        let answered = grants(["allow domain a.test"]);
        let found = decide(&policy, &answered, "tcp 1.2.3.4:22 a.test b.test");
        assert_eq!((found.outcome, found.name_demand), (Outcome::Allow, demand));
        // An answer about the address rests on no name.
        let found = decide(
            &policy,
            &grants(["allow tcp 1.2.3.4:22"]),
            "tcp 1.2.3.4:22 a.test",
        );
        assert_eq!(
            (found.outcome, found.name_demand),
            (Outcome::Allow, NameDemand::Off)
        );
    }
}

#[test]
fn in_mode_observe_no_name_is_demanded_since_what_nothing_allows_is_let_through() {
    let document = "version: 1\nrules:\n  - {action: allow, domains: a.test, sni: require}\n";
    let observing = effective(Some(document), Some(Mode::Observe));
    let found = decide(&observing, &grants([]), "tcp 1.2.3.4:443 a.test");
    assert_eq!(
        (found.outcome, found.name_demand, found.names.len()),
        (Outcome::Allow, NameDemand::Off, 0)
    );
}

#[test]
fn guards_say_how_strictly_names_are_read() {
    use crate::policy::{EchGuard, NameGuards, QuicGuard};
    let read = |text: &str| effective(Some(text), None).name_guards();
    assert_eq!(read("version: 1\n"), NameGuards::default());
    assert_eq!(
        read("version: 1\nguards: {ech: outer, quic: deny}\n"),
        NameGuards {
            ech: EchGuard::Outer,
            quic: QuicGuard::Deny
        }
    );
    assert_eq!(
        read("version: 1\nguards: {ech: deny, quic: inspect}\n"),
        NameGuards::default()
    );
    let told = problem("version: 1\nguards: {quic: allow}\n");
    assert!(
        told.contains("guards.quic is \"allow\" (expected inspect or deny"),
        "{told}"
    );
    assert!(problem("version: 1\nguards: {esni: deny}\n").contains("key \"esni\" is not known in guards"));
}

const TESTED: &str = "version: 1\ndefaultAction: deny\nmode: ask\nrules:\n  - {name: github, action: allow, domains: [\"*.github.com\"], ports: [443]}\n  \
                      - {name: shut, action: deny, cidr: 10.0.0.0/8}\n  - {name: quiet, action: drop, cidr: 9.0.0.0/8}\n  \
                      - {name: agents, action: allow, cidr: 192.0.2.0/24, vm: {labels: {role: agent}}}\ntests:\n";

#[test]
fn a_policy_whose_tests_hold_is_taken() {
    let document = format!(
        "{TESTED}  - {{allow: [\"tcp api.github.com:443\"], deny: [\"tcp 10.0.0.1:443\", \"udp 9.9.9.9:53\"], \
         ask: [\"tcp api.github.com:22\", \"tcp example.org:443\", \"domain example.org\", \"tcp 169.254.169.254:80\", \"tcp 192.0.2.1:80\"]}}\n  \
         - {{vm: {{labels: {{role: agent}}}}, allow: \"tcp 192.0.2.1:80\"}}\n"
    );
    let policy = policy(&document);
    assert_eq!(policy.probes(), 9);
    policy.run_tests("p.yaml", at(now())).unwrap();
}

#[test]
fn a_test_that_fails_is_named_with_what_was_expected_what_came_and_why() {
    let document = format!(
        "{TESTED}  - name: closed\n    allow: [\"tcp 10.0.0.1:443\"]\n    deny: [\"domain x.github.com\"]\n    ask: [\"udp 9.9.9.9:53\"]\n"
    );
    let errors = policy(&document).run_tests("p.yaml", at(now())).unwrap_err();
    let told: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "p.yaml:11:13: closed: \"tcp 10.0.0.1:443\" is deny for test (expected allow): rule shut of policy p.yaml (line 6) denies it",
            "p.yaml:12:12: closed: \"domain x.github.com\" is allow for test (expected deny): rule github of policy p.yaml (line 5) allows it",
            "p.yaml:13:11: closed: \"udp 9.9.9.9:53\" is drop for test (expected ask): rule quiet of policy p.yaml (line 7) drops it",
        ]
    );
}

#[test]
fn a_test_by_name_fails_where_the_lookup_would() {
    let document =
        "version: 1\nrules:\n  - {action: allow, cidr: 0.0.0.0/0}\ntests:\n  - allow: \"tcp a.test:443\"\n";
    let told = policy(document)
        .run_tests("p.yaml", at(now()))
        .unwrap_err()
        .to_string();
    assert!(
        told.contains("is deny for test (expected allow): its lookup comes first: nothing allows"),
        "{told}"
    );
}

#[test]
fn a_test_of_a_rule_that_is_over_is_judged_by_the_time() {
    let document = "version: 1\nrules:\n  - {action: allow, cidr: 1.2.3.4, until: 2027-01-15T08:00:10Z}\ntests:\n  - allow: \"tcp 1.2.3.4:1\"\n";
    assert!(policy(document).run_tests("p.yaml", at(now())).is_ok());
    assert!(policy(document).run_tests("p.yaml", at(after(10))).is_err());
}

#[test]
fn wrong_tests_are_told() {
    for (test, expected) in [
        ("{}", "tests[0] tests nothing"),
        ("{allow: [\"tcp a.test\"]}", "is not a destination"),
        ("{alow: [\"tcp a.test:1\"]}", "did you mean allow?"),
        (
            "{vm: {name: \"web-*\"}, allow: [\"tcp a.test:1\"]}",
            "is a pattern (expected one VM's name)",
        ),
        ("{vm: {name: db}, allow: [\"tcp a.test:1\"]}", "does not claim"),
    ] {
        let told = problem(&format!(
            "version: 1\nappliesTo: {{name: \"web-*\"}}\ntests:\n  - {test}\n"
        ));
        assert!(told.contains(expected), "{test}: {told}");
    }
    let of_a_claimed_vm = policy(
        "version: 1\nappliesTo: {name: \"web-*\", labels: {a: b}}\ntests:\n  - deny: \"tcp a.test:1\"\n",
    );
    of_a_claimed_vm.run_tests("p.yaml", at(now())).unwrap();
    let many = format!(
        "version: 1\ntests:\n  - deny: [{}]\n",
        "\"domain a.test\", ".repeat(PROBES_MAX + 1)
    );
    assert!(problem(&many).contains("at most 10000"));
}

#[test]
fn t01_what_drafts_take_silently_is_refused_with_line_and_column() {
    for (document, place) in [
        ("defaultAction: Deny\n", "p.yaml:1:16: "),
        ("rules:\n  - action: block\n", "p.yaml:2:13: "),
        ("rules:\n  - {action: deny, protocol: TCP}\n", "p.yaml:2:30: "),
        ("rules:\n  - {action: deny, cidr: 10.0.0.0/33}\n", "p.yaml:2:26: "),
        ("rules:\n  - {action: deny, cidr: 10.0.0.1/8}\n", "p.yaml:2:26: "),
        ("ruels: []\n", "p.yaml:1:1: "),
        ("mode: ask\nmode: ask\n", "p.yaml:2:1: "),
        ("rules:\n  - {action: deny, ports: [0]}\n", "p.yaml:2:28: "),
        ("rules:\n  - {action: deny, ports: [65536]}\n", "p.yaml:2:28: "),
    ] {
        let told = problem(document);
        assert!(told.starts_with(place), "{document}: {told}");
    }
}

#[test]
fn t02_empty_and_absent_lists_allow_nothing() {
    let none = grants([]);
    for document in [
        "version: 1\ndns: {allowedDomains: []}\n",
        "version: 1\nrules: []\n",
        "version: 1\n",
    ] {
        let under = effective(Some(document), None);
        says(
            &under,
            &none,
            "tcp 1.2.3.4:443 a.test",
            Outcome::Deny,
            "default",
            "deny",
        );
        says_name(&under, &none, "a.test", Outcome::Deny, "default", "deny");
    }
    assert!(
        problem("version: 1\nrules:\n  - {action: allow, domains: []}\n").contains("which matches nothing")
    );
    assert!(
        problem("version: 1\nrules:\n  - {action: allow, cidrs: []}\n").contains("which matches nothing")
    );
}

#[test]
fn t03_the_drafts_own_sample_loads_and_its_late_deny_is_told_for_its_part() {
    let policy = policy(SAMPLE);
    let told: Vec<String> = policy.warnings.iter().map(ToString::to_string).collect();
    assert!(
        told.iter().any(|text| text.contains(
            "rules[1] does not deny tcp 80, 443 to 10.0.0.0/8: rules[0] (line 3) allows that before"
        )),
        "{told:?}"
    );
    let under = effective(Some(SAMPLE), None);
    says(
        &under,
        &grants([]),
        "tcp 10.0.0.1:443",
        Outcome::Allow,
        "rule",
        "rules[0]",
    );
    says(
        &under,
        &grants([]),
        "tcp 10.0.0.1:22",
        Outcome::Deny,
        "rule",
        "rules[1]",
    );
}

#[test]
fn t04_an_edit_of_something_else_widens_nothing() {
    let flows = [
        "tcp 10.0.0.1:443",
        "tcp 1.2.3.4:443",
        "udp 1.2.3.4:53",
        "tcp 169.254.169.254:80",
        "icmp 1.2.3.4",
    ];
    let outcomes = |document: &str| {
        let under = effective(Some(document), None);
        flows.map(|flow| decide(&under, &grants([]), flow).outcome)
    };
    let before = outcomes(SAMPLE);
    for (from, to) in [
        ("approvalTimeout: 30", "approvalTimeout: 60"),
        (
            "defaultAction: deny\nrules",
            "defaultAction: deny\nsets: {s: {domains: [a.test]}}\nrules",
        ),
        ("dns:\n", "tests:\n  - deny: \"tcp 8.8.8.8:22\"\ndns:\n"),
        ("protocol: tcp", "protocol: tcp\n    comment: another"),
    ] {
        let edited = SAMPLE.replacen(from, to, 1);
        assert_ne!(edited, SAMPLE);
        assert_eq!(outcomes(&edited), before, "{to}");
    }
}

#[test]
fn t05_names_have_one_form_or_are_refused() {
    let under = effective(
        Some("version: 1\nrules:\n  - {action: allow, domains: [\"BÜCHER.Example.\"]}\n"),
        None,
    );
    says_name(
        &under,
        &grants([]),
        "xn--bcher-kva.example",
        Outcome::Allow,
        "rule",
        "rules[0]",
    );
    for wrong in [
        "0x7f.1",
        "2130706433",
        "::ffff:10.0.0.1",
        "127.0.0.1",
        "a\\0b.test",
        "a..b",
        "a b.test",
        &"a.".repeat(128),
    ] {
        let document = format!(
            "version: 1\nrules:\n  - {{action: allow, domains: [\"{}\"]}}\n",
            wrong.replace('\\', "\\\\")
        );
        assert!(Policy::parse("p.yaml", &document).is_err(), "{wrong} was taken");
    }
}

#[test]
fn t06_neighbouring_names_and_the_apex_are_not_below_a_name() {
    let under = effective(
        Some("version: 1\nrules:\n  - {action: allow, domains: [\"*.example.com\"]}\n"),
        None,
    );
    for name in ["evil-example.com", "example.com.evil.test", "example.com", "com"] {
        says_name(&under, &grants([]), name, Outcome::Deny, "default", "deny");
        says(
            &under,
            &grants([]),
            &format!("tcp 1.2.3.4:443 {name}"),
            Outcome::Deny,
            "default",
            "deny",
        );
    }
    says_name(
        &under,
        &grants([]),
        "a.b.example.com",
        Outcome::Allow,
        "rule",
        "rules[0]",
    );
}

#[test]
fn the_published_schema_is_the_one_that_the_loader_reads_by() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.schema.json");
    // `VNET_PUBLISH=1 cargo test -p vnet-controlplane --lib published_schema` writes it anew.
    if std::env::var_os("VNET_PUBLISH").is_some() {
        std::fs::write(file, schema()).unwrap();
    }
    let published = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        published == schema(),
        "docs/policy.schema.json is another; write it anew: vnetctl policy schema > docs/policy.schema.json"
    );
}

#[test]
fn names_that_share_an_address_may_each_be_spoken_if_each_is_allowed() {
    let policy = effective(
        Some("version: 1\nmode: ask\nrules: [{action: allow, domains: c.test, ports: [443]}]\n"),
        None,
    );
    let given = grants(["allow domain a.test", "allow domain b.test:443"]);
    let found = decide(&policy, &given, "tcp 1.2.3.4:443 b.test d.test a.test c.test");
    let mut names: Vec<String> = found.names.iter().map(ToString::to_string).collect();
    names.sort();
    assert_eq!(names, ["a.test", "b.test", "c.test"]);
    assert_eq!(found.found.ports, vnet_proto::model::PortRange::one(443));
    let found = decide(&policy, &given, "tcp 1.2.3.4:80 b.test d.test a.test c.test");
    let names: Vec<String> = found.names.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["a.test"], "the others are for 443");
    assert_eq!(
        found.found.ports,
        vnet_proto::model::PortRange::one(80),
        "elsewhere there are others"
    );
    let alone = decide(&policy, &given, "tcp 1.2.3.4:80 a.test");
    assert_ne!(alone.found.ports, vnet_proto::model::PortRange::one(80));
}

#[test]
fn a_grant_for_the_address_itself_demands_no_name_whatever_else_lets_it_through() {
    let policy = effective(
        Some("version: 1\nmode: ask\nrules: [{action: deny, domains: bad.test}]\n"),
        None,
    );
    let demand = |given: &VmGrants, subject| {
        let decision = decide(&policy, given, subject);
        assert_eq!(decision.outcome, Outcome::Allow, "{subject}");
        decision.name_demand
    };
    let both = grants(["allow domain a.test", "allow tcp 1.2.3.4:8080"]);
    assert_eq!(demand(&both, "tcp 1.2.3.4:8080 a.test"), NameDemand::Off);
    assert_eq!(demand(&both, "tcp 1.2.3.4:8080 a.test b.test"), NameDemand::Off);
    assert_eq!(demand(&both, "tcp 1.2.3.4:443 a.test"), NameDemand::ByPort);
    let at_443 = decide(&policy, &both, "tcp 1.2.3.4:443 a.test");
    assert_eq!(
        at_443.found.ports,
        vnet_proto::model::PortRange::one(443),
        "none is demanded at 8080"
    );
    let denied = decide(&policy, &both, "tcp 1.2.3.4:8080 a.test bad.test");
    assert_eq!(denied.outcome, Outcome::Deny);
    let by_name = effective(
        Some("version: 1\nrules: [{action: allow, domains: a.test}, {action: deny, domains: bad.test}]\n"),
        None,
    );
    let given = grants(["allow tcp 1.2.3.4:8080"]);
    let held = decide(&by_name, &given, "tcp 1.2.3.4:8080 a.test bad.test");
    assert_eq!(
        (held.outcome, held.name_demand),
        (Outcome::Allow, NameDemand::ByPort),
        "one of its names is denied"
    );
}

#[test]
fn an_answer_that_is_lent_a_name_ends_with_the_first_of_what_it_rests_on() {
    let policy = effective(
        Some(
            "version: 1\nmode: ask\nrules:\n- {action: allow, domains: a.test}\n- {action: allow, domains: b.test, \
             until: 2100-01-01T00:00:00Z}\n",
        ),
        None,
    );
    let ends = |subject| decide(&policy, &grants([]), subject).expires_at;
    assert_eq!(ends("tcp 1.2.3.4:443 a.test"), None);
    assert!(ends("tcp 1.2.3.4:443 b.test").is_some());
    assert_eq!(
        ends("tcp 1.2.3.4:443 a.test b.test"),
        ends("tcp 1.2.3.4:443 b.test")
    );
}
