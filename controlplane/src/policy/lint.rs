//! What a reader of a policy should know of it although it loads: rules that earlier ones leave
//! nothing to, ways out that are easily overlooked.

use crate::policy::{DefaultAction, FlowTest, NameSet, Policy, PolicyWarning, Rule, RuleAction};
use vnet_proto::model::{Mode, NamePattern};

/// Warnings of one document.
const WARNINGS_MAX: usize = 100;

/// Rules that are compared with each other; more would take longer than a load may.
const COMPARED_MAX: usize = 1_000;

/// All warnings, in order of position.
pub(crate) fn warnings(policy: &Policy) -> Vec<PolicyWarning> {
    let mut warnings = Vec::new();
    let closed = policy.default_action != Some(DefaultAction::Allow) || policy.mode == Some(Mode::Ask);
    let at_start = |text: &str| PolicyWarning {
        line: 1,
        column: 1,
        text: text.to_owned(),
    };

    if policy.leaves_lookups_open() && closed && policy.mode != Some(Mode::Ask) {
        warnings.push(at_start(
            "lookups stay open, since there is neither dns: nor version:, and DNS is an open channel: names \
             carry data out; add dns: with defaultAction: deny, or version: 1",
        ));
    }
    let lookups = policy.dns.as_ref().and_then(|dns| dns.default_action);
    if lookups == Some(DefaultAction::Allow) && closed {
        warnings.push(at_start(
            "dns.defaultAction: allow leaves lookups open while addresses are closed, and DNS is an open \
             channel: names carry data out",
        ));
    }
    if policy.mode == Some(Mode::Ask) && policy.default_action == Some(DefaultAction::Allow) {
        warnings.push(at_start(
            "defaultAction: allow has no effect in mode ask, which asks all the same",
        ));
    }
    if let Some(dns) = &policy.dns {
        for pattern in dns
            .allowed
            .patterns()
            .filter(|pattern| dns.blocked.covers(pattern))
        {
            warnings.push(at_start(&format!(
                "dns.allowedDomains has {pattern}, which dns.blockedDomains refuses all the same"
            )));
        }
        for pattern in suffixes(&dns.allowed) {
            warnings.push(at_start(&format!(
                "dns.allowedDomains has {pattern}, and {} is a public suffix: anyone may own a name below it",
                pattern.name()
            )));
        }
    }

    for (index, rule) in policy.rules.iter().enumerate() {
        let mut warn = |text: String| {
            warnings.push(PolicyWarning {
                line: rule.line,
                column: rule.column,
                text,
            });
        };
        if rule.action == RuleAction::Allow {
            let names = rule.test.names.iter().flat_map(|names| suffixes(names));
            for pattern in names {
                let suffix = pattern.name();
                warn(format!(
                    "{}: {suffix} is a public suffix: anyone may own a name below it",
                    rule.label
                ));
            }
            if rule.test.prefixes.is_empty() && rule.test.names.is_none() && rule.test.ports.is_empty() {
                warn(format!("{} allows every destination", rule.label));
            }
        }
        if index < COMPARED_MAX {
            let earlier = policy.rules.iter().take(index);
            if let Some(text) = earlier.rev().find_map(|earlier| shadow(earlier, rule)) {
                warn(text);
            }
        }
        if warnings.len() >= WARNINGS_MAX {
            break;
        }
    }
    warnings.truncate(WARNINGS_MAX);
    warnings.sort_by_key(|warning| (warning.line, warning.column));
    warnings
}

fn suffixes(names: &NameSet) -> impl Iterator<Item = NamePattern> {
    names.patterns().filter(|pattern| {
        matches!(pattern, NamePattern::Subdomains(name)
            if psl::suffix_str(name.as_str()) == Some(name.as_str()) && is_listed(name.as_str()))
    })
}

/// Unlisted top-level names count as suffixes by the list's default rule; many are private.
fn is_listed(name: &str) -> bool {
    psl::suffix(name.as_bytes()).is_some_and(|suffix| suffix.is_known())
}

/// What is left of `rule` by `earlier`, if that is worth telling.
fn shadow(earlier: &Rule, rule: &Rule) -> Option<String> {
    if earlier.vms.is_some() && earlier.vms != rule.vms {
        return None;
    }
    let names_cover = match (&earlier.test.names, &rule.test.names) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(outer), Some(inner)) => inner.patterns().all(|pattern| outer.covers(&pattern)),
    };
    let place = format!("{} (line {})", earlier.label, earlier.line);
    // A guarded destination passes an allow or ask by, so that only a rule that refuses covers all of it.
    if names_cover && earlier.test.covers_but_for_names(&rule.test) {
        let guarded = !earlier.action.refuses() && rule.action != earlier.action;
        let but = if guarded { " but guarded destinations" } else { "" };
        return Some(format!(
            "{} can never match{but}: {place} matches all of it before",
            rule.label
        ));
    }
    let allowed_first = rule.action.refuses()
        && !earlier.action.refuses()
        && earlier.test.names.is_none()
        && lies_strictly_inside(&rule.test, &earlier.test)
        && overlap_otherwise(&rule.test, &earlier.test);
    allowed_first.then(|| {
        let all: Vec<String> = rule.test.prefixes.iter().map(ToString::to_string).collect();
        let which = summary(&earlier.test);
        let does = if earlier.action == RuleAction::Ask {
            "asks for"
        } else {
            "allows"
        };
        format!(
            "{} does not {} {which} to {}: {place} {does} that before; put {} first if it should",
            rule.label,
            rule.action,
            all.join(", "),
            rule.label,
        )
    })
}

/// Whether the destinations of `inner` are a smaller part of those of `outer`: an exception that comes
/// too late. The other way round, or among equals, the earlier rule is the exception, as meant.
fn lies_strictly_inside(inner: &FlowTest, outer: &FlowTest) -> bool {
    !inner.prefixes.is_empty()
        && inner.prefixes.iter().all(|prefix| {
            outer.prefixes.is_empty() || outer.prefixes.iter().any(|o| o.contains(prefix) && o != prefix)
        })
}

fn overlap_otherwise(a: &FlowTest, b: &FlowTest) -> bool {
    let ports = a.ports.is_empty()
        || b.ports.is_empty()
        || a.ports.iter().any(|x| {
            b.ports
                .iter()
                .any(|y| x.first() <= y.last() && y.first() <= x.last())
        });
    ports && !a.protocols.and(b.protocols).is_empty()
}

fn summary(test: &FlowTest) -> String {
    let protocols: Vec<String> = vnet_proto::model::Protocol::ALL
        .into_iter()
        .filter(|p| test.protocols.contains(*p))
        .map(|p| p.to_string())
        .collect();
    let ports: Vec<String> = test.ports.iter().map(ToString::to_string).collect();
    let ports = if ports.is_empty() {
        String::new()
    } else {
        format!(" {}", ports.join(", "))
    };
    format!("{}{ports}", protocols.join("/"))
}
