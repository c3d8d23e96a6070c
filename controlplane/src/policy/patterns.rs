//! Names by regular expressions: `outboundAllow` of gvproxy's draft.
//!
//! An expression is matched anywhere in a name, as Go's `MatchString` does and the draft with it: `^` and `$`
//! make it the whole name. Matching takes time linear in the name (crate `regex`), and what an expression
//! compiles to is bounded.

use regex::{RegexBuilder, RegexSet, RegexSetBuilder};
use vnet_proto::model::Name;

/// Expressions of one document.
pub const PATTERNS_MAX: usize = 256;
/// Bytes of one expression.
pub const PATTERN_BYTES_MAX: usize = 1_024;
/// Bytes that one compiles to at most.
const COMPILED_BYTES_MAX: usize = 256 << 10;
/// Bytes that all of a document compile to at most, and that matching them may keep beside.
const ALL_BYTES_MAX: usize = 8 << 20;

/// Regular expressions, of which one must match.
#[derive(Debug, Clone)]
pub struct NamePatterns(RegexSet);

impl NamePatterns {
    /// Compiles expressions that `check` has let through.
    ///
    /// # Errors
    /// All of them together are too large.
    pub fn new(patterns: &[String]) -> Result<Self, String> {
        RegexSetBuilder::new(patterns)
            .case_insensitive(true)
            .size_limit(ALL_BYTES_MAX)
            .dfa_size_limit(ALL_BYTES_MAX)
            .build()
            .map(Self)
            .map_err(|error| first_line(&error))
    }

    /// Whether one matches a name.
    pub fn contains(&self, name: &Name) -> bool {
        self.0.is_match(name.as_str())
    }
}

/// Checks one expression by itself.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(pattern: &str) -> Result<(), String> {
    if pattern.is_empty() {
        return Err("it is empty, which matches every name".to_owned());
    }
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(format!(
            "it is {} bytes long (at most {PATTERN_BYTES_MAX})",
            pattern.len()
        ));
    }
    RegexBuilder::new(pattern)
        .case_insensitive(true)
        .size_limit(COMPILED_BYTES_MAX)
        .build()
        .map(drop)
        .map_err(|error| first_line(&error))
}

/// Whether an expression is for whole names, by the look of it.
pub(crate) fn is_anchored(pattern: &str) -> bool {
    let pattern = pattern.strip_prefix("(?i)").unwrap_or(pattern);
    pattern.starts_with('^') && pattern.ends_with('$') && !pattern.ends_with("\\$") && !pattern.contains('|')
}

/// The crate's messages draw the expression and point into it, over several lines; the last says what it is.
fn first_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    last.strip_prefix("error: ").unwrap_or(last).to_lowercase()
}
