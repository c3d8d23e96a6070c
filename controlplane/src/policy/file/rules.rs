//! `rules`: from the file's nodes to [`Rule`]s, and inline rules from their targets.

use std::collections::HashMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use vnet_proto::model::{NameDemand, PortRange, Protocol, Target};

use super::sets::Sets;
use super::{LIST_MAX, RULES_MAX, read_selector, read_text};
use crate::policy::effective::omitted_protocols;
use crate::policy::keys;
use crate::policy::patterns::{self, NamePatterns, PATTERNS_MAX};
use crate::policy::reader::{Fields, Reader, choices};
use crate::policy::yaml::{Node, Value};
use crate::policy::{FlowTest, NameSet, PolicyWarning, PortSet, PrefixSet, ProtocolSet, Rule, RuleAction};

pub(super) fn read_rules(reader: &mut Reader, node: &Node, sets: &mut Sets) -> Vec<Arc<Rule>> {
    let mut first_of: HashMap<String, u32> = HashMap::new();
    let mut rules = Vec::new();
    for (index, node) in reader.list(node, "rules", RULES_MAX).iter().enumerate() {
        let Some(rule) = read_rule(reader, node, index, sets) else {
            continue;
        };
        if let Some(line) = first_of.insert(rule.label.clone(), rule.line) {
            let text = format!(
                "rule name {:?} is taken by the rule in line {line}; names are unique",
                rule.label
            );
            reader.problem(node, text);
        }
        rules.push(Arc::new(rule));
    }
    rules
}

/// `outboundAllow` of gvproxy's draft: names by regular expressions, at which TLS on port 443 is allowed. They
/// stand after the rules. Also what is worth telling of them.
pub(super) fn read_outbound(reader: &mut Reader, node: &Node) -> (Option<Arc<Rule>>, Vec<PolicyWarning>) {
    let mut warnings = Vec::new();
    let mut patterns = Vec::new();
    for node in reader.list(node, "outboundAllow", PATTERNS_MAX) {
        let Some(text) = reader.text(node, "outboundAllow") else {
            continue;
        };
        if let Err(problem) = patterns::check(text) {
            let text = format!(
                "outboundAllow: {} is not an expression that can be used: {problem}",
                node.value
            );
            reader.problem(node, text);
            continue;
        }
        if !patterns::is_anchored(text) {
            warnings.push(PolicyWarning {
                line: node.place.line,
                column: node.place.column,
                text: format!(
                    "outboundAllow: {} is not one whole expression between ^ and $, so that it may match names \
                     that only contain what is meant, as example.com.evil.test",
                    node.value
                ),
            });
        }
        patterns.push(text.to_owned());
    }
    if patterns.is_empty() {
        return (None, warnings);
    }
    let names = match NamePatterns::new(&patterns) {
        Ok(names) => NameSet::of_expressions(Arc::new(names)),
        Err(problem) => {
            reader.problem(node, format!("outboundAllow: {problem}"));
            return (None, warnings);
        }
    };
    let rule = Rule {
        label: "outboundAllow".to_owned(),
        action: RuleAction::Allow,
        test: FlowTest {
            protocols: ProtocolSet::one(Protocol::Tcp),
            prefixes: PrefixSet::default(),
            ports: [PortRange::one(443)].into_iter().collect(),
            names: Some(Arc::new(names)),
        },
        lookup_only: false,
        demand: Some(NameDemand::Require),
        until: None,
        vms: None,
        comment: String::new(),
        line: node.place.line,
        column: node.place.column,
    };
    (Some(Arc::new(rule)), warnings)
}

/// What a rule of `rules` and one of `forwards` begin with.
pub(super) struct Head<A> {
    pub(super) label: Option<String>,
    pub(super) comment: Option<String>,
    pub(super) action: Option<A>,
}

/// Reads it; a rule without an action is a problem.
pub(super) fn read_head<A: Copy + Display>(
    reader: &mut Reader,
    fields: &mut Fields<'_>,
    node: &Node,
    what: &str,
    actions: &[A],
) -> Head<A> {
    let label = fields
        .take("name")
        .and_then(|node| read_text(reader, node, "name"));
    let comment = fields
        .take("comment")
        .and_then(|node| read_text(reader, node, "comment"));
    let action = match fields.take("action") {
        Some(node) => reader.one_of(node, "action", actions),
        None => {
            let words: Vec<String> = actions.iter().map(ToString::to_string).collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            reader.problem(
                node,
                format!("{what} has no action (expected {})", choices(&words)),
            );
            None
        }
    };
    Head {
        label,
        comment,
        action,
    }
}

fn read_rule(reader: &mut Reader, node: &Node, index: usize, sets: &mut Sets) -> Option<Rule> {
    let what = format!("rules[{index}]");
    let mut fields = reader.fields(node, &what, &keys::RULE);
    if !fields.are_a_mapping() {
        return None;
    }
    let Head {
        label,
        comment,
        action,
    } = read_head(reader, &mut fields, node, &what, &RuleAction::ALL);
    let prefixes = read_prefixes(reader, &mut fields, sets);
    let protocols = fields
        .take("protocol")
        .map(|node| (node, read_protocols(reader, node)));
    let ports = fields
        .take("ports")
        .map(|node| (node, read_ports(reader, node, "ports")));
    let names = fields.take("domains").map(|node| {
        let nodes = reader.list_of_some(node, "domains", LIST_MAX);
        (node, sets.names(reader, nodes, "domains"))
    });
    let sni = fields.take("sni").map(|node| (node, read_demand(reader, node)));
    let until = fields.take("until").and_then(|node| read_until(reader, node));
    let vms = fields
        .take("vm")
        .and_then(|node| read_selector(reader, node, "vm"));

    let ported = ports.is_some();
    let said = protocols.as_ref().map(|(_, set)| *set);
    if let (Some((node, _)), Some(set)) = (&ports, said)
        && set != ProtocolSet::ALL
        && !ProtocolSet::TCP_UDP.has_all(set)
    {
        reader.problem(
            node,
            "icmp has no ports; give it a rule of its own, without ports".to_owned(),
        );
    }
    if let (Some((node, set)), false) = (&protocols, prefixes.is_empty()) {
        for (protocol, fits) in [(Protocol::Icmp, 4), (Protocol::Icmpv6, 6)] {
            let family = |net: IpNet| if net.addr().is_ipv4() { 4 } else { 6 };
            if *set == ProtocolSet::one(protocol) && !prefixes.iter().any(|net| family(net) == fits) {
                let other = if fits == 4 {
                    Protocol::Icmpv6
                } else {
                    Protocol::Icmp
                };
                let text = format!("{protocol} never has such an address (did you mean {other}?)");
                reader.problem(node, text);
            }
        }
    }
    if let (Some((node, _)), None) = (&sni, &names) {
        let text = "sni is about the names in domains, and this rule has none; leave sni out".to_owned();
        reader.problem(node, text);
    }
    if let (Some((node, _)), Some(action)) = (&sni, action.filter(|action| action.refuses())) {
        let text =
            format!("sni says when a name lets through, and this rule is one to {action}; leave sni out");
        reader.problem(node, text);
    }
    let action = action?;
    let protocols = match (said, ported) {
        (Some(set), false) => set,
        // Only these have ports.
        (Some(set), true) => set.and(ProtocolSet::TCP_UDP),
        (None, true) => ProtocolSet::TCP_UDP,
        (None, false) => omitted_protocols(action),
    };
    Some(Rule {
        label: label.unwrap_or(what),
        action,
        test: FlowTest {
            protocols,
            prefixes,
            ports: ports.map(|(_, ports)| ports).unwrap_or_default(),
            names: names.map(|(_, names)| Arc::new(names)),
        },
        lookup_only: false,
        demand: sni.and_then(|(_, demand)| demand),
        until,
        vms,
        comment: comment.unwrap_or_default(),
        line: node.place.line,
        column: node.place.column,
    })
}

fn read_prefixes(reader: &mut Reader, fields: &mut Fields<'_>, sets: &mut Sets) -> PrefixSet {
    let one = fields.take("cidr");
    let many = fields.take("cidrs");
    if let (Some(_), Some(node)) = (one, many) {
        reader.problem(
            node,
            "cidr and cidrs are both given; put all of them in cidrs".to_owned(),
        );
    }
    let mut nodes: Vec<&Node> = one.into_iter().collect();
    if let Some(node) = many {
        nodes.extend(reader.list_of_some(node, "cidrs", LIST_MAX));
    }
    sets.prefixes(reader, nodes)
}

fn read_protocols(reader: &mut Reader, node: &Node) -> ProtocolSet {
    let mut set = Vec::new();
    for node in reader.list_of_some(node, "protocol", LIST_MAX) {
        if matches!(&node.value, Value::Text(text) if text == "any") {
            set.extend(Protocol::ALL);
        } else if let Some(protocol) = reader.one_of(node, "protocol", &Protocol::ALL) {
            set.push(protocol);
        }
    }
    set.into_iter().collect()
}

pub(super) fn read_ports(reader: &mut Reader, node: &Node, key: &str) -> PortSet {
    let mut ports = Vec::new();
    for node in reader.list_of_some(node, key, LIST_MAX) {
        let parsed = match &node.value {
            Value::Int(port) => u16::try_from(*port)
                .ok()
                .filter(|port| *port != 0)
                .map(PortRange::one)
                .ok_or_else(|| format!("port {port} is out of range (expected 1 to 65535)")),
            Value::Text(text) if text != "*" && !has_leading_zero(text) => PortRange::from_str(text),
            other => Err(format!(
                "{other} is not a port (expected one as 443 or a range as \"8000-8999\")"
            )),
        };
        match parsed {
            Ok(range) => ports.push(range),
            Err(text) => reader.problem(node, format!("{key}: {text}")),
        }
    }
    ports.into_iter().collect()
}

/// Whether a port is written as an octal number would be.
pub(super) fn has_leading_zero(range: &str) -> bool {
    range
        .split('-')
        .any(|port| port.len() > 1 && port.starts_with('0'))
}

fn read_demand(reader: &mut Reader, node: &Node) -> Option<NameDemand> {
    // YAML's own word for false, as some parsers have it, is this one.
    if matches!(node.value, Value::Bool(false)) {
        return Some(NameDemand::Off);
    }
    reader.one_of(node, "sni", &NameDemand::WRITTEN)
}

fn read_until(reader: &mut Reader, node: &Node) -> Option<SystemTime> {
    let expected = "(expected a moment in UTC, as 2026-12-31T00:00:00Z)";
    let parsed = match &node.value {
        Value::Text(text) => humantime::parse_rfc3339(text).ok(),
        _ => None,
    };
    if parsed.is_none() {
        reader.problem(node, format!("until {} is not a moment {expected}", node.value));
    }
    parsed
}

/// The rule that an inline rule's target stands for; `None` for a forward, which no rule of `rules:` is about.
pub(crate) fn rule_of_target(action: RuleAction, target: &Target) -> Option<Rule> {
    let unset = |ports: bool| {
        if ports {
            ProtocolSet::TCP_UDP
        } else {
            omitted_protocols(action)
        }
    };
    let (test, lookup_only) = match target {
        Target::Address {
            protocol,
            prefix,
            ports,
        } => {
            let protocols = protocol.map_or_else(|| unset(ports.is_some()), ProtocolSet::one);
            let ports = ports.iter().copied().collect();
            (
                FlowTest {
                    protocols,
                    prefixes: PrefixSet::from_iter([*prefix]),
                    ports,
                    names: None,
                },
                false,
            )
        }
        Target::Name {
            pattern,
            ports,
            lookup_only,
        } => {
            let names = Some(Arc::new(NameSet::from_iter([pattern.clone()])));
            let protocols = unset(ports.is_some());
            let ports = ports.iter().copied().collect();
            (
                FlowTest {
                    protocols,
                    prefixes: PrefixSet::default(),
                    ports,
                    names,
                },
                *lookup_only,
            )
        }
        Target::Forward(_) => return None,
    };
    Some(Rule {
        label: format!("--{action} {target}"),
        action,
        test,
        lookup_only,
        demand: None,
        until: None,
        vms: None,
        comment: String::new(),
        line: 0,
        column: 0,
    })
}
