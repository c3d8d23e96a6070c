//! Linux: in which network namespace a peer is (sock_diag(7), unix(7), pidfd_open(2), namespaces(7)).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use tokio::net::UnixStream;

use super::PeerError;

/// Where a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In this process's network namespace.
    Here,
    /// In another.
    Elsewhere,
}

/// What the peer's process tells.
#[derive(Debug)]
struct Process {
    place: Place,
    /// Its number was its own when it was looked at.
    held: bool,
}

/// Refuses a peer that is, or may be, in another network namespace. `same_user`: its process can be
/// looked at, unless it hides.
pub(super) fn check_namespace(
    stream: &UnixStream,
    pid: Option<i32>,
    same_user: bool,
) -> Result<(), PeerError> {
    let pid = pid.unwrap_or(0);
    judge(pid, same_user, by_connection(stream), by_process(stream, pid))
}

fn judge(
    pid: i32,
    same_user: bool,
    connection: io::Result<Place>,
    process: io::Result<Process>,
) -> Result<(), PeerError> {
    match (connection, process) {
        (Ok(Place::Elsewhere), _)
        | (
            _,
            Ok(Process {
                place: Place::Elsewhere,
                ..
            }),
        ) => Err(PeerError::OtherNamespace { pid }),
        (Ok(Place::Here), Ok(_)) | (Err(_), Ok(Process { held: true, .. })) => Ok(()),
        // Root's processes are not for other users to look at.
        (Ok(Place::Here), Err(_)) if !same_user => Ok(()),
        (_, Err(source)) => Err(PeerError::Namespace { pid, source }),
        (Err(source), Ok(_)) => Err(PeerError::Unsure { pid, source }),
    }
}

/// Asks the kernel whether it knows the accepted socket among those of this network namespace. It was
/// made in the namespace of the socket that connected (`unix_stream_connect`).
fn by_connection(stream: &UnixStream) -> io::Result<Place> {
    // Before, the kernel answered for sockets of every namespace.
    if kernel_version()? < SEES_ITS_OWN_NAMESPACE {
        return Err(io::ErrorKind::Unsupported.into());
    }
    match ask(stream)? {
        Place::Here => Ok(Place::Here),
        // A kernel that has no unix_diag says the same of every socket.
        Place::Elsewhere => known_apart(ask(&std::os::unix::net::UnixStream::pair()?.0)?),
    }
}

/// What it means that a socket was not found, when one of this namespace is asked about as well.
fn known_apart(own: Place) -> io::Result<Place> {
    match own {
        Place::Here => Ok(Place::Elsewhere),
        Place::Elsewhere => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel has no unix_diag; as root: modprobe unix_diag",
        )),
    }
}

fn ask(stream: impl AsFd) -> io::Result<Place> {
    // A socket's number may come again after 2^32 others; the cookie does not (socket(7), SO_COOKIE).
    let cookie = rustix::net::sockopt::socket_cookie(&stream)?;
    let inode = rustix::fs::fstat(&stream)?.st_ino;
    let asker = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::SOCK_DIAG),
    )?;
    let question = question(
        u32::try_from(inode).map_err(|_| invalid("a socket's inode number"))?,
        cookie,
    );
    let kernel = netlink::SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&asker, &question, SendFlags::empty(), &kernel)?;
    // The kernel answers while it is asked, so the answer is there.
    let mut answer = [0; 512];
    let (length, _) = rustix::net::recv(&asker, &mut answer[..], RecvFlags::empty())?;
    read_answer(&answer[..length])
}

/// `nlmsghdr` and `unix_diag_req` (linux/netlink.h, linux/unix_diag.h): one socket, nothing but its being.
fn question(inode: u32, cookie: u64) -> [u8; QUESTION_BYTES] {
    let mut bytes = [0; QUESTION_BYTES];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &(QUESTION_BYTES as u32).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST.to_ne_bytes());
    put(16, &[AF_UNIX]);
    // In every state.
    put(20, &u32::MAX.to_ne_bytes());
    put(24, &inode.to_ne_bytes());
    put(32, &(cookie as u32).to_ne_bytes());
    put(36, &((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn read_answer(answer: &[u8]) -> io::Result<Place> {
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    match kind {
        Some(SOCK_DIAG_BY_FAMILY) => Ok(Place::Here),
        Some(NLMSG_ERROR) => {
            let error = answer
                .get(16..20)
                .map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
                .ok_or_else(|| invalid("a netlink error without a number"))?;
            match -error {
                // Among those of this namespace it is not.
                nix::libc::ENOENT => Ok(Place::Elsewhere),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
        _ => Err(invalid("a netlink answer of another kind")),
    }
}

/// Looks at the namespace of the process that connected.
fn by_process(stream: &UnixStream, pid: i32) -> io::Result<Process> {
    // Zero: the peer is outside this PID namespace.
    if pid <= 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    let pidfd = peer_pidfd(stream)?;
    let own = namespace("/proc/self/ns/net")?;
    let theirs = namespace(&format!("/proc/{pid}/ns/net"))?;
    // Still alive after the look: so the number was its own when it was looked at.
    if pidfd.as_ref().is_some_and(has_ended) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(Process {
        place: if own == theirs {
            Place::Here
        } else {
            Place::Elsewhere
        },
        held: pidfd.is_some(),
    })
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

/// The number that stands for users whom this user namespace has none for; `None`: it knows all.
pub(super) fn unmapped_uid() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if knows_every_user(&map) {
        return None;
    }
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid").ok();
    Some(
        overflow
            .and_then(|n| n.trim().parse().ok())
            .unwrap_or(OVERFLOW_UID),
    )
}

fn knows_every_user(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn kernel_version() -> io::Result<(u32, u32)> {
    let name = rustix::system::uname();
    version(&name.release().to_string_lossy()).ok_or_else(|| invalid("the kernel's release"))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} cannot be read"))
}

/// From here on a question about one Unix socket is answered for those of the asker's network
/// namespace alone (Linux commit 0f5da659d8f1).
const SEES_ITS_OWN_NAMESPACE: (u32, u32) = (4, 14);
const QUESTION_BYTES: usize = 40;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const AF_UNIX: u8 = 1;
const OVERFLOW_UID: u32 = 65_534;

#[cfg(test)]
mod tests;
