//! DNS to other servers: what the guard stops, and what opens it.

use super::*;

const OPEN: &str = "version: 1\ndefaultAction: allow\n";

fn under(document: &str) -> Effective {
    effective(Some(document), None)
}

/// Every way to another server, and what is said of it.
const WAYS: &[(&str, &str)] = &[
    ("udp 203.0.113.53:53", "DNS to another server"),
    ("tcp 203.0.113.53:53", "DNS to another server"),
    ("udp [2001:db8::53]:53", "DNS to another server"),
    ("tcp 203.0.113.53:853", "DNS over TLS"),
    ("udp 203.0.113.53:853", "DNS over QUIC"),
    ("udp 203.0.113.53:5353", "multicast DNS"),
    ("udp 203.0.113.53:5355", "LLMNR"),
    ("udp 203.0.113.53:137", "NetBIOS"),
    ("tcp 1.1.1.1:443", "DNS over HTTPS"),
    ("udp 8.8.8.8:443", "DNS over HTTPS"),
    ("tcp 9.9.9.9:8443", "DNS over HTTPS"),
    ("tcp [2001:4860:4860::8888]:443", "DNS over HTTPS"),
    ("udp [64:ff9b::8.8.8.8]:443", "DNS over HTTPS"),
];

#[test]
fn no_way_to_another_server_is_opened_by_a_broad_allow() {
    let broad = "version: 1\nrules:\n  - action: allow\n  - action: allow\n    cidr: \"0.0.0.0/0\"\n    ports: [\"1-65535\"]\n  - action: ask\n    ports: [443]\n";
    let listed = "version: 1\ndefaultAction: allow\ndns: {allowedDomains: [\"*.example.com\"]}\n";
    for document in [
        OPEN,
        broad,
        listed,
        "version: 1\ndefaultAction: allow\nmode: observe\n",
    ] {
        let effective = under(document);
        for (way, said) in WAYS {
            let text = format!("{way} www.example.com");
            says(
                &effective,
                &grants(["allow any 0.0.0.0/0"]),
                &text,
                Outcome::Deny,
                "guard",
                "dns",
            );
            let decision = decide(&effective, &grants([]), way);
            assert!(decision.reason.text.contains(said), "{way}: {}", decision.reason);
        }
    }
}

#[test]
fn what_is_no_dns_passes_as_before() {
    for text in [
        "tcp 203.0.113.53:443",
        "udp 203.0.113.53:123",
        "tcp 1.1.1.9:443",
        "icmp 8.8.8.8",
    ] {
        says(
            &under(OPEN),
            &grants([]),
            text,
            Outcome::Allow,
            "default",
            "allow",
        );
    }
    let open = effective(None, None);
    for (way, _) in WAYS {
        says(&open, &grants([]), way, Outcome::Allow, "default", "allow");
    }
    let off = under("version: 1\ndefaultAction: allow\nguards: {dns: off}\n");
    for (way, _) in WAYS {
        says(&off, &grants([]), way, Outcome::Allow, "default", "allow");
    }
}

#[test]
fn a_rule_or_grant_that_names_the_port_or_the_very_address_opens_it() {
    let rule = |body: &str| {
        under(&format!(
            "version: 1\nrules:\n  - {{name: r, action: allow, {body}}}\n"
        ))
    };
    let none = grants([]);
    for (body, opened, closed) in [
        ("ports: [53]", "udp 203.0.113.53:53", "tcp 203.0.113.53:853"),
        ("ports: [\"53-54\"]", "udp 203.0.113.53:54", "udp 203.0.113.53:53"),
        (
            "cidr: 1.1.1.1/32, ports: [443]",
            "tcp 1.1.1.1:443",
            "tcp 1.1.1.2:443",
        ),
        ("cidr: 1.1.1.1/32", "udp 1.1.1.1:53", "udp 1.1.1.2:53"),
        (
            "cidr: 10.0.0.0/8, ports: [53]",
            "udp 10.1.1.1:53",
            "udp 11.1.1.1:53",
        ),
        // A known address on 443 is not named by the port: everything is there.
        ("ports: [443]", "tcp 203.0.113.7:443", "tcp 1.1.1.1:443"),
        (
            "domains: [dns.google], ports: [443]",
            "tcp 8.8.8.8:443 dns.google",
            "tcp 8.8.8.8:443",
        ),
        (
            "domains: [\"*.google\"], ports: [443]",
            "tcp 203.0.113.7:443 x.google",
            "tcp 8.8.8.8:443 dns.google",
        ),
        (
            "domains: [dns.example.com], ports: [853]",
            "tcp 192.0.2.1:853 dns.example.com",
            "tcp 192.0.2.1:853",
        ),
    ] {
        assert_eq!(
            decide(&rule(body), &none, opened).outcome,
            Outcome::Allow,
            "{body}: {opened}"
        );
        assert_eq!(
            decide(&rule(body), &none, closed).outcome,
            Outcome::Deny,
            "{body}: {closed}"
        );
    }
    let closed = under("version: 1\n");
    for (grant, opened) in [
        ("allow udp 203.0.113.53:53", "udp 203.0.113.53:53"),
        ("allow tcp 1.1.1.1", "tcp 1.1.1.1:443"),
        ("allow domain dns.google:443", "tcp 8.8.8.8:443 dns.google"),
    ] {
        assert_eq!(
            decide(&closed, &grants([grant]), opened).outcome,
            Outcome::Allow,
            "{grant}"
        );
    }
    for (grant, closed_to) in [
        ("allow udp 203.0.113.0/24", "udp 203.0.113.53:53"),
        ("allow domain *.google:443", "tcp 8.8.8.8:443 dns.google"),
    ] {
        assert_eq!(
            decide(&closed, &grants([grant]), closed_to).outcome,
            Outcome::Deny,
            "{grant}"
        );
    }
    // What refuses always does.
    let denying = under("version: 1\nrules:\n  - {name: r, action: deny, ports: [53]}\n");
    says(&denying, &none, "udp 8.8.8.8:53", Outcome::Deny, "rule", "r");
}

#[test]
fn in_mode_ask_a_person_is_asked_about_that_very_destination() {
    let asking = effective(Some("version: 1\n"), Some(Mode::Ask));
    says(
        &asking,
        &grants([]),
        "udp 8.8.8.8:53",
        Outcome::Ask,
        "guard",
        "dns",
    );
    says_name(&asking, &grants([]), "dns.google", Outcome::Ask, "guard", "dns");
    says_name(
        &asking,
        &grants(["allow lookup dns.google"]),
        "dns.google",
        Outcome::Allow,
        "grant",
        "g0",
    );
}

#[test]
fn names_of_public_resolvers_are_looked_up_only_where_they_are_named() {
    let none = grants([]);
    let denied = [
        "dns.google",
        "x.dns.google",
        "mozilla.cloudflare-dns.com",
        "abc123.dns.nextdns.io",
        "use-application-dns.net",
    ];
    for name in denied {
        says_name(&under(OPEN), &none, name, Outcome::Deny, "guard", "dns");
    }
    for name in [
        "example.com",
        "google",
        "cloudflare.com",
        "xdns.google.com.example",
    ] {
        says_name(&under(OPEN), &none, name, Outcome::Allow, "default", "allow");
    }
    let named = under("version: 1\ndns: {allowedDomains: [dns.google, \"*.quad9.net\"]}\n");
    says_name(
        &named,
        &none,
        "dns.google",
        Outcome::Allow,
        "dns",
        "dns.allowedDomains",
    );
    says_name(&named, &none, "dns.quad9.net", Outcome::Deny, "guard", "dns");
    says_name(
        &named,
        &none,
        "www.quad9.net",
        Outcome::Allow,
        "dns",
        "dns.allowedDomains",
    );
    let rules = under(
        "version: 1\nrules:\n  - {name: wide, action: allow, domains: [\"*.google\"]}\n  - {name: exact, action: allow, domains: [dns.google]}\n",
    );
    says_name(&rules, &none, "dns.google", Outcome::Allow, "rule", "exact");
    says_name(&rules, &none, "www.google", Outcome::Allow, "rule", "wide");
    let wide = under("version: 1\nrules:\n  - {name: wide, action: allow, domains: [\"*.google\"]}\n");
    assert_eq!(ask_name(&wide, &none, "dns.google").outcome, Outcome::Deny);
    assert_eq!(
        ask_name(
            &under("version: 1\n"),
            &grants(["allow domain *.google"]),
            "dns.google"
        )
        .outcome,
        Outcome::Deny
    );
    says_name(
        &under("version: 1\ndefaultAction: allow\nguards: {dns: off}\n"),
        &none,
        "dns.google",
        Outcome::Allow,
        "default",
        "allow",
    );
}

#[test]
fn a_policy_adds_resolvers_of_its_own_by_name_address_and_set() {
    let document = r#"
version: 1
defaultAction: allow
sets:
  doh: {domains: ["doh.corp.example"], cidrs: ["198.51.100.0/28"]}
guards:
  resolvers: ["@doh", "*.resolver.test", "192.0.2.53", "2001:db8:53::/48"]
"#;
    let effective = under(document);
    for text in [
        "tcp 198.51.100.3:443",
        "udp 192.0.2.53:443",
        "tcp [2001:db8:53::1]:8443",
        "tcp 1.1.1.1:443",
    ] {
        says(&effective, &grants([]), text, Outcome::Deny, "guard", "dns");
    }
    for name in ["doh.corp.example", "a.resolver.test", "dns.google"] {
        says_name(&effective, &grants([]), name, Outcome::Deny, "guard", "dns");
    }
    says(
        &effective,
        &grants([]),
        "tcp 198.51.100.16:443",
        Outcome::Allow,
        "default",
        "allow",
    );
    says_name(
        &effective,
        &grants([]),
        "corp.example",
        Outcome::Allow,
        "default",
        "allow",
    );
    let problem = Policy::parse("p.yaml", "version: 1\nguards:\n  resolvers: [\"@nope\"]\n").unwrap_err();
    assert!(
        problem
            .to_string()
            .starts_with("p.yaml:3:15: guards.resolvers: set \"@nope\" is not known"),
        "{problem}"
    );
}

#[test]
fn a_verdict_never_reaches_from_what_is_no_dns_into_what_is() {
    let broad = under(
        "version: 1\nrules:\n  - {action: allow, cidr: \"0.0.0.0/0\"}\n  - {action: allow, cidr: \"::/0\"}\n",
    );
    let dns: Vec<FlowSubject> = WAYS.iter().map(|(way, _)| flow(way)).collect();
    for text in [
        "tcp 1.1.1.200:80",
        "tcp 203.0.113.53:54",
        "udp 8.8.8.9:500",
        "tcp [2001:4860:4860::1]:80",
        "tcp 203.0.113.53:52",
    ] {
        let decision = decide(&broad, &grants([]), text);
        assert_eq!(decision.outcome, Outcome::Allow, "{text}");
        for other in &dns {
            assert!(
                !decision.found.matches(&other.key),
                "{} covers {}",
                decision.found,
                other.key
            );
        }
    }
    // Wide enough still for a scan of a network on one port to be one miss.
    let found = decide(&broad, &grants([]), "tcp 23.5.0.1:443").found;
    assert!(found.prefix.prefix_len() <= 15, "{found}");
}
