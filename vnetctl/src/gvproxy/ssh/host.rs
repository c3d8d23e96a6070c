//! Which host keys are taken.
//!
//! The guest's address lies in our own network, where nobody but our own dataplane stands between, so that none is
//! asked for unless `secure=true` is said. Then `known_hosts` of the user decides, without asking and without a
//! fallback: the peer takes any key if that file has none.

use std::borrow::Cow;
use std::path::PathBuf;

use russh::Preferred;
use russh::keys::known_hosts::known_host_keys_path;
use russh::keys::{Algorithm, PublicKey, PublicKeyOrCertificate};

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

/// Which host keys are taken on one connection: those that there were when it began.
#[derive(Debug)]
pub(super) enum Taken {
    /// Any.
    Any,
    /// These.
    These {
        /// With their lines; at least one.
        known: Vec<(usize, PublicKey)>,
        /// Whose.
        host: String,
        /// Where they stand.
        file: PathBuf,
    },
}

impl HostKeys {
    /// Reads the file, where there is one.
    pub(super) fn read(&self) -> Result<Taken, HostKeyError> {
        let Self::Known { file, host, port } = self else {
            return Ok(Taken::Any);
        };
        let (host, file) = (host.clone(), file.clone());
        match known_host_keys_path(&host, *port, &file) {
            Ok(known) if known.is_empty() => Err(HostKeyError::Unknown { host, file }),
            Ok(known) => Ok(Taken::These { known, host, file }),
            Err(source) => Err(HostKeyError::File {
                file,
                source: Box::new(source),
            }),
        }
    }
}

impl Taken {
    /// What is offered to the host: of its key's kinds only those that can be recognised.
    pub(super) fn preferred(&self) -> Preferred {
        let mut preferred = Preferred::DEFAULT;
        if let Self::These { known, .. } = self {
            let kinds = preferred
                .key
                .iter()
                .filter(|kind| known.iter().any(|(_, key)| is_same_kind(kind, &key.algorithm())));
            preferred.key = Cow::Owned(kinds.cloned().collect());
        }
        preferred
    }

    /// Whether a key is taken.
    pub(super) fn check(&self, found: &PublicKeyOrCertificate) -> Result<(), HostKeyError> {
        let Self::These { known, host, file } = self else {
            return Ok(());
        };
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

#[cfg(test)]
mod tests {
    use russh::keys::parse_public_key_base64;

    use super::*;

    const KEY: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIOdJjOe/BCumzNWO4TdqzyUGrmomen9wiX1eu3beq9DL";
    const OTHER: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIOn2iLRTTQrDJkEQ0uafWHo8b17nYChK/KUzGg2Q6Ccy";

    #[test]
    fn a_connection_goes_by_what_the_file_had_when_it_began() {
        let file = std::env::temp_dir().join(format!("vnetctl-known-hosts-{}", std::process::id()));
        std::fs::write(&file, format!("192.168.127.2 ssh-ed25519 {KEY}\n")).unwrap();
        let keys = HostKeys::Known {
            file: file.clone(),
            host: "192.168.127.2".to_owned(),
            port: 22,
        };
        let taken = keys.read().unwrap();
        std::fs::remove_file(&file).unwrap();

        let check = |key: &str| {
            let key = parse_public_key_base64(key).unwrap();
            taken.check(&PublicKeyOrCertificate::PublicKey { key, hash_alg: None })
        };
        assert_eq!(*taken.preferred().key, [Algorithm::Ed25519]);
        assert!(check(KEY).is_ok());
        assert!(matches!(check(OTHER), Err(HostKeyError::Changed { line: 1, .. })));
        assert!(keys.read().is_err(), "the next one has another");
    }
}
