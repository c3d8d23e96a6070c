//! YAML as a tree in which every key and value knows its place, and a scalar is the text that is written.
//!
//! `serde-saphyr` parses. gvproxy's parser takes a scalar for what the field wants, so that `1500` is a path where a
//! path belongs; hence nothing is interpreted here. Aliases count against small budgets: nothing grows past a
//! constant factor of the document.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, MergeKeyPolicy, Spanned};

/// Nodes of a document, aliases expanded.
const NODES_MAX: usize = 200_000;
/// How deep a document may nest; the schema needs six levels, and the policy inside it five more.
const DEPTH_MAX: usize = 32;
/// Uses of aliases.
const ALIASES_MAX: usize = 1_000;
/// Of a value no more is shown.
const SHOWN_CHARS_MAX: usize = 80;

/// A value and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) line: u32,
    pub(super) column: u32,
    /// The byte at which it is written; where an alias stands in its place, that of what the alias means.
    pub(super) offset: Option<usize>,
}

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    /// In order, duplicates kept.
    Map(Vec<(Node, Node)>),
}

/// A scalar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scalar {
    pub(super) text: String,
    /// Whether it stands without quotes.
    pub(super) plain: bool,
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
    pub(super) fn says_the_same_as(&self, other: &Self) -> bool {
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

/// What is wrong with a document as YAML, and where.
#[derive(Debug)]
pub(super) struct NotYaml {
    pub(super) line: u32,
    pub(super) column: u32,
    pub(super) text: String,
}

/// Reads a document.
///
/// # Errors
/// What is wrong with it as YAML: the parser stops at the first such problem.
pub(super) fn load(document: &str) -> Result<Node, NotYaml> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Merge,
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
            max_total_replayed_events: NODES_MAX,
            max_replay_stack_depth: DEPTH_MAX,
        },
    };
    serde_saphyr::from_str_with_options::<Spanned<Raw>>(document, options)
        .map(|root| node(root, document))
        .map_err(|error| {
            let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
            let text = error.without_snippet().to_string();
            // The place stands before the text already.
            let text = plain_words(text.split(" at line ").next().unwrap_or(&text));
            NotYaml {
                line: number(line),
                column: number(column),
                text: format!("not valid YAML: {text}"),
            }
        })
}

/// The parser's words for its limits, in ours.
fn plain_words(text: &str) -> &str {
    if text.contains("Documents {") || text.contains("multiple YAML documents") {
        "there is more than one document (expected one; remove the line --- here and what follows it)"
    } else if ["budget breached", "alias replay limit", "recursion limit"]
        .iter()
        .any(|limit| text.contains(limit))
    {
        "it nests too deep, or has too many values or aliases"
    } else {
        text
    }
}

fn number(n: u64) -> u32 {
    u32::try_from(n.max(1)).unwrap_or(u32::MAX)
}

/// Nests no deeper than the parser lets a document.
fn node(spanned: Spanned<Raw>, document: &str) -> Node {
    let span = spanned.defined.span();
    let size = |n: Option<u64>| n.and_then(|n| usize::try_from(n).ok());
    let offset = size(span.byte_offset());
    let written = offset
        .zip(size(span.byte_len()))
        .and_then(|(offset, length)| document.get(offset..offset.checked_add(length)?))
        .map(str::trim);
    let value = match spanned.value {
        Raw::Null => Value::Null,
        Raw::Text(text) => Value::Scalar(Scalar {
            plain: written == Some(&text),
            text,
        }),
        Raw::Other(shown) => Value::Scalar(Scalar {
            text: written.map_or(shown, str::to_owned),
            plain: true,
        }),
        Raw::List(list) => Value::List(list.into_iter().map(|item| node(item, document)).collect()),
        Raw::Map(map) => {
            let both = |(key, value)| (node(key, document), node(value, document));
            Value::Map(map.into_iter().map(both).collect())
        }
    };
    Node {
        value,
        line: number(spanned.referenced.line()),
        column: number(spanned.referenced.column()),
        offset,
    }
}

/// A value as the parser tells it.
enum Raw {
    Null,
    Text(String),
    /// A number or a boolean; what is written is what counts.
    Other(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<Raw>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        Raw::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Other(value.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Raw, E> {
        Ok(Raw::Text(text.to_owned()))
    }

    fn visit_bytes<E: Error>(self, _: &[u8]) -> Result<Raw, E> {
        Err(E::custom("binary values are not taken; write text"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Raw::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Raw, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key()? {
            map.push((key, entries.next_value()?));
        }
        Ok(Raw::Map(map))
    }
}
