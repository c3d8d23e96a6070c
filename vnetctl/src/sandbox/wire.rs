//! What front and helper say to each other: one JSON message per packet of a Unix socket pair, with
//! descriptors beside it where a message says so.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::claims::Remote;
use super::error::Failure;
use super::front::LinkKind;

/// The most descriptors beside one message: three standard streams.
const MAX_FDS: usize = 3;
/// The largest message; far above what a [`Request`] needs.
const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// The front's first message: what to make. The command itself is in the helper's arguments, its
/// environment and directory are the helper's own.
///
/// Beside it: the descriptors of the standard streams that are not replaced by the pty, in order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    /// See [`Spec`](super::Spec).
    pub(crate) mtu_bytes: u16,
    pub(crate) guest: (Ipv4Addr, u8),
    pub(crate) gateway: Ipv4Addr,
    /// Address, length of its prefix, router.
    pub(crate) ipv6: Option<(Ipv6Addr, u8, Ipv6Addr)>,
    pub(crate) hostname: Option<String>,
    /// Paths as bytes: they need not be UTF-8.
    pub(crate) masks: Vec<Vec<u8>>,
    pub(crate) programs: Vec<Vec<u8>>,
    pub(crate) writable: Option<Vec<Vec<u8>>>,
    pub(crate) sockets: Vec<Vec<u8>>,
    pub(crate) pty: [bool; 3],
    pub(crate) force_packet_socket: bool,
}

/// What the front says later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Start the command.
    Start,
    /// Pass this signal on to the command.
    Signal(i32),
    /// Say which programs have a socket that leads there; the number is the question's.
    Whose(u64, Remote),
}

/// What helper and init say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// All is ready; beside it the link's descriptor, and the pty's master if one was asked for.
    Ready {
        /// What the link is.
        kind: LinkKind,
        /// The guest's MAC address.
        mac: [u8; 6],
        /// What could not be had and does not matter much.
        notes: Vec<String>,
    },
    /// The guest could not be made.
    Failed(Failure),
    /// The command was stopped by this signal (its terminal's suspend key, say).
    Stopped(i32),
    /// The programs that were asked for, and the question's number.
    Owners(u64, Vec<String>),
    /// The command could not be executed.
    NotExecuted {
        /// 126 or 127.
        code: u8,
        /// Why.
        reason: String,
    },
    /// The command ended.
    Exited {
        /// Its exit code, 128+N for a signal.
        code: u8,
        /// The signal that ended it.
        signal: Option<i32>,
    },
}

/// Sends one message.
pub(crate) fn send<M: Serialize>(socket: BorrowedFd<'_>, message: &M, fds: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message and the descriptors beside it; `None` when the other side is gone.
pub(crate) fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE_BYTES];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let length = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => {
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(received) = control {
                        // SAFETY: the kernel has just made these descriptors for us alone.
                        fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break message.bytes;
            }
            Err(nix::errno::Errno::EINTR) => continue,
            Err(nix::errno::Errno::ECONNRESET) => break 0,
            Err(error) => return Err(error.into()),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..length])?;
    Ok(Some((message, fds)))
}
