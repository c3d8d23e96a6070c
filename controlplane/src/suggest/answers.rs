//! From people's answers to a file: what was granted for a while becomes a rule.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;

use vnet_proto::model::{Budget, NamePattern, Target, VmSelector};

use super::plan::{PROBES_MAX, Probe};
use super::render::{quoted, write_probes};
use super::{SOURCE, SuggestError, load, passes};
use crate::clock::Now;
use crate::grant::{Grant, GrantAction, Lifetime};
use crate::policy::{FORWARD_RULES_MAX, Outcome, RULES_MAX};

/// A policy that says what these grants say, for good. Of those that are alike the first counts. What a person
/// denied comes first, as it does among grants.
///
/// # Errors
/// [`SuggestError`].
pub fn from_answers(grants: &[Grant], now: Now) -> Result<String, SuggestError> {
    let mut seen = BTreeSet::new();
    let distinct = grants.iter().filter(|grant| {
        seen.insert((
            grant.action.to_string(),
            grant.target.to_string(),
            grant.vms.to_string(),
        ))
    });
    let (denying, allowing): (Vec<&Grant>, Vec<&Grant>) =
        distinct.partition(|grant| grant.action == GrantAction::Deny);
    let found = denying.len() + allowing.len();
    if found == 0 {
        return Err(SuggestError::Nothing(
            "nobody answered anything in this time, and no grant is in force",
        ));
    }
    // One more closes the ports of names that are only looked up.
    if found >= RULES_MAX {
        return Err(SuggestError::TooManyAnswers {
            about: "what may be reached",
            found,
            most: RULES_MAX - 1,
        });
    }
    let grants: Vec<&Grant> = denying.into_iter().chain(allowing).collect();
    let mut text = String::from(
        "# Suggested by vnetctl policy suggest --from-grants: what people answered, for good.\n# Read it before you apply it: an answer for an hour is a rule for ever here.\n",
    );
    if grants.iter().any(|grant| grant.budget != Budget::default()) {
        text.push_str(
            "# A file has no budgets: what was allowed up to so many connections or bytes is allowed without end here.\n",
        );
    }
    text.push_str("version: 1\ndefaultAction: deny\n");
    let (forwards, grants): (Vec<&Grant>, Vec<&Grant>) = grants
        .into_iter()
        .partition(|grant| matches!(grant.target, Target::Forward(_)));
    if forwards.len() > FORWARD_RULES_MAX {
        return Err(SuggestError::TooManyAnswers {
            about: "forwards",
            found: forwards.len(),
            most: FORWARD_RULES_MAX,
        });
    }
    if !forwards.is_empty() {
        text.push_str("forwards:\n");
        for grant in forwards {
            write_rule(&mut text, grant);
        }
    }
    text.push_str(if grants.is_empty() {
        "rules: []\n"
    } else {
        "rules:\n"
    });
    let (lookups, others): (Vec<&Grant>, Vec<&Grant>) =
        grants.iter().partition(|grant| lookup_allowed(grant).is_some());
    for grant in others {
        write_rule(&mut text, grant);
    }
    write_lookups(&mut text, &lookups);
    let without = load(&text)?;
    let mut seen = HashSet::new();
    let probes: Vec<Probe> = grants
        .iter()
        .filter_map(|grant| probe(grant))
        .filter(|probe| seen.insert((probe.vm.clone(), probe.text.clone())))
        .filter(|probe| passes(&without, probe, now))
        .take(PROBES_MAX)
        .collect();
    write_probes(&mut text, &probes.iter().collect::<Vec<_>>());
    load(&text)?
        .run_tests(SOURCE, now)
        .map_err(SuggestError::Refused)?;
    Ok(text)
}

/// The names whose lookups alone a grant allows.
fn lookup_allowed(grant: &Grant) -> Option<&NamePattern> {
    match &grant.target {
        Target::Name {
            pattern,
            lookup_only: true,
            ..
        } if grant.action == GrantAction::Allow => Some(pattern),
        Target::Name { .. } | Target::Address { .. } | Target::Forward(_) => None,
    }
}

/// Names that may be looked up, by some VMs or by all, and no port of which is opened: what a rule or a list allows
/// to be looked up it opens as well, so that before it stands one that closes every port.
fn write_lookups(text: &mut String, grants: &[&Grant]) {
    let listed = |grants: &[&Grant]| {
        let patterns: BTreeSet<&NamePattern> = grants.iter().filter_map(|g| lookup_allowed(g)).collect();
        let names: Vec<String> = patterns.iter().map(|p| quoted(&p.to_string())).collect();
        names.join(", ")
    };
    if !grants.is_empty() {
        let _ = write!(
            text,
            "  - name: looked-up-only\n    action: deny\n    comment: only their lookups were allowed\n    domains: [{}]\n    ports: [\"1-65535\"]\n",
            listed(grants),
        );
    }
    let (for_all, for_some): (Vec<&Grant>, Vec<&Grant>) = grants.iter().partition(|grant| grant.vms.is_all());
    for grant in for_some {
        write_rule(text, grant);
    }
    text.push_str("dns:\n  defaultAction: deny\n");
    if !for_all.is_empty() {
        let _ = writeln!(text, "  allowedDomains: [{}]", listed(&for_all));
    }
}

fn write_rule(text: &mut String, grant: &Grant) {
    let _ = write!(
        text,
        "  - name: {}\n    action: {}\n    comment: {}\n",
        quoted(&format!("grant-{}", grant.id)),
        grant.action,
        quoted(&comment(grant)),
    );
    write_selector(text, &grant.vms);
    let ports = match &grant.target {
        Target::Address {
            protocol,
            prefix,
            ports,
        } => {
            let _ = writeln!(text, "    cidr: {}", quoted(&prefix.to_string()));
            if let Some(protocol) = protocol {
                let _ = writeln!(text, "    protocol: {protocol}");
            }
            ports
        }
        Target::Name { pattern, ports, .. } => {
            let _ = writeln!(text, "    domains: [{}]", quoted(&pattern.to_string()));
            ports
        }
        Target::Forward(forward) => {
            let _ = write!(
                text,
                "    protocol: {}\n    listen: {}\n    guestPorts: [{}]\n",
                forward.protocol(),
                quoted(&forward.listen().to_string()),
                forward.guest_port(),
            );
            &None
        }
    };
    if let Some(ports) = ports {
        let _ = writeln!(text, "    ports: [\"{}-{}\"]", ports.first(), ports.last());
    }
}

fn write_selector(text: &mut String, vms: &VmSelector) {
    if vms.is_all() {
        return;
    }
    let mut parts = Vec::new();
    if let Some(name) = vms.name() {
        parts.push(format!("name: {}", quoted(name)));
    }
    if !vms.labels().is_empty() {
        let label = |(key, value): (&String, &String)| format!("{}: {}", quoted(key), quoted(value));
        let labels: Vec<String> = vms.labels().iter().map(label).collect();
        parts.push(format!("labels: {{{}}}", labels.join(", ")));
    }
    let _ = writeln!(text, "    vm: {{{}}}", parts.join(", "));
}

/// Who answered, when, for how long and why, and how often it was used.
fn comment(grant: &Grant) -> String {
    let lifetime = match grant.lifetime {
        Lifetime::Once => "once".to_owned(),
        Lifetime::For(span) => format!("for {}", humantime::format_duration(span)),
        Lifetime::UntilVmStops => "until the VM stopped".to_owned(),
        Lifetime::Forever => "for ever".to_owned(),
    };
    let mut comment = format!(
        "{} by {} at {}, {lifetime}",
        if grant.action == GrantAction::Allow {
            "allowed"
        } else {
            "denied"
        },
        grant.creator,
        humantime::format_rfc3339_seconds(grant.created_at),
    );
    if grant.hits > 0 {
        let _ = write!(comment, ", used {} times", grant.hits);
    }
    let budget = budget(grant.budget);
    if !budget.is_empty() {
        let _ = write!(comment, ", for at most {budget}, which is not kept here");
    }
    if !grant.reason.is_empty() {
        let _ = write!(comment, ": {}", grant.reason);
    }
    comment
}

/// A budget in words; empty: none.
fn budget(budget: Budget) -> String {
    let limits = [
        (budget.connections, "connections"),
        (budget.bytes_up, "bytes up"),
        (budget.bytes_down, "bytes down"),
    ];
    let limits = limits.iter().filter(|(limit, _)| *limit != 0);
    let limits: Vec<String> = limits.map(|(limit, what)| format!("{limit} {what}")).collect();
    limits.join(", ")
}

/// What a grant must come to in the file, where that is one destination for one VM.
fn probe(grant: &Grant) -> Option<Probe> {
    let vm = match grant.vms.name() {
        Some(name) if !name.contains('*') && grant.vms.labels().is_empty() => Some(name.to_owned()),
        None if grant.vms.is_all() => None,
        _ => return None,
    };
    let expected = match grant.action {
        GrantAction::Allow => Outcome::Allow,
        GrantAction::Deny => Outcome::Deny,
    };
    let text = match &grant.target {
        Target::Address {
            protocol,
            prefix,
            ports,
        } if prefix.prefix_len() == prefix.max_prefix_len() => {
            let protocol = (*protocol).unwrap_or(vnet_proto::model::Protocol::Tcp);
            let address = prefix.addr();
            match ports {
                _ if !protocol.has_ports() => format!("{protocol} {address}"),
                Some(ports) if address.is_ipv6() => format!("{protocol} [{address}]:{}", ports.first()),
                Some(ports) => format!("{protocol} {address}:{}", ports.first()),
                None => return None,
            }
        }
        Target::Name {
            pattern: NamePattern::Exact(name),
            ports: Some(ports),
            lookup_only: false,
        } => {
            format!("tcp {name}:{}", ports.first())
        }
        Target::Name {
            pattern: NamePattern::Exact(name),
            ..
        } => format!("domain {name}"),
        Target::Address { .. } | Target::Name { .. } | Target::Forward(_) => return None,
    };
    Some(Probe { vm, text, expected })
}
