//! Why a flow whose verdict rests on a name may not go on.

use std::fmt;

use crate::causes::WithCauses;

use vnet_proto::model::{Name, NameError};

/// The protocol in which a name was read, or looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    /// TLS over TCP.
    Tls,
    /// HTTP/1 in plain text.
    Http,
    /// QUIC.
    Quic,
}

impl fmt::Display for Spoken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tls => "TLS",
            Self::Http => "HTTP",
            Self::Quic => "QUIC",
        })
    }
}

/// Why a flow is refused for the name that it spoke, or did not speak.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InspectRefusal {
    /// The guest was silent, or did not finish what it began.
    #[error("no whole name came within {} s (expected a TLS or QUIC hello, or an HTTP request)", super::NAME_PATIENCE.as_secs())]
    Late,
    /// A hello or a request without a name.
    #[error("{0} names no host (expected one that the rule or grant names)")]
    Missing(Spoken),
    /// A name that may not pass.
    #[error("{spoken} names {name} at port {port}, which the rule or grant does not name")]
    Mismatch {
        /// Where it was read.
        spoken: Spoken,
        /// The name.
        name: Name,
        /// The flow's port, or the one that a CONNECT asks for.
        port: u16,
    },
    /// A name that is none.
    #[error("{spoken} names \"{text}\" (expected a host name)")]
    NotAName {
        /// Where it was read.
        spoken: Spoken,
        /// What stood there, escaped and cut short.
        text: String,
        /// What is wrong with it, where a name could be tried.
        source: Option<NameError>,
    },
    /// Two names where servers would choose differently.
    #[error("HTTP names {target} in the request and {host} in Host (expected one name)")]
    Disagree {
        /// In the request's target.
        target: String,
        /// In Host.
        host: String,
    },
    /// Something else than the port's protocol.
    #[error("the first bytes are not {0} (expected on this port where a name is demanded)")]
    OtherProtocol(Spoken),
    /// Something else than the protocols in which a name can be read.
    #[error("the first bytes are neither TLS nor HTTP (expected where a name is demanded)")]
    NoProtocol,
    /// Not as the protocol's text says; servers disagree on what such bytes mean.
    #[error("malformed {spoken}: {why}")]
    Malformed {
        /// The protocol.
        spoken: Spoken,
        /// What is wrong.
        why: &'static str,
    },
    /// A TLS hello that the TLS library does not take.
    #[error("the TLS hello cannot be read")]
    Hello(#[source] rustls::Error),
    /// Encrypted ClientHello where the policy denies it.
    #[error(
        "the hello hides its name (ECH), which guards.ech denies; with guards: {{ech: outer}} the name that it shows counts"
    )]
    Ech,
    /// QUIC where the policy denies it.
    #[error("QUIC is spoken, which guards.quic denies where a name is demanded")]
    QuicDenied,
    /// HTTP/2 without TLS.
    #[error("HTTP/2 without TLS, whose requests are not read (expected HTTP/1.1)")]
    H2c,
    /// A version of QUIC whose packets cannot be read.
    #[error("QUIC version {0:#010x} cannot be read (expected 1 or 2)")]
    QuicVersion(u32),
    /// More than is kept or followed.
    #[error("{spoken}: more {of} than {limit} before a name was agreed")]
    Limit {
        /// The protocol.
        spoken: Spoken,
        /// Of what.
        of: &'static str,
        /// How many.
        limit: usize,
    },
}

impl InspectRefusal {
    /// Every [`Self::word`].
    pub const WORDS: [&str; 12] = [
        "name_late",
        "name_missing",
        "name_mismatch",
        "name_malformed",
        "names_disagree",
        "name_unreadable",
        "hello_malformed",
        "ech_denied",
        "quic_denied",
        "h2c_denied",
        "quic_version",
        "name_limit",
    ];

    /// The name that was spoken, where one was read.
    pub fn spoken(&self) -> Option<&Name> {
        match self {
            Self::Mismatch { name, .. } => Some(name),
            _ => None,
        }
    }

    /// What it says, with its causes, in one line.
    pub fn line(&self) -> String {
        WithCauses(self).to_string()
    }

    /// A word for counts and events, of a closed set.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Late => "name_late",
            Self::Missing(_) => "name_missing",
            Self::Mismatch { .. } => "name_mismatch",
            Self::NotAName { .. } => "name_malformed",
            Self::Disagree { .. } => "names_disagree",
            Self::OtherProtocol(_) | Self::NoProtocol => "name_unreadable",
            Self::Malformed { .. } | Self::Hello(_) => "hello_malformed",
            Self::Ech => "ech_denied",
            Self::QuicDenied => "quic_denied",
            Self::H2c => "h2c_denied",
            Self::QuicVersion(_) => "quic_version",
            Self::Limit { .. } => "name_limit",
        }
    }

    pub(super) fn not_a_name(spoken: Spoken, text: &[u8], source: Option<NameError>) -> Self {
        /// Enough to recognise it; what a guest says must not fill a log.
        const SHOWN_BYTES_MAX: usize = 64;
        let text = text[..text.len().min(SHOWN_BYTES_MAX)].escape_ascii().to_string();
        Self::NotAName { spoken, text, source }
    }
}
