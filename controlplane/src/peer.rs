//! Who is at the other end of a Unix socket, and whether it may speak.
//!
//! A peer must run as this user or as root, and (Linux) in this process's own network namespace: a
//! command that `vnetctl run` confined has the user's uid too, and must not approve its own
//! requests. Two things tell the namespace:
//!
//! - **the connection**. The kernel makes the accepted socket in the namespace of the socket that
//!   connected, and `sock_diag(7)` answers for sockets of the asker's own namespace only. That says where
//!   the peer's socket was made, whoever holds it, and needs no right to look at the peer
//! - **the process**, as the kernel noted it when it connected (unix(7), `SO_PEERCRED`). Its number may be
//!   another's by now; where the kernel has `SO_PEERPIDFD` (Linux 6.5) it is held against that
//!
//! Both must agree where both can be told. The connection alone is enough for root, whose processes
//! another user may not look at; the process alone where its number is held. What cannot be told is
//! refused.

use std::io;

use tokio::net::UnixStream;

/// A peer that may speak.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its user's name, or `uid N` where it has none.
    pub user: String,
    /// The process that connected ([`crate::process::mark`]); empty where that is not told.
    pub process: String,
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
    /// The kernel says too little to be sure of its namespace.
    #[error(
        "the network namespace of peer process {pid} cannot be told for sure (expected a kernel with unix_diag, \
         which AF_NETLINK sockets ask, or Linux 6.5)"
    )]
    Unsure {
        /// The process.
        pid: i32,
        /// Why the connection does not tell.
        #[source]
        source: io::Error,
    },
    /// A user whom this namespace has no number for looks like the one that runs this.
    #[error("the peer's uid {0} stands for every user that this user namespace does not know")]
    Unmapped(u32),
}

impl PeerError {
    /// What the peer may be told: nothing about who refuses, or how that was found. `None`: not a word.
    pub(crate) fn told(&self) -> Option<&'static str> {
        match self {
            Self::OtherNamespace { .. } => Some(
                "this process is in another network namespace than the controlplane, which serves its own alone (run \
                 it in the controlplane's, or give it a controlplane of its own by another XDG_RUNTIME_DIR and \
                 XDG_STATE_HOME)",
            ),
            Self::Unsure { .. } => Some(
                "the controlplane serves its own network namespace alone, and its kernel does not say which this \
                 process is in (as root: modprobe unix_diag)",
            ),
            Self::Unknown(_) | Self::Uid { .. } | Self::Namespace { .. } | Self::Unmapped(_) => None,
        }
    }
}

/// Checks the peer of an accepted connection.
///
/// # Errors
/// [`PeerError`]: nothing that the peer says may be heard. Some may be told that they are refused.
pub fn check(stream: &UnixStream) -> Result<Peer, PeerError> {
    let credentials = stream.peer_cred().map_err(PeerError::Unknown)?;
    let (found, expected) = (credentials.uid(), nix::unistd::geteuid().as_raw());
    #[cfg(target_os = "linux")]
    let unmapped = linux::unmapped_uid();
    #[cfg(not(target_os = "linux"))]
    let unmapped = None;
    check_uid(found, expected, unmapped)?;
    #[cfg(target_os = "linux")]
    linux::check_namespace(stream, credentials.pid(), found == expected)?;
    Ok(Peer {
        user: user_name(found),
        process: credentials.pid().map(crate::process::mark).unwrap_or_default(),
    })
}

/// Root is root of this process's own user namespace: that is whose numbers `SO_PEERCRED` speaks in.
fn check_uid(found: u32, expected: u32, unmapped: Option<u32>) -> Result<(), PeerError> {
    if Some(found) == unmapped {
        Err(PeerError::Unmapped(found))
    } else if found == expected || found == 0 {
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
mod linux;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_user_and_root_may_speak() {
        assert!(check_uid(1000, 1000, None).is_ok());
        assert!(check_uid(0, 1000, None).is_ok());
        assert!(matches!(
            check_uid(1001, 1000, None),
            Err(PeerError::Uid {
                found: 1001,
                expected: 1000
            })
        ));
    }

    #[test]
    fn a_user_without_a_number_here_is_not_taken_for_the_one_whose_number_it_shows() {
        assert!(matches!(
            check_uid(65534, 65534, Some(65534)),
            Err(PeerError::Unmapped(65534))
        ));
        assert!(check_uid(65534, 65534, None).is_ok());
    }

    #[tokio::test]
    async fn a_peer_of_this_process_may_speak() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = check(&ours).unwrap();
        assert!(!peer.user.is_empty());
    }
}
