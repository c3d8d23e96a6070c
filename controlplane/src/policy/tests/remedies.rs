//! What each step of a decision says would change it, and that it does.

use vnet_proto::model::Target;

use super::Outcome::{Allow, Ask, Deny, Drop};
use super::*;

/// A decision, by its step, subject and remedy. `what` is a flow as [`flow`] reads it, or `lookup NAME`.
struct Case {
    document: &'static str,
    mode: Option<Mode>,
    grants: &'static [&'static str],
    what: &'static str,
    says: (Outcome, &'static str, &'static str),
    remedy: &'static str,
}

fn decided(
    effective: &Effective,
    grants: &VmGrants,
    what: &str,
) -> ((Outcome, String, String), String, String) {
    let (outcome, reason, remedy) = match what.strip_prefix("lookup ") {
        Some(name) => {
            let decision = ask_name(effective, grants, name);
            (decision.outcome, decision.reason, decision.remedy)
        }
        None => {
            let decision = decide(effective, grants, what);
            (decision.outcome, decision.reason, decision.remedy)
        }
    };
    ((outcome, reason.step, reason.subject), remedy, reason.text)
}

const RULES: &str = "\
version: 1
dns: {blockedDomains: [bad.test], allowedDomains: [good.test]}
rules:
  - {name: no, action: deny, cidr: 192.0.2.0/24}
  - {name: hush, action: drop, cidr: 198.51.100.0/24}
  - {name: maybe, action: ask, cidr: 203.0.113.0/24, ports: [22]}
  - {name: maybe-name, action: ask, domains: [ask.test]}
  - {name: yes, action: allow, cidr: 203.0.113.0/24, ports: [443]}
  - {name: not-this, action: deny, domains: [deny.test]}
";

const CASES: &[Case] = &[
    Case {
        document: RULES,
        mode: Some(Mode::Block),
        grants: &[],
        what: "tcp 203.0.113.7:443",
        says: (Deny, "mode", "block"),
        remedy: "vnetctl vm mode web-1 enforce",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Quarantine),
        grants: &[],
        what: "lookup good.test",
        says: (Deny, "mode", "quarantine"),
        remedy: "vnetctl vm mode web-1 enforce",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &["deny tcp 203.0.113.0/24:443"],
        what: "tcp 203.0.113.7:443",
        says: (Deny, "grant", "g0"),
        remedy: "vnetctl grants revoke g0",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &["deny domain good.test"],
        what: "lookup good.test",
        says: (Deny, "grant", "g0"),
        remedy: "vnetctl grants revoke g0",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &["allow tcp 8.8.4.4:443"],
        what: "tcp 8.8.4.4:443",
        says: (Allow, "grant", "g0"),
        remedy: "vnetctl grants revoke g0",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 192.0.2.7:443",
        says: (Deny, "rule", "no"),
        remedy: "change rule no of policy default (line 4)",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Ask),
        grants: &[],
        what: "udp 198.51.100.7:9",
        says: (Drop, "rule", "hush"),
        remedy: "change rule hush of policy default (line 5)",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 203.0.113.7:443",
        says: (Allow, "rule", "yes"),
        remedy: "change rule yes of policy default (line 8)",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "lookup deny.test",
        says: (Deny, "rule", "not-this"),
        remedy: "change rule not-this of policy default (line 9)",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 203.0.113.7:22",
        says: (Ask, "rule", "maybe"),
        remedy: "vnetctl allow tcp 203.0.113.7:22 --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "lookup ask.test",
        says: (Ask, "rule", "maybe-name"),
        remedy: "vnetctl allow domain 'ask.test' --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Observe),
        grants: &[],
        what: "tcp 203.0.113.7:22",
        says: (Allow, "rule", "maybe"),
        remedy: "vnetctl allow tcp 203.0.113.7:22 --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "lookup bad.test",
        says: (Deny, "dns", "dns.blockedDomains"),
        remedy: "take it from dns.blockedDomains of policy default",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "lookup good.test",
        says: (Allow, "dns", "dns.allowedDomains"),
        remedy: "",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 8.8.4.4:8443 good.test",
        // A public resolver's address is opened by its own rule or grant, whatever name it has.
        says: (Deny, "guard", "dns"),
        remedy: "vnetctl allow tcp 8.8.4.4:8443 --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 169.254.169.254:80 !metadata",
        says: (Deny, "guard", "metadata"),
        remedy: "vnetctl allow tcp 169.254.169.254:80 --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Ask),
        grants: &[],
        what: "tcp 192.168.127.254:8080 !host",
        says: (Ask, "guard", "host"),
        remedy: "vnetctl allow tcp 192.168.127.254:8080 --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp 10.0.0.5:443 good.test !private-from-dns",
        says: (Deny, "guard", "private-from-dns"),
        remedy: "vnetctl allow tcp 10.0.0.5:443 --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "lookup dns.google",
        says: (Deny, "default", "deny"),
        remedy: "vnetctl allow domain 'dns.google' --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Ask),
        grants: &[],
        what: "lookup dns.google",
        says: (Ask, "guard", "dns"),
        remedy: "vnetctl allow domain 'dns.google' --vm web-1",
    },
    Case {
        document: RULES,
        mode: None,
        grants: &[],
        what: "tcp [2001:db9::7]:443",
        says: (Deny, "default", "deny"),
        remedy: "vnetctl allow tcp [2001:db9::7]:443 --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Ask),
        grants: &[],
        what: "icmp 9.9.9.10",
        says: (Ask, "default", "deny"),
        remedy: "vnetctl allow icmp 9.9.9.10 --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Ask),
        grants: &[],
        what: "lookup new.test",
        says: (Ask, "default", "deny"),
        remedy: "vnetctl allow domain 'new.test' --vm web-1",
    },
    Case {
        document: RULES,
        mode: Some(Mode::Observe),
        grants: &[],
        what: "tcp 9.9.10.10:443",
        says: (Allow, "default", "deny"),
        remedy: "vnetctl allow tcp 9.9.10.10:443 --vm web-1",
    },
    Case {
        document: "version: 1\ndefaultAction: allow\n",
        mode: None,
        grants: &[],
        what: "tcp 9.9.10.10:443",
        says: (Allow, "default", "allow"),
        remedy: "",
    },
];

#[test]
fn each_step_says_what_would_change_it() {
    for case in CASES {
        let effective = effective(Some(case.document), case.mode);
        let (found, remedy, text) = decided(&effective, &grants(case.grants.iter().copied()), case.what);
        let found = (found.0, found.1.as_str(), found.2.as_str());
        assert_eq!(
            (found, remedy.as_str()),
            (case.says, case.remedy),
            "{}: {text}",
            case.what
        );
    }
    let open = effective(None, None);
    let (found, remedy, _) = decided(&open, &grants([]), "tcp 192.0.2.7:443");
    assert_eq!(
        (found.0, remedy.as_str()),
        (Allow, "vnetctl vm mode web-1 ask"),
        "where nothing is given"
    );
}

/// A remedy is a command to paste: what it grants lets through what was stopped.
#[test]
fn what_is_stopped_gets_through_once_its_remedy_was_followed() {
    let mut followed = 0;
    for case in CASES {
        let (effective, given) = (
            effective(Some(case.document), case.mode),
            grants(case.grants.iter().copied()),
        );
        let (found, remedy, _) = decided(&effective, &given, case.what);
        let after = if let Some(words) = remedy.strip_prefix("vnetctl allow ") {
            let target = words.strip_suffix(" --vm web-1").unwrap().replace('\'', "");
            assert!(target.parse::<Target>().is_ok(), "{target}");
            let allow = format!("allow {target}");
            let more = case.grants.iter().copied().chain([allow.as_str()]);
            decided(&effective, &grants(more), case.what)
        } else if remedy.starts_with("vnetctl grants revoke ") && found.0 == Deny {
            decided(&effective, &grants([]), case.what)
        } else if remedy == "vnetctl vm mode web-1 enforce" {
            let enforced = super::effective(Some(case.document), Some(Mode::Enforce));
            decided(&enforced, &given, case.what)
        } else {
            continue;
        };
        assert_eq!(
            after.0.0, Allow,
            "{} after {remedy}: by {} {}",
            case.what, after.0.1, after.0.2
        );
        followed += 1;
    }
    assert!(followed > 10, "{followed}");
}
