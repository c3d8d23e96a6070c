//! The text of a forward, as `-p HOST:GUEST` takes it (the form of `docker run -p`, and more).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use vnet_proto::model::{ForwardListen, ForwardListenError, Protocol};

use crate::forward::FORWARDS_MAX;
use crate::message::Forward;

/// A forward as a person writes it, or a range of them. The guest's address may be left out; it is then filled in by
/// whoever knows the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardSpec {
    /// TCP or UDP; of a Unix socket, TCP.
    pub protocol: Protocol,
    /// Where on the host, of a range the first; port 0 for any that is free.
    pub listen: ForwardListen,
    /// Address in the network; `None` for the first guest's.
    pub guest: Option<IpAddr>,
    /// Port in the guest, of a range the first.
    pub guest_port: u16,
    /// How many ports, on both sides; at least 1.
    pub count: u16,
    /// The guest sees clients by their own addresses, where that can be.
    pub keep_client: bool,
}

impl ForwardSpec {
    /// The forward, or the first of the range, into `first_guest` where the text names no address.
    pub fn first(&self, first_guest: IpAddr) -> Forward {
        Forward {
            protocol: self.protocol,
            listen: self.listen.clone(),
            target: SocketAddr::new(self.guest.unwrap_or(first_guest), self.guest_port),
            keep_client: self.keep_client,
            asked_by: String::new(),
            grant_id: String::new(),
        }
    }

    /// Every forward of it.
    pub fn forwards(&self, first_guest: IpAddr) -> impl Iterator<Item = Forward> {
        let first = self.first(first_guest);
        // What was read has all of its ports.
        (0..self.count).filter_map(move |port| first.further(port))
    }
}

/// Why a text is not a forward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardSpecError {
    /// Not of the form at all.
    #[error(
        "{0:?} is not a forward (expected [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp][+client], as 8080:80, or unix:///PATH:[GUEST:]PORT)"
    )]
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
    /// A range that is none.
    #[error(
        "{found:?} in {text:?} is not a range of ports (expected FIRST-LAST in order, from port 1 on, at most {FORWARDS_MAX} of them)"
    )]
    Range {
        /// The whole.
        text: String,
        /// The part.
        found: String,
    },
    /// Ranges of different lengths.
    #[error(
        "{text:?} has {listen} ports on the host and {guest} in the guest (expected as many on both sides)"
    )]
    Lengths {
        /// The whole.
        text: String,
        /// Ports on the host.
        listen: u16,
        /// Ports in the guest.
        guest: u16,
    },
    /// An address.
    #[error("{found:?} in {text:?} is not an address (expected one as 127.0.0.1 or [::1])")]
    Address {
        /// The whole.
        text: String,
        /// The part.
        found: String,
    },
    /// The path of a Unix socket.
    #[error("{text:?} is not a forward")]
    Path {
        /// The whole.
        text: String,
        /// Why.
        #[source]
        source: ForwardListenError,
    },
    /// What a Unix socket cannot be asked for.
    #[error("{text:?} asks for {what}, which a Unix socket cannot give; leave it out, or listen on a port")]
    NotOverUnix {
        /// The whole.
        text: String,
        /// What is asked for.
        what: &'static str,
    },
}

impl std::str::FromStr for ForwardSpec {
    type Err = ForwardSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (rest, keep_client) = match text.strip_suffix("+client") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        if rest.starts_with("unix://") {
            return unix(text, rest, keep_client);
        }
        let (sides, protocol) = split_protocol(text, rest)?;
        let parts = split(sides).ok_or_else(|| ForwardSpecError::Form(text.to_owned()))?;
        let address = |part: &str| parse_address(text, part);
        let (listen, ports, guest, guest_ports) = match parts[..] {
            [ports, guest_ports] => (DEFAULT_LISTEN, ports, None, guest_ports),
            // Three parts: a port cannot be an address nor an address a port, so either reading is plain.
            [first, second, guest_ports] if is_port(first) => {
                (DEFAULT_LISTEN, first, Some(address(second)?), guest_ports)
            }
            [listen, ports, guest_ports] => (address(listen)?, ports, None, guest_ports),
            [listen, ports, guest, guest_ports] => {
                (address(listen)?, ports, Some(address(guest)?), guest_ports)
            }
            _ => return Err(ForwardSpecError::Form(text.to_owned())),
        };
        let (port, count) = parse_ports(text, ports, "0 to 65535")?;
        let (guest_port, guest_count) = parse_guest_ports(text, guest_ports)?;
        if count != guest_count {
            return Err(ForwardSpecError::Lengths {
                text: text.to_owned(),
                listen: count,
                guest: guest_count,
            });
        }
        Ok(Self {
            protocol,
            listen: SocketAddr::new(listen, port).into(),
            guest,
            guest_port,
            count,
            keep_client,
        })
    }
}

/// Reads `unix:///PATH:[GUEST:]PORT`, from its end: a path may have colons.
fn unix(text: &str, rest: &str, keep_client: bool) -> Result<ForwardSpec, ForwardSpecError> {
    let form = || ForwardSpecError::Form(text.to_owned());
    let refused = |what| ForwardSpecError::NotOverUnix {
        text: text.to_owned(),
        what,
    };
    let (place, tail) = rest
        .rsplit_once(':')
        .filter(|(_, tail)| !tail.starts_with('/'))
        .ok_or_else(form)?;
    let (guest_port, protocol) = split_protocol(text, tail)?;
    if protocol != Protocol::Tcp {
        return Err(refused("udp"));
    }
    if keep_client {
        return Err(refused("the client's address"));
    }
    let (guest_port, count) = parse_guest_ports(text, guest_port)?;
    if count != 1 {
        return Err(refused("a range of ports"));
    }
    let (place, guest) = match place.rsplit_once(':') {
        // `[` and `]` have no other place in a URL, so that an IPv6 address is found whole.
        _ if place.ends_with(']') => {
            let (place, guest) = place.rsplit_once(":[").ok_or_else(form)?;
            (place, Some(parse_address(text, &format!("[{guest}"))?))
        }
        Some((before, last)) => match last.parse() {
            Ok(v4) => (before, Some(IpAddr::V4(v4))),
            Err(_) => (place, None),
        },
        None => return Err(form()),
    };
    let listen = place.parse().map_err(|source| ForwardSpecError::Path {
        text: text.to_owned(),
        source,
    })?;
    Ok(ForwardSpec {
        protocol,
        listen,
        guest,
        guest_port,
        count,
        keep_client,
    })
}

fn split_protocol<'a>(text: &str, rest: &'a str) -> Result<(&'a str, Protocol), ForwardSpecError> {
    match rest.rsplit_once('/') {
        None => Ok((rest, Protocol::Tcp)),
        Some((sides, "tcp")) => Ok((sides, Protocol::Tcp)),
        Some((sides, "udp")) => Ok((sides, Protocol::Udp)),
        Some((_, found)) => Err(ForwardSpecError::Protocol {
            text: text.to_owned(),
            found: found.to_owned(),
        }),
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

/// Whether it is a port or a range of them, and no address.
fn is_port(part: &str) -> bool {
    part.bytes().all(|b| b.is_ascii_digit() || b == b'-')
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

/// Reads `PORT` or `FIRST-LAST`: the first, and how many.
fn parse_ports(text: &str, part: &str, expected: &'static str) -> Result<(u16, u16), ForwardSpecError> {
    // `parse` would take a leading plus sign.
    let port = |part: &str| {
        part.parse()
            .ok()
            .filter(|_| part.bytes().all(|b| b.is_ascii_digit()))
            .ok_or_else(|| port_error(text, part, expected))
    };
    let Some((first, last)) = part.split_once('-') else {
        return Ok((port(part)?, 1));
    };
    let (first, last): (u16, u16) = (port(first)?, port(last)?);
    let count = last.checked_sub(first).map(|more| usize::from(more) + 1);
    count
        .filter(|count| first != 0 && *count <= FORWARDS_MAX)
        .and_then(|count| u16::try_from(count).ok())
        .map(|count| (first, count))
        .ok_or_else(|| ForwardSpecError::Range {
            text: text.to_owned(),
            found: part.to_owned(),
        })
}

fn parse_guest_ports(text: &str, part: &str) -> Result<(u16, u16), ForwardSpecError> {
    const EXPECTED: &str = "1 to 65535";
    match parse_ports(text, part, EXPECTED)? {
        (0, _) => Err(port_error(text, part, EXPECTED)),
        ports => Ok(ports),
    }
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
                let count = if spec.count == 1 {
                    String::new()
                } else {
                    format!(" x{}", spec.count)
                };
                let client = if spec.keep_client { " client" } else { "" };
                let (listen, port) = (&spec.listen, spec.guest_port);
                format!("{} {listen} -> {guest} {port}{count}{client}", spec.protocol)
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
            ("[::]:8080:[fd00::2]:80", "tcp [::]:8080 -> fd00::2 80"),
            ("8080:80+client", "tcp 127.0.0.1:8080 -> first 80 client"),
            ("0.0.0.0:53:53/udp+client", "udp 0.0.0.0:53 -> first 53 client"),
            ("8000-8010:9000-9010", "tcp 127.0.0.1:8000 -> first 9000 x11"),
            ("8000-8000:80", "tcp 127.0.0.1:8000 -> first 80"),
            (
                "0.0.0.0:1024-2047:192.168.127.3:64512-65535/udp",
                "udp 0.0.0.0:1024 -> 192.168.127.3 64512 x1024",
            ),
            ("unix:///run/web.sock:80", "tcp unix:///run/web.sock -> first 80"),
            (
                "unix:///run/web.sock:80/tcp",
                "tcp unix:///run/web.sock -> first 80",
            ),
            (
                "unix:///run/web.sock:192.168.127.3:80",
                "tcp unix:///run/web.sock -> 192.168.127.3 80",
            ),
            (
                "unix:///run/web.sock:[fd00::2]:80",
                "tcp unix:///run/web.sock -> fd00::2 80",
            ),
            ("unix:///run/a:b%20c:80", "tcp unix:///run/a:b%20c -> first 80"),
            (
                "unix:///run/192.168.127.3%3A80:80",
                "tcp unix:///run/192.168.127.3:80 -> first 80",
            ),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(meaning), "{text}");
        }
    }

    #[test]
    fn bad_texts_are_refused_with_what_was_found() {
        let form = "is not a forward (expected [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp][+client], as 8080:80, or \
                    unix:///PATH:[GUEST:]PORT)";
        let range =
            "is not a range of ports (expected FIRST-LAST in order, from port 1 on, at most 1024 of them)";
        let over_unix = "which a Unix socket cannot give; leave it out, or listen on a port";
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
            (
                "8010-8000:8010-8000",
                format!("\"8010-8000\" in \"8010-8000:8010-8000\" {range}"),
            ),
            ("0-9:1-10", format!("\"0-9\" in \"0-9:1-10\" {range}")),
            (
                "1-1025:1-1025",
                format!("\"1-1025\" in \"1-1025:1-1025\" {range}"),
            ),
            (
                "80-81-82:80-81-82",
                "\"81-82\" in \"80-81-82:80-81-82\" is not a port (expected 0 to 65535)".to_owned(),
            ),
            (
                "8000-8010:80",
                "\"8000-8010:80\" has 11 ports on the host and 1 in the guest (expected as many on both sides)"
                    .to_owned(),
            ),
            ("unix:///run/web.sock", format!("\"unix:///run/web.sock\" {form}")),
            (
                "unix:///a:80/udp",
                format!("\"unix:///a:80/udp\" asks for udp, {over_unix}"),
            ),
            (
                "unix:///a:80+client",
                format!("\"unix:///a:80+client\" asks for the client's address, {over_unix}"),
            ),
            (
                "unix:///a:80-81",
                format!("\"unix:///a:80-81\" asks for a range of ports, {over_unix}"),
            ),
            ("unix://a:80", "\"unix://a:80\" is not a forward".to_owned()),
            (
                "8080:80+server",
                "\"80+server\" in \"8080:80+server\" is not a port (expected 1 to 65535)".to_owned(),
            ),
        ] {
            assert_eq!(parse(text), Err(message), "{text}");
        }
    }
}
