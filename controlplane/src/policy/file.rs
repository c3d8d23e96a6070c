//! The policy file: from text with positions to a checked [`Policy`], or everything that is wrong with it.
//!
//! Strict by design: an unknown key, a value in the wrong case or an address with host bits set would
//! otherwise mean something else than its author thinks. Every problem is reported with its place, what
//! was found, what was expected and the remedy; a document with any problem changes nothing.

mod forwards;
mod rules;
mod sets;
mod settings;
mod tests;

use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{Mode, VmSelector};

use crate::policy::keys::{self, DEFAULT_ACTIONS, DNS_ANSWERS, MODES};
use crate::policy::list::{Attachments, ListCache};
use crate::policy::reader::{Fields, Reader};
use crate::policy::resolvers::Resolvers;
use crate::policy::yaml::{self, Node, Value};
use crate::policy::{DefaultAction, DnsPolicy, NameGuards, Policy, PolicyErrors, RuleList, Settings, lint};

pub(crate) use forwards::FORWARD_PROTOCOLS;
pub(crate) use rules::rule_of_target;
use sets::Sets;
pub use sets::list_paths;

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
        Self::parse_with(source, document, &Attachments::default(), &ListCache::default())
    }

    /// Reads a document and the lists that came along with it.
    ///
    /// # Errors
    /// Everything that is wrong with the document, in order of position, then with its lists.
    pub fn parse_with(
        source: &str,
        document: &str,
        lists: &Attachments,
        cache: &ListCache,
    ) -> Result<Self, PolicyErrors> {
        let mut reader = Reader::new(source);
        if document.len() > DOCUMENT_BYTES_MAX {
            let found = document.len();
            reader.problem_at_start(format!(
                "the document is {found} bytes long (at most {DOCUMENT_BYTES_MAX}); split it by appliesTo"
            ));
            return Err(reader.into_errors());
        }
        let root = yaml::load(source, document).map_err(|problem| PolicyErrors(vec![problem]))?;
        let policy = read_policy(&mut reader, &root, lists, cache);
        if reader.has_problems() {
            return Err(reader.into_errors());
        }
        let warnings = lint::warnings(&policy);
        Ok(Policy { warnings, ..policy })
    }
}

fn read_policy(reader: &mut Reader, root: &Node, lists: &Attachments, cache: &ListCache) -> Policy {
    if matches!(root.value, Value::Null) || matches!(&root.value, Value::Map(entries) if entries.is_empty()) {
        reader.problem(
            root,
            "the document is empty (expected at least defaultAction: deny)".to_owned(),
        );
        return Policy::default();
    }
    let mut fields = reader.fields(root, "the document", &keys::DOCUMENT);
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
    let mut sets = match fields.take("sets") {
        Some(node) => Sets::read(reader, node, lists, cache),
        None => Sets::default(),
    };
    let mut rules = fields
        .take("rules")
        .map(|node| rules::read_rules(reader, node, &mut sets))
        .unwrap_or_default();
    let forwards = fields
        .take("forwards")
        .map(|node| forwards::read_forwards(reader, node))
        .unwrap_or_default();
    let (outbound, mut warnings) = match fields.take("outboundAllow") {
        Some(node) => rules::read_outbound(reader, node),
        None => Default::default(),
    };
    rules.extend(outbound);
    let mut said = Settings::default();
    let dns = fields
        .take("dns")
        .map(|node| read_dns(reader, node, &mut sets, &mut said));
    let (resolvers, name_guards) = match fields.take("guards") {
        Some(node) => settings::read_guards(reader, node, &mut sets, &mut said),
        None => (Resolvers::default(), NameGuards::default()),
    };
    if let Some(node) = fields.take("approvals") {
        settings::read_approvals(reader, node, "approvals", &mut said);
    }
    said.controller_loss = fields
        .take("onControllerLoss")
        .and_then(|node| settings::read_controller_loss(reader, node, "onControllerLoss"));
    let profiles = fields
        .take("profiles")
        .map(|node| settings::read_profiles(reader, node))
        .unwrap_or_default();
    let tests = fields
        .take("tests")
        .map(|node| tests::read_tests(reader, node, applies_to.as_ref()));
    let tests = tests.unwrap_or_default();
    warnings.extend(sets.unused());
    Policy {
        settings: said,
        profiles,
        resolvers: Arc::new(resolvers),
        default_action,
        mode,
        rules: Arc::new(RuleList::new(rules)),
        forwards: forwards.into_iter().map(Arc::new).collect(),
        dns,
        name_guards,
        approval_timeout,
        versioned,
        applies_to,
        tests,
        warnings,
    }
}

/// `mode`, and the drafts' `interactive` and `blockAllOutbound`, which must not contradict it.
fn read_mode(reader: &mut Reader, fields: &mut Fields<'_>) -> Option<Mode> {
    let mut said: Option<(&str, Mode)> = None;
    if let Some(node) = fields.take("mode") {
        if matches!(&node.value, Value::Text(text) if text == "quarantine") {
            let text =
                "mode quarantine is for one VM at a time; set it with: vnetctl vm mode NAME quarantine";
            reader.problem(node, text.to_owned());
        } else if let Some(mode) = reader.one_of(node, "mode", &MODES) {
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
    reader.one_of(node, key, &DEFAULT_ACTIONS)
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

fn read_dns(reader: &mut Reader, node: &Node, sets: &mut Sets, said: &mut Settings) -> DnsPolicy {
    let mut fields = reader.fields(node, "dns", &keys::DNS);
    let default_action = fields
        .take("defaultAction")
        .and_then(|node| read_default(reader, node, "dns.defaultAction"));
    let mut names = |key: &str| {
        // An empty list is a list of nothing, and means that.
        let nodes = fields
            .take(key)
            .map(|node| reader.list(node, key, LIST_MAX))
            .unwrap_or_default();
        Arc::new(sets.names(reader, nodes, key))
    };
    let allowed = names("allowedDomains");
    let blocked = names("blockedDomains");
    settings::read_dns(reader, &mut fields, "dns", said);
    let answer = fields
        .take("answer")
        .and_then(|node| reader.one_of(node, "dns.answer", &DNS_ANSWERS));
    DnsPolicy {
        default_action,
        allowed,
        blocked,
        answer: answer.unwrap_or_default(),
    }
}

fn read_selector(reader: &mut Reader, node: &Node, key: &str) -> Option<VmSelector> {
    let before = reader.problem_count();
    let mut fields = reader.fields(node, key, &keys::SELECTOR);
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

fn read_text(reader: &mut Reader, node: &Node, key: &str) -> Option<String> {
    let text = reader.text(node, key)?;
    let length = text.chars().count();
    // It is shown in terminals and stands in one-line reasons.
    let printable = !text.chars().any(is_unprintable);
    if length == 0 || length > TEXT_CHARS_MAX || !printable {
        let expected = format!("(expected 1 to {TEXT_CHARS_MAX} printable characters on one line)");
        reader.problem(node, format!("{key} {} cannot be shown {expected}", node.value));
        return None;
    }
    if key == "name" && (text.starts_with("rules[") || text.starts_with("forwards[")) {
        reader.problem(
            node,
            format!("name {text:?} is what nameless rules go by; choose another"),
        );
        return None;
    }
    Some(text.to_owned())
}

/// Characters that a terminal does not show, or that turn the direction of what follows them and so can
/// make text look like another.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
