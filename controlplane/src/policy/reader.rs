//! Reading typed values out of a [`Node`] tree, and collecting everything that is wrong with it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;

use crate::policy::keys::Table;
use crate::policy::yaml::{Node, Place, Value};
use crate::policy::{PolicyError, PolicyErrors};

/// Problems that are told one by one.
const PROBLEMS_MAX: usize = 100;

/// Collects problems while values are read.
pub(crate) struct Reader {
    source: String,
    problems: Vec<PolicyError>,
    more: usize,
}

impl Reader {
    pub(crate) fn new(source: &str) -> Self {
        Self {
            source: source.to_owned(),
            problems: Vec::new(),
            more: 0,
        }
    }

    pub(crate) fn has_problems(&self) -> bool {
        !self.problems.is_empty()
    }

    pub(crate) fn problem_count(&self) -> usize {
        self.problems.len() + self.more
    }

    /// Everything that is wrong, in order of position.
    pub(crate) fn into_errors(mut self) -> PolicyErrors {
        let source = &self.source;
        self.problems.sort_by(|a, b| {
            let key = |p: &PolicyError| (p.source_name != *source, p.line, p.column);
            key(a).cmp(&key(b))
        });
        if let Some(last) = self.problems.last().filter(|_| self.more > 0) {
            let text = format!("{} more problems are not shown", self.more);
            let more = PolicyError { text, ..last.clone() };
            self.problems.push(more);
        }
        PolicyErrors(self.problems)
    }

    pub(crate) fn problem(&mut self, node: &Node, text: String) {
        self.problem_at(node.place, text);
    }

    pub(crate) fn problem_at_start(&mut self, text: String) {
        self.problem_at(Place { line: 1, column: 1 }, text);
    }

    /// Takes over what is wrong with a file that belongs to the document.
    pub(crate) fn problems_elsewhere(&mut self, problems: PolicyErrors) {
        let room = PROBLEMS_MAX.saturating_sub(self.problems.len());
        self.more += problems.0.len().saturating_sub(room);
        self.problems.extend(problems.0.into_iter().take(room));
    }

    fn problem_at(&mut self, place: Place, text: String) {
        if self.problems.len() >= PROBLEMS_MAX {
            self.more += 1;
            return;
        }
        let Place { line, column } = place;
        self.problems.push(PolicyError {
            source_name: self.source.clone(),
            line,
            column,
            text,
        });
    }

    /// The entries of a mapping, after telling of unknown and repeated keys.
    pub(crate) fn fields<'a>(&mut self, node: &'a Node, what: &str, table: &Table) -> Fields<'a> {
        let known = &table.names()[..];
        let Value::Map(entries) = &node.value else {
            let text = format!(
                "{what} is {} (expected a mapping with {})",
                node.value,
                choices(known)
            );
            self.problem(node, text);
            return Fields {
                entries: HashMap::new(),
                mapping: false,
            };
        };
        let mut found: HashMap<&str, (&Node, &Node)> = HashMap::new();
        for (key, value) in entries {
            let Value::Text(name) = &key.value else {
                let text = format!(
                    "key {} is not known in {what} (expected {})",
                    key.value,
                    choices(known)
                );
                self.problem(key, text);
                continue;
            };
            if !known.contains(&name.as_str()) {
                let remedy = match nearest(name, known) {
                    Some(near) => format!("did you mean {near}?"),
                    None => format!("expected {}", choices(known)),
                };
                self.problem(
                    key,
                    format!("key {} is not known in {what} ({remedy})", key.value),
                );
                continue;
            }
            match found.get(name.as_str()) {
                Some((first, _)) => {
                    let line = first.place.line;
                    self.problem(
                        key,
                        format!("key {name} is given twice in {what}, first in line {line}"),
                    );
                }
                None => {
                    found.insert(name, (key, value));
                }
            }
        }
        let entries = found
            .into_iter()
            .map(|(name, (_, value))| (name, value))
            .collect();
        Fields {
            entries,
            mapping: true,
        }
    }

    /// One of a few words.
    pub(crate) fn one_of<T: Copy + Display>(&mut self, node: &Node, key: &str, known: &[T]) -> Option<T> {
        let words: Vec<String> = known.iter().map(ToString::to_string).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let Value::Text(text) = &node.value else {
            self.problem(
                node,
                format!("{key} is {} (expected {})", node.value, choices(&words)),
            );
            return None;
        };
        if let Some(index) = words.iter().position(|word| word == text) {
            return Some(known[index]);
        }
        let meant = synonym(text)
            .filter(|word| words.contains(word))
            .or_else(|| nearest(text, &words));
        let hint = meant
            .map(|word| format!("; did you mean {word}?"))
            .unwrap_or_default();
        self.problem(
            node,
            format!("{key} is {} (expected {}{hint})", node.value, choices(&words)),
        );
        None
    }

    pub(crate) fn boolean(&mut self, node: &Node, key: &str) -> Option<bool> {
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.problem(node, format!("{key} is {} (expected true or false)", node.value));
        None
    }

    pub(crate) fn text<'a>(&mut self, node: &'a Node, key: &str) -> Option<&'a str> {
        if let Value::Text(text) = &node.value {
            return Some(text);
        }
        self.problem(
            node,
            format!(
                "{key} has {} where text is expected; put it in quotes",
                node.value
            ),
        );
        None
    }

    /// The items of a list.
    pub(crate) fn list<'a>(&mut self, node: &'a Node, key: &str, most: usize) -> &'a [Node] {
        match &node.value {
            Value::List(items) if items.len() <= most => items,
            Value::List(items) => {
                self.problem(
                    node,
                    format!("{key} has {} entries (at most {most})", items.len()),
                );
                &[]
            }
            other => {
                self.problem(
                    node,
                    format!("{key} is {other} (expected a list; for none, leave {key} out)"),
                );
                &[]
            }
        }
    }

    /// The items of a list that may not be empty, or the one item that stands in its place.
    pub(crate) fn list_of_some<'a>(&mut self, node: &'a Node, key: &str, most: usize) -> &'a [Node] {
        match &node.value {
            Value::List(items) if items.is_empty() => {
                let text =
                    format!("{key} is an empty list, which matches nothing; leave {key} out to match any");
                self.problem(node, text);
                &[]
            }
            Value::List(_) | Value::Null | Value::Map(_) => self.list(node, key, most),
            Value::Bool(_) | Value::Int(_) | Value::Number(_) | Value::Text(_) => std::slice::from_ref(node),
        }
    }

    /// A mapping from text to text.
    pub(crate) fn text_map(&mut self, node: &Node, key: &str) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        let Value::Map(entries) = &node.value else {
            self.problem(
                node,
                format!("{key} is {} (expected a mapping, as {{role: agent}})", node.value),
            );
            return map;
        };
        for (name, value) in entries {
            let (Some(name_text), Some(text)) = (self.text(name, key), self.text(value, key)) else {
                continue;
            };
            if name_text.is_empty() {
                self.problem(name, format!("{key} has an empty key"));
            } else if map.insert(name_text.to_owned(), text.to_owned()).is_some() {
                self.problem(name, format!("{key} has {name_text:?} twice"));
            }
        }
        map
    }
}

/// The known entries of one mapping.
pub(crate) struct Fields<'a> {
    entries: HashMap<&'a str, &'a Node>,
    mapping: bool,
}

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, key: &str) -> Option<&'a Node> {
        self.entries.remove(key)
    }

    /// False where something else stood in the mapping's place, which was told.
    pub(crate) fn are_a_mapping(&self) -> bool {
        self.mapping
    }
}

pub(crate) fn choices(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// What other firewalls call it.
fn synonym(word: &str) -> Option<&'static str> {
    Some(match word.to_ascii_lowercase().as_str() {
        "block" | "reject" | "refuse" => "deny",
        "accept" | "permit" | "pass" => "allow",
        "prompt" | "interactive" => "ask",
        "icmp6" | "ipv6-icmp" => "icmpv6",
        "block-all" | "blockall" => "block",
        "learn" | "audit" => "observe",
        _ => return None,
    })
}

/// The word that was probably meant, if one is near: a few letters off, whatever the case and the dashes.
pub fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    // A long word is near to nothing, and comparing it is not worth its square.
    if found.len() > 64 {
        return None;
    }
    let plain = |text: &str| -> String {
        let letters = text.chars().filter(|c| !matches!(c, '_' | '-'));
        letters.flat_map(char::to_lowercase).collect()
    };
    let found = plain(found);
    let near = known.iter().filter_map(|word| {
        let letters = plain(word);
        let distance = strsim::levenshtein(&found, &letters);
        (distance <= 1 + letters.chars().count() / 4).then_some((distance, *word))
    });
    near.min_by_key(|(distance, _)| *distance).map(|(_, word)| word)
}
