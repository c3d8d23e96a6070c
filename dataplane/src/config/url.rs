//! Listen URLs: `unix:///PATH`, `unixgram:///PATH`, `unixpacket:///PATH`, `tcp://127.0.0.1:PORT`,
//! `vsock://CID:PORT` and `fd://N`, each with `?name=&mac=&ip=`.
//!
//! A small strict reader rather than a general one: a general URL would let through hosts, users and
//! fragments that mean nothing here.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use vnet_proto::model::{SOCKET_PATH_BYTES_MAX, percent_decode};

use crate::config::{nearest, parse_mac};
use crate::mac::Mac;

/// What is wrong with a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// No scheme, or one that is not taken here.
    #[error("expected {expected}")]
    Scheme {
        /// What is taken here.
        expected: &'static str,
    },
    /// Not an absolute path.
    #[error("the path must be absolute, as in {scheme}:///run/vm.sock")]
    RelativePath {
        /// The scheme.
        scheme: &'static str,
    },
    /// Longer than a socket address holds.
    #[error("the path is {found} bytes long, and a socket's may have {limit}; use a shorter one")]
    LongPath {
        /// What was found.
        found: usize,
        /// What the host takes.
        limit: usize,
    },
    /// A `%` without two hex digits, or a decoded zero byte or text that is not UTF-8.
    #[error("{0:?} is not percent-encoded text (write % as %25 and ? as %3F)")]
    Encoding(String),
    /// Not an address and port.
    #[error("expected an address and a port, as tcp://127.0.0.1:4444")]
    TcpAddress,
    /// Not a context and port of vsock.
    #[error("expected a context and a port, as vsock://2:1024, or vsock://:1024 for any context")]
    Vsock,
    /// Not a number.
    #[error("expected the number of an inherited descriptor, as fd://3")]
    Fd,
    /// What only Linux has.
    #[error("{what} is Linux's; here, {instead}")]
    LinuxOnly {
        /// What was asked for.
        what: &'static str,
        /// What does the same.
        instead: String,
    },
    /// An address that others reach.
    #[error("{0} is not a loopback address; guests over TCP are served on loopback only")]
    NotLoopback(SocketAddr),
    /// A parameter that does not exist, with one that does.
    #[error("unknown parameter {found:?} (did you mean {nearest}?)")]
    NearParameter {
        /// What was found.
        found: String,
        /// What was perhaps meant.
        nearest: &'static str,
    },
    /// A parameter that resembles none.
    #[error("unknown parameter {0:?} (expected name, mac or ip)")]
    Parameter(String),
    /// A parameter that stands twice.
    #[error("parameter {0} is given twice")]
    Twice(&'static str),
    /// `mac=` is not a MAC address.
    #[error("mac={0} is not a unicast MAC address (expected one as 5a:94:ef:00:00:02)")]
    Mac(String),
    /// `ip=` is not an IPv4 address.
    #[error("ip={0} is not an IPv4 address (expected one as 192.168.127.2)")]
    Ip(String),
}

/// Where guests connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAt {
    /// A path; stream or datagram as the transport has it.
    Unix(PathBuf),
    /// A loopback address.
    Tcp(SocketAddr),
    /// A port for VMs.
    Vsock {
        /// The context that listens; any of this machine's if left out.
        cid: Option<u32>,
        /// The port.
        port: u32,
    },
    /// Nowhere: this inherited descriptor is connected to a guest.
    Fd(RawFd),
}

impl std::fmt::Display for ListenAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
            Self::Vsock { cid: Some(cid), port } => write!(f, "vsock://{cid}:{port}"),
            Self::Vsock { cid: None, port } => write!(f, "vsock://:{port}"),
            Self::Fd(fd) => write!(f, "fd://{fd}"),
        }
    }
}

/// A listen URL, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListenUrl {
    pub(super) at: ListenAt,
    pub(super) name: Option<String>,
    pub(super) mac: Option<Mac>,
    pub(super) ip: Option<Ipv4Addr>,
}

/// Which schemes a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Schemes {
    /// `unix`, `tcp` and `vsock`.
    Stream,
    /// The same, and `fd`.
    StreamOrFd,
    /// `unixgram` and `fd`.
    Datagram,
    /// `unixpacket` and `fd`.
    Records,
}

impl Schemes {
    fn expected(self) -> &'static str {
        match self {
            Self::Stream => "unix:///PATH, tcp://127.0.0.1:PORT or vsock://CID:PORT",
            Self::StreamOrFd => "unix:///PATH, tcp://127.0.0.1:PORT, vsock://CID:PORT or fd://N",
            Self::Datagram => "unixgram:///PATH or fd://N",
            Self::Records => "unixpacket:///PATH or fd://N",
        }
    }

    /// Reads `scheme://place`. `None` when the scheme is not one of these.
    fn read(self, scheme: &str, place: &str) -> Option<Result<ListenAt, UrlError>> {
        let path = |scheme| socket_path(scheme, place).map(ListenAt::Unix);
        Some(match (scheme, self) {
            ("unix", Self::Stream | Self::StreamOrFd) => path("unix"),
            ("unixgram", Self::Datagram) => path("unixgram"),
            ("unixpacket", Self::Records) => records(path("unixpacket")),
            ("tcp", Self::Stream | Self::StreamOrFd) => loopback(place).map(ListenAt::Tcp),
            ("vsock", Self::Stream | Self::StreamOrFd) => vsock(place),
            ("fd", Self::StreamOrFd | Self::Datagram | Self::Records) => {
                place.parse().map(ListenAt::Fd).map_err(|_| UrlError::Fd)
            }
            _ => return None,
        })
    }
}

impl ListenUrl {
    pub(super) fn parse(text: &str, schemes: Schemes) -> Result<Self, UrlError> {
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let at = place
            .split_once("://")
            .and_then(|(scheme, place)| schemes.read(scheme, place))
            .ok_or(UrlError::Scheme {
                expected: schemes.expected(),
            })??;
        let mut url = Self {
            at,
            name: None,
            mac: None,
            ip: None,
        };
        for parameter in query.split('&').filter(|p| !p.is_empty()) {
            url.set(parameter)?;
        }
        Ok(url)
    }

    fn set(&mut self, parameter: &str) -> Result<(), UrlError> {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = decode(value)?;
        match key {
            "name" => once("name", &mut self.name, value),
            "mac" => {
                let mac = parse_mac(&value).ok_or(UrlError::Mac(value))?;
                once("mac", &mut self.mac, mac)
            }
            "ip" => {
                let ip = value.parse().map_err(|_| UrlError::Ip(value))?;
                once("ip", &mut self.ip, ip)
            }
            unknown => Err(match nearest(unknown, &["name", "mac", "ip"]) {
                Some(nearest) => UrlError::NearParameter {
                    found: unknown.to_owned(),
                    nearest,
                },
                None => UrlError::Parameter(unknown.to_owned()),
            }),
        }
    }
}

fn once<T>(key: &'static str, place: &mut Option<T>, value: T) -> Result<(), UrlError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(UrlError::Twice(key)),
    }
}

/// Reads the path of `scheme://PATH`.
pub(super) fn socket_path(scheme: &'static str, text: &str) -> Result<PathBuf, UrlError> {
    if !text.starts_with('/') {
        return Err(UrlError::RelativePath { scheme });
    }
    let path = decode(text)?;
    if path.len() > SOCKET_PATH_BYTES_MAX {
        return Err(UrlError::LongPath {
            found: path.len(),
            limit: SOCKET_PATH_BYTES_MAX,
        });
    }
    Ok(PathBuf::from(path))
}

fn loopback(text: &str) -> Result<SocketAddr, UrlError> {
    let address: SocketAddr = text.parse().map_err(|_| UrlError::TcpAddress)?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(UrlError::NotLoopback(address))
    }
}

fn records(at: Result<ListenAt, UrlError>) -> Result<ListenAt, UrlError> {
    if cfg!(target_os = "linux") {
        return at;
    }
    Err(UrlError::LinuxOnly {
        what: "unixpacket",
        instead: "use --listen-vfkit or --listen-qemu".to_owned(),
    })
}

fn vsock(text: &str) -> Result<ListenAt, UrlError> {
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // The greatest stands for any.
        let number = is_number.then(|| text.parse().ok()).flatten();
        number.filter(|n| *n != u32::MAX).ok_or(UrlError::Vsock)
    };
    let (cid, port) = text.rsplit_once(':').ok_or(UrlError::Vsock)?;
    let cid = (!cid.is_empty()).then(|| number(cid)).transpose()?;
    let port = number(port)?;
    if cfg!(target_os = "linux") {
        return Ok(ListenAt::Vsock { cid, port });
    }
    Err(UrlError::LinuxOnly {
        what: "vsock",
        instead: format!("hypervisors put it on a Unix socket, as unix:///DIRECTORY/00000002.{port:08x}"),
    })
}

fn decode(text: &str) -> Result<String, UrlError> {
    percent_decode(text).ok_or_else(|| UrlError::Encoding(text.to_owned()))
}
