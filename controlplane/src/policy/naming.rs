//! How strictly flows are read that rest on a name: the part of `guards:` that the dataplane is told.

use std::fmt;

/// What becomes of a TLS or QUIC hello that hides its name (encrypted ClientHello), where one is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum EchGuard {
    /// It is refused.
    #[default]
    Deny,
    /// The name that it shows counts.
    Outer,
}

/// What becomes of QUIC where a name is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum QuicGuard {
    /// The name in it is read.
    #[default]
    Inspect,
    /// It is refused.
    Deny,
}

/// Both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct NameGuards {
    /// `guards.ech`.
    pub ech: EchGuard,
    /// `guards.quic`.
    pub quic: QuicGuard,
}

impl EchGuard {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Deny, Self::Outer];
}

impl QuicGuard {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Inspect, Self::Deny];
}

impl fmt::Display for EchGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "deny",
            Self::Outer => "outer",
        })
    }
}

impl fmt::Display for QuicGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inspect => "inspect",
            Self::Deny => "deny",
        })
    }
}
