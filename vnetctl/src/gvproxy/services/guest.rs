//! The guest's side: what a process inside of a VM may ask of the gateway's port 80. It exposes ports of the host that
//! lead to its own address, lists those, ends those, and nothing else.
//!
//! Whether a port is opened is the controlplane's to decide, in the step in which it opens it (`RequestForward`): where
//! no policy and no mode is in force it is as free as gvproxy's in which addresses of the host it listens at.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap};
use subtle::ConstantTimeEq as _;
use vnet_proto::model::VmId;

use super::Services;
use super::answer::Answer;

/// Connections that one guest has at once. The controlplane lets fewer of its requests wait for a person
/// (`hub::WAITS_PER_VM_MAX`), so that there is always one for what nobody has to answer.
pub const GUEST_CONNECTIONS_MAX: usize = 16;
/// Connections that all guests have at once.
pub const ALL_GUESTS_CONNECTIONS_MAX: usize = 128;
/// The shortest token.
const TOKEN_CHARS_MIN: usize = 32;
/// The longest file with one.
const TOKEN_BYTES_MAX: u64 = 4096;

/// A guest that is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// The dataplane's handle of it.
    pub vm: VmId,
    /// The address that it spoke from.
    pub address: IpAddr,
}

/// What guests may do.
#[derive(Debug, Clone, Default)]
pub struct GuestApi {
    /// What each request must carry, as `Authorization: Bearer TOKEN`; `None`: nothing.
    pub token: Option<Token>,
}

/// A secret that guests must know.
#[derive(Clone)]
pub struct Token(Arc<[u8]>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token in {path}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too short to be a secret.
    #[error(
        "the token in {path} has {found} characters (expected at least {TOKEN_CHARS_MIN}; make one with: \
         openssl rand -hex 32)"
    )]
    Short {
        /// Which file.
        path: String,
        /// Its characters.
        found: usize,
    },
    /// It is too long, or is not what a header can carry.
    #[error(
        "the token in {path} is not one line of visible ASCII of at most {TOKEN_BYTES_MAX} bytes (make one with: \
         openssl rand -hex 32)"
    )]
    Form {
        /// Which file.
        path: String,
    },
}

impl Token {
    /// Reads the token that a file has; spaces and line ends around it do not count.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let shown = path.display().to_string();
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path);
        let read = file.and_then(|file| file.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut bytes));
        if let Err(source) = read {
            return Err(TokenError::Read { path: shown, source });
        }
        let token = bytes.trim_ascii();
        if bytes.len() as u64 > TOKEN_BYTES_MAX || !token.iter().all(u8::is_ascii_graphic) {
            return Err(TokenError::Form { path: shown });
        }
        if token.len() < TOKEN_CHARS_MIN {
            let found = token.len();
            return Err(TokenError::Short { path: shown, found });
        }
        Ok(Self(token.into()))
    }

    /// Whether a request carries it. How long that takes says nothing of the token but its length.
    pub(super) fn is_in(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(AUTHORIZATION) else {
            return false;
        };
        let Some((scheme, given)) = value.as_bytes().split_at_checked(BEARER.len()) else {
            return false;
        };
        scheme.eq_ignore_ascii_case(BEARER) && bool::from(given.trim_ascii().ct_eq(&self.0))
    }
}

const BEARER: &[u8] = b"Bearer ";

impl Services {
    /// Whether this guest is served at all.
    pub(super) fn admit(&self, headers: &HeaderMap) -> Result<(), Answer> {
        let Some(api) = &self.guests else {
            return Err(Answer::forbidden("guests expose nothing here")
                .with_remedy("the host's side: expose it at the socket of -services"));
        };
        if let Some(token) = &api.token
            && !token.is_in(headers)
        {
            let text = "a token is needed: Authorization: Bearer TOKEN";
            return Err(Answer::error(StatusCode::UNAUTHORIZED, text));
        }
        Ok(())
    }
}

/// How many connections each guest has.
#[derive(Clone, Default)]
pub(super) struct Connected(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them, until it is dropped.
pub(super) struct OneOf {
    all: Connected,
    address: IpAddr,
}

impl Connected {
    /// Counts one more, or nothing at a limit.
    pub(super) fn one(&self, address: IpAddr) -> Option<OneOf> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let own = counts.get(&address).copied().unwrap_or_default();
        if all >= ALL_GUESTS_CONNECTIONS_MAX || own >= GUEST_CONNECTIONS_MAX {
            return None;
        }
        counts.insert(address, own + 1);
        Some(OneOf {
            all: self.clone(),
            address,
        })
    }
}

impl Drop for OneOf {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_from_a_file_and_what_is_none_is_refused() {
        let directory = std::env::temp_dir().join(format!("vnet-token-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("token");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            Token::read(&path)
        };
        let secret = "0123456789abcdef0123456789abcdef";
        let token = read(format!(" {secret}\n").as_bytes()).unwrap();
        assert!(!format!("{token:?}").contains(secret));
        let carries = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            token.is_in(&headers)
        };
        assert!(carries(&format!("Bearer {secret}")));
        assert!(carries(&format!("bearer  {secret}")));
        for wrong in [
            "Bearer",
            "Bearer ",
            "Basic x",
            secret,
            "Bearer 0123456789abcdef0123456789abcdee",
        ] {
            assert!(!carries(wrong), "{wrong}");
        }
        assert!(!carries(&format!("Bearer {secret}0")));
        assert!(!token.is_in(&HeaderMap::new()));

        let short = read(b"short\n").unwrap_err().to_string();
        assert!(
            short.contains("has 5 characters (expected at least 32"),
            "{short}"
        );
        assert!(matches!(
            read(b"").unwrap_err(),
            TokenError::Short { found: 0, .. }
        ));
        assert!(matches!(
            read(&[b'x'; 5000]).unwrap_err(),
            TokenError::Form { .. }
        ));
        let two = format!("{secret}\n{secret}");
        assert!(matches!(
            read(two.as_bytes()).unwrap_err(),
            TokenError::Form { .. }
        ));
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(matches!(Token::read(&path).unwrap_err(), TokenError::Read { .. }));
    }

    #[test]
    fn connections_of_one_guest_and_of_all_are_limited() {
        let connected = Connected::default();
        let guest = |n: usize| IpAddr::from([10, 0, 0, u8::try_from(n).unwrap()]);
        let own: Vec<_> = (0..GUEST_CONNECTIONS_MAX)
            .map(|_| connected.one(guest(0)).unwrap())
            .collect();
        assert!(connected.one(guest(0)).is_none());
        let mut others = Vec::new();
        for n in 1..ALL_GUESTS_CONNECTIONS_MAX / GUEST_CONNECTIONS_MAX {
            others.extend((0..GUEST_CONNECTIONS_MAX).map(|_| connected.one(guest(n)).unwrap()));
        }
        assert!(connected.one(guest(200)).is_none(), "all of them are taken");
        drop(own);
        assert!(connected.one(guest(200)).is_some());
        drop(others);
        assert!(connected.0.lock().unwrap().is_empty());
    }
}
