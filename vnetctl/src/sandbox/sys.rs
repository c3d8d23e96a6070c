//! The few system calls that `nix` does not wrap, made safe to call.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal};

/// Marks every descriptor above 2 to be closed by the next exec: close_range(2), or one by one where
/// the kernel (before 5.11) does not know that flag.
pub(crate) fn close_above_2_on_exec() -> nix::Result<()> {
    // SAFETY: sets a flag on descriptors; takes numbers only.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_uint,
        )
    };
    match Errno::result(done) {
        Ok(_) => Ok(()),
        Err(Errno::ENOSYS | Errno::EINVAL) => {
            let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
            for fd in 3..i32::try_from(hard).unwrap_or(i32::MAX).min(1 << 20) {
                // SAFETY: sets a flag; a number that is not a descriptor gives EBADF, which is fine.
                unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
            }
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Closes every descriptor above 2 but these.
pub(crate) fn close_above_2_but(kept: &mut [i32]) -> nix::Result<()> {
    kept.sort_unstable();
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").map_err(|_| Errno::EIO)? {
        let name = entry.map_err(|_| Errno::EIO)?.file_name();
        open.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    for fd in open {
        if fd > 2 && kept.binary_search(&fd).is_err() {
            // SAFETY: whoever owned it in this process does not use it again, as the caller says; the directory
            // that was read is closed by now.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// Takes from every mount of this mount namespace what set-id bits and file capabilities would give:
/// mount_setattr(2), Linux 5.12.
pub(crate) fn set_nosuid_everywhere() -> nix::Result<()> {
    set_everywhere(libc::MOUNT_ATTR_NOSUID)
}

/// Makes every mount of this mount namespace read-only: mount_setattr(2), Linux 5.12.
pub(crate) fn set_read_only_everywhere() -> nix::Result<()> {
    set_everywhere(libc::MOUNT_ATTR_RDONLY)
}

fn set_everywhere(attribute: u64) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attribute,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path and the attributes live through the call, which reads as many bytes of them as it is told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    Errno::result(done).map(drop)
}

/// Gives every signal its default meaning and unblocks all of them.
pub(crate) fn reset_signals() -> nix::Result<()> {
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: SIG_DFL runs no code of ours.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    }
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// A handle on a process that becomes readable when it ends: pidfd_open(2).
pub(crate) fn pidfd(pid: nix::unistd::Pid) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor (it fits: descriptors are ints) for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The same for one thread, whose own descriptors it then means; `EINVAL` before Linux 6.9.
pub(crate) fn pidfd_of_thread(thread: nix::unistd::Pid) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, thread.as_raw(), libc::PIDFD_THREAD) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A copy of another process's descriptor: pidfd_getfd(2), Linux 5.6.
pub(crate) fn pidfd_getfd(process: BorrowedFd<'_>, number: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The address family of a socket.
pub(crate) fn socket_domain(socket: BorrowedFd<'_>) -> nix::Result<i32> {
    option(socket, libc::SO_DOMAIN)
}

/// How long a call that sends may block (`SO_SNDTIMEO`); for ever when `None`.
pub(crate) fn send_timeout(socket: BorrowedFd<'_>) -> nix::Result<Option<std::time::Duration>> {
    use nix::sys::time::TimeValLike as _;
    let limit = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::SendTimeout)?;
    let microseconds = u64::try_from(limit.num_microseconds()).unwrap_or(0);
    Ok((microseconds > 0).then(|| std::time::Duration::from_micros(microseconds)))
}

fn option(socket: BorrowedFd<'_>, name: libc::c_int) -> nix::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: writes at most the int whose size it is told.
    Errno::result(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    })?;
    Ok(value)
}

/// The network namespace in which a socket was made; `EPERM` when the caller is nobody there.
pub(crate) fn socket_network(socket: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    /// linux/sockios.h
    const SIOCGSKNS: u32 = 0x894c;
    new_descriptor(socket, SIOCGSKNS)
}

/// The file that a Unix socket is bound to, held as by `O_PATH`; `ENOENT` when it has none (Linux 4.14).
pub(crate) fn unix_socket_file(socket: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    /// linux/un.h
    const SIOCUNIXFILE: u32 = 0x89e0;
    new_descriptor(socket, SIOCUNIXFILE)
}

/// An ioctl(2) that takes nothing and makes a descriptor.
fn new_descriptor(of: BorrowedFd<'_>, request: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the two requests of this file take no argument.
    let fd = Errno::result(unsafe { libc::ioctl(of.as_raw_fd(), request as _, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Two Unix sockets that carry messages to each other.
pub(crate) fn seqpacket_pair(flags: i32, protocol: i32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut pair = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | flags;
    // SAFETY: writes the two descriptors that it is given room for.
    Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind, protocol, pair.as_mut_ptr()) })?;
    // SAFETY: the kernel has just made these descriptors for us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// connect(2) with the bytes of an address.
pub(crate) fn connect(socket: BorrowedFd<'_>, address: &[u8]) -> nix::Result<()> {
    // SAFETY: reads as many bytes of the address as it is told; the kernel copies before it looks.
    Errno::result(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// A copy of what is mounted at a path (of the link itself, where that is one) that is not placed yet, and below
/// it if `recursive`: open_tree(2), Linux 5.2.
pub(crate) fn copy_mount(source: &Path, recursive: bool) -> nix::Result<OwnedFd> {
    let source = c_path(source)?;
    let mut flags = libc::c_long::from(libc::OPEN_TREE_CLONE) | libc::c_long::from(libc::O_CLOEXEC);
    flags |= libc::c_long::from(libc::AT_SYMLINK_NOFOLLOW);
    if recursive {
        flags |= libc::c_long::from(libc::AT_RECURSIVE);
    }
    // SAFETY: the path is a live, terminated string.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    let tree = Errno::result(tree)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(tree as i32) })
}

/// Places such a copy over `target` itself, even when that is a symbolic link: move_mount(2), Linux 5.2.
pub(crate) fn place_mount(tree: &OwnedFd, target: &Path) -> nix::Result<()> {
    let target = c_path(target)?;
    // SAFETY: both paths are live, terminated strings; the descriptor is open.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH as libc::c_long,
        )
    })
    .map(drop)
}

/// Makes `tty` the controlling terminal of this session, which must not have one.
pub(crate) fn set_controlling_terminal(tty: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    Errno::result(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// The other end of a pty's master: ptsname(3) without its lock on a path, TIOCGPTPEER (Linux 4.13).
pub(crate) fn pty_peer(master: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags as a number and returns a new descriptor.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A path as the kernel takes it.
pub(crate) fn c_path(path: &Path) -> nix::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Switches `O_NONBLOCK` on.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
