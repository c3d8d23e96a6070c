//! `ssh-tunnel://USER@ADDRESS[:22]/GUEST/PATH?key=FILE&passphrase=…&secure=true`, as the services API takes it.
//!
//! What is wrong is told in the peer's words, where the peer has any.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::PORT_DEFAULT;

/// The scheme.
const SCHEME: &str = "ssh-tunnel";
/// What stands for a secret where a URL is shown, as in Go.
const HIDDEN: &str = "xxxxx";

/// Where a socket leads, and how.
#[derive(Clone, PartialEq, Eq)]
pub struct Remote {
    /// The guest's sshd.
    pub target: SocketAddr,
    /// The guest's user.
    pub user: String,
    /// The user's password, if the key does not suffice.
    pub password: Option<String>,
    /// The guest's socket; absolute.
    pub path: String,
    /// The file with the private key.
    pub key: PathBuf,
    /// What opens it.
    pub passphrase: Option<String>,
    /// Whether the host's key must be known.
    pub secure: bool,
}

impl Remote {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn parse(text: &str) -> Result<Self, RemoteError> {
        let bad = |cause: String| RemoteError::Url {
            url: redacted(text),
            cause,
        };
        let Some((scheme, rest)) = split_scheme(text) else {
            return Err(RemoteError::Scheme(String::new()));
        };
        if !scheme.eq_ignore_ascii_case(SCHEME) {
            return Err(RemoteError::Scheme(scheme.to_ascii_lowercase()));
        }
        let parts = Parts::of(rest);
        let key = parts.parameter("key").filter(|key| !key.is_empty());
        let key = PathBuf::from(key.ok_or(RemoteError::NoKey)?);
        let path = unescape(parts.path, false).ok_or_else(|| bad(bad_escape(parts.path)))?;
        if path.is_empty() || path == "/" {
            return Err(RemoteError::NoPath);
        }
        let (user, password) = match parts.user.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (parts.user, None),
        };
        let plain = |part: &str| unescape(part, false).ok_or_else(|| bad(bad_escape(part)));
        let user = plain(user)?;
        if user.is_empty() {
            return Err(RemoteError::NoUser);
        }
        Ok(Self {
            target: target(parts.host).map_err(|cause| match cause {
                TargetError::Port(port) => bad(format!("invalid port \":{port}\" after host")),
                TargetError::Name(name) => RemoteError::NoAddress(name),
            })?,
            user,
            password: match password {
                Some(text) => Some(unescape(text, false).ok_or_else(|| bad(bad_escape(HIDDEN)))?),
                None => None,
            },
            path,
            key,
            passphrase: parts.parameter("passphrase").filter(|text| !text.is_empty()),
            secure: parts.parameter("secure").is_some_and(|text| is_true(&text)),
        })
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what is secret.
        f.debug_struct("Remote")
            .field("target", &self.target)
            .field("user", &self.user)
            .field("path", &self.path)
            .field("key", &self.key)
            .field("secure", &self.secure)
            .finish_non_exhaustive()
    }
}

/// A URL as it may be shown: without password and passphrase.
pub(in crate::gvproxy) fn redacted(text: &str) -> String {
    let (before, query) = match text.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (text, None),
    };
    let mut shown = match before.split_once("://").map(|(scheme, rest)| {
        let host_end = rest.find('/').unwrap_or(rest.len());
        (scheme, rest.split_at(host_end))
    }) {
        Some((scheme, (authority, path))) => match authority.rsplit_once('@') {
            Some((user, host)) if user.contains(':') => {
                let user = user.split(':').next().unwrap_or_default();
                format!("{scheme}://{user}:{HIDDEN}@{host}{path}")
            }
            _ => before.to_owned(),
        },
        None => before.to_owned(),
    };
    let Some(query) = query else {
        return shown;
    };
    for (index, pair) in query.split('&').enumerate() {
        shown.push(if index == 0 { '?' } else { '&' });
        let name = pair.split('=').next().unwrap_or(pair);
        let is_secret = matches!(unescape(name, true).as_deref(), Some("passphrase" | "password"));
        if is_secret && name.len() < pair.len() {
            shown.push_str(name);
            shown.push('=');
            shown.push_str(HIDDEN);
        } else {
            shown.push_str(pair);
        }
    }
    shown
}

/// The pieces of a URL after its scheme, as they stand.
struct Parts<'a> {
    user: &'a str,
    host: &'a str,
    path: &'a str,
    query: &'a str,
}

impl<'a> Parts<'a> {
    fn of(rest: &'a str) -> Self {
        let rest = rest.split('#').next().unwrap_or(rest);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => ("", rest),
        };
        let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
        Self {
            user,
            host,
            path,
            query,
        }
    }

    /// The first value of a parameter; as in Go, a pair that cannot be read is none.
    fn parameter(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if unescape(key, true)? != name {
                return None;
            }
            unescape(value, true)
        })
    }
}

enum TargetError<'a> {
    Port(&'a str),
    Name(String),
}

fn target(host: &str) -> Result<SocketAddr, TargetError<'_>> {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, rest)) => (name, rest.strip_prefix(':').unwrap_or(rest)),
        None => host.split_once(':').unwrap_or((host, "")),
    };
    let port = match port {
        "" => PORT_DEFAULT,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.parse().map_err(|_| TargetError::Port(digits))?
        }
        other => return Err(TargetError::Port(other)),
    };
    let address: IpAddr = name.parse().map_err(|_| TargetError::Name(name.to_owned()))?;
    Ok(SocketAddr::new(address, port))
}

fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let is_scheme = scheme.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && scheme
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    is_scheme.then_some((scheme, rest))
}

/// `%20` and the like, and in a query `+`, decoded; `None` where it is wrong or holds a zero byte.
fn unescape(text: &str, is_query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let value = digit()? * 16 + digit()?;
                u8::try_from(value).ok()?
            }
            b'+' if is_query => b' ',
            other => other,
        });
    }
    if bytes.contains(&0) {
        return None;
    }
    String::from_utf8(bytes).ok()
}

fn bad_escape(text: &str) -> String {
    format!("invalid URL escape in {text:?}")
}

/// What Go takes for true.
fn is_true(text: &str) -> bool {
    ["1", "t", "T", "true", "TRUE", "True"].contains(&text)
}

/// What is wrong with a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RemoteError {
    /// It is none.
    #[error("failed to parse remote uri :{url} : {cause}")]
    Url {
        /// The URL, without secrets.
        url: String,
        /// Why.
        cause: String,
    },
    /// It is another's.
    #[error("remote protocol for unix forwarder is not implemented: {0}")]
    Scheme(String),
    /// No key.
    #[error("key not provided for unix-ssh connection")]
    NoKey,
    /// No socket of the guest.
    #[error("remote uri must contain a path to a socket file")]
    NoPath,
    /// No user.
    #[error("user not provided for unix-ssh connection; expected ssh-tunnel://USER@ADDRESS/PATH?key=FILE")]
    NoUser,
    /// A name, or nothing.
    #[error("invalid remote addr {0:?} (expected an address of the network, as 192.168.127.2)")]
    NoAddress(String),
}
