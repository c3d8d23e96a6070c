//! Aliases in answers: refused by what is said explicitly, let pass by everything else, asked about never.

use vnet_proto::model::LookupMatch;

use super::*;

fn alias(effective: &Effective, grants: &VmGrants, name: &str) -> LookupDecision {
    let (vm, guarded) = (vm(), guarded());
    let context = Context {
        vm: &vm,
        policy: effective,
        grants,
        guarded: &guarded,
        peer: None,
    };
    let subject = LookupSubject::alias(name.parse().unwrap(), 1);
    let decision = decide_lookup(&context, &subject);
    assert!(decision.found.matches(&subject.name));
    decision
}

#[track_caller]
fn is_refused(effective: &Effective, grants: &VmGrants, name: &str, outcome: Outcome, step: &str, by: &str) {
    let decision = alias(effective, grants, name);
    let found = (
        decision.outcome,
        decision.reason.step.as_str(),
        decision.reason.subject.as_str(),
    );
    assert_eq!(found, (outcome, step, by), "{name}: {}", decision.reason);
    assert!(!decision.reason.text.is_empty());
}

#[track_caller]
fn passes(effective: &Effective, grants: &VmGrants, name: &str) -> LookupDecision {
    let decision = alias(effective, grants, name);
    let found = (decision.outcome, decision.reason.step.as_str());
    assert_eq!(found, (Outcome::Allow, "alias"), "{name}: {}", decision.reason);
    assert_eq!(
        (&decision.grant, decision.budget, decision.would_deny),
        (&None, None, false)
    );
    assert!(!decision.synthetic_only);
    decision
}

const DENYING: &str = r#"version: 1
rules:
  - {name: good, action: allow, domains: ["good.cdn.test"]}
  - {name: cdn, action: deny, domains: ["*.cdn.test"]}
  - {name: quiet, action: drop, domains: ["ads.test"]}
  - {name: port, action: deny, domains: ["port.test"], ports: [80]}
  - {name: person, action: ask, domains: ["ask.test"]}
dns: {allowedDomains: ["*.allowed.test"], blockedDomains: ["*.malware.example", "bad.allowed.test"]}
"#;

#[test]
fn whatever_refuses_a_name_explicitly_refuses_it_as_an_alias() {
    for mode in [None, Some(Mode::Ask), Some(Mode::Observe), Some(Mode::Enforce)] {
        let effective = effective(Some(DENYING), mode);
        let denied = grants(["deny domain *.granted.test", "allow domain x.cdn.test"]);
        is_refused(
            &effective,
            &denied,
            "a.malware.example",
            Outcome::Deny,
            "dns",
            "dns.blockedDomains",
        );
        is_refused(
            &effective,
            &denied,
            "bad.allowed.test",
            Outcome::Deny,
            "dns",
            "dns.blockedDomains",
        );
        is_refused(
            &effective,
            &denied,
            "a.granted.test",
            Outcome::Deny,
            "grant",
            "g0",
        );
        is_refused(&effective, &denied, "x.cdn.test", Outcome::Deny, "rule", "cdn");
        is_refused(&effective, &denied, "ads.test", Outcome::Drop, "rule", "quiet");
        is_refused(&effective, &denied, "dns.google", Outcome::Deny, "guard", "dns");
        assert_eq!(
            alias(&effective, &denied, "a.granted.test").grant.unwrap().0,
            "g0"
        );
    }
    for mode in [Mode::Block, Mode::Quarantine] {
        let blocked = effective(Some(DENYING), Some(mode));
        is_refused(
            &blocked,
            &grants([]),
            "x.test",
            Outcome::Deny,
            "mode",
            &mode.to_string(),
        );
    }
}

#[test]
fn what_nothing_refuses_explicitly_passes_whatever_the_default_and_nobody_is_asked() {
    for mode in [None, Some(Mode::Ask), Some(Mode::Observe), Some(Mode::Enforce)] {
        let effective = effective(Some(DENYING), mode);
        for name in [
            "nobody.test",
            "port.test",
            "ask.test",
            "good.cdn.test",
            "x.allowed.test",
            "cdn.test",
        ] {
            passes(&effective, &grants([]), name);
        }
        let secure = self::effective(None, mode);
        passes(&secure, &grants(["allow domain x.test"]), "x.test");
    }
    let synthetic = effective(Some("version: 1\nmode: ask\ndns: {answer: synthetic}\n"), None);
    passes(&synthetic, &grants([]), "x.test");
}

#[test]
fn where_nothing_refuses_names_one_alias_answers_for_all() {
    for document in [
        "version: 1\nguards: {dns: off}\n",
        "version: 1\nguards: {dns: off}\ndns: {allowedDomains: [\"*.a.test\", b.test]}\n",
        "version: 1\nguards: {dns: off}\noutboundAllow: [\"x.*y\"]\nrules: [{action: allow, domains: [c.test]}]\n",
    ] {
        let effective = effective(Some(document), None);
        let decision = passes(&effective, &grants(["allow domain d.test"]), "x.a.test");
        assert_eq!(decision.found, LookupMatch::Any, "{document}");
    }
    // The guard of DNS has names far from this one.
    let guarded = effective(Some("version: 1\n"), None);
    let found = passes(&guarded, &grants([]), "a.b.example").found;
    assert_eq!(found.to_string(), "*.example");
    // Where something does, the match keeps clear of it.
    let denying = effective(Some(DENYING), None);
    let found = passes(&denying, &grants([]), "x.y.allowed.test").found;
    assert_eq!(found.to_string(), "*.y.allowed.test");
    let found = alias(&denying, &grants([]), "x.malware.example").found;
    assert_eq!(found.to_string(), "*.malware.example");
}

#[test]
fn another_dns_servers_name_passes_only_by_what_names_it() {
    let asking = "version: 1\nmode: ask\nrules: [{action: ask, domains: [dns.google]}]\n";
    passes(&effective(Some(asking), None), &grants([]), "dns.google");
    let named = effective(
        Some("version: 1\nrules: [{action: allow, domains: [dns.google]}]\n"),
        None,
    );
    assert!(!passes(&named, &grants([]), "dns.google").once);
    let wide = effective(
        Some("version: 1\nrules: [{action: allow, domains: [\"*.google\"]}]\n"),
        None,
    );
    is_refused(&wide, &grants([]), "dns.google", Outcome::Deny, "guard", "dns");
    // A grant may be used up without anybody's saying so: what rests on it is not kept.
    let granted = grants(["allow domain dns.google"]);
    assert!(passes(&wide, &granted, "dns.google").once);
    let off = effective(Some("version: 1\nguards: {dns: off}\n"), None);
    passes(&off, &grants([]), "dns.google");
}

#[test]
fn a_pass_ends_with_the_rule_that_stands_before_one_that_refuses() {
    let document = "version: 1\nrules:\n  - {action: allow, domains: [x.test], until: 2030-01-01T00:00:00Z}\n  \
                    - {action: deny, domains: [\"*.test\"]}\n";
    let effective = effective(Some(document), None);
    let ends = passes(&effective, &grants([]), "x.test").expires_at.unwrap();
    assert_eq!(
        humantime::format_rfc3339_seconds(ends).to_string(),
        "2030-01-01T00:00:00Z"
    );
    is_refused(
        &effective,
        &grants([]),
        "y.test",
        Outcome::Deny,
        "rule",
        "rules[1]",
    );
}
