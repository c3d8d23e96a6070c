//! The URLs of sockets, as `-listen` and its kin take them, and `host:port`.
//!
//! A small strict reader rather than a general one: gvproxy's lets through users, hosts before a path, parameters and
//! fragments, and then listens somewhere else than it says.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A stream socket at a path.
    Unix(PathBuf),
    /// A sequenced-packet socket at a path.
    UnixPacket(PathBuf),
    /// A datagram socket at a path.
    UnixGram(PathBuf),
    /// TCP.
    Tcp(HostPort),
    /// AF_VSOCK, which guests reach.
    Vsock {
        /// The context id to listen at; `None` for any.
        cid: Option<u32>,
        /// The port.
        port: u32,
    },
}

/// A host and a port, not yet looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// An address without brackets, a name, or empty for every address of the host.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What is wrong with a host and a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostPortError {
    /// Neither form.
    #[error("expected a host and a port, as tcp://127.0.0.1:1234")]
    Form,
    /// A host alone.
    #[error("the port is missing; write it behind the host, as tcp://{0}:1234")]
    NoPort(String),
    /// A number that is no port.
    #[error("port {0} is out of range (expected 0 to 65535, 0 for any that is free)")]
    Port(String),
}

/// Which URLs are taken somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schemes {
    /// Streams: `unix`, `tcp` and `vsock`.
    Stream,
    /// `unixpacket`.
    Packet,
    /// `unixgram`.
    Datagram,
    /// `unix`.
    Unix,
}

/// What is wrong with a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// No scheme, or one that is not taken here.
    #[error("expected {0}")]
    Scheme(&'static str),
    /// No absolute path.
    #[error("the path must be absolute, as in {0}:///run/vm.sock")]
    Path(&'static str),
    /// Longer than a socket address holds.
    #[error("the path is {0} bytes long (at most {PATH_BYTES_MAX}); use a shorter one")]
    LongPath(usize),
    /// A `%` without two hexadecimal digits, or bytes that no path has.
    #[error("a % must stand before two hexadecimal digits (write % itself as %25)")]
    Escape,
    /// `?` or `#`.
    #[error("it takes no parameters (write ? as %3F and # as %23 in a path)")]
    Parameters,
    /// Not a host and a port.
    #[error("{0}")]
    HostPort(HostPortError),
    /// Not a context id and a port.
    #[error("expected a port, and a context id before it or none, as vsock://:1024 or vsock://2:1024")]
    Vsock,
}

impl Schemes {
    fn expected(self) -> &'static str {
        match self {
            Self::Stream => "unix:///PATH, tcp://HOST:PORT or vsock://[CID]:PORT",
            Self::Packet => "unixpacket:///PATH",
            Self::Datagram => "unixgram:///PATH",
            Self::Unix => "unix:///PATH",
        }
    }
}

impl Endpoint {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, schemes: Schemes) -> Result<Self, EndpointError> {
        let (scheme, rest) = text
            .split_once(':')
            .ok_or(EndpointError::Scheme(schemes.expected()))?;
        let scheme = scheme.to_ascii_lowercase();
        if rest.contains(['?', '#']) {
            return Err(EndpointError::Parameters);
        }
        match (&*scheme, schemes) {
            ("unix", Schemes::Stream | Schemes::Unix) => socket_path("unix", rest).map(Self::Unix),
            ("unixpacket", Schemes::Packet) => socket_path("unixpacket", rest).map(Self::UnixPacket),
            ("unixgram", Schemes::Datagram) => socket_path("unixgram", rest).map(Self::UnixGram),
            ("tcp", Schemes::Stream) => {
                let host_port = rest
                    .strip_prefix("//")
                    .map(|rest| rest.strip_suffix('/').unwrap_or(rest));
                host_port
                    .ok_or(HostPortError::Form)
                    .and_then(HostPort::parse)
                    .map(Self::Tcp)
                    .map_err(EndpointError::HostPort)
            }
            ("vsock", Schemes::Stream) => vsock(rest).ok_or(EndpointError::Vsock),
            _ => Err(EndpointError::Scheme(schemes.expected())),
        }
    }

    /// The path, where it has one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) | Self::UnixPacket(path) | Self::UnixGram(path) => Some(path),
            Self::Tcp(_) | Self::Vsock { .. } => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::UnixPacket(path) => write!(f, "unixpacket://{}", path.display()),
            Self::UnixGram(path) => write!(f, "unixgram://{}", path.display()),
            Self::Tcp(at) => write!(f, "tcp://{at}"),
            Self::Vsock { cid: Some(cid), port } => write!(f, "vsock://{cid}:{port}"),
            Self::Vsock { cid: None, port } => write!(f, "vsock://:{port}"),
        }
    }
}

impl HostPort {
    /// Reads `HOST:PORT`, `[ADDRESS]:PORT` or `:PORT`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, HostPortError> {
        let host = |host: &str| match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => Some(address.parse::<std::net::Ipv6Addr>().ok()?.to_string()),
            None => (host.is_empty() || is_host(host)).then(|| host.to_owned()),
        };
        let Some((before, port)) = text.rsplit_once(':') else {
            // A number alone is a port, or a host; what is meant is not known.
            let is_host = !text.is_empty() && host(text).is_some() && decimal::<u64>(text).is_none();
            return Err(match is_host {
                true => HostPortError::NoPort(text.to_owned()),
                false => HostPortError::Form,
            });
        };
        let host = host(before).ok_or(HostPortError::Form)?;
        match decimal(port) {
            Some(port) => Ok(Self { host, port }),
            None if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
                Err(HostPortError::Port(port.to_owned()))
            }
            None if port.is_empty() && !host.is_empty() => Err(HostPortError::NoPort(before.to_owned())),
            None => Err(HostPortError::Form),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A path of a socket that can be bound.
pub(super) fn socket_path(scheme: &'static str, rest: &str) -> Result<PathBuf, EndpointError> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err(EndpointError::Path(scheme));
    }
    let path = unescape(path)?;
    check_length(path.len())?;
    Ok(path.into())
}

/// Whether a socket's address holds a path of so many bytes.
pub(super) fn check_length(bytes: usize) -> Result<(), EndpointError> {
    if bytes > PATH_BYTES_MAX {
        return Err(EndpointError::LongPath(bytes));
    }
    Ok(())
}

fn unescape(path: &str) -> Result<String, EndpointError> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(EndpointError::Escape);
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| EndpointError::Escape)?);
    }
    if bytes.contains(&0) {
        return Err(EndpointError::Escape);
    }
    String::from_utf8(bytes).map_err(|_| EndpointError::Escape)
}

fn vsock(rest: &str) -> Option<Endpoint> {
    let (cid, port) = rest.strip_prefix("//")?.split_once(':')?;
    let cid = if cid.is_empty() { None } else { Some(decimal(cid)?) };
    let port = decimal(port)?;
    Some(Endpoint::Vsock { cid, port })
}

/// `parse` would take a leading plus sign.
fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    let is_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_digits)
}

fn is_host(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    text.len() <= HOST_BYTES_MAX && text.chars().all(is_letter)
}

/// What `sun_path` holds beside its closing zero (unix(7), and unix(4) of macOS).
const PATH_BYTES_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };
/// A DNS name in text (RFC 1035 §2.3.4).
const HOST_BYTES_MAX: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, schemes: Schemes) -> String {
        match Endpoint::parse(text, schemes) {
            Ok(endpoint) => endpoint.to_string(),
            Err(error) => format!("{error}"),
        }
    }

    #[test]
    fn urls_mean_what_they_mean_to_the_peer() {
        for (text, meant) in [
            ("unix:///tmp/a.sock", "unix:///tmp/a.sock"),
            ("UNIX:/tmp/a.sock", "unix:///tmp/a.sock"),
            ("unix:///tmp/a%20b%25", "unix:///tmp/a b%"),
            ("tcp://127.0.0.1:1234", "tcp://127.0.0.1:1234"),
            ("tcp://:80/", "tcp://:80"),
            ("tcp://[0:0::1]:80", "tcp://[::1]:80"),
            ("tcp://localhost:0", "tcp://localhost:0"),
            ("vsock://:1024", "vsock://:1024"),
            ("vsock://4294967295:1024", "vsock://4294967295:1024"),
        ] {
            assert_eq!(shown(text, Schemes::Stream), meant, "{text}");
        }
    }

    #[test]
    fn what_would_listen_elsewhere_than_it_says_is_refused() {
        let path = "the path must be absolute, as in unix:///run/vm.sock";
        let host = "expected a host and a port, as tcp://127.0.0.1:1234";
        let vsock = "expected a port, and a context id before it or none, as vsock://:1024 or vsock://2:1024";
        for (text, problem) in [
            ("unix://tmp/a.sock", path),
            ("unix:a.sock", path),
            ("unix:", path),
            (
                "unix:///a?x=1",
                "it takes no parameters (write ? as %3F and # as %23 in a path)",
            ),
            (
                "unix:///%2",
                "a % must stand before two hexadecimal digits (write % itself as %25)",
            ),
            (
                "unix:///%00",
                "a % must stand before two hexadecimal digits (write % itself as %25)",
            ),
            ("tcp:127.0.0.1:1", host),
            ("tcp://127.0.0.1:+1", host),
            ("tcp://", host),
            ("tcp://1234", host),
            (
                "tcp://0.0.0.0",
                "the port is missing; write it behind the host, as tcp://0.0.0.0:1234",
            ),
            (
                "tcp://[::1]:",
                "the port is missing; write it behind the host, as tcp://[::1]:1234",
            ),
            (
                "tcp://127.0.0.1:65536",
                "port 65536 is out of range (expected 0 to 65535, 0 for any that is free)",
            ),
            (
                "tcp://:99999",
                "port 99999 is out of range (expected 0 to 65535, 0 for any that is free)",
            ),
            ("tcp://::1:80", host),
            ("tcp://a@b:80", host),
            ("tcp://a:80/x", host),
            ("vsock://2", vsock),
            ("vsock://x:1", vsock),
            ("vsock://:4294967296", vsock),
        ] {
            assert_eq!(shown(text, Schemes::Stream), problem, "{text}");
        }
        let long = format!("unix:///{}", "a".repeat(PATH_BYTES_MAX));
        assert_eq!(
            Endpoint::parse(&long, Schemes::Unix),
            Err(EndpointError::LongPath(PATH_BYTES_MAX + 1))
        );
        assert!(Endpoint::parse(&long[..long.len() - 1], Schemes::Unix).is_ok());
    }

    #[test]
    fn each_place_takes_its_schemes() {
        let all = [
            "unix:///a",
            "unixpacket:///a",
            "unixgram:///a",
            "tcp://:1",
            "vsock://:1",
            "http://a",
            "/a",
        ];
        for (schemes, taken) in [
            (Schemes::Stream, &[0, 3, 4][..]),
            (Schemes::Packet, &[1]),
            (Schemes::Datagram, &[2]),
            (Schemes::Unix, &[0]),
        ] {
            for (index, text) in all.iter().enumerate() {
                let parsed = Endpoint::parse(text, schemes);
                if taken.contains(&index) {
                    assert!(parsed.is_ok(), "{schemes:?} {text}");
                } else {
                    assert_eq!(
                        parsed,
                        Err(EndpointError::Scheme(schemes.expected())),
                        "{schemes:?} {text}"
                    );
                }
            }
        }
    }
}
