//! What the loader takes, what it refuses, and where it points.

use super::*;

/// Every problem of a document, as text.
fn problems(document: &str) -> Vec<String> {
    match Policy::parse("p.yaml", document) {
        Ok(policy) => panic!("{document:?} was taken: {policy:?}"),
        Err(errors) => errors.0.iter().map(ToString::to_string).collect(),
    }
}

/// The one problem of a document begins and reads so.
#[track_caller]
fn refused(document: &str, place: &str, words: &[&str]) {
    let found = problems(document);
    assert_eq!(found.len(), 1, "{document:?}: {found:#?}");
    assert!(
        found[0].starts_with(&format!("p.yaml:{place}: ")),
        "{document:?}: {}",
        found[0]
    );
    for word in words {
        assert!(
            found[0].contains(word),
            "{document:?}: {} lacks {word:?}",
            found[0]
        );
    }
}

#[test]
fn the_designs_sample_loads_and_means_what_it_says() {
    use super::Outcome::{Allow, Deny};
    let sample = effective(Some(SAMPLE), None);
    let none = grants([]);
    assert_eq!(sample.approval_timeout(), Duration::from_secs(30));
    says(&sample, &none, "tcp 93.184.216.34:443", Allow, "rule", "rules[0]");
    says(&sample, &none, "tcp 93.184.216.34:80", Allow, "rule", "rules[0]");
    says(&sample, &none, "tcp 93.184.216.34:22", Deny, "default", "deny");
    says(&sample, &none, "udp 93.184.216.34:443", Deny, "default", "deny");
    says(&sample, &none, "tcp 10.0.0.1:22", Deny, "rule", "rules[1]");
    says(&sample, &none, "icmp 10.0.0.1", Deny, "rule", "rules[1]");
    says(&sample, &none, "tcp 10.0.0.1:443", Allow, "rule", "rules[0]");
    says_name(
        &sample,
        &none,
        "api.github.com",
        Allow,
        "dns",
        "dns.allowedDomains",
    );
    says_name(&sample, &none, "github.com", Deny, "default", "deny");
    says_name(
        &sample,
        &none,
        "registry.fedoraproject.org",
        Allow,
        "dns",
        "dns.allowedDomains",
    );
    says_name(
        &sample,
        &none,
        "a.malware.example",
        Deny,
        "dns",
        "dns.blockedDomains",
    );
    says_name(&sample, &none, "malware.example", Deny, "default", "deny");
}

#[test]
fn the_samples_shadowed_rule_is_told() {
    let warnings = policy(SAMPLE).warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].text.starts_with("dns.blockedDomains: denying a name"),
        "{warnings:?}"
    );
    let text = warnings[1].to_string();
    assert!(
        text.starts_with("7:5: rules[1] does not deny tcp 80, 443 to 10.0.0.0/8"),
        "{text}"
    );
}

#[test]
fn bad_actions_modes_and_protocols_name_what_was_meant() {
    refused(
        "defaultAction: Deny",
        "1:16",
        &["\"Deny\"", "allow or deny", "did you mean deny?"],
    );
    refused(
        "defaultAction: block",
        "1:16",
        &["\"block\"", "did you mean deny?"],
    );
    refused("defaultAction: ask", "1:16", &["mode: ask"]);
    refused("defaultAction:", "1:14", &["nothing", "allow or deny"]);
    refused(
        "rules:\n  - action: block",
        "2:13",
        &["\"block\"", "allow, deny, drop or ask", "did you mean deny?"],
    );
    refused("rules:\n  - action: Allow", "2:13", &["did you mean allow?"]);
    refused("rules:\n  - action: \"\"", "2:13", &["\"\"", "expected allow"]);
    refused("rules:\n  - cidr: 10.0.0.0/8", "2:5", &["rules[0] has no action"]);
    refused(
        "rules:\n  - {action: allow, protocol: TCP}",
        "2:31",
        &["\"TCP\"", "did you mean tcp?"],
    );
    refused(
        "rules:\n  - {action: allow, protocol: [tcp, sctp]}",
        "2:37",
        &["\"sctp\""],
    );
    refused("mode: secure", "1:7", &["enforce, ask, observe or block"]);
    refused("mode: quarantine", "1:7", &["vnetctl vm mode"]);
    refused("mode: block-all", "1:7", &["did you mean block?"]);
}

#[test]
fn bad_addresses_and_ports_say_what_is_expected() {
    let cidr = |text: &str| format!("rules:\n  - action: deny\n    cidr: {text}");
    refused(
        &cidr("10.0.0.1/8"),
        "3:11",
        &["10.0.0.1/8", "did you mean 10.0.0.0/8?"],
    );
    refused(&cidr("10.0.0.0/40"), "3:11", &["prefix length 40", "0 to 32"]);
    refused(&cidr("10.0.0/8"), "3:11", &["10.0.0"]);
    refused(&cidr("host"), "3:11", &["\"host\"", "expected"]);
    refused(&cidr("10"), "3:11", &["10", "text is expected"]);
    for spelling in ["::ffff:10.0.0.0/104", "64:ff9b::10.0.0.0/104"] {
        refused(
            &cidr(&format!("{spelling:?}")),
            "3:11",
            &["write it as 10.0.0.0/8"],
        );
    }
    let ports = |text: &str| format!("rules:\n  - action: deny\n    ports: {text}");
    refused(&ports("[0]"), "3:13", &["port 0 is out of range", "1 to 65535"]);
    refused(&ports("[443, 65536]"), "3:18", &["65536"]);
    refused(&ports("[-1]"), "3:13", &["1 to 65535"]);
    refused(&ports("[\"9000-8000\"]"), "3:13", &["ends before it begins"]);
    refused(&ports("[http]"), "3:13", &["\"http\""]);
    refused(&ports("[4.5]"), "3:13", &["4.5"]);
    refused(
        "rules:\n  - {action: deny, protocol: icmp, ports: [8]}",
        "2:43",
        &["icmp has no ports"],
    );
    refused(
        "rules:\n  - {action: deny, protocol: [tcp, icmp], ports: [8]}",
        "2:50",
        &["icmp has no ports"],
    );
    refused(
        "rules:\n  - {action: deny, protocol: icmp, cidr: \"fd00::/8\"}",
        "2:30",
        &["icmpv6"],
    );
}

#[test]
fn unknown_keys_name_the_nearest_valid_one() {
    refused(
        "defaultaction: deny",
        "1:1",
        &["\"defaultaction\"", "did you mean defaultAction?"],
    );
    refused("default_action: deny", "1:1", &["did you mean defaultAction?"]);
    refused("rule: []", "1:1", &["did you mean rules?"]);
    refused(
        "rules:\n  - action: deny\n    cdir: 10.0.0.0/8",
        "3:5",
        &["rules[0]", "did you mean cidr?"],
    );
    refused(
        "rules:\n  - action: deny\n    port: [1]",
        "3:5",
        &["did you mean ports?"],
    );
    refused(
        "dns:\n  allowDomains: []",
        "2:3",
        &["did you mean allowedDomains?"],
    );
    refused("version: 1\nzzz: 1", "2:1", &["expected version, appliesTo"]);
    refused("version: 1\n5: 1", "2:1", &["key 5"]);
}

#[test]
fn repeated_keys_and_names_are_refused() {
    refused(
        "mode: ask\nmode: enforce",
        "2:1",
        &["mode is given twice", "line 1"],
    );
    refused(
        "rules:\n  - action: deny\n    action: allow",
        "3:5",
        &["action is given twice"],
    );
    let twice = "rules:\n  - {name: a, action: deny}\n  - {name: a, action: deny}";
    refused(twice, "3:5", &["\"a\"", "line 2"]);
    refused(
        "rules:\n  - {name: 'rules[4]', action: deny}",
        "2:12",
        &["choose another"],
    );
    refused(
        "rules:\n  - {action: deny, cidr: 1.0.0.0/8, cidrs: [2.0.0.0/8]}",
        "2:44",
        &["put all of them in cidrs"],
    );
}

#[test]
fn modes_that_contradict_each_other_are_refused_and_aliases_mean_the_same() {
    for (document, mode) in [
        ("interactive: true", Some(Mode::Ask)),
        ("interactive: true\nmode: ask", Some(Mode::Ask)),
        ("interactive: false\nmode: enforce", Some(Mode::Enforce)),
        ("interactive: false", None),
        ("blockAllOutbound: true", Some(Mode::Block)),
        ("blockAllOutbound: false\ninteractive: true", Some(Mode::Ask)),
    ] {
        assert_eq!(policy(document).mode, mode, "{document}");
    }
    refused(
        "mode: enforce\ninteractive: true",
        "2:14",
        &["is mode ask", "mode says enforce"],
    );
    refused("mode: ask\ninteractive: false", "2:14", &["excludes mode ask"]);
    refused(
        "interactive: true\nblockAllOutbound: true",
        "2:19",
        &["interactive is true"],
    );
    refused(
        "mode: block\nblockAllOutbound: false",
        "2:19",
        &["excludes mode block"],
    );
    refused("interactive: yes", "1:14", &["true or false"]);
}

#[test]
fn an_empty_list_in_a_rule_is_refused_and_in_dns_means_nothing() {
    for key in ["ports", "cidrs", "domains", "protocol"] {
        let document = format!("rules:\n  - action: allow\n    {key}: []");
        refused(
            &document,
            &format!("3:{}", 7 + key.len()),
            &["matches nothing", "leave"],
        );
    }
    let policy = effective(Some("defaultAction: deny\ndns: {allowedDomains: []}"), None);
    says(
        &policy,
        &grants([]),
        "tcp 1.2.3.4:443 a.test",
        Outcome::Deny,
        "default",
        "deny",
    );
    refused("rules:", "1:6", &["rules is nothing", "expected a list"]);
    refused("rules: {}", "1:8", &["rules is a mapping"]);
    refused("dns:", "1:4", &["dns is nothing"]);
}

#[test]
fn times_are_seconds_or_spelt_out() {
    for (text, time) in [
        ("30", Duration::from_secs(30)),
        ("\"30s\"", Duration::from_secs(30)),
        ("500ms", Duration::from_millis(500)),
        ("2m", Duration::from_secs(120)),
        ("0", Duration::ZERO),
    ] {
        assert_eq!(
            policy(&format!("approvalTimeout: {text}")).approval_timeout,
            Some(time),
            "{text}"
        );
    }
    for text in [
        "-1",
        "3601",
        "soon",
        "\"30\"",
        "30 s",
        "1.5",
        "99999999999999999999h",
        "[]",
    ] {
        refused(&format!("approvalTimeout: {text}"), "1:18", &["expected seconds"]);
    }
}

#[test]
fn names_are_names_and_nothing_more() {
    let domains = |text: &str| format!("dns:\n  allowedDomains: [{text}]");
    for text in ["\"https://a.test\"", "\"a.test:443\""] {
        refused(&domains(text), "2:20", &["more than a name"]);
    }
    for text in [
        "\"*\"",
        "\"a*.test\"",
        "10.0.0.1",
        "\"a b\"",
        "\"a..b\"",
        "\"a\\0b.test\"",
    ] {
        assert_eq!(problems(&domains(text)).len(), 1, "{text}");
    }
    refused(
        "rules:\n  - {action: deny, comment: \"a\\u001b[2J\"}",
        "2:29",
        &["cannot be shown"],
    );
    refused(
        "rules:\n  - {action: deny, name: \"a\\u202eb\"}",
        "2:26",
        &["cannot be shown"],
    );
}

#[test]
fn selectors_need_something_to_select_by() {
    refused(
        "rules:\n  - {action: deny, vm: {}}",
        "2:24",
        &["neither name nor labels"],
    );
    refused(
        "rules:\n  - {action: deny, vm: web-1}",
        "2:24",
        &["expected a mapping"],
    );
    refused("appliesTo: {label: {a: b}}", "1:13", &["did you mean labels?"]);
    refused("appliesTo: {labels: {tier: 1}}", "1:28", &["put it in quotes"]);
    refused("version: 2", "1:10", &["expected 1"]);
    refused("version: \"1\"", "1:10", &["expected 1"]);
}

#[test]
fn all_problems_are_told_at_once_in_order() {
    let document = "
mod: ask
defaultAction: Deny
rules:
  - action: block
    cidr: 10.0.0.1/8
    ports: [0, 65536]
  - action: allow
    protocol: TCP
dns:
  defaultAction: no
";
    let places: Vec<String> = problems(document)
        .iter()
        .map(|p| {
            p.split(": ")
                .next()
                .unwrap()
                .trim_start_matches("p.yaml:")
                .to_owned()
        })
        .collect();
    assert_eq!(
        places,
        ["2:1", "3:16", "5:13", "6:11", "7:13", "7:16", "9:15", "11:18"]
    );
}

#[test]
fn what_is_not_yaml_is_told_with_its_place() {
    for document in [
        "rules: [",
        "a: b: c",
        "rules:\n\t- x",
        "a: *nowhere",
        "--- {}\n--- {}",
        "<<: {mode: ask}",
    ] {
        let found = problems(document);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains("not valid YAML: ") && !found[0].contains('\n'),
            "{found:?}"
        );
    }
    assert!(problems("--- {}\n--- {}")[0].contains("more than one document"));
    assert!(problems("rules:\n  - {<<: {action: deny}}")[0].contains("write the keys out"));
    for document in ["", "# nothing", "{}", "[]", "deny", "12"] {
        assert!(problems(document)[0].starts_with("p.yaml:1:"), "{document:?}");
    }
}

#[test]
fn size_and_number_are_bounded() {
    let long = format!("mode: ask # {}", "x".repeat(DOCUMENT_BYTES_MAX));
    assert!(problems(&long)[0].contains("at most 4194304"));
    let rule = "  - {action: deny, cidr: 10.0.0.0/8}\n";
    let most = format!("rules:\n{}", rule.repeat(RULES_MAX));
    assert_eq!(policy(&most).rules.as_slice().len(), RULES_MAX);
    let more = format!("{most}{rule}");
    assert!(
        problems(&more)[0].contains("10001 entries (at most 10000)"),
        "{:?}",
        problems(&more)
    );
    let wrong = format!("rules:\n{}", "  - {action: no}\n".repeat(500));
    let found = problems(&wrong);
    assert_eq!(found.len(), 101);
    assert!(found[100].contains("400 more"), "{}", found[100]);
    assert!(policy(&most).warnings.len() <= 100);
}

#[test]
fn alias_bombs_are_bounded_and_honest_aliases_work() {
    let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    let mut last = 'a';
    for name in 'b'..='k' {
        bomb.push_str(&format!(
            "{name}: &{name} [{}]\n",
            vec![format!("*{last}"); 10].join(", ")
        ));
        last = name;
    }
    assert!(problems(&bomb)[0].contains("too many values or aliases"));
    let deep = format!("rules: {}{}", "[".repeat(200), "]".repeat(200));
    assert_eq!(problems(&deep).len(), 1);
    let honest = "dns:\n  allowedDomains: &names [a.test]\nrules:\n  - {action: allow, domains: *names}";
    assert_eq!(
        policy(honest).rules.as_slice()[0]
            .test
            .names
            .as_ref()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn rules_that_can_never_match_are_told() {
    let found = |document: &str| -> Vec<String> {
        let rules = format!("version: 1\nrules:\n{document}");
        policy(&rules).warnings.iter().map(|w| w.to_string()).collect()
    };
    let dead =
        found("  - {name: lan, action: deny, cidr: 10.0.0.0/8}\n  - {action: allow, cidr: 10.1.0.0/16}\n");
    assert_eq!(dead.len(), 1);
    assert!(
        dead[0].contains("rules[1] can never match: lan (line 3)"),
        "{dead:?}"
    );
    let exception = "  - {action: allow, cidr: 10.1.0.0/16}\n  - {action: deny, cidr: 10.0.0.0/8}\n";
    assert!(
        found(exception).is_empty(),
        "an exception before its rule is as meant"
    );
    let ports = "  - {action: allow, cidr: 10.0.0.0/8, ports: [443]}\n  - {action: deny, cidr: 10.0.0.0/8}\n";
    assert!(found(ports).is_empty());
    let other = "  - {action: allow, vm: {name: a}}\n  - {action: deny, cidr: 10.0.0.0/8}\n";
    assert_eq!(found(other).len(), 1, "only the allow of everything is told");
    assert!(found("  - {action: allow, domains: ['*.co.uk']}\n")[0].contains("public suffix"));
    let blocked = policy("dns: {allowedDomains: [x.a.test], blockedDomains: ['*.a.test']}");
    assert!(blocked.warnings[0].text.contains("refuses all the same"));
    let asks = policy("version: 1\nmode: ask\ndefaultAction: allow");
    assert!(asks.warnings[0].text.contains("no effect in mode ask"));
}

#[test]
fn a_rule_that_opens_what_guards_close_is_not_dead_behind_a_broad_one() {
    let found = |guards: &str, rules: &[&str]| -> Vec<String> {
        let rules: Vec<String> = rules.iter().map(|rule| format!("  - {{{rule}}}\n")).collect();
        let warnings = policy(&format!("version: 1\n{guards}rules:\n{}", rules.concat())).warnings;
        let texts = warnings.iter().map(|w| w.text.clone());
        texts.filter(|text| text.contains("can never match")).collect()
    };
    let all = "action: allow, cidr: 0.0.0.0/0";
    let both = [
        all,
        "action: allow, cidr: 8.8.8.0/24, ports: [53]",
        "action: allow, cidr: 169.254.169.254/32, ports: [80]",
    ];
    assert_eq!(found("", &both), [""; 0]);
    for alive in [
        "action: allow, cidr: 10.0.0.0/8",
        "action: allow, cidr: 127.0.0.1/32",
        "action: allow, cidr: 203.0.113.7/32",
        "action: allow, cidr: 8.8.8.8/32, ports: [443]",
        "action: ask, cidr: 169.254.0.0/16",
        "action: ask, cidr: 192.0.2.0/24, ports: [853]",
    ] {
        assert_eq!(found("", &[all, alive]), [""; 0], "{alive}");
    }
    for (dead, but) in [
        ("action: allow, cidr: 192.0.2.0/24", ""),
        ("action: allow, cidr: 8.8.8.0/24, ports: [443]", ""),
        ("action: allow, cidr: 8.8.8.0/24, ports: ['50-60']", ""),
        ("action: ask, cidr: 192.0.2.0/24", ""),
        ("action: ask, cidr: 10.0.0.0/8", " but guarded destinations"),
        (
            "action: deny, protocol: tcp, cidr: 10.0.0.0/8",
            " but guarded destinations",
        ),
    ] {
        let texts = found("", &[all, dead]);
        let expected = format!("rules[1] can never match{but}: rules[0] (line 3) matches all of it before");
        assert_eq!(texts, [expected], "{dead}");
    }
    // What the earlier one names as well is left to nobody.
    let named = [
        "action: allow, cidr: 169.254.0.0/16",
        "action: allow, cidr: 169.254.0.0/17",
    ];
    assert_eq!(found("", &named).len(), 1);
    let denied = [
        "action: deny, cidr: 169.254.0.0/16",
        "action: allow, cidr: 169.254.169.254/32",
    ];
    assert_eq!(found("", &denied).len(), 1, "a refusal stops at no guard");
    // A guard that is off, and on again for some, is as the document has it.
    let off = "guards: {metadata: off, host: off, guests: off, privateFromDns: off, dns: off}\n";
    let metadata = [all, "action: allow, cidr: 169.254.169.254/32"];
    assert_eq!(found(off, &metadata).len(), 1);
    let some = format!("{off}profiles: [{{vm: {{name: a}}, guards: {{metadata: deny}}}}]\n");
    assert_eq!(found(&some, &metadata), [""; 0]);
    assert_eq!(found("guards: {dns: off}\n", &[all, both[1]]).len(), 1);
    // A resolver's very name, which no pattern names.
    let names = |last| ["action: allow, domains: ['*.google']", last];
    assert_eq!(found("", &names("action: allow, domains: [dns.google]")), [""; 0]);
    assert_eq!(found("", &names("action: allow, domains: [a.google]")).len(), 1);
}

#[test]
fn a_rule_with_names_is_not_dead_behind_one_without_since_it_opens_their_lookups() {
    let found = |rules: &str| -> Vec<String> {
        let warnings = policy(&format!("version: 1\nrules:\n{rules}")).warnings;
        let texts = warnings.iter().map(|w| w.text.clone());
        texts.filter(|text| text.contains("can never match")).collect()
    };
    let opens = "  - {action: allow, ports: [443]}\n  - {action: allow, domains: [a.test], ports: [443]}\n";
    assert_eq!(found(opens), [""; 0]);
    let late = "  - {action: deny}\n  - {action: allow, domains: [a.test]}\n";
    let expected = "rules[1] can never match but lookups: rules[0] (line 3) matches all of it before";
    assert_eq!(found(late), [expected]);
}

#[test]
fn what_a_rule_opens_is_looked_for_within_bounds() {
    let prefixes = |count: u32| -> String {
        let all: Vec<String> = (0..count)
            .map(|n| format!("{}/30", std::net::Ipv4Addr::from(0x0a00_0000 + n * 8)))
            .collect();
        format!("{{action: allow, cidrs: [{}]}}", all.join(", "))
    };
    let dead = |count| {
        let rule = prefixes(count);
        let document = format!("version: 1\nrules:\n  - {rule}\n  - {rule}\n");
        let warnings = policy(&document).warnings;
        warnings.iter().any(|w| w.text.contains("can never match"))
    };
    assert!(dead(60));
    assert!(!dead(65), "of too many destinations nothing is claimed");
}

#[test]
fn a_number_that_parsers_read_differently_is_refused_as_it_is_written() {
    for written in [
        "0x50", "0o17", "8_0", "010", "80.0", "8e1", "+80", "\"010\"", "\"1-08\"", "\"0x50\"", "\"8_0\"",
    ] {
        let found = problems(&format!(
            "rules:\n  - {{action: deny, cidr: 10.0.0.0/8, ports: [443, {written}]}}\n"
        ));
        assert_eq!(found.len(), 1, "{written}: {found:?}");
        assert!(found[0].starts_with("p.yaml:2:"), "{found:?}");
        assert!(
            found[0].contains(written.trim_matches('"')),
            "{written}: {found:?}"
        );
    }
    assert!(problems("approvalTimeout: 0x1e")[0].contains("0x1e"));
    assert!(problems("version: 0x1")[0].contains("0x1"));
    // By an alias as well, and what is written between other letters.
    let alias =
        "rules:\n  - {comment: äöü, action: deny, ports: [&p 0x50]}\n  - {action: deny, ports: [*p]}\n";
    let found = problems(alias);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|text| text.contains("0x50")), "{found:?}");
    let honest = "rules:\n  - {comment: äöü, action: deny, ports: [&p 80, \"81\", '82-83' , 84]}\n  \
                  - action: deny\n    ports: *p\n  - action: deny\n    ports:\n      - 85 # the last\n      - 86\n";
    assert_eq!(policy(honest).rules.as_slice().len(), 3);
}

#[test]
fn tags_are_refused() {
    for document in [
        "mode: !foo ask",
        "!foo mode: ask",
        "rules: !foo []",
        "--- !foo {mode: ask}",
    ] {
        let found = problems(document);
        assert_eq!(found.len(), 1, "{document}");
        assert!(found[0].contains("tag") && found[0].contains("foo"), "{found:?}");
    }
}

#[test]
fn prefixes_that_lead_nowhere_and_one_unspecified_address_are_told() {
    let found = |rule: &str| -> Vec<String> {
        let warnings = policy(&format!("version: 1\nrules: [{rule}]\n")).warnings;
        warnings.iter().map(|w| w.text.clone()).collect()
    };
    for prefix in [
        "2002::/16",
        "2002:808:808::/48",
        "2001::/32",
        "64:ff9b:1::/48",
        "ff00::/8",
        "224.0.0.0/4",
        "0.0.0.0/8",
    ] {
        let expected = format!(
            "rules[0]: {prefix} can never match: nothing is let to such addresses, whatever a policy says"
        );
        let both = [
            format!("{{action: deny, cidrs: [192.0.2.0/24, '{prefix}']}}"),
            format!("{{action: allow, cidr: '{prefix}'}}"),
        ];
        for rule in both {
            assert_eq!(found(&rule), [expected.as_str()], "{rule}");
        }
    }
    for prefix in [
        "2000::/3",
        "2001::/31",
        "2002::/15",
        "::/0",
        "fd00::/8",
        "10.0.0.0/8",
        "192.0.0.0/2",
        "0.0.0.0/7",
        "127.0.0.0/8",
        "::1/128",
    ] {
        assert_eq!(
            found(&format!("{{action: deny, cidr: '{prefix}'}}")),
            [""; 0],
            "{prefix}"
        );
    }
    for address in ["0.0.0.0", "::"] {
        let expected = format!("rules[0]: {address} is one address; for every address write {address}/0");
        assert_eq!(
            found(&format!("{{action: deny, cidr: '{address}'}}")),
            [expected.as_str()]
        );
        assert_eq!(found(&format!("{{action: deny, cidr: '{address}/0'}}")), [""; 0]);
    }
}

#[test]
fn a_name_that_is_denied_where_the_rest_is_open_is_told_once() {
    let found = |document: &str| -> Vec<String> {
        let warnings = policy(&format!("version: 1\n{document}")).warnings;
        let texts = warnings.iter().map(|w| w.to_string());
        texts.filter(|text| text.contains("denying a name")).collect()
    };
    let denies = "  - {action: deny, domains: [a.test]}\n  - {action: deny, domains: [b.test]}\n";
    let web = "  - {action: allow, cidr: 0.0.0.0/0, ports: [443]}\n";
    let block = "dns: {blockedDomains: [c.test]}\n";
    let text = "denying a name under a default that allows stops its lookups; whoever has the address from \
                elsewhere may still speak the name; deny by default and allow names instead";
    for (document, place) in [
        (
            format!("defaultAction: allow\nrules:\n{denies}"),
            "4:5: rules[0]: ",
        ),
        (format!("rules:\n{denies}{web}"), "3:5: rules[0]: "),
        (format!("{block}rules:\n{web}"), "1:1: dns.blockedDomains: "),
        (
            format!("defaultAction: allow\n{block}"),
            "1:1: dns.blockedDomains: ",
        ),
    ] {
        assert_eq!(found(&document), [format!("{place}{text}")], "{document}");
    }
    for quiet in [
        format!("rules:\n{denies}"),
        block.to_owned(),
        format!(
            "{block}rules: [{{action: allow, domains: ['*.test']}}, {{action: allow, cidr: 10.0.0.0/8}}]\n"
        ),
        format!("rules:\n{web}"),
        format!("mode: ask\n{block}"),
    ] {
        assert_eq!(found(&quiet), [""; 0], "{quiet}");
    }
}

#[test]
fn a_rule_for_everything_is_told_what_guards_still_close() {
    let found = |document: &str| -> Vec<String> {
        let warnings = policy(&format!("version: 1\n{document}")).warnings;
        warnings.iter().map(|w| w.text.clone()).collect()
    };
    let all = "(metadata, the host, private addresses that DNS taught, other guests, other DNS servers)";
    for (rule, what) in [
        ("{action: allow}", "rules[0] allows every destination"),
        (
            "{action: ask, protocol: tcp}",
            "rules[0] asks for every destination",
        ),
        (
            "{action: allow, cidr: 0.0.0.0/0}",
            "rules[0] allows every IPv4 destination",
        ),
        (
            "{action: allow, cidr: '::/0'}",
            "rules[0] allows every IPv6 destination",
        ),
        (
            "{action: ask, cidrs: ['::/0', 192.0.2.0/24, 0.0.0.0/0]}",
            "rules[0] asks for every destination",
        ),
    ] {
        let texts = found(&format!("rules: [{rule}]\n"));
        assert_eq!(texts.len(), 1, "{rule}: {texts:?}");
        let expected = format!("{what}, but for guarded ones {all}: those need a rule that names them");
        assert!(texts[0].starts_with(&expected), "{rule}: {texts:?}");
    }
    // Some ports of everything are how the web is opened, a name says where, and a refusal stops at no guard.
    for quiet in [
        "{action: allow, cidr: 0.0.0.0/0, ports: [443]}",
        "{action: allow, ports: [443]}",
        "{action: allow, domains: [a.test], cidr: 0.0.0.0/0}",
        "{action: deny, cidr: 0.0.0.0/0}",
        "{action: allow, cidr: 192.0.2.0/24}",
    ] {
        assert_eq!(found(&format!("rules: [{quiet}]\n")), [""; 0], "{quiet}");
    }
    let rest = "guards: {metadata: off, guests: off, dns: off}\n";
    let texts = found(&format!("{rest}rules: [{{action: allow, cidr: 0.0.0.0/0}}]\n"));
    let only =
        |text: &String| text.contains("guarded ones (the host, private addresses that DNS taught): those");
    assert!(texts.iter().any(only), "{texts:?}");
    let none = "guards: {metadata: off, host: off, privateFromDns: off, guests: off, dns: off}\n";
    let texts = found(&format!("{none}rules: [{{action: allow, cidr: 0.0.0.0/0}}]\n"));
    assert!(!texts.iter().any(|text| text.contains("rules[0]")), "{texts:?}");
    // A broad prefix is told the same way, and not of a guard that is off.
    let broad = "rules: [{action: allow, cidr: 168.0.0.0/5}]\n";
    let stays = "rules[0]: 168.0.0.0/5 is broader than 168.63.129.16/32, which stays guarded";
    assert!(found(broad)[0].starts_with(stays), "{:?}", found(broad));
    let off = found(&format!("guards: {{metadata: off}}\n{broad}"));
    assert!(!off.iter().any(|text| text.contains("stays guarded")), "{off:?}");
}

#[test]
fn a_public_suffix_among_what_is_allowed_is_told_wherever_it_stands() {
    let found = |document: &str| -> Vec<String> {
        let warnings = policy(&format!("version: 1\n{document}")).warnings;
        warnings.iter().map(|w| w.text.clone()).collect()
    };
    let below = "co.uk is a public suffix: anyone may own a name below it";
    let alone = "co.uk is a public suffix: it means that name alone, and none below it";
    let set = "sets: {wide: {domains: ['*.co.uk', a.example.com]}}\n";
    for (document, expected) in [
        (
            "dns: {allowedDomains: ['*.co.uk']}\n".to_owned(),
            format!("dns.allowedDomains has *.co.uk, and {below}"),
        ),
        (
            "dns: {allowedDomains: [co.uk]}\n".to_owned(),
            format!("dns.allowedDomains has co.uk, and {alone}"),
        ),
        (
            format!("{set}dns: {{allowedDomains: ['@wide']}}\n"),
            format!("dns.allowedDomains has *.co.uk, and {below}"),
        ),
        (
            "rules: [{action: allow, domains: ['*.co.uk']}]\n".to_owned(),
            format!("rules[0]: {below}"),
        ),
        (
            "rules: [{action: allow, domains: [co.uk]}]\n".to_owned(),
            format!("rules[0]: {alone}"),
        ),
        (
            format!("{set}rules: [{{name: r, action: allow, domains: ['@wide']}}]\n"),
            format!("r: {below}"),
        ),
    ] {
        assert_eq!(found(&document), [expected], "{document}");
    }
    // What is blocked or refused may be as broad as it likes; below a suffix there are owners, some suffixes are
    // hosts, and a top-level name that no list has may be one's own.
    for quiet in [
        "dns: {blockedDomains: ['*.co.uk']}\n",
        "rules: [{action: deny, domains: ['*.co.uk']}]\n",
        "dns: {allowedDomains: ['*.example.co.uk', s3.amazonaws.com, '*.corp']}\n",
    ] {
        assert_eq!(found(quiet), [""; 0], "{quiet}");
    }
}

#[test]
fn inline_rules_are_checked_with_the_document() {
    let rules: Vec<String> = ["allow tcp 10.0.0.1/8", "block tcp 1.2.3.4", "allow"]
        .map(str::to_owned)
        .into();
    let errors = OwnPolicy::parse("own.yaml", Some("mod: ask"), &rules).unwrap_err();
    let text = errors.to_string();
    assert_eq!(errors.0.len(), 4, "{text}");
    for part in ["own.yaml:1:1: key \"mod\"", "10.0.0.0/8", "\"block\"", "empty"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    let many = vec!["allow tcp 1.2.3.4".to_owned(); RULES_MAX + 1];
    assert!(
        OwnPolicy::parse("", None, &many)
            .unwrap_err()
            .to_string()
            .contains("at most")
    );
}

#[test]
fn a_document_of_nothing_is_refused_however_nothing_is_written() {
    for nothing in [
        "",
        "\n",
        "  \n\t\n",
        "# rules:\n#   - all\n",
        "---\n",
        "---\n...\n",
        "{}",
        "null",
        "~",
        "\u{feff}",
        "\r\n",
    ] {
        let alone = Policy::parse("p.yaml", nothing).unwrap_err();
        assert_eq!(alone.0.len(), 1, "{nothing:?}: {alone}");
        let expected = "the document is empty (expected at least defaultAction: deny)";
        assert_eq!(alone.0[0].text, expected, "{nothing:?}");
        assert_eq!(alone.0[0].source_name, "p.yaml", "{nothing:?}");
        let rules = ["allow tcp 192.0.2.7:80".to_owned()];
        for rules in [&[][..], &rules] {
            let brought = OwnPolicy::parse("p.yaml", Some(nothing), rules).unwrap_err();
            assert_eq!(brought, alone, "{nothing:?} as a VM's own");
        }
    }
}
