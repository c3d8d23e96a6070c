//! Who is at the other end of a Unix socket, and whether it may speak.
//!
//! A peer must run as this user or as root, and (Linux) in this process's own network namespace: a
//! command that `vnetctl run` confined has the user's uid too, and must not approve its own
//! requests. The namespace is judged by the peer's process as the kernel noted it when it
//! connected (unix(7), `SO_PEERCRED`), held by a pidfd against reuse of its number where the kernel
//! has `SO_PEERPIDFD` (Linux 6.5). What cannot be told is refused.

use std::io;

use tokio::net::UnixStream;

/// A peer that may speak.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its user's name, or `uid N` where it has none.
    pub user: String,
}

/// Why a peer may not speak.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The kernel does not say who it is.
    #[error("the peer's identity cannot be read")]
    Unknown(#[source] io::Error),
    /// Another user.
    #[error("the peer runs as uid {found} (expected {expected} or root)")]
    Uid {
        /// Whose process it is.
        found: u32,
        /// Whose it should be.
        expected: u32,
    },
    /// Its process cannot be looked at, or is gone.
    #[error("the network namespace of peer process {pid} cannot be read")]
    Namespace {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It runs in a guest's namespace, or another.
    #[error("peer process {pid} is in another network namespace")]
    OtherNamespace {
        /// The process.
        pid: i32,
    },
}

/// Checks the peer of an accepted connection.
///
/// # Errors
/// [`PeerError`]: the connection is to be closed without a word.
pub fn check(stream: &UnixStream) -> Result<Peer, PeerError> {
    let credentials = stream.peer_cred().map_err(PeerError::Unknown)?;
    let expected = nix::unistd::geteuid().as_raw();
    check_uid(credentials.uid(), expected)?;
    #[cfg(target_os = "linux")]
    linux::check_namespace(stream, credentials.pid())?;
    Ok(Peer {
        user: user_name(credentials.uid()),
    })
}

fn check_uid(found: u32, expected: u32) -> Result<(), PeerError> {
    if found == expected || found == 0 {
        Ok(())
    } else {
        Err(PeerError::Uid { found, expected })
    }
}

fn user_name(uid: u32) -> String {
    match nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => format!("uid {uid}"),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs;
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::MetadataExt as _;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{getsockopt, sockopt};
    use tokio::net::UnixStream;

    use super::PeerError;

    pub(super) fn check_namespace(stream: &UnixStream, pid: Option<i32>) -> Result<(), PeerError> {
        // Zero: the peer is outside this PID namespace, so nothing can be told of it.
        let pid = pid.unwrap_or(0);
        let gone = || PeerError::Namespace {
            pid,
            source: io::ErrorKind::NotFound.into(),
        };
        if pid <= 0 {
            return Err(gone());
        }
        let pidfd = peer_pidfd(stream).map_err(|source| PeerError::Namespace { pid, source })?;
        let own = namespace("/proc/self/ns/net").map_err(|source| PeerError::Namespace { pid, source })?;
        let theirs = namespace(&format!("/proc/{pid}/ns/net"))
            .map_err(|source| PeerError::Namespace { pid, source })?;
        // Still alive after the look: so the number was its own when it was looked at.
        if let Some(pidfd) = pidfd
            && has_ended(&pidfd)
        {
            return Err(gone());
        }
        if own == theirs {
            Ok(())
        } else {
            Err(PeerError::OtherNamespace { pid })
        }
    }

    fn peer_pidfd(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
        match getsockopt(&stream.as_fd(), sockopt::PeerPidfd) {
            Ok(pidfd) => Ok(Some(pidfd)),
            Err(nix::errno::Errno::ENOPROTOOPT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn has_ended(pidfd: &OwnedFd) -> bool {
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    fn namespace(path: &str) -> io::Result<(u64, u64)> {
        fs::metadata(path).map(|m| (m.dev(), m.ino()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_user_and_root_may_speak() {
        assert!(check_uid(1000, 1000).is_ok());
        assert!(check_uid(0, 1000).is_ok());
        assert!(matches!(
            check_uid(1001, 1000),
            Err(PeerError::Uid {
                found: 1001,
                expected: 1000
            })
        ));
    }

    #[tokio::test]
    async fn a_peer_of_this_process_may_speak() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = check(&ours).unwrap();
        assert!(!peer.user.is_empty());
    }
}
