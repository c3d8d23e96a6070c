//! Where a value came from, for messages that say what to change; and the messages of a file.

use std::fmt;
use std::sync::Arc;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A flag, without dashes.
    Flag(&'static str),
    /// A key of the configuration file.
    Key {
        /// As `stack.dns[0].name`.
        path: String,
        /// Where it stands.
        place: Place,
    },
    /// A variable of the environment.
    Variable(&'static str),
    /// Nobody said it.
    Default(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "-{name}"),
            Self::Key { path, place } => write!(f, "{place}: {path}"),
            Self::Variable(name) => f.write_str(name),
            Self::Default(what) => write!(f, "{what} (by default)"),
        }
    }
}

/// A place in a file. Line and column count from 1, the column in characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file, as it was named.
    pub file: Arc<str>,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A value, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub from: Origin,
}

impl<T> Given<T> {
    /// A value of a flag.
    pub fn flag(name: &'static str, value: T) -> Self {
        Self {
            value,
            from: Origin::Flag(name),
        }
    }

    /// Likewise, read otherwise.
    pub fn map<U>(self, read: impl FnOnce(T) -> U) -> Given<U> {
        Given {
            value: read(self.value),
            from: self.from,
        }
    }
}

/// Something that is to be said of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {text}")]
pub struct Finding {
    /// Where.
    pub place: Place,
    /// What was found, what is expected, and the remedy.
    pub text: String,
}
