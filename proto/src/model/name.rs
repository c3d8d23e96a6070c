//! DNS names in one canonical form, so that they can be compared as text.
//!
//! Canonical: lower case, no trailing dot, labels of 1 to 63 bytes and 253 bytes in all
//! (RFC 1035 §2.3.4), bytes other than letters, digits, `-` and `_` as `\DDD` (RFC 1035 §5.1).
//! What a person types may be an internationalised name; it becomes its A-label form (RFC 5891).

use std::fmt;
use std::str::FromStr;

/// What is wrong with a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing, or only a dot.
    #[error("the name is empty")]
    Empty,
    /// Longer than 253 bytes.
    #[error("the name is {0} bytes long (at most 253)")]
    TooLong(usize),
    /// A label is empty or longer than 63 bytes.
    #[error("{}", part_problem(.0))]
    Label(String),
    /// A character that no host name has.
    #[error("{0:?} has a character that a name cannot have")]
    Character(String),
    /// A `*` anywhere but as the whole first label.
    #[error("{0:?} has a * that is not its whole first label (expected one as *.example.com)")]
    Wildcard(String),
    /// An address where a name is expected.
    #[error("{0:?} is an address, not a name")]
    Address(String),
    /// Not in canonical form, where only that form is taken.
    #[error("{0:?} is not in canonical form")]
    NotCanonical(String),
}

fn part_problem(label: &str) -> String {
    if label.is_empty() {
        "the name begins with a dot, or has two in a row (expected one as a.example.com)".to_owned()
    } else {
        format!(
            "{label:?}, between two dots of the name, is {} bytes long (at most {LABEL_BYTES_MAX})",
            label.len()
        )
    }
}

const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// A canonical DNS name; never empty, never the root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<str>);

impl Name {
    /// Takes a name from the wire: labels as they stood in the message, any bytes, any case.
    ///
    /// # Errors
    /// [`NameError`] for the root and for names over the limits.
    pub fn from_labels<'a>(labels: impl Iterator<Item = &'a [u8]>) -> Result<Self, NameError> {
        let mut text = String::new();
        let mut wire_bytes = 0;
        for label in labels {
            if label.is_empty() || label.len() > LABEL_BYTES_MAX {
                return Err(NameError::Label(String::from_utf8_lossy(label).into_owned()));
            }
            if !text.is_empty() {
                text.push('.');
            }
            wire_bytes += label.len() + 1;
            for &byte in label {
                match byte {
                    b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
                    b'A'..=b'Z' => text.push(char::from(byte.to_ascii_lowercase())),
                    _ => text.push_str(&format!("\\{byte:03}")),
                }
            }
        }
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if wire_bytes - 1 > NAME_BYTES_MAX {
            return Err(NameError::TooLong(wire_bytes - 1));
        }
        Ok(Self(text.into()))
    }

    /// Takes text that must already be canonical, as the session carries it.
    ///
    /// # Errors
    /// [`NameError`] naming what is not canonical.
    pub fn from_canonical(text: &str) -> Result<Self, NameError> {
        let mut labels: Vec<Vec<u8>> = Vec::new();
        for label in text.split('.') {
            labels.push(unescape(label).ok_or_else(|| NameError::NotCanonical(text.to_owned()))?);
        }
        let name = Self::from_labels(labels.iter().map(Vec::as_slice))?;
        if &*name.0 == text {
            Ok(name)
        } else {
            Err(NameError::NotCanonical(text.to_owned()))
        }
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this name lies below `parent` (and is not `parent` itself), label by label.
    pub fn is_below(&self, parent: &Name) -> bool {
        self.0
            .strip_suffix(&*parent.0)
            .and_then(|rest| rest.strip_suffix('.'))
            .is_some_and(|rest| !rest.is_empty())
    }

    /// This name and its ancestors, longest first: `a.b.c`, `b.c`, `c`.
    pub fn ancestors(&self) -> impl Iterator<Item = &str> {
        let mut rest = Some(&*self.0);
        std::iter::from_fn(move || {
            let current = rest?;
            rest = current.split_once('.').map(|(_, parent)| parent);
            Some(current)
        })
    }
}

fn unescape(label: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(label.len());
    let mut rest = label.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'\\' {
            let digits = tail.get(..3)?;
            if !digits.iter().all(u8::is_ascii_digit) {
                return None;
            }
            let value = digits.iter().fold(0u16, |sum, d| sum * 10 + u16::from(d - b'0'));
            bytes.push(u8::try_from(value).ok()?);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    Some(bytes)
}

/// A name as a person types it: any case, perhaps a trailing dot, perhaps internationalised.
impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bare = text.strip_suffix('.').unwrap_or(text);
        if bare.is_empty() {
            return Err(NameError::Empty);
        }
        if bare.contains('*') {
            return Err(NameError::Wildcard(text.to_owned()));
        }
        let numeric = |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit());
        if bare.parse::<std::net::IpAddr>().is_ok() || bare.rsplit('.').next().is_some_and(numeric) {
            return Err(NameError::Address(text.to_owned()));
        }
        let ascii = if bare.is_ascii() {
            bare.to_ascii_lowercase()
        } else {
            idna::domain_to_ascii(bare).map_err(|_| NameError::Character(text.to_owned()))?
        };
        if !ascii
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        {
            return Err(NameError::Character(text.to_owned()));
        }
        Self::from_labels(ascii.split('.').map(str::as_bytes))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name, or every name below one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamePattern {
    /// This name only.
    Exact(Name),
    /// `*.name`: every name below it, at any depth, and not itself.
    Subdomains(Name),
}

impl NamePattern {
    /// Whether the pattern covers a name.
    pub fn matches(&self, name: &Name) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Subdomains(parent) => name.is_below(parent),
        }
    }

    /// The name in the pattern, without its `*.`.
    pub fn name(&self) -> &Name {
        match self {
            Self::Exact(name) | Self::Subdomains(name) => name,
        }
    }
}

impl FromStr for NamePattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.strip_prefix("*.") {
            Some(parent) => parent.parse().map(Self::Subdomains),
            None => text.parse().map(Self::Exact),
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Subdomains(name) => write!(f, "*.{name}"),
        }
    }
}
