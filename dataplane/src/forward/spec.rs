//! The text of a forward, as `-p HOST:GUEST` takes it (the form of `docker run -p`).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use vnet_proto::model::Protocol;

use crate::message::Forward;

/// A forward as a person writes it. The guest's address may be left out; it is then filled in by
/// whoever knows the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardSpec {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Address and port on the host; port 0 for any that is free.
    pub listen: SocketAddr,
    /// Address in the network; `None` for the first guest's.
    pub guest: Option<IpAddr>,
    /// Port in the guest.
    pub guest_port: u16,
}

impl ForwardSpec {
    /// The forward, into `first_guest` where the text names no address.
    pub fn into_forward(self, first_guest: IpAddr) -> Forward {
        Forward {
            protocol: self.protocol,
            listen: self.listen,
            target: SocketAddr::new(self.guest.unwrap_or(first_guest), self.guest_port),
        }
    }
}

/// Why a text is not a forward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardSpecError {
    /// Not of the form at all.
    #[error("{0:?} is not a forward (expected [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp], as 8080:80)")]
    Form(String),
    /// The part after the slash.
    #[error("{found:?} in {text:?} is not a protocol that can be forwarded (expected tcp or udp)")]
    Protocol {
        /// The whole.
        text: String,
        /// The part.
        found: String,
    },
    /// A port.
    #[error("{found:?} in {text:?} is not a port (expected {expected})")]
    Port {
        /// The whole.
        text: String,
        /// The part.
        found: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// An address.
    #[error("{found:?} in {text:?} is not an address (expected one as 127.0.0.1 or [::1])")]
    Address {
        /// The whole.
        text: String,
        /// The part.
        found: String,
    },
}

impl std::str::FromStr for ForwardSpec {
    type Err = ForwardSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (sides, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((sides, "tcp")) => (sides, Protocol::Tcp),
            Some((sides, "udp")) => (sides, Protocol::Udp),
            Some((_, found)) => {
                return Err(ForwardSpecError::Protocol {
                    text: text.to_owned(),
                    found: found.to_owned(),
                });
            }
        };
        let parts = split(sides).ok_or_else(|| ForwardSpecError::Form(text.to_owned()))?;
        let address = |part: &str| parse_address(text, part);
        let (listen, port, guest, guest_port) = match parts[..] {
            [port, guest_port] => (DEFAULT_LISTEN, port, None, guest_port),
            // Three parts: a port cannot be an address nor an address a port, so either reading is plain.
            [first, second, guest_port] if is_port(first) => {
                (DEFAULT_LISTEN, first, Some(address(second)?), guest_port)
            }
            [listen, port, guest_port] => (address(listen)?, port, None, guest_port),
            [listen, port, guest, guest_port] => (address(listen)?, port, Some(address(guest)?), guest_port),
            _ => return Err(ForwardSpecError::Form(text.to_owned())),
        };
        Ok(Self {
            protocol,
            listen: SocketAddr::new(listen, parse_port(text, port, "0 to 65535")?),
            guest,
            guest_port: match parse_port(text, guest_port, "1 to 65535")? {
                0 => return Err(port_error(text, guest_port, "1 to 65535")),
                port => port,
            },
        })
    }
}

/// Splits at colons outside brackets; `None` when brackets do not pair or a part is empty.
fn split(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        let end = if rest.starts_with('[') {
            rest.find(']')? + 1
        } else {
            rest.find(':').unwrap_or(rest.len())
        };
        let (part, tail) = rest.split_at(end);
        if part.is_empty() {
            return None;
        }
        parts.push(part);
        match tail.strip_prefix(':') {
            Some(next) => rest = next,
            None if tail.is_empty() => return Some(parts),
            None => return None,
        }
    }
}

fn is_port(part: &str) -> bool {
    part.bytes().all(|b| b.is_ascii_digit())
}

fn parse_address(text: &str, part: &str) -> Result<IpAddr, ForwardSpecError> {
    let bare = part.strip_prefix('[').and_then(|p| p.strip_suffix(']'));
    let parsed = match bare {
        Some(v6) => v6.parse().ok().map(IpAddr::V6),
        None => part.parse().ok().map(IpAddr::V4),
    };
    parsed.ok_or_else(|| ForwardSpecError::Address {
        text: text.to_owned(),
        found: part.to_owned(),
    })
}

fn parse_port(text: &str, part: &str, expected: &'static str) -> Result<u16, ForwardSpecError> {
    // `parse` would take a leading plus sign.
    part.parse()
        .ok()
        .filter(|_| is_port(part))
        .ok_or_else(|| port_error(text, part, expected))
}

fn port_error(text: &str, part: &str, expected: &'static str) -> ForwardSpecError {
    ForwardSpecError::Port {
        text: text.to_owned(),
        found: part.to_owned(),
        expected,
    }
}

/// Where a forward listens unless it says: nowhere that the network reaches.
const DEFAULT_LISTEN: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        text.parse::<ForwardSpec>()
            .map(|spec| {
                let guest = spec.guest.map_or_else(|| "first".to_owned(), |g| g.to_string());
                format!("{} {} -> {guest} {}", spec.protocol, spec.listen, spec.guest_port)
            })
            .map_err(|e| e.to_string())
    }

    #[test]
    fn good_texts_mean_what_docker_means() {
        for (text, meaning) in [
            ("8080:80", "tcp 127.0.0.1:8080 -> first 80"),
            ("0:80", "tcp 127.0.0.1:0 -> first 80"),
            ("8080:80/tcp", "tcp 127.0.0.1:8080 -> first 80"),
            ("5353:53/udp", "udp 127.0.0.1:5353 -> first 53"),
            ("0.0.0.0:8080:80", "tcp 0.0.0.0:8080 -> first 80"),
            ("[::1]:8080:80", "tcp [::1]:8080 -> first 80"),
            ("8080:192.168.127.3:80", "tcp 127.0.0.1:8080 -> 192.168.127.3 80"),
            (
                "127.0.0.2:8080:192.168.127.3:80/udp",
                "udp 127.0.0.2:8080 -> 192.168.127.3 80",
            ),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(meaning), "{text}");
        }
    }

    #[test]
    fn bad_texts_are_refused_with_what_was_found() {
        let form = "is not a forward (expected [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp], as 8080:80)";
        for (text, message) in [
            ("8080", format!("\"8080\" {form}")),
            ("", format!("\"\" {form}")),
            ("8080:", format!("\"8080:\" {form}")),
            ("[::1:8080:80", format!("\"[::1:8080:80\" {form}")),
            ("1:2:3:4:5", format!("\"1:2:3:4:5\" {form}")),
            (
                "8080:80/sctp",
                "\"sctp\" in \"8080:80/sctp\" is not a protocol that can be forwarded (expected tcp or udp)"
                    .to_owned(),
            ),
            (
                "70000:80",
                "\"70000\" in \"70000:80\" is not a port (expected 0 to 65535)".to_owned(),
            ),
            (
                "+80:80",
                "\"+80\" in \"+80:80\" is not a port (expected 0 to 65535)".to_owned(),
            ),
            (
                "80:0",
                "\"0\" in \"80:0\" is not a port (expected 1 to 65535)".to_owned(),
            ),
            (
                "localhost:80:80",
                "\"localhost\" in \"localhost:80:80\" is not an address (expected one as 127.0.0.1 or [::1])"
                    .to_owned(),
            ),
        ] {
            assert_eq!(parse(text), Err(message), "{text}");
        }
    }
}
