//! Errors with what caused them, in one line.

use std::error::Error;
use std::fmt;

/// An error, and behind colons its causes.
#[derive(Debug, Clone, Copy)]
pub struct WithCauses<'a>(pub &'a dyn Error);

impl fmt::Display for WithCauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the door is shut")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("the key is lost")]
    struct Inner;

    #[test]
    fn causes_follow_what_they_caused() {
        assert_eq!(WithCauses(&Inner).to_string(), "the key is lost");
        let both = WithCauses(&Outer(Inner)).to_string();
        assert_eq!(both, "the door is shut: the key is lost");
    }
}
