//! Named sets, and lists that come along with a document.

use super::*;

fn attachments(lists: &[(&str, &str)]) -> Attachments {
    let attachment = |(path, content): &(&str, &str)| {
        let attachment = Attachment {
            digest: format!("{content:?}"),
            content: content.as_bytes().into(),
        };
        ((*path).to_owned(), attachment)
    };
    Attachments(lists.iter().map(attachment).collect())
}

fn with_lists(document: &str, lists: &[(&str, &str)]) -> Result<Policy, PolicyErrors> {
    Policy::parse_with("p.yaml", document, &attachments(lists), &ListCache::default())
}

fn under(policy: &Policy) -> Effective {
    let claimed = PolicyInForce {
        name: "default",
        revision: 3,
        policy,
    };
    Effective::compose(at(now()), &vm(), Some(claimed), None, Modes::default())
}

#[track_caller]
fn problem(document: &str, lists: &[(&str, &str)]) -> String {
    with_lists(document, lists).unwrap_err().to_string()
}

#[test]
fn rules_and_dns_refer_to_sets() {
    let policy = policy(
        "version: 1\nsets:\n  dev: {domains: [\"*.github.com\", github.com], cidrs: [192.0.2.0/24]}\n  bad: {domains: [\"*.evil.test\"]}\n\
         rules:\n  - {name: names, action: allow, domains: [\"@dev\", x.test], ports: [443]}\n  - {name: nets, action: allow, cidrs: [\"@dev\", 198.51.100.7], ports: [22]}\n\
         dns: {allowedDomains: [\"@dev\"], blockedDomains: [\"@bad\"]}\n",
    );
    assert_eq!(policy.warnings, []);
    let (under, none) = (under(&policy), grants([]));
    says(
        &under,
        &none,
        "tcp 1.2.3.4:443 api.github.com",
        Outcome::Allow,
        "rule",
        "names",
    );
    says(
        &under,
        &none,
        "tcp 1.2.3.4:443 x.test",
        Outcome::Allow,
        "rule",
        "names",
    );
    says(&under, &none, "tcp 192.0.2.9:22", Outcome::Allow, "rule", "nets");
    says(
        &under,
        &none,
        "tcp 198.51.100.7:22",
        Outcome::Allow,
        "rule",
        "nets",
    );
    says(
        &under,
        &none,
        "tcp 198.51.100.8:22",
        Outcome::Deny,
        "default",
        "deny",
    );
    says(
        &under,
        &none,
        "tcp 1.2.3.4:22 api.github.com",
        Outcome::Allow,
        "dns",
        "dns.allowedDomains",
    );
    says_name(
        &under,
        &none,
        "a.evil.test",
        Outcome::Deny,
        "dns",
        "dns.blockedDomains",
    );
}

#[test]
fn a_list_that_came_along_is_read_and_one_that_did_not_is_an_error_with_its_remedy() {
    let document = "version: 1\nsets:\n  block: {file: lists/malware.txt, format: adblock}\ndns: {defaultAction: allow, blockedDomains: [\"@block\"]}\n";
    let policy = with_lists(document, &[("lists/malware.txt", "! x\n||evil.test^\n")]).unwrap();
    let (under, none) = (under(&policy), grants([]));
    says_name(
        &under,
        &none,
        "evil.test",
        Outcome::Deny,
        "dns",
        "dns.blockedDomains",
    );
    says_name(
        &under,
        &none,
        "a.evil.test",
        Outcome::Deny,
        "dns",
        "dns.blockedDomains",
    );
    says_name(
        &under,
        &none,
        "evil.test.good.test",
        Outcome::Allow,
        "default",
        "allow",
    );

    let missing = problem(document, &[("other.txt", "a.test\n")]);
    assert!(
        missing.starts_with("p.yaml:3:17: list \"lists/malware.txt\" did not come with the policy")
            && missing.contains("vnetctl policy apply FILE"),
        "{missing}"
    );
}

#[test]
fn a_wrong_line_of_a_list_is_told_by_file_and_line_and_never_quoted() {
    let document = "version: 1\nsets:\n  s: {file: /etc/shadow, format: plain}\nrules:\n  - {action: deny, domains: \"@s\"}\n";
    let told = problem(
        document,
        &[("/etc/shadow", "a.test\nroot:$6$secret$hash:19000::\n")],
    );
    assert_eq!(
        told,
        "/etc/shadow:2:1: the line is not plain (expected a name, *.name, an address or a prefix, and nothing else)"
    );
}

#[test]
fn the_loader_opens_no_file() {
    // It is there, and readable, and beside the point.
    let file = std::env::temp_dir().join(format!("vnet-policy-list-{}", std::process::id()));
    std::fs::write(&file, "a.test\n").unwrap();
    let document = format!(
        "version: 1\nsets:\n  s: {{file: {:?}}}\nrules:\n  - {{action: deny, domains: \"@s\"}}\n",
        file
    );
    let told = problem(&document, &[]);
    std::fs::remove_file(&file).unwrap();
    assert!(told.contains("did not come with the policy"), "{told}");
}

#[test]
fn what_is_wrong_with_sets_is_told_with_its_place_and_remedy() {
    for (sets, rest, expected) in [
        ("a: {}", "", "sets.a is empty (expected domains, cidrs or file)"),
        (
            "a: {domain: [x.test]}",
            "",
            "key \"domain\" is not known in sets.a (did you mean domains?)",
        ),
        (
            "a: {format: plain, domains: [x.test]}",
            "",
            "format is that of a file, and there is none; add file",
        ),
        (
            "a: {file: x, format: host}",
            "",
            "format is \"host\" (expected plain, hosts, adblock, dnsmasq or auto; did you mean hosts?)",
        ),
        (
            "a: {domains: [\"@b\"]}",
            "",
            "\"@b\" refers to a set, which a set cannot",
        ),
        (
            "\"a b\": {domains: [x.test]}",
            "",
            "\"a b\" cannot be a set's name",
        ),
        (
            "a: {domains: [x.test]}\n  a: {domains: [y.test]}",
            "",
            "set a is given twice",
        ),
        (
            "dev: {domains: [x.test]}",
            "domains: \"@devv\"",
            "set \"@devv\" is not known (did you mean @dev?)",
        ),
        (
            "dev: {domains: [x.test]}",
            "cidr: \"@dev\"",
            "set \"@dev\" has no cidrs",
        ),
        (
            "dev: {cidrs: [10.0.0.0/8]}",
            "domains: \"@dev\"",
            "set \"@dev\" has no domains",
        ),
        ("a: {cidrs: [10.0.0.1/8]}", "", "10.0.0.1/8"),
    ] {
        let document = format!("version: 1\nsets:\n  {sets}\nrules:\n  - {{action: deny, {rest}}}\n");
        let told = problem(&document, &[("x", "a.test\n")]);
        assert!(
            told.starts_with("p.yaml:") && told.contains(expected),
            "{sets} {rest}: {told}"
        );
        assert_eq!(told.lines().count(), 1, "one mistake, one message: {told}");
    }
    let unused = policy("version: 1\nsets:\n  a: {domains: [x.test]}\n").warnings;
    assert_eq!(unused[0].to_string(), "3:3: nothing refers to set @a");
}

#[test]
fn an_empty_list_is_refused_rather_than_matching_nothing() {
    let document = "version: 1\nsets:\n  s: {file: l}\nrules:\n  - {action: deny, domains: \"@s\"}\n";
    assert!(problem(document, &[("l", "# nothing\n")]).contains("has no entry; is it the right file?"));
}

#[test]
fn lists_are_bounded_in_bytes() {
    let document = "version: 1\nsets:\n  s: {file: l}\nrules:\n  - {action: deny, domains: \"@s\"}\n";
    let long = "\n".repeat(LISTS_BYTES_MAX + 1);
    assert!(problem(document, &[("l", &long)]).contains("bytes together (at most 67108864)"));
}

#[test]
#[ignore = "a measurement: cargo test --release -p vnet-controlplane --lib -- --ignored --nocapture a_million_names"]
fn a_million_names_load_in_seconds_and_cost_a_lookup_what_a_thousand_do() {
    const LOOKUPS: u32 = 200_000;
    let document = "version: 1\nsets:\n  s: {file: l}\nrules:\n  - {action: deny, domains: \"@s\"}\n";
    let measured = |names: usize| {
        let list: String = (0..names).map(|n| format!("||host{n}.example^\n")).collect();
        let began = std::time::Instant::now();
        let policy = with_lists(document, &[("l", &list)]).unwrap();
        let loading = began.elapsed();
        let (under, grants) = (under(&policy), grants([]));
        let asked: Vec<String> = (0..1_000)
            .map(|n| format!("a.host{}.example", n * names / 1_000))
            .collect();
        let began = std::time::Instant::now();
        for n in 0..LOOKUPS {
            let found = ask_name(&under, &grants, &asked[n as usize % asked.len()]);
            assert_eq!(found.outcome, Outcome::Deny);
        }
        (loading, began.elapsed() / LOOKUPS)
    };
    let (_, few) = measured(1_000);
    let (loading, many) = measured(1_000_000);
    println!(
        "a million names load in {loading:?}; a lookup takes {few:?} beside a thousand, {many:?} beside a million"
    );
    assert!(loading < Duration::from_secs(10), "{loading:?}");
    assert!(many < few * 2, "{few:?}, then {many:?}");
}

#[test]
fn a_hundred_thousand_names_are_shared_by_rules_and_vms() {
    let list: String = (0..100_000)
        .map(|n| format!("host{n}.site{}.example\n", n % 50_000))
        .collect();
    let mut document = "version: 1\nsets:\n  s: {file: l}\nrules:\n".to_owned();
    for port in 1..=500 {
        document += &format!("  - {{action: deny, domains: \"@s\", ports: [{port}]}}\n");
    }
    let policy = with_lists(&document, &[("l", &list)]).unwrap();
    let tables = |policy: &Policy, rule: usize| {
        Arc::clone(
            &policy.rules.as_slice()[rule]
                .test
                .names
                .as_ref()
                .unwrap()
                .tables()[0],
        )
    };
    assert!(Arc::ptr_eq(&tables(&policy, 0), &tables(&policy, 499)));
    let under = under(&policy);
    let found = decide(&under, &grants([]), "tcp 1.2.3.4:77 host7.site7.example");
    assert_eq!(found.reason.subject, "rules[76]");
}
