//! The host's socket: for its owner alone, in place of an older one and of nothing else, and removed in the end.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as bind_to, listen, socket,
};
use tokio::net::UnixListener;

/// Clients that the system lets wait.
const BACKLOG: i32 = 128;

/// The file of a socket. Dropping it removes it, if it is still the one that was made.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another may have replaced it, as we replace others'.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.dev() == self.device && m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens at a path, mode 0600. A socket that is there is replaced, as by the peer; nothing else is touched.
///
/// # Panics
/// Outside of a tokio runtime.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = |step, source: io::Error| SocketError::Io {
        path: path.to_owned(),
        step,
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).map_err(|error| failed("remove", error))?;
        }
        Ok(found) => {
            return Err(SocketError::Occupied {
                path: path.to_owned(),
                kind: kind(&found),
            });
        }
        // A missing directory is told by bind.
        Err(_) => {}
    }
    let in_vain = |step| move |errno: Errno| failed(step, errno.into());
    let address = UnixAddr::new(path).map_err(in_vain("bind"))?;
    let flags = SockFlag::empty();
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(in_vain("socket"))?;
    bind_to(descriptor.as_raw_fd(), &address).map_err(in_vain("bind"))?;
    let metadata = fs::symlink_metadata(path).map_err(|error| failed("stat", error))?;
    let file = SocketFile {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    // Nobody connects before it listens, and so nobody while it has another mode.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|error| failed("chmod", error))?;
    let backlog = Backlog::new(BACKLOG).map_err(in_vain("listen"))?;
    listen(&descriptor, backlog).map_err(in_vain("listen"))?;
    let listener = StdListener::from(descriptor);
    listener
        .set_nonblocking(true)
        .map_err(|error| failed("listen", error))?;
    let listener = UnixListener::from_std(listener).map_err(|error| failed("listen", error))?;
    Ok((listener, file))
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
