//! The policy file: from text with positions to a checked [`Policy`], or everything that is wrong with it.
//!
//! Strict by design: an unknown key, a value in the wrong case or an address with host bits set would
//! otherwise mean something else than its author thinks. Every problem is reported with its place, what
//! was found, what was expected and the remedy; a document with any problem changes nothing.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use vnet_proto::model::{Mode, NamePattern, PortRange, Protocol, Target, VmSelector, parse_prefix};

use crate::policy::effective::omitted_protocols;
use crate::policy::reader::{Fields, Reader};
use crate::policy::yaml::{self, Node, Value};
use crate::policy::{
    DefaultAction, DnsPolicy, FlowTest, NameSet, Policy, PolicyErrors, ProtocolSet, Rule, RuleAction, lint,
};

/// Bytes that a document may have.
pub const DOCUMENT_BYTES_MAX: usize = 4 << 20;

/// Rules that a document may have.
pub const RULES_MAX: usize = 10_000;

/// Entries that one list of a document may have.
pub const LIST_MAX: usize = 100_000;

/// How long a packet may be held at most.
pub const APPROVAL_TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// Characters of a rule's name or comment.
const TEXT_CHARS_MAX: usize = 200;

impl Policy {
    /// Reads a document. `source` is its file's path, for messages.
    ///
    /// # Errors
    /// Everything that is wrong with it, in order of position.
    pub fn parse(source: &str, document: &str) -> Result<Self, PolicyErrors> {
        let mut reader = Reader::new(source);
        if document.len() > DOCUMENT_BYTES_MAX {
            let found = document.len();
            reader.problem_at_start(format!(
                "the document is {found} bytes long (at most {DOCUMENT_BYTES_MAX}); split it by appliesTo"
            ));
            return Err(reader.into_errors());
        }
        let root = yaml::load(source, document).map_err(|problem| PolicyErrors(vec![problem]))?;
        let policy = read_policy(&mut reader, &root);
        if reader.has_problems() {
            return Err(reader.into_errors());
        }
        Ok(Policy {
            warnings: lint::warnings(&policy),
            ..policy
        })
    }
}

fn read_policy(reader: &mut Reader, root: &Node) -> Policy {
    const KEYS: &[&str] = &[
        "version",
        "appliesTo",
        "mode",
        "interactive",
        "blockAllOutbound",
        "defaultAction",
        "approvalTimeout",
        "rules",
        "dns",
    ];
    if matches!(root.value, Value::Null) || matches!(&root.value, Value::Map(entries) if entries.is_empty()) {
        reader.problem(
            root,
            "the document is empty (expected at least defaultAction: deny)".to_owned(),
        );
        return Policy::default();
    }
    let mut fields = reader.fields(root, "the document", KEYS);
    let versioned = fields.take("version").is_some_and(|node| {
        if !matches!(node.value, Value::Int(1)) {
            reader.problem(node, format!("version {} is not known (expected 1)", node.value));
        }
        true
    });
    let applies_to = fields
        .take("appliesTo")
        .and_then(|node| read_selector(reader, node, "appliesTo"));
    let mode = read_mode(reader, &mut fields);
    let default_action = fields
        .take("defaultAction")
        .and_then(|node| read_default(reader, node, "defaultAction"));
    let approval_timeout = fields
        .take("approvalTimeout")
        .and_then(|node| read_timeout(reader, node));
    let rules = fields
        .take("rules")
        .map(|node| read_rules(reader, node))
        .unwrap_or_default();
    let dns = fields.take("dns").map(|node| read_dns(reader, node));
    Policy {
        default_action,
        mode,
        rules,
        dns,
        approval_timeout,
        versioned,
        applies_to,
        warnings: Vec::new(),
    }
}

/// `mode`, and the drafts' `interactive` and `blockAllOutbound`, which must not contradict it.
fn read_mode(reader: &mut Reader, fields: &mut Fields<'_>) -> Option<Mode> {
    let mut said: Option<(&str, Mode)> = None;
    if let Some(node) = fields.take("mode") {
        let known = [Mode::Enforce, Mode::Ask, Mode::Observe, Mode::Block];
        if matches!(&node.value, Value::Text(text) if text == "quarantine") {
            let text =
                "mode quarantine is for one VM at a time; set it with: vnetctl vm mode NAME quarantine";
            reader.problem(node, text.to_owned());
        } else if let Some(mode) = reader.one_of(node, "mode", &known) {
            said = Some(("mode", mode));
        }
    }
    for (key, alias) in [("interactive", Mode::Ask), ("blockAllOutbound", Mode::Block)] {
        let Some(node) = fields.take(key) else { continue };
        let Some(set) = reader.boolean(node, key) else {
            continue;
        };
        match said {
            Some((other, mode)) if set != (mode == alias) => {
                let here = if set {
                    format!("is mode {alias}")
                } else {
                    format!("excludes mode {alias}")
                };
                let there = if other == "mode" {
                    format!("mode says {mode}")
                } else {
                    format!("{other} is true")
                };
                reader.problem(
                    node,
                    format!("{key}: {set} {here}, but {there}; keep one of the two"),
                );
            }
            None if set => said = Some((key, alias)),
            Some(_) | None => {}
        }
    }
    said.map(|(_, mode)| mode)
}

fn read_default(reader: &mut Reader, node: &Node, key: &str) -> Option<DefaultAction> {
    if matches!(&node.value, Value::Text(text) if text == "ask") {
        let text =
            format!("{key} cannot be ask; write mode: ask, which asks for what {key}: deny would deny");
        reader.problem(node, text);
        return None;
    }
    reader.one_of(node, key, &[DefaultAction::Allow, DefaultAction::Deny])
}

fn read_timeout(reader: &mut Reader, node: &Node) -> Option<Duration> {
    let parsed = match &node.value {
        Value::Int(seconds) => u64::try_from(*seconds).ok().map(Duration::from_secs),
        Value::Text(text) => parse_duration(text),
        _ => None,
    };
    let fitting = parsed.filter(|timeout| *timeout <= APPROVAL_TIMEOUT_MAX);
    if fitting.is_none() {
        let most = APPROVAL_TIMEOUT_MAX.as_secs();
        reader.problem(
            node,
            format!(
                "approvalTimeout {} is not a time (expected seconds, 0 to {most}, or one as \"30s\")",
                node.value
            ),
        );
    }
    fitting
}

/// `30s`, `500ms`, `2m`, `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

fn read_dns(reader: &mut Reader, node: &Node) -> DnsPolicy {
    let mut fields = reader.fields(
        node,
        "dns",
        &["defaultAction", "allowedDomains", "blockedDomains"],
    );
    let default_action = fields
        .take("defaultAction")
        .and_then(|node| read_default(reader, node, "dns.defaultAction"));
    let mut names = |key: &str| -> Arc<NameSet> {
        // An empty list is a list of nothing, and means that.
        let nodes = fields
            .take(key)
            .map(|node| reader.list(node, key, LIST_MAX))
            .unwrap_or_default();
        Arc::new(
            nodes
                .iter()
                .filter_map(|node| read_name(reader, node, key))
                .collect(),
        )
    };
    let allowed = names("allowedDomains");
    let blocked = names("blockedDomains");
    DnsPolicy {
        default_action,
        allowed,
        blocked,
    }
}

fn read_rules(reader: &mut Reader, node: &Node) -> Vec<Arc<Rule>> {
    let mut first_of: HashMap<String, u32> = HashMap::new();
    let mut rules = Vec::new();
    for (index, node) in reader.list(node, "rules", RULES_MAX).iter().enumerate() {
        let Some(rule) = read_rule(reader, node, index) else {
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

fn read_rule(reader: &mut Reader, node: &Node, index: usize) -> Option<Rule> {
    const KEYS: &[&str] = &[
        "name", "action", "cidr", "cidrs", "ports", "protocol", "domains", "vm", "comment",
    ];
    let what = format!("rules[{index}]");
    let mut fields = reader.fields(node, &what, KEYS);
    if !fields.are_a_mapping() {
        return None;
    }
    let label = fields
        .take("name")
        .and_then(|node| read_text(reader, node, "name"));
    let comment = fields
        .take("comment")
        .and_then(|node| read_text(reader, node, "comment"));
    let action = match fields.take("action") {
        Some(node) => reader.one_of(node, "action", &RuleAction::ALL),
        None => {
            reader.problem(
                node,
                format!("{what} has no action (expected allow, deny, drop or ask)"),
            );
            None
        }
    };
    let prefixes = read_prefixes(reader, &mut fields);
    let protocols = fields
        .take("protocol")
        .map(|node| (node, read_protocols(reader, node)));
    let ports = fields.take("ports").map(|node| (node, read_ports(reader, node)));
    let names = fields.take("domains").map(|node| {
        let nodes = reader.list_of_some(node, "domains", LIST_MAX);
        nodes
            .iter()
            .filter_map(|node| read_name(reader, node, "domains"))
            .collect::<NameSet>()
    });
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
            let family = |net: &IpNet| if net.addr().is_ipv4() { 4 } else { 6 };
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
            names: names.map(Arc::new),
        },
        lookup_only: false,
        vms,
        comment: comment.unwrap_or_default(),
        line: node.place.line,
        column: node.place.column,
    })
}

fn read_text(reader: &mut Reader, node: &Node, key: &str) -> Option<String> {
    let text = reader.text(node, key)?;
    let length = text.chars().count();
    // It is shown in terminals and stands in one-line reasons.
    let printable = !text.chars().any(|c| c.is_control() || is_bidi_control(c));
    if length == 0 || length > TEXT_CHARS_MAX || !printable {
        let expected = format!("(expected 1 to {TEXT_CHARS_MAX} printable characters on one line)");
        reader.problem(node, format!("{key} {} cannot be shown {expected}", node.value));
        return None;
    }
    if key == "name" && text.starts_with("rules[") {
        reader.problem(
            node,
            format!("name {text:?} is what nameless rules go by; choose another"),
        );
        return None;
    }
    Some(text.to_owned())
}

/// Characters that turn the direction of what follows them, and so can make text look like another.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn read_prefixes(reader: &mut Reader, fields: &mut Fields<'_>) -> Vec<IpNet> {
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
    nodes
        .into_iter()
        .filter_map(|node| read_prefix(reader, node))
        .collect()
}

fn read_prefix(reader: &mut Reader, node: &Node) -> Option<IpNet> {
    let text = reader.text(node, "cidr")?;
    parse_prefix(text)
        .map_err(|error| reader.problem(node, format!("cidr: {error}")))
        .ok()
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

fn read_ports(reader: &mut Reader, node: &Node) -> Vec<PortRange> {
    let mut ports = Vec::new();
    for node in reader.list_of_some(node, "ports", LIST_MAX) {
        let parsed = match &node.value {
            Value::Int(port) => PortRange::from_str(&port.to_string()),
            Value::Text(text) if text != "*" => PortRange::from_str(text),
            other => Err(format!(
                "{other} is not a port (expected one as 443 or a range as \"8000-8999\")"
            )),
        };
        match parsed {
            Ok(range) => ports.push(range),
            Err(text) => reader.problem(node, format!("ports: {text}")),
        }
    }
    ports
}

fn read_name(reader: &mut Reader, node: &Node, key: &str) -> Option<NamePattern> {
    let text = reader.text(node, key)?;
    let found = NamePattern::from_str(text);
    if found.is_err() && (text.contains("://") || text.contains(':')) {
        let expected = "(expected a name alone, as example.com; ports go in ports)";
        reader.problem(
            node,
            format!("{key}: {} is more than a name {expected}", node.value),
        );
        return None;
    }
    found
        .map_err(|error| reader.problem(node, format!("{key}: {error}")))
        .ok()
}

fn read_selector(reader: &mut Reader, node: &Node, key: &str) -> Option<VmSelector> {
    let before = reader.problem_count();
    let mut fields = reader.fields(node, key, &["name", "labels"]);
    if !fields.are_a_mapping() {
        return None;
    }
    let name = fields
        .take("name")
        .and_then(|node| reader.text(node, "name").map(|text| (node, text)));
    if let Some((node, "")) = name {
        reader.problem(
            node,
            format!("{key}.name is empty (expected a VM's name, or a pattern as agent-*)"),
        );
    }
    let labels = match fields.take("labels") {
        Some(node) => reader.text_map(node, &format!("{key}.labels")),
        None => Default::default(),
    };
    let selector = VmSelector::new(name.map(|(_, name)| name.to_owned()), labels);
    if selector.is_none() && reader.problem_count() == before {
        let text = format!("{key} selects by neither name nor labels; leave {key} out, or write name: \"*\"");
        reader.problem(node, text);
    }
    selector
}

/// The rule that an inline rule's target stands for.
pub(crate) fn rule_of_target(action: RuleAction, target: &Target) -> Rule {
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
                    prefixes: vec![*prefix],
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
                    prefixes: Vec::new(),
                    ports,
                    names,
                },
                *lookup_only,
            )
        }
    };
    Rule {
        label: format!("--{action} {target}"),
        action,
        test,
        lookup_only,
        vms: None,
        comment: String::new(),
        line: 0,
        column: 0,
    }
}
