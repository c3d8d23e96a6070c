//! What a capture wants: the language of `vnetctl capture --filter`.
//!
//! Terms that must all hold, separated by spaces, each perhaps behind `not`:
//!
//! | term | holds for |
//! |---|---|
//! | `tcp`, `udp` | that protocol |
//! | `icmp` | ICMP, and ICMPv6 |
//! | `arp` | ARP |
//! | `ip`, `ip6` | IPv4, IPv6 |
//! | `port N`, `port N-M` | TCP and UDP from or to such a port |
//! | `host ADDRESS`, `host CIDR` | packets from or to it, and ARP about it |
//!
//! The words are tcpdump's; its `and`, `or` and parentheses are not there. Of our own, as tcpdump's language is found only in
//! libpcap, a library of C whose programs would have to be run over frames of guests; whoever needs all of it pipes into
//! tshark.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

use super::addr::parse_prefix;
use super::target::prefix_text;

/// Terms of one filter.
pub const CAPTURE_TERMS_MAX: usize = 32;
/// Bytes kept of each packet, where less is not asked for; and at most.
pub const CAPTURE_SNAP_BYTES_MAX: u32 = 262_144;
/// Bytes of a filter's text.
pub const CAPTURE_FILTER_BYTES_MAX: usize = 1_024;

/// What a capture wants: frames for which every term holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaptureFilter {
    terms: Vec<CaptureTerm>,
}

/// One term of a filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureTerm {
    /// It holds where what it says does not.
    pub negated: bool,
    /// What it says.
    pub what: CaptureWord,
}

/// What a term says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaptureWord {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// ARP.
    Arp,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// A port, of either side.
    Port(RangeInclusive<u16>),
    /// An address, of either side.
    Host(IpNet),
}

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaptureFilterError {
    /// A word that is none.
    #[error("{found:?} is no term of a filter (expected {TERMS}, each perhaps behind not)")]
    Word {
        /// What was found.
        found: String,
    },
    /// A word that another must follow stands last.
    #[error("{word:?} stands alone (expected {expected} behind it)")]
    Alone {
        /// The word.
        word: &'static str,
        /// What must follow it.
        expected: &'static str,
    },
    /// A port that is none.
    #[error("port {found:?} is no port (expected 0 to 65535, or a range of them as 8000-8010)")]
    Port {
        /// What was found.
        found: String,
    },
    /// An address or network that is none.
    #[error("host: {0}")]
    Host(String),
    /// Too long.
    #[error("the filter has {found} bytes (expected at most {CAPTURE_FILTER_BYTES_MAX})")]
    Length {
        /// How long it is.
        found: usize,
    },
    /// Too many terms.
    #[error("the filter has more than {CAPTURE_TERMS_MAX} terms")]
    Terms,
}

const TERMS: &str = "tcp, udp, icmp, arp, ip, ip6, port N, port N-M, host ADDRESS or host CIDR";

impl CaptureFilter {
    /// Its terms, of which there are none where it wants everything.
    pub fn terms(&self) -> &[CaptureTerm] {
        &self.terms
    }

    /// Whether it wants every frame.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }
}

impl FromStr for CaptureFilter {
    type Err = CaptureFilterError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > CAPTURE_FILTER_BYTES_MAX {
            return Err(CaptureFilterError::Length { found: text.len() });
        }
        let mut words = text.split_ascii_whitespace();
        let mut terms = Vec::new();
        while let Some(word) = words.next() {
            if terms.len() >= CAPTURE_TERMS_MAX {
                return Err(CaptureFilterError::Terms);
            }
            let (negated, word) = match word {
                "not" => (true, words.next().ok_or(alone("not", TERMS))?),
                word => (false, word),
            };
            let what = match word {
                "tcp" => CaptureWord::Tcp,
                "udp" => CaptureWord::Udp,
                "icmp" => CaptureWord::Icmp,
                "arp" => CaptureWord::Arp,
                "ip" => CaptureWord::Ip,
                "ip6" => CaptureWord::Ip6,
                "port" => CaptureWord::Port(ports(words.next().ok_or(alone("port", "N or N-M"))?)?),
                "host" => {
                    let found = words.next().ok_or(alone("host", "an address or network"))?;
                    CaptureWord::Host(parse_prefix(found).map_err(CaptureFilterError::Host)?)
                }
                found => {
                    return Err(CaptureFilterError::Word {
                        found: found.to_owned(),
                    });
                }
            };
            terms.push(CaptureTerm { negated, what });
        }
        Ok(Self { terms })
    }
}

fn alone(word: &'static str, expected: &'static str) -> CaptureFilterError {
    CaptureFilterError::Alone { word, expected }
}

fn ports(found: &str) -> Result<RangeInclusive<u16>, CaptureFilterError> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let range = match found.split_once('-') {
        None => number(found).map(|port| port..=port),
        Some((first, last)) => number(first).zip(number(last)).map(|(first, last)| first..=last),
    };
    range
        .filter(|range| !range.is_empty())
        .ok_or_else(|| CaptureFilterError::Port {
            found: found.to_owned(),
        })
}

impl fmt::Display for CaptureFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, term) in self.terms.iter().enumerate() {
            if place > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{term}")?;
        }
        Ok(())
    }
}

impl fmt::Display for CaptureTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.negated {
            f.write_str("not ")?;
        }
        match &self.what {
            CaptureWord::Tcp => f.write_str("tcp"),
            CaptureWord::Udp => f.write_str("udp"),
            CaptureWord::Icmp => f.write_str("icmp"),
            CaptureWord::Arp => f.write_str("arp"),
            CaptureWord::Ip => f.write_str("ip"),
            CaptureWord::Ip6 => f.write_str("ip6"),
            CaptureWord::Port(ports) if ports.start() == ports.end() => write!(f, "port {}", ports.start()),
            CaptureWord::Port(ports) => write!(f, "port {}-{}", ports.start(), ports.end()),
            CaptureWord::Host(network) => write!(f, "host {}", prefix_text(*network)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_written_the_same() {
        for text in [
            "",
            "tcp port 80",
            "udp not port 53",
            "not arp ip6 host fd00::/64",
            "icmp ip host 192.0.2.7 port 1-65535",
        ] {
            let filter: CaptureFilter = text.parse().unwrap();
            assert_eq!(filter.to_string(), text);
            assert_eq!(filter.is_everything(), text.is_empty());
        }
        let spaced: CaptureFilter = "  tcp \t port 80 ".parse().unwrap();
        assert_eq!(spaced.to_string(), "tcp port 80");
    }

    #[test]
    fn what_is_no_filter_is_told_with_what_was_found_and_expected() {
        for (text, expected) in [
            ("tpc", "\"tpc\" is no term of a filter (expected tcp, udp"),
            ("tcp and udp", "\"and\" is no term"),
            ("TCP", "\"TCP\" is no term"),
            ("not", "\"not\" stands alone (expected tcp"),
            ("not not tcp", "\"not\" is no term"),
            ("tcp port", "\"port\" stands alone (expected N or N-M behind it)"),
            ("port 65536", "port \"65536\" is no port"),
            ("port +1", "port \"+1\" is no port"),
            ("port 9-8", "port \"9-8\" is no port"),
            ("port 1-", "port \"1-\" is no port"),
            (
                "host example.com",
                "host: \"example.com\" is not an address or prefix",
            ),
            ("host 10.0.0.0/33", "host: prefix length 33 is out of range"),
            ("host", "\"host\" stands alone"),
            (
                "host 10.0.0.7/8",
                "host: 10.0.0.7/8 has bits set beyond its prefix length (did you mean 10.0.0.0/8?)",
            ),
        ] {
            let error = text.parse::<CaptureFilter>().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_filter_has_limits() {
        let terms = |count| vec!["ip"; count].join(" ");
        assert!(terms(CAPTURE_TERMS_MAX).parse::<CaptureFilter>().is_ok());
        assert_eq!(
            terms(CAPTURE_TERMS_MAX + 1).parse::<CaptureFilter>(),
            Err(CaptureFilterError::Terms)
        );
        let long = " ".repeat(CAPTURE_FILTER_BYTES_MAX + 1);
        assert!(matches!(
            long.parse::<CaptureFilter>(),
            Err(CaptureFilterError::Length { .. })
        ));
    }
}
