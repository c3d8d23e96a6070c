//! From people's answers to a file: what was granted for a while becomes a rule.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use vnet_proto::model::{NamePattern, Target, VmSelector};

use super::plan::Probe;
use super::render::{quoted, write_probes};
use super::{SOURCE, SuggestError, load, passes};
use crate::clock::Now;
use crate::grant::{Grant, GrantAction, Lifetime};
use crate::policy::{Outcome, RULES_MAX};

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
    // One more is for names that are only looked up.
    if found >= RULES_MAX {
        return Err(SuggestError::TooMany { found });
    }
    let mut text = String::from(
        "# Suggested by vnetctl policy suggest --from-grants: what people answered, for good.\n# Read it before you apply it: an answer for an hour is a rule for ever here.\nversion: 1\ndefaultAction: deny\nrules:\n",
    );
    let mut lookups: Vec<&NamePattern> = Vec::new();
    for grant in denying.into_iter().chain(allowing.iter().copied()) {
        match &grant.target {
            Target::Name {
                pattern,
                lookup_only: true,
                ..
            } if grant.action == GrantAction::Allow => {
                lookups.push(pattern);
            }
            _ => write_rule(&mut text, grant),
        }
    }
    if !lookups.is_empty() {
        lookups.sort();
        lookups.dedup();
        let names: Vec<String> = lookups
            .iter()
            .map(|pattern| quoted(&pattern.to_string()))
            .collect();
        let names = names.join(", ");
        let _ = write!(
            text,
            "  - name: looked-up-only\n    action: deny\n    comment: only their lookups were allowed\n    domains: [{names}]\n    ports: [\"1-65535\"]\ndns:\n  defaultAction: deny\n  allowedDomains: [{names}]\n",
        );
    } else {
        text.push_str("dns:\n  defaultAction: deny\n");
    }
    let without = load(&text)?;
    let probes = grants.iter().filter_map(probe);
    let probes: Vec<Probe> = probes.filter(|probe| passes(&without, probe, now)).collect();
    let mut distinct: Vec<&Probe> = Vec::new();
    for probe in &probes {
        if distinct.len() < crate::policy::PROBES_MAX && !distinct.contains(&probe) {
            distinct.push(probe);
        }
    }
    write_probes(&mut text, &distinct);
    load(&text)?
        .run_tests(SOURCE, now)
        .map_err(SuggestError::Refused)?;
    Ok(text)
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
    if !grant.reason.is_empty() {
        let _ = write!(comment, ": {}", grant.reason);
    }
    comment
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
        Target::Address { .. } | Target::Name { .. } => return None,
    };
    Some(Probe { vm, text, expected })
}
