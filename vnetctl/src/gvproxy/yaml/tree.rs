//! YAML as a tree in which every key and value knows its place, and a scalar is the text that is written.
//!
//! The policies' reader parses ([`yaml`]). gvproxy's parser takes a scalar for what the
//! field wants, so that `1500` is a path where a path belongs; hence what that reader took for a number or a boolean
//! is its text again here.

use crate::launch::yaml::{self, MergeKeys, NotYaml};

/// Of a value no more is shown.
const SHOWN_CHARS_MAX: usize = 80;

/// A value and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gvproxy) struct Node {
    pub(in crate::gvproxy) value: Value,
    pub(in crate::gvproxy) line: u32,
    pub(in crate::gvproxy) column: u32,
    /// The byte at which it is written; where an alias stands in its place, that of what the alias means.
    pub(in crate::gvproxy) offset: Option<usize>,
}

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gvproxy) enum Value {
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    /// In order, duplicates kept.
    Map(Vec<(Node, Node)>),
}

/// A scalar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gvproxy) struct Scalar {
    pub(in crate::gvproxy) text: String,
    /// Whether it stands without quotes.
    pub(in crate::gvproxy) plain: bool,
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("empty"),
            Self::Scalar(Scalar { text, .. }) if text.chars().count() > SHOWN_CHARS_MAX => {
                let start: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                write!(f, "{start:?}...")
            }
            // What is not printable is shown escaped.
            Self::Scalar(Scalar { text, .. }) => write!(f, "{text:?}"),
            Self::List(_) => f.write_str("a list"),
            Self::Map(_) => f.write_str("a mapping"),
        }
    }
}

impl Node {
    /// Whether two trees say the same, wherever they stand.
    pub(in crate::gvproxy) fn says_the_same_as(&self, other: &Self) -> bool {
        match (&self.value, &other.value) {
            (Value::List(a), Value::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.says_the_same_as(b))
            }
            (Value::Map(a), Value::Map(b)) => {
                let both = |(a, b): (&(Node, Node), &(Node, Node))| {
                    a.0.says_the_same_as(&b.0) && a.1.says_the_same_as(&b.1)
                };
                a.len() == b.len() && a.iter().zip(b).all(both)
            }
            (a, b) => a == b,
        }
    }
}

/// Reads a document.
///
/// # Errors
/// What is wrong with it as YAML: the parser stops at the first such problem.
pub(in crate::gvproxy) fn load(document: &str) -> Result<Node, NotYaml> {
    yaml::read(document, MergeKeys::Taken).map(|root| node(root, document))
}

/// Nests no deeper than the reader lets a document.
fn node(read: yaml::Node, document: &str) -> Node {
    let written = read.as_written(document);
    let (offset, place) = (read.offset(), read.place);
    let plain = |shown: String| {
        Value::Scalar(Scalar {
            text: written.map_or(shown, str::to_owned),
            plain: true,
        })
    };
    let value = match read.value {
        yaml::Value::Null => Value::Null,
        yaml::Value::Bool(value) => plain(value.to_string()),
        yaml::Value::Int(value) => plain(value.to_string()),
        yaml::Value::Number(text) => plain(text),
        yaml::Value::Text(text) => Value::Scalar(Scalar {
            plain: written == Some(&text),
            text,
        }),
        yaml::Value::List(list) => Value::List(list.into_iter().map(|item| node(item, document)).collect()),
        yaml::Value::Map(map) => {
            let both = |(key, value)| (node(key, document), node(value, document));
            Value::Map(map.into_iter().map(both).collect())
        }
    };
    Node {
        value,
        line: place.line,
        column: place.column,
        offset,
    }
}
