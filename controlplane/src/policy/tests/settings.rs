//! Keys beside the rules: what they mean, what they are without, and what is said where they are wrong.

use super::*;

fn problems(document: &str) -> Vec<String> {
    match Policy::parse("p.yaml", document) {
        Ok(_) => panic!("it loads: {document}"),
        Err(errors) => errors.0.iter().map(ToString::to_string).collect(),
    }
}

#[track_caller]
fn refused(document: &str, expected: &str) {
    let found = problems(document);
    assert_eq!(found, [expected], "{document}");
}

#[test]
fn without_a_word_lookups_are_limited_where_there_is_a_policy_and_not_where_there_is_none() {
    let (some, none) = (effective(Some("version: 1\n"), None), effective(None, None));
    assert_eq!(
        some.lookup_limits(),
        [QUERIES_PER_SECOND, QUERIES_PER_MINUTE, NAMES_PER_DOMAIN]
    );
    assert_eq!(none.lookup_limits(), [0; 3]);
    assert_eq!(
        (some.dns_guard(), none.dns_guard()),
        (DnsGuard::Deny, DnsGuard::Off)
    );
    assert_eq!(some.settings().ttl(), (Duration::ZERO, TTL_MAX_DEFAULT));
}

#[test]
fn what_is_said_of_lookups_is_in_force() {
    let document = r#"
version: 1
dns:
  ttl: {min: 5s, max: 10m}
  denyWith: {code: nxdomain, text: ask the network team}
  limits: {queriesPerSecond: 5, queriesPerMinute: 60, namesPerDomain: 20}
guards: {dns: redirect}
"#;
    let effective = effective(Some(document), None);
    let seconds = Duration::from_secs;
    assert_eq!(effective.settings().ttl(), (seconds(5), seconds(600)));
    assert_eq!(effective.settings().deny_with, Some(Denial::NxDomain));
    assert_eq!(
        effective.settings().deny_text.as_deref(),
        Some("ask the network team")
    );
    assert_eq!(effective.lookup_limits(), [5, 60, 20]);
    assert_eq!(effective.dns_guard(), DnsGuard::Redirect);
}

#[test]
fn what_is_wrong_with_the_keys_of_dns_is_told_with_its_place_and_remedy() {
    refused(
        "dns:\n  ttl: {min: 2h}\n",
        "p.yaml:2:14: dns.ttl.min \"2h\" is more than dns.ttl.max, 1h, which it is where it is left out; raise max or lower min",
    );
    refused(
        "dns:\n  ttl: {max: 0}\n",
        "p.yaml:2:14: dns.ttl.max 0 is not a time from 1s to 1day (expected seconds, or one as \"30s\")",
    );
    refused(
        "dns:\n  denyWith: NXDOMAIN\n",
        "p.yaml:2:13: dns.denyWith is \"NXDOMAIN\" (expected refused, nxdomain or servfail; did you mean nxdomain?)",
    );
    refused(
        "dns:\n  denyWith: {code: refused, txt: x}\n",
        "p.yaml:2:29: key \"txt\" is not known in dns.denyWith (did you mean text?)",
    );
    refused(
        "dns:\n  limits: {queriesPerSecond: 0}\n",
        "p.yaml:2:30: dns.limits.queriesPerSecond is 0 (expected a number from 1 to 100000)",
    );
    refused(
        "dns:\n  limits: {queriesPerSecond: 100, queriesPerMinute: 10}\n",
        "p.yaml:2:11: dns.limits.queriesPerSecond is 100, which queriesPerMinute (10) never lets happen; raise the one or lower the other",
    );
    let long = "x".repeat(161);
    refused(
        &format!("dns:\n  denyWith: {{text: {long}}}\n"),
        "p.yaml:2:20: dns.denyWith.text is 161 bytes long (at most 160, so that it fits every answer)",
    );
}

#[test]
fn a_guard_that_is_off_is_opened_by_broad_rules_and_the_others_stand() {
    let document = "version: 1\ndefaultAction: allow\nguards: {host: off, privateFromDns: off}\n";
    let effective = effective(Some(document), None);
    says(
        &effective,
        &grants([]),
        "tcp 10.0.0.9:80 !host",
        Outcome::Allow,
        "default",
        "allow",
    );
    says(
        &effective,
        &grants([]),
        "tcp 10.0.0.7:80 a.test !private-from-dns",
        Outcome::Allow,
        "default",
        "allow",
    );
    says(
        &effective,
        &grants([]),
        "tcp 169.254.169.254:80 !metadata",
        Outcome::Deny,
        "guard",
        "metadata",
    );
    says(
        &effective,
        &grants([]),
        "tcp 10.0.0.9:80 !daemon",
        Outcome::Deny,
        "guard",
        "daemon",
    );
    refused(
        "guards: {metadata: allow}\n",
        "p.yaml:1:20: guards.metadata is \"allow\" (expected deny or off)",
    );
    refused(
        "guards: {daemon: off}\n",
        "p.yaml:1:10: key \"daemon\" is not known in guards (expected metadata, host, privateFromDns, guests, dns, resolvers, ech or quic)",
    );
}

#[test]
fn guards_that_are_off_are_warned_about() {
    let policy = policy("version: 1\nguards: {metadata: off, dns: off}\n");
    let texts: Vec<&str> = policy.warnings.iter().map(|w| w.text.as_str()).collect();
    assert!(
        texts[0].starts_with("guards.metadata: off") && texts[1].starts_with("guards.dns: off"),
        "{texts:?}"
    );
    let redirect = "version: 1\nguards: {dns: redirect}\nrules:\n  - {name: r, action: allow, ports: [53]}\n";
    let warned = super::policy(redirect).warnings;
    assert!(
        warned
            .iter()
            .any(|w| w.line == 4 && w.text.starts_with("r is about port 53")),
        "{warned:?}"
    );
}

#[test]
fn the_first_profile_that_matches_comes_before_the_document_and_leaves_the_rest_to_it() {
    let document = r#"
version: 1
mode: enforce
approvalTimeout: 10
dns: {defaultAction: deny, denyWith: servfail, limits: {namesPerDomain: 7}}
guards: {dns: redirect}
profiles:
  - vm: {labels: {role: nobody}}
    mode: block
  - name: agents
    vm: {labels: {role: agent}}
    mode: observe
    approvalTimeout: 2m
    dns: {defaultAction: allow, limits: {queriesPerSecond: 9}}
    guards: {host: off}
    onControllerLoss: 10m
  - vm: {name: "web-*"}
    mode: ask
"#;
    let under = effective(Some(document), None);
    assert_eq!(under.mode(), Some(Mode::Observe));
    assert_eq!(under.approval_timeout(), Duration::from_secs(120));
    assert_eq!(under.lookup_default(), DefaultAction::Allow);
    assert_eq!(under.lookup_limits(), [9, QUERIES_PER_MINUTE, 7]);
    assert_eq!(
        (under.settings().deny_with, under.dns_guard()),
        (Some(Denial::ServFail), DnsGuard::Redirect)
    );
    assert_eq!(under.settings().controller_loss, Some(Duration::from_secs(600)));
    assert_eq!(under.settings().host, Some(GuardAction::Off));
    assert_eq!(
        effective(Some(document), Some(Mode::Ask)).mode(),
        Some(Mode::Ask),
        "what the VM brought is stronger"
    );
}

#[test]
fn what_is_wrong_with_a_profile_is_told_by_its_number() {
    refused(
        "profiles:\n  - mode: ask\n",
        "p.yaml:2:5: profiles[0] has no vm, which says whom it is for; what is for all VMs is the document's own",
    );
    refused(
        "profiles:\n  - vm: {name: a}\n    rules: []\n",
        "p.yaml:3:5: key \"rules\" is not known in profiles[0] (expected name, vm, mode, defaultAction, approvalTimeout, dns, guards, approvals or onControllerLoss)",
    );
    refused(
        "profiles:\n  - vm: {name: a}\n    dns: {allowedDomains: []}\n",
        "p.yaml:3:11: key \"allowedDomains\" is not known in profiles[0].dns (expected defaultAction, ttl, denyWith or limits)",
    );
    let shadowed = policy(
        "version: 1\nprofiles:\n  - vm: {name: \"*\"}\n    mode: ask\n  - vm: {name: a}\n    mode: block\n",
    );
    assert!(
        shadowed
            .warnings
            .iter()
            .any(|w| w.line == 5 && w.text.starts_with("profiles[1] is never for any VM"))
    );
}

#[test]
fn approvals_and_the_loss_of_the_controlplane_are_read_and_checked() {
    let document = "approvals: {maxPendingPerVm: 10, maxRequestsPerMinute: 3, maxLifetime: 12h, maxScope: host}\nonControllerLoss: deny\n";
    let said = policy(document).settings;
    assert_eq!((said.max_pending, said.max_per_minute), (Some(10), Some(3)));
    assert_eq!(
        said.max_lifetime,
        Some(LongestLifetime::For(Duration::from_secs(12 * 3_600)))
    );
    assert_eq!(said.max_scope, Some(WidestScope::Host));
    assert_eq!(said.controller_loss, Some(CONTROLLER_LOSS_MIN));
    refused(
        "approvals: {maxPendingPerVm: 2000}\n",
        "p.yaml:1:30: approvals.maxPendingPerVm is 2000 (expected a number from 1 to 1024)",
    );
    refused(
        "approvals: {maxLifetime: ever}\n",
        "p.yaml:1:26: approvals.maxLifetime \"ever\" is not a lifetime (expected a time as \"12h\", untilVmStops or forever)",
    );
    refused(
        "onControllerLoss: keep\n",
        "p.yaml:1:19: onControllerLoss \"keep\" is neither deny nor a time from 1m, the lease of what is allowed, to 24h (expected deny, or one as \"10m\")",
    );
    refused(
        "onControllerLoss: 30s\n",
        "p.yaml:1:19: onControllerLoss \"30s\" is neither deny nor a time from 1m, the lease of what is allowed, to 24h (expected deny, or one as \"10m\")",
    );
}

#[test]
fn outbound_allow_is_tls_to_the_names_that_an_expression_matches() {
    let document = "outboundAllow: [\"^api\\\\.example\\\\.com$\", \"^.*\\\\.GitHub\\\\.com$\"]\ndns: {defaultAction: deny}\n";
    let under = effective(Some(document), None);
    let none = grants([]);
    says_name(
        &under,
        &none,
        "api.example.com",
        Outcome::Allow,
        "rule",
        "outboundAllow",
    );
    says_name(
        &under,
        &none,
        "raw.github.com",
        Outcome::Allow,
        "rule",
        "outboundAllow",
    );
    for name in [
        "xapi.example.com",
        "api.example.com.evil.test",
        "apixexample.com",
        "github.com",
    ] {
        says_name(&under, &none, name, Outcome::Deny, "default", "deny");
    }
    let allowed = decide(&under, &none, "tcp 192.0.2.7:443 api.example.com");
    assert_eq!(
        (allowed.outcome, allowed.name_demand.to_string().as_str()),
        (Outcome::Allow, "require")
    );
    assert_eq!(allowed.names.len(), 1);
    for text in [
        "tcp 192.0.2.7:80 api.example.com",
        "udp 192.0.2.7:443 api.example.com",
        "tcp 192.0.2.7:443",
        "tcp 192.0.2.7:443 example.com",
    ] {
        says(&under, &none, text, Outcome::Deny, "default", "deny");
    }
    // A region stops at the names that were looked at.
    let found = ask_name(&under, &none, "www.example.com").found;
    assert!(!found.matches(&"api.example.com".parse().unwrap()), "{found}");
}

#[test]
fn expressions_are_checked_bounded_and_warned_about_where_they_are_not_whole() {
    let found = problems("outboundAllow: [\"(\", \"\"]\n");
    assert!(
        found[0].starts_with("p.yaml:1:17: outboundAllow: \"(\" is not an expression that can be used: "),
        "{found:?}"
    );
    assert!(
        found[1].ends_with("it is empty, which matches every name"),
        "{found:?}"
    );
    let huge = problems("outboundAllow: [\"(a{200}){200}{200}\"]\n");
    assert!(
        huge[0].contains("size limit") || huge[0].contains("exceeds"),
        "{huge:?}"
    );
    let long = problems(&format!(
        "outboundAllow: [\"{}\"]\n",
        "a".repeat(PATTERN_BYTES_MAX + 1)
    ));
    assert!(long[0].contains("at most 1024"), "{long:?}");
    let many = problems(&format!(
        "outboundAllow: [{}]\n",
        vec!["a"; PATTERNS_MAX + 1].join(", ")
    ));
    assert!(many[0].contains("at most 256"), "{many:?}");
    let warned =
        policy("version: 1\noutboundAllow: [\"example\\\\.com\", \"^a\\\\.test$\", \"^a$|b\"]\n").warnings;
    let lines: Vec<u32> = warned
        .iter()
        .filter(|w| w.text.contains("between ^ and $"))
        .map(|w| w.column)
        .collect();
    assert_eq!(lines.len(), 2, "{warned:?}");
}
