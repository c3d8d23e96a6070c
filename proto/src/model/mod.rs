//! The checked model: what flows, matches and verdicts are, once past the wire.
//!
//! Everything here is plain data without clock, I/O or generated types in its fields. Conversions
//! from generated messages are `TryFrom` and answer [`Malformed`]; conversions to them are `From`.

use std::time::Duration;

mod addr;
mod capture;
mod flow;
mod forward;
mod id;
mod label;
mod matching;
mod name;
mod selector;
pub mod special;
mod target;
mod verdict;
mod zone;

#[cfg(test)]
mod tests;

pub use addr::{address_from_bytes, address_to_bytes, parse_prefix};
pub use capture::{
    CAPTURE_FILTER_BYTES_MAX, CAPTURE_SNAP_BYTES_MAX, CAPTURE_TERMS_MAX, CaptureFilter, CaptureFilterError,
    CaptureTerm, CaptureWord,
};
pub use flow::{
    FlowKey, FlowSubject, Guard, GuardSet, LookupSubject, Miss, Mode, Protocol, Subject, names_from_wire,
};
pub use forward::{
    ForwardListen, ForwardListenError, ForwardTarget, ForwardTargetError, NotOverUnix, SOCKET_PATH_BYTES_MAX,
    percent_decode,
};
pub use id::{CommandId, Epoch, FlowId, MissId, VmId};
pub use label::{label_key_problem, label_problem};
pub use matching::{FlowMatch, LookupMatch, PortRange};
pub use name::{Name, NameError, NamePattern};
pub use selector::VmSelector;
pub use target::{Target, TargetError};
pub use verdict::{Allowance, Budget, Match, NameDemand, Reason, Verdict, VerdictAction};
pub use zone::{
    PatternError, RecordPattern, ZONE_PATTERN_BYTES_MAX, ZONE_PATTERNS_MAX, ZONE_RECORDS_MAX, ZONES_MAX,
    record_name, zone_name, zone_text,
};

/// What a dataplane can do beyond version 1 of the session: it hears ClosedAddresses.
pub const CLOSED_ADDRESSES: &str = "closed-addresses";
/// The shortest time for which an answer may hold.
pub const LIFETIME_MIN: Duration = Duration::from_secs(1);
/// The longest time for which an answer may hold, a hundred years: what is to hold longer holds for ever. Its end
/// must be a date that RFC 3339 can write, or no list of answers could be read as JSON any more.
pub const LIFETIME_MAX: Duration = Duration::from_secs(36_525 * 24 * 3600);

/// Why a message was refused. Each variant names the field and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A field that must be set is not.
    #[error("{field} is not set")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// An enum value is unspecified or unknown.
    #[error("{field} has value {value}, which is not one that may be sent")]
    Enum {
        /// The field.
        field: &'static str,
        /// What was found.
        value: i32,
    },
    /// An address field is not 4 or 16 bytes.
    #[error("{field} is {length} bytes long (expected 4 or 16)")]
    AddressLength {
        /// The field.
        field: &'static str,
        /// What was found.
        length: usize,
    },
    /// Two addresses that belong together are of different families.
    #[error("{field} is of another address family than the address beside it")]
    MixedFamilies {
        /// The field.
        field: &'static str,
    },
    /// A prefix is too long for its address, or has bits set beyond its length.
    #[error("prefix {prefix} is not canonical")]
    Prefix {
        /// What was found.
        prefix: String,
    },
    /// A port or range is out of order or out of range.
    #[error("{field} has ports {first} to {last} (expected 1 to 65535 in order, or none for ICMP)")]
    Ports {
        /// The field.
        field: &'static str,
        /// First port found.
        first: u32,
        /// Last port found.
        last: u32,
    },
    /// A text does not parse.
    #[error("{field}: {text}")]
    Text {
        /// The field.
        field: &'static str,
        /// What was found, and what was expected.
        text: String,
    },
    /// A number does not fit its meaning.
    #[error("{field} is {value}, which is out of range")]
    Range {
        /// The field.
        field: &'static str,
        /// What was found.
        value: u64,
    },
    /// A name is not a canonical DNS name.
    #[error("{field} is not a canonical name")]
    Name {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: NameError,
    },
    /// An allow that consulted names is wider than one address.
    #[error("match {found} rests on names but covers more than one address")]
    WideNameMatch {
        /// What was found.
        found: String,
    },
    /// A verdict's match is for another kind of subject than expected.
    #[error("{field} does not fit what was asked")]
    Mismatch {
        /// The field.
        field: &'static str,
    },
}
