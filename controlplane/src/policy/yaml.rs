//! YAML as a tree in which every key and value knows its place, for policies and for other files with keys.
//!
//! `serde-saphyr` parses; this keeps duplicate keys and positions, so that the loader can report every
//! problem and not just the first. Aliases count against small budgets: nothing here grows past a
//! constant factor of the document. A number is one where it is written as people write it: `0x50`, `010` and
//! `8_0`, of which parsers think differently, are kept as they are written, for the reader to refuse.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, MergeKeyPolicy, Spanned};

use crate::policy::PolicyError;

/// Nodes of a document, aliases expanded.
const NODES_MAX: usize = 500_000;
/// How deep a document may nest; a policy needs five levels.
const DEPTH_MAX: usize = 32;
/// Of what is written in the place of a number no more is kept.
const WRITTEN_MAX: usize = 80;
/// Uses of aliases.
const ALIASES_MAX: usize = 1_000;
/// What aliases may stand for, all of them together: values, and beginnings and ends of lists and mappings. Each costs
/// microseconds, so that a small document that asks for millions is soon refused; a list of thousands of names may
/// stand in several rules.
pub const ALIASED_MAX: usize = 20_000;

/// A value and its place.
#[derive(Debug, Clone)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Where it stands; an alias, where the alias does.
    pub place: Place,
    /// Where it is written, by byte and length; of an alias, what the alias means.
    written: Option<(usize, usize)>,
}

impl Node {
    /// The byte of the document at which it is written.
    pub fn offset(&self) -> Option<usize> {
        self.written.map(|(offset, _)| offset)
    }

    /// How it is written in the document that it was read from.
    pub fn as_written<'d>(&self, document: &'d str) -> Option<&'d str> {
        let (offset, length) = self.written?;
        document.get(offset..offset.checked_add(length)?).map(str::trim)
    }
}

/// Line and column, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u32,
    /// The column.
    pub column: u32,
}

/// A value.
#[derive(Debug, Clone)]
pub enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// Any other number, as it is written.
    Number(String),
    /// A text, quoted or not.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// In order, duplicates kept.
    Map(Vec<(Node, Node)>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("nothing"),
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Number(written) => f.write_str(written),
            Self::Text(text) if text.chars().count() > 80 => {
                write!(f, "{:?}...", text.chars().take(80).collect::<String>())
            }
            Self::Text(text) => write!(f, "{text:?}"),
            Self::List(_) => f.write_str("a list"),
            Self::Map(_) => f.write_str("a mapping"),
        }
    }
}

/// What is wrong with a document as YAML, and where.
#[derive(Debug)]
pub struct NotYaml {
    /// Where.
    pub place: Place,
    /// What, in a line.
    pub text: String,
}

/// Reads a policy's document.
///
/// # Errors
/// What is wrong with it as YAML: the parser stops at the first such problem.
pub(crate) fn load(source: &str, document: &str) -> Result<Node, PolicyError> {
    read(document, MergeKeys::Refused).map_err(|wrong| PolicyError {
        source_name: source.to_owned(),
        line: wrong.place.line,
        column: wrong.place.column,
        text: wrong.text,
    })
}

/// What becomes of merge keys (`<<`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeKeys {
    /// They are an error.
    Refused,
    /// What they name is merged in.
    Taken,
}

/// Reads a document.
///
/// # Errors
/// What is wrong with it as YAML: the parser stops at the first such problem.
pub fn read(document: &str, merge_keys: MergeKeys) -> Result<Node, NotYaml> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: match merge_keys {
            MergeKeys::Refused => MergeKeyPolicy::Error,
            MergeKeys::Taken => MergeKeyPolicy::Merge,
        },
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_depth: DEPTH_MAX,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: ALIASED_MAX,
            max_replay_stack_depth: DEPTH_MAX,
        },
    };
    serde_saphyr::from_str_with_options::<Spanned<Value>>(document, options)
        .map(|root| as_written(node(root), document))
        .map_err(|error| {
            let place = error.location().map_or(Place { line: 1, column: 1 }, place_of);
            let text = error.without_snippet().to_string();
            // The place stands before the text already.
            let text = plain(text.split(" at line ").next().unwrap_or(&text));
            NotYaml {
                place,
                text: format!("not valid YAML: {text}"),
            }
        })
}

// What is told of it.
const _: () = assert!(ALIASED_MAX == 20_000);

/// The parser's words for its limits and options, in ours.
fn plain(text: &str) -> &str {
    if text.contains("Documents {") || text.contains("multiple YAML documents") {
        "there is more than one document (expected one; remove the line --- here and what follows it)"
    } else if text.contains("merge keys") {
        "merge keys (<<) are not taken; write the keys out"
    } else if text.contains("alias replay limit") {
        "too many values or aliases: its aliases stand for more than 20000 values (write them out)"
    } else if ["budget breached", "recursion limit"]
        .iter()
        .any(|limit| text.contains(limit))
    {
        "it nests too deep, or has too many values or aliases"
    } else {
        text
    }
}

fn node(spanned: Spanned<Value>) -> Node {
    let span = spanned.defined.span();
    let number = |n: Option<u64>| n.and_then(|n| usize::try_from(n).ok());
    Node {
        place: place_of(spanned.referenced),
        written: number(span.byte_offset()).zip(number(span.byte_len())),
        value: spanned.value,
    }
}

/// Numbers that are written in another way than in decimal digits become what is written. Nests no deeper than
/// the parser lets a document.
fn as_written(mut node: Node, document: &str) -> Node {
    let text = node.as_written(document);
    node.value = match (node.value, text) {
        (Value::Int(number), Some(text)) if text != number.to_string() => Value::Number(cut(text)),
        (Value::Number(_), Some(text)) => Value::Number(cut(text)),
        (Value::List(list), _) => {
            Value::List(list.into_iter().map(|node| as_written(node, document)).collect())
        }
        (Value::Map(map), _) => {
            let both = |(key, value)| (as_written(key, document), as_written(value, document));
            Value::Map(map.into_iter().map(both).collect())
        }
        (other, _) => other,
    };
    node
}

fn cut(text: &str) -> String {
    text.chars().take(WRITTEN_MAX).collect()
}

fn place_of(location: serde_saphyr::Location) -> Place {
    let number = |n: u64| u32::try_from(n.max(1)).unwrap_or(u32::MAX);
    Place {
        line: number(location.line()),
        column: number(location.column()),
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(i128::try_from(value).map_or(Value::Text(value.to_string()), Value::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Value>>()? {
            list.push(node(item));
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<Value>>()? {
            map.push((node(key), node(entries.next_value::<Spanned<Value>>()?)));
        }
        Ok(Value::Map(map))
    }
}
