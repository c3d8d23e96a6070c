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

/// Takes from every mount of this mount namespace what set-id bits and file capabilities would give:
/// mount_setattr(2), Linux 5.12.
pub(crate) fn set_nosuid_everywhere() -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID,
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

/// Lays the file `source` over `target` itself, even when that is a symbolic link that leads nowhere:
/// open_tree(2), move_mount(2), Linux 5.2.
pub(crate) fn bind_without_following(source: &Path, target: &Path) -> nix::Result<()> {
    let source = c_path(source)?;
    let target = c_path(target)?;
    let flags = libc::OPEN_TREE_CLONE as libc::c_long | libc::c_long::from(libc::O_CLOEXEC);
    // SAFETY: the path is a live, terminated string.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    let tree = Errno::result(tree)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
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
