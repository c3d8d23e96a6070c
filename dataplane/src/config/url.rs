//! Listen URLs: `unix:///PATH`, `unixgram:///PATH`, `tcp://127.0.0.1:PORT`, each with `?name=&mac=&ip=`.
//!
//! A small strict reader rather than a general one: a general URL would let through hosts, users and
//! fragments that mean nothing here.

use std::net::{Ipv4Addr, SocketAddr};
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
}

impl std::fmt::Display for ListenAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
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
    /// `unix` and `tcp`.
    Stream,
    /// `unixgram`.
    Datagram,
}

impl ListenUrl {
    pub(super) fn parse(text: &str, schemes: Schemes) -> Result<Self, UrlError> {
        let expected = match schemes {
            Schemes::Stream => "unix:///PATH or tcp://127.0.0.1:PORT",
            Schemes::Datagram => "unixgram:///PATH",
        };
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let at = match (place.split_once("://"), schemes) {
            (Some(("unix", path)), Schemes::Stream) => ListenAt::Unix(socket_path("unix", path)?),
            (Some(("unixgram", path)), Schemes::Datagram) => ListenAt::Unix(socket_path("unixgram", path)?),
            (Some(("tcp", address)), Schemes::Stream) => ListenAt::Tcp(loopback(address)?),
            _ => return Err(UrlError::Scheme { expected }),
        };
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

fn decode(text: &str) -> Result<String, UrlError> {
    percent_decode(text).ok_or_else(|| UrlError::Encoding(text.to_owned()))
}
