//! Where a forward listens: an address and port of the host, or a Unix socket in its file system.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Protocol;

/// Where a forward listens. Its text is `127.0.0.1:8080`, `[::1]:8080` or `unix:///run/web.sock`; in a path, what
/// means something else in a URL is percent-encoded.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ForwardListen {
    /// An address and port. Port 0, before it is opened, is any that is free.
    Address(SocketAddr),
    /// An absolute path, of a stream socket.
    Unix(PathBuf),
}

/// Why a text says nowhere to listen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardListenError {
    /// Neither form.
    #[error(
        "{0:?} is not where a forward can listen (expected ADDRESS:PORT, as 127.0.0.1:8080, or unix:///PATH)"
    )]
    Form(String),
    /// Not an absolute path.
    #[error("the path in {0:?} is not absolute (expected one as unix:///run/web.sock)")]
    RelativePath(String),
    /// It names a directory.
    #[error("the path in {0:?} names no file")]
    NoFile(String),
    /// A `%` without two hex digits, or a decoded zero byte or text that is not UTF-8.
    #[error("{0:?} is not percent-encoded text (write % as %25, ? as %3F)")]
    Encoding(String),
    /// A parameter, of which there is none.
    #[error("{0:?} has a parameter, and a forward's path takes none (write ? in a path as %3F)")]
    Parameter(String),
    /// Longer than a socket address holds.
    #[error("the path in {text:?} is {found} bytes long, and a socket's may have {limit}; use a shorter one")]
    LongPath {
        /// The whole.
        text: String,
        /// What was found.
        found: usize,
        /// What the host takes.
        limit: usize,
    },
}

/// Why a protocol and a place to listen do not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be forwarded from a Unix socket (expected tcp)")]
pub struct NotOverUnix(pub Protocol);

impl ForwardListen {
    /// The port, of an address.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Address(address) => Some(address.port()),
            Self::Unix(_) => None,
        }
    }

    /// The path, of a Unix socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Address(_) => None,
            Self::Unix(path) => Some(path),
        }
    }

    /// The same address, so many ports further; `None` for a path, or where there is no such port. Port 0 stands for
    /// any port, so that nothing follows it.
    pub fn further(&self, ports: u16) -> Option<Self> {
        match self {
            _ if ports == 0 => Some(self.clone()),
            Self::Address(address) if address.port() != 0 => {
                let port = address.port().checked_add(ports)?;
                let mut further = *address;
                further.set_port(port);
                Some(Self::Address(further))
            }
            Self::Address(_) | Self::Unix(_) => None,
        }
    }

    /// Whether this protocol can be taken here.
    ///
    /// # Errors
    /// [`NotOverUnix`]: only streams pass through a Unix socket.
    pub fn check(&self, protocol: Protocol) -> Result<(), NotOverUnix> {
        match self {
            Self::Unix(_) if protocol != Protocol::Tcp => Err(NotOverUnix(protocol)),
            _ => Ok(()),
        }
    }

    /// Whether two that are of one protocol would be in each other's way.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unix(one), Self::Unix(other)) => one == other,
            (Self::Address(one), Self::Address(other)) => {
                one.port() == other.port()
                    && one.is_ipv4() == other.is_ipv4()
                    && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
            }
            _ => false,
        }
    }
}

impl From<SocketAddr> for ForwardListen {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl FromStr for ForwardListen {
    type Err = ForwardListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(path) = text.strip_prefix("unix://") else {
            let address: SocketAddr = text
                .parse()
                .map_err(|_| ForwardListenError::Form(text.to_owned()))?;
            // An IPv6 spelling of an IPv4 address is that address.
            return Ok(Self::Address(match (address, address.ip().to_canonical()) {
                (SocketAddr::V6(_), IpAddr::V4(v4)) => SocketAddr::new(v4.into(), address.port()),
                _ => address,
            }));
        };
        if !path.starts_with('/') {
            return Err(ForwardListenError::RelativePath(text.to_owned()));
        }
        if path.contains('?') {
            return Err(ForwardListenError::Parameter(text.to_owned()));
        }
        let path = percent_decode(path).ok_or_else(|| ForwardListenError::Encoding(text.to_owned()))?;
        if path.ends_with('/') {
            return Err(ForwardListenError::NoFile(text.to_owned()));
        }
        if path.len() > SOCKET_PATH_BYTES_MAX {
            return Err(ForwardListenError::LongPath {
                text: text.to_owned(),
                found: path.len(),
                limit: SOCKET_PATH_BYTES_MAX,
            });
        }
        Ok(Self::Unix(path.into()))
    }
}

impl fmt::Display for ForwardListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Unix(path) => {
                f.write_str("unix://")?;
                // One that was read is UTF-8.
                for character in path.to_string_lossy().chars() {
                    match character {
                        '%' | '?' | '#' | ' ' => write!(f, "%{:02X}", u32::from(character))?,
                        c if c.is_ascii_control() => write!(f, "%{:02X}", u32::from(c))?,
                        c => fmt::Write::write_char(f, c)?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// A forward that a VM asks for itself: a port of the host's loopback that leads to a port of its own. Its text is
/// that of `-p`: `127.0.0.1:8080:80/tcp`, `[::1]:53:5353/udp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ForwardTarget {
    protocol: Protocol,
    listen: SocketAddr,
    guest_port: u16,
}

/// Why something is no forward that a VM may ask for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardTargetError {
    /// Not of the form at all.
    #[error("{0:?} is not a forward (expected ADDRESS:PORT:PORT/PROTOCOL, as 127.0.0.1:8080:80/tcp)")]
    Form(String),
    /// Neither TCP nor UDP.
    #[error("{0} cannot be forwarded (expected tcp or udp)")]
    Protocol(Protocol),
    /// An address that others than the host reach, or none of the host's.
    #[error(
        "{0} is not an address of loopback, where alone a VM may open a port (expected 127.0.0.1 or [::1])"
    )]
    NotLoopback(IpAddr),
    /// Port 0, which stands for any.
    #[error("port 0 stands for any port (expected 1 to 65535)")]
    NoPort,
}

impl ForwardTarget {
    /// Checks one.
    ///
    /// # Errors
    /// [`ForwardTargetError`]; an IPv6 spelling of an IPv4 address is that address.
    pub fn new(protocol: Protocol, listen: SocketAddr, guest_port: u16) -> Result<Self, ForwardTargetError> {
        let address = listen.ip().to_canonical();
        if !protocol.has_ports() {
            return Err(ForwardTargetError::Protocol(protocol));
        }
        if !address.is_loopback() {
            return Err(ForwardTargetError::NotLoopback(address));
        }
        if listen.port() == 0 || guest_port == 0 {
            return Err(ForwardTargetError::NoPort);
        }
        Ok(Self {
            protocol,
            listen: SocketAddr::new(address, listen.port()),
            guest_port,
        })
    }

    /// TCP or UDP.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Where on the host: an address of loopback, and a port that is not 0.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// The VM's port; not 0.
    pub fn guest_port(&self) -> u16 {
        self.guest_port
    }

    /// What a VM asks, in words: `to open tcp 127.0.0.1:8080 to its port 80`.
    pub fn in_words(&self) -> String {
        let Self {
            protocol,
            listen,
            guest_port,
        } = self;
        format!("to open {protocol} {listen} to its port {guest_port}")
    }
}

impl fmt::Display for ForwardTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.listen, self.guest_port, self.protocol)
    }
}

impl FromStr for ForwardTarget {
    type Err = ForwardTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || ForwardTargetError::Form(text.to_owned());
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (listen, guest_port) = ports.rsplit_once(':').ok_or_else(form)?;
        Self::new(
            protocol.parse().map_err(|_| form())?,
            listen.parse().map_err(|_| form())?,
            guest_port.parse().map_err(|_| form())?,
        )
    }
}

/// Percent-encoded text, decoded; `None` where a `%` has no two hex digits, or the bytes are not UTF-8 or hold a
/// zero.
pub fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let digits = tail.get(..2).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
            let digits = std::str::from_utf8(digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    if bytes.contains(&0) {
        return None;
    }
    String::from_utf8(bytes).ok()
}

/// Bytes of a path in a socket address, its final zero not counted (unix(7)).
#[cfg(target_os = "linux")]
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Bytes of a path in a socket address, its final zero not counted.
#[cfg(not(target_os = "linux"))]
pub const SOCKET_PATH_BYTES_MAX: usize = 103;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ForwardListen {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_written_is_what_was_read() {
        for text in [
            "127.0.0.1:8080",
            "[::1]:8080",
            "0.0.0.0:0",
            "[::]:53",
            "unix:///run/web.sock",
            "unix:///run/a%20b%25c%3Fd%0A.sock",
            "unix:///run/ü:192.168.127.2:80",
        ] {
            assert_eq!(read(text).to_string(), text);
        }
        assert_eq!(
            read("unix:///run/a%20b").path(),
            Some(Path::new("/run/a b")),
            "decoded"
        );
        assert_eq!(
            read("[::ffff:127.0.0.1]:80").to_string(),
            "127.0.0.1:80",
            "one address has one text"
        );
    }

    #[test]
    fn what_nothing_can_listen_on_is_refused_with_what_was_found() {
        let long = format!("unix:///{}", "a".repeat(SOCKET_PATH_BYTES_MAX));
        for (text, message) in [
            ("", "is not where a forward can listen"),
            ("8080", "expected ADDRESS:PORT"),
            ("localhost:80", "expected ADDRESS:PORT"),
            ("unix://run/web.sock", "is not absolute"),
            ("unix:///run/", "names no file"),
            ("unix:///run/%", "is not percent-encoded"),
            ("unix:///run/%00", "is not percent-encoded"),
            ("unix:///run/%ff", "is not percent-encoded"),
            ("unix:///run/a?mode=0666", "takes none"),
            (&long, "use a shorter one"),
        ] {
            let error = text.parse::<ForwardListen>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn ports_further_on_end_where_ports_do() {
        let first = read("127.0.0.1:65534");
        assert_eq!(first.further(1), Some(read("127.0.0.1:65535")));
        assert_eq!(first.further(2), None);
        assert_eq!(read("127.0.0.1:0").further(1), None);
        assert_eq!(read("unix:///a").further(1), None);
        assert_eq!(read("unix:///a").further(0), Some(read("unix:///a")));
    }

    #[test]
    fn a_forward_that_a_vm_asks_for_is_one_of_loopback_and_reads_back() {
        for text in [
            "127.0.0.1:8080:80/tcp",
            "[::1]:53:5353/udp",
            "127.9.9.9:1:65535/tcp",
        ] {
            assert_eq!(text.parse::<ForwardTarget>().unwrap().to_string(), text);
        }
        let read = |text: &str| text.parse::<ForwardTarget>();
        assert_eq!(
            read("[::ffff:127.0.0.1]:8080:80").unwrap().to_string(),
            "127.0.0.1:8080:80/tcp"
        );
        assert_eq!(
            read("127.0.0.1:8080:80/tcp").unwrap().in_words(),
            "to open tcp 127.0.0.1:8080 to its port 80"
        );
        for (text, message) in [
            ("", "is not a forward (expected ADDRESS:PORT:PORT/PROTOCOL"),
            ("8080:80", "is not a forward"),
            ("::1:8080:80", "is not a forward"),
            ("127.0.0.1:8080:99999", "is not a forward"),
            ("127.0.0.1:8080:80/sctp", "is not a forward"),
            ("127.0.0.1:8080:80/icmp", "icmp cannot be forwarded"),
            ("0.0.0.0:8080:80", "0.0.0.0 is not an address of loopback"),
            ("192.0.2.1:8080:80", "is not an address of loopback"),
            ("[::]:8080:80", "is not an address of loopback"),
            (
                "[::ffff:10.0.0.1]:8080:80",
                "10.0.0.1 is not an address of loopback",
            ),
            ("127.0.0.1:0:80", "port 0 stands for any"),
            ("127.0.0.1:80:0", "port 0 stands for any"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn a_wildcard_is_in_the_way_of_its_own_family_only() {
        let overlap = |one: &str, other: &str| read(one).overlaps(&read(other));
        assert!(overlap("0.0.0.0:80", "127.0.0.1:80"));
        assert!(overlap("[::1]:80", "[::]:80"));
        assert!(!overlap("0.0.0.0:80", "[::]:80"));
        assert!(!overlap("127.0.0.1:80", "127.0.0.2:80"));
        assert!(!overlap("0.0.0.0:80", "0.0.0.0:81"));
        assert!(overlap("unix:///a", "unix:///a"));
        assert!(!overlap("unix:///a", "127.0.0.1:80"));
    }
}
