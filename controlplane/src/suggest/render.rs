//! From a plan to the file's text.

use std::fmt::Write as _;

use super::plan::{Places, Plan, PlannedRule, Probe};
use crate::policy::Outcome;
use crate::replay::Recorded;

/// Characters of a comment that a file takes.
const TEXT_CHARS_MAX: usize = 200;

/// What is said first, of a history.
pub(super) fn header(history: &[Recorded]) -> String {
    let times = history.iter().map(|recorded| recorded.at);
    let (Some(first), Some(last)) = (times.clone().min(), times.max()) else {
        return String::new();
    };
    let vms: std::collections::BTreeSet<&str> = history
        .iter()
        .map(|recorded| recorded.vm.view.name.as_str())
        .collect();
    let shown: Vec<&str> = vms.iter().copied().take(5).collect();
    let more = match vms.len().saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "# Suggested by vnetctl policy suggest, of what {}{more} did from {} to {}.\n# Read it before you apply it: it allows whatever happened in that time.\n",
        shown.join(", "),
        humantime::format_rfc3339_seconds(first),
        humantime::format_rfc3339_seconds(last),
    )
}

/// The document.
pub(super) fn document(plan: &Plan, header: &str, probes: &[&Probe]) -> String {
    let mut text = String::from(header);
    text.push_str("version: 1\n");
    if plan.asks {
        text.push_str("mode: ask\n");
    }
    text.push_str("defaultAction: deny\n");
    if !plan.rules.is_empty() {
        text.push_str("rules:\n");
    }
    for rule in &plan.rules {
        write_rule(&mut text, rule);
    }
    text.push_str("dns:\n  defaultAction: deny\n");
    if plan.synthetic {
        text.push_str("  answer: synthetic\n");
    }
    if !plan.lookups.is_empty() {
        text.push_str("  allowedDomains:\n");
        write_places(&mut text, "    ", &plan.lookups);
    }
    write_probes(&mut text, probes);
    text
}

fn write_rule(text: &mut String, rule: &PlannedRule) {
    let _ = write!(
        text,
        "  - name: {}\n    action: {}\n",
        quoted(&rule.name),
        rule.action
    );
    if !rule.comment.is_empty() {
        let _ = writeln!(text, "    comment: {}", quoted(&rule.comment));
    }
    if let Some(vm) = &rule.vm {
        let _ = writeln!(text, "    vm: {{name: {}}}", quoted(vm));
    }
    let (key, places) = match &rule.places {
        Places::Names(places) => ("domains", places),
        Places::Addresses(places) => ("cidrs", places),
    };
    let _ = writeln!(text, "    {key}:");
    write_places(text, "      ", places);
    if !rule.ports.is_empty() {
        let port = |(first, last): &(u16, u16)| {
            if first == last {
                first.to_string()
            } else {
                format!("\"{first}-{last}\"")
            }
        };
        let ports: Vec<String> = rule.ports.iter().map(port).collect();
        let _ = writeln!(text, "    ports: [{}]", ports.join(", "));
    }
    if let Some(protocol) = rule.protocol {
        let _ = writeln!(text, "    protocol: {protocol}");
    }
}

fn write_places(text: &mut String, indent: &str, places: &[(String, String)]) {
    for (place, word) in places {
        let _ = writeln!(text, "{indent}- {}  # {word}", quoted(place));
    }
}

pub(super) fn write_probes(text: &mut String, probes: &[&Probe]) {
    if probes.is_empty() {
        return;
    }
    text.push_str("tests:\n");
    let mut vms: Vec<&Option<String>> = probes.iter().map(|probe| &probe.vm).collect();
    vms.sort();
    vms.dedup();
    for vm in vms {
        let mut lead = "  - ";
        if let Some(vm) = vm {
            let _ = writeln!(text, "{lead}vm: {{name: {}}}", quoted(vm));
            lead = "    ";
        }
        for (key, expected) in [
            ("allow", Outcome::Allow),
            ("ask", Outcome::Ask),
            ("deny", Outcome::Deny),
        ] {
            let theirs: Vec<&&Probe> = probes
                .iter()
                .filter(|probe| probe.vm == *vm && probe.expected == expected)
                .collect();
            if theirs.is_empty() {
                continue;
            }
            let _ = writeln!(text, "{lead}{key}:");
            lead = "    ";
            for probe in theirs {
                let _ = writeln!(text, "      - {}", quoted(&probe.text));
            }
        }
    }
}

/// Text as a YAML scalar on one line (a JSON string is one), without what a policy does not take: characters
/// that a terminal does not show, and more of them than it holds.
pub(super) fn quoted(text: &str) -> String {
    let shown: String = text
        .chars()
        .map(|c| if crate::policy::is_unprintable(c) { ' ' } else { c })
        .take(TEXT_CHARS_MAX)
        .collect();
    serde_json::Value::String(shown).to_string()
}
