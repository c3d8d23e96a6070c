//! Private keys from files: OpenSSH's and PEM's forms, with and without a passphrase.
//!
//! The parsing is russh's; here stands what a person is told when a file is not what it should be.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::{Algorithm, PrivateKey, decode_secret_key};

/// The largest file of a key that is read; 16384-bit RSA keys have a quarter of it.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// A private key, and where it is from.
#[derive(Clone)]
pub struct Identity {
    pub(super) path: PathBuf,
    pub(super) key: Arc<PrivateKey>,
}

impl Identity {
    /// Reads a key. One that others can read too is told in the log. A passphrase may take a second of computing.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn read(path: &Path, passphrase: Option<&str>) -> Result<Self, IdentityError> {
        let failed = |cause| IdentityError {
            path: path.to_owned(),
            cause,
        };
        let (text, mode) = read_text(path).map_err(failed)?;
        if mode & 0o077 != 0 {
            tracing::warn!(
                identity = %path.display(),
                mode = format_args!("{:04o}", mode & 0o7777),
                "others can read this private key; chmod 600 keeps it private"
            );
        }
        let key = decode(&text, passphrase).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            key: Arc::new(key),
        })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_tuple("Identity").field(&self.path).finish()
    }
}

/// A file's text and mode.
fn read_text(path: &Path) -> Result<(String, u32), IdentityCause> {
    let mut options = OpenOptions::new();
    // A named pipe must not keep us.
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(IdentityCause::Read)?;
    let metadata = file.metadata().map_err(IdentityCause::Read)?;
    if !metadata.is_file() {
        return Err(IdentityCause::NoFile);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(IdentityCause::Read)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(IdentityCause::Large);
    }
    let text = String::from_utf8(bytes).map_err(|_| IdentityCause::NoKey)?;
    Ok((text, metadata.permissions().mode()))
}

fn decode(text: &str, passphrase: Option<&str>) -> Result<PrivateKey, IdentityCause> {
    if is_public(text) {
        return Err(IdentityCause::Public);
    }
    let key = match Sealed::of(text) {
        Sealed::No => match decode_secret_key(text, None) {
            // OpenSSH's form says it inside.
            Err(russh::keys::Error::KeyIsEncrypted) => open(text, passphrase)?,
            Err(error) => return Err(unread(error)),
            Ok(key) => key,
        },
        Sealed::Pem => open(text, passphrase)?,
        Sealed::Old(cipher) => return Err(IdentityCause::OldCipher(cipher)),
    };
    match key.algorithm() {
        Algorithm::Rsa { .. } | Algorithm::Ecdsa { .. } | Algorithm::Ed25519 => Ok(key),
        other => Err(IdentityCause::Kind(other.to_string())),
    }
}

fn open(text: &str, passphrase: Option<&str>) -> Result<PrivateKey, IdentityCause> {
    let passphrase = passphrase.ok_or(IdentityCause::Encrypted)?;
    decode_secret_key(text, Some(passphrase)).map_err(|_| IdentityCause::Passphrase)
}

fn unread(error: russh::keys::Error) -> IdentityCause {
    match error {
        russh::keys::Error::UnsupportedKeyType { key_type_string, .. } => {
            IdentityCause::Kind(key_type_string)
        }
        _ => IdentityCause::NoKey,
    }
}

/// Whether a PEM file says that it is encrypted.
enum Sealed {
    No,
    Pem,
    /// In a way that is not read.
    Old(String),
}

impl Sealed {
    fn of(text: &str) -> Self {
        if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
            return Self::Pem;
        }
        let cipher = text.lines().find_map(|line| line.strip_prefix("DEK-Info: "));
        match cipher.map(|cipher| cipher.split(',').next().unwrap_or(cipher).trim()) {
            None => Self::No,
            Some("AES-128-CBC") if text.contains("-----BEGIN RSA PRIVATE KEY-----") => Self::Pem,
            Some(cipher) => Self::Old(cipher.to_owned()),
        }
    }
}

/// Whether a text is a public key: one line of OpenSSH's, or RFC 4716's or PEM's form.
fn is_public(text: &str) -> bool {
    let text = text.trim_start();
    ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"]
        .iter()
        .any(|start| text.starts_with(start))
        || text.starts_with("---- BEGIN SSH2 PUBLIC KEY ----")
        || text.starts_with("-----BEGIN PUBLIC KEY-----")
        || text.starts_with("-----BEGIN RSA PUBLIC KEY-----")
}

/// Why a file gives no key.
#[derive(Debug, thiserror::Error)]
#[error("identity {}", path.display())]
pub struct IdentityError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub cause: IdentityCause,
}

/// What is wrong with the file of a key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityCause {
    /// It cannot be read.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// It is a directory, a pipe or a device.
    #[error("is not a regular file")]
    NoFile,
    /// It is larger than any key.
    #[error("has more than {FILE_BYTES_MAX} bytes (expected a private key)")]
    Large,
    /// It is a public key.
    #[error("is a public key; name the private one, which has the same name without .pub")]
    Public,
    /// It needs a passphrase.
    #[error(
        "is encrypted and no passphrase is given; give passphrase=… where the socket is exposed, or make a copy without \
         one (ssh-keygen -p -N '' -f COPY)"
    )]
    Encrypted,
    /// The passphrase is another.
    #[error("is not opened by the passphrase that is given")]
    Passphrase,
    /// It is encrypted as PEM once was.
    #[error(
        "is encrypted with {0} in PEM's old form, which is not read; ssh-keygen -p -f FILE writes it in the new one"
    )]
    OldCipher(String),
    /// It is of a kind that is not taken.
    #[error("is a key of kind {0} (expected RSA, ECDSA or Ed25519)")]
    Kind(String),
    /// It is no key.
    #[error("is no private key in OpenSSH's or PEM's form")]
    NoKey,
}
