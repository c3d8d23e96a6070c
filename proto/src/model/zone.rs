//! What local zones and their records are made of: names that may be the root's or a number, and patterns.
//!
//! A pattern is an expression of the crate `regex`, matched anywhere in the part of a name before its zone's, in
//! whatever case, as gvproxy does with Go's. Matching takes time linear in the name, and what a pattern compiles to
//! is bounded.

use std::fmt;
use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};

use super::{Name, NameError};

/// Zones of one network at once.
pub const ZONES_MAX: usize = 256;
/// Records of one zone.
pub const ZONE_RECORDS_MAX: usize = 4_096;
/// Patterns of all zones of one network together.
pub const ZONE_PATTERNS_MAX: usize = 256;
/// Bytes of one pattern's text.
pub const ZONE_PATTERN_BYTES_MAX: usize = 1_024;
/// Bytes that one compiles to at most, and that matching it may keep beside.
const COMPILED_BYTES_MAX: usize = 128 << 10;

/// How the root is written where a zone's name is expected.
const ROOT: &str = ".";

/// A zone's name; `None` is the root, written `.`.
///
/// # Errors
/// [`NameError`]; a name that is empty is not taken for the root.
pub fn zone_name(text: &str) -> Result<Option<Name>, NameError> {
    match text {
        ROOT => Ok(None),
        text => text.parse().map(Some),
    }
}

/// How a zone's name is written.
pub fn zone_text(name: Option<&Name>) -> &str {
    name.map_or(ROOT, Name::as_str)
}

/// The name of a record, without its zone's. It may be a number, as no host name is.
///
/// # Errors
/// [`NameError`].
pub fn record_name(text: &str) -> Result<Name, NameError> {
    match text.parse() {
        Err(NameError::Address(_)) => Name::from_canonical(text.strip_suffix('.').unwrap_or(text)),
        parsed => parsed,
    }
}

/// An expression that matches names below a zone. Two of the same text are the same; clones share what is compiled.
#[derive(Clone)]
pub struct RecordPattern {
    text: Box<str>,
    compiled: Arc<Regex>,
}

/// Why a pattern cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It matches everything, which a default address says.
    #[error("it is empty")]
    Empty,
    /// Longer than [`ZONE_PATTERN_BYTES_MAX`].
    #[error("it is {0} bytes long (at most {ZONE_PATTERN_BYTES_MAX})")]
    TooLong(usize),
    /// It is no expression, or one that compiles to too much.
    #[error("{0}")]
    Syntax(String),
}

impl RecordPattern {
    /// Reads and compiles one.
    ///
    /// # Errors
    /// [`PatternError`].
    pub fn new(text: &str) -> Result<Self, PatternError> {
        match text.len() {
            0 => return Err(PatternError::Empty),
            long @ ZONE_PATTERN_BYTES_MAX.. if long > ZONE_PATTERN_BYTES_MAX => {
                return Err(PatternError::TooLong(long));
            }
            _ => {}
        }
        // Names are ASCII: tables of all other letters would only take room.
        let compiled = RegexBuilder::new(text)
            .unicode(false)
            .case_insensitive(true)
            .size_limit(COMPILED_BYTES_MAX)
            .dfa_size_limit(COMPILED_BYTES_MAX)
            .build()
            .map_err(|error| PatternError::Syntax(last_line(&error)))?;
        Ok(Self {
            text: text.into(),
            compiled: Arc::new(compiled),
        })
    }

    /// The expression.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches somewhere in the part of a name before the zone's, without the dot between.
    pub fn is_match(&self, below: &str) -> bool {
        self.compiled.is_match(below.as_bytes())
    }
}

impl PartialEq for RecordPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for RecordPattern {}

impl fmt::Debug for RecordPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

impl fmt::Display for RecordPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The crate's messages draw the expression and point into it, over several lines; the last says what it is.
fn last_line(error: &regex::Error) -> String {
    if let regex::Error::CompiledTooBig(bytes) = error {
        return format!("it compiles to more than {bytes} bytes; make its repetitions shorter");
    }
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    last.strip_prefix("error: ").unwrap_or(last).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_anywhere_in_a_name_and_in_any_case() {
        let matches = |pattern: &str, name: &str| RecordPattern::new(pattern).unwrap().is_match(name);

        assert!(matches("crc", "a.crc.b"));
        assert!(matches("^CRC-[0-9]{1,3}$", "crc-17"));
        assert!(!matches("^crc$", "a.crc"));
        assert!(matches(r"(.*)\.apps", "x.y.apps"));
        assert!(matches(r"\w+", "a") && matches("^$", ""));
        assert_eq!(RecordPattern::new("a"), RecordPattern::new("a"));
        assert_ne!(RecordPattern::new("a"), RecordPattern::new("b"));
    }

    #[test]
    fn a_pattern_is_bounded_in_text_and_in_what_it_compiles_to() {
        assert!(RecordPattern::new(&"a".repeat(ZONE_PATTERN_BYTES_MAX)).is_ok());
        for (pattern, why) in [
            (String::new(), "it is empty"),
            (
                "a".repeat(ZONE_PATTERN_BYTES_MAX + 1),
                "it is 1025 bytes long (at most 1024)",
            ),
            ("(".to_owned(), "unclosed group"),
            (
                "((a{99}){99}){99}".to_owned(),
                "it compiles to more than 131072 bytes; make its repetitions shorter",
            ),
            (
                "(".repeat(500) + &")".repeat(500),
                "exceed the maximum number of nested",
            ),
        ] {
            let error = RecordPattern::new(&pattern).unwrap_err().to_string();
            assert!(error.contains(why), "{pattern}: {error}");
        }
        // Go has it and this has not.
        assert!(RecordPattern::new(r"\Qa.b\E").is_err());
    }

    #[test]
    fn the_root_is_a_dot_and_a_record_may_be_a_number() {
        assert_eq!(zone_name("."), Ok(None));
        assert_eq!(zone_name(""), Err(NameError::Empty));
        assert_eq!(
            zone_name("Lab.Internal.").unwrap().unwrap().as_str(),
            "lab.internal"
        );
        assert_eq!(zone_text(None), ".");
        assert_eq!(record_name("7").unwrap().as_str(), "7");
        assert_eq!(record_name("A.B").unwrap().as_str(), "a.b");
        assert!(record_name("*").is_err() && record_name("").is_err());
    }
}
