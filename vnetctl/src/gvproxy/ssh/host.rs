//! Which host keys are taken.
//!
//! The guest's address lies in our own network, where nobody but our own dataplane stands between, so that none is asked
//! for unless `secure=true` is said. Then `known_hosts` of the user decides, without asking and without a fallback: the
//! peer takes any key if that file has none.

use std::borrow::Cow;
use std::path::PathBuf;

use russh::Preferred;
use russh::keys::known_hosts::known_host_keys_path;
use russh::keys::{Algorithm, PublicKeyOrCertificate};

/// Which host keys are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostKeys {
    /// Any.
    Ignored,
    /// Those that a file has.
    Known {
        /// OpenSSH's `known_hosts`.
        file: PathBuf,
        /// As it stands there.
        host: String,
        /// 22 stands there as none.
        port: u16,
    },
}

impl HostKeys {
    /// What is offered to the host: of its key's kinds only those that can be recognised.
    pub(super) fn preferred(&self) -> Result<Preferred, HostKeyError> {
        let mut preferred = Preferred::DEFAULT;
        if let Self::Known { .. } = self {
            let known = self.known()?;
            let kinds = preferred
                .key
                .iter()
                .filter(|kind| known.iter().any(|(_, key)| is_same_kind(kind, &key.algorithm())));
            preferred.key = Cow::Owned(kinds.cloned().collect());
        }
        Ok(preferred)
    }

    /// Whether a key is taken.
    pub(super) fn check(&self, found: &PublicKeyOrCertificate) -> Result<(), HostKeyError> {
        let Self::Known { file, host, .. } = self else {
            return Ok(());
        };
        let known = self.known()?;
        if let PublicKeyOrCertificate::PublicKey { key, .. } = found
            && known.iter().any(|(_, known)| known.key_data() == key.key_data())
        {
            return Ok(());
        }
        Err(HostKeyError::Changed {
            host: host.clone(),
            file: file.clone(),
            line: known.first().map_or(0, |(line, _)| *line),
        })
    }

    /// The keys that the file has, with their lines; at least one.
    fn known(&self) -> Result<Vec<(usize, russh::keys::PublicKey)>, HostKeyError> {
        let Self::Known { file, host, port } = self else {
            return Ok(Vec::new());
        };
        let known = known_host_keys_path(host, *port, file).map_err(|source| HostKeyError::File {
            file: file.clone(),
            source: Box::new(source),
        })?;
        if known.is_empty() {
            return Err(HostKeyError::Unknown {
                host: host.clone(),
                file: file.clone(),
            });
        }
        Ok(known)
    }
}

/// The user's own `known_hosts`.
pub(super) fn known_hosts() -> Option<PathBuf> {
    std::env::home_dir().map(|home| home.join(".ssh/known_hosts"))
}

fn is_same_kind(one: &Algorithm, other: &Algorithm) -> bool {
    match (one, other) {
        // With whatever hash.
        (Algorithm::Rsa { .. }, Algorithm::Rsa { .. }) => true,
        (one, other) => one == other,
    }
}

/// Why a host's key is not taken.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// The file has none.
    #[error("there is no host key of {host} in {}; put it there, or leave secure=true out", file.display())]
    Unknown {
        /// The host.
        host: String,
        /// The file.
        file: PathBuf,
    },
    /// The file has another.
    #[error(
        "the host key of {host} is not the one in line {line} of {}; if the guest was made anew, remove that line",
        file.display()
    )]
    Changed {
        /// The host.
        host: String,
        /// The file.
        file: PathBuf,
        /// The first line that has a key of the host; from 1.
        line: usize,
    },
    /// The file is not one.
    #[error("{} cannot be read as known_hosts", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: Box<russh::keys::Error>,
    },
    /// There is no file.
    #[error("there is no home directory, and so no known_hosts; set HOME, or leave secure=true out")]
    NoHome,
}
