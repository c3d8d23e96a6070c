//! Descriptors that a parent handed down by number, and the lifeline made of one.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes an inherited descriptor, and keeps it from being inherited further. Each number may be taken
/// once; the configuration sees to it that no two flags name the same.
///
/// # Errors
/// The host's error when no such descriptor is open.
pub fn take(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `from_raw_fd` needs an open descriptor that nobody else owns. It is one that the parent
    // left open for this process alone and named in a flag; nothing in this process has opened it, and
    // it is wrapped here once. That it is open is checked next; if it is not, it is never closed.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(owned),
        Err(error) => {
            std::mem::forget(owned);
            Err(error.into())
        }
    }
}

/// Returns when the other end of a pipe or socket pair is closed, by whatever end of whoever held it.
/// Bytes that arrive meanwhile mean nothing.
///
/// # Errors
/// The host's error when the descriptor cannot be read.
pub async fn closed(lifeline: OwnedFd) -> io::Result<()> {
    use nix::errno::Errno;

    set_nonblocking(&lifeline)?;
    // SAFETY: an OwnedFd is open and is the same descriptor for as long as it lives, and it lives inside
    // the AsyncFd until that is dropped.
    let lifeline = unsafe { tokio::io::unix::AsyncFd::register(lifeline) }?;
    let mut buffer = [0; 64];
    loop {
        let mut ready = lifeline.readable().await?;
        match nix::unistd::read(lifeline.get_ref(), &mut buffer) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes reads and writes return at once.
///
/// # Errors
/// The host's error.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::OFlag;

    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::IntoRawFd as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_number_that_is_not_open_is_refused() {
        let error = take(1_000_000).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EBADF));
    }

    #[test]
    fn what_is_taken_is_not_inherited_further() {
        let (here, _there) = UnixStream::pair().unwrap();
        let taken = take(here.into_raw_fd()).unwrap();
        let flags = FdFlag::from_bits_retain(fcntl(&taken, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }

    #[tokio::test]
    async fn the_lifeline_ends_with_its_other_end_and_not_with_bytes() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut closed = tokio::spawn(closed(here.into()));
        there.write_all(b"still here").unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut closed).await;
        assert!(early.is_err());
        drop(there);
        closed.await.unwrap().unwrap();
    }
}
