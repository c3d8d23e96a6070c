//! The host's socket: for its owner alone, in place of an older one and of nothing else, and removed in the end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use tokio::net::UnixListener;

pub(super) use crate::launch::SocketFile;
use crate::launch::StreamListener;

/// Listens at a path, mode 0600, in place of an older socket even if it is served, as the peer does with those of its
/// command line; nothing else is touched.
///
/// # Panics
/// Outside of a tokio runtime.
pub(super) fn replace(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    if is_socket(path)? {
        fs::remove_file(path).map_err(|error| failed(path, "remove", error))?;
    }
    bind(path)
}

/// The same, but a socket that is served stays, and is an error.
///
/// # Panics
/// Outside of a tokio runtime.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    is_socket(path)?;
    let (listener, file) = StreamListener::at_path(path).map_err(|error| failed(path, "bind", error))?;
    let listener = listener.of_clients().and_then(|listener| {
        let listener = StdListener::from(OwnedFd::from(listener));
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    });
    Ok((listener.map_err(|error| failed(path, "listen", error))?, file))
}

/// Whether a socket is there. A missing directory is told by bind.
fn is_socket(path: &Path) -> Result<bool, SocketError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(true),
        Ok(found) => Err(SocketError::Occupied {
            path: path.to_owned(),
            kind: kind(&found),
        }),
        Err(_) => Ok(false),
    }
}

fn failed(path: &Path, step: &'static str, source: io::Error) -> SocketError {
    SocketError::Io {
        path: path.to_owned(),
        step,
        source,
    }
}

fn kind(found: &fs::Metadata) -> &'static str {
    let kind = found.file_type();
    if kind.is_dir() {
        "a directory"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_file() {
        "a file"
    } else {
        "a device"
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something else is there.
    #[error("{} is {kind}, and only a socket is replaced; remove it, or name another path", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What is there.
        kind: &'static str,
    },
    /// The system refuses. The text is Go's, as far as it is known.
    #[error("listen unix {}: {step}: {}", path.display(), go_text(source))]
    Io {
        /// The path.
        path: PathBuf,
        /// What was done.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The text of an error of the system as Go has it.
fn go_text(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else {
        return error.to_string();
    };
    let text = Errno::from_raw(number).desc();
    let mut letters = text.chars();
    letters
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
