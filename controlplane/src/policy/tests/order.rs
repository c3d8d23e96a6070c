//! The order of evaluation: each step answers before those after it, and only those.

use super::Outcome::{Allow, Ask, Deny, Drop};
use super::*;

const NONE: [&str; 0] = [];

#[test]
fn block_and_quarantine_come_before_everything() {
    for mode in [Mode::Block, Mode::Quarantine] {
        let policy = effective(Some("defaultAction: allow\nrules: [{action: allow}]"), Some(mode));
        let allow = grants(["allow tcp 1.2.3.4:443", "allow domain a.test"]);
        for text in [
            "tcp 1.2.3.4:443",
            "udp 8.8.8.8:53",
            "icmp 1.1.1.1",
            "tcp 192.168.127.3:22 !guest",
        ] {
            says(&policy, &allow, text, Deny, "mode", &mode.to_string());
        }
        says_name(&policy, &allow, "a.test", Deny, "mode", &mode.to_string());
    }
}

#[test]
fn a_grant_that_denies_beats_a_rule_that_allows() {
    let policy = effective(Some("rules: [{action: allow, cidr: 0.0.0.0/0}]"), None);
    let deny = grants(["deny tcp 1.2.3.4:443", "deny domain bad.test"]);
    says(&policy, &deny, "tcp 1.2.3.4:443", Deny, "grant", "g0");
    says(&policy, &deny, "tcp 1.2.3.4:80", Allow, "rule", "rules[0]");
    says(&policy, &deny, "tcp 5.6.7.8:80 bad.test", Deny, "grant", "g1");
    says_name(&policy, &deny, "bad.test", Deny, "grant", "g1");
}

#[test]
fn a_deny_of_one_port_of_a_name_leaves_its_lookup_and_other_ports_alone() {
    let policy = effective(Some("defaultAction: allow"), None);
    let deny = grants(["deny domain a.test:443"]);
    says(&policy, &deny, "tcp 1.2.3.4:443 a.test", Deny, "grant", "g0");
    says(&policy, &deny, "tcp 1.2.3.4:22 a.test", Allow, "default", "allow");
    says_name(&policy, &deny, "a.test", Allow, "default", "allow");
}

#[test]
fn the_first_rule_that_matches_wins() {
    let document = "
rules:
  - {action: deny, cidr: 10.1.0.0/16}
  - {action: allow, cidr: 10.0.0.0/8}
  - {action: drop, cidr: 0.0.0.0/0, protocol: udp}
";
    let policy = effective(Some(document), None);
    says(&policy, &grants(NONE), "tcp 10.1.2.3:1", Deny, "rule", "rules[0]");
    says(
        &policy,
        &grants(NONE),
        "tcp 10.2.2.3:1",
        Allow,
        "rule",
        "rules[1]",
    );
    says(&policy, &grants(NONE), "udp 11.2.2.3:1", Drop, "rule", "rules[2]");
    says(&policy, &grants(NONE), "tcp 11.2.2.3:1", Deny, "default", "deny");
}

#[test]
fn no_ordinary_approval_overrules_an_explicit_deny_and_a_deny_never_asks() {
    let policy = effective(
        Some("mode: ask\nrules: [{name: lan, action: deny, cidr: 10.0.0.0/8}]"),
        None,
    );
    let allow = grants(["allow tcp 10.0.0.1:22"]);
    says(&policy, &allow, "tcp 10.0.0.1:22", Deny, "rule", "lan");
    says(&policy, &allow, "tcp 11.0.0.1:22", Ask, "default", "deny");
}

#[test]
fn a_rule_that_asks_ends_the_rules_and_a_grant_answers_it() {
    let document = "
defaultAction: allow
rules:
  - {name: q, action: ask, cidr: 1.0.0.0/8}
  - {name: no, action: deny, cidr: 1.0.0.0/8}
";
    let policy = effective(Some(document), None);
    says(&policy, &grants(NONE), "tcp 1.2.3.4:443", Ask, "rule", "q");
    says(
        &policy,
        &grants(["allow tcp 1.2.3.4:443"]),
        "tcp 1.2.3.4:443",
        Allow,
        "grant",
        "g0",
    );
    says(&policy, &grants(NONE), "icmp 1.2.3.4", Deny, "rule", "no");
    let asked = decide(&policy, &grants(NONE), "tcp 1.2.3.4:443");
    assert_eq!(
        asked.found.to_string(),
        "tcp 1.2.3.4:443",
        "an ask is never widened"
    );
}

#[test]
fn a_broad_allow_stops_at_the_guards() {
    let policy = effective(Some("rules: [{action: allow, cidr: 0.0.0.0/0}]"), None);
    for (text, guard) in [
        ("tcp 169.254.169.254:80 !metadata", "metadata"),
        ("tcp 192.168.127.254:22 !host", "host"),
        ("tcp 203.0.113.9:22 !host", "host"),
        ("tcp 192.168.127.3:22 !guest", "guest"),
        ("tcp 172.16.0.5:22 a.test !private-from-dns", "private-from-dns"),
    ] {
        says(&policy, &grants(NONE), text, Deny, "guard", guard);
        says(
            &policy,
            &grants(["allow tcp 0.0.0.0/0"]),
            text,
            Deny,
            "guard",
            guard,
        );
        says(
            &policy,
            &grants(["allow domain a.test"]),
            text,
            Deny,
            "guard",
            guard,
        );
    }
    says(
        &policy,
        &grants(NONE),
        "tcp 172.16.0.5:22",
        Allow,
        "rule",
        "rules[0]",
    );
}

#[test]
fn a_rule_or_grant_that_names_the_guard_opens_it() {
    for (cidr, text) in [
        ("169.254.169.254/32", "tcp 169.254.169.254:80 !metadata"),
        ("169.254.0.0/16", "tcp 169.254.169.254:80 !metadata"),
        ("fe80::/10", "tcp [fe80::1]:80 !metadata"),
        ("127.0.0.0/8", "tcp 192.168.127.254:80 !host"),
        ("192.168.127.254/32", "tcp 192.168.127.254:80 !host"),
        ("203.0.113.9/32", "tcp 203.0.113.9:80 !host"),
        ("192.168.127.0/24", "tcp 192.168.127.3:80 !guest"),
        ("10.0.0.0/8", "tcp 10.0.0.5:80 a.test !private-from-dns"),
        ("10.0.0.9/32", "tcp 10.0.0.9:80 a.test !host !private-from-dns"),
    ] {
        let policy = effective(
            Some(&format!("rules: [{{action: allow, cidr: \"{cidr}\"}}]")),
            None,
        );
        says(&policy, &grants(NONE), text, Allow, "rule", "rules[0]");
        let closed = effective(Some("defaultAction: allow"), None);
        says(
            &closed,
            &grants([format!("allow any {cidr}").as_str()]),
            text,
            Allow,
            "grant",
            "g0",
        );
    }
    let policy = effective(Some("rules: [{action: allow, cidr: 10.0.0.0/8}]"), None);
    says(
        &policy,
        &grants(NONE),
        "tcp 10.0.0.9:80 a.test !host !private-from-dns",
        Deny,
        "guard",
        "host",
    );
    let subnet = effective(Some("rules: [{action: allow, cidr: 192.168.127.0/24}]"), None);
    says(
        &subnet,
        &grants(NONE),
        "tcp 192.168.127.254:80 !host",
        Deny,
        "guard",
        "host",
    );
}

#[test]
fn an_ipv6_spelling_of_an_ipv4_address_is_judged_as_that_by_every_rule() {
    let nat64 = "tcp [64:ff9b::10.1.2.3]:80";
    let both = effective(
        Some(
            "rules: [{action: allow, cidr: '::/0'}, {action: deny, cidr: 10.0.0.0/8}, {action: allow, cidr: 0.0.0.0/0}]",
        ),
        None,
    );
    says(&both, &grants(NONE), nat64, Deny, "rule", "rules[1]");
    says(
        &both,
        &grants(NONE),
        "tcp [64:ff9b::1.2.3.4]:80",
        Allow,
        "rule",
        "rules[2]",
    );
    says(
        &both,
        &grants(NONE),
        "tcp [2001:db8::1]:80",
        Allow,
        "rule",
        "rules[0]",
    );
    // What holds of the one spelling holds of the other: they share one place in a cache.
    let ipv6_closed = effective(
        Some("rules: [{action: deny, cidr: '::/0'}, {action: allow, cidr: 0.0.0.0/0}]"),
        None,
    );
    for text in ["tcp 1.2.3.4:80", "tcp [64:ff9b::1.2.3.4]:80"] {
        says(&ipv6_closed, &grants(NONE), text, Allow, "rule", "rules[1]");
        says(
            &ipv6_closed,
            &grants(["deny tcp 1.2.3.4:80"]),
            text,
            Deny,
            "grant",
            "g0",
        );
    }
    let closed = effective(
        Some("rules: [{action: allow, protocol: icmp, cidr: 10.0.0.0/8}]"),
        None,
    );
    says(
        &closed,
        &grants(NONE),
        "icmpv6 64:ff9b::10.1.2.3",
        Allow,
        "rule",
        "rules[0]",
    );
}

#[test]
fn nothing_opens_an_address_where_a_daemon_listens() {
    let text = "tcp 127.0.0.1:9000 !host !daemon";
    let policy = effective(Some("rules: [{action: allow, cidr: 127.0.0.1/32}]"), None);
    says(
        &policy,
        &grants(["allow tcp 127.0.0.1:9000"]),
        text,
        Deny,
        "guard",
        "daemon",
    );
    for mode in [None, Some(Mode::Ask), Some(Mode::Observe)] {
        says(
            &effective(None, mode),
            &grants(["allow tcp 127.0.0.1:9000"]),
            text,
            Deny,
            "guard",
            "daemon",
        );
    }
}

#[test]
fn a_deny_on_either_form_of_an_address_applies() {
    for cidr in ["127.0.0.0/8", "192.168.127.254/32"] {
        let document =
            format!("rules: [{{action: deny, cidr: \"{cidr}\"}}, {{action: allow, cidr: 127.0.0.1/32}}]");
        let policy = effective(Some(&document), None);
        says(
            &policy,
            &grants(NONE),
            "tcp 192.168.127.254:80 !host",
            Deny,
            "rule",
            "rules[0]",
        );
    }
    let policy = effective(Some("rules: [{action: allow, cidr: 127.0.0.1/32}]"), None);
    says(
        &policy,
        &grants(["deny tcp 127.0.0.1:80"]),
        "tcp 192.168.127.254:80 !host",
        Deny,
        "grant",
        "g0",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 192.168.127.254:80 !host",
        Allow,
        "rule",
        "rules[0]",
    );
}

#[test]
fn guards_ask_in_mode_ask_and_hold_in_mode_observe() {
    let text = "tcp 192.168.127.254:22 !host";
    says(
        &effective(None, Some(Mode::Ask)),
        &grants(NONE),
        text,
        Ask,
        "guard",
        "host",
    );
    says(
        &effective(None, Some(Mode::Observe)),
        &grants(NONE),
        text,
        Deny,
        "guard",
        "host",
    );
    says(
        &effective(None, Some(Mode::Ask)),
        &grants(["allow tcp 192.168.127.254:22"]),
        text,
        Allow,
        "grant",
        "g0",
    );
}

#[test]
fn allowed_domains_open_bound_addresses_on_any_port_and_no_others() {
    let policy = effective(Some(SAMPLE), None);
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:22 api.github.com",
        Allow,
        "dns",
        "dns.allowedDomains",
    );
    says(
        &policy,
        &grants(NONE),
        "udp 5.6.7.8:123 api.github.com",
        Allow,
        "dns",
        "dns.allowedDomains",
    );
    says(
        &policy,
        &grants(NONE),
        "icmp 5.6.7.8 api.github.com",
        Deny,
        "default",
        "deny",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:22 github.com",
        Deny,
        "default",
        "deny",
    );
    says(&policy, &grants(NONE), "tcp 5.6.7.8:22", Deny, "default", "deny");
    says(
        &policy,
        &grants(NONE),
        "tcp 10.0.0.5:22 api.github.com !private-from-dns",
        Deny,
        "rule",
        "rules[1]",
    );
    let found = decide(&policy, &grants(NONE), "tcp 5.6.7.8:22 api.github.com").found;
    assert!(found.names_consulted && found.is_one_address());
}

#[test]
fn a_name_that_is_blocked_by_now_no_longer_opens_its_address() {
    let document = "dns: {allowedDomains: ['*.a.test'], blockedDomains: [bad.a.test]}";
    let policy = effective(Some(document), None);
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:22 bad.a.test",
        Deny,
        "default",
        "deny",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:22 bad.a.test good.a.test",
        Allow,
        "dns",
        "dns.allowedDomains",
    );
}

#[test]
fn addresses_are_never_allowed_merely_because_they_were_looked_up() {
    let policy = effective(Some("defaultAction: deny\ndns: {defaultAction: allow}"), None);
    says_name(&policy, &grants(NONE), "a.test", Allow, "default", "allow");
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:443 a.test",
        Deny,
        "default",
        "deny",
    );
}

#[test]
fn a_rule_with_domains_matches_bound_addresses_and_names_private_ones_with_a_cidr() {
    let document = "
rules:
  - {name: web, action: allow, domains: ['*.corp.test'], ports: [443]}
  - {name: lan, action: allow, domains: [db.corp.test], cidr: 10.0.0.0/8}
";
    let policy = effective(Some(document), None);
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:443 a.corp.test",
        Allow,
        "rule",
        "web",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:80 a.corp.test",
        Deny,
        "default",
        "deny",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 5.6.7.8:443 corp.test",
        Deny,
        "default",
        "deny",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 10.0.0.5:443 a.corp.test !private-from-dns",
        Deny,
        "guard",
        "private-from-dns",
    );
    says(
        &policy,
        &grants(NONE),
        "tcp 10.0.0.5:5432 db.corp.test !private-from-dns",
        Allow,
        "rule",
        "lan",
    );
    says_name(&policy, &grants(NONE), "a.corp.test", Allow, "rule", "web");
}

#[test]
fn observe_allows_and_records_but_explicit_denies_hold() {
    let document = "
mode: observe
rules:
  - {name: no, action: deny, cidr: 10.0.0.0/8}
  - {name: q, action: ask, cidr: 1.0.0.0/8}
dns: {blockedDomains: [bad.test]}
";
    let policy = effective(Some(document), None);
    let none = grants(NONE);
    says(&policy, &none, "tcp 10.0.0.1:1", Deny, "rule", "no");
    says(&policy, &none, "tcp 1.2.3.4:1", Allow, "rule", "q");
    says(&policy, &none, "tcp 9.8.9.9:1", Allow, "default", "deny");
    says(
        &policy,
        &grants(["deny tcp 9.8.9.9:1"]),
        "tcp 9.8.9.9:1",
        Deny,
        "grant",
        "g0",
    );
    says_name(&policy, &none, "bad.test", Deny, "dns", "dns.blockedDomains");
    says_name(&policy, &none, "a.test", Allow, "default", "deny");
    for text in ["tcp 1.2.3.4:1", "tcp 9.8.9.9:1"] {
        assert!(decide(&policy, &none, text).would_deny, "{text}");
    }
    assert!(ask_name(&policy, &none, "a.test").would_deny);
    assert!(!decide(&policy, &grants(["allow tcp 9.8.9.9:1"]), "tcp 9.8.9.9:1").would_deny);
}

#[test]
fn lookups_are_decided_in_their_own_order() {
    let document = "
rules:
  - {name: no, action: deny, domains: ['*.r.test']}
  - {name: q, action: ask, domains: [q.test]}
  - {name: yes, action: allow, domains: [y.test, b.test, g.test], ports: [443]}
  - {name: port, action: deny, domains: [a.test], ports: [25]}
dns:
  allowedDomains: [a.test, q.test, x.r.test]
  blockedDomains: [b.test]
";
    let policy = effective(Some(document), None);
    let none = grants(NONE);
    says_name(
        &policy,
        &grants(["allow domain b.test"]),
        "b.test",
        Deny,
        "dns",
        "dns.blockedDomains",
    );
    says_name(
        &policy,
        &grants(["deny domain g.test"]),
        "g.test",
        Deny,
        "grant",
        "g0",
    );
    says_name(
        &policy,
        &grants(["allow domain x.r.test"]),
        "x.r.test",
        Deny,
        "rule",
        "no",
    );
    says_name(&policy, &none, "y.test", Allow, "rule", "yes");
    says_name(
        &policy,
        &grants(["allow domain q.test:443"]),
        "q.test",
        Allow,
        "grant",
        "g0",
    );
    says_name(&policy, &none, "q.test", Ask, "rule", "q");
    says_name(&policy, &none, "a.test", Allow, "dns", "dns.allowedDomains");
    says_name(&policy, &none, "z.test", Deny, "default", "deny");
}

#[test]
fn a_grant_reaches_only_what_it_is_for() {
    let policy = effective(Some("defaultAction: deny"), None);
    let lookup_only = grants(["allow lookup a.test"]);
    says_name(&policy, &lookup_only, "a.test", Allow, "grant", "g0");
    says(
        &policy,
        &lookup_only,
        "tcp 1.2.3.4:443 a.test",
        Deny,
        "default",
        "deny",
    );
    let name = grants(["allow domain a.test"]);
    says(&policy, &name, "tcp 1.2.3.4:443 a.test", Allow, "grant", "g0");
    says(&policy, &name, "icmp 1.2.3.4 a.test", Deny, "default", "deny");
    says(&policy, &name, "tcp 1.2.3.4:443 b.test", Deny, "default", "deny");
    let any = grants(["allow any 1.2.3.4"]);
    says(&policy, &any, "udp 1.2.3.4:53", Allow, "grant", "g0");
    says(&policy, &any, "icmp 1.2.3.4", Deny, "default", "deny");
    let open = effective(Some("defaultAction: allow"), None);
    says(
        &open,
        &grants(["deny any 1.2.3.4"]),
        "icmp 1.2.3.4",
        Deny,
        "grant",
        "g0",
    );
}

#[test]
fn a_decision_carries_what_its_grant_limits() {
    let policy = effective(Some("defaultAction: deny"), None);
    let all = VmSelector::all();
    let target: vnet_proto::model::Target = "tcp 1.2.3.0/24".parse().unwrap();
    let budget = Budget {
        connections: 5,
        ..Budget::default()
    };
    let grant = |id: &str, lifetime, budget| {
        Grant::new(
            GrantId(id.into()),
            GrantAction::Allow,
            target.clone(),
            all.clone(),
            lifetime,
            budget,
            String::new(),
            now(),
        )
    };
    let once = grant("once", Lifetime::Once, Budget::default());
    let hour = grant("hour", Lifetime::For(Duration::from_secs(3600)), budget);
    let decision = decide(
        &policy,
        &VmGrants::new([Arc::new(once.clone())], 1),
        "tcp 1.2.3.4:443",
    );
    assert!(decision.once);
    assert_eq!(
        decision.found.to_string(),
        "tcp 1.2.3.4:443",
        "once is for one flow"
    );
    let both = VmGrants::new([Arc::new(once), Arc::new(hour)], 1);
    let decision = decide(&policy, &both, "tcp 1.2.3.4:443");
    assert_eq!(
        decision.grant,
        Some(GrantId("hour".into())),
        "a once is not spent where it is not needed"
    );
    assert_eq!(decision.expires_at, Some(now() + Duration::from_secs(3600)));
    assert_eq!(decision.budget, Some(budget));
    assert_eq!(decision.found.to_string(), "tcp 1.2.3.0/24:138-852");
}

#[test]
fn a_grant_that_a_rule_overrules_is_answered_with_its_name() {
    let document = "
rules:
  - {name: web, action: allow, cidr: 10.1.0.0/16, ports: [443], protocol: tcp}
  - {name: lan, action: deny, cidr: 10.0.0.0/8}
  - {name: q, action: ask, cidr: 20.0.0.0/8}
  - {name: q-no, action: deny, cidr: 20.0.0.0/8}
  - {name: ads, action: drop, domains: ['*.ads.test']}
dns: {blockedDomains: ['*.bad.test']}
";
    let effective = effective(Some(document), None);
    let (vm, guarded, none) = (vm(), guarded(), grants(NONE));
    let context = Context {
        vm: &vm,
        policy: &effective,
        grants: &none,
        guarded: &guarded,
        peer: None,
    };
    for (text, rule) in [
        ("allow tcp 10.2.3.4:443", Some("lan")),
        ("allow any 10.0.0.0/8", Some("lan")),
        ("allow tcp 10.1.3.4:443", None),
        ("allow tcp 10.1.3.4:80", Some("lan")),
        ("allow tcp 0.0.0.0/0:443", None),
        ("allow tcp 20.0.0.1:443", None),
        ("allow domain x.ads.test", Some("ads")),
        ("allow domain ads.test", None),
        ("allow domain '*.x.ads.test'", Some("ads")),
        ("allow domain x.bad.test:443", Some("dns.blockedDomains")),
        ("allow lookup x.bad.test", Some("dns.blockedDomains")),
        ("deny tcp 10.2.3.4:443", None),
    ] {
        let grants = grants([text.replace('\'', "").as_str()]);
        let grant = &grants.allow.iter().chain(&grants.deny).next().unwrap().grant;
        assert_eq!(overruled_by(&context, grant).as_deref(), rule, "{text}");
    }
}

#[test]
fn rules_are_for_the_vms_that_they_select() {
    let document = "
rules:
  - {name: other, action: allow, vm: {name: 'db-*'}}
  - {name: mine, action: allow, cidr: 1.0.0.0/8, vm: {name: 'web-*', labels: {role: agent}}}
";
    let policy = effective(Some(document), None);
    says(&policy, &grants(NONE), "tcp 1.2.3.4:443", Allow, "rule", "mine");
    says(&policy, &grants(NONE), "tcp 9.2.3.4:443", Deny, "default", "deny");
}

#[test]
fn a_match_reaches_as_far_as_the_verdict_and_no_further() {
    let policy = effective(
        Some("rules: [{action: allow, cidr: 10.1.0.0/16, ports: [443], protocol: tcp}]"),
        None,
    );
    let found = |text: &str| decide(&policy, &grants(NONE), text).found.to_string();
    assert_eq!(found("tcp 10.1.2.3:443"), "tcp 10.1.0.0/16:443");
    // Whatever is said of other ports, those of DNS are under a guard of their own.
    // Only the destination told them apart; the host's own 10.0.0.9 keeps the match out of 10.0.0.0/15.
    assert_eq!(found("tcp 10.2.2.3:443"), "tcp 10.2.0.0/15:138-852");
    // Only the port did.
    assert_eq!(found("tcp 10.1.2.3:80"), "tcp 10.1.0.0/16:54-136");
    assert_eq!(found("tcp 10.1.2.3:8080"), "tcp 10.1.0.0/16:5356-65535");
    assert_eq!(found("udp 10.1.2.3:443"), "udp 10.1.0.0/16:138-852");
    assert_eq!(found("icmp 10.1.2.3"), "icmp 10.1.0.0/16");
    // A broad allow keeps clear of guarded and private ranges; a private address stands for itself.
    let broad = effective(Some("rules: [{action: allow, cidr: 0.0.0.0/0}]"), None);
    let found = |text: &str| decide(&broad, &grants(NONE), text).found;
    assert_eq!(found("tcp 1.2.3.4:443").to_string(), "tcp 1.2.0.0/15:138-852");
    assert_eq!(found("tcp 172.16.3.4:443").to_string(), "tcp 172.16.3.4:138-852");
    assert!(found("tcp 172.16.3.4:443").names_consulted);
    assert_eq!(
        found("tcp 192.168.127.9:443").to_string(),
        "tcp 192.168.127.9:443"
    );
}

#[test]
fn a_lookups_match_reaches_as_far_as_the_verdict_and_no_further() {
    let policy = effective(Some(SAMPLE), None);
    let found = |name: &str| ask_name(&policy, &grants(NONE), name).found.to_string();
    assert_eq!(found("api.github.com"), "*.github.com");
    assert_eq!(found("github.com"), "github.com");
    assert_eq!(found("www.example.com"), "*.example.com");
    assert_eq!(found("www.example.net"), "*.net");
    assert_eq!(found("a.b.example.org"), "*.example.org");
    assert_eq!(found("x.malware.example"), "*.malware.example");
    assert_eq!(found("malware.example"), "malware.example");
    let open = effective(None, None);
    assert_eq!(ask_name(&open, &grants(NONE), "a.test").found.to_string(), "*");
    let asks = effective(None, Some(Mode::Ask));
    assert_eq!(
        ask_name(&asks, &grants(NONE), "a.test").found.to_string(),
        "a.test"
    );
}

#[test]
fn ping_is_denied_where_all_else_is_and_allowed_by_what_names_it_alone() {
    let none = grants(NONE);
    for ping in ["icmp 1.2.3.4", "icmpv6 2001:db8::1"] {
        let closed = effective(Some("version: 1\n"), None);
        says(&closed, &none, ping, Deny, "default", "deny");
        let others = "version: 1\nrules: [{action: allow}, {action: allow, protocol: udp}]\n";
        says(
            &effective(Some(others), None),
            &none,
            ping,
            Deny,
            "default",
            "deny",
        );
        let asking = effective(Some("version: 1\n"), Some(Mode::Ask));
        says(&asking, &none, ping, Ask, "default", "deny");
        let named = "version: 1\nrules: [{action: allow, protocol: any}]\n";
        says(
            &effective(Some(named), None),
            &none,
            ping,
            Allow,
            "rule",
            "rules[0]",
        );
    }
}
