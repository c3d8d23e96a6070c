//! Reading typed values out of a [`Node`] tree, as gvproxy's parser takes them, and collecting all that is to be said.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::tree::{Node, Scalar, Value};
use crate::gvproxy::flags::go_number;
use crate::gvproxy::origin::{Finding, Given, Origin, Place};
use crate::launch::nearest;

/// Problems, and warnings, that are told one by one.
pub(in crate::gvproxy) const FINDINGS_MAX: usize = 100;

/// Collects what is to be said while values are read. An empty value is everywhere one that is not given.
pub(in crate::gvproxy) struct Reader {
    file: Arc<str>,
    /// Whether an unknown key is an error.
    strict: bool,
    problems: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Reader {
    pub(in crate::gvproxy) fn new(file: &str, strict: bool) -> Self {
        Self {
            file: file.into(),
            strict,
            problems: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// The value, and the warnings.
    ///
    /// # Errors
    /// Every problem, in order of position.
    pub(in crate::gvproxy) fn end<T>(mut self, value: T) -> Result<(T, Vec<Finding>), Vec<Finding>> {
        let shown = |mut findings: Vec<Finding>| {
            findings.sort_by(|a, b| a.place.cmp(&b.place));
            if findings.len() > FINDINGS_MAX {
                let more = findings.len() - FINDINGS_MAX;
                findings.truncate(FINDINGS_MAX);
                let place = findings[FINDINGS_MAX - 1].place.clone();
                let text = format!("{more} more are not shown");
                findings.push(Finding { place, text });
            }
            findings
        };
        if self.problems.is_empty() {
            return Ok((value, shown(self.warnings)));
        }
        self.problems = shown(self.problems);
        Err(self.problems)
    }

    pub(in crate::gvproxy) fn place(&self, node: &Node) -> Place {
        Place {
            file: self.file.clone(),
            line: node.line,
            column: node.column,
        }
    }

    pub(in crate::gvproxy) fn problem(&mut self, node: &Node, text: String) {
        let place = self.place(node);
        self.problems.push(Finding { place, text });
    }

    pub(in crate::gvproxy) fn problem_at(&mut self, line: u32, column: u32, text: String) {
        let file = self.file.clone();
        let place = Place { file, line, column };
        self.problems.push(Finding { place, text });
    }

    /// The known entries of a mapping, after telling of unknown and repeated keys. `within` is the mapping's path
    /// with a dot after it, or empty at the top.
    pub(in crate::gvproxy) fn fields<'a>(
        &mut self,
        node: &'a Node,
        within: &str,
        known: &[&'static str],
    ) -> Fields<'a> {
        let mut found: BTreeMap<&str, (&Node, &Node)> = BTreeMap::new();
        for (key, value) in self.entries(node, within) {
            let Value::Scalar(Scalar { text: name, .. }) = &key.value else {
                let text = format!(
                    "a key in {} is {} (expected {})",
                    where_in(within),
                    key.value,
                    one_of(known)
                );
                self.problem(key, text);
                continue;
            };
            if !known.contains(&name.as_str()) {
                self.unknown(key, name, within, known);
            } else if let Some((first, _)) = found.get(name.as_str()) {
                let text = format!("key {within}{name} is given twice, first in line {}", first.line);
                self.problem(key, text);
            } else {
                found.insert(name, (key, value));
            }
        }
        let entries = found.into_iter().map(|(name, (_, value))| (name, value));
        Fields(entries.collect())
    }

    fn unknown(&mut self, key: &Node, name: &str, within: &str, known: &[&'static str]) {
        let remedy = match nearest(name, known) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("expected {}", one_of(known)),
        };
        let what = format!("key {} is not known in {}", key.value, where_in(within));
        let place = self.place(key);
        if self.strict {
            let text = format!("{what} ({remedy})");
            self.problems.push(Finding { place, text });
        } else {
            let text = format!("{what} and is passed over ({remedy})");
            self.warnings.push(Finding { place, text });
        }
    }

    /// The entries of a mapping.
    fn entries<'a>(&mut self, node: &'a Node, within: &str) -> &'a [(Node, Node)] {
        match &node.value {
            Value::Map(entries) => entries,
            Value::Null => &[],
            other => {
                let what = where_in(within);
                self.problem(node, format!("{what} is {other} (expected a mapping)"));
                &[]
            }
        }
    }

    /// The entries of a mapping by names, each a mapping, in order.
    pub(in crate::gvproxy) fn named_mappings<'a>(
        &mut self,
        node: &'a Node,
        path: &str,
    ) -> Vec<(String, &'a Node)> {
        let mut map: Vec<(String, &Node)> = Vec::new();
        let mut names = HashSet::new();
        for (key, value) in self.entries(node, path) {
            let Value::Scalar(Scalar { text: name, .. }) = &key.value else {
                let text = format!("a key in {path} is {} (expected a name)", key.value);
                self.problem(key, text);
                continue;
            };
            if names.insert(name) {
                map.push((name.clone(), value));
            } else {
                self.problem(key, format!("{path}[{name:?}] is given twice"));
            }
        }
        map
    }

    /// A mapping from text to text, in order.
    pub(in crate::gvproxy) fn text_map(
        &mut self,
        node: &Node,
        path: &str,
        example: &str,
    ) -> Vec<(String, Given<String>)> {
        let mut map = Vec::new();
        let mut names = HashSet::new();
        let entries = match &node.value {
            Value::Map(entries) => entries,
            Value::Null => return map,
            other => {
                let text = format!("{path} is {other} (expected a mapping, as {{{example}}})");
                self.problem(node, text);
                return map;
            }
        };
        for (key, value) in entries {
            let Value::Scalar(Scalar { text: name, .. }) = &key.value else {
                let text = format!(
                    "a key in {path} is {} (expected text, as {{{example}}})",
                    key.value
                );
                self.problem(key, text);
                continue;
            };
            let path = format!("{path}[{name:?}]");
            if matches!(value.value, Value::Null) {
                self.problem(key, format!("{path} is empty (expected one as {{{example}}})"));
                continue;
            }
            let Some(mut given) = self.text(value, &path) else {
                continue;
            };
            // What is wrong with an entry may be its key, which comes first.
            let place = self.place(key);
            given.from = Origin::Key { path, place };
            if names.insert(name) {
                map.push((name.clone(), given));
            } else {
                self.problem(key, format!("{} is given twice", shown_path(&given.from)));
            }
        }
        map
    }

    /// The items of a list that are not empty, each with its path.
    pub(in crate::gvproxy) fn list<'a>(&mut self, node: &'a Node, path: &str) -> Vec<(String, &'a Node)> {
        match &node.value {
            Value::List(items) => {
                let paths = items.iter().enumerate();
                paths.map(|(i, item)| (format!("{path}[{i}]"), item)).collect()
            }
            Value::Null => Vec::new(),
            other => {
                self.problem(node, format!("{path} is {other} (expected a list)"));
                Vec::new()
            }
        }
    }

    /// A list of text.
    pub(in crate::gvproxy) fn texts(&mut self, node: &Node, path: &str) -> Vec<Given<String>> {
        let mut texts = Vec::new();
        for (path, item) in self.list(node, path) {
            if matches!(item.value, Value::Null) {
                self.problem(item, format!("{path} is empty (expected text)"));
            }
            texts.extend(self.text(item, &path));
        }
        texts
    }

    pub(in crate::gvproxy) fn text(&mut self, node: &Node, path: &str) -> Option<Given<String>> {
        let text = match &node.value {
            Value::Scalar(scalar) if scalar.text.is_empty() => return None,
            Value::Scalar(scalar) => scalar.text.clone(),
            Value::Null => return None,
            other => {
                self.problem(node, format!("{path} is {other} (expected text)"));
                return None;
            }
        };
        Some(self.given(node, path, text))
    }

    pub(in crate::gvproxy) fn boolean(&mut self, node: &Node, path: &str) -> Option<Given<bool>> {
        let value = match &node.value {
            Value::Null => return None,
            Value::Scalar(Scalar { text, plain }) => match (&**text, plain) {
                ("true" | "True" | "TRUE", true) => Some(true),
                ("false" | "False" | "FALSE", true) => Some(false),
                // The words of YAML 1.1, quoted or not.
                ("y" | "Y" | "yes" | "on", _) => Some(true),
                ("n" | "N" | "no" | "off", _) => Some(false),
                _ => None,
            },
            _ => None,
        };
        match value {
            Some(value) => Some(self.given(node, path, value)),
            None => {
                let quoted = matches!(&node.value, Value::Scalar(scalar) if !scalar.plain);
                let remedy = if quoted { " without quotes" } else { "" };
                let text = format!("{path} is {} (expected true or false{remedy})", node.value);
                self.problem(node, text);
                None
            }
        }
    }

    pub(in crate::gvproxy) fn number(&mut self, node: &Node, path: &str) -> Option<Given<i64>> {
        let value = match &node.value {
            Value::Null => return None,
            Value::Scalar(Scalar { text, plain: true }) => whole(text),
            _ => None,
        };
        match value {
            Some(value) => Some(self.given(node, path, value)),
            None => {
                let quoted = matches!(&node.value, Value::Scalar(scalar) if !scalar.plain);
                let remedy = if quoted { " without quotes" } else { ", as 1500" };
                let text = format!("{path} is {} (expected a whole number{remedy})", node.value);
                self.problem(node, text);
                None
            }
        }
    }

    pub(in crate::gvproxy) fn given<T>(&self, node: &Node, path: &str, value: T) -> Given<T> {
        let from = Origin::Key {
            path: path.to_owned(),
            place: self.place(node),
        };
        Given { value, from }
    }
}

/// The known entries of one mapping.
pub(in crate::gvproxy) struct Fields<'a>(BTreeMap<&'a str, &'a Node>);

impl<'a> Fields<'a> {
    pub(in crate::gvproxy) fn take(&mut self, key: &str) -> Option<&'a Node> {
        self.0.remove(key)
    }
}

/// A whole number as gvproxy's parser takes it: in any of Go's forms, or a fraction that has none.
fn whole(text: &str) -> Option<i64> {
    if let Ok(number) = go_number(&text.replace('_', "")) {
        return Some(number);
    }
    let number: f64 = text.parse().ok()?;
    // Below 2^53 every whole number is exact.
    #[allow(clippy::cast_possible_truncation, reason = "it is whole and small")]
    (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
}

fn where_in(within: &str) -> &str {
    match within.strip_suffix('.') {
        Some(path) => path,
        None => "the file",
    }
}

fn shown_path(from: &Origin) -> &str {
    match from {
        Origin::Key { path, .. } => path,
        Origin::Flag(name) | Origin::Variable(name) | Origin::Default(name) => name,
    }
}

fn one_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}
